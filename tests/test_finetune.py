"""finetune_det.py: protocols key by key, features equal to detectron2's, what is loaded and what is left,
three kinds of errors, and (slow) trainings that are killed, resumed and evaluated."""
import contextlib
import csv
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import toy
from conftest import PDB_SEPARATOR

import detsets
import finetune_det as ft
import stage
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from insloc import C4Encoder, FPNEncoder
from test_detsets import FPN, RANDOM, empty_catalogs, loaded, own_arguments, own_set, read_json, rehearsed
from weights import read_weights, to_detectron2

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = ("INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TRAIN 128 INPUT.MAX_SIZE_TEST 128 "
         "SOLVER.IMS_PER_BATCH 2 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TEST 20 "
         "TEST.DETECTIONS_PER_IMAGE 10 TEST.PRECISE_BN.NUM_ITER 2 DATALOADER.NUM_WORKERS 0").split()


def randomised(encoder, seed=0):
    """BatchNorm as after a training: nothing at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return encoder.eval()


def saved(encoder, path, arch):
    torch.save({"encoder_q": encoder.state_dict(), "args": {"arch": arch, "method": "insloc"}},
               path / "checkpoint.pth")
    return read_weights(str(path))


@pytest.fixture(scope="module")
def fpn(tmp_path_factory):
    encoder = randomised(FPNEncoder())
    return encoder, saved(encoder, tmp_path_factory.mktemp("fpn"), "fpn")


@pytest.fixture(scope="module")
def c4(tmp_path_factory):
    encoder = randomised(C4Encoder())
    return encoder, saved(encoder, tmp_path_factory.mktemp("c4"), "c4")


# ---- protocols

COMMON = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN", "MODEL.BACKBONE.FREEZE_AT": 0, "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "SyncBN", "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375], "INPUT.FORMAT": "RGB", "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.MAX_SIZE_TRAIN": 1333, "INPUT.MAX_SIZE_TEST": 1333, "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MIN_SIZE_TEST": 800, "TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 200,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02, "SOLVER.MOMENTUM": 0.9, "SOLVER.NESTEROV": False, "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0, "SOLVER.GAMMA": 0.1, "SOLVER.WARMUP_FACTOR": 1 / 1000,
    "SOLVER.WARMUP_METHOD": "linear",
    "SOLVER.AMP.ENABLED": False, "SOLVER.CLIP_GRADIENTS.ENABLED": False, "SOLVER.CHECKPOINT_PERIOD": 5000,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25, "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2", "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0}
COCO = {"MODEL.MASK_ON": True, "MODEL.ROI_HEADS.NUM_CLASSES": 80, "SOLVER.WARMUP_ITERS": 1000,
        "INPUT.MIN_SIZE_TRAIN": (640, 672, 704, 736, 768, 800)}
C4 = {"MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm", "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
      "MODEL.RPN.POST_NMS_TOPK_TEST": 1000, "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 12000,
      "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
      "MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES": ["res4"],
      "MODEL.ROI_MASK_HEAD.NUM_CONV": 0, "MODEL.ROI_MASK_HEAD.NORM": ""}
FPN_MODEL = {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
             "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
             "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"], "MODEL.FPN.NORM": "SyncBN",
             "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
             "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
             "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
             "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
             "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
             "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
             "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
             "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHeadExtraNorm", "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
             "MODEL.ROI_BOX_HEAD.NUM_FC": 1, "MODEL.ROI_BOX_HEAD.CONV_DIM": 256,
             "MODEL.ROI_BOX_HEAD.FC_DIM": 1024, "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
             "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
             "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
             "MODEL.ROI_MASK_HEAD.NUM_CONV": 4, "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
             "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14}
STATED = {
    "voc-c4": {**C4, "MODEL.MASK_ON": False, "MODEL.ROI_HEADS.NUM_CLASSES": 20,
               "SOLVER.STEPS": (18000, 22000),
               "SOLVER.MAX_ITER": 24000, "SOLVER.WARMUP_ITERS": 100,
               "INPUT.MIN_SIZE_TRAIN": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)},
    "coco-c4-1x": {**COCO, **C4, "SOLVER.STEPS": (60000, 80000), "SOLVER.MAX_ITER": 90000},
    "coco-c4-2x": {**COCO, **C4, "SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000},
    "coco-fpn-1x": {**COCO, **FPN_MODEL, "SOLVER.STEPS": (60000, 80000), "SOLVER.MAX_ITER": 90000},
    "coco-fpn-2x": {**COCO, **FPN_MODEL, "SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000},
    "minicoco-c4": {**COCO, **C4, "SOLVER.STEPS": (6000, 8000), "SOLVER.MAX_ITER": 9000}}


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("protocol", STATED)
def test_every_protocol_is_what_the_papers_code_states(protocol, fpn):
    cfg, notes = ft.build_config(protocol, fpn[1])
    assert {key: value(cfg, key) for key in {**COMMON, **STATED[protocol]}} == {**COMMON, **STATED[protocol]}
    epochs = ["9000 iterations are 12.2 epochs, the paper says 12"] if protocol == "minicoco-c4" else []
    assert notes == epochs                                      # nothing else differs on 8 GPUs


def test_baselines_of_fpn_have_no_extra_norm():
    cfg, _ = ft.build_config("coco-fpn-1x", RANDOM)
    assert cfg.MODEL.ROI_BOX_HEAD.NAME == "FastRCNNConvFCHead"


@pytest.mark.parametrize("word, want", [
    ("imagenet", ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], False)),
    ("zero-one", ("RGB", [0.0, 0.0, 0.0], [255.0, 255.0, 255.0], False)),
    ("caffe", ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], True))])
def test_input_says_what_the_weights_were_trained_on(word, want, tmp_path):
    torch.save(FPNEncoder("resnet34").resnet.state_dict(), tmp_path / "a.pth")
    for weights, depth in ((str(tmp_path / "a.pth"), 34), ("random", 50)):
        args = ft.get_args([weights, "--protocol", "voc-c4", "--data", "x", "--input", word])
        cfg, _ = ft.build_config("coco-fpn-1x", ft.get_weights(args))
        assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD,
                cfg.MODEL.RESNETS.STRIDE_IN_1X1) == want
        assert cfg.MODEL.RESNETS.DEPTH == depth


@pytest.mark.parametrize("processes, opts, want", [
    (1, [], (2, 0.0025, 720000, (480000, 640000), 8000)), (2, [], (4, 0.005, 360000, (240000, 320000), 4000)),
    (4, [], (8, 0.01, 180000, (120000, 160000), 2000)), (8, [], (16, 0.02, 90000, (60000, 80000), 1000)),
    (5, [], (10, 0.0125, 144000, (96000, 128000), 1600)),
    (16, [], (32, 0.04, 45000, (30000, 40000), 500)),
    (16, ["SOLVER.IMS_PER_BATCH", "16"], (16, 0.02, 90000, (60000, 80000), 1000)),
    (1, ["SOLVER.IMS_PER_BATCH", "16"], (16, 0.02, 90000, (60000, 80000), 1000)),
    (1, ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.1"], (4, 0.1, 360000, (240000, 320000), 4000)),
    (1, ["SOLVER.MAX_ITER", "900"], (2, 0.0025, 900, (600, 800), 10)),
    (1, ["SOLVER.MAX_ITER", "900", "SOLVER.STEPS", "(5, 6)", "SOLVER.WARMUP_ITERS", "7"],
     (2, 0.0025, 900, (5, 6), 7))])
def test_linear_rule(processes, opts, want):
    cfg, notes = ft.build_config("coco-c4-1x", RANDOM, world=processes, opts=opts)
    got = cfg.SOLVER
    assert (got.IMS_PER_BATCH, got.BASE_LR, got.MAX_ITER, got.STEPS, got.WARMUP_ITERS) == want
    assert got.CHECKPOINT_PERIOD == 5000
    paper = (16, 0.02, 90000, (60000, 80000), 1000)
    rules = [line for line in notes if line.startswith("SOLVER.")]
    assert len(rules) == sum(a != b for a, b in zip(want, paper))           # each difference is said


def test_a_smaller_batch_of_batchnorm_is_said():
    _, notes = ft.build_config("coco-fpn-1x", RANDOM, world=1)
    assert "sees 2 images at a time, MoCo's 16" in notes[-1] and "SOLVER.IMS_PER_BATCH 16" in notes[-1]
    _, notes = ft.build_config("coco-fpn-1x", RANDOM, world=1, opts=["SOLVER.IMS_PER_BATCH", "16"])
    assert not notes
    _, notes = ft.build_config("coco-fpn-1x", RANDOM, world=8, device="cpu")
    assert "sees 2 images" in notes[-1] and "SyncBatchNorm does not run" in notes[-2]


@pytest.mark.parametrize("protocol", ["voc-c4", "coco-fpn-1x", "coco-c4-2x"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 9])
def test_few_iterations_have_a_schedule(protocol, iterations):
    cfg, _ = ft.build_config(protocol, RANDOM, world=1, opts=["SOLVER.MAX_ITER", str(iterations)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = ft.Trainer.build_lr_scheduler(cfg, optimizer)
    for _ in range(iterations):
        optimizer.step()
        scheduler.step()
    assert all(0 < step < iterations for step in cfg.SOLVER.STEPS)


def test_every_override_is_said():
    _, notes = ft.build_config("coco-c4-1x", RANDOM, opts=["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64",
                                                           "TEST.EVAL_PERIOD", "100"])
    assert notes == ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64, protocol 512 (given)"]


# ---- weights in detectron2's models

@pytest.mark.parametrize("protocol, parameters, keys, left", [
    ("voc-c4", 33234160, 333, 15), ("coco-c4-1x", 35966828, 337, 19), ("coco-fpn-1x", 45713200, 435, 43)])
def test_sizes_and_exactly_what_is_left_at_init(protocol, parameters, keys, left, fpn):
    weights = fpn[1]
    cfg, _ = ft.build_config(protocol, weights, device="cpu")
    model = build_model(cfg)
    assert sum(x.numel() for x in model.parameters()) == parameters and len(model.state_dict()) == keys
    before = {name: x.clone() for name, x in model.state_dict().items()}
    loaded, rest = ft.load_weights(model, weights, "c4" if "c4" in protocol else "fpn")
    with open(os.path.join(HERE, "keymap_c4.csv" if "c4" in protocol else "keymap_fpn.csv")) as f:
        assert sorted(loaded) == sorted(row[1] for row in list(csv.reader(f))[1:])
    after = model.state_dict()
    assert len(rest) == left and sorted(loaded + rest) == sorted(after)
    assert all(torch.equal(after[name], before[name]) for name in rest)
    source = to_detectron2(weights, "c4" if "c4" in protocol else "fpn")
    assert all(torch.equal(after[name], source[name]) for name in loaded)
    suffix = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$"
    layers = {re.sub(suffix, "", name) for name in rest}
    rpn = {"proposal_generator.rpn_head." + name for name in ("conv", "objectness_logits", "anchor_deltas")}
    new = rpn | {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"}
    if protocol != "voc-c4":
        new |= {"roi_heads.mask_head.deconv", "roi_heads.mask_head.predictor"}
    if protocol == "coco-fpn-1x":
        new |= {f"roi_heads.mask_head.mask_fcn{i}{norm}" for i in range(1, 5) for norm in ("", ".norm")}
    new |= {"roi_heads.box_head.fc_extra_norm" if protocol == "coco-fpn-1x" else "roi_heads.res5.norm"}
    assert layers == new


def test_a_trunk_alone_leaves_neck_and_head_of_fpn(c4):
    cfg, _ = ft.build_config("coco-fpn-1x", c4[1], device="cpu")
    model = build_model(cfg)
    assert sum(x.numel() for x in model.parameters()) == 45711152 and len(model.state_dict()) == 430
    loaded, left = ft.load_weights(model, c4[1], "fpn")
    assert len(loaded) == 318 and len(left) == 43 - 5 + 48 + 26


@pytest.mark.parametrize("opts", [["MODEL.RESNETS.DEPTH", "101"], ["MODEL.FPN.NORM", ""],
                                  ["MODEL.ROI_BOX_HEAD.NUM_CONV", "2"],
                                  ["MODEL.ROI_BOX_HEAD.FC_DIM", "512"]])
def test_weights_that_do_not_fit_the_overrides_are_refused(opts, fpn):
    cfg, _ = ft.build_config("coco-fpn-1x", fpn[1], device="cpu")
    cfg.merge_from_list(opts)
    with pytest.raises(stage.Refusal, match="do not fit"):
        ft.load_weights(build_model(cfg), fpn[1], "fpn")


BOXES = torch.tensor([[3.0, 7.0, 100.0, 90.0], [40.5, 10.2, 150.0, 120.0], [0.0, 0.0, 160.0, 128.0],
                      [60.0, 60.0, 75.0, 71.0]])


@torch.no_grad()
def test_c4_features_are_detectron2s(c4):
    encoder, weights = c4
    model = build_model(ft.build_config("coco-c4-1x", weights, device="cpu")[0]).eval()
    ft.load_weights(model, weights, "c4")
    images = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    res4, heads = model.backbone(images)["res4"], model.roi_heads
    ours = encoder.res4(images)
    assert ours.std() > 0.1 and (res4 - ours).abs().max() < 1e-4 * ours.abs().max()
    pooled = heads.pooler([res4], [Boxes(BOXES), Boxes(BOXES.flip(0))])
    theirs = heads.res5[:-1](pooled).mean(dim=(2, 3))           # the last child is the extra norm
    mine = encoder.features(images, torch.stack([BOXES, BOXES.flip(0)]))[:, 0]
    assert list(dict(heads.res5.named_children())) == ["0", "1", "2", "norm"]
    assert mine.std() > 0.1 and (theirs - mine).abs().max() < 1e-4 * mine.abs().max()


@torch.no_grad()
def test_fpn_features_are_detectron2s(fpn):
    encoder, weights = fpn
    model = build_model(ft.build_config("coco-fpn-1x", weights, device="cpu")[0]).eval()
    ft.load_weights(model, weights, "fpn")
    images = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    theirs, ours = model.backbone(images), encoder.pyramid(images)
    boxes = torch.stack([BOXES, BOXES.flip(0)])
    features = encoder.features(images, boxes)                  # (8, 4, 1024)
    head = dict(model.roi_heads.box_head.named_children())
    assert list(head)[-1] == "fc_extra_norm"
    for level, stride in enumerate((4, 8, 16, 32)):
        p = theirs[f"p{level + 2}"]
        assert ours[level].std() > 0.1 and (p - ours[level]).abs().max() < 1e-4 * ours[level].abs().max()
        x = ROIPooler(7, (1 / stride,), 0, "ROIAlignV2")([p], [Boxes(boxes[0]), Boxes(boxes[1])])
        for name in list(head)[:-1]:
            x = head[name](x)
        assert features[:, level].std() > 0.01 and (x - features[:, level]).abs().max() < 1e-4 * x.abs().max()
    # The detector pools a box on the level that its size decides: its own pooler and head, against our four.
    x = model.roi_heads.box_pooler([theirs[f"p{i}"] for i in range(2, 6)], [Boxes(boxes[0]), Boxes(boxes[1])])
    for name in list(head)[:-1]:
        x = head[name](x)
    assert (x[:, None] - features).abs().amax(dim=2).amin(dim=1).max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize("protocol, arch, left", [("coco-fpn-1x", "fpn", 38),
    pytest.param("coco-c4-1x", "c4", 14, marks=pytest.mark.slow)])
def test_export_loads_by_detectron2s_own_checkpointer(protocol, arch, left, fpn, tmp_path, capsys):
    """The model is built from detectron2's own YAML and nothing but the keys that are printed."""
    saved(fpn[0], tmp_path, "fpn")
    out = str(tmp_path / "w.pth")
    ft.export(ft.get_args([str(tmp_path), "--protocol", protocol, "--export", out]))
    printed = capsys.readouterr().out
    base, keys = re.search(r"detectron2's (\S+) and (MODEL.WEIGHTS .*)", printed).groups()
    assert "MODEL.PIXEL_MEAN [123.675,116.28,103.53] " in printed
    cfg = get_cfg()
    cfg.merge_from_file(os.path.join(os.path.dirname(ft.detectron2.__file__), "model_zoo", "configs", base))
    keys = keys.replace(" SyncBN", " BN")                           # a CPU has no SyncBN
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *keys.split()])
    model = build_model(cfg)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    after, ours = model.state_dict(), to_detectron2(fpn[1], arch)
    assert all(torch.equal(after[name], x) for name, x in ours.items())
    assert len(after.keys() - ours.keys()) == left
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - ours.keys())
    assert set(torch.load(out, weights_only=True)) == {"model"}             # no NumPy, no code


def caffe2_blobs(own):
    """A known trunk in Caffe2's names, as MSRA's R-50.pkl."""
    blobs = {"conv1_w": own["conv1.weight"], "res_conv1_bn_s": own["bn1.weight"],
             "res_conv1_bn_b": own["bn1.bias"]}
    for name, x in own.items():
        match = re.match(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(weight|bias)$", name)
        if match:
            stage_number, block, kind, number, what = match.groups()
            branch, norm = "branch2" + " abc"[int(number)], kind == "bn"
            if kind == "downsample.":
                branch, norm = "branch1", number == "1"
            what = f"_bn_{'s' if what == 'weight' else 'b'}" if norm else "_w"
            blobs[f"res{int(stage_number) + 1}_{block}_{branch}{what}"] = x
    return {name: x.numpy() for name, x in blobs.items()}


def test_msras_pickle_equals_detectron2s_own_reading(c4, tmp_path):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(caffe2_blobs(c4[1].backbone), protocol=2))
    arguments = [str(path), "--protocol", "voc-c4", "--data", "x", "--trust"]
    with pytest.raises(stage.Refusal, match="--input caffe"):
        ft.get_weights(ft.get_args(arguments))
    weights = ft.get_weights(ft.get_args([*arguments, "--input", "caffe"]))
    cfg, _ = ft.build_config("voc-c4", weights, device="cpu")
    model, theirs = build_model(cfg), build_model(cfg)
    ft.load_weights(model, weights, "c4")
    DetectionCheckpointer(theirs).load(str(path))
    theirs = theirs.state_dict()
    learnt = [name for name in to_detectron2(c4[1], "c4") if name.endswith((".weight", ".bias"))]
    assert all(torch.equal(model.state_dict()[name], theirs[name]) for name in learnt)


@pytest.mark.parametrize("resnet, arch, protocol, left", [
    ("narrow18", "c4", "voc-c4", 15), ("resnet18", "c4", "coco-c4-1x", 19),
    ("resnet34", "c4", "coco-c4-1x", 19), ("narrow18", "fpn", "coco-c4-1x", 19),
    ("narrow18", "fpn", "coco-fpn-1x", 43)])
@torch.no_grad()
def test_other_trunks_have_detectron2s_features_too(resnet, arch, protocol, left, tmp_path):
    encoder = randomised(C4Encoder(resnet) if arch == "c4" else FPNEncoder(resnet))
    weights = saved(encoder, tmp_path, arch)
    cfg, notes = ft.build_config(protocol, weights, device="cpu")
    depth, width = int(resnet[-2:]), 16 if resnet == "narrow18" else 64
    assert f"a ResNet-{depth} with {width} channels in res2, paper ResNet-50 with 256" in notes
    model = build_model(cfg).eval()
    loaded, rest = ft.load_weights(model, weights, "c4" if "c4" in protocol else "fpn")
    assert len(rest) == left
    images = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    features, heads, boxes = model.backbone(images), model.roi_heads, [Boxes(BOXES), Boxes(BOXES.flip(0))]
    if arch == "fpn" and protocol == "coco-fpn-1x":
        ours = encoder.pyramid(images)
        pairs = [(features[f"p{level + 2}"], ours[level]) for level in range(4)]
    else:
        net = encoder.resnet
        res4 = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))))
        pairs = [(features["res4"], res4)]
    if arch == "c4":
        theirs = heads.res5[:-1](heads.pooler([features["res4"]], boxes)).mean(dim=(2, 3))
        pairs.append((theirs, encoder.features(images, torch.stack([BOXES, BOXES.flip(0)]))[:, 0]))
    for theirs, ours in pairs:
        assert ours.std() > 0.01 and (theirs - ours).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("resnet, protocol", [("narrow18", "coco-fpn-1x"), ("resnet18", "coco-c4-1x")])
def test_what_detectron2_itself_cannot_build_is_not_exported(resnet, protocol, tmp_path):
    saved(FPNEncoder(resnet), tmp_path, "fpn")
    command = [str(tmp_path), "--protocol", protocol, "--export", str(tmp_path / "w.pth")]
    with pytest.raises(stage.Refusal, match="detectron2 itself builds no"):
        ft.export(ft.get_args(command))


# ---- report

VOC_CLASSES = MetadataCatalog.get("voc_2007_test").thing_classes
COCO_CLASSES = MetadataCatalog.get("coco_2017_val").thing_classes
CLASSES = {protocol: VOC_CLASSES if protocol == "voc-c4" else COCO_CLASSES for protocol in STATED}


def test_report_has_means_deviations_and_all_rows_of_the_paper(world, tmp_path, capsys):
    args = own_set(world, tmp_path, protocol="coco-c4-2x")
    data = loaded(args)
    trials = [{"seed": seed, "bbox": {"AP": 40.0 + seed, "AP50": 60.0, "AP75": 44.0},
               "segm": {"AP": 35.0, "AP50": float("nan"), "AP75": 37.0}} for seed in range(3)]
    cfg, notes = ft.build_config("coco-c4-2x", RANDOM, data)
    ft.report(args, cfg, notes, data, "source", trials, ft.paper_rows("coco-c4-2x", CLASSES["coco-c4-2x"]))
    text = capsys.readouterr().out
    assert re.search(r"APbb +AP50bb +AP75bb +APmk +AP50mk +AP75mk", text)
    assert re.search(" +".join(["this run: mean of 3", "41.0 ± 1.0", "60.0 ± 0.0", "44.0 ± 0.0", "35.0 ± 0.0",
                                "nan ± nan", "37.0 ± 0.0"]), text)
    with open(os.path.join(HERE, "..", "docs", "paper_tables.csv")) as f:
        table = [row for row in csv.DictReader(f) if row["table"] in ("2a", "4b")]
    for row in table:                                           # every number of the paper's tables is there
        name = f"paper: {row['method']}" + (f", {row['epochs']} epochs" if row["epochs"] else "")
        line = next(line for line in text.splitlines() if re.match(re.escape(name) + r"  ", line))
        assert f"{float(row['value']):.1f}" in line.split()
    result = read_json(tmp_path / "out" / "results.json")
    assert result["data"] == json.loads(json.dumps(vars(data)))             # Mini-COCO's list and its digest
    assert result["mean"]["APbb"] == 41 and result["deviation"]["APbb"] == 1 and len(result["trials"]) == 3
    assert result["config"]["SOLVER"]["MAX_ITER"] == 180000 and result["commit"]


@pytest.mark.parametrize("protocol, rows", [("voc-c4", 12), ("coco-c4-1x", 8), ("coco-c4-2x", 12),
                                            ("coco-fpn-1x", 8), ("coco-fpn-2x", 12), ("minicoco-c4", 8)])
def test_rows_of_the_paper(protocol, rows):
    found = ft.paper_rows(protocol, CLASSES[protocol])
    assert len(found) == rows
    assert len(ft.paper_rows(protocol, sorted(CLASSES[protocol]))) == rows      # a json in another order
    assert not ft.paper_rows(protocol, toy.CLASSES)                             # not beside toy numbers
    assert not ft.paper_rows(protocol, CLASSES[protocol][:-1])
    if protocol == "voc-c4":
        assert found["paper: SwAV, 400 epochs"] == {"AP": "45.1", "AP50": "77.4", "AP75": "46.5"}


# ---- from the command line

def here(*arguments):
    """The program in this process: exit status, standard output, standard error."""
    empty_catalogs()
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err, status, argv = io.StringIO(), 0, sys.argv
    sys.argv = ["finetune_det.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            args = ft.get_args()
            stage.launch(ft.main, args, ft.prepare)
    except SystemExit as left:
        status = left.code
        if isinstance(status, str):
            err.write(status + "\n")
            status = 1
    finally:
        sys.argv = argv
    return status, out.buffer.getvalue().decode(), err.getvalue()


def line_of(*arguments):
    """The one line with which the program refuses its arguments."""
    status, out, err = here(*arguments)
    assert status not in (0, None) and "Traceback" not in out + err and err.count("\n") == 1, out + err
    return err


class Hostile:
    def __reduce__(self):
        return print, ("must not run",)


@pytest.mark.parametrize("arguments, said", [
    (["absent.pth", *FPN[1:]], "absent.pth: "), (["{there}/hostile.pth", *FPN[1:]], "--trust"),
    ([*FPN, "--trials", "0"], "--trials"),
    ([*FPN, "--export", "x.pth"], "--export FILE.pth"), ([*FPN, "--train-images", "x"], "--train-json"),
    ([*FPN, "SOLVER.MAX_ITER"], "odd length"), ([*FPN, "SOLVER.NO_SUCH", "3"], "NO_SUCH"),
    ([*FPN, "SOLVER.MAX_ITER", "many"], "many"),
    ([*FPN, "MODEL.WEIGHTS", "x"], "MODEL.WEIGHTS is set by"),
    ([*FPN, "SEED", "3"], "SEED is set by"), ([*FPN, "OUTPUT_DIR", "x"], "OUTPUT_DIR is set by"),
    ([*FPN, "DATASETS.TEST", "x"], "DATASETS.TEST is set by"),
    ([*FPN[:3], "MODEL.DEVICE", "cuda"], "no GPU"), ([*FPN[:3], "--device", "cuda"], "no GPU"),
    ([*FPN, "--eval-only"], "model_final.pth"), ([*FPN, "MODEL.ROI_HEADS.NAME", "Nobody"], "Nobody")])
def test_mistakes_end_in_one_line(arguments, said, world, tmp_path, monkeypatch):
    torch.save({"x": Hostile()}, tmp_path / "hostile.pth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    data = [] if "--train-images" in arguments else ["--data", world]
    arguments = [x.format(there=tmp_path) for x in arguments]
    line = line_of(*arguments[:3], *data, "--out", tmp_path / "out", *arguments[3:])
    assert said in line and line.startswith("finetune_det.py: error: ")


def test_data_that_are_not_there(tmp_path):
    line = line_of(*FPN, "--data", tmp_path, "--out", tmp_path / "out")
    assert "instances_train2017.json" in line
    line = line_of("random", "--protocol", "voc-c4", "--data", tmp_path, "--out", tmp_path / "out")
    assert "VOC2007/ImageSets/Main/trainval.txt" in line


SHORT = ["SOLVER.MAX_ITER", "2", *SMALL]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run of two iterations from an FPN of ours. -> its arguments, its folder, what it printed"""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    saved(FPNEncoder("resnet18"), folder, "fpn")
    arguments = [folder, *FPN[1:], "--data", world, "--out", folder / "out"]
    status, out, err = here(*arguments, *SHORT)
    assert status == 0, out + err
    return arguments, folder / "out", out


def test_a_run_says_what_it_does_and_writes_its_results(trained):
    _, out, text = trained
    assert "SOLVER.MAX_ITER 2, protocol 90000 (given)" in text and "SyncBatchNorm does not run" in text
    assert re.search(r"^loaded: \d+ tensors, backbone.bottom_up, .*roi_heads.box_head$", text, re.M)
    assert re.search(r"^left at random init: 43 tensors, proposal_generator.rpn_head, ", text, re.M)
    assert re.search(r"^dropped: 4 tensors, encoder_q.projector$", text, re.M)
    assert re.search(r"^this run: mean of 1 ", text, re.M)
    assert "paper: InsLoc" not in text                          # five classes are not COCO's 80
    assert "total_loss" in text                                 # progress
    result = read_json(out / "results.json")
    assert set(result["trials"][0]) >= {"seed", "bbox", "segm"}
    for path in (out / "rehearsal" / "truth.png", out / "trial0" / "detections.png"):
        assert path.stat().st_size > 5000
    assert list((out / "trial0").glob("events.out.tfevents*"))
    log = (out / "log.txt").read_text()
    assert "Environment info" in log and "Running with full config" in log


def test_done_trials_are_not_trained_again(trained):
    arguments, out, _ = trained
    before = (out / "trial0" / "model_final.pth").stat().st_mtime
    status, text, err = here(*arguments, "--resume", *SHORT, "SOLVER.CHECKPOINT_PERIOD", "9")
    assert status == 0 and "trial 0: done before" in text and "eta" not in text
    assert (out / "trial0" / "model_final.pth").stat().st_mtime == before


def test_eval_only_gives_the_same_numbers(trained):
    arguments, out, _ = trained
    first = (out / "results.json").read_text()
    status, text, err = here(*arguments, "--eval-only", *SHORT)
    assert status == 0, err
    assert read_json(out / "evaluation.json")["trials"] == json.loads(first)["trials"]
    assert (out / "results.json").read_text() == first


@pytest.mark.parametrize("flags, keys, said", [
    ([], [], "holds a run: --resume"),
    (["--resume"], ["SOLVER.BASE_LR", "0.1"], "SOLVER.BASE_LR was 0.0025, is 0.1"),
    (["--resume", "--seed", "3"], [], "SEED was 0, is 3"),
    (["--eval-only", "--input", "caffe"], [], "INPUT.FORMAT was RGB"),
    (["--eval-only"], ["MODEL.ROI_BOX_HEAD.NUM_CONV", "2"], "MODEL.ROI_BOX_HEAD.NUM_CONV was 4, is 2"),
    (["--eval-only", "--protocol", "coco-c4-1x"], [], "--protocol was coco-fpn-1x, is coco-c4-1x"),
    (["--eval-only", "--trials", "2"], [], "trial1/model_final.pth is not there")])
def test_other_settings_are_no_continuation(flags, keys, said, trained):
    arguments, _, _ = trained
    assert said in line_of(*arguments, *flags, *SHORT, *keys)


def test_other_weights_are_no_continuation(trained, tmp_path):
    arguments, out, _ = trained
    torch.manual_seed(1)
    saved(FPNEncoder("resnet18"), tmp_path, "fpn")
    assert "weights was" in line_of(tmp_path, *arguments[1:], "--resume", *SHORT)


def test_other_labels_are_no_continuation(trained, world, tmp_path):
    arguments, out, _ = trained
    shutil.copytree(world / "coco", tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    moved = [str(tmp_path) if x == world else x for x in arguments]
    status, text, err = here(*moved, "--resume", *SHORT)                # the same labels elsewhere
    assert status == 0 and "done before" in text
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    path.write_text(json.dumps(content))
    assert "labels was" in line_of(*moved, "--resume", *SHORT)


def nothing_to_find(content):
    for box in content["annotations"]:
        box["bbox"][0] += 1000
        box.pop("segmentation")


def test_a_refused_set_leaves_no_run_behind(world, tmp_path):
    own_set(world, tmp_path, nothing_to_find)
    arguments = [*FPN, *own_arguments(world, tmp_path), "--out", tmp_path / "out", *SHORT]
    assert "itself reaches" in line_of(*arguments)
    assert not list((tmp_path / "out").glob("trial*"))
    assert "itself reaches" in line_of(*arguments)                      # not: --out holds a run


@pytest.mark.parametrize("keys, said", [
    (["MODEL.ROI_HEADS.NUM_CLASSES", "2"], "MODEL.ROI_HEADS.NUM_CLASSES 2, but the labels make it 5"),
    (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], "MODEL.ROI_HEADS.NUM_CLASSES 80, but the labels make it 5"),
    (["MODEL.ROI_HEADS.NUM_CLASSES", "0"], "MODEL.ROI_HEADS.NUM_CLASSES 0, but the labels make it 5")])
def test_keys_that_the_labels_decide(keys, said, world, tmp_path):
    data = loaded(own_set(world, tmp_path))
    with pytest.raises(stage.Refusal, match=said):
        ft.build_config("coco-fpn-1x", RANDOM, data, opts=keys)
    ft.build_config("coco-fpn-1x", RANDOM, data, opts=["MODEL.MASK_ON", "False"])
    data.masks = False
    with pytest.raises(stage.Refusal, match="MODEL.MASK_ON True"):
        ft.build_config("coco-fpn-1x", RANDOM, data, opts=["MODEL.MASK_ON", "True"])


def test_what_the_labels_decide_is_said(world, tmp_path):
    data = loaded(own_set(world, tmp_path, protocol="minicoco-c4"))
    _, notes = ft.build_config("minicoco-c4", RANDOM, data)
    assert notes == ["MODEL.ROI_HEADS.NUM_CLASSES 5, protocol 80 (the labels)",
                     "2 training images, protocol 11828",
                     "9000 iterations are 72000.0 epochs, the paper says 12"]


def test_a_table_that_is_missing_costs_its_rows_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ft, "__file__", str(tmp_path / "finetune_det.py"))
    assert ft.paper_rows("coco-fpn-1x", CLASSES["coco-fpn-1x"]) == {}
    assert "the paper's rows will be missing" in capsys.readouterr().out


@pytest.mark.parametrize("kept, used", [(["model_0000013.pth", "model_0000006.pth"], "model_0000013.pth"),
                                        (["model_0000006.pth"], "model_0000006.pth"), ([], None)])
def test_a_checkpoint_that_is_gone(kept, used, tmp_path, capsys):
    assert ft.newest_checkpoint(tmp_path) == ""
    (tmp_path / "last_checkpoint").write_text("model_0000013.pth")
    for name in kept:
        (tmp_path / name).touch()
    if used is None:
        with pytest.raises(stage.Refusal, match="model_0000013.pth, which is gone"):
            ft.newest_checkpoint(tmp_path)
        return
    assert ft.newest_checkpoint(tmp_path) == (tmp_path / "last_checkpoint").read_text() == used
    said = "model_0000013.pth, which is gone: model_0000006.pth" in capsys.readouterr().out
    assert said == (len(kept) == 1)


# ---- bugs keep their traceback

def planted(self, item):
    return item["no such key"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bug_in_the_mapper_keeps_its_traceback(workers, world, tmp_path, monkeypatch):
    monkeypatch.setattr(DatasetMapper, "__call__", planted)
    with pytest.raises(KeyError, match="no such key") as error:
        here(*FPN, "--data", world, "--out", tmp_path / "out", *SHORT, "MODEL.RESNETS.DEPTH", "18",
             "DATALOADER.NUM_WORKERS", workers)
    lines = error.traceback if workers == "0" else str(error.value)
    assert "in planted" in str(lines) or any(entry.name == "planted" for entry in lines)


@pytest.mark.parametrize("error", [KeyError, ValueError, AssertionError])
def test_a_bug_in_a_head_keeps_its_traceback(error, monkeypatch):
    def broken(cfg, number):
        raise error("planted")
    monkeypatch.setattr(ft, "basic_stage", broken)
    cfg, _ = ft.build_config("coco-c4-1x", RANDOM, device="cpu", opts=["MODEL.RESNETS.DEPTH", "18"])
    with pytest.raises(error, match="planted"), ft.building():
        build_model(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "Nobody"
    with pytest.raises(stage.Refusal, match="KEY VALUE: .*Nobody"), ft.building():
        build_model(cfg)


def test_a_picture_that_cannot_be_drawn_costs_itself_alone(world, tmp_path, monkeypatch, capsys):
    def broken(*given, **more):
        raise OSError("no font")
    monkeypatch.setattr(detsets, "draw_cell", broken)
    assert rehearsed(own_set(world, tmp_path))[2] == []
    assert "no truth.png: OSError: no font; the run goes on" in capsys.readouterr().out
    cfg, _ = ft.build_config("coco-fpn-1x", RANDOM, loaded(own_set(world, tmp_path)), device="cpu")
    model = torch.nn.Identity()
    stage.attempt("detections.png", ft.draw_detections, cfg, model)
    assert "no detections.png" in capsys.readouterr().out


def test_a_killed_loader_worker_is_one_line():
    with pytest.raises(stage.Refusal, match="a DataLoader worker was killed"), ft.running():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="mat1"), ft.running():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_picture_that_a_loader_worker_cannot_read_is_one_line():
    try:
        raise stage.Refusal("a.jpg: image file is truncated")
    except stage.Refusal:
        wrapped = torch._utils.ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(stage.Refusal) as error, ft.running():
        wrapped.reraise()
    assert str(error.value) == "a.jpg: image file is truncated"


def test_a_resumed_trial_draws_anew(monkeypatch):
    """Else a run that is often killed would see the same first images again and again."""
    cfg, _ = ft.build_config("coco-fpn-1x", RANDOM, opts=["SEED", "5"])
    seeds = []

    def stop(cfg):
        raise InterruptedError
    monkeypatch.setattr(ft, "seed_all_rng", seeds.append)
    monkeypatch.setattr(ft, "Trainer", stop)
    for last in ("", "model_0000006.pth"):
        with pytest.raises(InterruptedError):
            ft.train(cfg, RANDOM, "fpn", last)
    assert seeds == [5, 5 + 6000]


def test_cudnn_benchmark_is_used(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    line = line_of(*FPN, "--data", world, "--out", tmp_path / "out", *SHORT, "CUDNN_BENCHMARK", "True",
                   "MODEL.RESNETS.DEPTH", "18", "MODEL.ROI_HEADS.NAME", "Nobody")
    assert torch.backends.cudnn.benchmark and "Nobody" in line


def test_a_loss_that_is_not_finite_ends_in_one_line(world, tmp_path):
    line = line_of(*FPN, "--data", world, "--out", tmp_path / "out", *SHORT, "MODEL.RESNETS.DEPTH", "18",
                   "SOLVER.BASE_LR", "1e9", "SOLVER.MAX_ITER", "9", "SOLVER.WARMUP_ITERS", "0")
    assert "diverged" in line and "SOLVER.BASE_LR" in line


# ---- slow: processes of their own

def start(*arguments, **environment):
    command = [sys.executable, os.path.join(HERE, "..", "finetune_det.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=environment)


@pytest.mark.slow
def test_killed_resumed_evaluated(world, tmp_path):
    """COCO layout, masks, ResNet-18 FPN: killed between checkpoints, resumed; loss falls; pictures, AP."""
    out, weights = tmp_path / "out", tmp_path / "run"
    torch.manual_seed(0)
    weights.mkdir()
    saved(FPNEncoder("resnet18"), weights, "fpn")
    command = [weights, "--protocol", "coco-fpn-1x", "--data", world, "--out", out,
               "--resume", *SMALL, "SOLVER.BASE_LR", "0.02", "SOLVER.MAX_ITER", "60",
               "SOLVER.CHECKPOINT_PERIOD", "7"]
    process = start(*command)
    deadline = time.time() + 120
    while (not list(out.glob("trial0/model_00000[12]*.pth")) and process.poll() is None
           and time.time() < deadline):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "results.json").exists()
    assert len(list(out.glob("trial0/model_0*.pth"))) <= 3
    process = start(*command)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert int(re.search(r"going on at iteration (\d+) of 60", text)[1]) in range(7, 60, 7)
    with open(out / "trial0" / "metrics.json") as f:
        lines = [json.loads(line) for line in f]
    losses = {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}
    assert losses[59] < 0.97 * losses[min(losses)], losses      # medians of 20 iterations


@pytest.mark.slow
def test_voc_two_trials_on_two_processes_then_eval_only_on_one(world, tmp_path):
    command = ["random", "--protocol", "voc-c4", "--data", world, "--classes", ",".join(toy.CLASSES),
               "--out", tmp_path / "out", "--trials", "2", "--nprocs"]
    process = start(*command, "2", *SHORT)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    first = read_json(tmp_path / "out" / "results.json")
    assert [trial["seed"] for trial in first["trials"]] == [0, 1]
    assert list(first["mean"]) == ["AP", "AP50", "AP75"]
    assert "this run: mean of 2" in text
    status, text, err = here(*command, "1", "--eval-only", *SHORT)
    assert status == 0, err
    assert read_json(tmp_path / "out" / "evaluation.json")["trials"] == first["trials"]


@pytest.mark.slow
def test_two_runs_into_one_folder(world, tmp_path):
    command = [*FPN, "--data", world, "--out", tmp_path, "--resume", *SMALL, "SOLVER.MAX_ITER", "500",
               "MODEL.RESNETS.DEPTH", "18"]
    first = start(*command)
    deadline = time.time() + 120
    while not (tmp_path / stage.LOCK).exists() and first.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    assert "another process works in" in line_of(*command)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()


@pytest.mark.slow
def test_ranks_that_begin_at_different_iterations_stop_with_one_line(world, tmp_path):
    """Two machines, whose --out is not the same folder."""
    (tmp_path / "0" / "trial0").mkdir(parents=True)
    (tmp_path / "0" / "trial0" / "last_checkpoint").write_text("model_0000006.pth")
    (tmp_path / "0" / "trial0" / "model_0000006.pth").touch()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [start(*FPN, "--data", world, "--out", tmp_path / str(rank), "--resume", *SHORT,
                       "MODEL.RESNETS.DEPTH", "18", RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                       MASTER_PORT=port) for rank in range(2)]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 1 for process in processes), texts
    assert "the processes differ" in texts[0] and "model_0000006.pth" in texts[0]
    assert "Traceback" not in texts[0] + texts[1] and "error" not in texts[1]


@pytest.mark.slow
def test_a_wrong_set_is_one_line_on_two_processes(world, tmp_path):
    own_set(world, tmp_path, nothing_to_find)
    process = start(*FPN, *own_arguments(world, tmp_path), "--out", tmp_path / "out", "--nprocs", "2", *SHORT)
    text = process.communicate()[0]
    assert process.returncode == 1 and text.count("error: ") == 1, text
    assert "itself reaches" in text.splitlines()[-1]


PLANT = """
from detectron2.data import DatasetMapper
from detectron2.utils import comm

def planted(self, item):
    if comm.get_rank() == comm.get_world_size() - 1:
        item["no such key"]
    return call(self, item)

call, DatasetMapper.__call__ = DatasetMapper.__call__, planted
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["--nprocs", "2"], ["pdb"]])
def test_a_bug_of_one_rank_and_under_pdb_shows_file_and_line(launcher, world, tmp_path):
    """Planted by a module that each process imports at its start; the last rank alone meets it."""
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    arguments = [*FPN, "--data", world, "--out", tmp_path / "out", *SHORT, "MODEL.RESNETS.DEPTH", "18"]
    pdb = launcher == ["pdb"]
    command = [sys.executable, *(["-m", "pdb", "-c", "continue", *PDB_SEPARATOR] if pdb else []),
               os.path.join(HERE, "..", "finetune_det.py"), *map(str, arguments), *([] if pdb else launcher)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, input="where\nquit\nquit\n" if pdb else "", capture_output=True, text=True,
                          env=environment, timeout=300)
    text = done.stdout + done.stderr
    assert "KeyError: 'no such key'" in text, text
    assert re.search(r'sitecustomize.py(", line |\()7\)?.*planted', text), text
    assert not pdb or "post mortem" in text


@pytest.mark.slow
def test_an_export_that_fails_is_one_line(tmp_path):
    process = start("absent.pth", *FPN[1:3], "--export", tmp_path / "a.pth")
    text = process.communicate()[0]
    assert process.returncode == 1 and "absent.pth: " in text and "Traceback" not in text
