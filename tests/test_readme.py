"""What README.md promises: its commands parse, the files and flags that it names exist, defaults have sources."""
import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("pretrain", "finetune_det", "probe_cls", "probe_loc")
SOURCE = r"\[(paper|released code|MoCo v2|detectron2|NCCL|ours)\b"
with open(os.path.join(HERE, "README.md")) as f:
    README = f.read()
with open(os.path.join(HERE, "insloc.py")) as f:
    METHOD = f.read()


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


# ----------------------------------------------------------------------------------------------------------
# The audit table, the breakpoints, the pieces
# ----------------------------------------------------------------------------------------------------------

def defined(path):
    """The names that a file defines: functions, classes, and methods as Class.method."""
    with open(os.path.join(HERE, path)) as f:
        tops = [node for node in ast.parse(f.read()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name for node in tops} | {f"{node.name}.{inner.name}" for node in tops for inner in node.body
                                           if isinstance(inner, ast.FunctionDef)}


def test_the_audit_table_names_what_exists_and_leaves_nothing_of_the_paper_out():
    section = README.partition("## Check it against the paper")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    for _, what, here, tests in rows:
        names = re.findall(r"`(\w+\.py):([\w.]+)`", here)
        assert "not drawn" in here or names and "test_" in tests, what
        for file, name in names + re.findall(r"`(\w+\.py):(\w+)`", tests):
            folder = "tests" if file.startswith("test_") else ""
            assert name in defined(os.path.join(folder, file)), f"{file}:{name}"
    covered = set()
    items = " ".join(row[0] for row in rows)
    for kind, numbers in re.findall(r"(Eq\.|Fig\.|Tables?) (\d(?:[-\d]| to \d|, \d)*)", items):
        ends = re.findall(r"\d", numbers)
        span = range(int(ends[0]), int(ends[-1]) + 1) if re.search("-|to", numbers) else map(int, ends)
        covered |= {(kind[:3].rstrip("."), number) for number in span}
    assert covered >= {(kind, n) for kind, last in (("Eq", 6), ("Fig", 4), ("Tab", 5)) for n in range(1, last + 1)}


def write_toy(folder, count):
    subprocess.run([sys.executable, os.path.join(HERE, "tests", "toy.py"), "toy", "--train", str(count), "--val", "1",
                    "--det-train", "1", "--det-val", "1"], cwd=folder, check=True, capture_output=True)


def test_the_six_breakpoints_show_what_the_readme_says(tmp_path):
    section = README.partition("## Six breakpoints")[2].partition("\n## ")[0]
    command = re.search(r"^    python (-m pdb .*?toy/images)$", section, re.M | re.S)[1].replace("\\\n", " ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()
            if re.match(r"\| (\| )?`", line)]
    stops, typed = [], []
    for where, keys, _ in rows:
        if where:
            typed += ["c"] * bool(stops)
            stops.append(where.strip("`"))
        assert shlex.split(command).count(f"tbreak {stops[-1]}") == 1
        typed += re.findall("`(.*?)`", keys)
    assert len(stops) == 6
    os.symlink(os.path.join(HERE, "insloc.py"), tmp_path / "insloc.py")
    os.symlink(os.path.join(HERE, "pretrain.py"), tmp_path / "pretrain.py")
    write_toy(tmp_path, 40)
    run = subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, text=True, capture_output=True,
                         input="\n".join([*typed, "q", ""]), env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert "***" not in run.stdout and "Error" not in run.stdout + run.stderr, run.stdout + run.stderr
    at = 0
    for where, _, see in rows:                              # each is seen, in this order
        if where:
            at = run.stdout.index(f"{where.strip('`').rpartition('.')[2]}()", at)
        for fragment in re.findall("`(.*?)`", see):
            assert fragment in run.stdout[at:], (fragment, run.stdout[at:])
            at = run.stdout.index(fragment, at)
    with open(tmp_path / "composite.png", "rb") as f:
        assert f.read(8) == b"\x89PNG\r\n\x1a\n"


def piece(names):
    """insloc.py cut down to its imports, `names`, and what those need."""
    body = ast.parse(METHOD).body
    tops = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    wanted, queue = set(), list(names)
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            needs = (ast.get_docstring(tops[name]) or "").partition("needs:")[2]
            queue += [other for other in re.findall(r"\w+", needs) if other in tops]
    text, lines = "", METHOD.splitlines(keepends=True)
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "name", "") in wanted:
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            text += "".join(lines[first - 1:node.end_lineno]) + "\n"
    return text


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_five_pieces():
    assert len(SNIPPETS) == 5


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["encoder", "jitter", "photometric", "queue", "loader"])
def test_pieces_run_beside_their_source_alone(snippet, tmp_path):
    names = re.search(r"^from insloc import ([\w, ]+)", snippet, re.M)[1].replace(",", " ").split()
    source = piece(names)
    assert len(source) < len(METHOD) / 2
    (tmp_path / "insloc.py").write_text(source)
    (tmp_path / "program.py").write_text(snippet)
    if "toy/" in snippet:
        write_toy(tmp_path, 32)
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, text=True, capture_output=True, timeout=300,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr


def test_the_studys_table_is_what_its_files_say():
    """docs/results/README.md against the results.json and log.jsonl beside it."""
    folder = os.path.join(HERE, "docs", "results")
    with open(os.path.join(folder, "README.md")) as f:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in f if line.startswith("| ")]
    small = {row[0].strip("`"): row[1:] for row in rows if len(row) in (3, 4, 6)}   # detection, ablations
    rows = {row[0].partition(",")[0].partition("` (")[0].strip("`"): row[1:6] for row in rows if len(row) == 7}
    columns = (("random",), ("moco_s0", "moco_s1"), ("ra_s0", "ra_s1"), ("cp_s0",), ("insloc_s0", "insloc_s1"))

    def read(run, name):
        with open(os.path.join(folder, run, name)) as f:
            return [line for line in map(json.loads, f) if "loss" in line] if name == "log.jsonl" else json.load(f)

    def place(run, protocol):
        lines = read("insloc_s0" if run == "random" else run, "loc.json")["lines"]
        return next(line["top1"] for line in lines if line["protocol"] == protocol
                    and line["net"] == ("random" if run == "random" else "given"))

    for column, runs in enumerate(columns):
        if runs != ("random",):
            last = [sum(line["acc_batch"] for line in read(run, "log.jsonl")[-10:]) / 10 for run in runs]
            assert rows["acc_batch"][column] == ", ".join(f"{value:.2f}".lstrip("0") for value in last)
        for label, values in [("20-NN", [read(run, "knn.json")["top1"] for run in runs]),
                              ("linear classification", [read(run, "lin.json")["top1"] for run in runs]),
                              *((label, [place(run, protocol) for run in runs]) for label, protocol in
                                (("localization", "full"), *((name, name) for name in
                                                             ("gray", "reflect", "placed", "alone"))))]:
            assert rows[label][column].rstrip("*") == ", ".join(f"{value:.1f}" for value in values), (runs, label)
    for run in os.listdir(os.path.join(folder, "abl")):
        last = sum(line["acc_batch"] for line in read(f"abl/{run}", "log.jsonl")[-10:]) / 10
        values = [read(f"abl/{run}", "knn.json")["top1"],
                  *(place(f"abl/{run}", name) for name in ("reflect", "placed"))]
        assert small[run][1:] == [f"{last:.2f}".lstrip("0"), *(f"{value:.1f}" for value in values)], run
    for run in [f"fpn/{rung}" for rung in ("moco", "ra", "cp", "insloc")] + [
            f"fpn2/{rung}" for rung in ("moco", "ra", "cp", "insloc", "levels")]:
        means = [sum(line[key] for line in read(run, "log.jsonl")[-10:]) / 10 for key in ("acc_batch", "acc_queue")]
        values = [read(run, "knn.json")["top1"], *(place(run, name) for name in ("reflect", "placed"))]
        assert small[run] == [f"{mean:.3f}".lstrip("0") for mean in means] + [f"{value:.1f}" for value in values], run
    for name in os.listdir(os.path.join(folder, "det")):
        found = read("det", name)["mean"]
        assert small[name.partition(".")[0]] == [f"{found[ap]:.1f}" for ap in ("AP50bb", "APbb")], name
    for name in os.listdir(os.path.join(folder, "det_coco")):
        found = read("det_coco", name)
        values = [found["mean"]["AP50bb"], found["mean"]["AP50mk"], found["trials"][0]["bbox"]["APl"]]
        assert small[f"coco_{name.partition('.')[0]}"] == [f"{value:.1f}" for value in values], name
