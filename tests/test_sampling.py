"""Section 1 of insloc.py, sampling and pasting, against torchvision and a loop."""
import numpy as np
import pytest
import torch
from conftest import seeded
from torchvision.transforms import RandomResizedCrop

from insloc import crop_box, generator_for, paste


def test_generators_are_decided_by_all_their_seeds():
    def stream(*seeds):
        return tuple(torch.randint(2 ** 62, (4,), generator=generator_for(*seeds)).tolist())

    assert stream(0, "sample", 1, 2) == stream(0, "sample", 1, 2)
    different = [(0, "sample", 1, 2), (0, "sample", 2, 1), (0, "sample", 12), (1, "sample", 1, 2),
            (0, "group", 1, 2), (0, "sample", 1), (0, "sample", 1, 2, 0), ("0", "sample", 1, 2)]
    assert len({stream(*seeds) for seeds in different}) == len(different)
    # A run that another process resumes goes on with the same draws: no hash() of Python, which is salted.
    assert generator_for(0, "sample", 1, 2).initial_seed() == 7178513459028031028


@pytest.mark.parametrize("arguments", [
    (), ((0.2, 1.0), (3 / 4, 4 / 3)), ((0.05, 0.2), (0.25, 1.0)),
    ((4.0, 5.0), (0.5, 2.0)), ((4.0, 5.0), (0.25, 1.0))])               # larger than the image: all fall back
@pytest.mark.parametrize("high", [8, 80, 800])
def test_crops_are_torchvisions_draw_by_draw(arguments, high):
    scale, ratio = arguments or ((0.2, 1.0), (3 / 4, 4 / 3))            # MoCo v2's
    for seed, (height, width) in enumerate(np.random.default_rng(0).integers(1, high, (300, 2)).tolist()):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(torch.empty(1, height, width), scale, ratio)
        generator = seeded(seed)
        assert crop_box(height, width, *arguments, generator=generator) == expected
        assert torch.equal(generator.get_state(), torch.get_rng_state())        # after ten tries, too


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("top, left, h, w", [
    (0, 0, 32, 32), (31, 31, 1, 1), (0, 12, 16, 20), (16, 0, 16, 32), (5, 9, 20, 11)])
def test_paste_equals_a_loop_and_leaves_its_inputs_alone(top, left, h, w, dtype):
    background = torch.randint(0, 256, (3, 32, 32), generator=seeded(5)).to(dtype)
    foreground = torch.randint(0, 256, (h, w, 3), generator=seeded(6)).to(dtype).permute(2, 0, 1)
    before = background.clone(), foreground.clone()
    composite, box = paste(background, foreground, top, left)
    expected = background.clone()
    for y, x in np.ndindex(h, w):
        expected[:, top + y, left + x] = foreground[:, y, x]
    assert torch.equal(composite, expected)
    assert box.dtype == torch.float32 and box.tolist() == [left, top, left + w, top + h]
    composite.fill_(7)                                          # it shares no memory with the inputs
    assert torch.equal(background, before[0]) and torch.equal(foreground, before[1])


@pytest.mark.parametrize("top, left", [(-1, 0), (0, -1), (5, 0), (0, 3), (-9, -9), (40, 40)])
def test_paste_refuses_to_leave_the_canvas(top, left):
    with pytest.raises(ValueError, match="leaves the canvas"):
        paste(torch.zeros(3, 8, 8), torch.ones(3, 4, 6), top, left)
    paste(torch.zeros(3, 8, 8), torch.ones(3, 4, 6), 4, 2)      # the last place that fits


@pytest.mark.parametrize("background, foreground", [
    (torch.zeros(3, 8, 8), torch.ones(3, 4, 4).byte()), (torch.zeros(3, 8, 8).byte(), torch.ones(3, 4, 4)),
    (torch.zeros(3, 8, 8, device="meta"), torch.ones(3, 4, 4)), (torch.zeros(3, 8, 8), torch.ones(1, 4, 4))])
def test_paste_refuses_to_convert_and_to_broadcast(background, foreground):
    with pytest.raises(ValueError, match="must agree"):
        paste(background, foreground, 0, 0)
