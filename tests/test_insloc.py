"""insloc.py against second implementations: loops, NumPy, Pillow, torchvision, detectron2.

Random checks have fixed seeds and bounds at four to five standard deviations, so that they fail when the code
is wrong and not when a library draws its numbers in another order.
"""
import ast
import collections
import colorsys
import copy
import io
import itertools
import math
import os
import random
import re
import signal

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as V

import insloc
from insloc import (C4Encoder, FPNEncoder, KeyQueue, MakeGroup, PathList, Unreadable, Views, batches,
                    crop_box, generator_for, grid_anchors, info_nce, jitter_boxes, momentum_update, paste,
                    photometric, photometric_params, read_image, roi_pool)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ks(sample, other=None):
    """Kolmogorov-Smirnov distance times sqrt(n), of a sample from U(0, 1) or another; above 2: p < .001."""
    x = np.sort(np.asarray(sample, dtype=np.float64))
    if other is None:
        rank = np.arange(len(x))
        return max((x - rank / len(x)).max(), ((rank + 1) / len(x) - x).max()) * math.sqrt(len(x))
    y = np.sort(np.asarray(other, dtype=np.float64))
    at = np.concatenate([x, y])
    gap = np.abs(np.searchsorted(x, at, "right") / len(x) - np.searchsorted(y, at, "right") / len(y)).max()
    return gap * math.sqrt(len(x) * len(y) / (len(x) + len(y)))


def uneven(counts, cells):
    """Chi-square of counts over `cells` equally likely cells, in its standard deviations; above 5: no."""
    counts = np.asarray(list(counts) + [0] * (cells - len(counts)), dtype=np.float64)
    expected = counts.sum() / cells
    return (((counts - expected) ** 2 / expected).sum() - (cells - 1)) / math.sqrt(2 * (cells - 1))


def iou_of_pairs(a, b):
    """IoU of the boxes of a with those of b, one by one, in float64 NumPy."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    w = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    h = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    both = w.clip(0) * h.clip(0)
    area_a, area_b = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    return both / (area_a + area_b - both)


def paper_boxes(n, rng, size=256, low=128):
    """Boxes as the paper draws them: sides U{low..size}, both included, anywhere in the canvas."""
    w, h = rng.integers(low, size + 1, n), rng.integers(low, size + 1, n)
    x, y = rng.integers(0, size - w + 1), rng.integers(0, size - h + 1)
    return torch.tensor(np.stack([x, y, x + w, y + h], axis=1)).float()


# ----------------------------------------------------------------------------------------------------------
# 1  Sampling and pasting
# ----------------------------------------------------------------------------------------------------------

def test_generators_are_decided_by_their_whole_key():
    def stream(*key):
        return tuple(torch.randint(2 ** 62, (4,), generator=generator_for(*key)).tolist())

    assert stream(0, "sample", 1, 2) == stream(0, "sample", 1, 2)
    keys = [(0, "sample", 1, 2), (0, "sample", 2, 1), (0, "sample", 12), (1, "sample", 1, 2),
            (0, "group", 1, 2), (0, "sample", 1), (0, "sample", 1, 2, 0), ("0", "sample", 1, 2)]
    assert len({stream(*key) for key in keys}) == len(keys)
    assert len({stream(0, "sample", epoch, index) for epoch in range(30) for index in range(100)}) == 3000


def test_generators_of_neighbours_are_unrelated():
    first = np.array([torch.rand(1, generator=generator_for(0, "sample", 0, i)).item() for i in range(4000)])
    assert ks(first) < 2
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / math.sqrt(4000)


def test_generators_are_the_same_in_every_process_and_version():
    # A run that another process resumes goes on with the same draws: no hash() of Python, which is salted.
    assert generator_for(0, "sample", 1, 2).initial_seed() == 7178513459028031028


def slow_crop_box(height, width, scale, ratio, rng):
    """RandomResizedCrop's rule, written again; None where all ten tries fail."""
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        w_over_h = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round((area * w_over_h) ** 0.5), round((area / w_over_h) ** 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (224, 224), (60, 290), (290, 60)])
def test_crops_are_distributed_as_a_slow_sampler_says(height, width):
    generator, rng = seeded(1), np.random.default_rng(1)
    n = 3000
    boxes = [crop_box(height, width, generator=generator) for _ in range(n)]
    slow = [slow_crop_box(height, width, (0.2, 1.0), (0.5, 2.0), rng) for _ in range(n)]
    assert all(type(v) is int for v in boxes[0])
    top, left, h, w = np.array(boxes).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()

    # The fallback, at elongated images: as often as ten failing tries.
    failing = slow.count(None)
    fallback = boxes.count(crop_box(height, width, scale=(4, 5), generator=seeded()))
    assert abs(failing - fallback) <= 5 * math.sqrt(2 * max(failing, 1))
    assert (failing > 100) == (height in (60, 290))

    fell_back = crop_box(height, width, scale=(4, 5), generator=seeded())
    boxes, slow = np.array([b for b in boxes if b != fell_back]), np.array([b for b in slow if b])
    for measure in (lambda b: b[:, 2] * b[:, 3] / (height * width), lambda b: np.log(b[:, 3] / b[:, 2]),
                    lambda b: b[:, 0], lambda b: b[:, 1]):
        assert ks(measure(boxes), measure(slow)) < 2


def test_crop_area_is_uniform_and_aspect_log_uniform():
    # Where nothing is rejected the ranges show undistorted. An uneven range of w / h tells it from h / w.
    generator = seeded(2)
    square = np.array([crop_box(9000, 9000, (0.2, 1.0), (1.0, 1.0), generator) for _ in range(3000)])
    assert (square[:, 2] == square[:, 3]).all()
    assert ks(((square[:, 2] / 9000) ** 2 - 0.2) / 0.8) < 2
    tall = np.array([crop_box(9000, 9000, (0.05, 0.2), (0.25, 1.0), generator) for _ in range(3000)])
    assert ks(1 + np.log(tall[:, 3] / tall[:, 2]) / math.log(4)) < 2
    assert ks((tall[:, 2] * tall[:, 3] / 9000 ** 2 - 0.05) / 0.15) < 2


def test_crop_positions_reach_every_place():
    generator = seeded(3)
    seen = collections.Counter(crop_box(6, 5, (0.25, 0.25), (1.0, 1.0), generator) for _ in range(4000))
    # A quarter of 30 pixels is a square of side 2.74: rounded, not cut off.
    assert set(seen) == {(top, left, 3, 3) for top in range(4) for left in range(3)}
    assert uneven(seen.values(), 12) < 5


@pytest.mark.parametrize("ratio", [(0.5, 2.0), (3 / 4, 4 / 3)])
def test_crop_fallback_is_torchvisions(ratio):
    rng = np.random.default_rng(4)
    sizes = [(1, 1), (20000, 10), (10, 20000), (1, 900), (900, 1), (2, 3), (100, 200), (200, 100), (300, 400)]
    for height, width in sizes + rng.integers(1, 300, (200, 2)).tolist():
        too_large, image = (4.0, 5.0), torch.empty(1, height, width)
        expected = torchvision.transforms.RandomResizedCrop.get_params(image, too_large, ratio)
        assert crop_box(height, width, too_large, ratio, seeded()) == expected
    # These two can only fall back, and a single pixel has one crop.
    assert crop_box(20000, 10, generator=seeded()) == (9990, 0, 20, 10)
    assert crop_box(10, 20000, generator=seeded()) == (0, 9990, 10, 20)
    assert {crop_box(1, 1, generator=seeded(i)) for i in range(50)} == {(0, 0, 1, 1)}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_paste_equals_numpy(dtype):
    rng, size = np.random.default_rng(5), 32
    places = [(0, 0, 32, 32), (0, 0, 1, 1), (31, 31, 1, 1), (0, 12, 16, 20), (16, 0, 16, 32)]
    for _ in range(50):
        h, w = rng.integers(1, size + 1, 2)
        places.append((rng.integers(size - h + 1), rng.integers(size - w + 1), h, w))
    for top, left, h, w in places:
        top, left = int(top), int(left)
        background = torch.tensor(rng.integers(0, 256, (3, size, size))).to(dtype)
        foreground = torch.tensor(rng.integers(0, 256, (h, w, 3))).to(dtype).permute(2, 0, 1)
        before = background.clone(), foreground.clone()
        composite, box = paste(background, foreground, top, left)
        expected = background.numpy().copy()
        for y in range(h):
            for x in range(w):
                expected[:, top + y, left + x] = foreground.numpy()[:, y, x]
        assert composite.dtype == dtype and np.array_equal(composite.numpy(), expected)
        assert box.dtype == torch.float32 and box.tolist() == [left, top, left + w, top + h]
        composite.fill_(7)  # the composite shares no memory with the inputs
        assert torch.equal(background, before[0]) and torch.equal(foreground, before[1])


@pytest.mark.parametrize("top, left", [(-1, 0), (0, -1), (5, 0), (0, 3), (-9, -9), (40, 40)])
def test_paste_refuses_to_leave_the_canvas(top, left):
    with pytest.raises(ValueError, match="leaves the canvas"):
        paste(torch.zeros(3, 8, 8), torch.ones(3, 4, 6), top, left)
    paste(torch.zeros(3, 8, 8), torch.ones(3, 4, 6), 4, 2)              # the last place that fits


# ----------------------------------------------------------------------------------------------------------
# 2  Box jitter
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, stride, sizes, ratios", [
    (256, 16, (32, 64, 128, 256), (0.5, 0.75, 1.0, 1.5, 2.0)), (64, 8, (20,), (0.4, 3.0)),
    (100, 16, (32, 64), (1.0,))])
def test_anchors_equal_a_loop(size, stride, sizes, ratios):
    loop = []
    for y in range(0, size, stride):
        for x in range(0, size, stride):
            for side in sizes:
                for h_over_w in ratios:
                    h, w = side * math.sqrt(h_over_w), side / math.sqrt(h_over_w)
                    loop.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    anchors = grid_anchors(size, stride, sizes, ratios)
    assert anchors.dtype == torch.float32 and anchors.shape == (len(loop), 4)
    assert np.abs(anchors.numpy() - np.array(loop)).max() < 1e-4


@pytest.mark.parametrize("size", [128, 256, 512])
def test_anchors_scale_with_the_canvas(size):
    boxes = paper_boxes(500, np.random.default_rng(size), size=size, low=size // 2)
    matches = torchvision.ops.box_iou(boxes, grid_anchors(size)) > 0.5
    assert matches.any(dim=1).float().mean() > 0.99


def test_needs_lines_name_what_a_piece_uses():
    """A piece copied out of the module runs with what its docstring names, and nothing else."""
    with open(insloc.__file__) as f:
        tree = ast.parse(f.read())
    top = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for name, node in top.items():
        used = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} & top.keys() - {name}
        needs = (ast.get_docstring(node) or "").partition("needs:")[2]
        assert used == set(re.findall(r"\w+", needs)) & top.keys(), name


def test_default_anchors_are_the_releases():
    anchors = grid_anchors()
    assert anchors.shape == (5120, 4)
    inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] <= 256).all(dim=1)
    assert inside.sum() == 2064
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centre[0].abs().max() < 1e-4 and (centre[-1] - 240).abs().max() < 1e-4
    assert round(anchors.min().item()) == -181 and round(anchors.max().item()) == 421
    assert torch.equal(anchors, grid_anchors(256, 16, (32, 64, 128, 256), (0.5, 0.75, 1.0, 1.5, 2.0)))


def test_jittered_boxes_overlap_by_557_on_average():
    rng, generator, anchors = np.random.default_rng(6), seeded(6), grid_anchors()
    boxes = paper_boxes(30000, rng)
    chosen = torch.cat([jitter_boxes(b, anchors, generator=generator) for b in boxes.split(500)])
    assert (anchors[:, None] == chosen[:50]).all(dim=2).any(dim=0).all()    # anchors, not something else
    iou = iou_of_pairs(boxes, chosen)
    assert iou.min() > 0.5 - 1e-6  # none without a match (float32 anchors)
    assert abs(iou.mean() - 0.557) < 0.01
    slow = []                                                           # all of it again, box by box
    for box in boxes[:3000]:
        matches = iou_of_pairs(anchors, box)
        slow.append(rng.choice(matches[matches > 0.5]))
    assert ks(iou, slow) < 2
    sticks_out = ((chosen[:, :2] < 0) | (chosen[:, 2:] > 256)).any(dim=1).float().mean()
    assert abs(sticks_out - 0.64) < 0.02                                # not clipped


@pytest.mark.parametrize("h, w", [(256, 128), (128, 256)])
def test_the_two_boxes_on_the_knife_edge_get_a_good_anchor(h, w):
    # Area 32768: the best anchors of sizes 128 and 256 overlap these by exactly one half, but for rounding.
    y, x = (torch.arange(0, 256 - side + 1).float() for side in (h, w))
    y, x = y.expand(max(len(x), len(y))), x.expand(max(len(x), len(y)))
    boxes = torch.stack([x, y, x + w, y + h], dim=1)
    for seed in range(5):
        chosen = jitter_boxes(boxes, grid_anchors(), generator=seeded(seed))
        assert iou_of_pairs(boxes, chosen).min() > 0.5 - 1e-6


def test_jitter_chooses_uniformly_among_the_matches_and_nothing_else():
    anchors = grid_anchors(64, 8, (16, 24, 32, 64))
    box = torch.tensor([5.0, 9.0, 60.0, 58.0])
    matching = {i for i, anchor in enumerate(anchors) if iou_of_pairs(anchor, box) > 0.5}
    assert len(matching) > 20
    chosen = jitter_boxes(box.expand(15000, 4), anchors, generator=seeded(7))
    index = {tuple(anchor): i for i, anchor in enumerate(anchors.tolist())}
    counts = collections.Counter(index[tuple(anchor)] for anchor in chosen.tolist())
    assert set(counts) == matching
    assert abs(uneven(counts.values(), len(matching))) < 5


def test_jitter_wants_more_than_the_threshold_and_falls_back_to_the_best():
    box = torch.tensor([[0.0, 0.0, 4.0, 1.0]]).expand(300, 4)
    half, most, far = [0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 3.0, 1.0], [9.0, 9.0, 10.0, 10.0]
    anchors = torch.tensor([far, half, most])
    assert (jitter_boxes(box, anchors, generator=seeded()) == torch.tensor(most)).all()  # .5 is no match
    both = {tuple(chosen) for chosen in jitter_boxes(box, anchors, 0.49, seeded()).tolist()}
    assert both == {tuple(half), tuple(most)}
    assert (jitter_boxes(box, anchors, 0.8, seeded()) == torch.tensor(most)).all()  # the best one
    assert (jitter_boxes(box, anchors[:2], 0.8, seeded()) == torch.tensor(half)).all()
    # Each box by itself: one with a match beside one without.
    two = torch.tensor([[0.0, 0.0, 4.0, 1.0], [8.0, 8.0, 9.5, 9.5]])
    assert jitter_boxes(two, anchors, 0.6, seeded()).tolist() == [most, far]


# ----------------------------------------------------------------------------------------------------------
# 3  Photometric augmentation
# ----------------------------------------------------------------------------------------------------------

def all_off(n):
    return {"order": torch.arange(4).repeat(n, 1), "brightness": torch.full((n,), 0.7),
            "contrast": torch.full((n,), 1.3), "saturation": torch.full((n,), 0.6),
            "hue": torch.full((n,), 0.08), "sigma": torch.zeros(n),
            "jitter": torch.zeros(n, dtype=torch.bool), "gray": torch.zeros(n, dtype=torch.bool),
            "flip": torch.zeros(n, dtype=torch.bool)}


def test_photometric_params_have_moco_v2s_probabilities_and_ranges():
    n = 20000
    params = photometric_params(n, seeded(8))
    assert set(params) == set(all_off(1))
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        assert params[name].shape == (n,) and ks((params[name] - low) / (high - low)) < 2
    blurred = params["sigma"] > 0
    assert ks((params["sigma"][blurred] - 0.1) / 1.9) < 2
    switches = {"jitter": (params["jitter"], 0.8), "gray": (params["gray"], 0.2),
                "flip": (params["flip"], 0.5), "blur": (blurred, 0.5)}
    for name, (on, p) in switches.items():
        assert on.dtype == torch.bool and on.shape == (n,)
        assert abs(on.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n), name
    assert params["order"].dtype == torch.long
    orders = collections.Counter(map(tuple, params["order"].tolist()))
    assert set(orders) == set(itertools.permutations(range(4))) and uneven(orders.values(), 24) < 5
    # No draw tells anything of another.
    columns = [params[name] for name in ranges] + [on for on, _ in switches.values()]
    columns.append(params["order"][:, 0])
    related = np.corrcoef(np.stack([column.numpy().astype(float) for column in columns]))
    assert np.abs(related - np.eye(9)).max() < 5 / math.sqrt(n)
    again, other = photometric_params(n, seeded(8)), photometric_params(n, seeded(9))
    assert all(torch.equal(params[k], again[k]) and not torch.equal(params[k], other[k]) for k in params)


def colour_by_torchvision(image, params, i):
    """Jitter and grayscale of sample i on an image of its own."""
    operations = ((V.adjust_brightness, "brightness"), (V.adjust_contrast, "contrast"),
                  (V.adjust_saturation, "saturation"), (V.adjust_hue, "hue"))
    for turn in params["order"][i].tolist() if params["jitter"][i] else ():
        function, name = operations[turn]
        if name != "hue" or params["hue"][i] != 0:  # torchvision's way to HSV and back costs 6e-7
            image = function(image, params[name][i].item())
    return V.rgb_to_grayscale(image, num_output_channels=3) if params["gray"][i] else image


def slow_blur(image, sigma):
    """17 x 17 taps, those outside the image dropped and the others renormalised: in float64, tap by tap."""
    x, (height, width) = image.numpy().astype(np.float64), image.shape[1:]
    total, weights = np.zeros_like(x), np.zeros((height, width))
    for dy in range(-8, 9):
        for dx in range(-8, 9):
            weight = math.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma))
            to_y, to_x = slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))
            from_y, from_x = slice(max(0, dy), height - max(0, -dy)), slice(max(0, dx), width - max(0, -dx))
            if to_y.start < to_y.stop and to_x.start < to_x.stop:
                total[:, to_y, to_x] += weight * x[:, from_y, from_x]
                weights[to_y, to_x] += weight
    return torch.from_numpy(total / weights).to(image.dtype)


def photometric_by_parts(images, params, boxes):
    """Sample by sample, the crop of the box as an image of its own, pasted back."""
    expected = images.clone()
    for i, (x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
        crop = colour_by_torchvision(images[i, :, y1:y2, x1:x2], params, i)
        if params["sigma"][i] > 0:
            crop = slow_blur(crop, params["sigma"][i].item())
        expected[i, :, y1:y2, x1:x2] = V.horizontal_flip(crop) if params["flip"][i] else crop
    return expected


def hard_images(n, height, width, dtype, seed):
    """Noise, grays, few levels with ties between the channels, black, white: what clamps and hue meet."""
    generator = seeded(seed)
    images = torch.rand(n, 3, height, width, generator=generator, dtype=torch.float64)
    few = torch.randint(0, 4, (n, 3, height, width), generator=generator) / 3
    gray = torch.rand(n, 1, height, width, generator=generator, dtype=torch.float64).expand(-1, 3, -1, -1)
    kind = torch.randint(0, 3, (n, 1, height, width), generator=generator)
    images = torch.where(kind == 0, images, torch.where(kind == 1, few.double(), gray))
    # Each image has its own level, else a mean over the whole batch would pass for the mean of one.
    return (images * torch.linspace(0.3, 1, n, dtype=torch.float64)[:, None, None, None]).to(dtype)


ROUNDING = {torch.float32: 3e-6, torch.float64: 1e-12}
WITH_HUE = {torch.float32: 5e-6, torch.float64: 5e-6}                   # torchvision's hue is float32 in part


def close(a, b, tolerance):
    return a.dtype == b.dtype and a.shape == b.shape and (a - b).abs().max().item() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operation", [
    "brightness", "contrast", "saturation", "hue", "gray", "flip", "sigma", "none"])
def test_each_operation_alone_equals_torchvision(operation, dtype):
    n, height, width = 12, 40, 44
    images = hard_images(n, height, width, dtype, seed=10)
    boxes = paper_boxes(n, np.random.default_rng(10), size=40, low=20)
    params, drawn = all_off(n), photometric_params(n, seeded(10))
    # Factors of 1 and a hue of 0 make the other three of the jitter do nothing.
    params.update({name: torch.ones(n) for name in ("brightness", "contrast", "saturation")})
    params["hue"] = torch.zeros(n)
    params["order"] = drawn["order"]
    if operation in ("gray", "flip"):
        params[operation] = torch.arange(n) % 2 == 0
    elif operation == "sigma":
        params["sigma"] = torch.linspace(0.1, 2.0, n)
    elif operation != "none":
        params[operation], params["jitter"] = drawn[operation], torch.arange(n) % 3 != 0
    before, result = images.clone(), photometric(images, params, boxes)
    assert torch.equal(images, before) and torch.equal(result[1], boxes)
    expected = photometric_by_parts(images, params, boxes)
    assert close(result[0], expected, (WITH_HUE if operation == "hue" else ROUNDING)[dtype])
    if operation in ("flip", "none"):
        assert torch.equal(result[0], expected)                        # moved or left, not computed
    if operation == "none":
        assert torch.equal(result[0], images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_24_orders_equal_torchvision(dtype):
    orders = list(itertools.permutations(range(4)))
    images = hard_images(24, 24, 30, dtype, seed=11)
    boxes = paper_boxes(24, np.random.default_rng(11), size=24, low=10)
    params = photometric_params(24, seeded(11))
    params.update(order=torch.tensor(orders), jitter=torch.ones(24, dtype=torch.bool))
    params["brightness"][::2], params["contrast"][::3] = 1.4, 0.6       # the ends of the ranges, which clamp
    params["gray"], params["sigma"] = torch.zeros(24, dtype=torch.bool), torch.zeros(24)
    result = photometric(images, params, boxes)[0]
    assert close(result, photometric_by_parts(images, params, boxes), WITH_HUE[dtype])
    # The order matters on these images: with the orders turned round the outcome is another one.
    params["order"] = params["order"].flip(1)
    assert (photometric(images, params, boxes)[0] - result).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_at_once_equals_the_parts_and_leaves_the_outside_alone(dtype):
    n, height, width = 48, 36, 40
    images, params = hard_images(n, height, width, dtype, seed=12), photometric_params(n, seeded(12))
    boxes = paper_boxes(n, np.random.default_rng(12), size=36, low=5)
    boxes[:5] = torch.tensor([
        [0, 0, 40, 36], [39, 35, 40, 36], [0, 0, 1, 36], [0, 35, 40, 36], [20, 10, 40, 36]])
    result, same_boxes = photometric(images, params, boxes)
    assert result.dtype == dtype and torch.equal(same_boxes, boxes)
    assert close(result, photometric_by_parts(images, params, boxes), WITH_HUE[dtype])
    for i, (x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
        outside = torch.ones(height, width, dtype=torch.bool)
        outside[y1:y2, x1:x2] = False
        assert torch.equal(result[i][:, outside], images[i][:, outside])
    # Nor does the outside tell on the inside: another background, the same foreground to the bit.
    x, y = torch.arange(width), torch.arange(height)[:, None]
    inside = ((x >= boxes[:, 0, None, None]) & (x < boxes[:, 2, None, None])
              & (y >= boxes[:, 1, None, None]) & (y < boxes[:, 3, None, None]))[:, None]
    elsewhere = photometric(torch.where(inside, images, 1 - images), params, boxes)[0]
    assert close(torch.where(inside, elsewhere, 0), torch.where(inside, result, 0), ROUNDING[dtype])
    # Memory order is no matter, and neither is the company in the batch.
    other_order = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(photometric(other_order, params, boxes)[0], result)
    for i in range(0, n, 7):
        alone = photometric(images[i:i + 1], {k: v[i:i + 1] for k, v in params.items()}, boxes[i:i + 1])[0]
        assert close(alone, result[i:i + 1], ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_boxes_the_whole_images_are_augmented(dtype):
    images, params = hard_images(32, 20, 28, dtype, seed=13), photometric_params(32, seeded(13))
    result, boxes = photometric(images, params)
    assert boxes is None
    whole = torch.tensor([0.0, 0, 28, 20]).expand(32, 4)
    assert close(result, photometric_by_parts(images, params, whole), WITH_HUE[dtype])
    assert close(result, photometric(images, params, whole)[0], ROUNDING[dtype])


def test_hue_equals_colorsys_in_float64():
    pixels = hard_images(6, 5, 7, torch.float64, seed=15)
    turns = torch.tensor([-0.5, -0.1, -0.03, 0.0, 0.08, 0.5], dtype=torch.float64)
    params = dict(all_off(6), jitter=torch.ones(6, dtype=torch.bool), hue=turns)
    params.update({name: torch.ones(6) for name in ("brightness", "contrast", "saturation")})
    result = photometric(pixels, params)[0]
    for i, y, x in itertools.product(range(6), range(5), range(7)):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixels[i, :, y, x].tolist())
        expected = colorsys.hsv_to_rgb((hue + turns[i].item()) % 1, saturation, value)
        assert np.abs(result[i, :, y, x].numpy() - expected).max() < 1e-12


def test_blur_away_from_the_border_is_torchvisions():
    n = 20
    images, params = torch.rand(n, 3, 50, 60, generator=seeded(14), dtype=torch.float64), all_off(n)
    params["sigma"] = torch.linspace(0.1, 2.0, n)
    boxes = torch.tensor([4.0, 3, 56, 45]).expand(n, 4)
    result = photometric(images, params, boxes)[0]
    for i in range(n):
        crop = images[i, :, 3:45, 4:56]
        expected = V.gaussian_blur(crop, [17, 17], [params["sigma"][i].item()] * 2)
        assert close(result[i, :, 3:45, 4:56][:, 8:-8, 8:-8], expected[:, 8:-8, 8:-8], 1e-6)
    # A flat foreground stays flat up to its border, whatever stands around it.
    images[:, :, 3:45, 4:56] = 0.25
    assert close(photometric(images, params, boxes)[0], images, 1e-12)


# ----------------------------------------------------------------------------------------------------------
# 4  Dataset and groups
# ----------------------------------------------------------------------------------------------------------

def test_path_list_reads_like_a_list(tmp_path):
    names = [b"a.jpg", b"two words", b"line\nbreak.jpg", b"\xff\xfe not utf-8.jpg", "ünï/ß".encode(), b"z"]
    paths = PathList([os.fsdecode(name) for name in names], root="/some/where")
    assert len(paths) == 6 and [paths.name(i) for i in range(6)] == names
    assert list(paths) == [os.path.join("/some/where", os.fsdecode(name)) for name in names]
    with pytest.raises(IndexError):
        paths[6]
    assert PathList(["/absolute.jpg", "relative.jpg"], root="/r")[0] == "/absolute.jpg"
    assert list(PathList(["x", "y"])) == ["x", "y"]
    PIL.Image.new("RGB", (3, 2), (9, 8, 7)).save(tmp_path / "x.png")
    odd = os.path.join(os.fsencode(tmp_path), b"\xff \n.png")
    os.rename(tmp_path / "x.png", odd)
    found = PathList([name for name in os.listdir(tmp_path)], root=tmp_path)
    assert read_image(found[0])[:, 0, 0].tolist() == [9, 8, 7]


def test_path_list_digest_tells_lists_apart():
    digest = PathList(["ab", "c"]).digest()
    assert len(digest) == 8 and int(digest, 16) >= 0
    assert digest == PathList(["ab", "c"], root="/elsewhere").digest()
    others = {PathList(paths).digest() for paths in (["a", "bc"], ["abc"], ["c", "ab"], ["ab", "d"])}
    assert len({digest} | others) == 5


def picture(height, width, seed=0):
    """Smooth, so that JPEG keeps it; uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), PIL.Image.Resampling.BICUBIC))


@pytest.mark.parametrize("mode, suffix, tolerance", [
    ("RGB", "jpg", 3), ("L", "jpg", 1), ("CMYK", "jpg", 3), ("RGB", "png", 0), ("L", "png", 0),
    ("RGBA", "png", 0), ("LA", "png", 0), ("P", "png", 0), ("1", "png", 0), ("P", "gif", 0),
    ("RGB", "bmp", 0)])
@pytest.mark.parametrize("height, width", [(33, 50), (1, 1), (1, 70)])
def test_read_image_is_pillows_rgb(tmp_path, mode, suffix, tolerance, height, width):
    path = tmp_path / f"image.{suffix}"
    image = PIL.Image.fromarray(picture(height, width))
    if mode in ("RGBA", "LA"):
        image.putalpha(PIL.Image.fromarray(picture(height, width, 1)[:, :, 0]))
    image.convert(mode).save(path, **({"quality": 90} if suffix == "jpg" else {}))
    read = read_image(path)
    assert read.dtype == torch.uint8 and read.shape == (3, height, width)
    with PIL.Image.open(path) as by_pillow:
        expected = np.asarray(by_pillow.convert("RGB")).astype(int)
    assert np.abs(read.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance


def test_read_image_scales_16_bits_and_ignores_rotation_and_names(tmp_path):
    levels = np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16)
    PIL.Image.fromarray(levels).save(tmp_path / "deep.png")
    read = read_image(tmp_path / "deep.png")
    assert torch.equal(read[0], read[1]) and torch.equal(read[0], read[2])
    assert np.abs(read[0].numpy() - levels / 257).max() <= 1 and read.max() == 255
    image, exif = PIL.Image.fromarray(picture(20, 30)), PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, says the camera
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 20, 30)
    image.save(tmp_path / "png.jpg", format="PNG")                      # ImageNet has a PNG called .JPEG
    assert np.array_equal(read_image(tmp_path / "png.jpg").permute(1, 2, 0).numpy(), picture(20, 30))


def damaged_file(path, kind):
    whole = io.BytesIO()
    PIL.Image.fromarray(picture(64, 64)).save(whole, format="PNG" if kind == "png" else "JPEG", quality=95)
    whole = whole.getvalue()
    half = whole[:len(whole) // 2]
    content = {"text": b"not an image\n" * 20, "empty": b"", "half": half, "png": half, "header": whole[:15],
               "start": whole[:3]}[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", [
    "text", "empty", "half", "header", "start", "png", "missing", "folder", "pipe"])
def test_read_image_raises_for_what_is_no_image(tmp_path, kind):
    path = tmp_path / "image.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        damaged_file(path, kind)
    # Nobody writes into the pipe, so that opening it waits: better an error than a test that never ends.
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for ever"))
    signal.alarm(20)
    try:
        with pytest.raises(Exception):
            read_image(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def solid_files(folder, n, height=24, width=30):
    """n files, file i all in the colour (10 i + 5, 0, 0)."""
    for i in range(n):
        PIL.Image.new("RGB", (width, height), (10 * i + 5, 0, 0)).save(folder / f"{i:03}.png")
    return PathList(sorted(os.listdir(folder)), root=folder)


def file_of(colour):
    return (int(colour) - 5) // 10


def ramp_file(folder, height, width):
    """A file whose red is the column and whose green is the row: a crop shows where it was taken."""
    y, x = np.mgrid[:height, :width]
    PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8)).save(folder / "ramp.png")
    return PathList(["ramp.png"], root=folder)


def extent(line, size):
    """First pixel and length of the stretch of a ramp that was resized to `size` pixels, by its middle."""
    low, high = size // 4, size - 1 - size // 4
    step = (line[high] - line[low]) / (high - low)
    return line[low] - (low + 0.5) * step + 0.5, step * size


def test_views_show_random_crops_of_the_stated_ranges(tmp_path):
    height, width = 200, 250
    views = Views(ramp_file(tmp_path, height, width), image_size=128, fg_size=(64, 128))
    boxes = {"view_q": [], "view_k": []}
    for epoch in range(300):
        item = views[epoch, 0, 0, 0]
        for name in boxes:
            view = item[name].numpy().astype(float)
            left, w = extent(view[0].mean(axis=0), view.shape[2])
            top, h = extent(view[1].mean(axis=1), view.shape[1])
            boxes[name].append((top, left, h, w))
    rng = np.random.default_rng(15)
    slow = np.array([slow_crop_box(height, width, (0.2, 1.0), (0.5, 2.0), rng) for _ in range(3000)])
    for found in boxes.values():
        top, left, h, w = np.array(found).T
        assert min(top.min(), left.min()) > -3
        assert (top + h).max() < height + 3 and (left + w).max() < width + 3
        area, aspect = h * w / (height * width), w / h
        assert 0.19 < area.min() < 0.25 and 0.9 < area.max() < 1.04
        assert 0.47 < aspect.min() < 0.6 and 1.6 < aspect.max() < 2.12
        assert ks(area, slow[:, 2] * slow[:, 3] / (height * width)) < 2
        assert ks(np.log(aspect), np.log(slow[:, 3] / slow[:, 2])) < 2
        assert ks(top, slow[:, 0]) < 2.5 and ks(left, slow[:, 1]) < 2.5
    query, key = np.array(boxes["view_q"]), np.array(boxes["view_k"])   # two crops, drawn apart
    assert np.abs(query - key).max(axis=1).min() > 0
    assert all(abs(np.corrcoef(query[:, i], key[:, i])[0, 1]) < 4 / math.sqrt(300) for i in range(4))


def test_view_and_background_equal_pillows_resize(tmp_path, monkeypatch):
    PIL.Image.fromarray(picture(90, 140)).save(tmp_path / "a.png")
    image = PIL.Image.open(tmp_path / "a.png")
    paths = PathList(["a.png"], root=tmp_path)
    monkeypatch.setattr(insloc, "crop_box", lambda *size, ratio, generator: (10, 30, 60, 80))
    item = Views(paths, image_size=48, fg_size=(40, 40))[0, 0, 0, 0]
    for name, part, size in (("view_q", (30, 10, 110, 70), 40), ("background", (0, 0, 140, 90), 48)):
        expected = np.asarray(image.crop(part).resize((size, size), PIL.Image.Resampling.BILINEAR))
        assert np.abs(item[name].permute(1, 2, 0).numpy() - expected.astype(int)).max() <= 1


def test_view_sides_are_uniform_independent_and_include_both_ends(tmp_path):
    views = Views(solid_files(tmp_path, 1), image_size=10, fg_size=(7, 10))
    sizes = {"view_q": collections.Counter(), "view_k": collections.Counter()}
    for epoch in range(800):
        item = views[epoch, 0, 0, 0]
        for name in sizes:
            sizes[name][tuple(item[name].shape[1:])] += 1
    for counts in sizes.values():
        assert set(counts) == set(itertools.product(range(7, 11), repeat=2))
        assert uneven(counts.values(), 16) < 5
    default = Views(PathList(["x"]))
    assert default.fg_size == (128, 256) and default.image_size == 256 and default.ratio == (0.5, 2.0)


@pytest.mark.parametrize("h, w", [(90, 60), (60, 90), (50, 100), (70, 70), (100, 99)])
def test_keep_aspect_fits_the_crop_into_the_drawn_sides(tmp_path, monkeypatch, h, w):
    paths = solid_files(tmp_path, 1, height=100, width=100)
    monkeypatch.setattr(insloc, "crop_box", lambda *size, ratio, generator: (0, 0, h, w))
    views = Views(paths, image_size=256, fg_size=(128, 256), keep_aspect=True)
    image = read_image(paths[0])
    found = np.array([views.crop(image, seeded(seed)).shape[1:] for seed in range(400)])
    assert np.abs(found[:, 0] / found[:, 1] - h / w).max() < 0.02
    # The longer side into the longer drawn one, the shorter into the shorter, as mmcv's imrescale does.
    rng = np.random.default_rng(16)
    drawn = rng.integers(128, 257, (20000, 2))
    long_side = np.minimum(drawn.max(axis=1), drawn.min(axis=1) * max(h, w) / min(h, w))
    assert ks(found.max(axis=1), np.round(long_side)) < 2
    assert found.max() <= 256
    exact = Views(paths, image_size=256, fg_size=(200, 200), keep_aspect=True).crop(image, seeded()).shape[1:]
    assert max(exact) == 200 and abs(min(exact) - 200 * min(h, w) / max(h, w)) <= 0.5


def same_items(a, b):
    def same(x, y):
        return torch.equal(x, y) if torch.is_tensor(x) else x == y

    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)


@pytest.mark.parametrize("backgrounds", [False, True])
def test_items_depend_on_seed_epoch_and_index_alone(tmp_path, backgrounds):
    for i in range(6):
        PIL.Image.fromarray(picture(40, 50, seed=i)).save(tmp_path / f"{i}.png")
    damaged_file(tmp_path / "3.png", "text")
    paths = PathList(sorted(os.listdir(tmp_path)), root=tmp_path)

    def make(seed=0):
        return Views(paths, seed=seed, image_size=32, fg_size=(16, 32), dataset_backgrounds=backgrounds)

    keys = [(epoch, step, group, index)
            for epoch in range(2) for step, group in ((0, 0), (5, 1)) for index in range(6)]
    forward, shuffled = make(), make()
    items = {key: forward[key] for key in keys}
    torch.manual_seed(99)                                               # the global generator is no matter
    random.Random(0).shuffle(keys)
    for key in keys:
        item = shuffled[key]
        assert same_items(item, items[key])
        epoch, step, group, index = key
        assert item["key"] == (step, group)
        other_step = dict(items[epoch, 0, 0, index], key=(step, group))
        assert same_items(item, other_step)  # where in the epoch it comes changes nothing
        for other in (items[1 - epoch, step, group, index], make(seed=1)[key],
                      items[epoch, step, group, (index + 1) % 6]):
            assert not torch.equal(item["view_q"], other["view_q"])
        assert not torch.equal(item["view_q"], item["view_k"])


@pytest.mark.parametrize("kind", ["text", "half", "empty"])
def test_a_damaged_file_is_replaced_and_reported(tmp_path, kind):
    paths = solid_files(tmp_path, 12)
    damaged_file(tmp_path / "004.png", kind)
    views = Views(paths, image_size=32, fg_size=(16, 32))
    sources = set()
    for epoch in range(40):
        item = views[epoch, 0, 0, 4]
        assert item["damaged"] and set(item["damaged"]) == {4} and item["source"] != 4
        sources.add(item["source"])
        for name in ("view_q", "view_k", "background"):                 # all of them of the one replacement
            assert {file_of(c) for c in item[name][0].unique()} == {item["source"]}
    assert len(sources) > 8                                             # anyone, not the neighbour
    assert views[0, 0, 0, 5]["damaged"] == [] and views[0, 0, 0, 5]["source"] == 5


def test_ten_unreadable_files_in_a_row_are_an_error_that_names_one(tmp_path, monkeypatch):
    paths, tries = solid_files(tmp_path, 30), []

    def failing(path, good_after):
        tries.append(path)
        if len(tries) <= good_after:
            raise OSError("broken")
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(insloc, "read_image", lambda path: failing(path, good_after=9))
    assert len(Views(paths, image_size=16, fg_size=(8, 16))[0, 0, 0, 7]["damaged"]) == 9
    tries.clear()
    monkeypatch.setattr(insloc, "read_image", lambda path: failing(path, good_after=10))
    with pytest.raises(Unreadable) as error:
        Views(paths, image_size=16, fg_size=(8, 16))[0, 0, 0, 7]
    assert len(tries) == 10 and tries[-1] in str(error.value)


def test_without_fg_size_views_fill_the_canvas(tmp_path):
    item = Views(ramp_file(tmp_path, 150, 200), image_size=40, fg_size=None, ratio=(3 / 4, 4 / 3))[0, 0, 0, 0]
    assert item["view_q"].shape == item["view_k"].shape == (3, 40, 40)
    assert not any("background" in name for name in item)


def test_dataset_backgrounds_are_two_other_images_uniformly(tmp_path):
    views = Views(solid_files(tmp_path, 6), image_size=16, fg_size=(8, 16), dataset_backgrounds=True)
    pairs = collections.Counter()
    for epoch in range(600):
        item = views[epoch, 0, 0, 2]
        assert "background" not in item
        assert {file_of(c) for c in item["view_q"][0].unique()} == {2}
        pairs[tuple(file_of(item[name][0].unique().item()) for name in ("background_q", "background_k"))] += 1
        assert item["background_q"].shape == item["background_k"].shape == (3, 16, 16)
    assert set(pairs) == set(itertools.permutations([0, 1, 3, 4, 5], 2))
    assert uneven(pairs.values(), 20) < 5
    damaged_file(tmp_path / "003.png", "text")
    items = [views[epoch, 0, 0, 2] for epoch in range(30)]
    assert {i for item in items for i in item["damaged"]} == {3}
    for item in items:
        parts = [item[name] for name in ("view_q", "background_q", "background_k")]
        shown = {file_of(part[0].unique().item()) for part in parts}
        assert len(shown) == 3 and 3 not in shown
    for i in (0, 3, 4, 5):  # two images are left: no third to be found
        damaged_file(tmp_path / f"{i:03}.png", "text")
    with pytest.raises(Unreadable):
        views[0, 0, 0, 2]


# Samples of solid colours: red says which sample, green which part (0 ground, 100 query's view, 200 key's).

def solid_sample(i, size=32, source=None):
    def part(green, h, w):
        return torch.tensor([i, green, 0], dtype=torch.uint8)[:, None, None].repeat(1, h, w)

    (hq, wq), (hk, wk) = np.random.default_rng(i).integers(size // 2, size, (2, 2)).tolist()
    return {"view_q": part(100, hq, wq), "view_k": part(200, hk, wk), "background": part(0, size, size),
            "source": i if source is None else source, "damaged": [], "key": (0, 0)}


def inside_mask(box, size):
    x1, y1, x2, y2 = (int(v) for v in box)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_groups_paste_each_view_on_another_samples_background():
    size, samples = 32, [solid_sample(i) for i in range(8)]
    make, offsets = MakeGroup(image_size=size), collections.Counter()
    for step in range(60):
        group = make([dict(s, key=(step, 3)) for s in samples])
        behind = np.empty((8, 2), dtype=int)
        for side, (name, view, green) in enumerate((("query", "view_q", 100), ("key", "view_k", 200))):
            images, boxes = group[name]["images"], group[name]["boxes"]
            assert images.dtype == torch.uint8 and images.shape == (8, 3, size, size)
            assert images.is_contiguous(memory_format=torch.channels_last)
            for i in range(8):
                x1, y1, x2, y2 = boxes[i].tolist()
                assert 0 <= x1 and 0 <= y1 and x2 <= size and y2 <= size
                assert (y2 - y1, x2 - x1) == samples[i][view].shape[1:]
                mask = inside_mask(boxes[i], size)
                assert (images[i][:, mask] == torch.tensor([i, green, 0])[:, None]).all()
                outside = images[i][:, ~mask]
                assert (outside[1] == 0).all() and len(outside[0].unique()) == 1
                behind[i, side] = outside[0, 0]
        assert (behind != np.arange(8)[:, None]).all()                  # never the sample itself
        assert (behind[:, 0] != behind[:, 1]).all()                     # never the same for query and key
        offsets.update((side, (behind[i, side] - i) % 8) for i in range(8) for side in range(2))
    for side in range(2):  # any other, and not always the neighbour
        assert uneven([offsets[side, offset] for offset in range(1, 8)], 7) < 5


def test_group_backgrounds_are_uniform_over_the_other_images():
    counts = collections.Counter()
    # 1 and 2 show one image: a replaced file.
    generator, source = seeded(17), [40, 7, 7, 13, 99]
    for _ in range(1500):
        chosen = MakeGroup.choose_backgrounds(source, generator)
        for i, (query, key) in enumerate(chosen):
            assert len({source[i], source[query], source[key]}) == 3
        counts[tuple(chosen[0])] += 1
    # The query's: a fourth each. The key's: uniform over what is left.
    assert set(counts) == {(1, 3), (1, 4), (2, 3), (2, 4), (3, 1), (3, 2), (3, 4), (4, 1), (4, 2), (4, 3)}
    for (query, key), count in counts.items():
        p = 1 / 4 / (2 if query < 3 else 3)
        assert abs(count - 1500 * p) < 5 * math.sqrt(1500 * p * (1 - p))


@pytest.mark.parametrize("sources", [(0, 1), (0, 1, 1), (5, 5, 5), (0, 1, 0, 1)])
def test_a_group_of_fewer_than_three_images_is_an_error(sources):
    samples = [solid_sample(i, source=source) for i, source in enumerate(sources)]
    with pytest.raises(ValueError, match="three different images"):
        MakeGroup(image_size=32)(samples)
    MakeGroup(image_size=32)(samples[:1] + [solid_sample(7), solid_sample(8)])          # three will do


def test_group_uses_the_backgrounds_that_the_samples_bring():
    samples = [solid_sample(i) for i in range(4)]
    for i, sample in enumerate(samples):
        ground = sample.pop("background")
        # Red 50 + i, 150 + i; green 50 and 150.
        sample.update(background_q=ground + 50, background_k=ground + 150)
    group = MakeGroup(image_size=32)(samples)
    for name, red in (("query", 50), ("key", 150)):
        for i in range(4):
            outside = group[name]["images"][i][:, ~inside_mask(group[name]["boxes"][i], 32)]
            assert (outside[0] == red + i).all() and (outside[1] == red).all()
    # Nothing of the group is needed.
    assert len(MakeGroup(image_size=32)(samples[:1])["query"]["images"]) == 1


def test_boxes_are_uniform_on_the_canvas_and_reach_the_far_edges():
    size, places = 16, {"query": collections.Counter(), "key": collections.Counter()}
    make = MakeGroup(image_size=size, jitter=False)
    black = torch.zeros(3, size, size, dtype=torch.uint8)
    sample = {"view_q": black[:, :14, :11], "view_k": black[:, :11, :14], "background": black, "damaged": []}
    for step in range(100):
        group = make([dict(sample, source=i, key=(step, 0)) for i in range(16)])
        for name in places:
            places[name].update((int(y1), int(x1)) for x1, y1, _, _ in group[name]["boxes"].tolist())
    assert set(places["query"]) == set(itertools.product(range(3), range(6)))
    assert set(places["key"]) == set(itertools.product(range(6), range(3)))
    assert all(uneven(counts.values(), 18) < 5 for counts in places.values())


def test_only_the_querys_boxes_are_jittered():
    samples, anchors = [solid_sample(i, size=256) for i in range(6)], grid_anchors(256)
    group = MakeGroup(image_size=256)(samples)
    assert torch.equal(group["key"]["jittered"], group["key"]["boxes"])
    boxes, jittered = group["query"]["boxes"], group["query"]["jittered"]
    assert all((anchors == box).all(dim=1).any() for box in jittered)
    assert iou_of_pairs(boxes, jittered).min() > 0.5 - 1e-6
    still = MakeGroup(image_size=256, jitter=False)(samples)
    for name in ("query", "key"):
        assert torch.equal(still[name]["jittered"], still[name]["boxes"])
        # Cp and insloc see the same composites.
        assert torch.equal(still[name]["boxes"], group[name]["boxes"])


def test_group_is_decided_by_seed_step_and_group():
    samples = [solid_sample(i) for i in range(5)]

    def make(step=0, group=0, seed=0):
        result = MakeGroup(seed, image_size=32)([dict(s, key=(step, group)) for s in samples])
        return torch.cat([v.double().flatten() for side in ("query", "key") for v in result[side].values()])

    torch.manual_seed(1)
    first = make()
    torch.manual_seed(2)
    assert torch.equal(make(), first)
    assert not any(torch.equal(make(*other), first) for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    group = MakeGroup(image_size=32)(samples)
    assert set(group["query"]) == set(group["key"]) == {"images", "boxes", "jittered"} | set(all_off(1))
    assert not torch.equal(group["query"]["brightness"], group["key"]["brightness"])    # drawn apart
    assert MakeGroup(image_size=32)([dict(s, damaged=[i] * i) for i, s in enumerate(samples)])["damaged"] == [
        1, 2, 2, 3, 3, 3, 4, 4, 4, 4]


def test_flip_of_the_composite_moves_the_box_with_the_foreground():
    size, samples = 32, [solid_sample(i) for i in range(16)]
    still = MakeGroup(image_size=size)(samples)
    moved = MakeGroup(image_size=size, flip_moves_box=True)(samples)
    for name, green in (("query", 100), ("key", 200)):
        flip = moved[name]["flip"]
        assert 2 < flip.sum() < 14 and torch.equal(moved[name]["images"], still[name]["images"])
        for i in range(16):
            x1, y1, x2, y2 = still[name]["boxes"][i].tolist()
            expected = [size - x2, y1, size - x1, y2] if flip[i] else [x1, y1, x2, y2]
            assert moved[name]["boxes"][i].tolist() == expected
        # After the flip of the whole composite the foreground is where the box says.
        only_flip = dict(all_off(16), flip=flip)
        flipped = photometric(moved[name]["images"].float() / 255, only_flip)[0]
        for i in range(16):
            assert torch.equal(flipped[i, 1] > 0.2, inside_mask(moved[name]["boxes"][i], size))
    assert iou_of_pairs(moved["query"]["boxes"], moved["query"]["jittered"]).min() > 0.2


def test_flipped_boxes_are_jittered_after_the_flip():
    samples = [solid_sample(i, size=256) for i in range(16)]
    group = MakeGroup(image_size=256, flip_moves_box=True)(samples)["query"]
    assert iou_of_pairs(group["boxes"], group["jittered"]).min() > 0.5 - 1e-6


def test_without_pasting_the_view_is_the_image_and_the_canvas_the_box():
    samples = [solid_sample(i) for i in range(2)]                       # no backgrounds: two will do
    for i, sample in enumerate(samples):
        for view, level in (("view_q", 10), ("view_k", 20)):
            sample[view] = torch.full((3, 32, 32), level + i, dtype=torch.uint8)
        del sample["background"]
    group = MakeGroup(image_size=32, pasting=False, jitter=False)(samples)
    for name, view in (("query", "view_q"), ("key", "view_k")):
        assert torch.equal(group[name]["images"], torch.stack([s[view] for s in samples]))
        assert group[name]["boxes"].tolist() == group[name]["jittered"].tolist() == [[0, 0, 32, 32]] * 2


def test_nothing_draws_from_the_global_generator(tmp_path):
    before = torch.get_rng_state()
    crop_box(30, 40, generator=seeded())
    jitter_boxes(torch.tensor([[0.0, 0, 128, 128]]), grid_anchors(), generator=seeded())
    photometric_params(3, seeded())
    views = Views(solid_files(tmp_path, 3), image_size=32, fg_size=(16, 32))
    MakeGroup(image_size=32)([views[0, 0, 0, i] for i in range(3)])
    next(batches(8, 4, 2, 1))
    KeyQueue(8, 4, 1, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_workers_change_nothing(tmp_path):
    paths = solid_files(tmp_path, 10)

    def epoch(workers):
        loader = torch.utils.data.DataLoader(
            Views(paths, image_size=32, fg_size=(16, 32)), batch_sampler=batches(10, 8, 4, 1),
            num_workers=workers, collate_fn=MakeGroup(image_size=32))
        return [torch.cat([v.double().flatten() for side in ("query", "key") for v in group[side].values()])
                for group in loader]

    alone, many = epoch(0), epoch(2)
    assert len(alone) == len(many) == 2 and all(torch.equal(a, b) for a, b in zip(alone, many))


def test_batches_are_permutations_cut_into_groups():
    n, batch, size, epochs = 53, 12, 4, 5
    groups = list(batches(n, batch, size, epochs, seed=3))
    steps = n // batch
    expected = [(step // steps, step, group) for step in range(epochs * steps) for group in range(3)]
    assert [keys[0][:3] for keys in groups] == expected
    orders = []
    for epoch in range(epochs):
        seen = [index for keys in groups for e, _, _, index in keys if e == epoch]
        assert len(seen) == len(set(seen)) == steps * batch and set(seen) <= set(range(n))  # 5 are dropped
        orders.append(seen)
    for keys in groups:
        assert len(keys) == size and len({key[:3] for key in keys}) == 1
    assert len({tuple(order) for order in orders}) == epochs            # shuffled anew
    # Others are dropped each time.
    assert orders[0] != sorted(orders[0]) and set().union(*orders) == set(range(n))
    assert list(batches(n, batch, size, epochs, seed=3)) == groups
    assert list(batches(n, batch, size, epochs, seed=4)) != groups
    counts = collections.Counter(next(batches(6, 1, 1, 1, seed=seed))[0][3] for seed in range(600))
    assert uneven(counts.values(), 6) < 5


def test_batches_resume_at_any_step_and_split_among_ranks():
    n, batch, size, epochs = 26, 8, 2, 3
    groups = list(batches(n, batch, size, epochs))
    for start in range(3 * epochs + 1):
        assert list(batches(n, batch, size, epochs, start_step=start)) == groups[start * 4:]
    for ranks in (1, 2, 4):
        share = 4 // ranks
        parts = [list(batches(n, batch, size, epochs, start_step=4, groups=range(r * share, (r + 1) * share)))
                 for r in range(ranks)]
        steps = [slice(step * share, (step + 1) * share) for step in range(5)]
        together = [keys for step in steps for part in parts for keys in part[step]]
        assert together == groups[16:]
        assert all(len(part) == 5 * share for part in parts)
    assert list(batches(n, batch, size, epochs, groups=range(0))) == []


# ----------------------------------------------------------------------------------------------------------
# 5  Encoders
# ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def random_batch_norm(module, seed=0):
    """BatchNorm with statistics and factors of its own, so that a forgotten, swapped or extra one shows."""
    generator = seeded(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.3, 0.3), (m.running_mean, -0.2, 0.2),
                                      (m.running_var, 0.7, 1.4)):
                tensor.data.uniform_(low, high, generator=generator)
    return module


@pytest.fixture(scope="module")
def c4():
    torch.manual_seed(0)
    return random_batch_norm(C4Encoder("resnet18")).eval()


@pytest.fixture(scope="module")
def fpn():
    torch.manual_seed(0)
    return random_batch_norm(FPNEncoder("resnet18")).eval()


def test_parameter_counts_of_the_papers_encoders():
    with torch.device("meta"):
        encoders = C4Encoder(), FPNEncoder()
    assert [sum(p.numel() for p in e.parameters()) for e in encoders] == [27_966_656, 43_242_688]
    assert [e.levels for e in encoders] == [("c4",), ("p2", "p3", "p4", "p5")]
    names = set(torchvision.models.resnet50().state_dict()) - {"fc.weight", "fc.bias"}
    assert all(set(e.resnet.state_dict()) == names for e in encoders)
    assert all(p.requires_grad for e in encoders for p in e.parameters())


def slow_roi_align(features, box, size, scale):
    """RoIAlign of one box on one map (C, h, w) by its definition: adaptive samples, half-pixel aligned."""
    channels, height, width = features.shape
    x1, y1, x2, y2 = (v * scale - 0.5 for v in box)
    bin_h, bin_w = (y2 - y1) / size, (x2 - x1) / size
    samples_y, samples_x = math.ceil(bin_h), math.ceil(bin_w)
    out = np.zeros((channels, size, size))
    for row in range(size):
        for column in range(size):
            for i in range(samples_y):
                for j in range(samples_x):
                    y = y1 + row * bin_h + (i + 0.5) * bin_h / samples_y
                    x = x1 + column * bin_w + (j + 0.5) * bin_w / samples_x
                    if y < -1 or y > height or x < -1 or x > width:
                        continue                                        # outside: zero, but counted
                    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    top, left = min(int(y), height - 1), min(int(x), width - 1)
                    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
                    fy, fx = y - top, x - left
                    out[:, row, column] += (features[:, top, left] * (1 - fy) * (1 - fx)
                                            + features[:, top, right] * (1 - fy) * fx
                                            + features[:, bottom, left] * fy * (1 - fx)
                                            + features[:, bottom, right] * fy * fx)
    return out / (samples_y * samples_x)


@pytest.mark.parametrize("size, scale", [(3, 1 / 16), (2, 1 / 4)])
def test_roi_pool_equals_a_slow_loop(size, scale):
    rng = np.random.default_rng(20)
    features = torch.tensor(rng.normal(size=(3, 2, 7, 9)))
    height, width = 7 / scale, 9 / scale
    corner = rng.uniform((-0.4 * width, -0.4 * height), (0.7 * width, 0.7 * height), (3, 4, 2))
    sides = rng.uniform((0.1 * width, 0.1 * height), (0.9 * width, 0.9 * height), (3, 4, 2))
    # (N, M, 4), most of them stick out.
    boxes = torch.tensor(np.concatenate([corner, corner + sides], axis=2))
    assert (boxes[..., :2] < 0).any() and (boxes[..., 2] > width).any() and (boxes[..., 3] > height).any()
    expected = np.stack([slow_roi_align(features[i].numpy(), boxes[i, m].tolist(), size, scale)
                         for i in range(3) for m in range(4)])                          # image-major
    pooled = roi_pool(features, boxes, size, scale)
    assert pooled.dtype == torch.float64 and np.abs(pooled.numpy() - expected).max() < 1e-12
    single = roi_pool(features.float(), boxes[:, 1].float(), size, scale)
    assert single.dtype == torch.float32 and np.abs(single.numpy() - expected[1::4]).max() < 1e-4
    assert close(roi_pool(features, boxes.float(), size, scale), pooled, 1e-4)  # mixed precision is fine


def test_roi_pool_of_ones():
    ones = torch.ones(2, 3, 16, 16)
    inside = torch.tensor([[0.0, 0, 256, 256], [17.3, 40, 188.8, 211]])
    assert torch.allclose(roi_pool(ones, inside, 14, 1 / 16), torch.ones(2, 3, 14, 14))
    # 64 px off the canvas: of 28 columns of samples 22 lie on the map or within a cell of it.
    off = torch.tensor([[-64.0, 0, 192, 256], [0, 64, 256, 320]])
    assert (roi_pool(ones, off, 14, 1 / 16).mean(dim=(1, 2, 3)) - 22 / 28).abs().max() < 1e-5


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_roi_pool_keeps_dtype_memory_and_the_precision_of_boxes(dtype, memory):
    features = torch.randn(2, 8, 16, 16, generator=seeded(21)).to(dtype).contiguous(memory_format=memory)
    boxes = torch.tensor([[129.3, 65.1, 254.7, 201.9], [3.3, 7.7, 131.1, 180.5]])
    pooled = roi_pool(features, boxes, 7, 1 / 16)
    assert pooled.dtype == dtype and pooled.is_contiguous(memory_format=memory)
    rois = torch.cat([torch.tensor([[0.0], [1.0]]), boxes], dim=1)
    expected = torchvision.ops.roi_align(features.float(), rois, 7, 1 / 16, -1, True)
    assert torch.equal(pooled, expected.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(roi_pool(features, boxes, 7, 1 / 16), pooled)


def trunk_maps(resnet, images):
    """C2 to C5 by torchvision's own feature getter."""
    layers = {f"layer{i}": f"c{i + 1}" for i in range(1, 5)}
    return dict(torchvision.models._utils.IntermediateLayerGetter(resnet, layers)(images))


def test_c4_without_boxes_is_torchvisions_resnet(c4):
    images = torch.randn(3, 3, 96, 96, generator=seeded(22))
    plain = torchvision.models.resnet18()
    missing = plain.load_state_dict(c4.resnet.state_dict(), strict=False).missing_keys
    assert set(missing) == {"fc.weight", "fc.bias"}
    plain.fc = nn.Identity()
    for mode in (False, True):
        plain.train(mode), c4.train(mode)
        mine, theirs = copy.deepcopy(c4), copy.deepcopy(plain)
        features, expected = mine.features(images), theirs(images)
        assert features.shape == (3, 1, 512) and torch.allclose(features[:, 0], expected, atol=1e-5)
        out = theirs.fc(expected)
        first, _, last = mine.projector
        hidden = (out @ first.weight.T + first.bias).clamp(min=0)
        embedding = hidden @ last.weight.T + last.bias
        embedding = embedding / (embedding ** 2).sum(dim=1, keepdim=True).sqrt()
        assert torch.allclose(copy.deepcopy(c4)(images)[:, 0], embedding, atol=1e-5)
    c4.eval()


def test_c4_pools_res4_and_runs_res5_on_every_box(c4):
    images = torch.randn(2, 3, 128, 128, generator=seeded(23))
    boxes = torch.tensor([[5.0, 9, 100, 128], [-20, 30.5, 70, 90]])
    align = torchvision.ops.RoIAlign(14, 1 / 16, sampling_ratio=-1, aligned=True)
    pooled = align(trunk_maps(c4.resnet, images)["c4"], list(boxes[:, None]))
    expected = F.adaptive_avg_pool2d(c4.resnet.layer4(pooled), 1).flatten(1)
    assert torch.allclose(c4.features(images, boxes)[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_c4_with_the_whole_canvas_at_224_equals_no_box(c4, training):
    images = torch.randn(2, 3, 224, 224, generator=seeded(24))
    whole = torch.tensor([0.0, 0, 224, 224]).expand(2, 4)
    net = copy.deepcopy(c4).train(training)
    assert torch.allclose(net(images, whole), net(images), atol=1e-6)
    net.eval()
    assert not torch.allclose(net(images, whole * 0.7), net(images), atol=1e-3)


@pytest.mark.parametrize("name", ["c4", "fpn"])
def test_many_boxes_an_image_equal_many_calls(name, request):
    net, size = request.getfixturevalue(name), 128
    images = torch.randn(3, 3, size, size, generator=seeded(25))
    boxes = paper_boxes(6, np.random.default_rng(25), size, 40).reshape(3, 2, 4)
    together = net(images, boxes)
    assert together.shape == (6, len(net.levels), 128) and together.dtype == torch.float32
    for m in range(2):
        assert torch.allclose(together[m::2], net(images, boxes[:, m]), atol=1e-5)       # image-major
    assert torch.allclose(together.norm(dim=2), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("name", ["c4", "fpn"])
def test_a_box_sees_its_own_image_alone(name, request):
    net = request.getfixturevalue(name)
    images = torch.randn(3, 3, 64, 64, generator=seeded(26))
    boxes = paper_boxes(3, np.random.default_rng(26), 64, 32)
    before, changed = net.features(images, boxes), images.clone()
    changed[1] = -changed[1]
    after = net.features(changed, boxes)
    moved = (after - before).abs().amax(dim=(1, 2))
    assert moved[0] == moved[2] == 0 and moved[1] > 1e-3
    width = 512 if name == "c4" else 1024
    assert before.shape == (3, len(net.levels), width)


def detectron2_fpn(encoder, maps):
    """detectron2's FPN with the encoder's neck weights, on the given maps C2 to C5."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import FPN, Backbone

    class Maps(Backbone):
        def forward(self, x):
            return maps

        def output_shape(self):
            return {f"c{i}": ShapeSpec(channels=maps[f"c{i}"].shape[1], stride=2 ** i) for i in range(2, 6)}

    neck, state = FPN(Maps(), ["c2", "c3", "c4", "c5"], 256, norm="BN"), {}
    for i, (inner, layer) in enumerate(zip(encoder.fpn.inner_blocks, encoder.fpn.layer_blocks)):
        for block, theirs in ((inner, f"fpn_lateral{i + 2}"), (layer, f"fpn_output{i + 2}")):
            conv, norm = block
            state[f"{theirs}.weight"] = conv.weight
            state.update({f"{theirs}.norm.{k}": v for k, v in norm.state_dict().items()})
    neck.load_state_dict({k: v.clone() for k, v in state.items()})  # strict: nothing missing, nothing over
    return neck


def detectron2_box_head(encoder=None):
    """detectron2's box head, as it initialises it or with the encoder's weights."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead

    head = FastRCNNConvFCHead(ShapeSpec(channels=256, height=7, width=7), conv_dims=[256] * 4, fc_dims=[1024],
                              conv_norm="BN")
    if encoder is None:
        return head
    state = {}
    for name, value in encoder.box_head.state_dict().items():
        layer, rest = name.split(".", 1)
        state[f"conv{layer[2:]}.norm.{rest}" if layer.startswith("bn") else name] = value.clone()
    head.load_state_dict(state)
    return head


def batch_norm_statistics(module):
    return [v for k, v in sorted(module.state_dict().items()) if "running" in k]


@pytest.mark.parametrize("training", [False, True])
def test_fpn_is_bit_for_bit_detectron2s(fpn, training):
    images = torch.randn(2, 3, 128, 96, generator=seeded(27))
    mine = copy.deepcopy(fpn).train(training)
    with torch.no_grad():
        maps = trunk_maps(copy.deepcopy(mine.resnet), images)
        theirs = detectron2_fpn(mine, maps).train(training)
        expected, pyramid = theirs(None), mine.pyramid(images)
    assert [p.shape[2] for p in pyramid] == [32, 16, 8, 4]
    for level, p in zip(("p2", "p3", "p4", "p5"), pyramid):
        assert torch.equal(p, expected[level])
    if training:
        for i, (inner, layer) in enumerate(zip(mine.fpn.inner_blocks, mine.fpn.layer_blocks)):
            for block, name in ((inner, f"fpn_lateral{i + 2}"), (layer, f"fpn_output{i + 2}")):
                assert torch.equal(block[1].running_var, getattr(theirs, name).norm.running_var)


@pytest.mark.parametrize("training", [False, True])
def test_box_head_is_bit_for_bit_detectron2s(fpn, training):
    x = torch.randn(6, 256, 7, 7, generator=seeded(28))
    mine, theirs = copy.deepcopy(fpn.box_head).train(training), detectron2_box_head(fpn).train(training)
    with torch.no_grad():
        assert torch.equal(mine(x.clone()), theirs(x.clone()))
    assert all(torch.equal(a, b) for a, b in zip(batch_norm_statistics(mine), batch_norm_statistics(theirs)))


@pytest.mark.parametrize("training", [False, True])
def test_fpn_features_equal_detectron2s_parts_on_every_level(fpn, training):
    from detectron2.layers import ROIAlign
    images = torch.randn(3, 3, 128, 128, generator=seeded(29))
    boxes = paper_boxes(3, np.random.default_rng(29), 128, 64)
    mine = copy.deepcopy(fpn).train(training)
    with torch.no_grad():
        maps = trunk_maps(copy.deepcopy(mine.resnet), images)
        pyramid = detectron2_fpn(mine, maps).train(training)(None)
        rois = torch.cat([torch.arange(3.0)[:, None], boxes], dim=1)
        pooled = [ROIAlign(7, 1 / 2 ** i, 0, aligned=True)(pyramid[f"p{i}"], rois) for i in range(2, 6)]
        # Levels one after the other here, one call for all: BatchNorm sees them together.
        head = detectron2_box_head(mine).train(training)
        expected = head(torch.cat(pooled)).reshape(4, 3, 1024).transpose(0, 1)
        features = copy.deepcopy(mine).features(images, boxes)
        assert features.shape == (3, 4, 1024) and torch.allclose(features, expected, atol=2e-5)
        first, _, last = mine.projector
        hidden = F.linear(expected, first.weight, first.bias).clamp(min=0)
        embedding = F.linear(hidden, last.weight, last.bias)
        assert torch.allclose(mine(images, boxes), embedding / embedding.norm(dim=2, keepdim=True), atol=2e-5)


def test_fpn_takes_boxes_level_by_level(fpn):
    images, rng = torch.randn(2, 3, 64, 64, generator=seeded(30)), np.random.default_rng(30)
    boxes = [paper_boxes(2, rng, 64, 20) for _ in range(4)]
    with torch.no_grad():
        mixed = fpn.features(images, boxes)
        for level in range(4):
            assert torch.allclose(mixed[:, level], fpn.features(images, boxes[level])[:, level], atol=1e-5)
        assert not torch.allclose(mixed[:, 3], fpn.features(images, boxes[0])[:, 3], atol=1e-3)
        several = [torch.stack([b, b.flip(0)], dim=1) for b in boxes]                    # (N, M, 4) a level
        assert torch.allclose(fpn.features(images, several)[0::2], mixed, atol=1e-5)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_box_head_computes_in_the_memory_format_of_the_network(fpn, memory):
    net = copy.deepcopy(fpn).to(memory_format=memory)
    images = torch.randn(2, 3, 64, 64, generator=seeded(34)).contiguous(memory_format=memory)
    boxes, seen = paper_boxes(2, np.random.default_rng(34), 64, 32), []
    net.box_head.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert torch.allclose(net(images, boxes), fpn(images, boxes), atol=1e-5)
    if memory == torch.channels_last:                                   # half the speed where it is lost
        assert seen[0].is_contiguous(memory_format=memory)


def test_initial_weights_follow_torchvision_and_detectron2():
    torch.manual_seed(5)
    net, head = FPNEncoder("resnet18"), detectron2_box_head()
    for i in range(1, 5):
        mine, theirs = net.box_head.get_submodule(f"conv{i}").weight, head.get_submodule(f"conv{i}").weight
        assert abs(mine.std() / theirs.std() - 1) < 0.01
        assert abs(mine.std() * math.sqrt(256 * 9 / 2) - 1) < 0.01
        assert abs((mine / mine.std()).pow(4).mean() - 3) < 0.05        # normal, not uniform
    bound = math.sqrt(3 / (256 * 49))
    for fc in (net.box_head.fc1, head.fc1):
        assert 0.99 * bound < fc.weight.abs().max() <= bound
        assert abs(fc.weight.std() * math.sqrt(3) / bound - 1) < 0.01
        assert (fc.bias == 0).all()
    for encoder in (net, C4Encoder("resnet18")):
        for linear in (encoder.projector[0], encoder.projector[2]):     # nn.Linear's own
            bound = 1 / math.sqrt(linear.in_features)
            assert 0.98 * bound < linear.weight.abs().max() <= bound and 0 < linear.bias.abs().max() <= bound
        for name, m in encoder.resnet.named_modules():
            if isinstance(m, nn.Conv2d) and m.weight.numel() > 50000:   # He, by the fan out
                fan_out = m.out_channels * m.kernel_size[0] ** 2
                assert abs(m.weight.std() * math.sqrt(fan_out / 2) - 1) < 0.02, name
        for m in encoder.modules():
            if isinstance(m, nn.BatchNorm2d):  # no zero factor on the last one of a block
                assert (m.weight == 1).all() and (m.bias == 0).all()
    for block in list(net.fpn.inner_blocks) + list(net.fpn.layer_blocks):
        conv, norm = block                                              # convolution, BatchNorm, nothing else
        bound = math.sqrt(3 / (conv.in_channels * conv.kernel_size[0] ** 2))
        assert conv.bias is None and 0.97 * bound < conv.weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["c4", "fpn"])
def test_every_parameter_is_trained(name, request):
    net = copy.deepcopy(request.getfixturevalue(name)).train()
    images = torch.randn(4, 3, 64, 64, generator=seeded(31))
    boxes = paper_boxes(4, np.random.default_rng(31), 64, 32)
    out = net(images, boxes)
    assert (out.norm(dim=2) - 1).abs().max() < 1e-5
    (out * torch.randn(out.shape, generator=seeded(32))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", ["c4", "fpn"])
def test_embeddings_under_autocast_are_float32_of_length_one(name, request):
    net = request.getfixturevalue(name)
    images = torch.randn(2, 3, 64, 64, generator=seeded(33))
    boxes = paper_boxes(2, np.random.default_rng(33), 64, 32)
    with torch.no_grad():
        exact = net(images, boxes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = net(images, boxes)
        double = copy.deepcopy(net).double()(images.double(), boxes)
    assert low.dtype == torch.float32 and (low.norm(dim=2) - 1).abs().max() < 1e-6
    assert (low * exact).sum(dim=2).min() > 0.99
    assert double.dtype == torch.float64 and (double - exact).abs().max() < 1e-4
    assert (double.norm(dim=2) - 1).abs().max() < 1e-12


# ----------------------------------------------------------------------------------------------------------
# 6  Contrast
# ----------------------------------------------------------------------------------------------------------

def unit_vectors(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=-1).to(dtype)


def test_queue_starts_as_random_unit_columns():
    queue = KeyQueue(300, 16, 2, seeded(40))
    assert queue.keys.shape == (2, 16, 300) and queue.keys.dtype == torch.float32
    assert torch.allclose(queue.keys.norm(dim=1), torch.ones(2, 300), atol=1e-6)
    assert queue.keys.mean().abs() < 4 / math.sqrt(16 * 9600) and abs(queue.keys.std() - 0.25) < 0.01
    assert queue.ptr == 0 and queue.filled == 0 and not list(queue.parameters())
    assert torch.equal(queue.keys, KeyQueue(300, 16, 2, seeded(40)).keys)
    assert KeyQueue().keys.shape == (1, 128, 65536)


@pytest.mark.parametrize("sizes", [
    [4] * 6, [3] * 11, [10, 10], [7, 1, 25, 2, 40, 10, 9], [0, 3, 0], [23, 23]])
def test_queue_equals_a_deque(sizes):
    size, queue = 10, KeyQueue(10, 3, 2, seeded(41))
    deque = collections.deque(queue.keys.permute(2, 0, 1).clone(), maxlen=size)         # oldest first
    total = 0
    for i, n in enumerate(sizes):
        keys = unit_vectors(n, 2, 3, seed=i).requires_grad_()
        queue.enqueue(keys)
        deque.extend(keys.detach())
        total += n
        assert queue.ptr == total % size and queue.filled == min(total, size)
        oldest_first = queue.keys.roll(-int(queue.ptr), dims=2).permute(2, 0, 1)
        assert torch.equal(oldest_first, torch.stack(list(deque)))
    assert not queue.keys.requires_grad


def test_queue_goes_on_from_its_state_dict():
    queue, other = KeyQueue(10, 3, 2, seeded(42)), KeyQueue(10, 3, 2, seeded(43))
    queue.enqueue(unit_vectors(7, 2, 3))
    state = io.BytesIO()
    torch.save(queue.state_dict(), state)
    state.seek(0)
    other.load_state_dict(torch.load(state, weights_only=True))
    for q in (queue, other):
        q.enqueue(unit_vectors(7, 2, 3, seed=1))
    assert set(queue.state_dict()) == {"keys", "ptr", "filled"}
    assert all(torch.equal(a, b) for a, b in zip(queue.state_dict().values(), other.state_dict().values()))
    double = KeyQueue(10, 3, 2, seeded(42)).double()
    keys = unit_vectors(4, 2, 3, dtype=torch.float64)
    double.enqueue(keys)
    assert double.keys.dtype == torch.float64 and torch.equal(double.keys[:, :, 3], keys[3])


def slow_info_nce(q, k, queue, temperature):
    """Eq. 2 in float64 NumPy, sample by sample, level by level: losses (L,), gradient by q of their sum."""
    q, k, queue = (x.detach().double().numpy() for x in (q, k, queue))
    n, levels, _ = q.shape
    losses, gradient = np.zeros(levels), np.zeros_like(q)
    for i in range(n):
        for level in range(levels):
            others = np.concatenate([k[i, level][None], queue[level].T])
            weight = np.exp(others @ q[i, level] / temperature)
            losses[level] -= np.log(weight[0] / weight.sum()) / n
            gradient[i, level] = ((weight / weight.sum()) @ others - k[i, level]) / temperature / n
    return losses, gradient


@pytest.mark.parametrize("temperature", [0.2, 0.07, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_info_nce_equals_its_closed_form_and_teaches_the_query_alone(temperature, dtype):
    q, k = unit_vectors(5, 2, 8, seed=1, dtype=dtype), unit_vectors(5, 2, 8, seed=2, dtype=dtype)
    queue = unit_vectors(2, 11, 8, seed=3, dtype=dtype).transpose(1, 2).contiguous()
    for x in (q, k, queue):
        x.requires_grad_()
    loss, logits = info_nce(q, k, queue, temperature)
    expected, gradient = slow_info_nce(q, k, queue, temperature)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert loss.shape == (2,) and loss.dtype == dtype
    assert np.abs(loss.detach().numpy() - expected).max() < tolerance
    assert logits.shape == (5, 2, 12)
    for i in range(5):
        for level in range(2):
            assert abs(logits[i, level, 0] - q[i, level] @ k[i, level] / temperature) < tolerance * 10
            assert abs(logits[i, level, 4] - q[i, level] @ queue[level, :, 3] / temperature) < tolerance * 10
    loss.sum().backward()
    assert k.grad is None and queue.grad is None
    assert np.abs(q.grad.numpy() - gradient).max() < tolerance * 10
    if temperature == 0.2:
        assert torch.equal(info_nce(q, k, queue)[0], loss)


@pytest.mark.parametrize("size", [1023, 65536])
def test_info_nce_of_alike_logits_is_chance(size):
    one = unit_vectors(1, 1, 16)
    queue = one[0, 0][None, :, None].expand(1, 16, size)
    loss, _ = info_nce(one.expand(3, 1, 16), one.expand(3, 1, 16), queue)
    assert abs(loss.item() - math.log(1 + size)) < 1e-4


def test_info_nce_stays_finite_where_exp_would_not():
    one = torch.tensor([[[1.0, 0.0]]])
    queue = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    assert abs(info_nce(one, -one, queue, temperature=0.001)[0].item() - 2000) < 1
    assert info_nce(one, one, -queue[:, :, :1], temperature=0.001)[0].item() == 0


def test_info_nce_is_float32_inside_autocast():
    q, k = unit_vectors(4, 1, 32, seed=1), unit_vectors(4, 1, 32, seed=2)
    queue = KeyQueue(64, 32, 1, seeded()).keys
    expected = info_nce(q, k, queue)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logits = info_nce(q, k, queue)
        low, _ = info_nce(q.bfloat16(), k.bfloat16(), queue)
    assert loss.dtype == logits.dtype == low.dtype == torch.float32
    assert torch.equal(loss, expected[0]) and torch.equal(logits, expected[1])
    assert torch.equal(low, info_nce(q.bfloat16().float(), k.bfloat16().float(), queue)[0])


@pytest.mark.parametrize("similarity, expected", [(1.0, 6.19), (0.5, 8.69), (0.0, 11.19)])
def test_loss_of_the_first_step(similarity, expected):
    # ln(1 + K E[exp(s / T)] exp(-s+ / T)): what users see while the queue is still random.
    q, other = unit_vectors(48, 1, 128, seed=4), unit_vectors(48, 1, 128, seed=5)
    across = F.normalize(other - (other * q).sum(dim=2, keepdim=True) * q, dim=2)
    k = similarity * q + math.sqrt(1 - similarity ** 2) * across
    loss, _ = info_nce(q, k, KeyQueue(65536, 128, 1, seeded(6)).keys)
    assert abs(loss.item() - expected) < 0.05


@pytest.mark.parametrize("momentum", [0.999, 0.9, 0.0, 1.0])
def test_momentum_update_by_hand(momentum):
    def network(seed):
        torch.manual_seed(seed)
        return random_batch_norm(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 5)), seed)

    key, query = network(0), network(1)
    before_k, before_q = copy.deepcopy(key.state_dict()), copy.deepcopy(query.state_dict())
    parameters = {name: p for name, p in key.named_parameters()}
    momentum_update(key, query, *() if momentum == 0.999 else (momentum,))
    for name, value in key.state_dict().items():
        k, q = before_k[name].flatten().tolist(), before_q[name].flatten().tolist()
        if name in parameters:                                          # in place, element by element
            assert parameters[name] is dict(key.named_parameters())[name]
            expected = [momentum * a + (1 - momentum) * b for a, b in zip(k, q)]
            assert np.abs(value.flatten().numpy() - expected).max() < 1e-6
            assert momentum == 1 or not torch.equal(value, before_k[name])
        else:
            assert value.flatten().tolist() == k  # BatchNorm's buffers are the key's own
        assert torch.equal(query.state_dict()[name], before_q[name])
    assert all(p.grad_fn is None for p in key.parameters())


def test_momentum_update_converges_slowly_and_exactly():
    key, query = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(key.weight), nn.init.zeros_(query.weight)
    for _ in range(100):
        momentum_update(key, query)
    assert abs(key.weight.item() - 0.999 ** 100) < 1e-12
