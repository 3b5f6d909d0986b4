"""pretrain.py: real runs on real files, against a second implementation and each other."""
import contextlib
import copy
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pretrain
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from insloc import (C4Encoder, FPNEncoder, KeyQueue, MakeGroup, PathList, Views, generator_for, grid_anchors,
                    photometric, read_weights, roi_pool)

SCRIPT = pretrain.__file__
SMALL = ("--resnet resnet18 --image-size 64 --batch-size 12 --bn-group 3 --lr 0.02 --queue-size 20 --ema 0.9 "
         "--device cpu --log-every 1 --workers 0").split()


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"), 40)      # three steps of 12 an epoch, four left


@pytest.fixture
def handlers():
    """pretrain.main takes the two signals; a test process wants them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def here(monkeypatch, capsys, handlers):
    """here(*arguments) runs the program in this process: exit status, standard output, standard error."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        status = 0
        try:
            pretrain.launch()
        except SystemExit as left:
            status = left.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        return status, *capsys.readouterr()
    return run


def start(*arguments, launcher=(sys.executable, SCRIPT), **more):
    """The program as a process with a session of its own, so that a whole run can be killed."""
    return subprocess.Popen([*launcher, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, **more)


def finish(process, status=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err


def lines(out):
    """The objects of log.jsonl that are logged steps."""
    with open(f"{out}/log.jsonl") as f:
        return [line for line in map(json.loads, f) if "loss" in line]


def state_of(out):
    return torch.load(f"{out}/checkpoint.pth", weights_only=True)


def tensors(state):
    """{name: tensor} of all that decides how training goes on; the statistics of BatchNorm where asked."""
    found = {f"{part}.{name}": x for part in ("encoder_q", "encoder_k", "queue")
             for name, x in state[part].items() if "running" not in name and "num_batches" not in name}
    return found | {f"momentum.{i}": x["momentum_buffer"] for i, x in state["optimizer"]["state"].items()}


def apart(a, b):
    """The largest difference of two checkpoints, relative to the largest value of a tensor (at least 1)."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 150
    return max(((x - b[name]).abs().max() / x.abs().max().clamp(min=1)).item() for name, x in a.items())


def same(a, b):
    """Bit for bit, BatchNorm's statistics of every rank included."""
    a, b = ({**tensors(state), "statistics": state["statistics"]} for state in (a, b))
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


# ----------------------------------------------------------------------------------------------------------
# The loop, against a second one
# ----------------------------------------------------------------------------------------------------------

def textbook(photos, arch, method, steps, shuffled=True, composite=False, epochs=3, dtype=torch.double,
             first_update=0):
    """InsLoc's training, written again: SGD, momentum encoder and queue by hand, loss by cross-entropy,
    groups by lists of indices. Data, augmentation and networks are insloc.py's, with tests of their own.
    """
    paths = PathList(sorted(os.listdir(photos)), photos)
    pasting = method in ("cp", "insloc")
    views = Views(paths, 0, 64, (32, 64) if pasting else None, (.5, 2) if pasting else (3 / 4, 4 / 3))
    make_group = MakeGroup(0, 64, pasting, jitter=method == "insloc", flip_moves_box=composite)
    torch.manual_seed(0)
    encoder_q = (FPNEncoder if arch == "fpn" else C4Encoder)("resnet18")
    levels = 4 if arch == "fpn" else 1
    queue = KeyQueue(20, levels=levels, generator=generator_for(0, "queue")).keys.to(dtype)
    columns = [[queue[level, :, i] for i in range(20)] for level in range(levels)]
    encoder_q.to(dtype)
    encoder_k = copy.deepcopy(encoder_q)
    velocity, oldest, losses = {}, 0, []

    def encode(encoder, views_of_group, jittered):
        images = torch.stack([view["images"] for view in views_of_group]).to(dtype) / 255
        params = {name: torch.stack([view[name] for view in views_of_group]) for name in views_of_group[0]}
        true, jittered_boxes = params["boxes"], params["jittered"]
        images, _ = photometric(images, params, true if pasting and not composite else None)
        images = torchvision.transforms.functional.normalize(images, (.485, .456, .406), (.229, .224, .225))
        if method == "moco":
            return encoder(images)
        boxes = jittered_boxes if jittered else true
        return encoder(images, [true, true, true, boxes] if arch == "fpn" else boxes)

    for step in range(steps):
        epoch = step // 3
        lr = 0.02 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(40, generator=generator_for(0, "order", epoch)).tolist()
        batch = order[step % 3 * 12:][:12]
        groups = [make_group([views[epoch, step, g, index] for index in batch[3 * g:3 * g + 3]])
                  for g in range(4)]
        query, key = ([{name: values[i] for name, values in group[side].items()}
                       for group in groups for i in range(3)] for side in ("query", "key"))
        own, other = dict(encoder_q.named_parameters()), dict(encoder_k.named_parameters())
        with torch.no_grad():
            for name in other:
                other[name].copy_(0.9 * other[name] + 0.1 * own[name])
        places = torch.randperm(12, generator=generator_for(0, "shuffle", step)).tolist()
        places = places if shuffled else list(range(12))
        k = [None] * 12
        for g in range(4):
            members = places[3 * g:3 * g + 3]
            if shuffled and step < 4:           # a key's BatchNorm sees other images than its query's
                assert all(set(members) != set(range(3 * h, 3 * h + 3)) for h in range(4))
            with torch.no_grad():
                for member, embedding in zip(members, encode(encoder_k, [key[i] for i in members], False)):
                    k[member] = embedding
        gradient, step_loss = {name: 0 for name in own}, 0
        for g in range(4):
            q = encode(encoder_q, query[3 * g:3 * g + 3], True)
            loss = 0
            for i in range(3):
                for level in range(levels):
                    positive = q[i, level] @ k[3 * g + i][level]
                    logits = torch.stack([positive, *(q[i, level] @ c for c in columns[level])]) / 0.2
                    loss = loss + F.cross_entropy(logits[None], torch.tensor([0])) / 12
            step_loss += loss.item()
            for name, part in zip(own, torch.autograd.grad(loss, list(own.values()))):
                gradient[name] = gradient[name] + part
        with torch.no_grad():
            for name, p in own.items() if step >= first_update else ():
                change = gradient[name] + 1e-4 * p
                velocity[name] = 0.9 * velocity[name] + change if name in velocity else change
                p -= lr * velocity[name]
        for embedding in k:
            for level in range(levels):
                columns[level][oldest] = embedding[level]
            oldest = (oldest + 1) % 20
        losses.append(step_loss)
    return encoder_q, encoder_k, torch.stack([torch.stack(c, dim=1) for c in columns]), losses


@pytest.mark.parametrize("arch, method, more", [
    ("c4", "insloc", []), ("c4", "moco", []), ("c4", "cp", ["--aug-on", "composite"]), ("c4", "ra", []),
    ("fpn", "insloc", []), ("fpn", "cp", ["--fill-queue"]), ("fpn", "ra", []), ("c4", "moco", ["--fill-queue"])])
def test_steps_are_those_of_the_textbook_loop(here, monkeypatch, photos, tmp_path, arch, method, more):
    options = ["--arch", arch, "--method", method, *SMALL, "--precision", "fp64", "--epochs", 3, *more]
    enqueued, steps = [], 4 if arch == "c4" else 3      # an epoch, C4's into the next one and its rate

    def enqueue(self, keys):                            # the first steps alone, at the rates of three epochs
        enqueued.append(keys)
        if len(enqueued) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, keys)

    original = KeyQueue.enqueue
    monkeypatch.setattr(KeyQueue, "enqueue", enqueue)
    assert here(*options, "--out", tmp_path, photos)[0] == 143
    encoder_q, encoder_k, queue, losses = textbook(
        photos, arch, method, steps, composite="composite" in more,
        first_update=2 if "--fill-queue" in more else 0)               # two steps of 12 keys fill a queue of 20
    state = state_of(tmp_path)
    assert state["step"] == steps and state["queue"]["ptr"] == 12 * steps % 20 and state["queue"]["filled"] == 20
    torch.testing.assert_close(state["queue"]["keys"], queue, rtol=0, atol=1e-9)
    for name, encoder in (("encoder_q", encoder_q), ("encoder_k", encoder_k)):
        torch.testing.assert_close(state[name], encoder.state_dict(), rtol=1e-9, atol=1e-9)  # statistics, too
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(losses, rel=1e-9)
    rung = {"moco": "MoCo-v2,", "ra": "RA,", "cp": "RA+CP,", "insloc": "InsLoc,"}[method]
    assert read_weights(str(tmp_path)).source.startswith(rung)


def test_the_textbook_loop_would_see_a_missing_shuffle(photos):
    with_shuffle, without = (textbook(photos, "c4", "insloc", 1, shuffled)[3] for shuffled in (True, False))
    assert abs(with_shuffle[0] - without[0]) > 1e-4


def test_a_longer_curve_of_moco_stays_within_the_spread_of_seeds(here, photos, tmp_path):
    """In fp32, where rounding grows from step to step; four epochs (EPOCHS=40 for an evening)."""
    epochs = int(os.environ.get("EPOCHS", 4))
    curves = []
    for seed in range(4):
        out = tmp_path / str(seed)
        assert here("--arch", "c4", "--method", "moco", *SMALL, "--precision", "fp32", "--epochs", epochs,
                    "--seed", seed, "--out", out, photos)[0] == 0
        curves.append([line["loss"] for line in lines(out)])
    theirs = np.array(textbook(photos, "c4", "moco", 3 * epochs, epochs=epochs, dtype=torch.float)[3])
    curves = np.array(curves)
    np.testing.assert_allclose(theirs[:3], curves[0, :3], rtol=1e-3)
    mean, spread = curves.mean(axis=0), curves.std(axis=0, ddof=1)
    print("textbook - mean of seeds, in deviations:", ((theirs - mean) / spread).round(1))
    half = 3 * epochs // 2                                  # each seed's mean over the later half
    means = curves[:, half:].mean(axis=1)
    assert abs(theirs[half:].mean() - means.mean()) < 3 * means.std(ddof=1)


OPTIONS = {"c4": [*SMALL, "--precision", "fp64", "--epochs", 3, "--save-steps", 2],
           "fpn": [*SMALL, "--precision", "fp64", "--epochs", 2, "--batch-size", 6]}


@pytest.fixture(scope="module")
def base(photos, tmp_path_factory):
    """Nine steps (FPN: twelve, of six images) in float64: {(arch, processes): (folder, standard output)}."""
    out = tmp_path_factory.mktemp("base")
    runs = {("c4", 1): 0, ("c4", 2): 1, ("c4", 4): 0, ("fpn", 1): 0, ("fpn", 2): 0}     # loader workers
    found = {}
    for (arch, count), workers in runs.items():
        folder = str(out / f"{arch}{count}")
        process = start("--arch", arch, *OPTIONS[arch], "--workers", workers, "--nprocs", count,
                        "--keep", int((arch, count) == ("c4", 1)), "--out", folder, photos)
        found[arch, count] = folder, finish(process)[0]
    return found


@pytest.mark.parametrize("arch, count", [("c4", 2), ("c4", 4), ("fpn", 2)])
def test_processes_compute_what_one_computes(base, arch, count):
    one, many = (state_of(base[arch, n][0]) for n in (1, count))
    assert one["step"] == many["step"] == {"c4": 9, "fpn": 12}[arch]
    assert apart(one, many) < 1e-9
    assert len(many["statistics"]) == count and not torch.equal(*many["statistics"][:2])
    for a, b in zip(lines(base[arch, 1][0]), lines(base[arch, count][0]), strict=True):
        for name in ("loss", "acc_queue", "acc_batch", "lr", "step"):
            assert a[name] == pytest.approx(b[name], rel=1e-9)


def test_weights_on_disk_carry_the_mean_of_the_ranks_statistics(base):
    state = state_of(base["c4", 4][0])
    names = [f"{encoder}.{name}" for encoder in ("encoder_q", "encoder_k") for name in state[encoder]
             if "running" in name]
    parts = state["statistics"].mean(dim=0).split([state[n[:9]][n[10:]].numel() for n in names])
    assert len(parts) == 80
    for name, part in zip(names, parts):
        torch.testing.assert_close(state[name[:9]][name[10:]].flatten(), part, rtol=1e-12, atol=1e-12)


def test_the_number_of_loader_workers_changes_nothing(here, photos, tmp_path):
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        assert here("--arch", "c4", *SMALL, "--epochs", 1, "--workers", workers, "--out", out, photos)[0] == 0
    none, one, two = (state_of(tmp_path / str(workers)) for workers in (0, 1, 2))
    assert same(none, one) and same(none, two)


def shuffle_rank(rank, world, folder):
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for seed in range(20):
        n = 1 + seed % 4
        permutation = torch.randperm(world * n, generator=torch.Generator().manual_seed(seed))
        for dtype in (torch.uint8, torch.float64):
            rows = torch.arange(world * n * 6).reshape(world * n, 2, 3).to(dtype)
            new = pretrain.shuffle(rows[rank * n:(rank + 1) * n], permutation, rank, world)
            assert torch.equal(new, rows[permutation][rank * n:(rank + 1) * n])
            assert torch.equal(pretrain.all_gather(new, world), rows[permutation])
    dist.destroy_process_group()


def test_shuffle_is_the_permutation_of_all_ranks_rows(tmp_path):
    mp.start_processes(shuffle_rank, (3, tmp_path), 3, start_method="spawn")


def test_pack_and_unpack_are_inverse():
    view = {"order": torch.arange(8).reshape(2, 4), "hue": torch.rand(2), "flip": torch.tensor([True, False]),
            "boxes": torch.rand(2, 4)}
    there = pretrain.unpack(pretrain.pack(view), like=view)
    assert all(torch.equal(there[name], x) and there[name].dtype == x.dtype for name, x in view.items())


# ----------------------------------------------------------------------------------------------------------
# Stop, kill, go on
# ----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("count, asked", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_run_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(base, photos, tmp_path, count, asked):
    options = ["--arch", "c4", *OPTIONS["c4"], "--nprocs", count, "--out", tmp_path, "--resume", photos]
    rng = random.Random(count)
    for number, first in ((signal.SIGKILL, 2), (asked, 4)):
        process = start(*options, "--workers", 3 - count)
        wait_for_step(process, tmp_path, first + rng.randrange(3))
        os.killpg(process.pid, number)              # every process of the run, loader workers included
        if number == signal.SIGKILL:
            process.communicate()
            continue
        _, err = finish(process, status=128 + number)
        step = int(re.search(rf"stopped by {signal.Signals(number).name} after step (\d+)", err)[1])
        assert state_of(tmp_path)["step"] == step < 9
    finish(start(*options))
    whole = base["c4", count][0]
    assert same(state_of(whole), state_of(tmp_path))
    a, b = lines(whole), lines(tmp_path)
    assert [line["step"] for line in b] == list(range(1, 10))           # each step once, none missing
    assert [line["loss"] for line in a] == [line["loss"] for line in b]


def test_resuming_a_finished_run_changes_nothing(here, base, photos, tmp_path):
    shutil.copytree(base["c4", 1][0], tmp_path / "run")
    status, text, _ = here("--arch", "c4", *OPTIONS["c4"], "--resume", "--out", tmp_path / "run", photos)
    assert status == 0 and "done, 9 steps" in text
    assert same(state_of(tmp_path / "run"), state_of(base["c4", 1][0]))


# ----------------------------------------------------------------------------------------------------------
# What a person sees, and what is left behind
# ----------------------------------------------------------------------------------------------------------

def test_the_run_in_numbers(base):
    text = base["c4", 2][1]
    parameters = sum(p.numel() for p in C4Encoder("resnet18").parameters())
    for fact in (f"resnet18, {parameters:,} parameters", "2 x cpu, fp64, 1 loader workers", "images  40 in",
                 "12 images = 4 BatchNorm groups x 3, 2 of them a process",
                 "3 epochs x 3 = 9; 4 images left out", "20 keys x 1 levels", f"loss {math.log(21):.2f}",
                 "acc_batch 0.0833", "--bn-group 3 gives noisy statistics"):
        assert fact in text, fact
    assert f"loss {4 * math.log(21):.2f} = 4 x ln(1 + 20)" in base["fpn", 1][1]
    assert re.search(r"step 9/9  epoch 2  loss [\d.]+  acc_queue [\d.]+  acc_batch [\d.]+  [\d.]+ images/s  "
                     r"data wait \d+%  left 0:00:00", text)
    assert "WARNING: the queue" not in text         # 20 keys of 40 images just fit


def test_log_and_tensorboard_say_the_same(base, photos):
    out, _ = base["fpn", 2]
    with open(f"{out}/log.jsonl") as f:
        head = json.loads(f.readline())
    assert head["args"]["queue_size"] == 20 and head["torch"] == torch.__version__ and head["commit"]
    log = lines(out)
    assert [line["step"] for line in log] == list(range(1, 13))
    events = EventAccumulator(out)
    events.Reload()
    for name in ("loss", "loss_p2", "loss_p5", "acc_queue", "acc_batch", "lr", "images_per_s", "data_wait"):
        there = [(event.step, event.value) for event in events.Scalars(name)]
        assert there == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in log]
    for line in log:
        assert line["loss"] == pytest.approx(sum(line[f"loss_p{level}"] for level in (2, 3, 4, 5)))
        assert line["queue_filled"] == min(20, 6 * line["step"])
        assert 0 <= line["acc_queue"] <= 1 and 0 <= line["data_wait"] <= 1
    assert [line["lr"] for line in log] == pytest.approx([0.02] * 6 + [0.01] * 6)         # cosine by epoch


def test_files_of_a_run(base, photos):
    out, _ = base["c4", 1]
    assert set(os.listdir(out)) >= {"backbone.pth", "checkpoint.pth", "checkpoint_prev.pth", "log.jsonl",
                                    "composites.png", "loss.png", "images.list", "checkpoint_00000009.pth"}
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    assert not os.path.exists(f"{out}/checkpoint_00000008.pth")                             # --keep 1
    assert torch.load(f"{out}/checkpoint_prev.pth", weights_only=True)["step"] == 8
    state, backbone = state_of(out), torch.load(f"{out}/backbone.pth", weights_only=True)
    missing = torchvision.models.resnet18().load_state_dict(backbone, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    assert all(torch.equal(x, state["encoder_q"][f"resnet.{name}"]) for name, x in backbone.items())
    weights = read_weights(out)
    assert weights.source.startswith("InsLoc, resnet18")
    assert all(torch.equal(x, backbone[name].to(x.dtype)) for name, x in weights.backbone.items())
    with open(f"{out}/images.list", "rb") as f:
        assert [name.decode() for name in f.read().split(b"\0")] == sorted(os.listdir(photos))
    for name in ("composites.png", "loss.png"):
        with Image.open(f"{out}/{name}") as image:
            assert np.asarray(image).std() > 10


def test_composites_show_the_boxes(here, photos, tmp_path):
    status, text, _ = here("--arch", "c4", *SMALL, "--bn-group", 6, "--preview", 6,
                           "--out", tmp_path, photos)
    assert status == 0 and os.listdir(tmp_path) == ["composites.png"]
    paths = PathList(sorted(os.listdir(photos)), photos)
    order = torch.randperm(40, generator=generator_for(0, "order", 0)).tolist()
    group = MakeGroup(0, 64)([Views(paths, 0, 64, (32, 64))[0, 0, 0, index] for index in order[:6]])
    sheet = np.asarray(Image.open(tmp_path / "composites.png").convert("RGB")).astype(int)
    side, blue = 64 + 2 * 16, 0
    assert sheet.shape == (3 * (side + 2) + 2, 4 * (side + 2) + 2, 3)
    anchors = grid_anchors(64)
    for i in range(6):
        for j, name in enumerate(("query", "key")):
            place = 2 * i + j
            panel = sheet[place // 4 * (side + 2) + 2:, place % 4 * (side + 2) + 2:][:side, :side]
            x1, y1, x2, y2 = (group[name]["boxes"][i] + 16).int().tolist()
            for y, x in ((y1, (x1 + x2) // 2), ((y1 + y2) // 2, x1)):
                assert panel[y, x].tolist() == [255, 30, 30]
            pure = (panel == [20, 60, 255]).all(axis=2)
            assert pure.any() == (name == "query")
            blue += pure.any()
    assert blue == 6
    assert all((anchors == box).all(dim=1).any() for box in group["query"]["jittered"])


def test_bf16_follows_fp32(here, photos, tmp_path):
    for precision in ("fp32", "bf16"):
        assert here("--arch", "c4", *SMALL, "--epochs", 1, "--precision", precision, "--out",
                    tmp_path / precision, photos)[0] == 0
    full, half = ([line["loss"] for line in lines(tmp_path / precision)] for precision in ("fp32", "bf16"))
    assert half != full and half == pytest.approx(full, rel=0.05)
    assert all(x.dtype != torch.bfloat16 for x in tensors(state_of(tmp_path / "bf16")).values())


def test_defaults_are_the_papers():
    """Sec. 5, without a GPU's help: 8 x 32 images, SGD from .03, K = 65,536, .999, T = .2, 200 epochs."""
    args = pretrain.get_args(["--arch", "fpn", "--nprocs", "1", "x"])
    assert (args.resnet, args.batch_size, args.bn_group, args.lr) == ("resnet50", 256, 32, 0.03)
    assert (args.weight_decay, args.queue_size, args.ema, args.temperature) == (1e-4, 65536, 0.999, 0.2)
    assert (args.epochs, args.method, args.image_size, args.fg_size) == (200, "insloc", 256, [128, 256])
    assert not args.nesterov and not args.keep_aspect and args.aug_on == "foreground"


class Own(torch.nn.Module):
    """A backbone of a reader's: no BatchNorm, another width, a frozen parameter, one that nothing uses."""
    levels, dim = ("own",), 24

    def __init__(self, _):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.frozen = torch.nn.Parameter(torch.ones(16, 1, 1), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.out = torch.nn.Linear(16, 24)

    def forward(self, images, boxes):
        x = roi_pool(self.conv(images).relu() * self.frozen, boxes, size=3, scale=1 / 2).mean(dim=(2, 3))
        return F.normalize(self.out(x), dim=1)[:, None]


def test_a_backbone_of_ones_own_trains_and_resumes(here, monkeypatch, photos, tmp_path):
    monkeypatch.setattr(pretrain, "C4Encoder", Own)
    options = ["--arch", "c4", *SMALL, "--precision", "fp32", "--save-steps", 3, "--epochs", 2]
    assert here(*options, "--out", tmp_path / "whole", photos)[0] == 0
    save = pretrain.save
    with monkeypatch.context() as patch:                # stopped after its first checkpoint
        patch.setattr(pretrain, "save", lambda *given: (save(*given), os.kill(os.getpid(), signal.SIGTERM)))
        assert here(*options, "--out", tmp_path / "halves", photos)[0] == 143
    assert here(*options, "--resume", "--out", tmp_path / "halves", photos)[0] == 0
    whole, halves = state_of(tmp_path / "whole"), state_of(tmp_path / "halves")
    query, key = whole["encoder_q"], whole["encoder_k"]
    assert whole["queue"]["keys"].shape == (1, 24, 20) and whole["step"] == halves["step"] == 6
    assert query["frozen"].eq(1).all() and not query["out.weight"].equal(key["out.weight"])
    assert all(x.equal(halves[part][name]) for part in ("encoder_q", "encoder_k", "queue")
               for name, x in whole[part].items())


def test_switches_change_what_the_network_sees(photos):
    """Each divergence from the release has a switch; one that did nothing would be found here."""
    seen = {}
    for name, switch in {"default": [], "aspect": ["--keep-aspect"], "composite": ["--aug-on", "composite"],
                         "dataset": ["--backgrounds", "dataset"], "levels": ["--jitter-levels", "all"],
                         "sides": ["--fg-size", "40", "50"], "cp": ["--method", "cp"],
                         "ra": ["--method", "ra"], "seed": ["--seed", "1"]}.items():
        args = pretrain.get_args(["--arch", "fpn", *SMALL, *switch, photos])
        views, make_group = pretrain.make_data(args, pretrain.find_images(args))
        query = make_group([views[0, 0, 0, index] for index in range(3)])["query"]
        boxes = pretrain.boxes_of(query, args, torch.device("cpu"))
        boxes = boxes if isinstance(boxes, list) else [boxes] * 4
        seen[name] = torch.cat([pretrain.augment(query, args).flatten(), *(b.flatten() for b in boxes)])
    names = sorted(seen)
    assert not any(seen[a].equal(seen[b]) for a in names for b in names if a < b)


def test_init_starts_from_other_weights(here, base, photos, tmp_path):
    source = base["fpn", 1][0]
    _, text, _ = here("--arch", "fpn", *SMALL, "--epochs", 1, "--lr", 0, "--weight-decay", 0,
                      "--init", source, "--out", tmp_path, photos)
    assert "starting from InsLoc, resnet18 at encoder_q.resnet.: neck and box head, the rest random" in text
    status, _, err = here("--arch", "c4", *SMALL, "--resnet", "resnet34", "--init", source, "--out",
                          tmp_path / "other", photos)
    assert status == 1 and err.count("\n") == 1 and "resnet18 at encoder_q.resnet., not --resnet" in err
    old, new = state_of(source)["encoder_q"], state_of(tmp_path)["encoder_q"]
    for name, x in old.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(x.float(), new[name]) == (not name.startswith("projector")), name


# ----------------------------------------------------------------------------------------------------------
# Wrong input
# ----------------------------------------------------------------------------------------------------------

BAD = {
    "folder that does not exist": (["/nowhere"], "/nowhere: no such file"),
    "group that does not divide the batch": (["--bn-group", 5, "DATA"], "not a multiple of --bn-group 5"),
    "one group": (["--bn-group", 12, "DATA"], "--batch-size 24"),
    "group of two": (["--bn-group", 2, "DATA"], "a sample and two backgrounds"),
    "processes that do not divide the groups": (["--nprocs", 3, "DATA"], "at most --nprocs 2 can"),
    "more processes than groups": (["--nprocs", 8, "DATA"], "at most --nprocs 4 can"),
    "boxes larger than the canvas": (["--fg-size", 16, 65, "DATA"], "LOW <= HIGH <= canvas 64"),
    "boxes the wrong way round": (["--fg-size", 30, 20, "DATA"], "LOW <= HIGH"),
    "canvas off the stride": (["--image-size", 40, "DATA"], "multiple of 32"),
    "paste size without pasting": (["--method", "ra", "--fg-size", 8, 16, "DATA"], "pastes nothing"),
    "no epochs": (["--epochs", 0, "DATA"], "--epochs must be at least 1"),
    "negative rate": (["--lr", -1, "DATA"], "--lr must be a number from 0 on"),
    "rate that is no number": (["--lr", "nan", "DATA"], "--lr must be a number from 0 on"),
    "seed too large": (["--seed", 2 ** 64, "DATA"], "--seed must be a number from 0 on, and below 2**63"),
    "more pictures than images": (["--preview", 41, "DATA"], "too few for --preview 41"),
    "momentum above one": (["--ema", 1.5, "DATA"], "--ema must be in [0, 1]"),
    "temperature of zero": (["--temperature", 0, "DATA"], "--temperature above 0"),
    "batch larger than the data": (["--batch-size", 63, "DATA"], "has 40 images, less than a batch of 63"),
    "weights that are none": (["--init", SCRIPT, "DATA"], "neither torch.save's"),
    "output that is a file": (["--out", SCRIPT, "DATA"], "--out"),
    "output inside a file": (["--out", SCRIPT + "/run", "DATA"], "--out"),
    "list that is a picture": (["DATA/000.jpg"], "listed files do not exist"),
    "queue larger than the memory": (["--queue-size", 10 ** 14, "DATA"], "out of memory: take a smaller"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_ends_in_one_line(here, photos, tmp_path, case):
    arguments, message = BAD[case]
    arguments = [str(a).replace("DATA", photos) for a in arguments]
    status, _, err = here("--arch", "c4", *SMALL, "--out", tmp_path / "out", *arguments)
    last = err.strip().splitlines()[-1]
    assert status in (1, 2) and message in last and last.startswith("pretrain.py: error: ")
    assert not os.path.exists(tmp_path / "out" / "checkpoint.pth")


def test_half_of_torchruns_variables_end_in_one_line(photos, tmp_path):
    process = start("--arch", "c4", *SMALL, "--out", tmp_path, photos,
                    env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"})
    assert "start by torchrun, or unset RANK" in finish(process, 2)[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_where_one_is_asked_for(here, photos):
    status, _, err = here("--arch", "c4", *SMALL, "--device", "cuda", photos)
    assert status == 2 and "torch sees no GPU" in err


def test_a_real_process_prints_no_traceback(photos, tmp_path):
    for arguments, status in ((["/nowhere"], 1), (["--bn-group", "5", photos], 2)):
        _, err = finish(start("--arch", "c4", *SMALL, "--out", tmp_path, *arguments), status)
        assert err.strip().splitlines()[-1].startswith("pretrain.py: error: ")


def test_folders_without_images(here, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = here("--arch", "c4", *SMALL, "--out", tmp_path / "out", tmp_path / "empty")
    assert status == 1 and "has 0 images" in err and ".jpg" in err and err.count("\n") == 1


def test_what_a_run_directory_refuses(here, base, photos, tmp_path):
    out, _ = base["c4", 1]
    options = ["--arch", "c4", *OPTIONS["c4"], "--out", out]

    def content():
        return sorted((name, os.path.getmtime(f"{out}/{name}")) for name in os.listdir(out) if name != "lock")

    before = content()
    status, _, err = here(*options, photos)
    assert status == 1 and f"{out} holds a run: --resume goes on, --out starts another" in err
    status, _, err = here(*options, "--lr", 0.1, "--queue-size", 32, "--resume", photos)
    assert status == 1 and "with other settings: lr was 0.02, is 0.1; queue_size was 20, is 32\n" in err
    status, _, err = here(*options, "--preview", 4, photos)
    assert status == 1 and "give --preview another --out" in err
    assert before == content()
    (tmp_path / "checkpoint.pth").write_bytes(b"")          # its log.jsonl is gone: a run all the same
    status, _, err = here("--arch", "c4", *OPTIONS["c4"], "--out", tmp_path, photos)
    assert status == 1 and "holds a run" in err
    shutil.copyfile(f"{out}/backbone.pth", tmp_path / "checkpoint.pth")
    status, _, err = here("--arch", "c4", *OPTIONS["c4"], "--out", tmp_path, "--resume", photos)
    assert status == 1 and err.endswith("checkpoint.pth is no checkpoint of pretrain.py\n")
    state = state_of(out)
    del state["args"]["fill_queue"]                         # as before there was that switch
    torch.save(state, tmp_path / "checkpoint.pth")
    options[-1] = tmp_path
    status, _, err = here(*options, "--fill-queue", "--resume", photos)
    assert status == 1 and "with other settings: fill_queue was False, is True\n" in err
    status, text, _ = here(*options, "--resume", photos)
    assert status == 0 and "done, 9 steps" in text


def test_a_queue_that_is_filled_first_must_leave_steps_to_learn(here, photos, tmp_path):
    options = ["--arch", "c4", "--method", "moco", *SMALL, "--epochs", 1, "--fill-queue"]     # three steps of twelve
    status, _, err = here(*options, "--queue-size", 25, "--out", tmp_path / "none", photos)
    assert status == 1 and "all 3 steps would only fill the queue" in err and err.count("\n") == 1
    status, text, _ = here(*options, "--queue-size", 24, "--out", tmp_path / "one", photos)
    assert status == 0 and "24 keys x 1 levels, 2 steps fill it first\n" in text
    assert state_of(tmp_path / "one")["optimizer"]["state"]             # one update has been made


def test_a_run_keeps_its_images_from_its_first_checkpoint_on(here, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    options = ["--arch", "c4", "--method", "moco", *SMALL, "--epochs", 1, "--resume", "--out", folder / "run"]
    os.makedirs(folder / "run")
    (folder / "run" / "images.list").write_bytes(b"000.jpg")            # of a run that saved nothing
    _, text, _ = here(*options, f"{folder}//")
    assert "images  40 in" in text
    write_images(folder, 3, start=60)
    _, text, _ = here(*options, folder)
    assert "has changed: the run keeps the 40 images that it started with" in text and "done, 3 steps" in text


def test_processes_of_other_settings_refuse_each_other(photos, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [start("--arch", "c4", "--method", "moco", *SMALL, "--lr", 0.1 + rank, "--epochs", 1, "--out",
                   tmp_path / str(rank), photos,
                   env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
             for rank in range(2)]
    errors = [finish(process, status=1)[1] for process in ranks]
    assert "the processes differ in images, settings or checkpoint" in errors[0]


def test_the_queue_warning_names_a_size_that_fits(here, photos, tmp_path):
    options = ["--arch", "c4", "--method", "moco", *SMALL, "--epochs", 1]
    _, text, _ = here(*options, "--queue-size", 21, "--out", tmp_path / "a", photos)
    assert "WARNING: the queue exceeds half of the images" in text and "--queue-size 16 would fit" in text
    _, text, _ = here(*options, "--queue-size", 16, "--out", tmp_path / "b", photos)
    assert "WARNING: the queue" not in text


def test_list_files(here, photos, tmp_path, capsys):
    names = sorted(os.listdir(photos))
    os.symlink(photos, tmp_path / "photos")
    wanted = [os.path.join(photos, name) for name in names]
    (tmp_path / "newlines").write_text("".join(f"photos/{name}\n" for name in names))
    (tmp_path / "crlf").write_bytes(b"".join(f"photos/{name}\r\n".encode() for name in names))
    (tmp_path / "nul").write_bytes(b"\0".join(os.fsencode(path) for path in wanted))
    for name in ("newlines", "crlf", "nul"):
        args = pretrain.get_args(["--arch", "c4", *SMALL, str(tmp_path / name)])
        paths = pretrain.find_images(args)
        assert [os.path.realpath(paths[i]) for i in range(len(paths))] == list(map(os.path.realpath, wanted))
    assert "more than once" not in capsys.readouterr().out
    (tmp_path / "twice").write_text("".join(f"photos/{name}\n" for name in [*names, names[0]]))
    assert len(pretrain.find_images(pretrain.get_args(["--arch", "c4", *SMALL, str(tmp_path / "twice")]))) == 41
    assert "names files more than once" in capsys.readouterr().out
    (tmp_path / "broken").write_text("".join(f"photos/{name}\n" for name in names) + "photos/nothing.jpg\n")
    status, _, err = here("--arch", "c4", *SMALL, tmp_path / "broken")
    assert status == 1 and "1 of 41 listed files do not exist, the first is 'photos/nothing.jpg'" in err


def test_folders_are_searched_to_any_depth_whatever_they_hold(here, photos, tmp_path):
    odd = [b"a space.jpg", b"'quotes\".JPG", b"new\nline.jpeg", b"caf\xe9.jpg", "ü.jpg".encode()]
    deep = os.path.join(os.fsencode(tmp_path), b"data", b"deep", b"\xff deeper")
    os.makedirs(deep)
    for name in odd:
        shutil.copyfile(os.path.join(photos, "000.jpg"), os.path.join(deep, name))
    for name in (b".hidden.jpg", b"notes.txt"):
        shutil.copyfile(os.path.join(photos, "000.jpg"), os.path.join(deep, name))
    os.symlink(tmp_path / "data", tmp_path / "data" / "deep" / "loop")
    os.symlink(photos, tmp_path / "data" / "linked")
    args = pretrain.get_args(["--arch", "c4", *SMALL, str(tmp_path / "data")])
    paths = pretrain.find_images(args)
    names = [paths.name(i) for i in range(len(paths))]
    assert len(names) == 45 and names == sorted(names)
    assert {os.path.basename(name) for name in names} == {*odd, *map(os.fsencode, os.listdir(photos))}
    status, _, err = here("--arch", "c4", *SMALL, "--epochs", 1, "--out", tmp_path / "out", tmp_path / "data")
    assert status == 0, err


def test_a_train_folder_alone_is_taken(photos, tmp_path, capsys):
    for split in ("train", "val"):
        os.makedirs(tmp_path / split)
    for i, name in enumerate(sorted(os.listdir(photos))):
        os.symlink(os.path.join(photos, name), tmp_path / ("val" if i < 10 else "train") / name)
    paths = pretrain.find_images(pretrain.get_args(["--arch", "c4", *SMALL, str(tmp_path)]))
    assert len(paths) == 30 and f"taking '{tmp_path}/train' alone" in capsys.readouterr().out
