"""stage.py, by runs of pretrain.py: launchers, signals, full disks, damaged files. What was interrupted and
resumed must be, bit for bit, the run that was not."""
import contextlib
import errno
import fcntl
import math
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types

import numpy as np
import pytest
import torch

import pretrain
import probe_cls
import stage
from conftest import (PDB_SEPARATOR, SMALL, finish, lines, same, start, state_of, tensors, wait_for_step,
                      write_images)
from insloc import KeyQueue

RUN = [*SMALL, "--image-size", "32", "--batch-size", "6", "--epochs", "2", "--save-steps", "3"]
LAST = 12                                                                                   # its steps
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are started: bit for bit is for the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(photos, tmp_path_factory):
    """base(processes): the folder of the run without faults."""
    done = {}

    def run(count):
        if count not in done:
            done[count] = tmp_path_factory.mktemp(f"base{count}")
            finish(start(*RUN, "--nprocs", count, "--out", done[count], photos, env=ENV))
        return done[count]
    return run


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank, world, port, **more):
    """The environment of a process of a launcher that sets no LOCAL_* variables."""
    return {**ENV, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), **more}


def one_line(err):
    assert err.startswith("pretrain.py: error: ") and err.count("\n") == 1, err
    return err


# ---- Three kinds of errors -------------------------------------------------------------------------------

PLANTED = """
import os, sys
import torch, insloc, pretrain, stage

def wrong_unpacking(self, samples):
    if torch.utils.data.get_worker_info() or "0" in sys.argv:
        query, key, box = samples[0]["query"], samples[0]["key"]        # planted
    return make_group(self, samples)

def unknown_name(path):
    return read_immage(path)                                            # planted

def other_path(encoder_k, encoder_q, momentum):
    open("/nowhere/else")                                               # planted

make_group = insloc.MakeGroup.__call__
target, name, fault = {
    "unpack": (insloc.MakeGroup, "__call__", wrong_unpacking),
    "name": (insloc, "read_image", unknown_name),
    "path": (pretrain, "momentum_update", other_path)}[os.environ["PLANT"]]
setattr(target, name, fault)

if __name__ == "__main__":
    sys.argv[0] = "pretrain.py"
    stage.launch(pretrain.main, pretrain.get_args(), pretrain.find_data)
"""


def plant(tmp_path, which):
    """A program that is pretrain.py with a bug, its environment, the bug's line as tracebacks show it."""
    program = tmp_path / "planted.py"
    program.write_text(PLANTED)
    function = {"unpack": "wrong_unpacking", "name": "unknown_name", "path": "other_path"}[which]
    rows = PLANTED.splitlines()
    row = next(i for i, text in enumerate(rows) if f"def {function}" in text)
    number = next(i for i in range(row, len(rows)) if "# planted" in rows[i]) + 1
    path = os.pathsep.join([os.path.dirname(stage.__file__), *sys.path])
    return program, {**ENV, "PLANT": which, "PYTHONPATH": path}, f'planted.py", line {number}, in {function}'


@pytest.mark.parametrize("which, error, more", [
    pytest.param("unpack", "ValueError: not enough values", ["--workers", 0], marks=pytest.mark.slow),
    ("unpack", "ValueError: not enough values to unpack", ["--workers", 1]),
    ("name", "NameError: name 'read_immage' is not defined", ["--workers", 1]),
    pytest.param("path", "No such file or directory: '/nowhere/else'", [], marks=pytest.mark.slow),
    pytest.param("path", "/nowhere/else", ["--nprocs", 2], marks=pytest.mark.slow),
    pytest.param("unpack", "not enough values", ["--nprocs", 2, "--workers", 1], marks=pytest.mark.slow)])
def test_a_bug_keeps_its_traceback(photos, tmp_path, which, error, more):
    program, env, line = plant(tmp_path, which)
    process = start(*RUN, "--method", "moco", *more, "--out", tmp_path / "out", photos, env=env,
                    launcher=(sys.executable, program))
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1 and line in err and error in err
    assert "error: " not in err.splitlines()[-1].split(":")[0]          # no refusal behind it


def test_a_debugger_stops_at_a_bug(photos, tmp_path):
    program, env, line = plant(tmp_path, "unpack")
    process = start(*RUN, "--out", tmp_path / "out", photos, env=env, stdin=subprocess.PIPE,
                    launcher=(sys.executable, "-m", "pdb", "-c", "continue", *PDB_SEPARATOR, program))
    out, _ = process.communicate("p 'keys', sorted(samples[0])\nq\n", timeout=240)
    assert "Running 'cont' or 'step' will restart the program" in out
    assert 'query, key, box = samples[0]["query"]' in out               # where it stands
    assert "('keys', ['backgrounds', 'key', 'query', " in out           # a local variable there


def test_the_world_outside_is_a_refusal_that_names_the_place():
    with pytest.raises(stage.Refusal, match="^the list: No such file or directory$"):
        with stage.touching("the list"):
            open("/nowhere")
    with pytest.raises(ZeroDivisionError), stage.touching("the list"):
        raise ZeroDivisionError


def test_a_side_product_that_fails_is_one_line(capsys):
    assert stage.attempt("pie", lambda a, b: a + b, 1, 2) == 3
    assert stage.attempt("pie", "abc".index, "d") is None
    assert capsys.readouterr().out == "no pie: ValueError: substring not found; the run goes on\n"


class Broken(torch.utils.data.Dataset):
    """Item 0 is data, item 1 refuses, item 2 is the world's fault, item 3 a bug, item 4 cannot be sent."""

    def __getitem__(self, index):
        if index == 1:
            raise stage.Refusal("give another")
        if index == 2:
            raise EOFError("two\nlines")
        if index == 3:
            raise OSError("a bug")
        return (lambda: 0) if index == 4 else index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_tells_three_kinds_of_errors(workers):
    def first(index):
        return next(stage.load(Broken(), [[index]], workers, list, data_errors=(EOFError,)))

    assert first(0) == [0]
    with pytest.raises(stage.Refusal, match="^give another$"):
        first(1)
    with pytest.raises(stage.Refusal, match="^lines$"):
        first(2)
    with pytest.raises(OSError, match="a bug") as bug:
        first(3)
    assert not isinstance(bug.value, stage.Refusal) and ("Traceback" in str(bug.value)) == bool(workers)


@pytest.mark.slow
def test_a_batch_that_cannot_be_sent_does_not_hang(capfd):
    with pytest.raises(stage.Refusal, match="cannot hand over its data"):
        next(stage.load(Broken(), [[4]], 1, list))
    shown = capfd.readouterr().err                          # it is a bug: its traceback is there
    assert "Traceback" in shown and re.search("pickle|Can't get local object", shown)


# ---- The machine -----------------------------------------------------------------------------------------

def test_a_gpu_that_does_not_work_is_one_line(monkeypatch, capsys):
    def old_driver():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    def no_kernels(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nFor help")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    for device in ("auto", "cuda"):
        with pytest.raises(SystemExit):
            pretrain.get_args([*RUN, "--device", device, "x"])
        err = capsys.readouterr().err
        assert "the GPU does not work: The NVIDIA driver on your system is too old" in err
        assert "--device cpu" in err and err.count("\n") == 1
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", no_kernels)
    with pytest.raises(stage.Refusal, match="no kernel image is available for execution on the device; --"):
        stage.check_gpu("cuda:0")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(monkeypatch, tmp_path, capsys, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    stage.take_lock(str(tmp_path))
    assert f"no locks in {tmp_path} ({os.strerror(number)})" in capsys.readouterr().out


def test_a_long_tmpdir_is_not_used_for_sockets(monkeypatch, tmp_path):
    long = tmp_path / "slurm_job_tmp" / ("x" * 100)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(long))
    os.makedirs(long)
    stage.prepare_process()
    assert tempfile.gettempdir() == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(stage.Refusal, match="^TMPDIR: No usable temporary directory found"):
        stage.prepare_process()


@pytest.mark.slow
def test_workers_run_where_tmpdir_is_long(photos, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    finish(start(*RUN, "--epochs", 1, "--workers", 1, "--out", tmp_path / "out", photos,
                 env={**ENV, "TMPDIR": str(long)}))


@pytest.fixture
def elsewhere(monkeypatch):
    """A system without what Linux alone has."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(stage.ctypes, "CDLL", lambda _: types.SimpleNamespace())
    monkeypatch.setattr(stage.sys, "platform", "darwin")
    real = open

    def no_proc(path, *more, **named):
        assert not str(path).startswith("/proc"), path
        return real(path, *more, **named)

    monkeypatch.setattr("builtins.open", no_proc)


@pytest.mark.slow
def test_a_run_needs_nothing_that_linux_alone_has(here, elsewhere, photos, tmp_path):
    status, _, err = here(*RUN, "--epochs", 1, "--out", tmp_path / "out", photos)
    assert status == 0, err
    memory = [line["memory_gb"] for line in lines(tmp_path / "out")]
    assert max(memory) < 0.1                            # as if Linux's kilobytes were a Mac's bytes
    assert stage.cores() == os.cpu_count()


@pytest.mark.slow
def test_workers_need_nothing_that_linux_alone_has(elsewhere):
    assert next(stage.load(Broken(), [[0]], 1, list)) == [0]


def test_a_refused_run_leaves_no_folder_that_it_made(here, photos, tmp_path):
    for more, left in ((["--init", "nothing.pth"], "none"), ([], "kept")):
        if not more:
            (tmp_path / "kept").mkdir()
        status, _, err = here(*RUN, "--init", "nothing.pth", "--out", tmp_path / left, photos)
        assert status == 1 and "--init nothing.pth" in one_line(err)
        assert os.path.exists(tmp_path / left) == (left == "kept")


# ---- Launchers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variables, said", [
    ({"MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE is '', no number: start by torchrun"),
    ({"WORLD_SIZE": "two", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE is 'two'"),
    ({"RANK": "", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is ''"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK 2 is not below"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "process 0 does not meet the others: .*MASTER_PORT expected"),
    ({"WORLD_SIZE": "2", "MASTER_PORT": "1"}, "process 0 does not meet the others: .*MASTER_ADDR expected")],
                         ids=str)
def test_half_of_torchruns_variables_are_refused(here, monkeypatch, photos, tmp_path, variables, said):
    for name, value in {"RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    status, _, err = here(*RUN, "--out", tmp_path, photos)
    assert status in (1, 2) and re.search(said, one_line(err))


def test_the_only_process_of_a_machine_takes_its_first_gpu(monkeypatch, tmp_path):
    """Its rank in the run is 1, and the launcher sets no LOCAL_RANK."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    devices = []

    def check_gpu(device):
        devices.append(device)
        raise stage.Refusal("no GPU here")

    monkeypatch.setattr(stage, "check_gpu", check_gpu)
    args = types.SimpleNamespace(device="cuda", nprocs=1, world=2, out=str(tmp_path))
    with pytest.raises(SystemExit):
        stage.run(1, "env://", None, args, ())
    assert devices == [torch.device("cuda", 0)]


def test_without_local_variables_there_is_one_process_a_machine(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for name, value in as_rank(1, 2, 29500).items():
        monkeypatch.setenv(name, value)
    args = pretrain.get_args([*RUN, "x"])
    assert (args.world, args.nprocs) == (2, 1)


@pytest.mark.slow
def test_a_port_in_use_is_one_line(photos, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = as_rank(0, 2, taken.getsockname()[1])
        _, err = finish(start(*RUN, "--out", tmp_path, photos, env=env), 1)
    assert "process 0 does not meet the others" in err.splitlines()[-1] and "MASTER_PORT" in err


@pytest.mark.slow
def test_a_network_interface_that_is_not_there_is_one_line(photos, tmp_path):
    env = {**ENV, "GLOO_SOCKET_IFNAME": "nothing0"}
    _, err = finish(start(*RUN, "--nprocs", 2, "--out", tmp_path, photos, env=env), 1)
    assert "nothing0" in err.splitlines()[-1] and "GLOO_SOCKET_IFNAME" in err.splitlines()[-1]


@pytest.mark.slow
def test_two_ranks_of_a_launcher_are_one_process_group(base, photos, tmp_path):
    port = free_port()
    ranks = [start(*RUN, "--out", tmp_path, photos, env=as_rank(rank, 2, port)) for rank in range(2)]
    for process in ranks:
        finish(process)
    assert same(state_of(tmp_path), state_of(base(2)))


@pytest.mark.slow
def test_two_agents_of_torchrun_are_one_process_group(base, photos, tmp_path):
    launcher = [sys.executable, *"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-id faults "
                f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()}".split(), pretrain.__file__]
    agents = [start(*RUN, "--out", tmp_path, "--resume", photos, launcher=launcher, env=ENV)
              for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert same(state_of(tmp_path), state_of(base(2)))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--lr", "--save-steps"])
def test_ranks_of_other_settings_refuse_each_other(photos, tmp_path, option):
    port = free_port()
    ranks = [start(*RUN, option, 1 + rank, "--out", tmp_path / str(rank), photos, env=as_rank(rank, 2, port))
             for rank in range(2)]
    errors = [finish(process, status=1)[1] for process in ranks]
    name = option[2:].replace("-", "_")
    assert f"the processes differ, give all the same command, data and --out: {name}" in errors[0]


def test_a_second_run_into_the_directory_is_refused(here, photos, tmp_path):
    """As several tasks of srun are, each of which takes itself for the only one."""
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; lock = open(sys.argv[1], 'w'); "
                               "fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()",
                               tmp_path / stage.LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    status, _, err = here(*RUN, "--out", tmp_path, photos)
    holder.communicate()
    assert status == 1 and "another process works in" in one_line(err)


# ---- Signals and deaths ----------------------------------------------------------------------------------

def children(pid):
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(child) for child in f.read().split()]
    return []


def ranks_of(process):
    """The processes of the ranks, in their order; multiprocessing's resource tracker is none."""
    found = []
    for child in children(process.pid):
        with open(f"/proc/{child}/cmdline") as f:
            if "spawn_main" in f.read():
                found.append(child)
    return found


@pytest.mark.slow
def test_a_signal_to_the_parent_stops_all_ranks_with_one_line(base, photos, tmp_path):
    options = [*RUN, "--nprocs", 2, "--out", tmp_path, "--resume", photos]
    process = start(*options, env=ENV)
    wait_for_step(process, tmp_path, 2)
    both = ranks_of(process)
    os.kill(process.pid, signal.SIGINT)
    _, err = finish(process, 130)
    assert err.startswith("stopped by SIGINT after step ") and err.count("\n") == 1
    assert len(both) == 2 and not any(os.path.exists(f"/proc/{rank}") for rank in both)
    finish(start(*options, env=ENV))
    assert same(state_of(tmp_path), state_of(base(2)))


@pytest.mark.slow
@pytest.mark.parametrize("number, count", [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGHUP, 1),
                                           (signal.SIGUSR1, 2)])
def test_a_stage_that_saves_by_itself_is_stopped_with_one_line(photos, tmp_path, count, number):
    """The probes; the signal goes to the whole process group, as a terminal's does."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            shutil.copytree(photos, tmp_path / "data" / split / label)
    out = tmp_path / "out"
    process = start("random", tmp_path / "data", "--resnet", "narrow18", "--image-size", 64, "--epochs", 999,
                    "--device", "cpu", "--nprocs", count, "--workers", 1, "--out", out, env=ENV,
                    launcher=(sys.executable, probe_cls.__file__))
    while not os.path.exists(out / "checkpoint.pth") and process.poll() is None:
        time.sleep(0.05)
    for _ in range(3):                      # a second one must not be answered by a second line
        os.killpg(process.pid, number)
    _, err = finish(process, 128 + number)
    assert err == f"stopped by {number.name}; --resume goes on from the last checkpoint\n"


@pytest.mark.slow
def test_ctrl_c_before_the_first_step_is_no_traceback(photos, tmp_path):
    process = start(*RUN, "--nprocs", 2, "--out", tmp_path, photos, env=ENV)
    end = time.time() + 60
    while time.time() < end and len(both := ranks_of(process)) < 2:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and err.count("\n") <= 1
    assert not any(os.path.exists(f"/proc/{rank}") for rank in both)


@pytest.mark.slow
def test_a_rank_killed_while_it_saves_ends_in_one_line_and_loses_nothing(base, photos, tmp_path):
    options = [*RUN, "--nprocs", 2, "--out", tmp_path, "--resume", photos]
    process = start(*options, env=ENV)
    wait_for_step(process, tmp_path, 4)                 # the checkpoint of step 3 is there
    both = ranks_of(process)
    while not os.path.exists(tmp_path / "checkpoint.pth.tmp") and process.poll() is None:
        time.sleep(0.001)
    os.kill(both[0], signal.SIGKILL)
    _, err = finish(process, status=1)
    assert "a process was ended by SIGKILL; --resume goes on from the last checkpoint" in one_line(err)
    assert not any(os.path.exists(f"/proc/{rank}") for rank in both)
    finish(start(*options, env=ENV))
    assert same(state_of(tmp_path), state_of(base(2)))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, LAST + 1))
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(base(2))]


KILLS = int(os.environ.get("KILLS", 3))                     # KILLS=20 for an evening


@pytest.mark.slow
def test_a_dead_loader_worker_ends_the_run_with_the_same_line_and_what_is_trained_is_saved(photos, tmp_path):
    said = set()
    for i in range(KILLS):
        out = tmp_path / str(i)
        process = start(*RUN, "--workers", 2, "--out", out, "--epochs", 1000, photos, env=ENV)
        wait_for_step(process, out, 2)
        time.sleep(0.02 * i)                                # anywhere in a step
        os.kill(children(process.pid)[i % 2], signal.SIGKILL)
        _, err = finish(process, status=1)
        step = int(re.search(r"loading step (\d+): ", one_line(err))[1])
        assert state_of(out)["step"] == step - 1
        said.add(err.replace(f"step {step}", "step N"))
    line, = said
    assert "DataLoader worker" in line and "--shm-size" in line and "--resume goes on" in line


@pytest.mark.slow
def test_a_cleaner_of_tmp_costs_no_step(photos, tmp_path):
    """It takes the folder of the sockets through which workers hand over tensors."""
    (tmp_path / "tmp").mkdir()
    process = start(*RUN, "--method", "moco", "--workers", 1, "--out", tmp_path / "out", "--epochs", 1000,
                    "--save-steps", 10000, photos, env={**ENV, "TMPDIR": str(tmp_path / "tmp")})
    wait_for_step(process, tmp_path / "out", 2)
    for folder in (tmp_path / "tmp").glob("pymp-*"):
        shutil.rmtree(folder)
    _, err = finish(process, status=1)
    step = int(re.search(r"loading step (\d+): ", one_line(err))[1])
    assert "TMPDIR must last" in err and state_of(tmp_path / "out")["step"] == step - 1


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(photos, tmp_path):
    process = start(*RUN, "--workers", 2, "--out", tmp_path, "--epochs", 1000, photos, env=ENV)
    wait_for_step(process, tmp_path, 2)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert len(workers) == 2
    end = time.time() + 30
    while time.time() < end and any(os.path.exists(f"/proc/{worker}") for worker in workers):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_hangup_and_slurms_warning_save_but_not_where_they_are_ignored(here, monkeypatch, photos, tmp_path,
                                                                        number):
    def enqueue(self, keys):
        original(self, keys)
        os.kill(os.getpid(), number)

    original = KeyQueue.enqueue
    monkeypatch.setattr(KeyQueue, "enqueue", enqueue)
    options = [*RUN, "--epochs", 1, "--out", tmp_path, "--resume", photos]
    status, _, err = here(*options)
    assert status == 128 + number and f"stopped by {number.name} after step 1;" in err
    assert state_of(tmp_path)["step"] == 1
    signal.signal(number, signal.SIG_IGN)                   # as nohup does
    assert here(*options)[0] == 0


@pytest.mark.slow
def test_a_hangup_is_ignored_under_nohup(photos, tmp_path):
    process = start(*RUN, "--nprocs", 2, "--out", tmp_path, photos, env=ENV,
                    launcher=("nohup", sys.executable, pretrain.__file__))
    wait_for_step(process, tmp_path, 2)
    os.killpg(process.pid, signal.SIGHUP)
    finish(process)


@pytest.mark.slow
@pytest.mark.parametrize("count, terminal", [(1, True), (2, True), (2, False)])
def test_output_that_nobody_can_read_any_more_costs_no_step(photos, tmp_path, count, terminal):
    """A closed terminal fails every line from then on; so does a pipe into a program that has ended."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    options = [*RUN, "--epochs", 999, "--save-steps", 9999, "--nprocs", count, "--out", tmp_path, photos]
    command = [sys.executable, pretrain.__file__, *map(str, options)]
    process = subprocess.Popen(command, env=ENV, stdout=theirs, start_new_session=True,
                               stderr=theirs if terminal else subprocess.PIPE)
    os.close(theirs)
    wait_for_step(process, tmp_path, 2)
    os.close(ours)
    if terminal:
        os.killpg(process.pid, signal.SIGHUP)                   # the kernel's, which precedes the errors
    _, err = process.communicate(timeout=120)
    assert process.returncode == 129
    if not terminal:
        broken, stopped = err.decode().splitlines()
        assert broken == "<stdout>: Broken pipe" and stopped.startswith("stopped by SIGHUP after step")
    assert state_of(tmp_path)["step"] == len(lines(tmp_path)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_goes_away_costs_no_step(here, base, monkeypatch, photos, tmp_path, workers):
    folder = shutil.copytree(photos, tmp_path / "photos")

    def enqueue(self, keys):
        original(self, keys)
        if self.ptr == 6 * 4 % 20 and os.path.exists(folder):
            os.rename(folder, tmp_path / "gone")

    original = KeyQueue.enqueue
    options = [*RUN, "--save-steps", 100, "--out", tmp_path / "out", "--resume", "--workers", workers, folder]
    with monkeypatch.context() as patch:
        patch.setattr(KeyQueue, "enqueue", enqueue)
        status, _, err = here(*options)
    step = int(re.search(r"loading step (\d+): ten files in a row cannot be read", one_line(err))[1])
    assert status == 1 and "; --resume goes on from the last checkpoint" in err
    assert state_of(tmp_path / "out")["step"] == step - 1 >= 4
    os.rename(tmp_path / "gone", folder)
    assert here(*options)[0] == 0
    for name in ("encoder_q", "encoder_k", "queue"):
        torch.testing.assert_close(state_of(tmp_path / "out")[name], state_of(base(1))[name], rtol=0, atol=0)


def test_a_request_to_stop_in_mid_save_waits_for_the_next_step(here, base, monkeypatch, photos, tmp_path):
    write, pid = torch.save, os.getpid()

    def save_and_be_asked_to_stop(*arguments, **more):
        os.kill(pid, signal.SIGTERM)
        write(*arguments, **more)

    options = [*RUN, "--out", tmp_path, "--resume", photos]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_and_be_asked_to_stop)
        status, _, err = here(*options)
    assert status == 143 and "stopped by SIGTERM after step 4" in err
    assert state_of(tmp_path)["step"] == 4
    assert here(*options)[0] == 0
    assert same(state_of(tmp_path), state_of(base(1)))


# ---- The disk: full, damaged -----------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB: room for one checkpoint and the weights (12 MB), not for a second."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True,
                           text=True)
    if mount.returncode:
        pytest.skip(f"mounting is not allowed here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_in_one_line_and_loses_nothing(here, base, photos, small_disk):
    options = [*RUN, "--out", small_disk / "run", "--resume", photos]
    status, _, err = here(*options)
    assert status == 1 and "step 6 is not saved" in one_line(err) and "--resume goes on from the last" in err
    assert state_of(small_disk / "run")["step"] == 3
    assert not [name for name in os.listdir(small_disk / "run") if name.endswith(".tmp")]
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert here(*options)[0] == 0
    assert same(state_of(small_disk / "run"), state_of(base(1)))


def test_a_disk_too_full_for_a_log_line_ends_in_one_line(here, base, monkeypatch, photos, small_disk):
    def fill(self, keys):
        with open(small_disk / "run" / "log.jsonl", "ab") as f:     # to the end of its page
            f.write(b"\n" * (-f.tell() % 4096))
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        original(self, keys)

    original = KeyQueue.enqueue
    options = [*RUN, "--out", small_disk / "run", "--resume", photos]
    with monkeypatch.context() as patch:
        patch.setattr(KeyQueue, "enqueue", fill)
        status, _, err = here(*options)
    assert status == 1 and "No space left on device" in one_line(err)
    os.remove(small_disk / "filler")
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert here(*options)[0] == 0
    assert same(state_of(small_disk / "run"), state_of(base(1)))
    assert [line["step"] for line in lines(small_disk / "run")] == list(range(1, LAST + 1))


@pytest.mark.slow
@pytest.mark.parametrize("workers, status", [(2, 1), (0, 0)])
def test_shared_memory_that_is_too_small_is_named_and_no_workers_need_none(photos, tmp_path, workers, status):
    mount = "mount -t tmpfs -o size=100k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    launcher = ["unshare", "-m", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, pretrain.__file__]
    _, err = finish(start(*SMALL, "--bn-group", 6, "--workers", workers, "--epochs", 1, "--out", tmp_path,
                          photos, launcher=launcher), status)
    if status:
        assert "/dev/shm" in one_line(err) and "--workers or 0" in err and "--shm-size" in err


def cut(content):
    return content[:len(content) // 2]


def one_bit(content):
    """In a tensor; torch.load would not notice."""
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("damage", [cut, one_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(here, base, photos, tmp_path, damage):
    out = shutil.copytree(base(1), tmp_path / "run")
    (out / "checkpoint.pth").write_bytes(damage((out / "checkpoint.pth").read_bytes()))
    status, text, _ = here(*RUN, "--resume", "--out", out, photos)
    assert status == 0 and f"{out}/checkpoint.pth cannot be read: " in text
    assert f"resuming from {out}/checkpoint_prev.pth" in text
    assert same(state_of(out), state_of(base(1)))


def test_two_damaged_checkpoints_are_refused(here, base, photos, tmp_path):
    for name in ("checkpoint.pth", "checkpoint_prev.pth"):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(100_000))
    status, _, err = here(*RUN, "--resume", "--out", tmp_path, photos)
    assert status == 1 and "no readable checkpoint" in one_line(err)


class Hostile:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_resuming_runs_no_code_of_a_checkpoint(here, photos, tmp_path):
    torch.save({"step": 1, "settings": [Hostile(str(tmp_path / "ran"))]}, tmp_path / "checkpoint.pth")
    status, text, err = here(*RUN, "--resume", "--out", tmp_path, photos)
    assert status == 1 and "cannot be read" in text and "no readable checkpoint" in one_line(err)
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = str(tmp_path / "file")
    stage.write_atomically(path, lambda f: f.write(b"old"))

    def fail(f):
        f.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.write_atomically(path, fail)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"
    with pytest.raises(stage.Refusal, match="/nowhere/file cannot be written: .*No such file"):
        stage.write_atomically("/nowhere/file", fail)


# ---- Numbers that are not finite -------------------------------------------------------------------------

def poison_loss(monkeypatch, step):
    steps, info_nce = [], pretrain.info_nce

    def poisoned(q, *more):
        steps.append(1)
        loss, logits = info_nce(q, *more)
        return loss + (math.inf if len(steps) == 2 * step else 0), logits       # two groups a step
    monkeypatch.setattr(pretrain, "info_nce", poisoned)


def poison_weights(monkeypatch, step):
    steps, sgd = [], torch.optim.SGD.step

    def poisoned(self):
        sgd(self)
        steps.append(1)
        if len(steps) == step:
            self.param_groups[0]["params"][7].data.view(-1)[3] = math.nan
    monkeypatch.setattr(torch.optim.SGD, "step", poisoned)


def poison_queue(monkeypatch, step):
    steps, enqueue = [], KeyQueue.enqueue

    def poisoned(self, keys):
        steps.append(1)
        enqueue(self, keys * (math.inf if len(steps) == step else 1))
    monkeypatch.setattr(KeyQueue, "enqueue", poisoned)


@pytest.mark.parametrize("poison, said", [(poison_loss, "the loss of steps 3 to 4 is not finite"),
                                          (poison_weights, "not finite"), (poison_queue, "not finite")])
def test_what_is_not_finite_ends_the_run_and_spoils_no_checkpoint(here, monkeypatch, photos, tmp_path,
                                                                  poison, said):
    """In step 4, which is saved; the checkpoint before is that of step 2."""
    poison(monkeypatch, 4)
    status, _, err = here(*RUN, "--save-steps", 2, "--log-every", 2, "--method", "moco", "--out", tmp_path,
                          photos)
    assert status == 1 and said in one_line(err) and "--lr" in err and "--resume goes on" in err
    state = state_of(tmp_path)
    assert state["step"] == 2 and all(x.isfinite().all() for x in tensors(state).values())


# ---- Images that are damaged, gone or odd ----------------------------------------------------------------

@pytest.fixture
def damaged(tmp_path):
    """120 images, number 003 of them is none."""
    folder = tmp_path / "damaged"
    write_images(folder, 120)
    (folder / "003.jpg").write_bytes(b"\xff\xd8\xff but no JPEG")
    return folder


DAMAGED = [*SMALL, "--method", "moco", "--image-size", 32, "--batch-size", 120, "--bn-group", 30]


def test_a_damaged_image_is_named_once_and_replaced_the_same_for_any_workers(here, damaged, tmp_path):
    for workers in (0, 2):
        status, text, _ = here(*DAMAGED, "--epochs", 2, "--workers", workers, "--out",
                               tmp_path / str(workers), damaged)
        assert status == 0 and text.count("cannot read") == 1
        assert f"cannot read '{damaged}/003.jpg': another image takes its place" in text
    assert same(*(state_of(tmp_path / str(workers)) for workers in (0, 2)))


def test_more_than_one_percent_damaged_is_an_error_that_names_them(here, damaged, tmp_path):
    for i in range(20, 32):
        (damaged / f"{i:03d}.{'png' if i % 10 == 7 else 'jpg'}").write_bytes(b"")
    status, _, err = here(*DAMAGED, "--epochs", 9, "--out", tmp_path / "out", damaged)
    assert status == 1 and "13 of 120 images cannot be read, over 1 %" in one_line(err)
    assert err.count("jpg'") + err.count("png'") == 10 and "003.jpg" in err


def test_images_that_are_none_end_in_one_line(here, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(20):
        (tmp_path / "data" / f"{i}.jpg").write_text("no picture")
    status, _, err = here(*RUN, "--out", tmp_path / "out", tmp_path / "data")
    assert status == 1 and "ten files in a row cannot be read" in one_line(err)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_is_gone_is_one_line(here, monkeypatch, photos, tmp_path, workers):
    folder = shutil.copytree(photos, tmp_path / "photos")
    args = pretrain.get_args([*RUN, "--out", str(tmp_path / "out"), str(folder)])
    found = pretrain.find_data(args)
    monkeypatch.setattr(pretrain, "find_data", lambda args: found)
    monkeypatch.setattr(pretrain, "save_composites", lambda *given: None)
    shutil.rmtree(folder)
    status, _, err = here(*RUN, "--workers", workers, "--out", tmp_path / "out", folder)
    assert status == 1 and "loading step 1: ten files in a row cannot be read, such as '/" in one_line(err)
    assert "--resume" not in err                            # there is nothing to go on from


# ---- The walk over a folder ------------------------------------------------------------------------------

@pytest.fixture
def tree(tmp_path):
    for name in ("a.jpg", "deep/er/b.PNG", ".ipynb_checkpoints/c.jpg", ".hidden.jpg", "notes.txt",
                 "label.txt", "README", f"run/{stage.LOCK}", "run/composites.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.symlink(tmp_path, tmp_path / "deep" / "loop")
    return tmp_path


def test_the_walk_finds_images_at_any_depth_and_each_folder_once(tree):
    assert stage.find_images(str(tree)) == [b"a.jpg", b"deep/er/b.PNG"]


def test_the_walk_says_what_it_left_out(tree, capsys):
    stage.find_images(str(tree))
    said = capsys.readouterr().out
    assert "4 files left out, hidden or of endings that are not read: 2 .txt" in said
    assert "1 without ending" in said


def test_endings_of_any_bytes_can_be_said(tmp_path):
    write_images(tmp_path, 1)
    open(os.fsencode(tmp_path) + b"/notes.M\xe4rz", "w").close()
    program = f"import stage; stage.prepare_process(); stage.find_images({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=os.path.dirname(stage.__file__), env={**ENV, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0 and "1 .m\\udce4rz" in done.stdout, done


def test_a_folder_that_cannot_be_listed_is_refused(tree, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if os.fsencode(path).endswith(b"er"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(stage.Refusal, match="deep/er: Permission denied"):
        stage.find_images(str(tree))


def test_differences_name_what_differs():
    then, now = {"lr": 1, "out": "a", "new": 2}, {"lr": 2, "out": "b"}
    assert stage.differences(then, now, {"out"}) == "lr was 1, is 2; new was 2, is None"
    assert stage.differences(then, then, set()) == ""
