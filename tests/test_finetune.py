"""finetune_det.py: protocols key by key, features equal to detectron2's, what is loaded and what is left,
data checks, and a real training that is killed, resumed and evaluated."""
import csv
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import toy

import finetune_det as ft
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from insloc import PIXEL_MEAN, PIXEL_STD, C4Encoder, FPNEncoder, Weights, read_weights, to_detectron2

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = ("INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TRAIN 128 INPUT.MAX_SIZE_TEST 128 "
         "SOLVER.IMS_PER_BATCH 2 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TEST 20 "
         "TEST.DETECTIONS_PER_IMAGE 10 TEST.PRECISE_BN.NUM_ITER 2 DATALOADER.NUM_WORKERS 0").split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    toy.write_world(str(out), train=0, val=0, det_train=20, det_val=5)
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
FPN = {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
       "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
       "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"], "MODEL.FPN.NORM": "SyncBN",
       "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
       "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
       "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
       "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
       "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
       "MODEL.ROI_HEADS.NAME": "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
       "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHeadExtraNorm", "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
       "MODEL.ROI_BOX_HEAD.NUM_FC": 1, "MODEL.ROI_BOX_HEAD.CONV_DIM": 256, "MODEL.ROI_BOX_HEAD.FC_DIM": 1024,
       "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
       "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7, "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
       "MODEL.ROI_MASK_HEAD.NUM_CONV": 4, "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
       "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14}
STATED = {
    "voc-c4": {**C4, "MODEL.MASK_ON": False, "MODEL.ROI_HEADS.NUM_CLASSES": 20,
               "SOLVER.STEPS": (18000, 22000),
               "SOLVER.MAX_ITER": 24000, "SOLVER.WARMUP_ITERS": 100,
               "INPUT.MIN_SIZE_TRAIN": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)},
    "coco-c4-1x": {**COCO, **C4, "SOLVER.STEPS": (60000, 80000), "SOLVER.MAX_ITER": 90000},
    "coco-c4-2x": {**COCO, **C4, "SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000},
    "coco-fpn-1x": {**COCO, **FPN, "SOLVER.STEPS": (60000, 80000), "SOLVER.MAX_ITER": 90000},
    "coco-fpn-2x": {**COCO, **FPN, "SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000},
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
    cfg, _ = ft.build_config("coco-fpn-1x", None)
    assert cfg.MODEL.ROI_BOX_HEAD.NAME == "FastRCNNConvFCHead"


def test_the_weights_bring_their_input_and_depth(tmp_path):
    state = C4Encoder("resnet101").resnet.state_dict()
    torch.save({"module." + name: x for name, x in state.items()}, tmp_path / "swav.pth")
    cfg, _ = ft.build_config("coco-fpn-1x", read_weights(str(tmp_path / "swav.pth")))
    assert cfg.MODEL.PIXEL_STD == [58.14, 57.12, 57.375] and cfg.MODEL.RESNETS.DEPTH == 101
    swapped = Weights({}, {}, "", PIXEL_MEAN[::-1], PIXEL_STD[::-1], "BGR", ())
    cfg, _ = ft.build_config("coco-fpn-1x", swapped)
    assert cfg.INPUT.FORMAT == "BGR" and cfg.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]


@pytest.mark.parametrize("world, opts, want", [
    (1, [], (2, 0.0025, 720000, (480000, 640000), 8000)), (4, [], (8, 0.01, 180000, (120000, 160000), 2000)),
    (5, [], (10, 0.0125, 144000, (96000, 128000), 1600)), (8, [], (16, 0.02, 90000, (60000, 80000), 1000)),
    (16, [], (16, 0.02, 90000, (60000, 80000), 1000)),
    (1, ["SOLVER.IMS_PER_BATCH", "16"], (16, 0.02, 90000, (60000, 80000), 1000)),
    (1, ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.1"], (4, 0.1, 360000, (240000, 320000), 4000)),
    (1, ["SOLVER.MAX_ITER", "900"], (2, 0.0025, 900, (600, 800), 10)),
    (1, ["SOLVER.MAX_ITER", "900", "SOLVER.STEPS", "(5, 6)", "SOLVER.WARMUP_ITERS", "7"],
     (2, 0.0025, 900, (5, 6), 7))])
def test_linear_rule(world, opts, want):
    cfg, notes = ft.build_config("coco-c4-1x", world=world, opts=opts)
    got = cfg.SOLVER
    assert (got.IMS_PER_BATCH, got.BASE_LR, got.MAX_ITER, got.STEPS, got.WARMUP_ITERS) == want
    paper = (16, 0.02, 90000, (60000, 80000), 1000)
    assert len(notes) == sum(a != b for a, b in zip(want, paper))           # each difference is said


@pytest.mark.parametrize("protocol, opts, said", [
    ("coco-c4-1x", ["SOLVER.NO_SUCH", "3"], "override"),
    ("coco-c4-1x", ["SOLVER.MAX_ITER", "many"], "override"),
    ("coco-c4-1x", ["MODEL.RESNETS.DEPTH", "18"], "needs an fpn protocol"),
    ("coco-c4-1x", ["SOLVER.IMS_PER_BATCH", "5"], "does not divide by 2")])
def test_impossible_configurations_are_one_line(protocol, opts, said):
    with pytest.raises(SystemExit) as error:
        ft.build_config(protocol, world=2, opts=opts)
    assert said in str(error.value) and "\n" not in str(error.value)


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
    with pytest.raises(ValueError, match="do not fit|would stay"):
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


def test_export_loads_by_detectron2s_own_checkpointer(fpn, tmp_path, capsys):
    saved(fpn[0], tmp_path, "fpn")
    out = str(tmp_path / "w.pkl")
    ft.export(ft.get_args([str(tmp_path), "--protocol", "coco-fpn-1x", "--export", out]))
    printed = capsys.readouterr().out
    assert "MODEL.PIXEL_MEAN [123.675,116.28,103.53] " in printed
    cfg = get_cfg()                                     # Base-RCNN-FPN.yaml, and nothing but what is printed
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
                         "MODEL.RESNETS.OUT_FEATURES", "res2,res3,res4,res5".split(","),
                         "MODEL.FPN.IN_FEATURES", "res2,res3,res4,res5".split(","),
                         "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
                         "MODEL.RPN.IN_FEATURES", "p2,p3,p4,p5,p6".split(","),
                         "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
                         "MODEL.ROI_HEADS.IN_FEATURES", "p2,p3,p4,p5".split(","),
                         "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
                         *printed.partition(" and ")[2].replace(" SyncBN", " BN").split()])    # a CPU has no SyncBN
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    state = model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in to_detectron2(fpn[1], "fpn").items())
    assert len(read_weights(out).extras) == 74                  # and our reader takes it, without trust


def test_msras_pickle_goes_through_detectron2(c4, tmp_path):
    """A file in Caffe2's names, made from a known trunk: all convolutions arrive; BGR, stride in the 1x1."""
    own = c4[1].backbone
    blobs = {"conv1_w": own["conv1.weight"], "res_conv1_bn_s": own["bn1.weight"],
             "res_conv1_bn_b": own["bn1.bias"]}
    for name, x in own.items():
        match = re.match(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(weight|bias)$", name)
        if match:
            stage, block, kind, number, what = match.groups()
            if kind == "downsample.":
                branch, norm = "branch1", number == "1"
            else:
                branch, norm = "branch2" + " abc"[int(number)], kind == "bn"
            what = f"_bn_{'s' if what == 'weight' else 'b'}" if norm else "_w"
            blobs[f"res{int(stage) + 1}_{block}_{branch}{what}"] = x
    path = str(tmp_path / "R-50.pkl")
    with open(path, "wb") as f:
        pickle.dump({name: x.numpy() for name, x in blobs.items()}, f, protocol=2)
    weights, file = ft.get_weights(ft.get_args([path, "--protocol", "voc-c4", "--data", "x"]))
    cfg, _ = ft.build_config("voc-c4", weights, device="cpu", msra=bool(file))
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("BGR", True)
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0])
    model = build_model(cfg)
    ft.load_weights(model, weights, "c4", file)
    state = model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in to_detectron2(c4[1], "c4").items()
               if name.endswith((".weight", ".bias")))
    for gone, named in (("res4_3_branch2b_w", "res4.3.conv2.weight"),   # a layer less: refused, not left at random
                        ("res2_0_branch2a_bn_b", "res2.0.conv1.norm.bias")):
        with open(path, "wb") as f:
            pickle.dump({name: x.numpy() for name, x in blobs.items() if name != gone}, f, protocol=2)
        _, file = ft.get_weights(ft.get_args([path, "--protocol", "voc-c4", "--data", "x"]))
        with pytest.raises(ValueError, match=named):
            ft.load_weights(build_model(cfg), weights, "c4", file)


# ---- data

def args_for(world, *extra, protocol="coco-fpn-1x"):
    return ft.get_args(["random", "--protocol", protocol, "--data", str(world), *extra])


def stopped(call, *arguments):
    with pytest.raises(SystemExit) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and str(error.value).startswith("finetune_det.py: error: ")
    return str(error.value)


def test_toy_world_in_both_layouts(world):
    said = []
    coco = ft.load_data(args_for(world), said.append)
    voc = ft.load_data(args_for(world, "--classes", ",".join(coco.classes), protocol="voc-c4"), said.append)
    assert coco.images == voc.images == 20 and coco.classes == voc.classes and coco.boxes == voc.boxes
    assert coco.masks and not voc.masks
    assert (coco.train, coco.test) == (("coco_2017_train",), ("coco_2017_val",))
    assert (voc.train, voc.test) == (("voc_2007_trainval", "voc_2012_trainval"), ("voc_2007_test",))
    cfg, _ = ft.build_config("voc-c4", None, voc)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == len(coco.classes) and cfg.DATASETS.TRAIN == voc.train
    labels = f"{world}/coco/annotations/instances_{{}}2017.json".format
    own = ft.get_args(["random", "--protocol", "coco-c4-1x",
                       "--train-images", f"{world}/coco/train2017", "--train-json", labels("train"),
                       "--val-images", f"{world}/coco/val2017", "--val-json", labels("val")])
    assert ft.load_data(own, said.append).boxes == coco.boxes
    some = ft.load_data(args_for(world, "--classes", "square", protocol="voc-c4"), said.append)
    assert 0 < some.boxes < coco.boxes and any("of other classes" in line for line in said)


def edited(world, tmp_path, edit, split="train"):
    """The toy world's COCO part with one json edited."""
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for name in ("train", "val"):
        os.symlink(world / "coco" / f"{name}2017", tmp_path / "coco" / f"{name}2017")
        with open(world / "coco" / "annotations" / f"instances_{name}2017.json") as f:
            content = json.load(f)
        if name == split:
            edit(content)
        with open(tmp_path / "coco" / "annotations" / f"instances_{name}2017.json", "w") as f:
            json.dump(content, f)
    return tmp_path


def test_data_problems_stop_before_training(world, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = stopped(ft.load_data, args_for(empty))
    assert "coco/train2017 is missing" in message and "annotations/instances_train2017.json" in message
    assert "VOC2007" in stopped(ft.load_data, args_for(empty, protocol="voc-c4"))
    (empty / "coco" / "annotations").mkdir(parents=True)
    (empty / "coco" / "train2017").mkdir()
    assert "instances_train2017.json is missing" in stopped(ft.load_data, args_for(empty))

    def lose_picture(content):
        content["images"][3]["file_name"] = "absent.jpg"
    root = edited(world, tmp_path / "a", lose_picture)
    assert "1 of 20 pictures are missing" in stopped(ft.load_data, args_for(root))

    def other_classes(content):
        content["categories"][0]["name"] = "else"
    root = edited(world, tmp_path / "b", other_classes, "val")
    assert "its classes" in stopped(ft.load_data, args_for(root))

    def unknown_class(content):
        content["annotations"][0]["category_id"] = 77
    assert "KeyError" in stopped(ft.load_data, args_for(edited(world, tmp_path / "c", unknown_class)))

    def nothing(content):
        content["annotations"] = []
    for split, role in (("train", "training"), ("val", "validation")):
        root = edited(world, tmp_path / split, nothing, split)
        assert f"no {role} picture has a box" in stopped(ft.load_data, args_for(root))

    def no_box(content):
        del content["annotations"][0]["bbox"]
    assert "cannot be read" in stopped(ft.load_data, args_for(edited(world, tmp_path / "e", no_box)))


def test_boxes_without_area_classes_without_boxes_and_masks(world, tmp_path):
    def flatten(content):
        content["annotations"][0]["bbox"][2] = 0
        content["annotations"][1]["bbox"][3] = 0
        content["categories"].append({"id": 99, "name": "unicorn"})
    root, said = edited(world, tmp_path / "a", flatten), []
    with open(root / "coco" / "annotations" / "instances_val2017.json", "r+") as f:
        content = json.load(f)
        content["categories"].append({"id": 99, "name": "unicorn"})
        f.seek(0)
        json.dump(content, f)
    data = ft.load_data(args_for(root), said.append)
    assert any("dropped 2 boxes without area" in line for line in said)
    assert any("1 of 6 classes have no training box: unicorn" in line for line in said)
    whole = ft.load_data(args_for(world))
    assert data.boxes == whole.boxes - 2

    def unmasked(content):
        for box in content["annotations"][::2]:
            del box["segmentation"]
    data = ft.load_data(args_for(edited(world, tmp_path / "b", unmasked)), said.append)
    assert not data.masks and "boxes alone" in said[-1]
    assert not ft.build_config("coco-fpn-1x", None, data)[0].MODEL.MASK_ON
    data = ft.load_data(args_for(edited(world, tmp_path / "c", unmasked, "val")), said.append)
    assert not data.masks                                       # mask AP could not be had


def test_minicoco_list(world, tmp_path):
    with open(world / "coco" / "annotations" / "instances_train2017.json") as f:
        ids = sorted(image["id"] for image in json.load(f)["images"])
    data = ft.load_data(args_for(world, protocol="minicoco-c4"))
    first = np.random.Generator(np.random.PCG64(0)).permutation(ids)[:2].tolist()
    assert data.list == sorted(first) and data.images == 2
    assert sorted(item["image_id"] for item in DatasetCatalog.get("coco_2017_train")) == data.list
    path = tmp_path / "list.txt"
    path.write_text("\n".join(map(str, ids[4:9])))
    args = args_for(world, "--minicoco-list", str(path), protocol="minicoco-c4")
    assert ft.load_data(args).list == ids[4:9]
    for text, said in (("123456789", "123456789"), ("a", "a is no image"), ("", "none")):
        path.write_text(text)
        assert said in stopped(ft.load_data, args)
    big = np.random.Generator(np.random.PCG64(0)).permutation(np.arange(118287))[:118287 // 10]
    assert len(big) == 11828


def test_voc_labels_that_evaluation_would_stumble_over(world, tmp_path):
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / year / "Annotations").mkdir(parents=True)
        for part in ("JPEGImages", "ImageSets"):
            os.symlink(world / year / part, tmp_path / year / part)
        for path in (world / year / "Annotations").iterdir():
            text = path.read_text()
            (tmp_path / year / "Annotations" / path.name).write_text(re.sub("<pose>.*?</pose>", "", text))
    classes = ",".join(toy.CLASSES)
    args = args_for(tmp_path, "--classes", classes, protocol="voc-c4")
    message = stopped(ft.load_data, args)
    assert "AttributeError" in message and ".xml" in message
    os.remove(next((tmp_path / "VOC2012" / "Annotations").iterdir()))
    assert "FileNotFoundError" in stopped(ft.load_data, args)


# ---- report and pictures

def test_report_means_and_the_papers_row(world, tmp_path):
    data, lines = ft.load_data(args_for(world)), []
    args = ft.get_args(["moco.pth", "--protocol", "coco-c4-2x", "--data", str(world), "--out", str(tmp_path)])
    trials = [{"seed": seed, "bbox": {"AP": 40.0 + seed, "AP50": 60.0, "AP75": 44.0},
               "segm": {"AP": 35.0, "AP50": None, "AP75": 37.0}}
              for seed in range(3)]
    cfg, notes = ft.build_config("coco-c4-2x", None, data)
    ft.report(args, cfg, notes, data, "MoCo-v2, resnet50 at x", trials, lines.append)
    text = "\n".join(lines)
    assert re.search(r"APbb +AP50bb +AP75bb +APmk +AP50mk +AP75mk", text)
    assert re.search(" +".join(["this run: MoCo-v2, 3 trials", "41.0 ± 1.0", "60.0 ± 0.0", "44.0 ± 0.0",
                                "35.0 ± 0.0", "-", "37.0 ± 0.0"]), text)
    with open(os.path.join(HERE, "..", "docs", "paper_tables.csv")) as f:
        paper = {row["metric"]: float(row["value"]) for row in csv.DictReader(f)
                 if row["table"] == "2a" and row["method"] == "MoCo-v2" and row["epochs"] == "200"}
    row = next(line for line in lines if "MoCo-v2, 200 epochs" in line)
    assert [float(x) for x in row.split("epochs")[1].split()] == [
        paper[name] for name in ("APbb", "AP50bb", "AP75bb", "APmk", "AP50mk", "AP75mk")]
    with open(tmp_path / "results.json") as f:
        result = json.load(f)
    assert result["mean"]["APbb"] == 41 and result["deviation"]["APbb"] == 1 and len(result["trials"]) == 3
    assert result["config"]["SOLVER"]["MAX_ITER"] == 180000 and result["commit"]


@pytest.mark.parametrize("protocol, method, rows", [
    ("voc-c4", "InsLoc", 2), ("voc-c4", "Random init", 1), ("voc-c4", "SwAV", 1), ("coco-fpn-1x", "RA+CP", 1),
    ("coco-fpn-1x", "RA", 1), ("coco-fpn-1x", "InsLoc", 2), ("coco-c4-1x", "MoCo-v2", 2),
    ("coco-c4-1x", "BYOL", 1), ("minicoco-c4", "Supervised", 1), ("coco-fpn-2x", "nobody", 0)])
def test_rows_of_the_paper(protocol, method, rows):
    found = ft.paper_rows(protocol, method)
    assert len(found) == rows
    if (protocol, method) == ("voc-c4", "SwAV"):
        assert list(found.values()) == [{"AP": "45.1", "AP50": "77.4", "AP75": "46.5"}]


def test_a_missing_table_of_the_paper_is_said_and_stops_nothing(tmp_path, monkeypatch):
    """finetune_det.py copied away without docs/: hours of fine-tuning must not end in an error."""
    monkeypatch.setattr(ft, "HERE", str(tmp_path))
    (name, row), = ft.paper_rows("voc-c4", "InsLoc").items()
    assert "paper_tables.csv is missing" in name and row == {}


# ---- from the command line

def run(*arguments, wait=True):
    command = [sys.executable, os.path.join(HERE, "..", "finetune_det.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    return (process, process.communicate()[0]) if wait else process


class Hostile:
    def __reduce__(self):
        return print, ("must not run",)


RANDOM = ["random", "--protocol", "coco-fpn-1x"]


@pytest.mark.parametrize("arguments, opts, said", [
    (["absent.pth", *RANDOM[1:]], [], "absent.pth"), (["{there}/hostile.pth", *RANDOM[1:]], [], "--trust"),
    ([*RANDOM, "--out", "{there}/held"], [], "--resume"), ([*RANDOM, "--trials", "0"], [], "--trials"),
    ([*RANDOM, "--classes", "a"], [], "--classes"), ([*RANDOM, "--export", "x.pkl"], [], "--export"),
    ([*RANDOM, "--train-images", "x"], [], "--train-json"), (RANDOM, ["SOLVER.MAX_ITER"], "KEY VALUE"),
    (RANDOM, ["MODEL.WEIGHTS", "x"], "--eval-only"), (RANDOM, ["MODEL.DEVICE", "cuda"], "GPU"),
    ([*RANDOM, "--eval-only"], ["MODEL.DEVICE", "cpu"], "model_final.pth"),
    (RANDOM, ["MODEL.ROI_HEADS.NAME", "Nobody"], "Nobody")])
def test_mistakes_end_in_one_line(arguments, opts, said, world, tmp_path, monkeypatch, capsys):
    (tmp_path / "held" / "trial0").mkdir(parents=True)
    torch.save({"x": Hostile()}, tmp_path / "hostile.pth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    arguments = [x.format(there=tmp_path) for x in arguments] + ["--data", str(world)]
    arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["finetune_det.py", *arguments, *opts])
    with pytest.raises(SystemExit) as error:
        ft.start()
    printed = capsys.readouterr()
    text = str(error.value) if error.value.code != 2 else printed.err.splitlines()[-1]
    assert error.value.code not in (0, None) and said in text and "\n" not in text
    assert "must not run" not in printed.out and "Traceback" not in printed.out + printed.err


def test_killed_resumed_evaluated(world, tmp_path, monkeypatch):
    """COCO layout, masks, ResNet-18 FPN: killed between checkpoints, resumed; loss falls; pictures, AP."""
    out, weights = tmp_path / "out", tmp_path / "run"
    torch.manual_seed(0)
    weights.mkdir()
    saved(FPNEncoder("resnet18"), weights, "fpn")
    command = [weights, "--protocol", "coco-fpn-1x", "--data", world, "--out", out, "--pictures", "2",
               "--resume", *SMALL, "SOLVER.BASE_LR", "0.02", "SOLVER.MAX_ITER", "60",
               "SOLVER.CHECKPOINT_PERIOD", "7"]
    process = run(*command, wait=False)
    deadline = time.time() + 120
    while (not list(out.glob("trial0/model_00000[12]*.pth")) and process.poll() is None
           and time.time() < deadline):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "results.json").exists()
    assert len(list(out.glob("trial0/model_0*.pth"))) <= 3
    process, text = run(*command)
    assert process.returncode == 0, text
    at = int(re.search(r"going on at iteration (\d+) of 60", text)[1])
    assert at in range(7, 60, 7) and "SyncBatchNorm does not run on the CPU" in text
    with open(out / "trial0" / "metrics.json") as f:
        lines = [json.loads(line) for line in f]
    losses = {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}
    assert losses[59] < 0.97 * losses[min(losses)], losses      # medians of 20 iterations
    with open(out / "results.json") as f:
        result = json.load(f)
    assert set(result["trials"][0]) >= {"seed", "bbox"} and result["config"]["SOLVER"]["MAX_ITER"] == 60
    for path in (out / "curves.png", out / "trial0" / "detections.png"):
        assert path.stat().st_size > 5000
    process, text = run(*command[:-1], "9")                     # done already: nothing is trained again
    assert process.returncode == 0 and "trial 0: done before" in text and "eta" not in text
    # Another schedule is not a continuation.
    command = [*map(str, command[:-3]), "50", "MODEL.DEVICE", "cpu"]
    monkeypatch.setattr(sys, "argv", ["finetune_det.py", *command])
    with pytest.raises(SystemExit, match="SOLVER.MAX_ITER 50, was 60"):
        ft.start()


def test_voc_two_trials_on_two_processes_then_eval_only(world, tmp_path):
    command = ["random", "--protocol", "voc-c4", "--data", world, "--classes", ",".join(toy.CLASSES),
               "--out", tmp_path / "out", "--trials", "2", "--pictures", "1", "--nprocs"]
    short = [*SMALL, "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)"]
    process, text = run(*command, "2", *short)
    assert process.returncode == 0, text
    with open(tmp_path / "out" / "results.json") as f:
        first = json.load(f)
    assert [trial["seed"] for trial in first["trials"]] == [0, 1]
    assert list(first["mean"]) == ["AP", "AP50", "AP75"]
    assert "Random init, 2 trials" in text and re.search(r"paper: Random init +33.8 +60.2 +33.1", text)
    process, text = run(*command, "1", "--eval-only", *short)
    assert process.returncode == 0, text
    with open(tmp_path / "out" / "results.json") as f:
        again = json.load(f)
    assert again["trials"] == first["trials"]


def test_list_and_hash_beside_the_results(world, tmp_path):
    data = ft.load_data(args_for(world, protocol="minicoco-c4"))
    args = args_for(world, "--out", str(tmp_path), protocol="minicoco-c4")
    ft.report(args, ft.build_config("minicoco-c4", None, data)[0], [], data, "Random init",
              [{"seed": 0, "bbox": {"AP": 1.0, "AP50": 2.0, "AP75": 3.0}}], lambda *_: None)
    text = (tmp_path / "minicoco.txt").read_text()
    assert [int(line) for line in text.split()] == data.list
    with open(tmp_path / "results.json") as f:
        assert json.load(f)["data"]["list_sha256"] == hashlib.sha256(text.encode()).hexdigest()
