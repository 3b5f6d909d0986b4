"""Section 2 of insloc.py, anchors and box jitter, against loops and the numbers of a simulation."""
import collections
import math

import numpy as np
import pytest
import torch
from conftest import iou_of_pairs, paper_boxes, seeded, uneven

from insloc import grid_anchors, jitter_boxes


THE_RELEASES = (256, 16, (32, 64, 128, 256), (0.5, 0.75, 1.0, 1.5, 2.0))


@pytest.mark.parametrize("arguments", [(), (64, 8, (20,), (0.4, 3.0)), (100, 16, (32, 64), (1.0,))])
def test_anchors_equal_a_loop(arguments):
    size, stride, sizes, ratios = arguments or THE_RELEASES
    loop = []
    for y in range(0, size, stride):
        for x in range(0, size, stride):
            for side in sizes:
                for h_over_w in ratios:
                    h = side * math.sqrt(h_over_w)
                    w = side / math.sqrt(h_over_w)
                    loop.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    torch.testing.assert_close(grid_anchors(*arguments), torch.tensor(loop), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_anchors_scale_with_the_canvas(size):
    best = [iou_of_pairs(grid_anchors(size), box).max() for box in paper_boxes(100, size, size, size // 2)]
    assert sorted(best)[1] > 0.5


def test_jittered_boxes_overlap_by_557_on_average():
    generator, anchors, boxes = seeded(6), grid_anchors(), paper_boxes(4000, 6)
    chosen = torch.cat([jitter_boxes(part, anchors, generator=generator) for part in boxes.split(500)])
    iou = iou_of_pairs(boxes, chosen)
    assert iou.min() > 0.5 - 1e-6 and abs(iou.mean() - 0.557) < 0.005   # float32 anchors
    sticks_out = ((chosen[:, :2] < 0) | (chosen[:, 2:] > 256)).any(dim=1).float().mean()
    assert abs(sticks_out - 0.64) < 0.03                                # not clipped


@pytest.mark.parametrize("h, w", [(256, 128), (128, 256)])
def test_the_two_boxes_on_the_knife_edge_get_a_good_anchor(h, w):
    # Area 32768: the best anchors of sizes 128 and 256 overlap these by exactly one half, but for rounding.
    corner = torch.arange(0, 129.0)[:, None] * torch.tensor([w == 128, h == 128])
    boxes = torch.cat([corner, corner + torch.tensor([w, h])], dim=1)
    for seed in range(5):
        chosen = jitter_boxes(boxes, grid_anchors(), generator=seeded(seed))
        assert iou_of_pairs(boxes, chosen).min() > 0.5 - 1e-6


def test_jitter_chooses_uniformly_among_the_matches_and_nothing_else():
    anchors, box = grid_anchors(64, 8, (32, 48), (0.75, 1.0, 1.5)), torch.tensor([5.0, 9.0, 60.0, 58.0])
    matching = set(np.flatnonzero(iou_of_pairs(anchors, box) > 0.5))
    chosen = jitter_boxes(box.expand(8000, 4), anchors, generator=seeded(7))
    place = {tuple(anchor): i for i, anchor in enumerate(anchors.tolist())}
    counts = collections.Counter(place[tuple(anchor)] for anchor in chosen.tolist())
    assert len(matching) > 20 and set(counts) == matching
    assert abs(uneven(counts.values(), len(matching))) < 5


BOX, LITTLE = [0.0, 0.0, 4.0, 1.0], [8.0, 8.0, 9.5, 9.5]
# Anchors with an IoU of .5, .75 and 0 with BOX.
HALF, MOST, FAR = [0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 3.0, 1.0], [9.0, 9.0, 10.0, 10.0]


@pytest.mark.parametrize("boxes, anchors, min_iou, expected", [
    ([BOX], [FAR, HALF, MOST], 0.5, [MOST]),                            # .5 is no match
    ([BOX], [FAR, HALF, MOST], 0.49, [HALF, MOST]),
    ([BOX], [FAR, HALF, MOST], 0.8, [MOST]),                            # none matches: the best one
    ([BOX], [FAR, HALF], 0.8, [HALF]),
    ([BOX, LITTLE], [FAR, HALF, MOST], 0.6, [MOST, FAR])])              # box by box
def test_jitter_wants_more_than_the_threshold_and_falls_back_to_the_best(boxes, anchors, min_iou, expected):
    chosen = jitter_boxes(torch.tensor(boxes).repeat(200, 1), torch.tensor(anchors), min_iou, seeded())
    assert sorted(chosen.unique(dim=0).tolist()) == sorted(expected)
    assert len(boxes) == 1 or (chosen == torch.tensor(expected).repeat(200, 1)).all()
