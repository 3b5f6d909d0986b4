"""finetune_det.py: protocols key by key, features equal to detectron2's, what is loaded and what is left, the
rehearsal and what it finds, and (slow) trainings that are killed, resumed and evaluated."""
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

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import toy
from PIL import Image

import finetune_det as ft
import stage
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from insloc import C4Encoder, FPNEncoder
from weights import INPUTS, Weights, read_weights, to_detectron2

HERE = os.path.dirname(os.path.abspath(__file__))
FPN = ["random", "--protocol", "coco-fpn-1x", "--device", "cpu"]
SMALL = ("INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TRAIN 128 INPUT.MAX_SIZE_TEST 128 "
         "SOLVER.IMS_PER_BATCH 2 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TEST 20 "
         "TEST.DETECTIONS_PER_IMAGE 10 TEST.PRECISE_BN.NUM_ITER 2 DATALOADER.NUM_WORKERS 0").split()
RANDOM = Weights({}, {}, "resnet50", "random init", *INPUTS["imagenet"], ())


def read_json(path):
    with open(path) as f:
        return json.load(f)


def write_json(path, content):
    with open(path, "w") as f:
        json.dump(content, f)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    toy.write_world(str(out), train=0, val=0, det_train=20, det_val=8)
    return out


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
    assert notes == []                                          # nothing differs from the paper on 8 GPUs


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


@pytest.mark.parametrize("world, opts, want", [
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
def test_linear_rule(world, opts, want):
    cfg, notes = ft.build_config("coco-c4-1x", RANDOM, world=world, opts=opts)
    got = cfg.SOLVER
    assert (got.IMS_PER_BATCH, got.BASE_LR, got.MAX_ITER, got.STEPS, got.WARMUP_ITERS) == want
    assert got.CHECKPOINT_PERIOD == 5000
    paper = (16, 0.02, 90000, (60000, 80000), 1000)
    rules = [line for line in notes if line.startswith("SOLVER.")]
    assert len(rules) == sum(a != b for a, b in zip(want, paper))           # each difference is said


def test_a_smaller_batch_of_batchnorm_is_said():
    _, notes = ft.build_config("coco-fpn-1x", RANDOM, world=1)
    assert "sees 2 images at a time, paper 16" in notes[-1] and "SOLVER.IMS_PER_BATCH 16" in notes[-1]
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
    assert notes == ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64, paper 512 (given)"]


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
    with pytest.raises(ValueError, match="do not fit"):
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
    with pytest.raises(ValueError, match="--input caffe"):
        ft.get_weights(ft.get_args(arguments))
    weights = ft.get_weights(ft.get_args([*arguments, "--input", "caffe"]))
    cfg, _ = ft.build_config("voc-c4", weights, device="cpu")
    model, theirs = build_model(cfg), build_model(cfg)
    ft.load_weights(model, weights, "c4")
    DetectionCheckpointer(theirs).load(str(path))
    theirs = theirs.state_dict()
    learnt = [name for name in to_detectron2(c4[1], "c4") if name.endswith((".weight", ".bias"))]
    assert all(torch.equal(model.state_dict()[name], theirs[name]) for name in learnt)


def test_the_trunk_for_tests_is_refused(tmp_path):
    saved(FPNEncoder("narrow18"), tmp_path, "fpn")
    weights = ft.get_weights(ft.get_args([str(tmp_path), "--protocol", "coco-fpn-1x", "--data", "x"]))
    with pytest.raises(ValueError, match="narrow18"):
        ft.build_config("coco-fpn-1x", weights)


# ---- data and rehearsal

def empty_catalogs():
    """A process registers its sets once; these tests do it again and again."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in ("coco_train", "coco_val", "voc2007_trainval", "voc2012_trainval", "voc2007_test"):
            if name in catalog.list():
                catalog.remove(name)


def own_arguments(world, out):
    """The toy world's COCO part as a set of one's own, its json files in `out`."""
    arguments = []
    for name in ("train", "val"):
        arguments += [f"--{name}-images", world / "coco" / f"{name}2017"]
        arguments += [f"--{name}-json", out / f"{name}.json"]
    return arguments


def own_set(world, out, edit=lambda content: None, split="val", protocol="coco-fpn-1x"):
    """Arguments for such a set, one of its json files edited."""
    for name in ("train", "val"):
        content = read_json(world / "coco" / "annotations" / f"instances_{name}2017.json")
        if split in (name, "both"):
            edit(content)
        write_json(out / f"{name}.json", content)
    command = ["random", "--protocol", protocol, "--device", "cpu", "--out", out / "out"]
    return ft.get_args([str(x) for x in [*command, *own_arguments(world, out)]])


def loaded(args):
    empty_catalogs()
    os.makedirs(args.out, exist_ok=True)
    return ft.load_data(args)


def rehearsed(args):
    """What finetune_det.py does before it trains: the sets, the configuration, the rehearsal's notes."""
    data = loaded(args)
    cfg, _ = ft.build_config(args.protocol, RANDOM, data, 1, "cpu")
    cfg.OUTPUT_DIR = args.out
    return data, cfg, ft.rehearse(cfg, data.source)


def refused(args):
    with pytest.raises(Exception) as error:             # main makes a line of any
        rehearsed(args)
    line = ft.explain(error.value)
    assert "\n" not in line and len(line) < 400
    return line


def voc_args(data, out, classes=toy.CLASSES):
    return ft.get_args(["random", "--protocol", "voc-c4", "--data", str(data), "--device", "cpu",
                        "--classes", ",".join(classes), "--out", str(out)])


def test_the_toy_world_in_both_layouts_is_whole(world, tmp_path):
    data, cfg, notes = rehearsed(own_set(world, tmp_path))
    assert notes == [] and data.masks and not data.run_length
    assert [labels for *_, labels in data.sets] == [f"{tmp_path}/{x}.json" for x in ("train", "val")]
    assert cfg.DATASETS.TRAIN == ("coco_train",) and cfg.DATASETS.TEST == ("coco_val",)
    voc, cfg, notes = rehearsed(voc_args(world, tmp_path))
    assert notes == [] and not voc.masks and voc.classes == data.classes
    assert voc.images == data.images == 20
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5 and not cfg.MODEL.MASK_ON
    assert cfg.DATASETS.TRAIN == ("voc2007_trainval", "voc2012_trainval")
    assert os.path.getsize(tmp_path / "truth.png") > 5000


def test_coco_layout_and_own_json_are_the_same_set(world, tmp_path):
    data = loaded(ft.get_args(["random", *FPN[1:], "--data", str(world), "--out", str(tmp_path)]))
    own = loaded(own_set(world, tmp_path))
    assert data.digests == own.digests and data.images == own.images == 20


def test_truth_is_what_a_detector_returns(world, tmp_path):
    """By the second implementation of COCO: its own masks and boxes, crowds left out."""
    def crowd(content):
        content["annotations"][0]["iscrowd"] = 1
    data, _, notes = rehearsed(own_set(world, tmp_path, crowd))
    coco = ft.evaluation.coco_evaluation.COCO(data.sets[-1][2])
    found = 0
    for item in DatasetCatalog.get("coco_val"):
        boxes = coco.loadAnns(coco.getAnnIds(item["image_id"], iscrowd=False))
        truth = ft.perfect(item)
        assert len(truth) == len(boxes)
        for i, box in enumerate(boxes):
            x, y, w, h = box["bbox"]
            assert torch.allclose(truth.pred_boxes.tensor[i], torch.tensor([x, y, x + w, y + h]))
            assert np.array_equal(truth.pred_masks[i].numpy(), coco.annToMask(box).astype(bool))
        found += len(boxes)
    assert notes == [] and found == len(coco.anns) - 1


def every(key, value=None):
    """An edit that sets a key of every box, or takes it away."""
    def edit(content):
        for box in content["annotations"]:
            box.pop(key, None)
            if value is not None:
                box[key] = value
    return edit


def one(part, index, key, value=None):
    """The same with one box, image or category."""
    def edit(content):
        content[part][index].pop(key)
        if value is not None:
            content[part][index][key] = value
    return edit


def keypoints_on_some(content):
    content["annotations"][1].update(keypoints=[1, 2, 2], num_keypoints=1)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("edit", [every("area"), every("iscrowd"), every("keypoints", [3, 4, 2]), every("id"),
                                  keypoints_on_some])
def test_what_is_missing_or_not_used_is_mended(edit, split, world, tmp_path):
    data, _, notes = rehearsed(own_set(world, tmp_path, edit, split))
    assert notes == [] and data.masks
    with open(tmp_path / "out" / f"coco_{split}.json") as f:
        boxes = json.load(f)["annotations"]
    assert all({"id", "area", "iscrowd"} <= box.keys() and "keypoints" not in box for box in boxes)


def from_zero(content):
    for i, box in enumerate(content["annotations"]):
        box["id"] = i


def test_a_box_with_id_0_counts_as_matched(world, tmp_path, monkeypatch):
    args = own_set(world, tmp_path, from_zero)
    assert rehearsed(args)[2] == []
    monkeypatch.setattr(ft, "mended", lambda path, copy, tenth: path)       # the fault is real
    assert "itself reaches" in refused(args)


def test_class_names_that_are_numbers(world, tmp_path):
    def edit(content):
        for category in content["categories"]:
            category["name"] = category["id"]
    data, _, notes = rehearsed(own_set(world, tmp_path, edit, "both"))
    assert notes == [] and data.classes == ["1", "3", "7", "8", "20"]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("value", [None, [], [[]]])
def test_boxes_without_masks_are_boxes_alone(value, split, world, tmp_path):
    data, cfg, notes = rehearsed(own_set(world, tmp_path, every("segmentation", value), split))
    assert notes == [] and not data.masks and not cfg.MODEL.MASK_ON
    for name in ("train", "val"):                               # and none of the boxes is lost
        with open(tmp_path / f"{name}.json") as f:
            whole = len(json.load(f)["annotations"])
        assert sum(len(item["annotations"]) for item in DatasetCatalog.get(f"coco_{name}")) == whole


def test_one_box_without_a_mask_makes_boxes_alone(world, tmp_path):
    data, _, notes = rehearsed(own_set(world, tmp_path, one("annotations", 3, "segmentation", [[]])))
    assert notes == [] and not data.masks


def test_run_length_masks(world, tmp_path):
    def edit(content):
        for image in content["images"]:
            for box in content["annotations"]:
                if box["image_id"] == image["id"]:
                    parts = mask_util.frPyObjects(box["segmentation"], image["height"], image["width"])
                    rle = mask_util.merge(parts)
                    box["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    data, cfg, notes = rehearsed(own_set(world, tmp_path, edit, "train"))
    assert notes == [] and data.masks and cfg.INPUT.MASK_FORMAT == "bitmask"


def polygons_of_a_larger_picture(content):
    for box in content["annotations"]:
        box["segmentation"] = [[3 * x for x in polygon] for polygon in box["segmentation"]]


def polygons_as_shares(content):
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for box in content["annotations"]:
        width, height = sizes[box["image_id"]]
        box["segmentation"] = [(np.reshape(polygon, (-1, 2)) / (width, height)).flatten().tolist()
                               for polygon in box["segmentation"]]


def turned_run_length(content):
    height, width = content["images"][0]["width"], content["images"][0]["height"]
    for box in content["annotations"]:
        if box["image_id"] == content["images"][0]["id"]:
            box["segmentation"] = {"size": [height, width], "counts": [0, height * width]}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("edit, said", [
    (one("images", 2, "id", 2), "another image has the same id"),
    (one("images", 2, "id", 2), "'file_name': '000000000002.jpg'"),
    (one("annotations", 4, "image_id", "1"), "'id': 5"),
    (one("annotations", 4, "image_id", "1"), "its image_id is no image of this file"),
    (one("annotations", 2, "category_id", 77), "'file_name': '"),
    (one("annotations", 2, "category_id", 77), "category_id=77"),
    (one("annotations", 2, "bbox"), "'id': 3"), (one("annotations", 2, "bbox"), "KeyError: 'bbox'"),
    (one("annotations", 2, "bbox", [1, 2]), "'id': 3"),
    (one("annotations", 2, "bbox", [1, 2]), "IndexError"),
    (one("images", 1, "height"), "'file_name': '000000000002.jpg'"),
    (one("images", 1, "height"), "KeyError: 'height'"),
    (one("images", 1, "width", 7), "000000000002.jpg: it is "),
    (every("iscrowd", 1), "crowds (iscrowd 1) alone"),
    (polygons_of_a_larger_picture, "000000000001.jpg: box 0 has polygons that lie outside"),
    (polygons_as_shares, "jpg: box"), (turned_run_length, "000000000001.jpg: box 0 has a mask of"),
    (one("images", 3, "file_name", "absent.jpg"), "absent.jpg")])
def test_what_would_end_a_run_ends_it_before(edit, said, split, world, tmp_path):
    line = refused(own_set(world, tmp_path, edit, split))
    assert said in line and f"{split}.json" in line


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"images": [], "annotations": [], "categories": []}',
                                  '{"images": 3, "annotations": [], "categories": []}'])
def test_a_file_that_is_no_coco_json(text, world, tmp_path):
    args = own_set(world, tmp_path)
    with open(args.val_json, "w") as f:
        f.write(text)
    assert "val.json" in refused(args)


def test_other_classes_in_validation(world, tmp_path):
    args = own_set(world, tmp_path, one("categories", 0, "name", "else"))
    assert "its classes, ['else', " in refused(args)


def flat_boxes(count):
    def edit(content):
        for box in content["annotations"][:count]:
            box["bbox"][2] = 0
            box["segmentation"] = [[box["bbox"][0], box["bbox"][1]] * 3]
    return edit


def test_boxes_without_area_are_named_and_end_the_run(world, tmp_path):
    line = refused(own_set(world, tmp_path, flat_boxes(2)))
    assert "itself reaches bbox AP" in line
    assert "2 boxes have no area or mask in their picture" in line and "01.jpg" in line


def test_boxes_beyond_their_pictures_are_lost(world, tmp_path):
    def edit(content):
        for box in content["annotations"]:
            box["bbox"][0] += 300
            box.pop("segmentation")
    assert "itself reaches bbox AP" in refused(own_set(world, tmp_path, edit))


def test_a_little_that_is_lost_is_a_note(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ft.evaluation.COCOEvaluator, "evaluate", lambda self: {"bbox": {"AP": 99.5}})
    (note,) = rehearsed(own_set(world, tmp_path))[2]
    assert "reaches bbox AP 99.5, not 100" in note


# ---- pictures

def with_picture(world, out, picture, name="000000000002.jpg", **how):
    """The toy world's COCO part, one validation picture replaced, the json saying its size."""
    (out / "coco").mkdir()
    for part in ("train2017", "annotations"):
        os.symlink(world / "coco" / part, out / "coco" / part)
    (out / "coco" / "val2017").mkdir()
    for path in (world / "coco" / "val2017").iterdir():
        os.symlink(path, out / "coco" / "val2017" / path.name)
    os.remove(out / "coco" / "val2017" / "000000000002.jpg")
    picture.save(out / "coco" / "val2017" / name, **how)

    def edit(content):
        content["images"][1].update(file_name=name, width=picture.size[0], height=picture.size[1])
        content["annotations"] = [box for box in content["annotations"] if box["image_id"] != 2]
        content["annotations"].append({"id": 900, "image_id": 2, "category_id": 1, "bbox": [0, 0, 2, 1]})
        every("segmentation")(content)
    args = own_set(world, out, edit)
    args.val_images = str(out / "coco" / "val2017")
    return args


def test_a_picture_turned_by_exif_is_taken_as_it_is_seen(world, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    args = with_picture(world, tmp_path, Image.new("RGB", (60, 40)), exif=exif)
    assert "000000000002.jpg: it is 40 x 60, its label says 60 x 40" in refused(args)
    content = read_json(args.val_json)
    content["images"][1].update(width=40, height=60)
    write_json(args.val_json, content)
    data, cfg, notes = rehearsed(args)
    cfg.DATALOADER.NUM_WORKERS = 0
    assert notes == []
    assert next(iter(ft.Trainer.build_test_loader(cfg, "coco_val")))[0]["image"].shape[0] == 3


@pytest.mark.parametrize("picture, said", [
    (Image.fromarray(np.full((40, 60), 30000, dtype=np.uint16)), "a.png: pixels of kind I;16"),
    (Image.new("RGB", (20000, 2)), "a.png: 20000 x 2: resized")], ids=["16 bits", "extreme"])
def test_pictures_that_cannot_be_used(picture, said, world, tmp_path):
    assert said in refused(with_picture(world, tmp_path, picture, "a.png"))


def test_a_long_picture_is_drawn(world, tmp_path):
    _, cfg, notes = rehearsed(with_picture(world, tmp_path, Image.new("RGB", (3000, 31)), "a.png"))
    ft.draw(cfg, 8, ft.perfect, str(tmp_path / "a.png"))
    assert notes == [] and Image.open(tmp_path / "a.png").size == (4 * 484 + 4, 4 * 364 + 4)


def test_a_cut_jpeg_is_named_in_training_and_evaluation(world, tmp_path):
    args = with_picture(world, tmp_path, Image.effect_noise((90, 80), 60).convert("RGB"))
    path = os.path.join(args.val_images, "000000000002.jpg")
    os.truncate(path, os.path.getsize(path) // 2)
    args.train_images, args.train_json = args.val_images, args.val_json
    data = loaded(args)                             # its header is whole
    opts = ["DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"]
    cfg, _ = ft.build_config(args.protocol, RANDOM, data, 1, "cpu", opts)
    for loader in (ft.Trainer.build_train_loader(cfg), ft.Trainer.build_test_loader(cfg, "coco_val")):
        with pytest.raises(OSError) as error:
            for _ in zip(range(20), loader):
                pass
        assert ft.explain(error.value).startswith(f"{path}: image file is truncated")


def test_a_loader_workers_error_is_one_line():
    try:
        raise OSError("a.jpg: image file is truncated")
    except OSError:
        wrapped = torch._utils.ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(OSError) as error:
        wrapped.reraise()
    assert ft.explain(error.value).endswith("a.jpg: image file is truncated")


# ---- VOC trees

def voc_tree(world, out, list_edit=None, xml_edit=None, name="500001"):
    """The toy world's VOC part; its test list or one of its xml files edited."""
    for year in ("VOC2007", "VOC2012"):
        shutil.copytree(world / year, out / year)
    if list_edit:
        path = out / "VOC2007" / "ImageSets" / "Main" / "test.txt"
        path.write_text(list_edit(path.read_text()))
    if xml_edit:
        path = out / ("VOC2007" if name < "9" else "VOC2012") / "Annotations" / f"{name}.xml"
        path.write_text(xml_edit(path.read_text()))
    return voc_args(out, out / "out")


@pytest.mark.parametrize("list_edit, said", [
    (lambda text: text + "my picture\n", "number of columns changed"),
    (lambda text: text + "a#1\n", "a.xml"), (lambda text: text + "\n", "/.xml"),
    (lambda text: text.split()[0], "TypeError: iteration over a 0-d array"), (lambda text: "", "no box"),
    (lambda text: text + "absent\n", "absent.xml")])
def test_voc_lists(list_edit, said, world, tmp_path):
    line = refused(voc_tree(world, tmp_path, list_edit))
    assert said in line and "VOC2007" in line


@pytest.mark.parametrize("pattern, new, names", [
    ("<size>.*?</size>", "", None), ("(?s)<object>.*", "", None), ("(?s).*", "", None),
    ("<name>", "<name>un", None), ("xmin>", "left>", None),
    ("<xmin>.*?</xmin>", "<xmin>far</xmin>", None),
    ("<pose>.*?</pose>", "", ["500001"]), ("<difficult>.*?</difficult>", "", ["500001"]),      # evaluation's
    ("<xmin>(.*?)</xmin>", r"<xmin>\1.5</xmin>", ["500001"])])
def test_xml_files_are_named(pattern, new, names, world, tmp_path):
    for name in names or ["500001", "000001", "900001"]:
        args = voc_tree(world, tmp_path / name, None, lambda text: re.sub(pattern, new, text), name)
        assert f"{name}.xml: " in refused(args)


def test_twenty_classes_for_five(world, tmp_path):
    args = ft.get_args(["random", "--protocol", "voc-c4", "--data", str(world), "--out", str(tmp_path)])
    args.classes = [*toy.CLASSES, "unicorn"]
    assert "1 classes have no box (--classes)" in refused(args)


def test_voc2012_may_be_absent_from_a_tree_of_ones_own(world, tmp_path):
    os.symlink(world / "VOC2007", tmp_path / "VOC2007")
    data, _, notes = rehearsed(voc_args(tmp_path, tmp_path))
    assert [name for name, *_ in data.sets] == ["voc2007_trainval", "voc2007_test"] and notes == []


# ---- Mini-COCO

def test_minicoco_is_a_tenth_by_a_fixed_seed(world, tmp_path):
    with open(world / "coco" / "annotations" / "instances_train2017.json") as f:
        ids = sorted(image["id"] for image in json.load(f)["images"])
    data, _, notes = rehearsed(own_set(world, tmp_path, protocol="minicoco-c4"))
    first = np.random.Generator(np.random.PCG64(0)).permutation(ids)[:2].tolist()
    assert data.minicoco == sorted(first) and data.images == 2 and notes == []
    assert [item["image_id"] for item in DatasetCatalog.get("coco_train")] == data.minicoco
    assert data.minicoco_digest == stage.digest(str(image).encode() for image in data.minicoco)
    big = np.random.Generator(np.random.PCG64(0)).permutation(np.arange(118287))[:118287 // 10]
    assert len(big) == 11828 == ft.PROTOCOLS["minicoco-c4"][5]


# ---- report

def test_report_has_means_deviations_and_all_rows_of_the_paper(world, tmp_path, capsys):
    args = own_set(world, tmp_path, protocol="coco-c4-2x")
    data = loaded(args)
    trials = [{"seed": seed, "bbox": {"AP": 40.0 + seed, "AP50": 60.0, "AP75": 44.0},
               "segm": {"AP": 35.0, "AP50": float("nan"), "AP75": 37.0}} for seed in range(3)]
    cfg, notes = ft.build_config("coco-c4-2x", RANDOM, data)
    ft.report(args, cfg, notes, data, "source", trials)
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
    found = ft.paper_rows(protocol)
    assert len(found) == rows
    if protocol == "voc-c4":
        assert found["paper: SwAV, 400 epochs"] == {"AP": "45.1", "AP50": "77.4", "AP75": "46.5"}


# ---- from the command line

def here(*arguments):
    """The program in this process: exit status, standard output, standard error."""
    empty_catalogs()
    out, err, status, argv = io.StringIO(), io.StringIO(), 0, sys.argv
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
    return status, out.getvalue(), err.getvalue()


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
    assert "SOLVER.MAX_ITER 2, paper 90000 (given)" in text and "SyncBatchNorm does not run" in text
    assert re.search(r"^loaded: \d+ tensors, backbone.bottom_up, .*roi_heads.box_head$", text, re.M)
    assert re.search(r"^left at random init: 43 tensors, proposal_generator.rpn_head, ", text, re.M)
    assert re.search(r"^dropped: 4 tensors, encoder_q.projector$", text, re.M)
    assert re.search(r"^this run: mean of 1 ", text, re.M)
    assert re.search(r"^paper: InsLoc, 400 epochs ", text, re.M)
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
    (["--eval-only", "--input", "caffe"], [], "INPUT.FORMAT was RGB")])
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


def test_a_refused_set_leaves_no_run_behind(world, tmp_path):
    own_set(world, tmp_path, flat_boxes(3))
    arguments = [*FPN, *own_arguments(world, tmp_path), "--out", tmp_path / "out", *SHORT]
    assert "itself reaches" in line_of(*arguments)
    assert not list((tmp_path / "out").glob("trial*"))
    assert "itself reaches" in line_of(*arguments)                      # not: --out holds a run


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
            ft.train(cfg, RANDOM, "fpn", last, print)
    assert seeds == [5, 5 + 6000]


def test_cudnn_benchmark_is_used(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    line = line_of(*FPN, "--data", world, "--out", tmp_path / "out", *SHORT, "CUDNN_BENCHMARK", "True",
                   "MODEL.RESNETS.DEPTH", "18", "MODEL.ROI_HEADS.NAME", "Nobody")
    assert torch.backends.cudnn.benchmark and "Nobody" in line


def test_a_loss_that_is_not_finite_ends_in_one_line(world, tmp_path):
    line = line_of(*FPN, "--data", world, "--out", tmp_path / "out", *SHORT, "MODEL.RESNETS.DEPTH", "18",
                   "SOLVER.BASE_LR", "1e9", "SOLVER.MAX_ITER", "9", "SOLVER.WARMUP_ITERS", "0")
    assert "FloatingPointError" in line and "diverged" in line


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
    assert "this run: mean of 2" in text and re.search(r"paper: Random init +33.8 +60.2 +33.1", text)
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
    own_set(world, tmp_path, flat_boxes(3))
    process = start(*FPN, *own_arguments(world, tmp_path), "--out", tmp_path / "out", "--nprocs", "2", *SHORT)
    text = process.communicate()[0]
    assert process.returncode == 1 and text.count("error: ") == 1, text
    assert "itself reaches" in text.splitlines()[-1]


@pytest.mark.slow
def test_an_export_that_fails_is_one_line(tmp_path):
    process = start("absent.pth", *FPN[1:3], "--export", tmp_path / "a.pth")
    text = process.communicate()[0]
    assert process.returncode == 1 and "absent.pth: " in text and "Traceback" not in text
