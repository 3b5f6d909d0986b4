"""probe_box.py against networks of which the answer is known, and against second implementations."""
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection._utils import BoxCoder

import insloc
import probe_box
import weights
from test_probes import (NARROW, Killed, StandIn, few, finish, one_thread, outcome, own, probe,  # noqa: F401
                         refusal, start)

SIZES = ["--image-size", 64, "--images", 12, "--train-images", 24]
MANY = ["--image-size", 64, "--images", 60, "--train-images", 60]


def composites(paths, seed=0):
    entries = probe_box.composites([(path, "") for path in paths], 64, seed, "swap")
    return probe_box.Boxes(entries, 64, seed, "loose")


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """61 validation images of 4 x 4 random colours each, in two folders."""
    folder = tmp_path_factory.mktemp("patterns")
    colours = torch.randint(256, (61, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    for split, count in (("train", 4), ("val", 61)):
        os.makedirs(folder / split)
        for i in range(count):
            image = colours[i].repeat_interleave(20, dim=1).repeat_interleave(20, dim=2)
            torchvision.io.write_png(image, os.path.join(folder, split, f"{i}.png"))
    return folder


def test_the_splits_have_places_and_loose_boxes_of_their_own(patterns):
    """A linear layer must not have seen the geometry that it is asked for."""
    args = probe_box.get_args(["random", str(patterns), "--device", "cpu", "--image-size", "64"])
    train, val = probe_box.find_data(args)[0]["loose"]
    boxes = [{entry[2] for entry in split.entries} for split in (train, val)]
    assert len(boxes[0]) == 2 and len(boxes[1]) > 20 and not boxes[0] & boxes[1]
    assert train.seeds != val.seeds


# ---- swap: networks of which the answer is known ---------------------------------------------------------

class SeesBox(StandIn):
    """Features are the box's pixels, on average over 4 x 4 parts of it."""

    def features(self, images, boxes):
        cells = [F.adaptive_avg_pool2d(image[:, y1:y2, x1:x2], 4)
                 for image, ((x1, y1, x2, y2),) in zip(images, boxes.int().tolist())]
        return torch.stack(cells).flatten(1)[:, None]


class SeesCanvas(StandIn):
    """Features are the whole picture's, wherever the box is."""

    def features(self, images, boxes):
        return F.adaptive_avg_pool2d(images, 4).flatten(1)[:, None]


class SeesRest(StandIn):
    """Features are what the box leaves of the picture."""

    def features(self, images, boxes):
        rest = torch.ones_like(images)
        for mask, ((x1, y1, x2, y2),) in zip(rest, boxes.int().tolist()):
            mask[:, y1:y2, x1:x2] = 0
        return F.adaptive_avg_pool2d(images * rest, 4).flatten(1)[:, None]


def swap(net, data, out, monkeypatch, *more):
    monkeypatch.setattr(weights, "C4Encoder", net)
    argv = ["--image-size", 64, "--protocol", "swap", *more, "--out", out]
    return probe(probe_box, "random", data, *argv)["lines"][0]


def test_swap_tells_who_sees_its_box_alone(patterns, tmp_path, monkeypatch):
    box, canvas, rest = (swap(net, patterns, tmp_path / net.__name__, monkeypatch)
                         for net in (SeesBox, SeesCanvas, SeesRest))
    assert {box["chance"], canvas["chance"], rest["chance"]} == {100 / 60}          # pairs: one is left out
    assert box["same_instance"] == pytest.approx(1) and abs(box["same_background"]) < 0.1
    assert box["top1"] == 100 and box["gradient_inside"] == 1
    assert max(abs(net["same_place"]) for net in (box, canvas, rest)) < 0.1
    assert 0.1 < canvas["same_instance"] < 0.9 and canvas["same_background"] > 0.2
    assert canvas["gradient_inside"] == pytest.approx(canvas["area_inside"], abs=0.02)
    assert 0.3 < canvas["area_inside"] < 0.5                                        # .39 on average
    assert abs(rest["same_instance"]) < 0.2 and rest["same_background"] > 0.95
    assert rest["top1"] < 10 and rest["gradient_inside"] == 0


def test_swap_is_repeated_by_its_seed_and_draws_its_nets(patterns, tmp_path, monkeypatch):
    seeds = [swap(SeesCanvas, patterns, tmp_path / str(i), monkeypatch, "--seed", seed, "--images", 21)
             for i, seed in enumerate((0, 0, 1))]
    assert seeds[0] == seeds[1] != seeds[2] and seeds[0]["chance"] == 100 / 20
    picture = torchvision.io.read_image(os.path.join(tmp_path, "0", "swap.png"))
    assert picture.shape == (3, 2 * 66 + 2, 4 * 66 + 2)                             # composites, one net


@pytest.mark.parametrize("net, bright_inside", [(SeesBox, True), (SeesRest, False)])
def test_swaps_picture_shows_what_is_seen(net, bright_inside, patterns, tmp_path):
    seen = net("")
    seen.pixels = weights.Pixels(weights.random_weights())
    dataset = composites([str(patterns / "val" / f"{i}.png") for i in range(6)])
    probe_box.draw_swap({"net": seen}, dataset, str(tmp_path / "swap.png"))
    picture = torchvision.io.read_image(str(tmp_path / "swap.png"))
    x1, y1, x2, y2 = dataset[0][1][0].int().tolist()
    for column in range(4):
        cell = picture[:, 68:132, 2 + 66 * column:66 + 66 * column].clone()        # below the composites
        red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None]
        assert (cell[:, y1, x1:x2] == red).all() and (cell[:, y2 - 1, x1:x2] == red).all()
        assert (cell[:, y1:y2, x1] == red).all() and (cell[:, y1:y2, x2 - 1] == red).all()
        inside = cell[:, y1 + 4:y2 - 4, x1 + 4:x2 - 4].float().mean().item()        # maps are 4 pixels coarse
        cell[:, max(0, y1 - 4):y2 + 4, max(0, x1 - 4):x2 + 4] = 0
        assert (inside > 20) == bright_inside and (cell.float().mean().item() > 5) != bright_inside


def test_composites_paste_an_image_on_two_others_where_its_twin_is_pasted(patterns):
    paths = [str(patterns / "val" / f"{i}.png") for i in range(10)]
    dataset = composites(paths)
    squares = [weights.centre_view(weights.read_photo(path), 64) for path in paths]
    places = []
    for pair in range(5):
        items = [dataset[4 * pair + i] for i in range(4)]           # two images, each on two backgrounds
        boxes = torch.stack([boxes[0] for _, boxes in items])
        assert (boxes == boxes[0]).all()
        x1, y1, x2, y2 = boxes[0].int().tolist()
        places.append((x1, y1))
        assert 0 <= x1 and 0 <= y1 and x2 <= 64 and y2 <= 64
        assert 32 <= x2 - x1 <= 48 and 32 <= y2 - y1 <= 48
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[y1:y2, x1:x2] = False
        backgrounds = []
        for i, (composite, _) in enumerate(items):
            assert composite.shape == (3, 64, 64) and composite.dtype == torch.uint8
            fits = [j for j in range(10) if torch.equal(squares[j][:, outside], composite[:, outside])]
            assert len(fits) == 1
            backgrounds += fits
            source = squares[2 * pair + i // 2]
            instance = torchvision.transforms.v2.functional.resize(source, [y2 - y1, x2 - x1])
            assert torch.equal(composite[:, y1:y2, x1:x2], instance)
        assert backgrounds[:2] == backgrounds[2:] and len({*backgrounds, 2 * pair, 2 * pair + 1}) == 4
    assert len(set(places)) > 1


def test_swap_scores_and_shares_against_loops():
    features = torch.randn(12, 2, 5, generator=torch.Generator().manual_seed(0)) + torch.randn(2, 5)
    sets = features.double().numpy() - features.double().numpy().mean(axis=0)
    sets /= np.linalg.norm(sets, axis=2, keepdims=True)

    def cosine(i, s, j, t):
        return sum(sets[i, s] * sets[j, t])

    same = np.mean([cosine(i, 0, i, 1) for i in range(12)])
    leak = np.mean([cosine(i, s, i + 1, s) for i in range(0, 12, 2) for s in (0, 1)])
    place = np.mean([cosine(i, s, i + 1, 1 - s) for i in range(0, 12, 2) for s in (0, 1)])
    found = [max(range(12), key=lambda j: cosine(i, 0, j, 1)) == i for i in range(12)]
    assert probe_box.swap_scores(features) == pytest.approx(
        {"same_instance": same, "same_background": leak, "same_place": place, "top1": 100 * np.mean(found),
         "chance": 100 / 12}, abs=1e-5)
    energy, boxes = torch.rand(3, 9, 9), torch.tensor([[0, 0, 9, 9], [2, 3, 7, 5], [8, 0, 9, 9]])
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        inside = sum(energy[i, y, x].item() for y in range(y1, y2) for x in range(x1, x2))
        share = probe_box.share_inside(energy, boxes.float())[i].item()
        assert share == pytest.approx(inside / energy[i].sum().item())


def test_the_energy_of_a_pixel_is_its_column_of_the_jacobian():
    """On average over directions, here for a linear network whose Jacobian is its matrix."""
    matrix = torch.randn(6, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    images = torch.randn(1, 3, 4, 4, requires_grad=True)
    energy = 0
    for t in range(2000):
        energy += probe_box.pixel_energy(images.flatten(1) @ matrix.T, images, [("test", t)])[0] / 2000
    expected = matrix.square().sum(dim=0).view(3, 4, 4).sum(dim=0)
    assert (energy / expected - 1).abs().max() < 0.15


# ---- loose: networks of which the answer is known --------------------------------------------------------

def find_pasted(image):
    """The box of the pasted image where it is bright, and dark elsewhere: (x1, y1, x2, y2)."""
    bright = image.amax(dim=0) > 0
    rows = bright.any(dim=1).nonzero()
    columns = bright.any(dim=0).nonzero()
    return torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()


class ToldThePastedBox(StandIn):
    """Features are what stands between a loose box and the pasted one, which is found by its brightness."""

    def features(self, images, boxes):
        coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        pasted = torch.stack([find_pasted(image) for image in images])
        pasted = pasted[:, None].expand_as(boxes)
        return coder.encode_single(pasted.flatten(0, 1), boxes.flatten(0, 1))[:, None] + 7


class BlindToTheBorder(StandIn):
    """Features are the instance's, a pixel from its middle, whichever box is asked for."""

    def features(self, images, boxes):
        pixels = []
        for image in images:
            x1, y1, x2, y2 = find_pasted(image).int().tolist()
            pixels.append(image[:, (y1 + y2) // 2, (x1 + x2) // 2])
        return torch.stack(pixels).repeat_interleave(boxes.shape[1], dim=0)[:, None]


class KnowsTheCorners(StandIn):
    """Features are the corners of the box that is asked for, and no picture."""

    def features(self, images, boxes):
        return boxes.flatten(0, 1)[:, None]


@pytest.fixture(scope="module")
def lights(tmp_path_factory):
    """Images of one colour each, of three classes; every second one, the background of others, is black."""
    folder = tmp_path_factory.mktemp("lights")
    colours = torch.tensor([[230, 40, 40], [40, 230, 40], [40, 40, 230]])
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 240), ("val", 120)):
        for i in range(count):
            place = folder / split / f"class{i % 3}"
            os.makedirs(place, exist_ok=True)
            colour = (colours[i % 3] + torch.randint(-20, 21, (3,), generator=generator)).byte()
            image = colour[:, None, None].repeat(1, 70, 70)
            torchvision.io.write_png(image, str(place / f"{i}.png"))
    return folder


@pytest.fixture
def loose(lights, tmp_path, monkeypatch):
    """loose(net): the line of `loose`. Backgrounds are black, so that the nets above find what was pasted."""
    def run(net, *more):
        paste = insloc.paste
        monkeypatch.setattr(weights, "C4Encoder", net)
        monkeypatch.setattr(probe_box, "paste", lambda background, *where: paste(0 * background, *where))
        monkeypatch.setattr(weights.Pixels, "forward", lambda self, images: images.float() / 255)
        argv = ["--image-size", 64, "--protocol", "loose", "--out", tmp_path / net.__name__, *more]
        line, = probe(probe_box, "random", lights, *argv)["lines"]
        return line
    return run


def test_who_is_told_the_pasted_box_explains_all_of_the_offsets(loose, lights):
    line = loose(ToldThePastedBox)
    assert line["offsets"] == pytest.approx(1, abs=1e-4)
    assert line["offsets_beyond_corners"] == pytest.approx(1, abs=1e-3)
    assert len(line["examples"]) == 8
    args = probe_box.get_args(["random", str(lights), "--device", "cpu", "--image-size", "64"])
    val = probe_box.find_data(args)[0]["loose"][1]
    for item, pasted, loose_box, corrected in line["examples"]:
        assert [pasted, loose_box] == val[item][1][:2].tolist()
        assert corrected == pytest.approx(pasted, abs=0.1) and loose_box != pytest.approx(pasted, abs=1)


def test_who_is_blind_to_the_border_explains_nothing_and_names_the_class(loose):
    line = loose(BlindToTheBorder)
    for key in ("offsets", "offsets_beyond_corners"):
        assert -0.1 < line[key] < 0.02                              # below 0: what does not hold on new data
    assert line["cosine"] == pytest.approx(1, abs=1e-3)
    assert line["class_own"] == line["class_loose"] == line["class_loose_trained"] == 100


def test_who_knows_the_corners_alone_explains_something_and_nothing_beyond_them(loose):
    """Anchors are few, so their corners tell much: the reason for the figure beyond them."""
    line = loose(KnowsTheCorners)
    assert 0.2 < line["offsets"] <= line["offsets_by_corners"] + 0.01
    assert abs(line["offsets_beyond_corners"]) < 0.03
    assert line["class_loose"] < 50                                                     # chance is a third


def test_chance_of_class_is_the_largest_class(loose):
    line = loose(KnowsTheCorners)
    assert line["class_chance"] == pytest.approx(100 / 3, abs=5)            # of the pictures that are left
    assert line["pictures"] + line["left_out"] == 240


def test_without_class_folders_no_class_is_asked(patterns, tmp_path):
    argv = [*MANY, "--protocol", "loose", "--out", tmp_path]
    os.makedirs(tmp_path / "data")
    for split in ("train", "val"):
        os.symlink(patterns / "val", tmp_path / "data" / split)
    line, = probe(probe_box, *NARROW, tmp_path / "data", *argv)["lines"]
    assert "cosine" in line and not any("class" in key for key in line)


# ---- loose: parts against second implementations ---------------------------------------------------------

def some_boxes(n, seed):
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed)) * 90
    low, high = corners.amin(dim=1), corners.amax(dim=1) + 5
    return torch.cat([low, high], dim=1)


def test_offsets_are_those_of_torchvisions_detectors_and_lead_back():
    loose, pasted = some_boxes(200, 0), some_boxes(200, 1)
    offsets = probe_box.offsets_between(loose, pasted)
    expected = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(pasted, loose)
    assert torch.allclose(offsets.float(), expected, atol=1e-5)
    assert torch.allclose(probe_box.moved_by(loose, offsets).float(), pasted, atol=1e-3)


def test_loose_boxes_are_anchors_that_overlap(patterns):
    dataset = composites([str(patterns / "val" / f"{i}.png") for i in range(20)])
    anchors = {tuple(anchor) for anchor in insloc.grid_anchors(64).tolist()}
    different = set()
    for item in range(40):
        boxes = dataset[item][1]
        assert boxes.shape == (1 + probe_box.LOOSE, 4)
        box = boxes[0].tolist()
        of_anchors = {anchor: iou_by_hand(box, anchor) for anchor in anchors}
        for other in map(tuple, boxes[1:].tolist()):
            assert of_anchors[other] > 0.5 or of_anchors[other] == max(of_anchors.values()) <= 0.5
            different.add(other)
    assert len(different) > 15


def iou_by_hand(a, b):
    both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(area) - both)


def test_ridge_is_what_gradient_descent_finds():
    """The stationary point of the penalised mean square, at the strength that the held-out rows choose."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 2, 3, 1, 1, 0.1]) + 4
    y = x[:, :2] @ torch.randn(2, 3, generator=generator, dtype=torch.float64)
    y += 3 * torch.randn(120, 3, generator=generator, dtype=torch.float64)
    layer = probe_box.ridge(x, y, 20)
    errors = {}
    for strength in probe_box.STRENGTHS:
        penalty = strength * x[20:].var(dim=0, correction=0).mean()
        weight = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-12,
                                      tolerance_change=1e-16, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            rest = x[20:] @ weight.T + bias - y[20:]
            loss = rest.square().sum(dim=1).mean() + penalty * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)
        errors[strength] = (x[:20] @ weight.T + bias - y[:20]).square().mean().item(), weight, bias
    _, weight, bias = min(errors.values(), key=lambda found: found[0])
    assert torch.allclose(layer.weight, weight, atol=1e-5) and torch.allclose(layer.bias, bias, atol=1e-4)


def test_more_features_than_rows_are_no_fault():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 100, generator=generator, dtype=torch.float64)
    x[:, 50:] = 0                                                           # features that never fire
    layer = probe_box.ridge(x, x[:, :2], 6)
    assert layer.weight.isfinite().all() and probe_box.explained(x[6:, :2], layer(x[6:])) > 0.9


def test_explained_against_a_loop():
    generator = np.random.default_rng(0)
    y, guess = generator.normal(size=(2, 50, 4))
    expected = []
    for k in range(4):
        rest = sum((y[i, k] - guess[i, k]) ** 2 for i in range(50))
        spread = sum((y[i, k] - y[:, k].mean()) ** 2 for i in range(50))
        expected.append(1 - rest / spread)
    y, guess = torch.tensor(y), torch.tensor(guess)
    assert probe_box.explained(y, guess) == pytest.approx(np.mean(expected))
    assert probe_box.explained(y, y) == 1 and probe_box.explained(y, y.mean(dim=0)) == pytest.approx(0)


def test_rows_of_loose_boxes_by_hand():
    """Two pictures with a true box and three loose ones each; a canvas has 64 pixels."""
    features = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    boxes = some_boxes(8, 0).view(2, 4, 4)
    rows = zip(*probe_box.loose_rows(features, boxes, 64), strict=True)
    for row, (x, terms, offsets) in enumerate(rows):
        picture, box = divmod(row, 3)
        corners = [side / 64 for side in boxes[picture, 1 + box].tolist()]
        products = [corners[i] * corners[j] for i in range(4) for j in range(i, 4)]
        assert x.tolist() == features[picture, 1 + box].tolist()
        assert terms.tolist() == pytest.approx([*corners, *products])
        expected = probe_box.offsets_between(boxes[picture, 1 + box], boxes[picture, 0])
        assert offsets.tolist() == expected.tolist()
    assert row == 5


@pytest.mark.parametrize("seed", [0, 1])
def test_a_layer_on_features_that_are_all_the_same_gives_the_mean(seed):
    torch.manual_seed(seed)
    y = torch.rand(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = probe_box.ridge(torch.full((40, 3), 0.0, dtype=torch.float64), y, 4)
    torch.testing.assert_close(layer(torch.zeros(1, 3, dtype=torch.float64))[0], y[4:].mean(dim=0))


def test_class_scores_against_a_loop():
    """Means of two well separated classes: the loose boxes of picture 0 look like the other class's.

    Where all loose boxes do, a layer that was trained on them is right, and the one of own boxes wrong.
    """
    generator = torch.Generator().manual_seed(0)
    names = ["cat", "dog"] * 20
    centre = torch.tensor([[5.0, 0, 0], [0, 5, 0]]).repeat(20, 1)[:, None]
    features = centre + 0.1 * torch.randn(40, 1 + probe_box.LOOSE, 3, generator=generator)
    features[0, 1:] = features[1, 1:]
    found = probe_box.class_scores(features, names, features[:15], names[:15])
    assert found == {"class_own": 100, "class_loose": pytest.approx(100 * 14 / 15),
                     "class_loose_trained": pytest.approx(100 * 14 / 15),
                     "class_chance": pytest.approx(100 * 8 / 15)}
    features[:, 1:] = features[:, 1:].roll(1, dims=0)
    found = probe_box.class_scores(features, names, features[2:17], names[2:17])
    assert (found["class_own"], found["class_loose"], found["class_loose_trained"]) == (100, 0, 100)
    assert probe_box.class_scores(features, [""] * 40, features, [""] * 40) == {}


def test_batchnorms_statistics_are_averages_over_the_batches():
    net = insloc.C4Encoder("narrow18", roi_size=4).eval().requires_grad_(False)
    net.pixels = weights.Pixels(weights.random_weights())
    images = torch.randint(256, (3, 4, 3, 64, 64), dtype=torch.uint8)
    boxes = torch.tensor([[[0.0, 0, 32, 32], [32, 32, 64, 64]]]).expand(4, 2, 4)
    layers = (net.resnet.bn1, net.resnet.layer4[0].bn1)                     # of the picture, of its first box
    inputs = {layer: [] for layer in layers}
    for layer in layers:
        layer.register_forward_hook(lambda module, given, result: inputs[module].append(given[0]))
    probe_box.estimate_batchnorm(net, [(batch, boxes) for batch in images])
    assert not net.training
    for layer in layers:
        means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs[layer]])
        variances = torch.stack([x.var(dim=(0, 2, 3)) for x in inputs[layer]])
        assert len(means) == 3
        torch.testing.assert_close(layer.running_mean, means.mean(dim=0))
        torch.testing.assert_close(layer.running_var, variances.mean(dim=0))


# ---- boxes -----------------------------------------------------------------------------------------------

@pytest.fixture
def real(patterns, tmp_path):
    """Two COCO jsons of the patterns, 80 x 80: in each two boxes of half to three quarters of its sides."""
    rng = np.random.default_rng(0)
    paths = []
    for split, first, count in (("train", 0, 30), ("val", 30, 31)):
        images = [{"id": i, "file_name": f"{i}.png"} for i in range(first, first + count)]
        annotations = []
        for i in [*range(first, first + count)] * 2:
            w, h = rng.integers(40, 61, 2).tolist()
            box = [rng.integers(81 - w).item(), rng.integers(81 - h).item(), w, h]
            annotations.append({"image_id": i, "bbox": box, "category_id": 3 + i % 2, "iscrowd": 0})
        annotations.append({"image_id": first, "bbox": [0, 0, 80, 80], "category_id": 3, "iscrowd": 1})
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations}))
        paths += [path, patterns / "val"]
    return paths


def test_real_boxes_are_scaled_with_their_photographs(real):
    entries = probe_box.read_boxes(*map(str, real[:2]), 60)
    with open(real[0]) as f:
        annotations = json.load(f)["annotations"]
    assert len(entries) == 60                                               # the crowd is left out
    with pytest.raises(probe_box.stage.Refusal, match="has 60 boxes; 61 are needed"):       # for 60 processes
        probe_box.read_boxes(*map(str, real[:2]), 61)
    dataset = probe_box.Boxes(entries, 64, 0, "boxes")
    for item in range(60):
        image, boxes = dataset[item]
        x, y, w, h = (side * 64 / 80 for side in annotations[item]["bbox"])
        assert image.shape == (3, 64, 64) and boxes[0].tolist() == pytest.approx([x, y, x + w, y + h])


def test_a_box_of_a_photograph_that_is_not_square(tmp_path):
    photo = torch.zeros(3, 80, 120, dtype=torch.uint8)
    photo[:, 20:60, 30:90] = 255
    torchvision.io.write_png(photo, str(tmp_path / "a.png"))
    dataset = probe_box.Boxes([(str(tmp_path / "a.png"), 1, (30.0, 20.0, 90.0, 60.0), None)], 64, 0, "boxes")
    image, boxes = dataset[0]
    assert boxes[0].tolist() == [16, 16, 48, 48]
    assert image[:, 18:46, 18:46].min() == 255 and image[:, :14].max() == image[:, :, 50:].max() == 0


def test_a_photographs_boxes_stay_together():
    """So none of them is among those that choose a linear layer's strength while another trains the layer."""
    split = [(f"{i % 7}.jpg", 1, (0, 0, i, i), None) for i in range(70)]
    chosen = probe_box.some_of(split, 35, 0, "boxes")
    photos = [entry[0] for entry in chosen]
    assert len(chosen) == 34 and len(set(chosen)) == 34
    assert len([photo for photo, before in zip(photos, ["", *photos]) if photo != before]) == 4
    assert photos != [entry[0] for entry in probe_box.some_of(split, 35, 1, "boxes")]


def test_real_boxes_have_the_same_figures_and_a_picture(real, few, tmp_path):  # noqa: F811
    result = probe(probe_box, *NARROW, few, *MANY, "--boxes", *real, "--out", tmp_path / "out")
    swap, loose, boxes = result["lines"]
    assert [swap["protocol"], loose["protocol"], boxes["protocol"]] == ["swap", "loose", "boxes"]
    assert boxes.keys() == loose.keys() and boxes["class_chance"] == pytest.approx(50, abs=10)
    for name in ("swap", "loose", "boxes"):
        assert torchvision.io.read_image(str(tmp_path / "out" / f"{name}.png")).shape[0] == 3


def test_labels_with_other_pictures_are_another_run(real, few):  # noqa: F811
    def digest():
        return probe_box.find_data(probe_box.get_args(argv))[1]

    argv = [str(word) for word in ("random", few, "--device", "cpu", *SIZES, "--boxes", *real)]
    before = digest()
    assert digest() == before
    real[0].write_text(real[0].read_text().replace('"1.png"', '"2.png"'))
    assert digest() != before


def test_too_few_images_are_refused_before_anything_is_measured(few, tmp_path, refusal):  # noqa: F811
    argv = ["--image-size", 64, "--images", 9, "--out", tmp_path / "out"]
    assert "at least 10" in refusal(probe_box, *NARROW, few, *argv)


@pytest.mark.parametrize("content, said", [
    ("", "no COCO json"), ("{}", "KeyError: 'images'"), ("[]", "TypeError"),
    ('{"images": [], "annotations": []}', "has 0 boxes"),
    ('{"images": [{"id": 1, "file_name": "0.png"}], '
     '"annotations": [{"image_id": 1, "bbox": [0, 0, 9, 9], "category_id": "cat"}]}', "ValueError")])
def test_a_json_that_is_none_is_named(content, said, real, few, tmp_path, refusal):  # noqa: F811
    real[2].write_text(content)
    line = refusal(probe_box, *NARROW, few, *SIZES, "--boxes", *real, "--out", tmp_path / "out")
    assert "val.json" in line and said in line


# ---- Processes, resuming, refusals -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def both(patterns, tmp_path_factory):
    """The patterns as train and as val, in two class folders."""
    folder = tmp_path_factory.mktemp("both")
    for i in range(61):
        for split in ("train", "val"):
            os.makedirs(folder / split / f"class{i % 2}", exist_ok=True)
            os.symlink(patterns / "val" / f"{i}.png", folder / split / f"class{i % 2}" / f"{i}.png")
    return folder


@pytest.mark.slow
def test_an_interrupted_run_resumed_is_the_uninterrupted_one(both, tmp_path, monkeypatch):
    torch.save(insloc.make_resnet("narrow18").state_dict(), tmp_path / "weights.pth")
    argv = [tmp_path / "weights.pth", both, *MANY]
    whole = probe(probe_box, *argv, "--out", tmp_path / "whole")
    save = probe_box.stage.save_checkpoint

    def save_and_die(*state):
        save(*state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(probe_box.stage, "save_checkpoint", save_and_die)
        for _ in range(4):                                                  # two protocols, two nets
            with pytest.raises(Killed):
                probe(probe_box, *argv, "--resume", "--out", tmp_path / "killed")
    assert outcome(probe(probe_box, *argv, "--resume", "--out", tmp_path / "killed")) == outcome(whole)
    for name in ("swap.png", "loose.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_processes_compute_what_one_computes(both, tmp_path):
    one = probe(probe_box, *NARROW, both, *MANY, "--out", tmp_path / "one")["lines"]
    finish(start(probe_box, *NARROW, both, *MANY, "--workers", 1, "--nprocs", 2, "--out", tmp_path / "two"))
    with open(tmp_path / "two" / "results.json") as f:
        two = json.load(f)["lines"]
    for a, b in zip(one, two, strict=True):
        for key, value in a.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-2, abs=1e-2)
            if key != "examples":
                assert b[key] == value, key


def test_features_that_are_not_finite_end_the_run(few, tmp_path, refusal):  # noqa: F811
    state = insloc.make_resnet("narrow18").state_dict()
    state["conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "weights.pth")
    argv = [tmp_path / "weights.pth", few, *SIZES, "--protocol", "swap", "--out", tmp_path / "out"]
    assert "not finite" in refusal(probe_box, *argv)


@pytest.mark.parametrize("argv", [
    ["--protocol", "boxes"], ["--images", "3"], ["--image-size", "100"]], ids=str)
def test_bad_arguments_end_in_one_line(argv, capsys):
    with pytest.raises(SystemExit) as ending:
        probe_box.get_args(["random", "DATA", "--device", "cpu", *argv])
    line = capsys.readouterr().err
    assert ending.value.code == 2 and argv[0] in line and line.count("\n") == 1
