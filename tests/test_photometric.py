"""Section 3 of insloc.py, photometric augmentation, against torchvision, image by image, and colorsys."""
import collections
import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import paper_boxes, seeded, uneven
from torchvision.transforms.v2 import functional as V

from insloc import affine_maps, photometric, photometric_params, shift_hue

ORDERS = torch.tensor(list(itertools.permutations(range(4))))
OPERATIONS = ((V.adjust_brightness, "brightness"), (V.adjust_contrast, "contrast"),
              (V.adjust_saturation, "saturation"), (V.adjust_hue, "hue"))


def nothing(n):
    """Parameters of n images with which nothing happens."""
    off = torch.zeros(n, dtype=torch.bool)
    return dict(photometric_params(n, seeded()), sigma=torch.zeros(n), colour=off, gray=off, flip=off)


def hard_images(n, height, width, seed):
    """float64: noise, grays, few levels with ties between channels, black: what clamps and hue meet."""
    generator = seeded(seed)
    noise = torch.rand(n, 3, height, width, generator=generator, dtype=torch.float64)
    few = torch.randint(0, 4, (n, 3, height, width), generator=generator).double() / 3
    kind = torch.randint(0, 3, (n, 1, height, width), generator=generator)
    images = torch.where(kind == 0, noise, torch.where(kind == 1, few, noise[:, :1]))
    # Each image has its own level, else a mean over the whole batch would pass for the mean of one.
    return images * torch.linspace(0.3, 1, n, dtype=torch.float64)[:, None, None, None]


def everything():
    """48 images, parameters in all orders and at the ends of ranges, boxes on edges and one pixel wide."""
    boxes = paper_boxes(48, 12, size=36, low=5)
    boxes[:5] = torch.tensor([
        [0, 0, 40, 36], [39, 35, 40, 36], [0, 0, 1, 36], [0, 35, 40, 36], [20, 10, 40, 36]])
    params = dict(photometric_params(48, seeded(12)), order=ORDERS.repeat(2, 1))
    params["brightness"][::2] = 1.4
    params["contrast"][::3] = 0.6
    return hard_images(48, 36, 40, seed=12), params, boxes


def slow_blur(image, sigma):
    """17 x 17 taps, those outside the image dropped and the others renormalised: in float64, tap by tap."""
    height, width = image.shape[1:]
    padded = np.pad(image.double().numpy(), ((0, 0), (8, 8), (8, 8)))
    there = np.pad(np.ones((height, width)), 8)
    total, weights = 0, 0
    for dy, dx in itertools.product(range(17), repeat=2):
        weight = math.exp(-((dy - 8) ** 2 + (dx - 8) ** 2) / (2 * sigma * sigma))
        total = total + weight * padded[:, dy:dy + height, dx:dx + width]
        weights = weights + weight * there[dy:dy + height, dx:dx + width]
    return torch.from_numpy(total / weights).to(image.dtype)


def image_by_image(images, params, boxes):
    """torchvision's functions on the crop of each box as an image of its own, pasted back."""
    expected = images.clone()
    for i, (x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
        crop = images[i, :, y1:y2, x1:x2]
        for turn in params["order"][i].tolist():
            function, name = OPERATIONS[turn]
            if params["colour"][i] and params[name][i] != 0:            # torchvision's hue of 0 costs 6e-7
                crop = function(crop, params[name][i].item())
        if params["gray"][i]:
            crop = V.rgb_to_grayscale(crop, num_output_channels=3)
        if params["sigma"][i] > 0:
            crop = slow_blur(crop, params["sigma"][i].item())
        expected[i, :, y1:y2, x1:x2] = V.horizontal_flip(crop) if params["flip"][i] else crop
    return expected


def inside_mask(boxes, height, width):
    """(N, 1, H, W) bool."""
    mask = torch.zeros(len(boxes), 1, height, width, dtype=torch.bool)
    for i, (x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
        mask[i, :, y1:y2, x1:x2] = True
    return mask


def close(a, b, tolerance):
    return a.dtype == b.dtype and a.shape == b.shape and (a - b).abs().max().item() <= tolerance


def ks(sample):
    """Kolmogorov-Smirnov distance from U(0, 1), times sqrt(n); above 2: p < .001."""
    rank = np.arange(len(sample) + 1) / len(sample)
    x = np.sort(sample)
    return max((x - rank[:-1]).max(), (rank[1:] - x).max()) * math.sqrt(len(x))


def test_params_have_moco_v2s_probabilities_and_ranges():
    n = 20000
    params = photometric_params(n, seeded(8))
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.6, 1.4),
                            ("hue", -0.1, 0.1)):
        assert ks((params[name] - low) / (high - low)) < 2
    blurred = params["sigma"] > 0
    assert ks((params["sigma"][blurred] - 0.1) / 1.9) < 2
    for on, p in ((params["colour"], 0.8), (params["gray"], 0.2), (params["flip"], 0.5), (blurred, 0.5)):
        assert on.dtype == torch.bool and abs(on.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    orders = collections.Counter(map(tuple, params["order"].tolist()))
    assert len(orders) == 24 and uneven(orders.values(), 24) < 5
    # No parameter tells anything of another.
    columns = {**params, "sigma": blurred, "order": params["order"][:, 0]}.values()
    related = np.corrcoef(np.stack([column.double().numpy() for column in columns]))
    assert np.abs(related - np.eye(9)).max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("order", ORDERS.tolist(), ids=str)
def test_affine_maps_are_torchvisions_operations_in_every_order(order):
    params = dict(photometric_params(6, seeded(order[0])), order=torch.tensor([order]).repeat(6, 1),
                  colour=torch.arange(6) < 4, gray=torch.arange(6) % 2 == 0)
    matrices, mean_matrices = affine_maps(params)
    images = hard_images(6, 9, 8, seed=11)
    for i in range(6):
        mine = theirs = images[i]
        for turn, operation in enumerate(order):
            offset = mean_matrices[i, turn] @ mine.mean(dim=(1, 2))
            mine = (torch.einsum("ij,jyx->iyx", matrices[i, turn], mine) + offset[:, None, None]).clamp(0, 1)
            if operation != 3 and params["colour"][i]:                  # 3 is hue, no affine map
                function, name = OPERATIONS[operation]
                theirs = function(theirs, params[name][i].item())
            assert close(mine, theirs, 1e-12), (i, turn)
        mine = torch.einsum("ij,jyx->iyx", matrices[i, 4], mine)
        theirs = V.rgb_to_grayscale(theirs, num_output_channels=3) if params["gray"][i] else theirs
        assert close(mine, theirs, 1e-12), i


@pytest.mark.parametrize("dtype, hue, tolerance", [
    (torch.float32, False, 3e-6), (torch.float64, False, 1e-12),
    (torch.float32, True, 5e-6), (torch.float64, True, 5e-6)])          # torchvision's hue is float32 in part
@pytest.mark.parametrize("with_boxes", [True, False])
def test_photometric_equals_torchvision_image_by_image(dtype, hue, tolerance, with_boxes):
    images, params, boxes = everything()
    images = images.to(dtype)
    before = images.clone()
    params["hue"] *= hue
    result, same_boxes = photometric(images, params, boxes if with_boxes else None)
    assert torch.equal(images, before) and same_boxes is (boxes if with_boxes else None)
    whole = torch.tensor([0.0, 0, 40, 36]).expand(48, 4)
    assert close(result, image_by_image(images, params, boxes if with_boxes else whole), tolerance)


def test_no_pixel_outside_the_box_changes_or_tells_on_the_inside():
    images, params, boxes = everything()
    inside = inside_mask(boxes, 36, 40).expand_as(images)
    result, _ = photometric(images, params, boxes)
    assert torch.equal(result[~inside], images[~inside])
    elsewhere, _ = photometric(torch.where(inside, images, 1 - images), params, boxes)
    assert close(elsewhere[inside], result[inside], 1e-12)


def test_images_without_any_operation_are_unchanged_to_the_bit():
    images, params, boxes = everything()
    images = images.float()
    result, _ = photometric(images, dict(nothing(48), colour=torch.arange(48) % 2 == 0), boxes)
    assert torch.equal(result[1::2], images[1::2]) and not torch.equal(result[::2], images[::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, width, box", [
    (2050, 3, [1, 0, 3, 1]),                    # more images than float16 can number, or bfloat16
    (8, 300, [257, 0, 299, 1])])                # a corner that bfloat16 does not have
def test_half_precision_is_that_of_float32_rounded(dtype, n, width, box):
    images = torch.rand(n, 3, 2, width, generator=seeded(18)).to(dtype)
    boxes = torch.tensor(box).float().expand(n, 4)
    assert torch.equal(photometric(images, nothing(n), boxes)[0], images)
    params = photometric_params(n, seeded(19))
    result, _ = photometric(images, params, boxes)
    assert result.dtype == dtype
    assert torch.equal(result, photometric(images.float(), params, boxes)[0].to(dtype))
    outside = ~inside_mask(boxes, 2, width).expand_as(images)
    assert torch.equal(result[outside], images[outside])


@pytest.mark.parametrize("boxes", [None, torch.zeros(0, 4)])
def test_no_image_is_no_image(boxes):
    result, _ = photometric(torch.zeros(0, 3, 8, 9), photometric_params(0, seeded()), boxes)
    assert result.shape == (0, 3, 8, 9)


def test_integers_and_boxes_that_leave_the_image_are_refused():
    images, params = torch.rand(2, 3, 8, 9, generator=seeded()), photometric_params(2, seeded())
    photometric(images, params, torch.tensor([[0.0, 0, 9, 8], [3, 3, 4, 4]]))
    for box in ([-1.0, 0, 4, 4], [0, -1, 4, 4], [0, 0, 10, 4], [0, 0, 4, 9]):
        with pytest.raises(ValueError, match="no box may leave"):
            photometric(images, params, torch.tensor([[0.0, 0, 4, 4], box]))
    with pytest.raises(ValueError, match="must be float"):
        photometric((images * 255).byte(), params)


def test_memory_order_does_not_matter():
    images, params, boxes = everything()
    other_order, _ = photometric(images.contiguous(memory_format=torch.channels_last), params, boxes)
    assert close(other_order, photometric(images, params, boxes)[0], 1e-12)


def test_hue_equals_colorsys():
    pixels = hard_images(6, 5, 7, seed=15).flatten(2)
    turns = torch.tensor([-0.5, -0.1, -0.03, 0.0, 0.08, 0.5], dtype=torch.float64)
    result = shift_hue(pixels, turns[:, None, None])
    for i, p in itertools.product(range(6), range(35)):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixels[i, :, p].tolist())
        expected = colorsys.hsv_to_rgb((hue + turns[i].item()) % 1, saturation, value)
        assert np.abs(result[i, :, p].numpy() - expected).max() < 1e-12


def test_blur_away_from_the_border_is_torchvisions_and_keeps_flat_images_flat():
    images = torch.rand(20, 3, 50, 60, generator=seeded(14), dtype=torch.float64)
    params = dict(nothing(20), sigma=torch.linspace(0.1, 2.0, 20))
    boxes = torch.tensor([4.0, 3, 56, 45]).expand(20, 4)
    result, _ = photometric(images, params, boxes)
    for i in range(20):
        expected = V.gaussian_blur(images[i, :, 3:45, 4:56], [17, 17], [params["sigma"][i].item()] * 2)
        assert close(result[i, :, 11:37, 12:48], expected[:, 8:-8, 8:-8], 1e-6)
    images[:, :, 3:45, 4:56] = 0.25                             # up to the border, whatever is around it
    assert close(photometric(images, params, boxes)[0], images, 1e-12)
