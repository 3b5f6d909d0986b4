"""pretrain.py: real runs on real files, against a second implementation and each other."""
import copy
import json
import math
import os
import random
import re
import shutil
import signal
import sys

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torch.utils.tensorboard
import torchvision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain
from conftest import SMALL, finish, lines, same, start, state_of, tensors, wait_for_step
from insloc import (C4Encoder, FPNEncoder, KeyQueue, MakeGroup, Views, generator_for, grid_anchors,
                    photometric, roi_pool)
from weights import read_weights

FPN = [*SMALL, "--arch", "fpn"]


def apart(a, b):
    """The largest difference of two checkpoints, relative to the largest value of a tensor (at least 1)."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 100
    return max(((x - b[name]).abs().max() / x.abs().max().clamp(min=1)).item() for name, x in a.items())


# ----------------------------------------------------------------------------------------------------------
# The loop, against a second one
# ----------------------------------------------------------------------------------------------------------

def textbook(photos, arch, method, steps, shuffled=True, composite=False, epochs=3, dtype=torch.double,
             first_update=0):
    """InsLoc's training, written again: SGD, momentum encoder and queue by hand, loss by cross-entropy,
    groups by lists of indices. Data, augmentation and networks are insloc.py's, with tests of their own.
    """
    paths = [os.path.join(photos, name) for name in sorted(os.listdir(photos))]
    pasting = method in ("cp", "insloc")
    backgrounds = "group" if pasting else "none"
    views = Views(paths, 0, 64, (32, 64), backgrounds=backgrounds)
    make_group = MakeGroup(0, 64, backgrounds, jitter=method == "insloc", flip_moves_box=composite)
    torch.manual_seed(0)
    encoder_q = FPNEncoder("narrow18") if arch == "fpn" else C4Encoder("narrow18", roi_size=4)
    levels = 4 if arch == "fpn" else 1
    queue = KeyQueue(20, levels=levels, generator=generator_for(0, "queue")).keys.to(dtype)
    columns = [[queue[level, :, i] for i in range(20)] for level in range(levels)]
    encoder_q.to(dtype)
    encoder_k = copy.deepcopy(encoder_q)
    velocity, oldest, losses = {}, 0, []

    def encode(encoder, views_of_group, jittered):
        images = torch.stack([view["images"] for view in views_of_group]).to(dtype) / 255
        params = {name: torch.stack([view[name] for view in views_of_group]) for name in views_of_group[0]}
        pasted = params["boxes"]
        images, _ = photometric(images, params, pasted if pasting and not composite else None)
        images = torchvision.transforms.functional.normalize(images, (.485, .456, .406), (.229, .224, .225))
        if method == "moco":
            return encoder(images)
        boxes = params["drawn_boxes"] if jittered else pasted
        return encoder(images, [pasted, pasted, pasted, boxes] if arch == "fpn" else boxes)

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
    ("c4", "moco", ["--fill-queue"]), pytest.param("fpn", "insloc", [], marks=pytest.mark.slow),
    pytest.param("fpn", "cp", ["--fill-queue"], marks=pytest.mark.slow),
    pytest.param("fpn", "ra", [], marks=pytest.mark.slow)])
def test_steps_are_those_of_the_textbook_loop(here, monkeypatch, photos, tmp_path, arch, method, more):
    options = [*SMALL, "--arch", arch, "--method", method, "--precision", "fp64", "--epochs", 3, *more]
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
        first_update=2 if "--fill-queue" in more else 0)        # two steps of 12 keys fill a queue of 20
    state = state_of(tmp_path)
    assert state["step"] == steps and state["queue"]["filled"] == 20
    assert state["queue"]["ptr"] == 12 * steps % 20
    torch.testing.assert_close(state["queue"]["keys"], queue, rtol=0, atol=1e-9)
    for name, encoder in (("encoder_q", encoder_q), ("encoder_k", encoder_k)):
        torch.testing.assert_close(state[name], encoder.state_dict(), rtol=1e-9, atol=1e-9)  # statistics, too
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(losses, rel=1e-9)


def test_the_textbook_loop_would_see_a_missing_shuffle(photos):
    with_shuffle, without = (textbook(photos, "c4", "insloc", 1, shuffled)[3] for shuffled in (True, False))
    assert abs(with_shuffle[0] - without[0]) > 1e-4


@pytest.mark.slow
def test_a_longer_curve_of_moco_stays_within_the_spread_of_seeds(here, photos, tmp_path):
    """In fp32, where rounding grows from step to step; four epochs (EPOCHS=40 for an evening)."""
    epochs = int(os.environ.get("EPOCHS", 4))
    curves = []
    for seed in range(4):
        out = tmp_path / str(seed)
        assert here(*SMALL, "--method", "moco", "--precision", "fp32", "--epochs", epochs,
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
           "fpn": [*FPN, "--precision", "fp64", "--epochs", 2, "--batch-size", 6]}


@pytest.fixture(scope="module")
def base(photos, tmp_path_factory):
    """base(arch, processes): nine steps (FPN: twelve, of six images) in float64 -> folder, its output."""
    done = {}

    def run(arch, count):
        if (arch, count) not in done:
            out = str(tmp_path_factory.mktemp(f"{arch}{count}"))
            process = start(*OPTIONS[arch], "--workers", int(count == 2), "--nprocs", count, "--out", out,
                            photos)
            done[arch, count] = out, finish(process)[0]
        return done[arch, count]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("arch, count", [("c4", 2), ("c4", 4), ("fpn", 2)])
def test_processes_compute_what_one_computes(base, arch, count):
    one = state_of(base(arch, 1)[0])
    many = state_of(base(arch, count)[0])
    assert one["step"] == many["step"] == {"c4": 9, "fpn": 12}[arch]
    assert apart(one, many) < 1e-9
    for a, b in zip(lines(base(arch, 1)[0]), lines(base(arch, count)[0]), strict=True):
        for name in ("loss", "acc_queue", "acc_batch", "lr", "step"):
            assert a[name] == pytest.approx(b[name], rel=1e-9)


@pytest.mark.slow
def test_the_number_of_loader_workers_changes_nothing(here, photos, tmp_path):
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        assert here(*SMALL, "--epochs", 1, "--workers", workers, "--out", out, photos)[0] == 0
    none, one, two = (state_of(tmp_path / str(workers)) for workers in (0, 1, 2))
    assert same(none, one) and same(none, two)


def shuffle_rank(rank, world, folder):
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for seed in range(5):
        n = 2 * (1 + seed % 3)
        permutation = torch.randperm(world * n, generator=torch.Generator().manual_seed(seed))
        everything = {"images": torch.arange(world * n * 12).reshape(world * n, 3, 2, 2).to(torch.uint8),
                      "order": torch.arange(world * n * 4).reshape(world * n, 4),
                      "flip": torch.rand(world * n, generator=torch.Generator().manual_seed(seed)) < 0.5}
        own = [{name: x.chunk(2 * world)[2 * rank + i] for name, x in everything.items()} for i in range(2)]
        rows = permutation.chunk(world)[rank]
        shuffled = pretrain.shuffle(own, rows, world, torch.device("cpu"))
        assert shuffled.keys() == everything.keys()
        for name, x in everything.items():
            assert shuffled[name].dtype == x.dtype and torch.equal(shuffled[name], x[rows])
        back = pretrain.all_gather(shuffled["order"], world)[permutation.argsort()]
        assert torch.equal(back, everything["order"])
    dist.destroy_process_group()


@pytest.mark.slow
def test_shuffle_takes_the_rows_of_all_ranks_and_is_undone_by_its_inverse(tmp_path):
    mp.start_processes(shuffle_rank, (2, tmp_path), 2, start_method="spawn")


def test_ra_is_moco_bit_for_bit_where_pooling_is_the_identity(here, photos, tmp_path):
    for method in ("moco", "ra"):
        out = tmp_path / method
        status, text, _ = here(*SMALL, "--method", method, "--epochs", 1, "--out", out, photos)
        assert status == 0 and ("ra computes what moco does" in text) == (method == "ra")
    assert same(state_of(tmp_path / "moco"), state_of(tmp_path / "ra"))


# ----------------------------------------------------------------------------------------------------------
# Stop, kill, go on
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("count, asked", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_run_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(base, photos, tmp_path, count, asked):
    options = [*OPTIONS["c4"], "--nprocs", count, "--out", tmp_path, "--resume", photos]
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
    whole = base("c4", count)[0]
    assert same(state_of(whole), state_of(tmp_path))
    a, b = lines(whole), lines(tmp_path)
    assert [line["step"] for line in b] == list(range(1, 10))           # each step once, none missing
    assert [line["loss"] for line in a] == [line["loss"] for line in b]


@pytest.mark.parametrize("stops", [[2], pytest.param([1, 4, 7], marks=pytest.mark.slow)], ids=str)
def test_a_run_stopped_in_mid_epoch_and_resumed_is_the_uninterrupted_run(here, base, monkeypatch, photos,
                                                                         tmp_path, stops):
    enqueue = KeyQueue.enqueue
    stops = [*stops]

    def stop_after(self, keys):
        enqueue(self, keys)
        if stops and self.ptr == 12 * stops[0] % 20 and self.filled == min(20, 12 * stops[0]):
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(KeyQueue, "enqueue", stop_after)
    options = [*OPTIONS["c4"], "--out", tmp_path, "--resume", photos]
    for _ in range(len(stops)):
        status, _, err = here(*options)
        assert status == 143 and "stopped by SIGTERM after step" in err
    assert here(*options)[0] == 0
    assert same(state_of(tmp_path), state_of(base("c4", 1)[0]))
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(base("c4", 1)[0])]


def test_resuming_a_finished_run_changes_nothing(here, base, photos, tmp_path):
    shutil.copytree(base("c4", 1)[0], tmp_path / "run")
    status, text, _ = here(*OPTIONS["c4"], "--resume", "--out", tmp_path / "run", photos)
    assert status == 0 and "done, 9 steps" in text
    assert same(state_of(tmp_path / "run"), state_of(base("c4", 1)[0]))


# ----------------------------------------------------------------------------------------------------------
# What a person sees, and what is left behind
# ----------------------------------------------------------------------------------------------------------

def test_the_run_in_numbers(base):
    text = base("c4", 2)[1]
    parameters = sum(p.numel() for p in C4Encoder("narrow18").parameters())
    for fact in (f"narrow18, {parameters:,} parameters", "2 x cpu, fp64, 1 loader workers", "images  40 in",
                 "4 of them left out", "12 images = 4 BatchNorm groups x 3, 2 of them a process",
                 "3 epochs x 3 = 9", "20 keys x 1 levels", f"loss {math.log(21):.2f}", "acc_batch 0.0833"):
        assert fact in text, fact
    assert re.search(r"step 9/9  epoch 2  loss [\d.]+  acc_queue [\d.]+  acc_batch [\d.]+  [\d.]+ images/s  "
                     r"data wait \d+%  left 0:00:00", text)
    assert "WARNING: the queue" not in text         # 20 keys of 40 images just fit


@pytest.mark.slow
def test_log_and_tensorboard_say_the_same(here, photos, tmp_path):
    out = tmp_path
    assert here(*FPN, "--epochs", 2, "--out", out, photos)[0] == 0
    with open(f"{out}/log.jsonl") as f:
        head = json.loads(f.readline())
    assert head["args"]["queue_size"] == 20 and head["torch"] == torch.__version__ and head["commit"]
    log = lines(out)
    assert [line["step"] for line in log] == list(range(1, 7))
    events = EventAccumulator(str(out))
    events.Reload()
    for name in ("loss", "loss_p2", "loss_p5", "acc_queue", "acc_batch", "lr", "images_per_s", "data_wait"):
        there = [(event.step, event.value) for event in events.Scalars(name)]
        assert there == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in log]
    for line in log:
        assert line["loss"] == pytest.approx(sum(line[f"loss_p{level}"] for level in (2, 3, 4, 5)))
        assert line["queue_filled"] == min(20, 12 * line["step"])
        assert 0 <= line["acc_queue"] <= 1 and 0 <= line["data_wait"] <= 1
    assert [line["lr"] for line in log] == pytest.approx([0.02] * 3 + [0.01] * 3)         # cosine by epoch


def test_files_of_a_run(base):
    out = base("c4", 1)[0]
    assert {name for name in os.listdir(out) if "tfevents" not in name} == {
        "backbone.pth", "checkpoint.pth", "checkpoint_prev.pth", "log.jsonl", "composites.png", "loss.png",
        pretrain.stage.LOCK}
    assert torch.load(f"{out}/checkpoint_prev.pth", weights_only=True)["step"] == 8
    for name in ("composites.png", "loss.png"):
        with Image.open(f"{out}/{name}") as image:
            assert np.asarray(image).std() > 10


def test_the_backbone_file_is_torchvisions_and_the_query_encoders(here, photos, tmp_path):
    assert here(*SMALL, "--resnet", "resnet18", "--epochs", 1, "--out", tmp_path, photos)[0] == 0
    state, backbone = state_of(tmp_path), torch.load(tmp_path / "backbone.pth", weights_only=True)
    missing = torchvision.models.resnet18().load_state_dict(backbone, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    assert all(torch.equal(x, state["encoder_q"][f"resnet.{name}"]) for name, x in backbone.items())
    weights = read_weights(str(tmp_path))
    assert weights.resnet == "resnet18"
    assert all(torch.equal(x, backbone[name].to(x.dtype)) for name, x in weights.backbone.items())


def test_what_is_saved_lies_on_the_cpu():
    moved = []

    class Elsewhere(torch.Tensor):
        def cpu(self):
            moved.append(self)
            return torch.zeros(1)

    x = torch.zeros(2).as_subclass(Elsewhere)
    there = pretrain.stage.checked({"a": x, "b": [{"c": x}], "d": 4})
    assert len(moved) == 2 and there["d"] == 4
    assert type(there["a"]) is type(there["b"][0]["c"]) is torch.Tensor


def test_composites_show_the_boxes(here, photos, tmp_path):
    status, text, _ = here(*SMALL, "--bn-group", 6, "--preview", 6, "--out", tmp_path, photos)
    assert status == 0 and sorted(os.listdir(tmp_path)) == ["composites.png", pretrain.stage.LOCK]
    paths = [os.path.join(photos, name) for name in sorted(os.listdir(photos))]
    order = torch.randperm(40, generator=generator_for(0, "order", 0)).tolist()
    group = MakeGroup(0, 64)([Views(paths, 0, 64, (32, 64))[0, 0, 0, index] for index in order[:6]])
    sheet = np.asarray(Image.open(tmp_path / "composites.png").convert("RGB")).astype(int)
    side = 4 * 64                                           # enlarged, without a frame
    assert sheet.shape == (3 * (side + 6) + 6, 4 * (side + 6) + 6, 3)
    for i in range(6):
        for j, name in enumerate(("query", "key")):
            place = 2 * i + j
            panel = sheet[place // 4 * (side + 6) + 6:, place % 4 * (side + 6) + 6:][:side, :side]
            box = group[name]["boxes"][i]
            x1, y1, x2, y2 = (box * 4).int().tolist()
            for y, x in ((y1, (x1 + x2) // 2), ((y1 + y2) // 2, x1)):
                assert panel[y, x].tolist() == [255, 30, 30]
            blue = (panel == [20, 60, 255]).all(axis=2)
            assert blue.any() == (name == "query")
            lines_of = blue | (panel == [255, 30, 30]).all(axis=2)
            assert lines_of.mean() < 0.06                   # the picture can be seen
    anchors = grid_anchors(64)
    assert all((anchors == box).all(dim=1).any() for box in group["query"]["drawn_boxes"])


def test_the_pictures_of_composites_are_those_that_the_network_sees(here, photos, tmp_path):
    here(*SMALL, "--method", "moco", "--bn-group", 6, "--preview", 6, "--out", tmp_path, photos)
    sheet = np.asarray(Image.open(tmp_path / "composites.png").convert("RGB")).astype(int)
    args = pretrain.get_args([*SMALL, "--method", "moco", "--out", str(tmp_path / "none"), photos])
    dataset, make_group = pretrain.make_data(args, pretrain.find_data(args)[0])
    order = torch.randperm(40, generator=generator_for(0, "order", 0)).tolist()
    query = make_group([dataset[0, 0, 0, index] for index in order[:6]])["query"]
    seen = pretrain.augment(query, args, "cpu")[0].permute(1, 2, 0).numpy()
    seen = (seen * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
    drawn = sheet[6:, 6:][:256, :256][2::4, 2::4][1:-1, 1:-1]           # within the red line
    np.testing.assert_allclose(drawn, seen[1:-1, 1:-1], atol=0.51)


def test_bf16_follows_fp32(here, photos, tmp_path):
    for precision in ("fp32", "bf16"):
        assert here(*SMALL, "--epochs", 1, "--precision", precision, "--out",
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
    assert args.roi_size == 14


@pytest.mark.parametrize("method, size", [("moco", 224), ("ra", 224), ("cp", 256), ("insloc", 256)])
def test_the_canvas_of_each_rung(photos, method, size):
    """MoCo v2's crop for the rungs without pasting; C4 pools 14 x 14 on both canvases."""
    args = pretrain.get_args(["--arch", "c4", "--method", method, "--nprocs", "1", photos])
    assert (args.image_size, args.roi_size) == (size, 14)
    paths = [os.path.join(photos, name) for name in sorted(os.listdir(photos))]
    dataset, make_group = pretrain.make_data(args, paths)
    group = make_group([dataset[0, 0, 0, index] for index in range(3)])
    assert group["query"]["images"].shape == group["key"]["images"].shape == (3, 3, size, size)
    pasted = group["query"]["boxes"]
    assert pasted.eq(torch.tensor([0.0, 0, size, size])).all() == (method in ("moco", "ra"))


class Own(torch.nn.Module):
    """A backbone of a reader's: no BatchNorm, another width, a frozen parameter, one that nothing uses."""
    levels, dim = ("own",), 24

    def __init__(self, _, roi_size):
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
    options = [*SMALL, "--precision", "fp32", "--save-steps", 3, "--epochs", 2]
    assert here(*options, "--out", tmp_path / "whole", photos)[0] == 0
    save = pretrain.save

    def save_and_stop(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save", save_and_stop)
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
        args = pretrain.get_args([*FPN, *switch, photos])
        dataset, make_group = pretrain.make_data(args, pretrain.find_data(args)[0])
        query = make_group([dataset[0, 0, 0, index] for index in range(3)])["query"]
        boxes = pretrain.boxes_of(query, args, torch.device("cpu"))
        boxes = boxes if isinstance(boxes, list) else [boxes] * 4
        images = pretrain.augment(query, args, "cpu")
        seen[name] = torch.cat([images.flatten(), *(level.flatten() for level in boxes)])
    names = sorted(seen)
    assert not any(seen[a].equal(seen[b]) for a in names for b in names if a < b)


@pytest.mark.slow
def test_init_starts_from_other_weights(here, photos, tmp_path):
    source = tmp_path / "source"
    assert here(*FPN, "--epochs", 1, "--out", source, photos)[0] == 0
    _, text, _ = here(*FPN, "--epochs", 1, "--lr", 0, "--weight-decay", 0, "--init", source, "--out",
                      tmp_path / "out", photos)
    assert "starting from narrow18 at 'encoder_q.resnet.'" in text
    assert ": neck and box head, the rest random" in text
    old, new = state_of(source)["encoder_q"], state_of(tmp_path / "out")["encoder_q"]
    for name, x in old.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(x, new[name]) == (not name.startswith("projector")), name


def test_init_from_another_trunk_is_refused(here, base, photos, tmp_path):
    source = base("c4", 1)[0]
    status, _, err = here(*SMALL, "--resnet", "resnet18", "--init", source, "--out", tmp_path, photos)
    assert status == 1 and err.count("\n") == 1 and "give --resnet narrow18" in err


# ----------------------------------------------------------------------------------------------------------
# Wrong input
# ----------------------------------------------------------------------------------------------------------

BAD = {
    "folder that does not exist": (["/nowhere"], "/nowhere: no such file"),
    "group that does not divide the batch": (["--bn-group", 5, "DATA"], "not a multiple of --bn-group 5"),
    "one group": (["--bn-group", 12, "DATA"], "--batch-size 24"),
    "group of two": (["--bn-group", 2, "DATA"], "a sample and two backgrounds"),
    "processes that do not divide the groups": (["--nprocs", 3, "DATA"], "take a number that divides 4"),
    "more processes than groups": (["--nprocs", 8, "DATA"], "8 processes cannot share 4 groups"),
    "boxes larger than the canvas": (["--fg-size", 16, 65, "DATA"], "LOW <= HIGH <= canvas 64"),
    "boxes the wrong way round": (["--fg-size", 30, 20, "DATA"], "LOW <= HIGH"),
    "canvas off the stride": (["--image-size", 40, "DATA"], "multiple of 32"),
    "paste size without pasting": (["--method", "ra", "--fg-size", 8, 16, "DATA"], "pastes nothing"),
    "aspect without pasting": (["--method", "moco", "--keep-aspect", "DATA"], "pastes nothing"),
    "canvas of nothing": (["--image-size", 0, "DATA"], "multiple of 32"),
    "pooling to nothing": (["--roi-size", 0, "DATA"], "--roi-size must be at least 1"),
    "no epochs": (["--epochs", 0, "DATA"], "--epochs must be at least 1"),
    "negative rate": (["--lr", -1, "DATA"], "--lr and --weight-decay must be numbers from 0 on"),
    "rate that is no number": (["--lr", "nan", "DATA"], "--lr and --weight-decay must be numbers from 0 on"),
    "seed too large": (["--seed", 2 ** 64, "DATA"], "--seed below 2**63"),
    "more pictures than images": (["--preview", 41, "DATA"], "has 40 images, less than --preview 41"),
    "momentum above one": (["--ema", 1.5, "DATA"], "--ema must be in [0, 1]"),
    "temperature of zero": (["--temperature", 0, "DATA"], "--temperature above 0"),
    "batch larger than the data": (["--batch-size", 63, "DATA"], "has 40 images, less than --batch-size 63"),
    "weights that are none": (["--init", pretrain.__file__, "DATA"], "--init"),
    "output that is a file": (["--out", pretrain.__file__, "DATA"], pretrain.__file__),
    "output inside a file": (["--out", pretrain.__file__ + "/run", "DATA"], pretrain.__file__),
    "list that is a picture": (["DATA/000.jpg"], "000.jpg is no text file of paths; if it is an archive"),
    "output in a cloud": (["--out", "s3://bucket/run", "DATA"], "--out s3://bucket/run: only a folder of"),
    "queue larger than the memory": (["--queue-size", 10 ** 14, "DATA"], "out of memory: take a smaller"),
    "unknown argument": (["--batch", 5, "--nothing", "DATA"], "unrecognized arguments: --nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_ends_in_one_line(here, photos, tmp_path, case):
    arguments, message = BAD[case]
    arguments = [str(a).replace("DATA", photos) for a in arguments]
    status, _, err = here(*SMALL, "--out", tmp_path / "out", *arguments)
    assert status in (1, 2) and message in err
    assert err.startswith("pretrain.py: error: ") and err.count("\n") == 1
    assert not os.path.exists(tmp_path / "out" / "checkpoint.pth")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_where_one_is_asked_for(here, photos):
    status, _, err = here(*SMALL, "--device", "cuda", photos)
    assert status == 2 and "torch sees no GPU" in err


@pytest.mark.slow
def test_a_real_process_prints_no_traceback(tmp_path):
    _, err = finish(start(*SMALL, "--out", tmp_path, "/nowhere"), 1)
    assert err == "pretrain.py: error: /nowhere: no such file or folder\n"


def test_a_folder_without_images_is_refused(here, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = here(*SMALL, "--out", tmp_path / "out", tmp_path / "empty")
    assert status == 1 and "has 0 images" in err and ".jpg" in err and err.count("\n") == 1


def content(folder):
    return {name: os.path.getmtime(f"{folder}/{name}") for name in os.listdir(folder) if "lock" not in name}


def test_a_folder_with_a_run_is_refused_without_resume(here, base, photos):
    out = base("c4", 1)[0]
    before = content(out)
    for more in ([], ["--preview", 4], ["--preview", 4, "--resume"]):
        status, _, err = here(*OPTIONS["c4"], "--out", out, *more, photos)
        assert status == 1 and f"{out} holds a run: --resume goes on with it, --out starts another" in err
    assert before == content(out)


def test_other_settings_are_refused_on_resume_and_named(here, base, photos):
    out = base("c4", 1)[0]
    before = content(out)
    status, _, err = here(*OPTIONS["c4"], "--out", out, "--lr", 0.1, "--queue-size", 32, "--resume", photos)
    assert status == 1 and "with other settings: lr was 0.02, is 0.1; queue_size was 20, is 32; --init" in err
    assert before == content(out)


def test_more_epochs_than_the_run_had_name_init(here, base, photos):
    status, _, err = here(*OPTIONS["c4"], "--out", base("c4", 1)[0], "--epochs", 4, "--resume", photos)
    assert status == 1 and "epochs was 3, is 4; --init starts another --out from these weights\n" in err
    assert err.count("\n") == 1


def test_pictures_added_before_a_resume_are_counted(here, base, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    shutil.copyfile(folder / "000.jpg", folder / "more.jpg")
    status, _, err = here(*OPTIONS["c4"], "--out", base("c4", 1)[0], "--resume", folder)
    assert status == 1 and re.search("images was 40 files [0-9a-f]{16}, is 41 files [0-9a-f]{16}; ", err)


@pytest.mark.parametrize("fault", ["matplotlib missing", "figure that fails", "tensorboard missing",
                                   "tensorboard that fails"])
def test_a_picture_that_cannot_be_drawn_costs_nothing(here, monkeypatch, photos, tmp_path, fault):
    def fail(*_, **__):
        raise RuntimeError("Failed to process string with tex because latex could not be found")

    if "missing" in fault:
        name = "matplotlib.figure" if "matplotlib" in fault else "torch.utils.tensorboard"
        monkeypatch.setitem(sys.modules, name, None)
    elif "figure" in fault:
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    else:
        monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, "add_scalar", fail)
    options = [*SMALL, "--method", "moco", "--epochs", 1, "--save-steps", 2, "--out", tmp_path]
    status, text, err = here(*options, photos)
    assert status == 0 and not err and state_of(tmp_path)["step"] == 3
    assert ("no TensorBoard: " if "tensorboard" in fault else "no loss.png: ") in text
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert os.path.exists(tmp_path / "loss.png") == ("tensorboard" in fault)


def test_compiling_without_a_compiler_is_one_line(here, monkeypatch, photos, tmp_path):
    def compile(*_, **__):
        def call(x):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO")
        return call

    monkeypatch.setattr(torch, "compile", compile)
    status, _, err = here(*SMALL, "--compile", "--out", tmp_path / "out", photos)
    assert status == 1 and "--compile: torch cannot compile on this machine: InvalidCxxCompiler" in err
    assert err.count("\n") == 1 and not os.path.exists(tmp_path / "out")


@pytest.mark.slow
def test_compiling_on_a_machine_without_a_compiler(photos, tmp_path):
    """The real thing: no c++ on the PATH."""
    env = {**os.environ, "PATH": "/nowhere", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    _, err = finish(start(*SMALL, "--compile", "--out", tmp_path / "out", photos, env=env), 1)
    assert "--compile: torch cannot compile on this machine" in err.splitlines()[-1]


def test_other_images_are_refused_on_resume(here, base, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    os.rename(folder / "000.jpg", folder / "zzz.jpg")
    status, _, err = here(*OPTIONS["c4"], "--out", base("c4", 1)[0], "--resume", folder)
    assert status == 1 and "with other settings: images was " in err and err.count("\n") == 1


def test_the_same_images_elsewhere_are_the_same(here, base, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(base("c4", 1)[0], tmp_path / "run")
    status, text, _ = here(*OPTIONS["c4"], "--out", tmp_path / "run", "--resume", folder)
    assert status == 0 and "done, 9 steps" in text


def test_a_checkpoint_of_something_else_is_refused(here, base, photos, tmp_path):
    shutil.copyfile(base("c4", 1)[0] + "/backbone.pth", tmp_path / "checkpoint.pth")
    status, _, err = here(*OPTIONS["c4"], "--out", tmp_path, "--resume", photos)
    assert status == 1 and "checkpoint.pth is no checkpoint of pretrain.py" in err and err.count("\n") == 1


def test_a_queue_that_is_filled_first_must_leave_steps_to_learn(here, photos, tmp_path):
    options = [*SMALL, "--method", "moco", "--epochs", 1, "--fill-queue"]             # three steps of twelve
    status, _, err = here(*options, "--queue-size", 25, "--out", tmp_path / "none", photos)
    assert status == 1 and "all 3 steps would only fill the queue" in err and err.count("\n") == 1
    assert here(*options, "--queue-size", 24, "--out", tmp_path / "one", photos)[0] == 0
    assert state_of(tmp_path / "one")["optimizer"]["state"]             # one update has been made


def test_the_queue_warning_names_a_size_that_fits(here, photos, tmp_path):
    options = [*SMALL, "--method", "moco", "--epochs", 1]
    _, text, _ = here(*options, "--queue-size", 21, "--out", tmp_path / "a", photos)
    assert "WARNING: the queue exceeds half of the images" in text and "--queue-size 16 would fit" in text
    _, text, _ = here(*options, "--queue-size", 16, "--out", tmp_path / "b", photos)
    assert "WARNING: the queue" not in text


# ----------------------------------------------------------------------------------------------------------
# DATA
# ----------------------------------------------------------------------------------------------------------

def find(data, out):
    return pretrain.find_data(pretrain.get_args([*SMALL, "--out", str(out), str(data)]))[0].tolist()


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\0"])
def test_a_list_of_paths(photos, tmp_path, ends):
    names = sorted(os.listdir(photos))
    os.symlink(photos, tmp_path / "photos")
    (tmp_path / "list").write_bytes(b"".join(f"photos/{name}".encode() + ends for name in names))
    found = [os.path.realpath(path) for path in find(tmp_path / "list", tmp_path / "out")]
    assert found == [os.fsencode(os.path.realpath(os.path.join(photos, name))) for name in names]


def test_a_list_with_a_file_that_does_not_exist(here, photos, tmp_path):
    names = [f"{photos}/{name}" for name in os.listdir(photos)]
    (tmp_path / "list").write_text("\n".join([*names, "nothing.jpg"]))
    status, _, err = here(*SMALL, "--out", tmp_path / "out", tmp_path / "list")
    assert status == 1 and "list lists 'nothing.jpg', and there is no such file" in err


def test_data_that_is_no_file(here, tmp_path):
    status, _, err = here(*SMALL, "--out", tmp_path / "out", "/dev/zero")
    assert status == 1 and err.count("\n") == 1 and "no such file or folder" in err


def test_a_list_through_a_shells_pipe(photos, tmp_path):
    read, write = os.pipe()
    names = [f"{photos}/{name}\n" for name in sorted(os.listdir(photos))]
    os.write(write, "".join(names).encode())
    os.close(write)
    assert [os.fsdecode(path) + "\n" for path in find(f"/dev/fd/{read}", tmp_path / "out")] == names
    os.close(read)


@pytest.mark.parametrize("kind", ["tar", "gztar", "zip"])
def test_an_archive_as_data_is_refused_and_not_read(here, monkeypatch, photos, tmp_path, kind):
    path = shutil.make_archive(tmp_path / "data", kind, photos)
    with open(path, "ab") as f:
        f.truncate(2 ** 40)                                 # sparse: to read it all is a MemoryError
    status, _, err = here(*SMALL, "--out", tmp_path / "out", path)
    assert status == 1 and "is no text file of paths; if it is an archive, unpack it" in err
    assert err.count("\n") == 1


def test_a_preview_needs_no_batch(here, photos, tmp_path):
    command = ["--arch", "c4", "--image-size", "64", "--device", "cpu", "--out", tmp_path, photos]
    status, _, err = here(*command, "--preview", 5)
    assert status == 0 and os.path.exists(tmp_path / "composites.png"), err
    status, _, err = here(*command)
    assert status == 1 and "has 40 images, less than --batch-size 256" in err


def test_a_class_named_train_is_refused_with_what_to_give(here, photos, tmp_path):
    for name in ("train", "val", "Test_2", "bus"):
        (tmp_path / "data" / name).mkdir(parents=True)
    assert pretrain.choose_split(tmp_path / "data") == str(tmp_path / "data" / "train")     # bus is empty
    shutil.copyfile(f"{photos}/000.jpg", tmp_path / "data" / "bus" / "1.JPG")
    status, _, err = here(*SMALL, "--out", tmp_path / "out", tmp_path / "data")
    assert status == 1 and "holds images in `train` and in 'bus', which is no split" in err
    assert f"give {tmp_path}/data/train for that alone, or a text file of paths" in err


def test_a_train_folder_alone_is_taken(photos, tmp_path, capsys):
    for split in ("train", "val"):
        os.makedirs(tmp_path / split)
    for i, name in enumerate(sorted(os.listdir(photos))):
        os.symlink(os.path.join(photos, name), tmp_path / ("val" if i < 10 else "train") / name)
    assert len(find(tmp_path, tmp_path / "out")) == 30
    assert f"taking '{tmp_path}/train' alone" in capsys.readouterr().out


def test_names_of_any_bytes_are_trained_on(here, photos, tmp_path):
    odd = [b"a space.jpg", b"'quotes\".JPG", b"new\nline.jpeg", b"caf\xe9.jpg", "\u00fc.jpg".encode()]
    deep = os.path.join(os.fsencode(tmp_path), b"data", b"deep", b"\xff deeper")
    os.makedirs(deep)
    for name in odd:
        shutil.copyfile(os.path.join(photos, "000.jpg"), os.path.join(deep, name))
    os.symlink(photos, tmp_path / "data" / "linked")
    found = find(tmp_path / "data", tmp_path / "out")
    assert len(found) == 45 and found == sorted(found)
    assert {os.path.basename(name) for name in found} == {*odd, *map(os.fsencode, os.listdir(photos))}
    status, _, err = here(*SMALL, "--epochs", 1, "--out", tmp_path / "out", tmp_path / "data")
    assert status == 0, err
