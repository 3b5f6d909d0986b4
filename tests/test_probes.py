"""probe_cls.py, probe_loc.py against networks of which the answer is known, and second implementations."""
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
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms

import insloc
import probe_cls
import probe_loc
import stage
import weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COLOURS = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220]])
NARROW = ["random", "--resnet", "narrow18"]
CLS = ["--image-size", 32, "--epochs", 3, "--lr", 0.01, "--batch-size", 11]
LOC = ["--image-size", 64, "--epochs", 3, "--grid", 2]
BOTH = pytest.mark.parametrize("script, more", [(probe_cls, CLS), (probe_loc, LOC)], ids=["cls", "loc"])
SHORT = pytest.mark.parametrize("script, more", [
    (probe_cls, [*CLS, "--epochs", 1]), (probe_loc, [*LOC, "--protocol", "full"])], ids=["cls", "loc"])


def write_world(folder, train=30, val=12, colour_of=lambda label, i: label, noise=30):
    """Images of 40 x 52 pixels in 3 class folders: their colour is colour_of(class, number), and noise."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(3):
            place = os.path.join(folder, split, f"class{label}")
            os.makedirs(place)
            for i in range(count):
                dots = torch.randint(-noise, noise + 1, (3, 40, 52), generator=generator)
                image = (COLOURS[colour_of(label, i)][:, None, None] + dots).clamp(0, 255).byte()
                torchvision.io.write_png(image, os.path.join(place, f"{i}.png"))
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """24 training and 12 validation images, for what takes whole networks."""
    return write_world(tmp_path_factory.mktemp("few"), train=8, val=4)


@pytest.fixture
def own(few, tmp_path):
    """A copy of `few` that a test may change."""
    return shutil.copytree(few, tmp_path / "own")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bit for bit is for the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def probe(script, *argv):
    """Runs a probe in this process; its results.json."""
    args = script.get_args(["--device", "cpu", "--workers", "0", "--nprocs", "1", *map(str, argv)])
    stage.launch(script.main, args, script.find_data)
    with open(os.path.join(args.out, "results.json")) as f:
        return json.load(f)


def start(script, *argv):
    """A probe as a process of its own."""
    command = [sys.executable, "-W", "ignore", script.__file__, "--device", "cpu", *map(str, argv)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """Standard output of a process that must end well."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def refusal(capsys):
    """refusal(script, *argv): the one line with which a probe ends in this process."""
    def run(script, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            probe(script, *argv)
        line = ending.value.code if isinstance(ending.value.code, str) else capsys.readouterr().err
        assert ending.value.code and "error: " in line and len(line.strip().splitlines()) == 1, line
        return line
    return run


def checkpoint(out):
    return torch.load(os.path.join(out, "checkpoint.pth"), weights_only=True)


# ---- Networks of which the answer is known ---------------------------------------------------------------

class StandIn(nn.Module):
    """In the place of C4Encoder."""

    def __init__(self, resnet, roi_size=14):
        super().__init__()
        self.resnet = nn.Identity()


class MeanColour(StandIn):
    """Features are the mean colour, nothing else."""

    def features(self, images, boxes=None):
        return images.mean(dim=(2, 3))[:, None]


class KnowsPlace(StandIn):
    """Features are the centre of the box, softly encoded, nothing else."""

    def features(self, images, boxes):
        centre = (boxes[..., :2] + boxes[..., 2:]).reshape(-1, 2) / 2 / images.shape[-1]
        code = torch.exp(-((centre[:, :, None] - torch.linspace(0, 1, 7)) / 0.15) ** 2)        # (N * M, 2, 7)
        return (code[:, 0, :, None] * code[:, 1, None, :]).reshape(-1, 1, 49)


class KnowsImage(KnowsPlace):
    """Features are a summary of the whole image, the same for all its boxes: the place cannot be known."""

    def features(self, images, boxes):
        summary = torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)
        return summary.repeat_interleave(boxes.shape[1], dim=0)[:, None]


@pytest.mark.parametrize("readout", [["--epochs", 3], ["--knn", 5]], ids=["linear", "knn"])
def test_class_is_read_where_it_stands(readout, world, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "C4Encoder", MeanColour)
    result = probe(probe_cls, "random", world, "--image-size", 32, *readout, "--out", tmp_path)
    assert result["results"] == {"random": {"top1": 100}}      # of three classes there is no top-5
    assert result["chance"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("readout", [["--epochs", 3], ["--knn", 9]], ids=["linear", "knn"])
def test_class_stays_at_chance_where_labels_are_shuffled(readout, tmp_path, monkeypatch):
    """The same images, put into classes by lot; of 150 images three standard deviations are 11.5 %."""
    lot = torch.randint(3, (3, 60), generator=torch.Generator().manual_seed(1))
    data = write_world(tmp_path / "data", train=60, val=50, colour_of=lambda label, i: lot[label, i])
    monkeypatch.setattr(weights, "C4Encoder", MeanColour)
    result = probe(probe_cls, "random", data, "--image-size", 32, *readout, "--out", tmp_path / "out")
    assert abs(result["results"]["random"]["top1"] - 100 / 3) < 11.5


def test_place_is_read_where_it_stands(world, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "C4Encoder", KnowsPlace)
    argv = ["--image-size", 64, "--epochs", 40, "--protocol", "full", "alone", "--out", tmp_path]
    full, alone = probe(probe_loc, "random", world, *argv)["lines"]
    assert full["top1"] == 100 and np.array_equal(full["confusion"], 100 * np.eye(9))
    assert alone["top1"] == pytest.approx(100 / 9)              # every cell is the whole picture there


def test_a_held_out_tenth_of_the_training_images_chooses_the_rate(world, tmp_path, monkeypatch):
    """A stand-in for the confusion says that the fifth layer is the best; validation is asked once."""
    trained, asked = [], []
    train_heads = probe_loc.train_heads

    def watch(features, *arguments):
        trained.append(features)
        return train_heads(features, *arguments)

    def confusion(features, head):
        asked.append(features)
        return torch.eye(9) * (100 if len(asked) == 5 else 50 if len(asked) == 8 else 10)

    monkeypatch.setattr(weights, "C4Encoder", KnowsPlace)
    monkeypatch.setattr(probe_loc, "train_heads", watch)
    monkeypatch.setattr(probe_loc, "confusion", confusion)
    result = probe(probe_loc, "random", world, "--image-size", 64, "--protocol", "full", "--out", tmp_path)
    assert [len(features) for features in trained + asked] == [81, *[9] * 7, 36]
    assert result["lines"][0]["lr"] == probe_loc.RATES[4] and result["lines"][0]["top1"] == 50


def test_place_stays_at_chance_where_it_cannot_be_known(world, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "C4Encoder", KnowsImage)
    argv = ["--image-size", 64, "--protocol", "full", "reflect", "--out", tmp_path]
    for line in probe(probe_loc, "random", world, *argv)["lines"]:
        assert line["top1"] == pytest.approx(100 / 9)           # nine equal features: one guess, right once
        assert np.array(line["confusion"]).sum(axis=1) == pytest.approx(100)


def test_place_stays_at_chance_where_cells_are_shuffled():
    """Features that say all, each image's cells in random order; of 900 four deviations are 4.2 %."""
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(300)])
    features = torch.eye(9)[order] + 0.1 * torch.randn(300, 9, 9, generator=generator)
    head, = probe_loc.train_heads(features[:200], [0.1], 10, generator, batch_size=64)
    assert abs(probe_loc.confusion(features[200:], head).diag().mean().item() - 100 / 9) < 4.2
    ordered = torch.eye(9).expand(300, 9, 9) + 0.1 * torch.randn(300, 9, 9, generator=generator)
    head, = probe_loc.train_heads(ordered[:200], [0.1], 10, generator, batch_size=64)
    assert probe_loc.confusion(ordered[200:], head).diag().mean() == 100


def test_padding_alone_tells_a_random_net_the_place(tmp_path):
    """Why random weights stand beside the given ones: noise has no place, but zero padding has."""
    data = write_world(tmp_path / "data", train=10, val=8)
    argv = [*NARROW, data, "--image-size", 64, "--grid", 2, "--epochs", 30, "--out", tmp_path / "out"]
    top1 = {line["protocol"]: line["top1"] for line in probe(probe_loc, *argv)["lines"]}
    assert top1["full"] > 90 and max(top1["reflect"], top1["alone"]) < 55                       # chance is 25


# ---- Parts against second implementations ----------------------------------------------------------------

def views(paths, protocol, size):
    return probe_loc.ProtocolImages(paths, protocol, size, grid=3)


@pytest.mark.parametrize("size, grid", [(224, 3), (65, 3), (128, 3), (50, 4), (97, 7), (64, 2)])
def test_cells_tile_the_image(size, grid):
    boxes = probe_loc.grid_boxes(size, grid)
    assert boxes.shape == (grid ** 2, 4) and boxes.dtype == torch.float32
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        row, column = divmod(i, grid)
        assert (x1, x2) == pytest.approx((size * column / grid, size * (column + 1) / grid))
        assert (y1, y2) == pytest.approx((size * row / grid, size * (row + 1) / grid))
    points = torch.rand(2000, 1, 2, generator=torch.Generator().manual_seed(0)) * size
    inside = ((points >= boxes[:, :2]) & (points < boxes[:, 2:])).all(dim=2)
    assert (inside.sum(dim=1) == 1).all()                       # every point in exactly one cell


@pytest.mark.parametrize("size", [64, 96])
def test_cells_show_the_image_where_the_protocol_says(world, size):
    path = os.path.join(world, "val", "class1", "5.png")
    image, boxes = views([path], "full", size)[0]
    assert image.shape == (1, 3, size, size) and image.dtype == torch.uint8
    assert torch.equal(boxes, probe_loc.grid_boxes(size, 3)[None])
    cells, boxes = views([path], "alone", size)[0]
    side = size // 3
    assert torch.equal(boxes, torch.tensor([0.0, 0, side, side]).expand(9, 1, 4))
    for i, cell in enumerate(cells):
        top = int(size * (i // 3) / 3 + 1e-4)
        left = int(size * (i % 3) / 3 + 1e-4)
        assert torch.equal(cell, image[0, :, top:top + side, left:left + side])


def test_reflection_replaces_every_zero_and_is_undone(tmp_path, monkeypatch):
    """On images of one colour each, the features that the linear layers get, protocol by protocol."""
    data = write_world(tmp_path / "data", train=4, val=2, noise=0)
    seen = []
    train_heads = probe_loc.train_heads

    def watch(features, *arguments):
        seen.append(features)
        return train_heads(features, *arguments)

    monkeypatch.setattr(probe_loc, "train_heads", watch)
    argv = [*NARROW, data, "--image-size", 64]
    probe(probe_loc, *argv, "--protocol", "reflect", "full", "--out", tmp_path / "a")
    probe(probe_loc, *argv, "--protocol", "full", "--out", tmp_path / "b")
    reflect, full, full_alone = seen
    assert reflect.std(dim=1).max() < 1e-5 * reflect.abs().max()
    assert full.std(dim=1).max() > 1e-2 * full.abs().max()      # zeros tell the cells apart
    assert torch.equal(full, full_alone)


def test_confusion_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, 6, generator=generator)
    head = nn.Linear(6, 4)
    counts = np.zeros((4, 4))
    for image in features.tolist():
        for i, cell in enumerate(image):
            counts[i, np.argmax(head.weight.tolist() @ np.array(cell) + head.bias.tolist())] += 1
    assert probe_loc.confusion(features, head).numpy() == pytest.approx(100 * counts / 30)


def test_linear_layers_are_each_what_a_loop_by_hand_trains():
    """Softmax regression written out: SGD with momentum 0.9, no decay, cosine to zero, zero at first."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(20, 4, 5, generator=generator)
    heads = probe_loc.train_heads(features, [0.1, 1.0], 3, torch.Generator().manual_seed(7), batch_size=8)
    for head, rate in zip(heads, (0.1, 1.0)):
        generator = torch.Generator().manual_seed(7)
        weight, momentum = np.zeros((4, 6)), np.zeros((4, 6))   # the bias is the weight of a sixth feature, 1
        step = 0
        for _ in range(3):
            for batch in torch.randperm(20, generator=generator).split(8):
                gradient = np.zeros((4, 6))
                for image in features[batch].double().numpy():
                    for cell, x in enumerate(image):
                        x = np.append(x, 1)
                        p = np.exp(weight @ x)
                        gradient += np.outer(p / p.sum() - np.eye(4)[cell], x) / (4 * len(batch))
                momentum = 0.9 * momentum + gradient
                weight -= rate * (1 + np.cos(np.pi * step / 9)) / 2 * momentum
                step += 1
        assert head.weight.numpy() == pytest.approx(weight[:, :5], abs=1e-5)
        assert head.bias.numpy() == pytest.approx(weight[:, 5], abs=1e-5)


def test_knn_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(300, 8, generator=generator))
    queries = F.normalize(torch.randn(41, 8, generator=generator))
    labels = torch.randint(5, (300,), generator=generator)
    scores = probe_cls.knn(queries, bank, labels, 5, k=20, temperature=0.07)
    for query, row in zip(queries.double().numpy(), scores.numpy()):
        cosine = bank.double().numpy() @ query
        votes = [0.0] * 5
        for i in sorted(range(300), key=lambda i: -cosine[i])[:20]:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        assert row == pytest.approx(votes, rel=1e-3)
    assert probe_cls.knn(queries, bank[:3], labels[:3], 5, k=20).shape == (41, 5)               # fewer than k


@pytest.mark.parametrize("classes", [3, 9])
def test_accuracy_against_a_loop(classes):
    scores = torch.randn(200, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (200,), generator=torch.Generator().manual_seed(1))
    place = [sorted(range(classes), key=lambda c: -row[c]).index(label)
             for row, label in zip(scores.tolist(), labels.tolist())]
    expected = {"top1": 100 * np.mean([p == 0 for p in place])}
    if classes > 5:
        expected["top5"] = 100 * np.mean([p < 5 for p in place])
    assert probe_cls.accuracy(scores, labels) == pytest.approx(expected)


def test_head_on_the_whole_image_is_the_plain_resnet():
    """Why C4 is read as a plain ResNet: RoIAlign of a whole image of 224 pixels is the identity."""
    encoder = insloc.C4Encoder("narrow18").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        by_box = encoder.features(images, torch.tensor([[0.0, 0, 224, 224]] * 2))[:, 0]
        torch.testing.assert_close(by_box, encoder.resnet(images))


# ---- MoCo's recipe ---------------------------------------------------------------------------------------

def test_defaults_are_mocos():
    """MoCo's linear protocol: 100 epochs of 256 images, rate 30, 224 pixels."""
    args = probe_cls.get_args(["w", "d"])
    assert (args.epochs, args.batch_size, args.lr, args.image_size) == (100, 256, 30.0, 224)
    assert (args.resnet, args.precision, args.input, args.knn) == ("resnet50", "fp32", None, 0)


@pytest.mark.parametrize("shape", [(300, 400), (400, 290), (224, 224), (100, 399)])
def test_views_are_mocos(shape, tmp_path):
    """Against torchvision's transforms of the first generation on Pillow's images, as MoCo wrote them."""
    os.makedirs(tmp_path / "a")
    path = str(tmp_path / "a" / "x.png")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    image.save(path)
    images = probe_cls.Images(str(tmp_path), 224, seed=4)
    centre = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    random = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()])

    def same(a, b):
        return (a.int() - torch.from_numpy(np.array(b)).permute(2, 0, 1).int()).abs().max() <= 1    # rounding

    assert same(images[-1, 0], centre(image))
    assert torch.equal(images[-1, 0], views([path], "full", 224)[0][0][0])
    for epoch in range(6):
        torch.manual_seed(insloc.generator_for(4, "sample", epoch, 0).initial_seed())
        expected = random(image)
        assert same(images[epoch, 0], expected)
    assert len({images[epoch, 0].float().mean().item() for epoch in range(6)}) == 6


def test_long_strips_cost_no_gigabytes(tmp_path):
    """20,000 x 2 pixels; resized as a whole it would have 2,560,000 x 256."""
    os.makedirs(tmp_path / "a")
    path = str(tmp_path / "a" / "x.png")
    strip = torch.randint(256, (3, 2, 20000), dtype=torch.uint8)
    torchvision.io.write_png(strip, path)
    images = probe_cls.Images(str(tmp_path), 224, seed=0)
    started = time.perf_counter()
    centre = images[-1, 0]
    assert images[0, 0].shape == (3, 224, 224)
    assert torch.equal(centre, views([path], "full", 224)[0][0][0])
    assert time.perf_counter() - started < 1
    middle = F.interpolate(strip[None, :, :, 9996:10004], (256, 1024), mode="bilinear", antialias=True)[0]
    assert torch.equal(centre, middle[:, 16:240, 400:624])


def test_linear_classification_is_what_a_loop_by_hand_computes(few, tmp_path):
    """Five epochs, the rate falls before the fourth and the fifth; batches of 10, 10 and 4 images."""
    argv = [*NARROW, few, "--image-size", 32, "--epochs", 5, "--batch-size", 10, "--lr", 0.05]
    result = probe(probe_cls, *argv, "--seed", 3, "--out", tmp_path)
    torch.manual_seed(3)
    net = insloc.make_resnet("narrow18").eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    weight = torch.empty(3, 128).normal_(0, 0.01, generator=insloc.generator_for(3, "fc"))
    weight = torch.cat([weight, torch.zeros(3, 1)], dim=1)      # the bias is the weight of one feature more
    momentum = torch.zeros(3, 129)
    images = probe_cls.Images(os.path.join(few, "train"), 32, seed=3)

    def encode(batch):
        with torch.no_grad():
            features = net((torch.stack(batch) / 255 - mean) / std)
        return torch.cat([features, torch.ones(len(batch), 1)], dim=1)

    for epoch, rate in enumerate((0.05, 0.05, 0.05, 0.005, 0.0005)):
        order = torch.randperm(24, generator=insloc.generator_for(3, "order", epoch)).tolist()
        for i in (0, 10, 20):
            x = encode([images[epoch, index] for index in order[i:i + 10]])
            target = F.one_hot(torch.tensor([images.targets[index] for index in order[i:i + 10]]), 3)
            momentum = 0.9 * momentum + ((x @ weight.T).softmax(dim=1) - target).T @ x / len(x)
            weight = weight - rate * momentum
    fc = checkpoint(tmp_path)["fc"]
    torch.testing.assert_close(torch.cat([fc["weight"], fc["bias"][:, None]], dim=1), weight)
    val = probe_cls.Images(os.path.join(few, "val"), 32, seed=3)
    guess = (encode([val[-1, i] for i in range(12)]) @ weight.T).argmax(dim=1)
    assert result["results"]["random"]["top1"] == 100 * (guess == torch.tensor(val.targets)).double().mean()
    assert [line["lr"] for line in result["curve"]] == pytest.approx([0.05, 0.05, 0.05, 0.005, 0.0005])


# ---- Weights ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["c4", pytest.param("fpn", marks=pytest.mark.slow)])
@SHORT
def test_a_run_directory_is_read_with_its_trunk_neck_and_head(script, more, arch, few, tmp_path, monkeypatch):
    """As pretrain.py writes it: the trunk is seen from the shapes, and the random net has the same."""
    torch.manual_seed(5)
    net = (insloc.FPNEncoder if arch == "fpn" else insloc.C4Encoder)("narrow18")
    os.makedirs(tmp_path / "run")
    torch.save({"encoder_q": net.state_dict()}, tmp_path / "run" / "checkpoint.pth")
    made = {}
    frozen_nets = script.frozen_nets

    def watch(*arguments):
        nets, sources = frozen_nets(*arguments)
        made.update(nets.items())
        return nets, sources

    monkeypatch.setattr(script, "frozen_nets", watch)
    more = ["--knn", 1] if script is probe_cls else ["--protocol", "full"]
    result = probe(script, tmp_path / "run", few, "--arch", arch, "--image-size", 64, *more,
                   "--out", tmp_path / "out")
    assert "narrow18" in result["sources"]["given"] and made.keys() == {"random", "given"}
    given, random = made["given"].state_dict(), made["random"].state_dict()
    for name, x in net.state_dict().items():
        if name.startswith("resnet.") or script is probe_loc and not name.startswith("projector."):
            assert torch.equal(given[name], x), name
            assert x.dim() < 4 or not torch.equal(random[name], x), name


def test_knn_stands_beside_a_random_nets(few, tmp_path):
    torch.save(insloc.make_resnet("narrow18").state_dict(), tmp_path / "weights.pth")
    argv = [few, "--image-size", 32, "--knn", 3]
    both = probe(probe_cls, tmp_path / "weights.pth", *argv, "--out", tmp_path / "a")["results"]
    alone = probe(probe_cls, *NARROW, *argv, "--out", tmp_path / "b")["results"]
    assert both.keys() == {"random", "given"} and both["random"] == alone["random"]


@pytest.mark.parametrize("script", [probe_cls, probe_loc])
@pytest.mark.parametrize("kind", ["imagenet", "zero-one", "caffe"])
def test_the_given_net_gets_the_pixels_it_knows(script, kind, few, tmp_path, monkeypatch):
    """The random net beside it gets ImageNet's."""
    seen = []

    class Watch(MeanColour):
        def features(self, images, boxes=None):
            seen.append(images)
            found = super().features(images)
            return found if boxes is None else found.repeat_interleave(boxes.shape[1], dim=0)

    monkeypatch.setattr(weights, "C4Encoder", Watch)
    found = weights.Weights({}, {}, "", "", *weights.INPUTS[kind], ())
    monkeypatch.setattr(weights, "read_weights", lambda path, trust, prefix, input: found)
    more = ["--knn", 1] if script is probe_cls else ["--protocol", "full"]
    probe(script, "file", few, "--image-size", 64, *more, "--out", tmp_path)
    path = os.path.join(few, "val", "class0", "0.png")
    image = views([path], "full", 64)[0][0][0] / 255
    r, g, b = image
    expected = {"imagenet": torch.stack([(r - 0.485) / 0.229, (g - 0.456) / 0.224, (b - 0.406) / 0.225]),
                "zero-one": image,
                "caffe": torch.stack([255 * b - 103.53, 255 * g - 116.28, 255 * r - 123.675])}
    for kind_of_net in ("imagenet", kind):
        assert any(torch.allclose(images[0], expected[kind_of_net], atol=1e-4) for images in seen)
    means = {images.mean().item() for images in seen}           # of train and of val, as each net sees them
    assert len(means) == (2 if kind == "imagenet" else 4)


def test_a_caffe_net_strides_in_its_1x1():
    """Against detectron2's way, block by block: the first convolution of layer2.0 halves the map."""
    net = insloc.make_resnet("resnet50")
    trunk = net.state_dict()
    weights.load_trunk(net.eval(), weights.Weights(trunk, {}, "resnet50", "", *weights.INPUTS["caffe"], ()))
    x = torch.randn(2, 256, 12, 12)
    block = net.layer2[0]
    with torch.no_grad():
        y = F.relu(block.bn1(F.conv2d(x, trunk["layer2.0.conv1.weight"], stride=2)))
        y = F.relu(block.bn2(F.conv2d(y, trunk["layer2.0.conv2.weight"], padding=1)))
        y = block.bn3(F.conv2d(y, trunk["layer2.0.conv3.weight"]))
        torch.testing.assert_close(block(x), F.relu(y + block.downsample(x)))
        assert net.layer4(net.layer3(block(x))).shape[2:] == (2, 2)
    assert all(block.conv2.stride == (1, 1) for block in net.modules() if hasattr(block, "conv3"))


def test_files_that_show_caffes_pixels_are_refused_without_input(few, tmp_path, refusal):
    torch.save(insloc.make_resnet("resnet18").state_dict(), tmp_path / "resnet18_caffe.pth")
    argv = [tmp_path / "resnet18_caffe.pth", few, "--out", tmp_path / "out"]
    assert "--input caffe" in refusal(probe_cls, *argv)


# ---- The frozen net --------------------------------------------------------------------------------------

class Thawed(insloc.C4Encoder):
    """A network that stays in train mode: BatchNorm statistics move with every batch."""

    def train(self, mode=True):
        return super().train(True)


class Drifting(insloc.C4Encoder):
    """One of its weights is one float further after every forward pass."""

    def features(self, images, boxes=None):
        weight = self.resnet.conv1.weight.data
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
        return super().features(images, boxes)


@pytest.mark.parametrize("script", [probe_cls, probe_loc])
@pytest.mark.parametrize("net", [Thawed, Drifting])
def test_a_net_that_has_changed_is_an_error(script, net, few, tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(weights, "C4Encoder", net)
    more = ["--knn", 1] if script is probe_cls else ["--protocol", "full", "--epochs", 1]
    line = refusal(script, *NARROW, few, "--image-size", 64, *more, "--out", tmp_path)
    assert "frozen net has changed" in line and not os.path.exists(tmp_path / "results.json")


# ---- Processes, workers, resuming ------------------------------------------------------------------------

def outcome(result):
    """What must not depend on processes, workers, interruptions."""
    return [result[key] for key in ("results", "curve", "lines") if key in result]


@BOTH
def test_loader_workers_change_nothing(script, more, few, tmp_path):
    without, one = (probe(script, *NARROW, few, *more, "--workers", count, "--out", tmp_path / str(count))
                    for count in (0, 1))
    assert outcome(without) == outcome(one)                     # bit for bit


class Killed(Exception):
    pass


@BOTH
def test_an_interrupted_run_resumed_is_the_uninterrupted_one(script, more, few, tmp_path, monkeypatch):
    """Left behind after its first checkpoint, then after each further one; resumed once more when done."""
    argv = [*NARROW, few, *more, "--resume", "--out", tmp_path / "a"]
    whole = probe(script, *NARROW, few, *more, "--out", tmp_path / "b")
    save = stage.save_checkpoint

    def save_and_die(*state):
        save(*state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_checkpoint", save_and_die)
        for _ in range(3):                                      # epochs of the one, protocols of the other
            with pytest.raises(Killed):
                probe(script, *argv)
            assert not os.path.exists(tmp_path / "a" / "results.json")
    assert outcome(probe(script, *argv)) == outcome(probe(script, *argv)) == outcome(whole)
    if script is probe_cls:
        for part in ("fc", "optimizer"):
            torch.testing.assert_close(checkpoint(tmp_path / "a")[part], checkpoint(tmp_path / "b")[part],
                                       rtol=0, atol=0)


@pytest.mark.slow
@BOTH
def test_a_killed_run_goes_on(script, more, world, tmp_path):
    argv = [*NARROW, world, *more, "--workers", 0]
    process = start(script, *argv, "--out", tmp_path / "killed")
    while not os.path.exists(tmp_path / "killed" / "checkpoint.pth") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    one = probe(script, *argv, "--resume", "--out", tmp_path / "killed")
    assert outcome(one) == outcome(probe(script, *argv, "--out", tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("script, more, nprocs", [
    (probe_cls, CLS, 3), (probe_cls, ["--image-size", 32, "--knn", 3], 2), (probe_loc, LOC, 2)],
    ids=["linear", "knn", "loc"])
def test_processes_compute_what_one_computes(script, more, nprocs, own, tmp_path):
    """Batches of 11, 11 and 2 images, 11 of validation: nothing is divided evenly, one part is empty."""
    os.remove(own / "val" / "class2" / "0.png")
    one = probe(script, *NARROW, own, *more, "--out", tmp_path / "one")
    out = finish(start(script, *NARROW, own, *more, "--workers", 0, "--nprocs", nprocs,
                       "--out", tmp_path / "more"))
    assert out.count("chance: top-1") == 1 and f"{nprocs} x cpu" in out       # rank 0 alone speaks
    with open(tmp_path / "more" / "results.json") as f:
        more = json.load(f)
    for a, b in zip(one.get("curve", []), more.get("curve", []), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for a, b in zip(one.get("lines", []), more.get("lines", []), strict=True):
        if a["protocol"] == "swap":
            for key, value in a.items():
                assert b[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3)), key
        else:
            assert np.array(b["confusion"]) == pytest.approx(np.array(a["confusion"]), abs=10)  # one image
    assert more.get("results") == one.get("results")


@pytest.mark.slow
def test_torchrun_computes_what_nprocs_computes(few, tmp_path):
    argv = [*NARROW, few, *CLS, "--workers", 0]
    finish(start(probe_cls, *argv, "--nprocs", 2, "--out", tmp_path / "a"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, probe_cls.__file__, "--device", "cpu", *argv, "--out", tmp_path / "b"]
    subprocess.run(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
                   capture_output=True, timeout=240)
    results = []
    for name in ("a", "b"):
        with open(tmp_path / name / "results.json") as f:
            results.append(outcome(json.load(f)))
    assert results[0] == results[1]


# ---- What is wrong ends in one line ----------------------------------------------------------------------

def test_a_run_is_not_overwritten(few, tmp_path, refusal):
    argv = [*NARROW, few, *LOC, "--protocol", "full", "--out", tmp_path]
    probe(probe_loc, *argv)
    assert "--resume goes on" in refusal(probe_loc, *argv)


@pytest.mark.parametrize("change", ["label", "image", "setting", "weights"])
def test_a_run_does_not_go_on_with_something_else(change, own, tmp_path, refusal):
    torch.save(insloc.make_resnet("narrow18").state_dict(), tmp_path / "weights.pth")
    argv = [tmp_path / "weights.pth", own, *CLS, "--epochs", 1, "--out", tmp_path / "out"]
    probe(probe_cls, *argv)
    if change == "label":
        os.rename(own / "train" / "class0" / "0.png", own / "train" / "class1" / "new.png")
    elif change == "image":
        os.remove(own / "val" / "class0" / "0.png")
    elif change == "setting":
        argv += ["--seed", 1]
    else:
        torch.save(insloc.make_resnet("narrow18").state_dict(), tmp_path / "weights.pth")
    said = {"label": "images was", "image": "images was", "setting": "seed was 0", "weights": "nets was"}
    assert said[change] in refusal(probe_cls, *argv, "--resume")


@SHORT
def test_a_run_goes_on_elsewhere(script, more, own, tmp_path, monkeypatch):
    """Data, weights and run directory may have moved, and be named in another way."""
    torch.save(insloc.make_resnet("narrow18").state_dict(), tmp_path / "weights.pth")
    result = probe(script, tmp_path / "weights.pth", own, *more, "--out", tmp_path / "out")
    for name in ("weights.pth", "own", "out"):
        os.rename(tmp_path / name, tmp_path / f"moved_{name}")
    monkeypatch.chdir(tmp_path)
    argv = ["moved_weights.pth", "moved_own/", *more, "--resume", "--out", "moved_out"]
    assert outcome(probe(script, *argv)) == outcome(result)


def test_weights_that_do_not_load_are_named(few, tmp_path, refusal):
    (tmp_path / "weights.pth").write_text("not a checkpoint")
    line = refusal(probe_cls, tmp_path / "weights.pth", few, *CLS, "--out", tmp_path / "out")
    assert "weights.pth: " in line


@SHORT
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(split, script, more, own, tmp_path, refusal):
    shutil.rmtree(own / split)
    assert f"own/{split}" in refusal(script, *NARROW, own, *more, "--out", tmp_path / "out")


@pytest.mark.parametrize("gone", ["train/class1", "val/class1"])
def test_classes_of_one_split_alone_are_named(gone, own, tmp_path, refusal):
    shutil.rmtree(own / gone)
    assert "class1" in refusal(probe_cls, *NARROW, own, *CLS, "--out", tmp_path / "out")


def test_a_class_without_images_is_named(own, tmp_path, refusal):
    for file in (own / "train" / "class1").iterdir():
        file.unlink()
    assert "class1" in refusal(probe_cls, *NARROW, own, *CLS, "--out", tmp_path / "out")


def test_one_class_is_no_task(own, tmp_path, refusal):
    for split in ("train", "val"):
        for name in ("class0", "class1"):
            shutil.rmtree(own / split / name)
    assert "two or more" in refusal(probe_cls, *NARROW, own, *CLS, "--out", tmp_path / "out")


def test_links_that_lead_back_up_are_no_new_images(own, tmp_path):
    os.symlink(own / "train", own / "train" / "class0" / "up")
    args = probe_loc.get_args(["random", str(own), "--out", str(tmp_path)])
    train, val, _ = probe_loc.find_data(args)
    assert (len(train), len(val)) == (24, 12) and all(map(os.path.isfile, train + val))


@pytest.mark.parametrize("workers", [0, 1])
@SHORT
def test_an_image_that_does_not_open_is_named(script, more, workers, own, tmp_path, refusal):
    bad = own / "val" / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    line = refusal(script, *NARROW, own, *more, "--workers", workers, "--out", tmp_path / "out")
    assert f"{bad} cannot be read" in line and not os.path.exists(tmp_path / "out" / "results.json")


@pytest.mark.parametrize("workers", [0, 1])
@SHORT
def test_a_bug_in_reading_keeps_its_traceback(script, more, workers, few, tmp_path, monkeypatch):
    def planted(path):
        return name_that_is_not_there                                                       # noqa: F821

    monkeypatch.setattr(weights, "read_image", planted)
    with pytest.raises(NameError, match="name_that_is_not_there"):
        probe(script, *NARROW, few, *more, "--workers", workers, "--out", tmp_path)


@pytest.mark.slow
@SHORT
def test_of_several_processes_one_names_the_image(script, more, own, tmp_path):
    bad = own / "val" / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    process = start(script, *NARROW, own, *more, "--nprocs", 2, "--workers", 1, "--out", tmp_path / "out")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1 and len(err.strip().splitlines()) == 1, err
    assert f"{bad} cannot be read" in err


def test_a_loss_that_is_not_finite_ends_the_run(few, tmp_path, refusal):
    argv = [*NARROW, few, "--image-size", 32, "--lr", 1e38, "--epochs", 2, "--out", tmp_path]
    assert "not finite in epoch" in refusal(probe_cls, *argv)
    assert not os.path.exists(tmp_path / "results.json")


def test_features_that_are_not_finite_end_the_run(few, tmp_path, refusal):
    state = insloc.make_resnet("narrow18").state_dict()
    state["conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "weights.pth")
    assert "not finite" in refusal(probe_loc, tmp_path / "weights.pth", few, *LOC, "--out", tmp_path / "out")


@pytest.mark.parametrize("script, argv", [
    (probe_cls, ["--image-size", "31"]), (probe_cls, ["--epochs", "0"]), (probe_cls, ["--knn", "-1"]),
    (probe_cls, ["--nprocs", "0"]), (probe_cls, ["--batch-size", "0"]), (probe_cls, ["--lr", "nan"]),
    (probe_cls, ["--input", "bgr"]), (probe_loc, ["--grid", "1"]), (probe_loc, ["--image-size", "100"]),
    (probe_loc, ["--grid", "9", "--image-size", "64"]), (probe_loc, ["--protocol", "placed"]),
    (probe_loc, ["--train-images", "1"])], ids=str)
def test_bad_arguments_end_in_one_line(script, argv, capsys):
    with pytest.raises(SystemExit) as ending:
        script.get_args(["random", "DATA", "--device", "cpu", *argv])
    line = capsys.readouterr().err
    assert ending.value.code == 2 and argv[0] in line and line.count("\n") == 1


@pytest.mark.parametrize("script, metric", [(probe_cls, "linear_cls_top1"), (probe_loc, "linear_loc_top1")])
def test_paper_rows(script, metric):
    with open(os.path.join(ROOT, "docs", "paper_tables.csv")) as f:
        rows = [row for row in csv.DictReader(f) if row["table"] == "3a" and row["metric"] == metric]
    assert script.PAPER == {row["method"]: float(row["value"]) for row in rows}
