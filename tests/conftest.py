"""What test files share: pictures to train on, runs of pretrain.py here or in a process of their own."""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
import toy
from stage import SIGNALS

# A shell that starts pytest in the background has SIGINT ignored, which the processes below would inherit.
for number in SIGNALS:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

# Before a program under pdb: without it, Python 3.13.0 takes the program's options for pdb's own. Later ones
# refuse it.
PDB_SEPARATOR = ["--"] if sys.version_info[:3] == (3, 13, 0) else []

SMALL = ("--arch c4 --resnet narrow18 --image-size 64 --batch-size 12 --bn-group 3 --lr 0.02 --queue-size 20 "
         "--ema 0.9 --device cpu --log-every 1 --workers 0").split()


def write_images(folder, count, start=0):
    """Smooth random pictures of many sizes, JPEG, some PNG with alpha or grey."""
    os.makedirs(folder, exist_ok=True)
    for i in range(start, start + count):
        rng = np.random.default_rng(i)
        rough = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture = rough.resize(rng.integers(40, 90, 2).tolist(), Image.Resampling.BICUBIC)
        if i % 10 == 7:
            picture.convert("RGBA" if i % 20 == 7 else "L").save(f"{folder}/{i:03d}.png")
        else:
            picture.save(f"{folder}/{i:03d}.jpg", quality=92)
    return str(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), 40)      # three steps of 12 an epoch, four left


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small detection set in COCO's and VOC's layout. Tests that change it copy it."""
    out = tmp_path_factory.mktemp("toy") / "world"
    toy.write_world(str(out), train=0, val=0, det_train=20, det_val=8)
    return out


@pytest.fixture
def here(monkeypatch, capsys):
    """here(*arguments) runs pretrain.py in this process: exit status, standard output, standard error."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        status = 0
        try:
            pretrain.stage.launch(pretrain.main, pretrain.get_args(), pretrain.find_data)
        except SystemExit as left:
            status = left.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        return status, *capsys.readouterr()

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def start(*arguments, launcher=(sys.executable, pretrain.__file__), **more):
    """The program as a process with a session of its own, so that a whole run can be killed."""
    return subprocess.Popen([*launcher, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, **more)


def finish(process, status=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err


def wait_for_step(process, out, step):
    """Until log.jsonl has the step; the time-out is for a run that hangs."""
    end = time.time() + 120
    while time.time() < end and process.poll() is None:
        with contextlib.suppress(FileNotFoundError), open(f"{out}/log.jsonl") as f:
            if f'{{"step": {step}, "epoch"' in f.read():
                return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"step {step} did not come: {process.communicate()}")


def lines(out):
    """The objects of log.jsonl that are logged steps."""
    with open(f"{out}/log.jsonl") as f:
        return [line for line in map(json.loads, f) if "loss" in line]


def state_of(out):
    return torch.load(f"{out}/checkpoint.pth", weights_only=True)


def tensors(state):
    """{name: tensor} of all that decides how training goes on."""
    found = {f"{part}.{name}": x for part in ("encoder_q", "encoder_k", "queue")
             for name, x in state[part].items() if "running" not in name and "num_batches" not in name}
    return found | {f"momentum.{i}": x["momentum_buffer"] for i, x in state["optimizer"]["state"].items()}


def same(a, b):
    """Whether two checkpoints are equal bit for bit, BatchNorm's statistics included."""
    a, b = ({**tensors(state), **state["encoder_q"], "of keys": list(state["encoder_k"].values())}
            for state in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


# Of the tests of insloc.py: statistics with fixed seeds and bounds of four to five standard deviations, so
# that a test fails when the code is wrong and not when a library draws its numbers in another order.

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uneven(counts, cells):
    """Chi-square of counts over `cells` equally likely cells, in its standard deviations; above 5: no."""
    counts = np.array(list(counts) + [0] * (cells - len(counts)))
    expected = counts.sum() / cells
    return (((counts - expected) ** 2 / expected).sum() - (cells - 1)) / math.sqrt(2 * (cells - 1))


def iou_of_pairs(a, b):
    """IoU of the boxes of a with those of b, one by one, in float64 NumPy."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clip(0).prod(-1)
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)


def paper_boxes(n, seed, size=256, low=128):
    """Boxes as the paper draws them: sides U{low..size}, both included, anywhere in the canvas."""
    rng = np.random.default_rng(seed)
    side = rng.integers(low, size + 1, (n, 2))
    corner = rng.integers(0, size - side + 1)
    return torch.tensor(np.concatenate([corner, corner + side], axis=1)).float()
