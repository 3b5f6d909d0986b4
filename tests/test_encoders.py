"""Section 5 of insloc.py, encoders, against a slow RoIAlign, torchvision's ResNet and detectron2's parts."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import paper_boxes, seeded
from torch import nn

from insloc import C4Encoder, FPNEncoder, make_resnet, roi_pool

both_encoders = pytest.mark.parametrize("kind", [C4Encoder, FPNEncoder])
both_modes = pytest.mark.parametrize("training", [False, True])
both_memories = pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])


def encoder(kind, *args, training=False, **more):
    """BatchNorm has statistics and factors of its own, so that a forgotten, swapped or extra one shows."""
    torch.manual_seed(0)
    net = kind(*args or ["narrow18"], **more)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.3, 0.3),
                                      (module.running_mean, -0.2, 0.2), (module.running_var, 0.7, 1.4)):
                nn.init.uniform_(tensor, low, high)
    return net.train(training)


def pictures(n, height, width=None):
    return torch.randn(n, 3, height, width or height, generator=seeded())


def trunk_maps(resnet, images):
    """C2 to C5 by torchvision's own feature getter."""
    layers = {f"layer{i}": f"c{i + 1}" for i in range(1, 5)}
    return dict(torchvision.models._utils.IntermediateLayerGetter(resnet, layers)(images))


def embedding(projector, x):
    first, _, last = projector
    return F.normalize(F.linear(F.linear(x, first.weight, first.bias).relu(), last.weight, last.bias), dim=-1)


def test_parameters_of_the_papers_encoders():
    with torch.device("meta"):
        c4, fpn, theirs = C4Encoder(), FPNEncoder(), torchvision.models.resnet50()
    assert [sum(p.numel() for p in net.parameters()) for net in (c4, fpn)] == [27_966_656, 43_242_688]
    assert [c4.levels, fpn.levels] == [("c4",), ("p2", "p3", "p4", "p5")]
    for net in (c4, fpn):
        assert [*net.resnet.state_dict(), "fc.weight", "fc.bias"] == [*theirs.state_dict()]


def test_narrow18_is_resnet18_with_layers_of_a_quarter_of_the_width():
    wide, narrow = make_resnet("resnet18"), make_resnet("narrow18")
    assert (wide.inplanes, narrow.inplanes) == (512, 128)
    shapes = [[x.shape[1:] for x in trunk_maps(net, pictures(1, 96)).values()] for net in (wide, narrow)]
    assert shapes[1] == [(width // 4, h, w) for width, h, w in shapes[0]]
    # The stem is as wide, so that the first block needs a projection.
    added = {name for name in narrow.state_dict() if name not in wide.state_dict()}
    assert {name.split("downsample")[0] for name in added} == {"layer1.0."}
    assert set(wide.state_dict()) <= set(narrow.state_dict())


def test_initial_weights_follow_torchvision_and_detectron2():
    net, head = FPNEncoder("narrow18"), detectron2_box_head()
    for name in ("conv1", "conv4", "fc1"):
        mine, theirs = net.box_head.get_submodule(name).weight, head.get_submodule(name).weight
        assert abs(mine.std() / theirs.std() - 1) < 0.01
        kurtosis = [(x / x.std()).pow(4).mean() for x in (mine, theirs)]        # 3 if normal, 1.8 if uniform
        assert abs(kurtosis[0] - kurtosis[1]) < 0.05
    assert (net.box_head.fc1.bias == 0).all()
    for linear in (*net.projector[::2], *C4Encoder("narrow18").projector[::2]):         # nn.Linear's own
        bound = 1 / math.sqrt(linear.in_features)
        assert 0.98 * bound < linear.weight.abs().max() <= bound and 0 < linear.bias.abs().max() <= bound


@both_encoders
def test_every_parameter_is_trained(kind):
    net = encoder(kind, training=True)
    out = net(pictures(4, 64), paper_boxes(4, 31, 64, 32))
    (out @ torch.randn(128, generator=seeded(1))).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


# ---- RoIAlign

def slow_roi_align(features, box, size, scale):
    """RoIAlign of one box on one map (C, h, w) by its definition: adaptive samples, half-pixel aligned."""
    channels, height, width = features.shape
    x1, y1, x2, y2 = (v * scale - 0.5 for v in box)
    bin_h, bin_w = (y2 - y1) / size, (x2 - x1) / size
    samples_y, samples_x = math.ceil(bin_h), math.ceil(bin_w)
    out = np.zeros((channels, size, size))
    for row, column, i, j in np.ndindex(size, size, samples_y, samples_x):
        y = y1 + row * bin_h + (i + 0.5) * bin_h / samples_y
        x = x1 + column * bin_w + (j + 0.5) * bin_w / samples_x
        if -1 <= y <= height and -1 <= x <= width:                              # outside: zero, but counted
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = features[:, top, left] * (left + 1 - x) + features[:, top, right] * (x - left)
            lower = features[:, bottom, left] * (left + 1 - x) + features[:, bottom, right] * (x - left)
            out[:, row, column] += upper * (top + 1 - y) + lower * (y - top)
    return out / (samples_y * samples_x)


@pytest.mark.parametrize("size, scale", [(3, 1 / 16), (2, 1 / 4)])
def test_roi_pool_equals_a_slow_loop_image_by_image(size, scale):
    rng, canvas = np.random.default_rng(20), np.array([9, 7]) / scale
    features = torch.tensor(rng.normal(size=(3, 2, 7, 9)))
    corner = rng.uniform(-0.4, 0.7, (3, 4, 2)) * canvas
    boxes = torch.tensor(np.concatenate([corner, corner + rng.uniform(0.1, 0.9, (3, 4, 2)) * canvas], axis=2))
    assert (boxes[..., :2] < 0).any() and (boxes[..., 2:] > torch.tensor(canvas)).any(dim=(0, 1)).all()
    expected = torch.tensor(np.stack([slow_roi_align(features[i].numpy(), boxes[i, m].tolist(), size, scale)
                                      for i in range(3) for m in range(4)]))
    torch.testing.assert_close(roi_pool(features, boxes, size, scale), expected, rtol=0, atol=1e-12)
    one_each = roi_pool(features.float(), boxes[:, 1].float(), size, scale)
    torch.testing.assert_close(one_each, expected[1::4].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_roi_pool_refuses_boxes_of_another_number_of_images(count):
    with pytest.raises(ValueError, match=f"boxes of {count} images"):
        roi_pool(torch.ones(2, 3, 8, 8), torch.ones(count, 4), 7, 1 / 16)


@both_memories
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_roi_pool_keeps_dtype_memory_and_the_precision_of_boxes(dtype, memory):
    features = torch.randn(2, 8, 16, 16, generator=seeded(21)).to(dtype).contiguous(memory_format=memory)
    boxes = torch.tensor([[129.3, 65.1, 254.7, 201.9], [3.3, 7.7, 131.1, 180.5]])
    expected = torchvision.ops.roi_align(features.float(), list(boxes[:, None]), 7, 1 / 16, -1, True)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            pooled = roi_pool(features, boxes, 7, 1 / 16)
        assert torch.equal(pooled, expected.to(dtype))
        assert pooled.dtype == dtype and pooled.is_contiguous(memory_format=memory)


# ---- C4

@both_modes
def test_c4_without_boxes_is_moco_v2s_network(training):
    net = encoder(C4Encoder, "resnet18", training=training)
    plain = torchvision.models.resnet18()
    plain.fc = nn.Identity()
    plain.load_state_dict(net.resnet.state_dict())
    expected = embedding(net.projector, plain.train(training)(pictures(3, 96)))
    assert torch.allclose(net(pictures(3, 96))[:, 0], expected, atol=1e-6)
    torch.testing.assert_close(net.resnet.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("arguments", [{}, {"roi_size": 7}])
def test_c4_pools_res4_and_runs_res5_on_every_box(arguments):
    net, images = encoder(C4Encoder, **arguments), pictures(2, 128)
    boxes = torch.tensor([[5.0, 9, 100, 128], [-20, 30.5, 70, 90]])
    align = torchvision.ops.RoIAlign(arguments.get("roi_size", 14), 1 / 16, sampling_ratio=-1, aligned=True)
    pooled = align(trunk_maps(net.resnet, images)["c4"], list(boxes[:, None]))
    expected = F.adaptive_avg_pool2d(net.resnet.layer4(pooled), 1).flatten(1)
    assert torch.allclose(net.features(images, boxes)[:, 0], expected, atol=1e-5)


@both_modes
@both_memories
@pytest.mark.parametrize("size", [96, 224])
def test_c4_with_the_whole_canvas_and_its_own_roi_size_is_no_box_to_the_bit(memory, training, size):
    results = []
    for boxes in (None, torch.tensor([0.0, 0, size, size]).expand(3, 4)):
        net = encoder(C4Encoder, training=training, roi_size=size // 16).to(memory_format=memory)
        images = pictures(3, size).contiguous(memory_format=memory).requires_grad_()
        out = net(images, boxes)
        (out @ torch.randn(128, generator=seeded(1))).sum().backward()
        results.append([out.detach(), images.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not torch.allclose(net(images, boxes * 0.7), out, atol=1e-3)


# ---- both encoders

@both_encoders
def test_many_boxes_an_image_equal_many_calls(kind):
    net, images, boxes = encoder(kind), pictures(3, 128), paper_boxes(6, 25, 128, 40).reshape(3, 2, 4)
    together = net(images, boxes)
    assert together.shape == (6, len(net.levels), 128)
    for m in range(2):
        assert torch.allclose(together[m::2], net(images, boxes[:, m]), atol=1e-5)      # image by image


@both_encoders
def test_embeddings_under_autocast_are_float32_of_length_one(kind):
    net, images, boxes = encoder(kind), pictures(2, 64), paper_boxes(2, 33, 64, 32)
    with torch.no_grad():
        exact = net(images, boxes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = net(images, boxes)
        double = net.double()(images.double(), boxes)
    assert low.dtype == torch.float32 and (low * exact).sum(dim=2).min() > 0.99
    assert double.dtype == torch.float64 and (double - exact).abs().max() < 1e-4
    assert (low.norm(dim=2) - 1).abs().max() < 1e-6 and (double.norm(dim=2) - 1).abs().max() < 1e-12


# ---- FPN

def detectron2_fpn(net, maps):
    """detectron2's FPN with the neck's weights, on the given maps C2 to C5."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import FPN, Backbone

    class Maps(Backbone):
        def forward(self, x):
            return maps

        def output_shape(self):
            return {name: ShapeSpec(channels=x.shape[1], stride=2 ** int(name[1]))
                    for name, x in maps.items()}

    neck, state = FPN(Maps(), list(maps), 256, norm="BN").to(maps["c2"].dtype), {}
    for theirs, blocks in (("lateral", net.fpn.inner_blocks), ("output", net.fpn.layer_blocks)):
        for i, (conv, norm) in enumerate(blocks, 2):
            state[f"fpn_{theirs}{i}.weight"] = conv.weight
            state.update(norm.state_dict(prefix=f"fpn_{theirs}{i}.norm."))
    neck.load_state_dict(state)                                 # strict: nothing missing, nothing over
    return neck


def detectron2_box_head(net=None):
    """detectron2's box head, as it initialises it or with the encoder's weights."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead

    spec = ShapeSpec(channels=256, height=7, width=7)
    head = FastRCNNConvFCHead(spec, conv_dims=[256] * 4, fc_dims=[1024], conv_norm="BN")
    if net is not None:
        names = {f"bn{i}.": f"conv{i}.norm." for i in range(1, 5)}
        head.to(net.box_head.fc1.weight.dtype)
        state = net.box_head.state_dict()
        head.load_state_dict({names.get(k[:4], k[:4]) + k[4:]: v for k, v in state.items()})
    return head


@both_modes
def test_fpn_equals_detectron2s_parts_on_every_level(training):
    from detectron2.layers import ROIAlign
    net = encoder(FPNEncoder, training=training).double()
    images, boxes = pictures(3, 128, 96).double(), paper_boxes(3, 29, 96, 48).double()
    neck = detectron2_fpn(net, trunk_maps(copy.deepcopy(net.resnet), images)).train(training)
    head = detectron2_box_head(net).train(training)
    pyramid = neck(None)
    rois = torch.cat([torch.arange(3.0)[:, None], boxes], dim=1)
    pooled = [ROIAlign(7, 1 / 2 ** i, 0, aligned=True)(pyramid[f"p{i}"], rois) for i in range(2, 6)]
    # Levels one after the other here, one call for all: BatchNorm sees them together.
    expected = head(torch.cat(pooled)).reshape(4, 3, 1024).transpose(0, 1)
    assert torch.allclose(copy.deepcopy(net).features(images, boxes), expected, rtol=0, atol=1e-10)
    assert torch.allclose(net(images, boxes), embedding(net.projector, expected), rtol=0, atol=1e-12)
    assert torch.allclose(net.fpn.layer_blocks[3][1].running_var, neck.fpn_output5.norm.running_var)
    assert torch.allclose(net.fpn.inner_blocks[0][1].running_mean, neck.fpn_lateral2.norm.running_mean)
    assert torch.allclose(net.box_head.bn4.running_var, head.conv4.norm.running_var)


def test_fpn_takes_boxes_level_by_level():
    net, images = encoder(FPNEncoder), pictures(2, 64)
    boxes = [paper_boxes(2, seed, 64, 20) for seed in range(4)]
    mixed = net(images, boxes)
    for level in range(4):
        assert torch.allclose(mixed[:, level], net(images, boxes[level])[:, level], atol=1e-5)
        assert not torch.allclose(mixed[:, level], net(images, boxes[level - 1])[:, level], atol=1e-3)
    with pytest.raises(ValueError, match="shorter"):
        net(images, boxes[:3])


def test_box_head_computes_in_the_memory_format_of_the_network():
    net, seen = encoder(FPNEncoder).to(memory_format=torch.channels_last), []
    net.box_head.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(pictures(2, 64).contiguous(memory_format=torch.channels_last), paper_boxes(2, 34, 64, 32))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)     # half the speed where it is lost
