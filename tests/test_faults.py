"""Faults and hostile files: processes killed, stopped and cut off at the worst moment, full disks, damaged
checkpoints and images, weights from strangers. What was interrupted and resumed must be, bit for bit, the run
that was not; a file from anywhere ends in an error or in a right result."""
import collections
import contextlib
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import insloc
import numpy as np
import PIL.Image
import pretrain
import probe_cls
import pytest
import torch
import torch.multiprocessing as mp

from insloc import KeyQueue, read_file, read_image, read_weights
from test_insloc import picture
from test_pretrain import (SMALL, finish, handlers, here, lines, photos, same, start, state_of,  # noqa: F401
                           tensors, wait_for_step, write_images)
from test_weights import Hostile, trunk

RUN = ["--arch", "c4", *SMALL, "--image-size", 32, "--batch-size", 6, "--epochs", 2, "--save-steps", 3]
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
def base(photos, tmp_path_factory):                                                         # noqa: F811
    """The run without faults: {processes: folder}."""
    out = tmp_path_factory.mktemp("base")
    for count in (1, 2):
        finish(start(*RUN, "--nprocs", count, "--out", out / str(count), photos, env=ENV))
    return {count: out / str(count) for count in (1, 2)}


# ----------------------------------------------------------------------------------------------------------
# Processes: the same command line with --resume, again and again, each time another fault
# ----------------------------------------------------------------------------------------------------------

def children(pid):
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(child) for child in f.read().split()]
    return []


def ranks(process):
    """The processes of the ranks, in their order; multiprocessing's resource tracker is none."""
    found = []
    for child in children(process.pid):
        with open(f"/proc/{child}/cmdline") as f:
            if "spawn_main" in f.read():
                found.append(child)
    return found


def in_mid_save(process, out):
    """Until a checkpoint is being written; the last step is yet to come."""
    end = time.time() + 60
    while time.time() < end and process.poll() is None:
        if os.path.exists(f"{out}/checkpoint.pth.tmp"):
            return
        time.sleep(0.001)
    raise AssertionError(f"no checkpoint was written: {process.poll()}")


def test_two_processes_survive_faults_bit_for_bit(base, photos, tmp_path):                 # noqa: F811
    """Rank 0 killed while it writes a checkpoint; a rank that hangs. test_pretrain.py kills whole runs."""
    options = [*RUN, "--nprocs", 2, "--out", tmp_path, "--resume", photos]

    process = start(*options, env=ENV)
    wait_for_step(process, tmp_path, 2)
    both = ranks(process)
    in_mid_save(process, tmp_path)
    os.kill(both[0], signal.SIGKILL)
    _, err = finish(process, status=1)
    assert "--resume goes on from the last checkpoint" in err.strip().splitlines()[-1]
    assert len(both) == 2 and not any(os.path.exists(f"/proc/{rank}") for rank in both)

    process = start(*options, "--timeout", 0.25, env=ENV)
    wait_for_step(process, tmp_path, 4)
    both, stopped_at = ranks(process), time.time()
    os.kill(both[1], signal.SIGSTOP)
    _, err = finish(process, status=1)                  # 15 s of waiting, ten until the kill, and to spare
    assert time.time() - stopped_at < 60
    said = [line for line in err.splitlines() if "error" in line]
    assert len(said) == 1 and "of 2 waits for one that hangs or is gone" in said[0]
    assert not any(os.path.exists(f"/proc/{rank}") for rank in both)

    finish(start(*options, env=ENV))
    assert same(state_of(tmp_path), state_of(base[2]))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, LAST + 1))
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(base[2])]


def test_one_process_survives_faults_bit_for_bit(here, base, monkeypatch, photos, tmp_path):   # noqa: F811
    """A second run into the directory; a loader worker killed; one that hangs; SIGTERM in mid-save."""
    options = [*RUN, "--workers", 1, "--out", tmp_path, "--resume", photos]
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; lock = open(sys.argv[1], 'w'); "
                               "fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()",
                               tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    status, _, err = here(*options)
    assert status == 1 and err.count("\n") == 1 and "another process trains into" in err
    holder.communicate()

    def kill_worker(self, keys):
        for worker in mp.active_children():
            worker.kill()
        enqueue(self, keys)

    enqueue, read, write, here_pid = KeyQueue.enqueue, insloc.read_image, torch.save, os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(KeyQueue, "enqueue", kill_worker)
        status, _, err = here(*options)
    assert status == 1 and err.startswith("pretrain.py: error: loading step ") and err.count("\n") == 1

    def hang(path):                                     # in the worker; composites.png is drawn without one
        if os.getpid() != here_pid:
            time.sleep(60)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(insloc, "read_image", hang)
        started_at = time.time()
        status, _, err = here(*options, "--timeout", 0.02)
    assert status == 1 and "DataLoader timed out after 1.2 s" in err and time.time() - started_at < 30

    def save_and_be_asked_to_stop(*arguments, **more):
        os.kill(here_pid, signal.SIGTERM)
        write(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_and_be_asked_to_stop)
        status, _, err = here(*options)
    assert status == 143 and "stopped by SIGTERM after step 4" in err
    assert state_of(tmp_path)["step"] == 4
    assert here(*options)[0] == 0
    assert same(state_of(tmp_path), state_of(base[1]))
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(base[1])]


def test_two_agents_of_torchrun_are_one_process_group(base, photos, tmp_path):             # noqa: F811
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, *"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-id faults "
                f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}".split(), pretrain.__file__]
    agents = [start(*RUN, "--out", tmp_path, "--resume", photos, launcher=launcher, env=ENV)
              for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert same(state_of(tmp_path), state_of(base[2]))


# ----------------------------------------------------------------------------------------------------------
# The disk: full, damaged
# ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    """A file system of 230 MB: room for one checkpoint and the weights (180 MB), not for a second."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=230m", "tmpfs", folder],
                           capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting is not allowed here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_in_one_line_and_loses_nothing(here, base, monkeypatch, photos,    # noqa: F811
                                                        small_disk):
    options = [*RUN, "--out", small_disk / "run", "--resume", photos]
    status, _, err = here(*options)
    assert status == 1 and err.count("\n") == 1 and "cannot save step 6" in err
    assert "the checkpoint before stays" in err
    assert state_of(small_disk / "run")["step"] == 3
    assert not [name for name in os.listdir(small_disk / "run") if name.endswith(".tmp")]

    def fill(self, keys):                                           # so that not even a log line fits
        with open(small_disk / "run" / "log.jsonl", "ab") as f:     # to the end of its page
            f.write(b"\n" * (-f.tell() % 4096))
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        original(self, keys)

    original = KeyQueue.enqueue
    with monkeypatch.context() as patch:
        patch.setattr(KeyQueue, "enqueue", fill)
        status, _, err = here(*options)
    assert status == 1 and "No space left on device" in err and err.count("\n") == 1
    os.remove(small_disk / "filler")
    subprocess.run(["mount", "-o", "remount,size=600m", small_disk], check=True)
    assert here(*options)[0] == 0
    assert same(state_of(small_disk / "run"), state_of(base[1]))
    assert [line["step"] for line in lines(small_disk / "run")] == list(range(1, LAST + 1))


def test_damaged_checkpoints(here, base, photos, tmp_path):                                # noqa: F811
    """Cut off, a bit of a tensor changed (torch.load does not notice), noise: the one before, said aloud."""
    out = shutil.copytree(base[1], tmp_path / "run")
    whole = (out / "checkpoint.pth").read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for content in (whole[:len(whole) // 2], bytes(changed)):
        (out / "checkpoint.pth").write_bytes(content)
        shutil.copyfile(base[1] / "checkpoint_prev.pth", out / "checkpoint_prev.pth")
        status, text, _ = here(*RUN, "--resume", "--out", out, photos)
        assert status == 0 and f"{out}/checkpoint.pth cannot be read: damaged" in text
        assert f"resuming from {out}/checkpoint_prev.pth, step 9" in text
        assert same(state_of(out), state_of(base[1]))
    for name in ("checkpoint.pth", "checkpoint_prev.pth"):
        (out / name).write_bytes(np.random.default_rng(0).bytes(100_000))
    status, _, err = here(*RUN, "--resume", "--out", out, photos)
    assert status == 1 and err.count("\n") == 1 and "no readable checkpoint" in err


# ----------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ----------------------------------------------------------------------------------------------------------

class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize("what", ["loss is", "gradient is", "weights are", "keys"])
def test_what_is_not_finite_is_named_with_its_step_and_spoils_nothing(here, monkeypatch, photos,  # noqa: F811
                                                                      tmp_path, what):
    """In step 5; the next log line comes after step 6, the next checkpoint after step 8."""
    info_nce, enqueue, sgd, steps = pretrain.info_nce, KeyQueue.enqueue, torch.optim.SGD.step, []

    def poisoned_enqueue(self, keys):
        steps.append(1)
        enqueue(self, keys * (math.inf if what == "keys" and len(steps) == 4 else 1))

    def poisoned_loss(q, *more):
        loss, logits = info_nce(Explode.apply(q) if what[0] == "g" and len(steps) == 4 else q, *more)
        return loss + (math.inf if what[0] == "l" and len(steps) == 4 else 0), logits

    def poisoned_step(self):
        sgd(self)
        if what[0] == "w" and len(steps) == 4:
            self.param_groups[0]["params"][7].data.view(-1)[3] = math.nan

    monkeypatch.setattr(KeyQueue, "enqueue", poisoned_enqueue)
    monkeypatch.setattr(pretrain, "info_nce", poisoned_loss)
    monkeypatch.setattr(torch.optim.SGD, "step", poisoned_step)
    status, _, err = here(*RUN, "--save-steps", 2, "--log-every", 3, "--method", "moco", "--out", tmp_path,
                          photos)
    said = "after step 4 keys or statistics are" if what == "keys" else f"in step 5 the {what}"
    assert status == 1 and said + " not finite" in err and "--lr" in err and err.count("\n") == 1
    state = state_of(tmp_path)
    assert state["step"] == (2 if what == "keys" else 4)
    assert all(x.isfinite().all() for x in tensors(state).values())


# ----------------------------------------------------------------------------------------------------------
# Images that are damaged, gone, odd or too large; lists of anything
# ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def damaged(photos, tmp_path):
    """120 images, number 003 of them is none."""
    folder = tmp_path / "damaged"
    write_images(folder, 120)
    (folder / "003.jpg").write_bytes(b"\xff\xd8\xff but no JPEG")
    return folder


def test_a_damaged_image_is_replaced_and_named_once(here, damaged, tmp_path):
    for workers in (0, 2):
        out = tmp_path / str(workers)
        status, text, _ = here("--arch", "c4", "--method", "moco", *SMALL, "--bn-group", 30, "--epochs", 2,
                               "--batch-size", 120, "--workers", workers, "--out", out, damaged)
        assert status == 0 and text.count("cannot read") == 1
        assert f"cannot read '{damaged}/003.jpg': another image takes its place" in text
        with open(out / "log.jsonl") as f:
            named = [line["damaged"] for line in map(json.loads, f) if "damaged" in line]
        assert named == [f"{damaged}/003.jpg"]
    assert same(*(state_of(tmp_path / str(workers)) for workers in (0, 2)))
    assert state_of(tmp_path / "0")["damaged"] == [3]


def test_more_than_one_percent_damaged_is_an_error_that_names_them(here, damaged, tmp_path):
    for i in range(20, 32):
        (damaged / f"{i:03d}.{'png' if i % 10 == 7 else 'jpg'}").write_bytes(b"")
    status, _, err = here("--arch", "c4", "--method", "moco", *SMALL, "--bn-group", 30, "--batch-size", 120,
                          "--epochs", 9, "--out", tmp_path / "out", damaged)
    assert status == 1 and "13 of 120 images cannot be read, more than 1 %" in err
    assert err.count("jpg'") + err.count("png'") == 10 and "003.jpg" in err
    assert len(lines(tmp_path / "out")) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanishes_ends_in_one_line(here, monkeypatch, photos, tmp_path, workers):
    folder = shutil.copytree(photos, tmp_path / "photos")
    find_images = pretrain.find_images

    def find_and_lose(args):
        paths = find_images(args)
        shutil.rmtree(folder)
        return paths

    monkeypatch.setattr(pretrain, "find_images", find_and_lose)
    monkeypatch.setattr(pretrain, "save_composites", lambda *_: None)   # it would find out before the loop
    status, _, err = here("--arch", "c4", *SMALL, "--workers", workers, "--out", tmp_path / "out", folder)
    assert status == 1 and err.startswith("pretrain.py: error: loading step 1: ") and err.count("\n") == 1
    assert "step 1: ten files in a row cannot be read" in err and f"{folder}/" in err and "not a file" in err


def test_images_of_every_kind(here, tmp_path):                                              # noqa: F811
    """All that can be read trains; what cannot is named, and nothing else is."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = PIL.Image.fromarray(picture(60, 80))
    deep = PIL.Image.fromarray((np.asarray(image)[:, :, 0].astype(np.uint16) * 257))
    for name, what in {"cmyk.jpg": image.convert("CMYK"), "grey.jpg": image.convert("L"), "deep.png": deep,
                       "palette.png": image.convert("P"), "alpha.png": image.convert("RGBA"),
                       "bits.png": image.convert("1"), "dot.png": image.resize((1, 1)),
                       "dot.jpg": image.resize((1, 1)), "wide.jpg": image.resize((20000, 10)),
                       "tall.png": image.resize((10, 20000)), "web.webp": image, "a b'c\"d\ne.jpg": image,
                       os.fsdecode(b"caf\xe9 \xff.png"): image, "plain.gif": image}.items():
        what.save(folder / name)
    os.symlink("../images", folder / "loop")
    whole = (folder / "grey.jpg").read_bytes()
    frame = whole.index(b"\xff\xc0") + 5
    bad = {"text.jpg": b"no picture\n", "empty.png": b"", "cut.jpg": whole[:len(whole) // 2],
           "bomb.jpg": whole[:frame] + (30000).to_bytes(2, "big") * 2 + whole[frame + 4:],
           "bomb.bmp": b"BM" + bytes(12) + (40).to_bytes(4, "little") + (2 ** 15).to_bytes(4, "little") * 2
           + b"\1\0\30\0" + bytes(24), "cut.png": (folder / "deep.png").read_bytes()[:60]}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    os.symlink("nowhere.jpg", folder / "broken link.jpg")
    status, _, err = here("--arch", "c4", *SMALL, "--batch-size", 21, "--bn-group", 7, "--epochs", 1, "--out",
                          tmp_path / "out", folder)
    assert status == 1 and "7 of 21 images cannot be read, more than 1 %" in err
    assert all(repr(f"{folder}/{name}") in err for name in (*bad, "broken link.jpg"))
    assert state_of(tmp_path / "out")["step"] == 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(3000)},
                                     {"restart_marker_rows": 1}, {"comment": b"\xff\xc0" * 9}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch, tmp_path, mode, options):
    """Pillow refuses twice its limit; torchvision, which decodes JPEGs, has none."""
    PIL.Image.fromarray(picture(30, 40)).convert(mode).save(tmp_path / "x.jpg", **options)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 600)
    assert read_image(tmp_path / "x.jpg").shape == (3, 30, 40)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(PIL.Image.DecompressionBombError):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("kind", ["device", "pipe", "list of a device", "list of a folder",
                                  "list of outside"])
def test_data_that_is_no_data(here, photos, tmp_path, kind):                                # noqa: F811
    os.mkfifo(tmp_path / "pipe")
    data = {"device": "/dev/zero", "pipe": tmp_path / "pipe"}.get(kind, tmp_path / "list")
    (tmp_path / "list").write_text({"device": "/dev/zero", "folder": str(tmp_path),
                                    "outside": "../../../nothing.jpg"}.get(kind.split()[-1], ""))
    status, _, err = here("--arch", "c4", *SMALL, "--out", tmp_path / "out", data)
    assert status == 1 and err.count("\n") == 1
    assert ("1 of 1 listed files do not exist" if "list" in kind else "neither a folder nor a file") in err
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="not a file"):
            read_weights(str(path))


# ----------------------------------------------------------------------------------------------------------
# Files from strangers
# ----------------------------------------------------------------------------------------------------------

FORMATS = {"zip": lambda content, f: torch.save(content, f),
           "legacy": lambda content, f: torch.save(content, f, _use_new_zipfile_serialization=False),
           "pickle": lambda content, f: pickle.dump(content, f)}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("reader", ["weights", "resume", "probe", "msra"])
def test_no_reader_runs_code(here, photos, tmp_path, reader, form):                         # noqa: F811
    hostile = Hostile(str(tmp_path / "ran"))
    content = {"step": 1, "args": {"x": [hostile]}, "images": "", "statistics": 0, "model": {"a": [hostile]},
               "blobs": {"res2_0_branch2a_w": np.zeros(3), "conv1_w": hostile}}
    path = tmp_path / ("x.pkl" if reader in ("weights", "msra") else "checkpoint.pth")
    with open(path, "wb") as f:
        FORMATS[form](content, f)
    if reader == "weights":
        with pytest.raises(ValueError, match="--trust"):
            read_weights(str(path))
    elif reader == "resume":
        status, text, err = here(*RUN, "--resume", "--out", tmp_path, photos)
        assert status == 1 and "asks for" in text and "no readable checkpoint" in err
    else:
        with pytest.raises(SystemExit) as stopped:
            if reader == "probe":
                probe_cls.read_state(probe_cls.argparse.Namespace(out=str(tmp_path), resume=True))
            else:
                import finetune_det
                finetune_det.get_weights(finetune_det.argparse.Namespace(weights=str(path), trust=False))
        assert "no checkpoint of a probe" in str(stopped.value) or "--trust" in str(stopped.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("what, said", [
    ("nan", "conv1.weight has values that are not finite"), ("sparse", "conv1.weight is missing"),
    ("meta", "conv1.weight is missing"), ("complex", "conv1.weight is missing")])
def test_weights_without_numbers_are_refused(tmp_path, what, said):
    net = trunk("resnet18")
    x = torch.ones(64, 3, 7, 7)
    net["conv1.weight"] = {"nan": x * math.nan, "sparse": x.to_sparse(), "meta": x.to("meta"),
                           "complex": x + 1j}[what]
    torch.save(net, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=said if what != "meta" else "damaged|missing"):
        read_weights(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("spans", [[[0, 8], [8, 16]], [[4, 12], [8, 16]], [[0, 8], [0, 8]], [[0, 8], [8, 12]],
                                   [[8, 16], [16, 24]], [[0, 16], [8, 16]]], ids=str)
def test_safetensors_without_gap_or_overlap(tmp_path, spans):
    head = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": span}
                       for name, span in zip("ab", spans)}).encode()
    data = torch.arange(4.).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    if spans == [[0, 8], [8, 16]]:
        read = read_file(str(tmp_path / "x.safetensors"))
        assert read["a"].tolist() == [0, 1] and read["b"].tolist() == [2, 3]
    else:
        with pytest.raises(ValueError, match="its tensors do not fill it"):
            read_file(str(tmp_path / "x.safetensors"))


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def call(module, name):
    return text(module) + text(name) + b"\x93"


TUPLES = b"\x80\4)q\0" + b"0" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(60))
BOMBS = {
    "memo of 2 ** 31": b"\x80\4}r\xff\xff\xff\x7f.",
    "bytes without end": b"\x80\4\x8e" + (2 ** 40).to_bytes(8, "little") + b"abc.",
    "bytearray without end": b"\x80\5\x96" + (2 ** 36).to_bytes(8, "little") + b"abc.",
    "frame without end": b"\x80\4\x95" + (2 ** 60).to_bytes(8, "little") + b"abc.",
    "tuple as key": TUPLES + b"}h\x3cK\1s.",
    "tuple in a set": TUPLES + b"\x8f(h\x3c\x90.",
    "tuple as dtype": TUPLES + call("numpy", "dtype") + b"h\x3c\x85R.",
    "dict in itself": b"\x80\4}\x94\x8c\1ah\0s.",
    "dicts twice": b"\x80\4}q\0" + b"".join(b"}q%c(\x8c\1ah%c\x8c\1bh%cu" % (i + 1, i, i) for i in range(60))
    + b".",
    "deep dicts": b"\x80\4}" + b"\x8c\1a}" * 5000 + b"s" * 5000 + b".",
    "array of objects": b"\x80\4" + call("numpy", "_frombuffer") + b"(C\10AAAAAAAA" + call("numpy", "dtype")
    + text("O") + b"\x85RK\1\x85" + text("C") + b"tR.",
    "array made by hand": b"\x80\4" + call("numpy", "ndarray") + b"M\0\4\x85" + text("f4") + b"\x86R.",
    "dtype that grows": b"\x80\4" + call("numpy", "_frombuffer") + b"(C\4AAAA" + call("numpy", "dtype")
    + text("f4") + b"\x85R\x94(K\3" + text("|") + b"NNNM\0\4K\1K\0tbK\1\x85" + text("C") + b"tR.",
    "array of another size": b"\x80\4" + call("numpy", "_frombuffer") + b"(C\4AAAA" + call("numpy", "dtype")
    + text("f4") + b"\x85RK\2\x85" + text("C") + b"tR.",
}
LIMIT = 3 * 2 ** 30                     # bytes that a file of some kilobytes may make a reader reserve


def seeds():
    """{kind of file: (its name, its bytes, its reader)}: small ones, so that a mutation hits what matters."""
    small = {"a.weight": torch.arange(6.).reshape(2, 3), "b.bias": torch.arange(5.), "n": torch.tensor(7)}
    found, net = {}, {"state_dict": trunk("resnet18"), "epoch": 3}
    for form in ("zip", "legacy"):
        for name, content, reader in (("", {"model": small, "x": [1, 2.5, "s"]}, read_file),
                                      (", whole", net, read_weights)):
            buffer = io.BytesIO()
            FORMATS[form](content, buffer)
            found[form + name] = "x.pth", buffer.getvalue(), reader
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in small.items():
        raw = x.numpy().tobytes()
        header[name] = {"dtype": "F32" if x.is_floating_point() else "I64", "shape": list(x.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    found["safetensors"] = "x.safetensors", len(head).to_bytes(8, "little") + head + data, read_file
    arrays = {"model": {name: x.numpy() for name, x in small.items()}, "__author__": "MOCO"}
    for protocol in (2, 4, 5):
        found[f"pickle {protocol}"] = "x.pkl", pickle.dumps(arrays, protocol), read_file
    for kind, mode, options in (
            ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}),
            ("JPEG", "CMYK", {}),
            ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("PNG", "I;16", {}), ("GIF", "P", {}),
            ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("BMP", "RGB", {}), ("BMP", "P", {}),
            ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
            ("TIFF", "L", {"compression": "tiff_adobe_deflate"}), ("TIFF", "RGB", {"compression": "jpeg"}),
            ("PPM", "RGB", {})):
        image, buffer = PIL.Image.fromarray(picture(30, 40)), io.BytesIO()
        deep = PIL.Image.fromarray(np.asarray(image)[:, :, 0].astype(np.uint16) * 257)
        (deep if mode == "I;16" else image.convert(mode)).save(buffer, kind, **options)
        found[" ".join([kind, mode, *map(str, options.values())])] = "x.img", buffer.getvalue(), read_image
    return found


def mutate(data, rng):
    """Flip a bit, write noise, drop, repeat, set a size to an absurd one, cut; one to four times."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, n = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 1000))
        if rng.random() < 0.3:                              # headers and directories stand at the ends
            at = min(at, 200) if rng.random() < 0.5 else max(at, len(data) - 200)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + n] = rng.randbytes(n)
        elif kind == 2:
            del data[at:at + n]
        elif kind == 3:
            other = rng.randrange(len(data))
            data[at:at] = data[other:other + n]
        elif kind == 4:
            size = rng.choice((2, 4, 8))
            value = rng.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
            data[at:at + size] = value.to_bytes(size, rng.choice(("little", "big")))
        else:
            del data[at:]
        data = data or bytearray(1)
    return bytes(data)


def equal(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def read_hostile(folder, count):
    """In a process of its own, as it may crash, with a limit of memory and of time for each file."""
    with open("/proc/self/statm") as f:
        reserved = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (reserved + LIMIT, reserved + LIMIT))
    tally, sources = collections.Counter(), seeds()
    cases = [("bomb " + name, "x.pkl", data, None, read_weights) for name, data in BOMBS.items()]
    for name, (file, data, read) in sources.items():
        with open(f"{folder}/{file}", "wb") as f:
            f.write(data)
        want = read(f"{folder}/{file}")
        cases += [(name, file, mutate(data, random.Random(f"{name} {i}")), want, read) for i in range(count)]
    for i, (name, file, data, want, read) in enumerate(cases):
        with open(f"{folder}/{file}", "wb") as f:
            f.write(data)
        with open(f"{folder}/now", "w") as f:
            f.write(f"case {i}, {name}")
        signal.alarm(20)                                    # its default is to end the process
        try:
            got = read(f"{folder}/{file}")
            verdict = "right" if want is not None and equal(got, want) else "other values"
        except Exception as error:
            clear = isinstance(error, (ValueError, OSError)) or read is read_image
            verdict = "error" if clear else f"unclear: {type(error).__name__}"
        signal.alarm(0)
        tally[f"{name}: {verdict}"] += 1
    with open("/proc/self/status") as f:                    # ru_maxrss would begin at that of pytest's process
        peak = next(int(line.split()[1]) / 1e6 for line in f if line.startswith("VmHWM"))
    with open(f"{folder}/tally", "w") as f:
        json.dump([tally, peak], f)


def test_mutated_and_hostile_files_end_in_an_error_or_a_right_result(tmp_path):
    """20 mutations of each kind of file (FUZZ=1000 for a long night). Only zip has check sums: there every
    result must be right; elsewhere changed numbers pass as numbers. Pictures may raise anything."""
    count = int(os.environ.get("FUZZ", 20))
    child = mp.get_context("spawn").Process(target=read_hostile, args=(str(tmp_path), count))
    child.start()
    child.join(100 + count)
    assert child.exitcode == 0, f"{(tmp_path / 'now').read_text()}: {child.exitcode}"   # -11 crash, -14 hang
    with open(tmp_path / "tally") as f:
        tally, gigabytes = json.load(f)
    print(json.dumps(tally, indent=1), gigabytes)
    assert sum(tally.values()) == len(BOMBS) + count * len(seeds())
    assert not [name for name in tally if "unclear" in name]
    assert not [name for name in tally if name.startswith(("zip", "bomb")) and "other values" in name]
    assert gigabytes < 2
