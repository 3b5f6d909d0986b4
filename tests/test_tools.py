"""`make install`, bench.py's limits, demo.py, and what the Makefile runs."""
import hashlib
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
import pytest

import pretrain
import probe_cls

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- make install -----------------------------------------------------------------------------------------

IMPORTED = "torch torchvision pycocotools pytest safetensors matplotlib tensorboard".split()


def write_wheel(folder, name, files, needs=""):
    """A wheel made by hand. Returns how requirements name it, with its hash."""
    os.makedirs(folder, exist_ok=True)
    path = f"{folder}/{name}-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    if needs:
        metadata += f"Requires-Dist: {needs}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in files:
            wheel.writestr(file, "where = 'wheel'\n")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL",
                       "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    with open(path, "rb") as f:
        return f"{name}==1.0 --hash=sha256:{hashlib.sha256(f.read()).hexdigest()}"


class Machine:
    """The Makefile in a folder, with packages of its own that stand for torch and detectron2. No network.

    Its settings put packages elsewhere, take them for installed, or leave some out.
    """

    def __init__(self, folder):
        self.folder = folder
        shutil.copy(f"{HERE}/Makefile", folder)
        (folder / "requirements.txt").write_text("gained\n")
        wheels = f"{folder}/wheels"
        write_wheel(wheels, "gained", ["gained.py"], needs="needed")
        write_wheel(wheels, "needed", [f"{name}.py" for name in IMPORTED])
        self.whole = write_wheel(wheels, "whole", ["detectron2/__init__.py", "detectron2/engine.py"])
        self.broken = write_wheel(wheels, "broken", ["detectron2/__init__.py"])
        with zipfile.ZipFile(f"{wheels}/gained-1.0-py3-none-any.whl") as wheel:
            wheel.extractall(folder / "site")
        self.config = folder / "pip.conf"
        self.config.write_text(f"[global]\nfind-links = {wheels}\nno-index = true\n[install]\nuser = true\n")
        self.settings = {
            "PYTHONPATH": f"{folder}/site", "PYTHONHOME": "/absent", "PIP_CONFIG_FILE": str(self.config),
            "PIP_TARGET": f"{folder}/elsewhere", "PIP_PREFIX": f"{folder}/elsewhere",
            "PIP_ROOT": f"{folder}/root", "PIP_USER": "1", "PIP_CONSTRAINT": "/absent",
            "PIP_REQUIREMENT": "/absent", "PIP_PYTHON": "/absent",
            "PIP_REQUIRE_HASHES": "1", "PIP_REQUIRE_VIRTUALENV": "1", "PIP_NO_DEPS": "1", "PIP_DRY_RUN": "1",
            "PIP_NO_BINARY": ":all:", "PIP_ONLY_BINARY": "none", "PIP_PLATFORM": "win32", "PIP_ABI": "cp36m",
            "PIP_PYTHON_VERSION": "3.6", "PIP_PRE": "1"}

    def fake_python(self, version):
        """One that says that it is `version`."""
        path = self.folder / f"python{version}"
        path.write_text(f'#!/bin/sh\ncase "$2" in *version_info*) echo {version};; '
                        f'*) exec {sys.executable} "$@";; esac\n')
        path.chmod(0o755)
        return path

    def install(self, python, detectron2, **settings):
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), **settings}
        command = ["make", "install", f"PYTHON={python}", f"DETECTRON2={detectron2}"]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def machine(tmp_path):
    if not shutil.which("make"):
        pytest.skip("no make")
    return Machine(tmp_path)


@pytest.mark.slow
def test_settings_of_the_machine_do_not_decide_what_is_installed(machine):
    done = machine.install(sys.executable, machine.whole, **machine.settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3.1 GB" in done.stdout and done.stdout.splitlines()[-1].startswith("Ready: .venv/bin/python")
    code = "import detectron2, gained, torch; print(gained.__file__, torch.__file__, detectron2.__file__)"
    found = subprocess.run([f"{machine.folder}/.venv/bin/python", "-I", "-c", code], capture_output=True,
                           text=True, check=True).stdout.split()
    for path in found:
        assert path.startswith(f"{machine.folder}/.venv/")
    assert not {"elsewhere", "root"} & set(os.listdir(machine.folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PYTHONPATH", "PIP_TARGET", "PIP_CONSTRAINT"])
def test_each_setting_would_decide(name, machine):
    """The fault is real: without the Makefile's list, each of these alone spoils the environment."""
    text = (machine.folder / "Makefile").read_text()
    text, count = re.subn(r"^(unexport|export PIP_USER) .*", "", text, flags=re.M)
    assert count == 3
    (machine.folder / "Makefile").write_text(text)
    settings = {key: machine.settings[key] for key in ("PIP_CONFIG_FILE", name)}
    machine.config.write_text(machine.config.read_text().replace("user = true", ""))
    machine.install(sys.executable, machine.whole, **settings)
    code = "import gained, torch, detectron2.engine"
    python = f"{machine.folder}/.venv/bin/python"
    assert subprocess.run([python, "-I", "-c", code], capture_output=True).returncode


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.10"])
def test_an_older_python_is_refused_in_one_line(version, machine):
    done = machine.install(machine.fake_python(version), machine.whole)
    first, makes = done.stderr.splitlines()
    assert first == f"Python 3.11 to 3.13 is needed, this is {version}: make install PYTHON=python3.12"
    assert makes.startswith("make: ***") and done.returncode and not done.stdout
    assert not (machine.folder / ".venv").exists()


@pytest.mark.slow
def test_a_newer_python_goes_on_and_may_lack_detectron2_alone(machine):
    config = {"PIP_CONFIG_FILE": str(machine.config)}
    done = machine.install(sys.executable, machine.broken, **config)
    assert done.returncode and "detectron2.engine" in done.stderr and "Ready" not in done.stdout
    kept = machine.folder / ".venv" / "kept"
    kept.touch()
    assert machine.install(sys.executable, machine.broken, **config).returncode and kept.exists()

    done = machine.install(machine.fake_python("3.14"), machine.broken, **config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not kept.exists()                                # an environment of another Python is made anew
    assert "never run on Python 3.14" in done.stdout and "stage 3, finetune_det.py, is missing" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Ready")


# ---- bench.py: limits -------------------------------------------------------------------------------------

@pytest.mark.slow
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
            assert before == ["OMP_NUM_THREADS=1", ".venv/bin/python"]
            assert arguments[arguments.index("--device") + 1] == "cpu"
        seen.add(script)
    assert seen >= {"pretrain.py", "probe_cls.py", "finetune_det.py", "demo.py", "bench.py"}


@pytest.mark.slow
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
