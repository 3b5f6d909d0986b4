"""What README.md and docs/*.md promise: commands parse, what they name exists, the programs in them run."""
import argparse
import ast
import functools
import glob
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch

from insloc import FPNEncoder, make_resnet, read_image

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("pretrain", "finetune_det", "probe_cls", "probe_loc", "probe_box")
SOURCE = r"\[(paper|released code|MoCo v2|detectron2|ours)\b"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}


def read(name):
    with open(os.path.join(HERE, name)) as f:
        return f.read()


DOCS = {os.path.relpath(path, HERE): read(path) for path in [
    f"{HERE}/README.md", *sorted(glob.glob(f"{HERE}/docs/*.md")), f"{HERE}/docs/results/README.md"]}
README, DEBUGGING, WEIGHTS = DOCS["README.md"], DOCS["docs/debugging.md"], DOCS["docs/weights.md"]
METHOD = read("insloc.py")
TEXT = "\n".join(DOCS.values())


def section(text, title):
    found = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def rows(text):
    """Cells of the tables' rows, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {i - 1 for i, line in enumerate(lines) if re.match(r"\|-", line)}
    return [[cell.strip() for cell in line.split("|")[1:-1]] for i, line in enumerate(lines)
            if i not in heads and not re.match(r"\|-", line)]


# ---- Commands, options, names ----------------------------------------------------------------------------

class Parser(Exception):
    """Carries the parser out of get_args, before it looks for GPUs or files."""


def parser_of(script, monkeypatch):
    def stop(self, *_, **__):
        raise Parser(self)

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(Parser) as caught:
            importlib.import_module(script).get_args([])
    return caught.value.args[0]


def commands():
    """(script, arguments) of every indented line that runs one of ours, torchrun's included."""
    text = re.sub(r" \\\n *", " ", TEXT)
    for line in re.findall(r"^ {4,}((?:\w+=\S+ )*(?:srun|python|torchrun) .*)$", text, re.M):
        words = shlex.split(line, comments=True)
        script = next((word for word in words if word.endswith(".py")), "")
        if script.removesuffix(".py") in SCRIPTS:
            yield script.removesuffix(".py"), tuple(words[words.index(script) + 1:])


COMMANDS = sorted(set(commands()))


def test_there_are_commands_of_every_stage():
    assert {script for script, _ in COMMANDS} == set(SCRIPTS) and len(COMMANDS) >= 15


@pytest.mark.parametrize("script, arguments", COMMANDS, ids=lambda value: None if isinstance(value, str) else
                         " ".join(value))
def test_commands_parse(script, arguments, monkeypatch):
    parser = parser_of(script, monkeypatch)
    parse = parser.parse_intermixed_args if script == "finetune_det" else parser.parse_args
    parse(list(arguments))                              # exits with status 2 for what it does not know


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_says_where_its_default_comes_from(script, monkeypatch):
    for action in parser_of(script, monkeypatch)._actions:
        given = action.default is None and action.metavar in ("DIR", "FILE")      # data, no default
        if action.option_strings and not action.required and action.dest != "help" and not given:
            assert re.search(SOURCE, action.help or ""), action.option_strings


def test_flags_that_are_named_exist(monkeypatch):
    known = {flag for script in SCRIPTS for action in parser_of(script, monkeypatch)._actions
             for flag in action.option_strings}
    others = {"--logdir", "--shm-size", "--ipc", "--signal", "--requeue"}   # TensorBoard's, docker's, Slurm's
    named = set(re.findall(r"`(--[a-z-]+)", TEXT)) - others
    assert len(named) > 25 and named <= known, named - known


def test_files_that_are_named_exist():
    for document, text in DOCS.items():
        for name in re.findall(r"\]\(([^)#]+)\)", text):
            if not name.startswith("http"):
                assert os.path.exists(os.path.join(HERE, os.path.dirname(document), name)), (document, name)
        for name in re.findall(r"`((?:tests/|docs/)?\w+\.py)`", text):
            assert os.path.exists(os.path.join(HERE, name)), (document, name)
    makefile = read("Makefile")
    for target in re.findall(r"(?:`|^ {4})make ([a-z-]+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_line_counts_of_the_files_are_right():
    counts = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in counts} == {os.path.basename(path) for path in glob.glob(f"{HERE}/*.py")}
    for name, lines in counts:
        assert abs(len(read(name).splitlines()) - int(lines)) <= 10, name


def test_the_readme_is_short_and_nothing_is_left_to_do():
    assert len(README.splitlines()) <= 200
    assert [line for line in TEXT.splitlines() if "TODO" in line] == []


# ---- docs/audit.md, docs/running.md ----------------------------------------------------------------------

@functools.cache
def defined(path):
    """The names that a file defines: functions, classes, and methods as Class.method."""
    tops = [node for node in ast.parse(read(path)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name for node in tops} | {f"{node.name}.{inner.name}" for node in tops for inner in node.body
                                           if isinstance(inner, ast.FunctionDef)}


def test_symbols_and_tests_that_are_named_exist():
    for file, name in re.findall(r"`((?:tools/)?\w+\.py):([\w.]+)`", TEXT):
        assert name in defined(("tests/" if file.startswith("test_") else "") + file), f"{file}:{name}"
    tests = set().union(*map(defined, glob.glob("tests/test_*.py", root_dir=HERE)))
    assert set(re.findall(r"`(test_\w+)`", TEXT)) <= tests


def test_the_audit_leaves_nothing_of_the_paper_out():
    table = rows(section(DOCS["docs/audit.md"], "Paper, code, test"))
    for _, what, here, tests in table:
        assert ".py:" in here and "test_" in tests, what
    covered = set()
    items = " ".join(row[0] for row in table)
    for kind, numbers in re.findall(r"(Eq\.|Fig\.|Tables?) (\d(?:[-\d]| to \d|, \d)*)", items):
        ends = re.findall(r"\d", numbers)
        span = range(int(ends[0]), int(ends[-1]) + 1) if re.search("-|to", numbers) else map(int, ends)
        covered |= {(kind[:3].rstrip("."), number) for number in span}
    parts = (("Eq", 6), ("Fig", 4), ("Tab", 5))
    assert covered >= {(kind, n) for kind, last in parts for n in range(1, last + 1)}


def test_messages_are_those_of_the_program():
    source = re.sub(r'"\s*\n\s*f?"', "", read("stage.py") + read("pretrain.py") + METHOD)
    for line, *_ in rows(section(DOCS["docs/running.md"], "What the messages mean")):
        for part in line.strip("`").split("..."):
            assert part.strip(" :;,") in source, part


# ---- The programs in the documents -----------------------------------------------------------------------

def write_toy(folder, count):
    numbers = f"--train {count} --val 1 --det-train 1 --det-val 1".split()
    subprocess.run([sys.executable, f"{HERE}/tools/toy.py", "toy", *numbers], cwd=folder, check=True,
                   capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="pdb of 3.13.0 cannot, see docs/debugging.md")
def test_the_six_breakpoints_show_what_is_promised(tmp_path):
    text = section("\n" + DEBUGGING, "Six breakpoints")
    command = re.search(r"^    python (-m pdb .*?toy/images)$", text, re.M | re.S)[1].replace("\\\n", " ")
    table, stops, typed = rows(text), [], []
    for where, keys, _ in table:
        if where:
            typed += ["c"] * bool(stops)
            stops.append(where.strip("`"))
        assert shlex.split(command).count(f"tbreak {stops[-1]}") == 1
        typed += re.findall("`(.*?)`", keys)
    assert len(stops) == 6
    for name in ("insloc", "pretrain", "stage", "weights"):
        os.symlink(f"{HERE}/{name}.py", tmp_path / f"{name}.py")
    write_toy(tmp_path, 40)
    run = subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, text=True, env=ENV,
                         capture_output=True, input="\n".join([*typed, "q", ""]), timeout=300)
    assert "***" not in run.stdout and "Error" not in run.stdout + run.stderr, run.stdout + run.stderr
    at = 0
    for where, _, see in table:                             # each is seen, in this order
        if where:
            at = run.stdout.index(f"{where.strip('`').rpartition('.')[2]}()", at)
        for fragment in re.findall("`(.*?)`", see):
            if not fragment.startswith("--"):
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
            first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))])
            text += "".join(lines[first - 1:node.end_lineno]) + "\n"
    return text


def programs(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


PIECES = programs(DEBUGGING)


def test_there_are_five_pieces_and_two_detectors():
    assert len(PIECES) == 5 and len(programs(WEIGHTS)) == 2


@pytest.mark.parametrize("program", PIECES, ids=["encoder", "jitter", "photometric", "queue", "loader"])
def test_pieces_run_beside_their_source_alone(program, monkeypatch, tmp_path):
    names = re.search(r"^from insloc import ([\w, ]+)", program, re.M)[1].replace(",", " ").split()
    source = piece(names)
    assert len(source) < len(METHOD) * 2 / 3
    alone = types.ModuleType("insloc")
    monkeypatch.setitem(sys.modules, "insloc", alone)       # what the program imports
    exec(source, alone.__dict__)
    monkeypatch.chdir(tmp_path)
    if "toy/" in program:
        write_toy(tmp_path, 32)
    exec(program, {"__name__": "__main__"})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """An FPN encoder, BatchNorm's statistics at random, and the folder with its run directories."""
    folder = tmp_path_factory.mktemp("detectors")
    encoder = FPNEncoder("resnet50")
    for name, x in encoder.state_dict().items():
        if "running" in name:
            x.uniform_(0.5, 1.5)
    for run, file, state in (("fpn", "checkpoint", {"encoder_q": encoder.state_dict()}),
                             ("c4", "backbone", encoder.resnet.state_dict())):
        os.makedirs(folder / f"runs/insloc_{run}")
        torch.save(state, folder / f"runs/insloc_{run}/{file}.pth")
    return encoder.eval(), folder


@torch.no_grad()
@pytest.mark.parametrize("program", programs(WEIGHTS), ids=["Faster R-CNN", "Mask R-CNN"])
def test_torchvisions_detectors_take_the_weights(program, monkeypatch, pretrained):
    encoder, folder = pretrained
    monkeypatch.chdir(folder)
    space = {}
    exec(program, space)
    detector, net = space["detector"].eval(), encoder.resnet
    images, pooled = torch.randn(1, 3, 64, 64), torch.randn(2, 256, 7, 7)
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    for i, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4)):
        x = layer(x)
        assert torch.equal(detector.backbone.body(images)[str(i)], x)
    if "weights" in space:
        assert torch.equal(detector.roi_heads.box_head(pooled), encoder.box_head(pooled))
        for ours, theirs in zip(encoder.pyramid(images), detector.backbone(images).values()):
            assert torch.equal(ours, theirs)
    detector.transform.min_size = (64,)
    assert "boxes" in detector([images[0]])[0]


# ---- Results ---------------------------------------------------------------------------------------------

@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(f"{HERE}/tools")
    return importlib.import_module("figures")


def marks(path, color):
    """The colour's number of pixels in a picture; color (r, g, b)."""
    pixels = read_image(str(path)).permute(1, 2, 0).int()
    return ((pixels - torch.tensor(color)).abs().amax(dim=2) < 8).sum().item()


def test_fig1_shows_table_3a_and_ones_own_runs(figures, tmp_path):
    assert figures.paper_points() == {"SwAV": (70.1, 34.0), "BYOL": (74.3, 37.5), "MoCo-v2": (67.7, 38.9),
                                      "InsLoc": (61.7, 39.5)}
    for name, content in (("cls", {"results": {"given": {"top1": 50.0}}}), ("det", {"mean": {"APbb": 36.0}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    own = figures.own_point(tmp_path / "cls.json", tmp_path / "det.json")
    assert own == (50.0, 36.0)
    red = (224, 30, 30)
    figures.draw_fig1({}, tmp_path)
    assert marks(tmp_path / "fig1.png", red) == 0
    figures.draw_fig1({"mine": own}, tmp_path)
    assert marks(tmp_path / "fig1.png", red) > 20


def test_fig4_shows_the_cells_of_the_probe(figures, monkeypatch, tmp_path):
    figures.draw_fig4(tmp_path)
    nine = marks(tmp_path / "fig4.png", (255, 255, 255))
    monkeypatch.setattr(figures.probe_loc, "grid_boxes", lambda size: figures.grid_anchors(size)[:0])
    figures.draw_fig4(tmp_path)
    assert nine > marks(tmp_path / "fig4.png", (255, 255, 255)) + 500


def test_swap_draws_a_column_for_each_net(figures, tmp_path):
    torch.save(make_resnet("narrow18").state_dict(), tmp_path / "net.pth")
    figures.draw_swap([["mine", str(tmp_path / "net.pth")]], tmp_path, size=64)
    columns = read_image(str(tmp_path / "swap.png")).float().mean(dim=(0, 1)).chunk(2)
    assert all(column.std() > 5 for column in columns)                  # the composites, mine


def test_loose_draws_three_boxes_a_composite_and_a_column_for_each_net(figures, tmp_path):
    torch.save(make_resnet("narrow18").state_dict(), tmp_path / "net.pth")
    write_toy(tmp_path, 60)
    data = str(tmp_path / "toy" / "swatches")
    figures.draw_loose([["a", str(tmp_path / "net.pth")]] * 2, data, tmp_path, size=64)
    columns = read_image(str(tmp_path / "loose.png")).chunk(2, dim=2)
    for colour in ((224, 30, 30), (20, 60, 255), (255, 255, 0)):
        wanted = torch.tensor(colour)[:, None, None]
        for column in columns:
            assert ((column - wanted).abs().amax(dim=0) < 12).sum() > 200, colour


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(f"{HERE}/docs/results")
    return importlib.import_module("check")


def test_the_tables_of_results_are_what_their_files_say(check):
    assert check.missing() == []
    runs = [name for trunk in check.SECOND for name in os.listdir(f"{HERE}/docs/results/second/{trunk}")]
    assert len(runs) >= 7 and len(read("docs/results/README.md").splitlines()) <= 340


def test_a_wrong_figure_in_a_table_is_found(check, monkeypatch):
    number = check.number
    monkeypatch.setattr(check, "number", lambda value, digits: number(value + 0.5, digits))
    faults = check.missing()
    assert {page for page, _ in faults} == {"README.md", "../../README.md"} and len(faults) > 15
