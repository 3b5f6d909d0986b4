"""What README.md promises: its commands parse, the files and flags that it names exist, defaults have sources."""
import argparse
import importlib
import os
import re
import shlex

import pytest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("pretrain", "finetune_det", "probe_cls", "probe_loc")
SOURCE = r"\[(paper|released code|MoCo v2|detectron2|NCCL|ours)\b"
with open(os.path.join(HERE, "README.md")) as f:
    README = f.read()


class Parser(Exception):
    """Carries the parser out of get_args, before it looks for GPUs or files."""


def parser_of(script, monkeypatch):
    def stop(self, *_, **__):
        raise Parser(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Parser) as caught:
            importlib.import_module(script).get_args([])
    return caught.value.args[0]


def commands():
    """(script, arguments) of every indented line of the README that runs one of ours, torchrun's included."""
    block = re.sub(r" \\\n *", " ", README)
    for line in re.findall(r"^    ((?:\w+=\S+ )*(?:python|torchrun) .*)$", block, re.M):
        words = shlex.split(line, comments=True)
        script = next((word for word in words if word.endswith(".py")), "")
        if script.removesuffix(".py") in SCRIPTS:
            yield script.removesuffix(".py"), tuple(words[words.index(script) + 1:])


def test_the_readme_has_commands_of_every_stage():
    assert {script for script, _ in commands()} == set(SCRIPTS)
    assert len(list(commands())) >= 10


@pytest.mark.parametrize("script, arguments", list(commands()))
def test_commands_of_the_readme_parse(script, arguments, monkeypatch):
    parser = parser_of(script, monkeypatch)
    parser.parse_args(list(arguments))              # exits with status 2 for what it does not know


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_says_where_its_default_comes_from(script, monkeypatch):
    for action in parser_of(script, monkeypatch)._actions:
        given = action.default is None and action.metavar in ("DIR", "FILE")      # data, no default
        if action.option_strings and not action.required and action.dest != "help" and not given:
            assert re.search(SOURCE, action.help or ""), action.option_strings


def test_flags_and_files_that_the_readme_names_exist(monkeypatch):
    known = {flag for script in SCRIPTS for action in parser_of(script, monkeypatch)._actions
             for flag in action.option_strings}
    named = set(re.findall(r"`(--[a-z-]+)", README)) - {"--logdir"}
    assert named and named <= known
    files = re.findall(r"\]\((docs/[^)]+)\)|`((?:tests/|docs/)?\w+\.py)`", README)
    assert len(files) >= 6
    for name in map("".join, files):
        assert os.path.exists(os.path.join(HERE, name)), name


def test_line_counts_of_the_files_are_right():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M):
        with open(os.path.join(HERE, name)) as f:
            assert abs(len(f.readlines()) - int(lines)) <= 10, name
