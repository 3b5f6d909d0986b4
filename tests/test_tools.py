"""install.py, bench.py's limits, demo.py, and what the Makefile runs."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile

import bench
import demo
import install
import pytest

import pretrain
import probe_cls

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- install.py -------------------------------------------------------------------------------------------

def write_wheel(folder, name):
    """A wheel of one module, made by hand."""
    os.makedirs(folder, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(f"{folder}/{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "where = 'wheel'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


def machine_with_settings(folder, venv):
    """Variables of a machine whose settings put packages elsewhere, or take them for installed."""
    write_wheel(folder / "wheels", "gained")
    shutil.copytree(folder / "wheels", folder / "more wheels")
    site = folder / "site"
    with zipfile.ZipFile(folder / "wheels" / "gained-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(site)                              # a copy that pip finds on PYTHONPATH
    (site / "gained.py").write_text("where = 'PYTHONPATH'\n")
    (folder / "pip.conf").write_text(
        f"[global]\nfind-links =\n    {folder}/none\n    {folder}/wheels\nno-index = true\nretries = 0\n"
        f"[install]\nuser = true\ntarget = {folder}/file_target\n")
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(site),
            "PIP_CONFIG_FILE": f"{folder}/pip.conf", "PIP_TARGET": f"{folder}/target", "PIP_USER": "1",
            "PIP_PREFIX": f"{folder}/prefix", "PIP_REQUIRE_HASHES": "1", "PIP_CONSTRAINT": f"{folder}/absent",
            "PIP_PYTHON": "/absent/python", "PIP_TIMEOUT": "7"}


def test_settings_of_the_machine_do_not_decide_what_is_installed(empty_venv, tmp_path):
    python = str(empty_venv / "bin" / "python")
    machine = machine_with_settings(tmp_path, empty_venv)
    environment = install.pip_environment(python, machine)
    install.pip_install(python, environment, "gained")
    found = subprocess.run([python, "-I", "-c", "import gained; print(gained.where, gained.__file__)"],
                           capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == "wheel" and found[1].startswith(str(empty_venv))
    assert not any((tmp_path / name).exists() for name in ("target", "prefix", "file_target"))
    kept = {"PIP_NO_INDEX": "true", "PIP_RETRIES": "0", "PIP_TIMEOUT": "7", "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": f"{tmp_path}/none {tmp_path}/wheels"}
    assert kept.items() <= environment.items()
    for name in ("PIP_TARGET", "PIP_USER", "PIP_PREFIX", "PIP_REQUIRE_HASHES", "PIP_PYTHON", "PYTHONPATH"):
        assert name not in environment
    assert environment.get("PIP_CONSTRAINT") != machine["PIP_CONSTRAINT"]


def test_the_settings_would_decide_without_install_py(empty_venv, tmp_path):
    """The fault is real: pip itself, on that machine, leaves the environment without the package."""
    python = str(empty_venv / "bin" / "python")
    machine = machine_with_settings(tmp_path, empty_venv)
    for name in ("PIP_PYTHON", "PIP_CONSTRAINT", "PIP_REQUIRE_HASHES", "PIP_USER", "PIP_PREFIX"):
        machine.pop(name)
    write_wheel(tmp_path / "wheels", "other")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-user", "other"], env=machine, check=True)
    assert (tmp_path / "target" / "other.py").exists()
    assert subprocess.run([python, "-I", "-c", "import other"], capture_output=True).returncode


def test_an_option_of_the_environment_wins_over_a_file(empty_venv, tmp_path):
    python = str(empty_venv / "bin" / "python")
    machine = machine_with_settings(tmp_path, empty_venv)
    constraints = tmp_path / "constraints.txt"
    with open(tmp_path / "pip.conf", "a") as f:
        f.write(f"find-links = {tmp_path}/install\nconstraint = {constraints}\n")       # of [install]
    environment = install.pip_environment(python, machine)
    assert environment["PIP_FIND_LINKS"] == f"{tmp_path}/install"
    assert environment["PIP_CONSTRAINT"] == str(constraints)            # of a file, not of the environment
    environment = install.pip_environment(python, {**machine, "PIP_FIND_LINKS": "here"})
    assert environment["PIP_FIND_LINKS"] == "here"


@pytest.mark.parametrize("version, tried", [((3, 11, 0), True), ((3, 13, 9), True), ((3, 14, 0), False)])
def test_pythons_that_were_tried_and_newer_ones_go_on(version, tried, capsys):
    assert install.check_python(version) == tried
    assert ("never run" in capsys.readouterr().out) == (not tried)


def test_an_older_python_is_refused():
    with pytest.raises(SystemExit, match="3.11 to 3.13 is needed, this is 3.10.*PYTHON=python3.12"):
        install.check_python((3, 10, 2))


@pytest.mark.parametrize("tried", [True, False])
def test_a_missing_detectron2_costs_stage_3_alone_where_python_is_new(tried, tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *detectron2*) echo "no wheel" >&2; exit 1; esac\n')
    python.chmod(0o755)
    if tried:
        with pytest.raises(SystemExit, match="no wheel.*stage 3"):
            install.check_imports(str(python), dict(os.environ), tried)
    else:
        install.check_imports(str(python), dict(os.environ), tried)
        assert re.search("no wheel.*stage 3.*stages 1 and 2", capsys.readouterr().out)


@pytest.mark.slow
def test_another_python_makes_the_environment_anew(empty_venv, tmp_path):
    folder = tmp_path / "venv"
    install.make_venv(str(folder))
    (folder / "kept").touch()
    assert install.make_venv(str(folder)) == str(folder / "bin" / "python") and (folder / "kept").exists()
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")       # says that it is of another version
    (folder / "bin" / "python").chmod(0o755)
    install.make_venv(str(folder))
    assert not (folder / "kept").exists()


# ---- bench.py: limits -------------------------------------------------------------------------------------

def test_a_command_that_is_cut_off_takes_its_children_along(tmp_path):
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])"
    command = [sys.executable, "-c", parent, str(tmp_path / "pid")]
    result = bench.run_limited(command, 5, str(tmp_path))
    assert result == "cut off after 5 s"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}") or " Z " in open(f"/proc/{pid}/stat").read():
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


def test_a_command_that_fails_is_told_by_its_last_line(tmp_path):
    for code, result in (("raise ValueError('why')", "FAILED: ValueError: why"),
                         ("raise SystemExit(3)", "FAILED: status 3"), ("pass", "done")):
        assert bench.run_limited([sys.executable, "-c", code], 60, str(tmp_path)) == result


def test_rows_that_were_measured_before_a_cut_are_kept(tmp_path, monkeypatch):
    """A row is in --json before the next one is begun."""
    path = tmp_path / "rows.jsonl"

    def step(args):
        yield {"row": "first", "ms": 1.5}
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.ROWS, "step", step)
    monkeypatch.setattr(sys, "argv", ["bench.py", "step", "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    row, = map(json.loads, path.read_text().splitlines())
    assert row["row"] == "first" and row["ms"] == 1.5 and "torch" in row["machine"]


def test_all_of_gpu_ends_in_time_and_says_what_was_left_out(tmp_path, monkeypatch):
    class Clock:
        time = 0

    def run_limited(command, seconds, folder, stdout):
        assert 5 < seconds <= bench.ROW_SECONDS
        if command[1].endswith("bench.py"):
            given = bench.get_args(command[2:])
            assert given.tiny and given.images == "/pictures" and given.pretrain == ["--workers", "2"]
        Clock.time += seconds
        return f"cut off after {seconds:.0f} s"

    monkeypatch.setattr(bench.time, "monotonic", lambda: Clock.time)
    monkeypatch.setattr(bench, "run_limited", run_limited)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    args = bench.get_args("gpu /pictures --tiny --rounds 1 --seconds 203 -- --workers 2".split())
    args.folder = str(tmp_path)
    rows = list(bench.gpu(args))
    assert Clock.time == 203 and len(rows) == 1 + len(bench.BY_WORTH)
    results = [row["result"] for row in rows]
    assert results[2:5] == ["cut off after 60 s", "cut off after 23 s", "no time was left"]
    assert rows[0]["row"] == "gpu, tests" and rows[1]["row"] == "gpu, step --arch c4"


# ---- demo.py ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, random, which", [
    ([5, 6, 5.5], [1, 2, 1.5], "given"), ([1, 2, 1.5], [5, 6, 5.5], "random"),
    ([5, 6, 5.5], [3, 4, 4.9], ""),                         # apart, but by less than twice the seeds
    ([5, 9, 7], [1, 2, 6], ""), ([3, 3], [3, 3], "")])
def test_the_verdict_asks_for_more_than_the_seeds_noise(given, random, which):
    assert demo.verdict(given, random) == which


def test_the_last_words_of_the_demos(tmp_path):
    records = [{"args": {"batch_size": 64}}, {"step": 3}]
    records += [{"acc_batch": i / 100} for i in range(20)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results = {"given": {"top1": 97.66}, "random": {"top1": 61.2}}
    (tmp_path / "results.json").write_text(json.dumps({"results": results, "chance": 20.0}))
    text = demo.pairs(str(tmp_path), str(tmp_path))
    for word in ("18%", "1.6%", "63 other", "98 %", "61 %", "20 %", "of 5 colours"):
        assert word in text
    for name, values in (("a", [5.0, 6.0]), ("b", [1.0, 2.0])):
        (tmp_path / name).mkdir()
        trials = [{"bbox": {"AP50": value}} for value in values]
        (tmp_path / name / "results.json").write_text(json.dumps({"trials": trials}))
    assert "Pre-training helped" in demo.detector(f"{tmp_path}/a", f"{tmp_path}/b")
    assert "did harm" in demo.detector(f"{tmp_path}/b", f"{tmp_path}/a")
    text = demo.detector(f"{tmp_path}/a", f"{tmp_path}/a")
    assert "5.0     6.0" in text and "does not show that pre-training helps" in text


# ---- Makefile ---------------------------------------------------------------------------------------------

def commands(*targets):
    """The commands that make would run, as lists of words, with variables set in front left out."""
    done = subprocess.run(["make", "-n", *targets], cwd=HERE, capture_output=True, text=True, check=True)
    for line in done.stdout.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        script = [i for i, word in enumerate(words) if word.endswith(".py")]
        if script:
            yield os.path.basename(words[script[0]]), words[script[0] + 1:], words[:script[0]]


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_the_commands_of_the_makefile_parse():
    finetune_det = pytest.importorskip("finetune_det")
    parsers = {"pretrain.py": pretrain.get_args, "probe_cls.py": probe_cls.get_args,
               "finetune_det.py": finetune_det.get_args}
    seen = set()
    for script, arguments, before in commands("demo", "demo-detect", "test", "gpu"):
        for sign in (">", "|", "2>&1", ";"):
            if sign in arguments:
                arguments = arguments[:arguments.index(sign)]
        if script in parsers:
            parsers[script](arguments)
            assert before[-6:-1] == ["env", "-u", "PYTHONPATH", "-u", "PYTHONHOME"]
            assert before[0] == "OMP_NUM_THREADS=1" and arguments[arguments.index("--device") + 1] == "cpu"
        seen.add(script)
    assert seen >= {"pretrain.py", "probe_cls.py", "finetune_det.py", "demo.py", "bench.py"}


def test_two_sessions_at_once_leave_each_other_their_folders(tmp_path):
    """With the settings of pyproject.toml, by which a folder of a session that runs must be locked."""
    shutil.copy(f"{HERE}/pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import time\ndef test_it(tmp_path):\n    for _ in range(40):\n"
        "        assert tmp_path.exists()\n        time.sleep(0.1)\n")
    environment = {**os.environ, "PYTEST_DEBUG_TEMPROOT": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    sessions = []
    for _ in range(2):
        sessions.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True,
                                         stdout=subprocess.PIPE))
        time.sleep(1.5)
    for session in sessions:
        assert session.communicate()[0].splitlines()[-1].startswith("1 passed")
    left = os.listdir(next(tmp_path.glob("pytest-of-*")))
    assert [name for name in left if name != "pytest-current"] == []
