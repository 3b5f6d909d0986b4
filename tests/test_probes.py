"""The probes against networks of which the answer is known, and against second implementations."""
import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import insloc  # noqa: E402
import probe_cls  # noqa: E402
import probe_loc  # noqa: E402

COLOURS = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220]])


def write_world(folder, train=30, val=12, colour_of=lambda label, i: label, classes=3):
    """Noise images, 40 x 52 pixels, in class folders; their colour is colour_of(class, number)."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = os.path.join(folder, split, f"class{label}")
            os.makedirs(place)
            for i in range(count):
                noise = torch.randint(-30, 31, (3, 40, 52), generator=generator)
                image = (COLOURS[colour_of(label, i)][:, None, None] + noise).clamp(0, 255).byte()
                torchvision.io.write_png(image, os.path.join(place, f"{i}.png"))
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """24 training and 12 validation images, for what takes whole networks."""
    return write_world(tmp_path_factory.mktemp("few"), train=8, val=4)


def probe(script, *argv):
    """Runs a probe in this process, on one thread; its results.json."""
    torch.set_num_threads(1)
    args = script.get_args([*map(str, argv), "--device", "cpu", "--workers", "0", "--nprocs", "1"])
    find = script.find_classes if script is probe_cls else script.find_images
    script.launch(script.main, args, find(args.data), script.read_state(args))
    with open(os.path.join(args.out, "results.json")) as f:
        return json.load(f)


def command(script, *argv):
    """The command line of a probe in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    path = os.path.join(ROOT, script.__name__ + ".py")
    return {"args": [sys.executable, "-W", "ignore", path, "--device", "cpu", *map(str, argv)],
            "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def refusal(call, *argv):
    """The message with which a call ends the program: one line."""
    with pytest.raises(SystemExit) as ending:
        call(*argv)
    message = ending.value.code
    assert isinstance(message, str) and "error: " in message and len(message.splitlines()) == 1
    return message


# ---- networks of which the answer is known

class MeanColour(nn.Module):
    """Instead of C4Encoder in probe_cls: features are the mean colour, nothing else."""

    def __init__(self, resnet):
        super().__init__()
        self.resnet = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class KnowsPlace(nn.Module):
    """Instead of C4Encoder in probe_loc: features are the centre of the box, softly encoded, nothing else."""

    def __init__(self, resnet):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def features(self, images, boxes):
        centre = (boxes[..., :2] + boxes[..., 2:]).reshape(-1, 2) / 2 / images.shape[-1]
        grid = torch.linspace(0, 1, 7)
        code = torch.exp(-((centre[:, :, None] - grid) / 0.15) ** 2)                     # (N * M, 2, 7)
        return self.scale * (code[:, 0, :, None] * code[:, 1, None, :]).reshape(-1, 1, 49)


class KnowsImage(KnowsPlace):
    """Features are a summary of the whole image, the same for all its boxes: the place cannot be known."""

    def features(self, images, boxes):
        mean = torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)
        return self.scale * mean.repeat_interleave(boxes.shape[1], dim=0)[:, None]


def test_class_is_read_where_it_stands(world, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_cls, "C4Encoder", MeanColour)
    common = "random", world, "--image-size", 32
    result = probe(probe_cls, *common, "--epochs", 3, "--out", tmp_path / "linear")
    assert result["top1"] == 100 and result["top5"] is None and result["chance"] == pytest.approx(100 / 3)
    assert probe(probe_cls, *common, "--knn", 5, "--out", tmp_path / "knn")["top1"] == 100


def test_class_stays_at_chance_where_labels_are_shuffled(tmp_path, monkeypatch):
    """The same images, put into classes by lot; of 150 images three standard deviations are 11.5 %."""
    lot = torch.randint(3, (3, 60), generator=torch.Generator().manual_seed(1))
    data = write_world(tmp_path / "data", train=60, val=50, colour_of=lambda label, i: lot[label, i])
    monkeypatch.setattr(probe_cls, "C4Encoder", MeanColour)
    for readout in (["--epochs", 3], ["--knn", 9]):
        out = tmp_path / readout[0]
        result = probe(probe_cls, "random", data, "--image-size", 32, *readout, "--out", out)
        assert abs(result["top1"] - 100 / 3) < 11.5


def test_place_is_read_where_it_stands(world, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_loc, "C4Encoder", KnowsPlace)
    argv = "random", world, "--image-size", 64, "--features", "standard", "--out", tmp_path
    result = probe(probe_loc, *argv, "--protocol", "full", "placed", "alone")
    lines = {line["protocol"]: line for line in result["lines"]}
    assert lines["placed"]["top1"] < 25                     # absolute place says nothing: 11, not 60
    assert [lines["full"][part] for part in ("top1", "corners", "edges", "centre")] == [100] * 4
    assert lines["gray"]["top1"] == 100                     # this network never looks at the image
    assert lines["alone"]["top1"] == pytest.approx(100 / 9)     # every cell is the whole picture there
    assert os.path.getsize(tmp_path / "loc.png") > 5000


def test_place_stays_at_chance_where_it_cannot_be_known(world, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_loc, "C4Encoder", KnowsImage)
    argv = "random", world, "--image-size", 64, "--protocol", "full", "placed", "--out", tmp_path
    result = probe(probe_loc, *argv)
    for line in result["lines"]:                    # nine equal features: one guess, right once in nine
        assert line["top1"] == pytest.approx(100 / 9)
        assert np.array(line["confusion"]).sum(axis=1) == pytest.approx(100)


def test_place_stays_at_chance_where_cells_are_shuffled():
    """Features that say all, each image's cells in random order; of 900 four deviations are 4.2 %."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(300)])
    features = torch.eye(9)[order] + 0.1 * torch.randn(300, 9, 9, generator=generator)
    head, = probe_loc.train_heads(features[:200], [0.1], 10, 64, generator)
    assert abs(probe_loc.confusion(features[200:], head).diag().mean().item() - 100 / 9) < 4.2
    ordered = torch.eye(9).expand(300, 9, 9) + 0.1 * torch.randn(300, 9, 9, generator=generator)
    head, = probe_loc.train_heads(ordered[:200], [0.1], 10, 64, generator)
    assert probe_loc.confusion(ordered[200:], head).diag().mean() == 100


def test_padding_alone_tells_a_random_net_the_place(tmp_path):
    """Why random weights are printed beside the given ones: noise has no place, but zero padding has."""
    data = write_world(tmp_path / "data", train=10, val=8)
    result = probe(probe_loc, "random", data, "--resnet", "resnet18", "--image-size", 64, "--grid", 2,
                   "--epochs", 15, "--features", "standard", "--protocol", "full", "reflect", "alone",
                   "--out", tmp_path / "out")
    top1 = {line["protocol"]: line["top1"] for line in result["lines"]}
    assert top1["full"] > 90 and max(top1["reflect"], top1["alone"]) < 55       # chance is 25


# ---- parts against second implementations

@pytest.mark.parametrize("size,grid", [(224, 3), (65, 3), (128, 3), (50, 4), (97, 7), (64, 2)])
def test_cells_tile_the_image(size, grid):
    boxes = probe_loc.grid_boxes(size, grid)
    assert boxes.shape == (grid ** 2, 4) and boxes.dtype == torch.float32
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        row, column = divmod(i, grid)
        assert (x1, x2) == pytest.approx((size * column / grid, size * (column + 1) / grid))
        assert (y1, y2) == pytest.approx((size * row / grid, size * (row + 1) / grid))
    edges = boxes.reshape(grid, grid, 4)
    assert torch.equal(edges[:, :-1, 2], edges[:, 1:, 0]) and torch.equal(edges[:-1, :, 3], edges[1:, :, 1])
    assert (edges[:, 0, 0] == 0).all() and (edges[:, -1, 2] == size).all()
    assert (edges[0, :, 1] == 0).all() and (edges[-1, :, 3] == size).all()
    points = torch.rand(2000, 1, 2, generator=torch.Generator().manual_seed(0)) * size
    inside = ((points >= boxes[:, :2]) & (points < boxes[:, 2:])).all(dim=2)
    assert (inside.sum(dim=1) == 1).all()                   # every point in exactly one cell


@pytest.mark.parametrize("size", [64, 96])
def test_cells_show_the_image_where_the_protocol_says(world, size):
    paths = probe_loc.find_images(world)[1]
    item = {name: probe_loc.Cells(paths, name, size, 3, seed=0)[5] for name in ("full", "placed", "alone")}
    image = item["full"][0][0]
    assert image.shape == (3, size, size) and image.dtype == torch.uint8
    assert torch.equal(item["full"][1][0], probe_loc.grid_boxes(size, 3))
    side = size // 3
    composite, boxes = item["placed"][0][0], item["placed"][1][0]
    assert composite.shape == (3, 4 * side, 4 * side) and boxes.dtype == torch.float32
    for i, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        top, left = side * (i // 3), side * (i % 3)
        assert torch.equal(composite[:, y1:y2, x1:x2], image[:, top:top + side, left:left + side])
    for i, cell in enumerate(item["alone"][0]):
        top, left = int(size * (i // 3) / 3 + 1e-4), int(size * (i % 3) / 3 + 1e-4)
        assert torch.equal(cell, image[:, top:top + side, left:left + side])
    placed = probe_loc.Cells(paths, "placed", size, 3, seed=0)
    seen = {cell: {tuple(placed[i][1][0, cell].tolist()) for i in range(12)} for cell in range(9)}
    corners = {(x, y) for cell in range(9) for x, y, _, _ in seen[cell]}
    assert min(map(len, seen.values())) > 6 and len(corners) == 16      # not always the same place


def test_reflection_replaces_every_zero():
    net = insloc.C4Encoder("resnet18").eval()
    flat = torch.full((1, 3, 64, 64), 0.7)
    boxes = probe_loc.grid_boxes(64)[None]
    with torch.no_grad():
        assert net.features(flat, boxes)[:, 0].std(dim=0).max() > 1e-3      # padding tells the cells apart
        probe_loc.pad_by_reflection(net, True)
        features = net.features(flat, boxes)[:, 0]
        assert features.std(dim=0).max() < 1e-4 * features.abs().max()
        probe_loc.pad_by_reflection(net, False)
        assert net.features(flat, boxes)[:, 0].std(dim=0).max() > 1e-3


def test_summary_against_hand_computation():
    table = torch.diag(torch.tensor([10.0, 20, 30, 40, 50, 60, 70, 80, 90]))
    assert probe_loc.summary(table) == {"top1": 50, "corners": 50, "edges": 50, "centre": 50}
    table[0, 0], table[4, 4] = 100, 0
    assert probe_loc.summary(table) == pytest.approx({"top1": 490 / 9 + 0.0, "corners": 72.5, "edges": 50,
                                                      "centre": 0}, abs=1e-4)
    assert probe_loc.summary(torch.eye(4) * 100)["centre"] is None


def test_knn_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    bank, queries = (insloc.unit(torch.randn(n, 8, generator=generator)) for n in (300, 41))
    labels = torch.randint(5, (300,), generator=generator)
    scores = probe_cls.knn(queries, bank, labels, 5, k=20, temperature=0.07)
    for query, row in zip(queries.double().numpy(), scores.numpy()):
        cosine = [float(np.dot(query, other)) for other in bank.double().numpy()]
        votes = [0.0] * 5
        for i in sorted(range(300), key=lambda i: -cosine[i])[:20]:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        assert row == pytest.approx(votes, rel=1e-3)
    assert probe_cls.knn(queries, bank[:3], labels[:3], 5, k=20).shape == (41, 5)   # fewer than k


def test_accuracy_against_a_loop():
    scores = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(9, (200,), generator=torch.Generator().manual_seed(1))
    rank = [sorted(range(9), key=lambda c: -row[c]).index(label)
            for row, label in zip(scores.tolist(), labels.tolist())]
    assert probe_cls.accuracy(scores, labels) == pytest.approx(
        {"top1": 100 * np.mean([r == 0 for r in rank]), "top5": 100 * np.mean([r < 5 for r in rank])})


def test_head_on_the_whole_image_is_the_plain_resnet():
    encoder = insloc.C4Encoder("resnet18").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        by_box = encoder.features(images, torch.tensor([[0.0, 0, 224, 224]] * 2))[:, 0]
        torch.testing.assert_close(by_box, encoder.resnet(images))


def test_crops_belong_to_the_sample(world):
    """An epoch's crop of an image is the same whoever loads it, another epoch's differs; val is fixed."""
    _, (paths, labels), _ = probe_cls.find_classes(world)
    images = probe_cls.Images(paths, labels, 32, seed=0)
    again = probe_cls.Images(paths, labels, 32, seed=0)
    assert torch.equal(images[0, 7][0], again[0, 7][0]) and images[0, 7][1] == again[0, 7][1] == 0
    assert not torch.equal(images[0, 7][0], images[1, 7][0])
    assert torch.equal(images[-1, 7][0], probe_cls.Images(paths, labels, 32, seed=1)[-1, 7][0])
    assert images[0, 7][0].shape == images[-1, 7][0].shape == (3, 32, 32)


# ---- processes, resuming, the frozen net

@pytest.mark.parametrize("script,more", [(probe_cls, ["--epochs", 2, "--lr", 0.01, "--batch-size", 15]),
                                         (probe_loc, ["--grid", 2, "--protocol", "full", "placed"])])
def test_two_processes_equal_one(script, more, few, tmp_path):
    """Batches of 15 and 9 images, 11 validation images: two do not divide them. Sums differ in order."""
    data = tmp_path / "data"
    shutil.copytree(few, data)
    (data / "val" / "class2" / "0.png").unlink()
    argv = ["random", data, "--resnet", "resnet18", "--image-size", 32, *more]
    one = probe(script, *argv, "--out", tmp_path / "one")
    done = subprocess.run(**command(script, *argv, "--workers", 0, "--nprocs", 2, "--out", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1 and "2 process(es)" in done.stdout     # rank 0 alone speaks
    with open(tmp_path / "two" / "results.json") as f:
        two = json.load(f)
    if script is probe_cls:
        for a, b in zip(one["curve"], two["curve"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["top1"] == pytest.approx(b["top1"], abs=10)
    else:
        for a, b in zip(one["lines"], two["lines"], strict=True):
            assert np.array(a["confusion"]) == pytest.approx(np.array(b["confusion"]), abs=10)


@pytest.mark.parametrize("script,more", [
    (probe_cls, ["--epochs", 6, "--lr", 0.01]),
    (probe_loc, ["--grid", 2, "--epochs", 5, "--protocol", "full", "placed"])])
def test_a_killed_run_goes_on(script, more, world, tmp_path):
    common = ["random", world, "--resnet", "resnet18", "--image-size", 32, "--workers", 0, *more]
    killed = tmp_path / "killed"
    process = subprocess.Popen(**command(script, *common, "--out", killed))
    while not os.path.exists(killed / "checkpoint.pth") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not os.path.exists(killed / "results.json")
    assert "already holds a run" in refusal(probe, script, *common, "--out", killed)
    assert "--seed 0 then, 1 now" in refusal(probe, script, *common, "--seed", 1, "--resume", "--out", killed)
    one = probe(script, *common, "--resume", "--out", killed)
    two = probe(script, *common, "--out", tmp_path / "whole")
    key = "curve" if script is probe_cls else "lines"
    assert one[key] == two[key] and len(one[key]) > 2       # bit for bit


class Thawed(insloc.C4Encoder):
    """A network that stays in train mode: BatchNorm statistics move with every batch."""

    def train(self, mode=True):
        return super().train(True)


class Drifting(insloc.C4Encoder):
    """One of its weights is one float further after every forward pass."""

    def res4(self, images):
        weight = self.resnet.conv1.weight.data
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
        return super().res4(images)


def test_the_frozen_net_is_not_touched(few, tmp_path, monkeypatch):
    torch.manual_seed(3)
    net = insloc.C4Encoder("resnet18")
    file = tmp_path / "weights.pth"
    torch.save(net.resnet.state_dict(), file)
    seen = []
    check = probe_cls.check_frozen

    def watch(net, before):
        seen.append({name: x.clone() for name, x in net.state_dict().items()})
        check(net, before)

    monkeypatch.setattr(probe_cls, "check_frozen", watch)
    monkeypatch.setattr(probe_loc, "check_frozen", watch)
    probe(probe_cls, file, few, "--image-size", 32, "--epochs", 1, "--out", tmp_path / "c")
    more = "--grid", 2, "--no-random", "--protocol", "full", "reflect"
    probe(probe_loc, file, few, "--image-size", 32, *more, "--out", tmp_path / "l")
    for after, prefix in zip(seen, ("", "resnet.")):
        for name, x in net.resnet.state_dict().items():
            assert torch.equal(after[prefix + name].cpu(), x), name


@pytest.mark.parametrize("script,net", [(probe_cls, Thawed), (probe_loc, Thawed), (probe_loc, Drifting)])
def test_a_changed_net_is_an_error(script, net, few, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "C4Encoder", net)
    more = ["--epochs", 1, "--lr", 0.01] if script is probe_cls else ["--protocol", "full", "--grid", 2]
    argv = "random", few, "--resnet", "resnet18", "--image-size", 32, *more, "--out", tmp_path
    message = refusal(probe, script, *argv)
    assert "the frozen net changed" in message and not os.path.exists(tmp_path / "results.json")


# ---- weights, bad input, arguments

@pytest.mark.parametrize("arch", ["c4", "fpn"])
def test_a_run_directory_is_read_with_its_depth(arch, world, tmp_path):
    """pretrain.py's checkpoint: ResNet-18 is seen from the shapes, FPN's neck and head come along."""
    torch.manual_seed(5)
    net = (insloc.FPNEncoder if arch == "fpn" else insloc.C4Encoder)("resnet18")
    os.makedirs(tmp_path / "run")
    settings = {"arch": arch, "method": "insloc", "resnet": "resnet18"}
    torch.save({"encoder_q": net.state_dict(), "args": settings}, tmp_path / "run" / "checkpoint.pth")
    data = write_world(tmp_path / "data", train=4, val=2)
    common = tmp_path / "run", data, "--arch", arch, "--image-size", 32
    more = "--grid", 2, "--protocol", "full", "--epochs", 2
    result = probe(probe_loc, *common, *more, "--out", tmp_path / "loc")
    assert result["resnet"] == "resnet18" and {line["net"] for line in result["lines"]} == {"given", "random"}
    state = torch.load(tmp_path / "loc" / "checkpoint.pth", weights_only=True)
    kept = {name: x for name, x in probe_cls.fingerprint(net).items() if not name.startswith("projector.")}
    assert kept.items() <= state["nets"]["given"].items()   # trunk, neck, box head; the projector is not used
    assert not kept.items() <= state["nets"]["random"].items()
    result = probe(probe_cls, *common, "--knn", 1, "--out", tmp_path / "cls")
    assert result["resnet"] == "resnet18" and "InsLoc" in result["source"]


def test_what_is_missing_ends_in_one_line(world, tmp_path):
    def broken(name, change):
        data = tmp_path / name
        shutil.copytree(world, data)
        change(data)
        return str(data)

    no_val = broken("no_val", lambda d: shutil.rmtree(d / "val"))
    empty_val = broken("empty_val", lambda d: [shutil.rmtree(p) for p in (d / "val").iterdir()])
    one = broken("one", lambda d: [shutil.rmtree(d / "train" / f"class{i}") for i in (1, 2)])
    unknown = broken("unknown", lambda d: shutil.rmtree(d / "train" / "class1"))
    empty = broken("empty", lambda d: [p.unlink() for p in (d / "train" / "class1").iterdir()])
    assert "no folder 'val'" in refusal(probe_cls.find_classes, no_val)
    assert "no folder 'train'" in refusal(probe_cls.find_classes, str(tmp_path / "nowhere"))
    assert "no images" in refusal(probe_cls.find_classes, empty_val)
    assert "1 class folder" in refusal(probe_cls.find_classes, one)
    assert "train lacks, such as 'class1'" in refusal(probe_cls.find_classes, unknown)
    assert "class1 has no images" in refusal(probe_cls.find_classes, empty)
    assert "no folder 'val'" in refusal(probe_loc.find_images, no_val)
    assert "0 image(s)" in refusal(probe_loc.find_images, empty_val)
    for script in (probe_cls, probe_loc):
        nowhere = tmp_path / "nowhere.pth"
        assert "nowhere.pth" in refusal(probe, script, nowhere, world, "--out", tmp_path / "o")
        text = tmp_path / "text.pth"
        text.write_text("not a checkpoint")
        assert "text.pth" in refusal(probe, script, text, world, "--out", tmp_path / "o")
        assert not os.path.exists(tmp_path / "o")
        assert "text.pth" in refusal(probe, script, "random", world, "--out", text)     # a file, no folder
        os.makedirs(tmp_path / script.__name__)
        shutil.copy(text, tmp_path / script.__name__ / "checkpoint.pth")
        message = refusal(probe, script, "random", world, "--resume", "--out", tmp_path / script.__name__)
        assert "is no checkpoint of a probe" in message


@pytest.mark.parametrize("script,nprocs,workers", [(probe_cls, 1, 1), (probe_loc, 2, 0)])
def test_an_image_that_does_not_open_is_named(script, nprocs, workers, few, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(few, data)
    bad = data / "val" / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    argv = ["random", data, "--resnet", "resnet18", "--image-size", 32, "--out", tmp_path / "out"]
    done = subprocess.run(**command(script, *argv, "--nprocs", nprocs, "--workers", workers), timeout=300)
    assert done.returncode not in (0, 2) and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and str(bad) in lines[0] and "cannot be read" in lines[0]


@pytest.mark.parametrize("script,argv", [
    (probe_cls, ["--image-size", "100"]), (probe_cls, ["--epochs", "0"]), (probe_cls, ["--knn", "0"]),
    (probe_cls, ["--nprocs", "0"]), (probe_cls, ["--batch-size", "1", "--nprocs", "2"]),
    (probe_loc, ["--grid", "1"]), (probe_loc, ["--lr", "0"]), (probe_loc, ["--holdout", "1"]),
    (probe_loc, ["--grid", "9", "--image-size", "64"]), (probe_loc, ["--protocol", "half"])])
def test_bad_arguments_end_in_one_line(script, argv, capsys):
    with pytest.raises(SystemExit) as ending:
        script.get_args(["random", "DATA", "--device", "cpu", *argv])
    assert ending.value.code == 2 and argv[0] in capsys.readouterr().err.splitlines()[-1]


def test_defaults_are_mocos():
    """MoCo's linear protocol: 100 epochs of 256, rate 30, a tenth of it at 60 and at 80."""
    args = probe_cls.get_args(["w", "d"])
    assert (args.epochs, args.batch_size, args.lr, args.milestones) == (100, 256, 30.0, [60, 80])
    assert (args.image_size, args.resnet, args.precision) == (224, "resnet50", "fp32")


@pytest.mark.parametrize("script", [probe_cls, probe_loc])
def test_every_default_says_where_it_comes_from(script, monkeypatch):
    parsers, parse = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args",
                        lambda self, argv: parsers.append(self) or parse(self, argv))
    script.get_args(["random", "DATA", "--device", "cpu"])
    for action in parsers[0]._actions:
        if action.option_strings and action.dest != "help":
            assert any(tag in action.help for tag in ("[paper ", "[MoCo v2", "[ours")), action.dest


def test_paper_rows():
    path = os.path.join(ROOT, "docs", "paper_tables.csv")
    if not os.path.exists(path):
        pytest.skip("docs/paper_tables.csv is not there")
    with open(path) as f:
        rows = [row for row in csv.DictReader(f) if row["table"] == "3a"]
    for script, metric in ((probe_cls, "linear_cls_top1"), (probe_loc, "linear_loc_top1")):
        assert script.PAPER == {row["method"]: float(row["value"]) for row in rows if row["metric"] == metric}
