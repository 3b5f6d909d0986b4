"""weights.py: one synthetic file a row of public checkpoint formats (names, nesting, what else such a file
holds); the name maps against tables; what a file says of its pixels; files of every container; files that are
wrong, of another framework, damaged or hostile."""
import argparse
import collections
import csv
import datetime
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from insloc import C4Encoder, FPNEncoder, make_resnet
from weights import INPUTS, Weights, read_file, read_weights, to_detectron2

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(autouse=True, scope="module")
def no_draws_on_the_meta_device():
    """There are no numbers to draw, and torch takes as long over it as over everything else here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "uniform_"):
            patch.setattr(torch.nn.init, name, but_on_meta(getattr(torch.nn.init, name)))
        yield


def but_on_meta(init):
    return lambda tensor, *given, **named: tensor if tensor.is_meta else init(tensor, *given, **named)


def table(name):
    with open(os.path.join(HERE, name)) as file:
        return list(csv.reader(file))[1:]


def numbered(names_and_shapes, start):
    """A tensor a name, each of one value of its own, in next to no memory (a file stores one number)."""
    def number(i, name):
        return torch.tensor(start + i if "num_batches" in name else start + i + 0.5)
    return {name: number(i, name).expand(shape) for i, (name, shape) in enumerate(names_and_shapes.items())}


def shapes(net):
    return {name: x.shape for name, x in net.state_dict().items()}


def trunk(resnet="resnet50", start=1):
    with torch.device("meta"):
        net = make_resnet(resnet)
    return numbered(shapes(net), start)


def under(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def state_with(prefix, **also):
    """The usual nesting: a state_dict with the trunk under the prefix, and other tensors."""
    return {"epoch": 200, "state_dict": {**under(prefix, NET), **also}, "optimizer": OPTIMIZER}


def renamed(state, *rules):
    """A system's spelling of torchvision's names: every rule, in order, by plain replacement."""
    for ours, theirs in rules:
        state = {name.replace(ours, theirs): x for name, x in state.items()}
    return state


def huggingface(state):
    """conv1, bn1 of the stem; layer1.0.conv1 -> encoder.stages.0.layers.0.layer.0.convolution; and so on."""
    found = {}
    for name, x in state.items():
        parts = name.split(".")
        if len(parts) == 2:
            kind = "convolution" if parts[0] == "conv1" else "normalization"
            found[f"resnet.embedder.embedder.{kind}.{parts[1]}"] = x
            continue
        stage, block, module = int(parts[0][5:]) - 1, parts[1], parts[2]
        if module == "downsample":
            module = f"shortcut.{('convolution', 'normalization')[int(parts[3])]}"
        else:
            kind = "convolution" if module.startswith("conv") else "normalization"
            module = f"layer.{int(module[-1]) - 1}.{kind}"
        found[f"resnet.encoder.stages.{stage}.layers.{block}.{module}.{parts[-1]}"] = x
    return found


def detectron2_names(state, arch):
    return to_detectron2(Weights(state, {}, "", "", (), (), "RGB", False, ()), arch)


def arrays(state):
    return {name: x.numpy() for name, x in state.items() if "num_batches" not in name}


NET, OTHER = trunk(), trunk(start=5000)
FC = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
MLP = {"fc.0.weight": torch.zeros(3, 2), "fc.0.bias": torch.zeros(3),
       "fc.2.weight": torch.zeros(2, 3), "fc.2.bias": torch.zeros(2)}
HEAD = {"projector.0.weight": torch.zeros(2, 2), "projector.1.weight": torch.zeros(2)}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(64, 3, 7, 7)}},
             "param_groups": [{"lr": 0.03, "params": [0]}]}
OPTIONS = argparse.Namespace(lr=0.03, seed=None)
UNCOUNTED = {name: x for name, x in NET.items() if "num_batches" not in name}
BODY = {name: x for name, x in NET.items() if not name.startswith("layer4")}
LAST = {name: x for name, x in NET.items() if name.startswith("layer4")}
OTHER_BODY = {name: OTHER[name] for name in BODY}
OTHER_LAST = {name: OTHER[name] for name in LAST}
# The released InsLoc's names of neck and box head -> detectron2's.
RELEASED = {row[0]: row[1] for row in table("keymap_fpn.csv") if row[0] not in NET}
with torch.device("meta"):
    PARTS = {name: shape for name, shape in shapes(FPNEncoder()).items()
             if name.startswith(("fpn.", "box_head."))}


def released_fpn():
    """Neck and box head in the released names, of the shapes that detectron2's model has there."""
    def shape(name):
        if "num_batches" in name:
            return ()
        if "lateral_convs" in name and name.endswith("conv.weight"):
            return (256, 256 * 2 ** int(name.split(".")[2]), 1, 1)
        if name.endswith("conv.weight"):
            return (256, 256, 3, 3)
        fc1 = {"shared_fcs.0.weight": (1024, 12544), "shared_fcs.0.bias": (1024,)}
        return fc1.get(name.split("bbox_head.")[-1], (256,))
    return numbered({name: shape(name) for name in RELEASED}, 9000)


HEADS = released_fpn()
JUNK = {"roi_head.bbox_head.shared_fcs.1.weight": torch.zeros(1024, 1024),
        "roi_head.bbox_head.fc_cls.weight": torch.zeros(128, 1024),
        "queue": torch.zeros(128, 8), "queues": torch.zeros(4, 128, 8),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        **under("neck_k.", {name[5:]: -x for name, x in HEADS.items() if name.startswith("neck.")}),
        **under("roi_head_k.", {name[9:]: -x for name, x in HEADS.items() if name.startswith("roi_head.")})}
META = {"meta": {"epoch": 200, "iter": 1, "mmcv_version": "0.6.1"}, "optimizer": OPTIMIZER}
# A Mask R-CNN of mmdetection's: its neck has no BatchNorm and its head two fully connected layers.
MMDET = {**under("backbone.", NET), "neck.lateral_convs.0.conv.weight": torch.zeros(256, 256, 1, 1),
         "neck.lateral_convs.0.conv.bias": torch.zeros(256),
         "roi_head.bbox_head.shared_fcs.0.weight": HEADS["roi_head.bbox_head.shared_fcs.0.weight"],
         "roi_head.bbox_head.shared_fcs.0.bias": torch.zeros(1024),
         "roi_head.bbox_head.shared_fcs.1.weight": torch.zeros(1024, 1024),
         "rpn_head.rpn_conv.weight": torch.zeros(2, 2)}

# file name, content, where the trunk is, where the average that it names is
ROWS = [
    # MoCo and what was built from its code
    ("moco_v1_200ep_pretrain.pth.tar", {"epoch": 200, "optimizer": OPTIMIZER, "state_dict": {
        **under("module.encoder_q.", {**NET, **FC}), **under("module.encoder_k.", {**OTHER, **FC}),
        "module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1)}},
     "state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
    ("moco_v2_800ep_pretrain.pth.tar", state_with("module.encoder_q.", **under("module.encoder_q.", MLP)),
     "state_dict.module.encoder_q."),
    ("r-50-300ep.pth.tar", state_with("module.base_encoder.", **under("module.base_encoder.", MLP),
                                      **under("module.momentum_encoder.", OTHER),
                                      **under("module.predictor.", MLP)),
     "state_dict.module.base_encoder.", "state_dict.module.momentum_encoder."),
    ("pcl_v2_epoch200.pth.tar", state_with("module.encoder_q.", **under("module.encoder_k.", OTHER),
                                           **under("module.encoder_q.", MLP)),
     "state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
    ("detco_200ep_AA.pth", state_with("module.encoder_q.", **under("module.encoder_k.", OTHER)),
     "state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
    ("resim_fpn_200ep.pth.tar", state_with("module.encoder_q.", **{
        "module.encoder_q.fpn.fpn_inner2.weight": torch.zeros(256, 512, 1, 1)}),
     "state_dict.module.encoder_q."),
    ("resim_c4.pkl.pth", {"model": detectron2_names(NET, "c4"), "__author__": "ReSim"}, "model.backbone."),
    ("simsiam.pth.tar", state_with("module.encoder.", **under("module.encoder.", MLP)),
     "state_dict.module.encoder."),
    ("densecl_r50_imagenet_200ep.pth", {"state_dict": NET, "author": "x"}, "state_dict."),
    ("pixpro_ckpt_epoch_100.pth", {"opt": OPTIONS, "optimizer": OPTIMIZER, "model": {
        **under("module.encoder.", NET), **under("module.encoder_k.", OTHER),
        **under("module.projector.", MLP)}}, "model.module.encoder.", "model.module.encoder_k."),
    ("soco_ckpt_epoch_100.pth", {"opt": OPTIONS, "model": {
        **under("module.encoder.", NET), **under("module.encoder_k.", OTHER),
        "module.neck.lateral.weight": torch.zeros(2), "module.neck_k.lateral.weight": torch.zeros(2)}},
     "model.module.encoder.", "model.module.encoder_k."),
    ("InfoMin_200.pth", {"opt": OPTIONS, "epoch": 200, "contrast": {"memory": torch.zeros(8, 2)},
                         "model": {**under("module.encoder.", NET), "module.head.0.weight": torch.zeros(2, 2),
                                   "module.head_jig.fc1.weight": torch.zeros(2, 2)},
                         "model_ema": under("encoder.", OTHER)},
     "model.module.encoder.", "model_ema.encoder."),
    # without a queue
    ("swav_800ep_pretrain.pth.tar", {**under("module.", NET), "module.prototypes.weight": torch.zeros(2, 2)},
     "module."),
    ("deepclusterv2_400ep_pretrain.pth.tar", {**under("module.", NET), "module.projection_head.0.weight":
                                              torch.zeros(2, 2)}, "module."),
    ("checkpoint.pth.tar", state_with("module.", **{"module.prototypes.weight": torch.zeros(2, 2)}),
     "state_dict.module."),
    ("barlowtwins_resnet50.pth", NET, ""),
    ("barlowtwins_checkpoint.pth", {"epoch": 1, "model": {**under("module.backbone.", NET), **HEAD},
                                    "optimizer": OPTIMIZER}, "model.module.backbone."),
    ("vicregl_resnet50_alpha0.9.pth", NET, ""),
    ("dino_resnet50_pretrain.pth", UNCOUNTED, ""),
    ("dino_resnet50_pretrain_full_checkpoint.pth", {
        "student": {**under("module.backbone.", NET), **under("module.head.", MLP)},
        "teacher": {**under("backbone.", OTHER), **under("head.", MLP)},
        "optimizer": OPTIMIZER, "args": OPTIONS, "dino_loss": {"center": torch.zeros(1, 2)}},
     "student.module.backbone.", "teacher.backbone."),
    ("obow.pth.tar", {"epoch": 200, "network": {**NET, **FC}}, "network."),
    ("scrl_resnet50.pth", {"online_network_state_dict": under("encoder.", NET), "args": {},
                           "target_network_state_dict": under("encoder.", OTHER)},
     "online_network_state_dict.encoder.", "target_network_state_dict.encoder."),
    ("simclr_rn50_200ep_phase.torch", {"phase_idx": 199, "classy_state_dict": {"base_model": {"model": {
        "trunk": under("_feature_blocks.", NET), "heads": {"0.clf.0.weight": torch.zeros(2, 2)}}},
        "loss": under("moco_encoder.trunk._feature_blocks.", OTHER), "optimizer": OPTIMIZER}},
     "classy_state_dict.base_model.model.trunk._feature_blocks.",
     "classy_state_dict.loss.moco_encoder.trunk._feature_blocks."),
    ("byol_converted.pth.tar", {"state_dict": {**UNCOUNTED, **FC}}, "state_dict."),
    # OpenSelfSup, mmselfsup, mmpretrain, mmdetection
    ("epoch_300.pth", {**META, "state_dict": {
        **under("online_net.0.", NET), **under("backbone.", NET), **under("target_net.0.", OTHER),
        "online_net.1.fc0.weight": torch.zeros(2, 2)}}, "state_dict.backbone.", "state_dict.target_net.0."),
    ("relative-loc_resnet50_8xb64-steplr-70e_in1k.pth", {**META, "state_dict": {
        **under("backbone.", NET), "neck.fc.weight": torch.zeros(2, 2),
        "data_preprocessor.mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
        "data_preprocessor.std": torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)}},
     "state_dict.backbone."),
    ("mocov3_resnet50_8xb512-amp-coslr-800e_in1k.pth", {**META, "state_dict": {
        **under("backbone.", NET), **under("momentum_encoder.module.0.", OTHER),
        "neck.fc0.weight": torch.zeros(2, 2)}},
     "state_dict.backbone.", "state_dict.momentum_encoder.module.0."),
    ("odc_resnet50_8xb64-steplr-440e_in1k.pth", {**META, "state_dict": {
        **under("backbone.", NET), "memory_bank.feature_bank": torch.zeros(2, 2)}}, "state_dict.backbone."),
    ("mask_rcnn_r50_fpn_1x_coco.pth", {**META, "state_dict": MMDET}, "state_dict.backbone."),
    # solo-learn, lightly, timm, torchvision
    ("byol-solo-ep=999.ckpt", {"pytorch-lightning_version": "1.5", "optimizer_states": [OPTIMIZER],
                               "state_dict": {**under("backbone.", NET), **HEAD,
                                              **under("momentum_backbone.", OTHER)}},
     "state_dict.backbone.", "state_dict.momentum_backbone."),
    ("lightly_byol.ckpt", state_with("backbone.", **under("teacher_backbone.", OTHER), **HEAD),
     "state_dict.backbone.", "state_dict.teacher_backbone."),
    ("lightly_simclr.ckpt", state_with("backbone.", **HEAD), "state_dict.backbone."),
    ("pytorch_model.bin", {**NET, **FC}, ""),
    ("model_best.pth.tar", {"state_dict": NET, "state_dict_ema": OTHER, "args": OPTIONS, "metric": 76.1},
     "state_dict.", "state_dict_ema."),
    ("resnet50-0676ba61.pth", {**NET, **FC}, ""),
    ("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", {
        **under("backbone.body.", UNCOUNTED),
        "backbone.fpn.inner_blocks.0.0.weight": torch.zeros(256, 256, 1, 1),
        "roi_heads.box_head.fc6.weight": torch.zeros(1024, 12544)}, "backbone.body."),
    # Hugging Face, detectron2, InsLoc
    ("hf_pytorch_model.bin", {**huggingface(NET), "classifier.1.weight": FC["fc.weight"]}, "resnet."),
    ("moco_converted.pth", {"model": detectron2_names(NET, "fpn"), "__author__": "MOCO"}, "model.backbone."),
    ("model_final.pth", {"model": {**detectron2_names(NET, "c4"),
                                   "roi_heads.res5.norm.weight": torch.zeros(2048),
                                   "roi_heads.box_predictor.cls_score.weight": torch.zeros(21, 2048)},
                         "iteration": 24000}, "model.backbone."),
    ("insloc_fpn_200ep.pth", {**META, "state_dict": {
        **under("backbone.", NET), **under("backbone_k.", OTHER), **HEADS, **JUNK}},
     "state_dict.backbone.", "state_dict.backbone_k."),
    ("epoch_200.pth", {**META, "state_dict": {
        **under("backbone.", BODY), **under("backbone_k.", OTHER_BODY),
        **under("roi_head.shared_head.", LAST), **under("roi_head_k.shared_head.", OTHER_LAST),
        "roi_head.bbox_head.fc_cls.weight": torch.zeros(2, 2)}},
     "state_dict.backbone.", "state_dict.backbone_k."),
    # NumPy's numbers beside the weights, in the spellings of NumPy 1 and 2
    ("numpy_scalars.pth.tar", {"best_acc1": np.float64(67.5), "kind": np.dtype("f4"), "step": np.int64(3),
                               "state_dict": NET}, "state_dict."),
]


def same(got, want):
    return got.keys() == want.keys() and all(
        torch.equal(got[name], want[name].to(got[name].dtype)) for name in want)


def counted(state):
    """What is to come of a trunk: counters where a file has none are zero."""
    return {name: state.get(name, torch.zeros((), dtype=torch.long)) for name in NET}


def count_tensors(node):
    return sum(count_tensors(x) if isinstance(x, dict) else isinstance(x, torch.Tensor)
               for x in node.values())


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_public_format(row, tmp_path):
    name, content, place, *average = row
    torch.save(content, tmp_path / name)
    weights = read_weights(str(tmp_path / name))
    own = UNCOUNTED if name.startswith(("dino_resnet50_pretrain.", "byol_converted", "maskrcnn")) else NET
    assert same(weights.backbone, counted(own))
    assert weights.resnet == "resnet50" and weights.source.startswith(f"resnet50 at {place!r}")
    assert ("average" in weights.source) == bool(average)
    if average:
        assert repr(average[0]) in weights.source
    assert (weights.pixel_mean, weights.pixel_std, weights.channel_order, weights.stride_in_1x1) == (
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB", False)
    assert len(weights.extras) == (74 if name == "insloc_fpn_200ep.pth" else 0)
    taken = len(own) + len(weights.extras)
    assert taken + len(weights.dropped) == count_tensors(content)           # every tensor is accounted for


def save(content, path):
    """torch.save, or a pickle if the name says so, or safetensors."""
    if str(path).endswith(".pkl"):
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif str(path).endswith(".safetensors"):
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


def refusal(path, **options):
    """The line with which a file is refused."""
    with pytest.raises(ValueError) as error:
        read_weights(str(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- What a row may also be: another place, another input, another container

@pytest.mark.parametrize("name", ["dino_resnet50_pretrain_full_checkpoint.pth", "InfoMin_200.pth"])
def test_prefix_takes_the_average(name, tmp_path):
    _, content, place, average = next(row for row in ROWS if row[0] == name)
    path = save(content, tmp_path / name)
    for prefix in (average, average.rstrip(".")):
        weights = read_weights(path, prefix=prefix)
        assert same(weights.backbone, OTHER) and weights.source == f"resnet50 at {average!r}"
    assert same(read_weights(path, prefix=place).backbone, NET)
    assert "at 'nowhere.'" in refusal(path, prefix="nowhere")


@pytest.mark.parametrize("name", ["query_backbone.", "student_backbone."])
def test_two_different_places_are_named_and_prefix_chooses(name, tmp_path):
    """lightly's MoCo v2, DINO and TiCo: which of the two was trained stands in its code, not in its names."""
    path = save(state_with("backbone.", **under(name, OTHER)), tmp_path / "lightly.ckpt")
    said = refusal(path)
    assert "'state_dict.backbone.'" in said and f"'state_dict.{name}'" in said and "--prefix PREFIX" in said
    assert same(read_weights(path, prefix="state_dict." + name).backbone, OTHER)
    assert same(read_weights(path, prefix="state_dict.backbone.").backbone, NET)


def test_one_net_at_two_places_is_one_net(tmp_path):
    content = {**under("a.", NET), **under("b.", NET)}
    assert read_weights(save(content, tmp_path / "x.pth")).source == "resnet50 at 'a.'"


def test_inputs(tmp_path):
    path = save(NET, tmp_path / "x.pth")
    weights = read_weights(path, input="zero-one")
    assert (weights.pixel_mean, weights.pixel_std, weights.channel_order) == ((0, 0, 0), (1, 1, 1), "RGB")
    weights = read_weights(path, input="caffe")
    assert np.allclose(np.array(weights.pixel_mean) * 255, (103.53, 116.28, 123.675), rtol=1e-12)
    assert np.allclose(np.array(weights.pixel_std) * 255, 1, rtol=1e-12)
    assert weights.channel_order == "BGR" and weights.stride_in_1x1 and list(INPUTS)[0] == "imagenet"


SMALL = trunk("resnet18")
CAFFE = {
    "model_final_f10217.pkl": {"__author__": "Detectron2 Model Zoo", "model": {
        **arrays(detectron2_names(SMALL, "fpn")), "backbone.fpn_lateral2.bias": np.zeros(256, "f4"),
        "backbone.fpn_lateral2.weight": np.zeros((256, 64, 1, 1), "f4")}},
    "model_final_721ade.pkl": {"__author__": "Detectron2 Model Zoo",
                               "model": arrays(detectron2_names(SMALL, "c4"))},
    "resnet50_msra-5891d200.pth": {"state_dict": SMALL},
    "mask_rcnn_r50_caffe_fpn_1x_coco.pth": {"state_dict": {**MMDET, **under("backbone.", NET)}},
}


@pytest.mark.parametrize("name", CAFFE)
def test_caffes_nets_are_not_read_as_others(name, tmp_path):
    path = save(CAFFE[name], tmp_path / name)
    assert "--input caffe" in refusal(path, trust=True)
    weights = read_weights(path, trust=True, input="caffe")
    want = NET if name.startswith("mask_rcnn") else SMALL
    if name.endswith(".pkl"):
        want = {key: x if "num_batches" not in key else torch.tensor(0) for key, x in want.items()}
    assert same(weights.backbone, want) and not weights.extras and weights.stride_in_1x1


# ---- What a file says of its pixels

BGR, BGR_STD = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1), torch.ones(3, 1, 1)
MMDET_BGR = "img_norm_cfg = dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)"
MMDET_RGB = """
backbone=dict(style='pytorch', dilations=(1, 1, 1, 1), norm_cfg=dict(type='BN', requires_grad=True)),
bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]),
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)"""
DETECTRON2_YAML = """INPUT:
  FORMAT: {}
MODEL:
  PIXEL_MEAN:
  - {}
  - 116.28
  - {}
  PIXEL_STD:
  - {}
  - {}
  - {}
  RESNETS:
    STRIDE_IN_1X1: {}
"""


def timm(mean, std, name="resnet18"):
    return json.dumps({"architecture": name, "pretrained_cfg": {"mean": mean, "std": std}}, indent=2)


# what the file is called and says, the configurations beside it, which input takes it, what the refusal names
SAID = [
    ("mmdetection's config", "x.pth", {"meta": {"config": MMDET_BGR}}, {}, "caffe",
     "to_rgb false, mean 103.53 116.28 123.675"),
    ("a config as a dict", "x.pth", {"cfg": {"img_norm_cfg": {"mean": [103.53, 116.28, 123.675]}}}, {},
     "caffe", "mean 103.53 116.28 123.675"),
    ("bgr_to_rgb alone", "x.pth", {"cfg": "data_preprocessor=dict(bgr_to_rgb=False)"}, {}, "caffe",
     "to_rgb false"),
    ("the style alone", "x.pth", {"meta": {"cfg": "ResNet(style='caffe')"}}, {}, "caffe",
     "style caffe"),
    ("mmdetection's buffers", "x.pth", {"state_dict": {"data_preprocessor.mean": BGR}}, {}, "caffe",
     "mean 103.53"),
    ("detectron2's buffers", "x.pth", {"model": {"pixel_mean": BGR, "pixel_std": BGR_STD}}, {}, "caffe",
     "std 1 1 1"),
    ("detectron2's buffers in a pickle", "x.pkl",
     {"model": {"pixel_mean": BGR.numpy(), "proposal_generator.anchor": np.zeros(2)}}, {}, "caffe",
     "mean 103.53 116.28 123.675"),
    ("detectron2's configuration", "model_final.pth", {},
     {"config.yaml": DETECTRON2_YAML.format("BGR", 103.53, 123.675, 1, 1, 1, "true")}, "caffe",
     "format bgr, stride_in_1x1 true, mean 103.53"),
    ("detectron2's detector, alone", "model_final.pth",
     {"model": {"proposal_generator.rpn_head.conv.weight": torch.zeros(2)}}, {}, "caffe",
     "detectron2 takes BGR by default"),
    ("timm's configuration", "model.safetensors", {}, {"config.json": timm([0., 0., 0.], [1., 1., 1.])},
     "zero-one", "mean 0 0 0, std 1 1 1"),
    ("timm's configuration of Inception", "pytorch_model.bin", {}, {"config.json": timm([.5] * 3, [.5] * 3)},
     None, "mean 0.5 0.5 0.5, std 0.5 0.5 0.5"),
    ("timm's options", "x.pth", {"args": argparse.Namespace(mean=[0.5, 0.5, 0.5], std=None)}, {}, None,
     "mean 0.5"),
    ("Hugging Face's preprocessor", "pytorch_model.bin", {},
     {"preprocessor_config.json": json.dumps({"image_mean": [0.5, 0.5, 0.5]})}, None, "mean 0.5 0.5 0.5"),
    ("Hugging Face's stride", "pytorch_model.bin", {},
     {"config.json": json.dumps({"downsample_in_bottleneck": True})}, "caffe",
     "downsample_in_bottleneck true"),
    ("a normalising layer", "x.pth", {"0.mean": torch.full((1, 3, 1, 1), .5)}, {}, None, "mean 0.5 0.5 0.5"),
    ("BGR with torchvision's stride", "x.pth", {"meta": {"config": MMDET_BGR + "style='pytorch'"}}, {}, None,
     "to_rgb false")]
AGREE = [
    ("mmdetection's config", {"meta": {"config": MMDET_RGB}}, {}),
    ("detectron2's configuration", {"model": {"proposal_generator.conv.weight": torch.zeros(2)}},
     {"config.yaml": DETECTRON2_YAML.format("RGB", 123.675, 103.53, 58.395, 57.12, 57.375, "false")}),
    ("MoCo's detector", {"model": {"proposal_generator.conv.weight": torch.zeros(2),
                                   "roi_heads.res5.norm.weight": torch.zeros(2)}}, {}),
    ("a normalising layer", {"normalizer.new_mean": torch.tensor([.485, .456, .406]),
                             "normalizer.new_std": torch.tensor([.229, .224, .225])}, {}),
    ("SwAV's red, CLIP's mean", {"cfg": "mean=[0.48145466, 0.4578275, 0.40821073] std=(0.228, 0.224, 0.225)"},
     {}),
    ("timm's configuration", {}, {"config.json": timm([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}),
    ("words of something else", {
        "cfg": "to_rgb FORMAT dilation=1 running_mean=[9, 9, 9] mean=[9, 9, 9, 9] mean=1.2.3 4 5"}, {})]


INPUT_FIELDS = slice(Weights._fields.index("pixel_mean"), Weights._fields.index("stride_in_1x1") + 1)


def write_said(folder, name, content, beside):
    """A file of a small trunk that says this and that, with configurations beside it."""
    small = {name: x.clone() for name, x in trunk("narrow18").items()}
    for other, text in beside.items():
        (folder / other).write_text(text)
    return save({"model": small, **content} if content else small, folder / name)


@pytest.mark.parametrize("case", SAID, ids=[case[0] for case in SAID])
def test_a_file_that_says_other_pixels_is_refused_without_input(case, tmp_path):
    _, name, content, beside, fits, words = case
    if "model" in content:
        content = {"model": {**under("net.", trunk("narrow18")), **content["model"]}}
    path = write_said(tmp_path, name, content, beside)
    trust = name.endswith(".pkl")
    said = refusal(path, trust=trust)
    assert words in said and (f": --input {fits} takes it" if fits else ": no --input is that") in said
    for input in INPUTS:                                                # what the user says holds
        weights = read_weights(path, trust=trust, input=input)
        assert weights[INPUT_FIELDS] == INPUTS[input]
        assert (f"--input {input} was given, but it" in weights.source) == (input != fits)
        assert same(weights.backbone, trunk("narrow18"))


@pytest.mark.parametrize("case", AGREE, ids=[case[0] for case in AGREE])
def test_a_file_that_says_imagenet_is_read(case, tmp_path):
    _, content, beside = case
    if "model" in content:
        content = {"model": {**trunk("narrow18"), **content["model"]}}
    path = write_said(tmp_path, "x.pth", content, beside)
    for input in (None, "imagenet"):
        weights = read_weights(path, input=input)
        assert "says" not in weights.source and weights.channel_order == "RGB"
    told = read_weights(path, input="caffe").source
    assert ("but it, or a configuration beside it, says" in told) == (case[0] not in (
        "MoCo's detector", "words of something else"))


def msra(state):
    """A trunk in Caffe2's names; its norms are scale and shift alone."""
    rules = (("layer1.", "res2_"), ("layer2.", "res3_"), ("layer3.", "res4_"), ("layer4.", "res5_"),
             (".conv1.", "_branch2a_"), (".conv2.", "_branch2b_"), (".conv3.", "_branch2c_"),
             (".bn1.", "_branch2a_bn_"), (".bn2.", "_branch2b_bn_"), (".bn3.", "_branch2c_bn_"),
             (".downsample.0.", "_branch1_"), (".downsample.1.", "_branch1_bn_"), ("conv1.", "conv1_"),
             ("bn1.", "res_conv1_bn_"), ("bn_weight", "bn_s"), ("bn_bias", "bn_b"), ("_weight", "_w"))
    affine = {name: x for name, x in state.items() if name.endswith(("weight", "bias"))}
    return arrays(renamed(affine, *rules))


def test_msras_pickle(tmp_path):
    """Every tensor arrives where detectron2's own conversion of Caffe2's names says."""
    loading = pytest.importorskip("detectron2.checkpoint.c2_model_loading")
    blobs = msra(NET)
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_bn_b", "res5_2_branch2c_w"} < blobs.keys()
    path = save(blobs, tmp_path / "R-50.pkl")
    assert "--trust" in refusal(path)
    weights = read_weights(path, trust=True, input="caffe")
    ours = {name.split(".", 1)[1]: x for name, x in to_detectron2(weights, "c4").items()}
    for theirs, value in zip(loading.convert_basic_c2_names(list(blobs)), blobs.values()):
        assert torch.equal(ours[theirs], torch.from_numpy(value))
    assert weights.resnet == "resnet50" and not weights.dropped


def test_msras_norms_and_what_else_a_pickle_of_caffe2_holds(tmp_path):
    blobs = {**msra(SMALL), "fc1000_w": np.zeros((1000, 512), "f4"), "conv1_w_momentum": np.zeros(3, "f4"),
             "res2_0_branch2a_w_momentum": np.zeros(3, "f4")}
    path = save({"blobs": blobs}, tmp_path / "model_final.pkl")
    assert "--input caffe" in refusal(path, trust=True)
    weights = read_weights(path, trust=True, input="caffe")
    assert len(weights.dropped) == 3
    net = make_resnet("resnet18").eval()
    net.load_state_dict(weights.backbone)
    x = torch.randn(2, 64, 3, 3)
    affine = x * SMALL["bn1.weight"][:, None, None] + SMALL["bn1.bias"][:, None, None]
    torch.testing.assert_close(net.bn1(x), affine, rtol=1e-6, atol=1e-4)            # as Caffe2 computes it
    del blobs["res4_1_branch2b_w"]
    said = refusal(save(blobs, tmp_path / "R-18.pkl"), trust=True, input="caffe")
    assert 'Missing key(s) in state_dict: "layer3.1.conv2.weight"' in said


def test_pickles_of_arrays_need_trust(tmp_path):
    """MoCo's converter drops every prefix; detectron2's for torchvision's nets does too."""
    bare = {name.replace("backbone.", "").replace("roi_heads.", ""): x
            for name, x in arrays(detectron2_names(SMALL, "c4")).items()}
    path = save({"model": bare, "__author__": "MOCO", "matching_heuristics": True}, tmp_path / "moco.pkl")
    assert "it is a pickle, which may run code: --trust" in refusal(path)
    weights = read_weights(path, trust=True)
    assert weights.source == "resnet18 at 'model.'" and weights.channel_order == "RGB"
    floats = {name: x for name, x in SMALL.items() if "num_batches" not in name}
    assert same({name: weights.backbone[name] for name in floats}, floats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_of_any_precision(dtype, tmp_path):
    small = {name: x.to(torch.int32 if "num_batches" in name else dtype).contiguous()
             for name, x in trunk("narrow18").items()}
    weights = read_weights(save(small, tmp_path / "model.safetensors"))
    assert same(weights.backbone, {name: x.float() for name, x in small.items()})
    assert {x.dtype for x in weights.backbone.values()} == {torch.float32, torch.int64}


def test_lightlys_numbered_layers(tmp_path):
    """backbone = nn.Sequential(*list(resnet.children())[:-1])"""
    net = make_resnet("narrow18")
    net = torch.nn.Sequential(*list(net.children())[:-1])
    content = {"state_dict": {**under("backbone.", net.state_dict()), **HEAD}}
    backbone = read_weights(save(content, tmp_path / "simclr.ckpt")).backbone
    assert backbone.keys() == trunk("narrow18").keys()
    assert torch.equal(backbone["layer4.0.downsample.0.weight"], net[7][0].downsample[0].weight)
    assert torch.equal(backbone["bn1.running_var"], net[1].running_var)


@pytest.mark.parametrize("resnet", ["resnet18", "resnet34", "resnet101", "resnet152", "narrow18"])
def test_the_shapes_tell_which_resnet(resnet, tmp_path):
    weights = read_weights(save(under("module.", trunk(resnet)), tmp_path / "x.pth"))
    assert same(weights.backbone, trunk(resnet)) and weights.source == f"{resnet} at 'module.'"
    assert weights.resnet == resnet


def test_torchvisions_net_loads_it(tmp_path):
    net = torchvision.models.resnet18()
    weights = read_weights(save(net.state_dict(), tmp_path / "x.pth"))
    net.fc = torch.nn.Identity()
    net.load_state_dict(weights.backbone)
    assert weights.dropped == ("fc.weight", "fc.bias") and isinstance(weights, tuple)


@pytest.mark.parametrize("arch", ["c4", "fpn"])
def test_our_run_directories(arch, tmp_path):
    torch.manual_seed(0)
    encoder = (C4Encoder if arch == "c4" else FPNEncoder)("narrow18")
    own = encoder.state_dict()
    save({"step": 7, "args": {"arch": arch}, "encoder_q": own, "queue": {"keys": torch.zeros(1, 2, 3)},
          "encoder_k": {name: x + 1 for name, x in own.items() if name.startswith("resnet.")},
          "optimizer": OPTIMIZER}, tmp_path / "checkpoint.pth")
    weights = read_weights(str(tmp_path))
    assert same(weights.backbone, encoder.resnet.state_dict())
    parts = {name: x for name, x in own.items() if name.startswith(("fpn.", "box_head."))}
    assert same(weights.extras, parts)
    assert len(weights.extras) == (74 if arch == "fpn" else 0)
    assert weights.source == ("narrow18 at 'encoder_q.resnet.'; a moving average is at 'encoder_k.resnet.', "
                              "--prefix takes it")
    assert {"encoder_q.projector.0.weight", "queue.keys"} <= set(weights.dropped)
    save(encoder.resnet.state_dict(), tmp_path / "backbone.pth")
    assert same(read_weights(str(tmp_path / "backbone.pth")).backbone, weights.backbone)
    os.rename(tmp_path / "checkpoint.pth", tmp_path / "checkpoint_prev.pth")
    assert read_weights(str(tmp_path)).source == weights.source
    os.remove(tmp_path / "checkpoint_prev.pth")
    assert read_weights(str(tmp_path)).source == "narrow18 at ''"


# ---- To detectron2

def test_maps_to_detectron2_are_the_tables():
    """All names, and that each carries the tensor that the table says, not a neighbour."""
    assert same(detectron2_names(NET, "c4"), {theirs: NET[ours] for ours, theirs in table("keymap_c4.csv")})
    want = {theirs: {**NET, **HEADS}[ours] for ours, theirs in table("keymap_fpn.csv")}
    assert len(want) == 392
    assert same(detectron2_names(NET, "fpn"), {name: x for name, x in want.items() if "bottom_up" in name})


def test_released_fpn_file_arrives_at_detectron2_and_comes_back(tmp_path):
    content = {"state_dict": {**under("backbone.", NET), **HEADS, **JUNK}}
    weights = read_weights(save(content, tmp_path / "insloc.pth"))
    want = {theirs: {**NET, **HEADS}[ours] for ours, theirs in table("keymap_fpn.csv")}
    assert same(to_detectron2(weights, "fpn"), want)
    assert {name: x.shape for name, x in weights.extras.items()} == PARTS
    again = read_weights(save({"model": to_detectron2(weights, "fpn")}, tmp_path / "back.pth"))
    assert same(again.backbone, weights.backbone) and same(again.extras, weights.extras)
    assert to_detectron2(weights, "c4").keys() == {theirs for _, theirs in table("keymap_c4.csv")}


def test_half_a_head_is_not_used(tmp_path):
    heads = {name: x for name, x in HEADS.items() if "shared_fcs.0.bias" not in name}
    content = {"state_dict": {**under("backbone.", NET), **heads}}
    weights = read_weights(save(content, tmp_path / "insloc.pth"))
    assert weights.extras == {} and {"state_dict." + name for name in heads} <= set(weights.dropped)


# ---- What is refused

def without(name, state=NET):
    return {key: x for key, x in state.items() if key != name}


def stem_of_resnet50d():
    """timm's resnet50d: three convolutions in the stem, an average pool before each shortcut's."""
    stem = {"conv1.0.weight": torch.zeros(32, 3, 3, 3), "conv1.1.weight": torch.zeros(32),
            "conv1.3.weight": torch.zeros(32, 32, 3, 3), "conv1.6.weight": torch.zeros(64, 32, 3, 3)}
    return {**renamed(without("conv1.weight"), ("downsample.1.", "downsample.2."),
                      ("downsample.0.", "downsample.1.")), **stem}


FAULTS = [
    ("a layer less", {"state_dict": under("module.encoder_q.", without("layer3.5.conv2.weight"))},
     "nearest: resnet50 at 'state_dict.module.encoder_q.': Error(s) in loading state_dict for ResNet: "
     'Missing key(s) in state_dict: "layer3.5.conv2.weight"'),
    ("another shape", {**NET, "layer4.2.bn3.bias": torch.zeros(2047)}, "size mismatch for layer4.2.bn3.bias"),
    ("a deeper net", without("layer3.22.bn1.weight", trunk("resnet101")), "resnet101 at '': "),
    ("other names", renamed(NET, ("bn1", "norm1")), 'Missing key(s) in state_dict: "bn1.weight"'),
    ("a layer more", {**NET, "layer1.0.se.weight": torch.zeros(3)},
     'Unexpected key(s) in state_dict: "layer1.0.se.weight"'),
    ("a wider net", numbered(shapes(torchvision.models.wide_resnet50_2()), 0), "resnet50 at ''"),
    ("a wider block", {**NET, "layer1.0.conv1.weight": torch.zeros(128, 64, 1, 1)},
     "size mismatch for layer1.0.conv1.weight"),
    ("no stem", without("conv1.weight"), '"conv1.weight"'),
    ("one channel", under("l_to_ab.", {**NET, "conv1.weight": NET["conv1.weight"][:, :1]}),
     "torch.Size([64, 1, 7, 7])"),
    ("timm's resnet50d", stem_of_resnet50d(), "no whole ResNet with torchvision's stem and blocks"),
    ("SimCLR v2 converted", {"resnet": {"net.0.0.weight": torch.zeros(64, 3, 3, 3),
                                        "net.1.blocks.0.net.0.0.weight": torch.zeros(3)}, "head": {}},
     "stem and blocks; nearest: none, it has resnet.net.0.0.weight"),
    ("a transformer", {"state_dict": {"patch_embed.proj.weight": torch.zeros(3)}},
     "it has state_dict.patch_embed.proj.weight"),
    ("an average beside a net that is not whole", {"state_dict": {
        **under("module.encoder_k.", NET), **under("module.encoder_q.", without("conv1.weight"))}},
     "a moving average is at 'state_dict.module.encoder_k.', --prefix takes it"),
    ("two averages that differ", {"ema": NET, "teacher": OTHER}, "two ResNets, at 'ema.' and 'teacher.'"),
    ("a variance below zero", {**NET, "bn1.running_var": -torch.ones(64)}, "bn1.running_var has values"),
    ("integers", {**NET, "conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}, "conv1.weight is quant"),
    ("quantised", {**NET, "conv1.weight": torch.quantize_per_tensor(
        torch.ones(64, 3, 7, 7), 0.1, 0, torch.qint8)}, "conv1.weight is quantised"),
    ("without values", {**NET, "conv1.weight": torch.ones(64, 3, 7, 7, device="meta")},
     "conv1.weight is quant"),
    ("sparse", {**NET, "conv1.weight": torch.ones(64, 3, 7, 7).to_sparse()},
     "conv1.weight is quantised, sparse"),
    ("beyond float16", {**NET, "conv1.weight": torch.full((64, 3, 7, 7), 1e6).half()},
     "conv1.weight has values"),
    ("not a number", {**NET, "layer1.0.conv1.weight": torch.full((64, 64, 1, 1), np.nan)},
     "layer1.0.conv1.weight has values that are not finite"),
    ("infinite", {**NET, "bn1.running_var": torch.full((64,), np.inf)}, "bn1.running_var has values"),
    ("complex", {**NET, "conv1.weight": torch.ones(64, 3, 7, 7) + 1j}, "conv1.weight"),
    ("no tensors", {"epoch": 3}, "it has no tensors"), ("a number", 3, "it has no tensors"),
    ("a tensor", torch.zeros(3), "it has no tensors"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_what_is_not_whole_is_refused(fault, tmp_path):
    assert fault[2] in refusal(save(fault[1], tmp_path / "x.pth"))


def test_other_frameworks_are_refused_by_name(tmp_path):
    for name in ("model.ckpt-225206", "model.ckpt-225206.index", "model.ckpt-225206.data-00000-of-00001",
                 "detcon_r50.npy"):
        assert "JAX or TensorFlow: convert it" in refusal(tmp_path / name)
    (tmp_path / "pretrain_res50x1.pkl").write_bytes(b"\x80\x04\x8c\x05haiku\x8c\x07FlatMap\x93.")
    assert "--trust" in refusal(tmp_path / "pretrain_res50x1.pkl")
    said = refusal(tmp_path / "pretrain_res50x1.pkl", trust=True)
    assert "install haiku" in said and "must be converted" in said


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_objects_need_trust_and_their_package(form, tmp_path):
    """OmegaConf's, mmengine's and pathlib's objects beside the weights."""
    path = tmp_path / "x.pth"
    torch.save({"state_dict": trunk("narrow18"), "cfg": {"path": pathlib.PurePosixPath("/data")}}, path,
               _use_new_zipfile_serialization=form == "zip")
    name = f"{pathlib.PurePosixPath.__module__}.PurePosixPath"              # pathlib._local in Python 3.13
    assert f"it asks for {name}, which may run code: --trust" in refusal(path)
    assert read_weights(str(path), trust=True).resnet == "narrow18"
    sys.modules["mmengine"] = module = type(sys)("mmengine")
    module.Config = type("Config", (), {"__module__": "mmengine"})
    torch.save({"cfg": module.Config(), "state_dict": {}}, path, _use_new_zipfile_serialization=form == "zip")
    del sys.modules["mmengine"]
    assert "it asks for mmengine.Config" in refusal(path)
    assert "install mmengine" in refusal(path, trust=True)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form, options", [
    ("x.pth", {}), ("x.pth", {"_use_new_zipfile_serialization": False}), ("x.pth", {"pickle_protocol": 4}),
    ("x.pkl", None), ("x.pth", None), ("x.safetensors", {}), ("x.safetensors", None)])
def test_a_file_runs_code_only_with_trust(form, options, tmp_path):
    content = {"model": trunk("narrow18"), "extra": Hostile(str(tmp_path / "ran"))}
    path = tmp_path / form
    if options is None:
        path.write_bytes(pickle.dumps({"model": arrays(content["model"]), "extra": content["extra"]}, 2))
    else:
        torch.save(content, path, **options)
    assert "--trust" in refusal(path)
    assert not (tmp_path / "ran").exists()
    assert read_weights(str(path), trust=True).resnet == "narrow18" and (tmp_path / "ran").exists()


def test_numpys_classes_are_not_given_to_a_file(tmp_path):
    """A NumPy scalar whose dtype calls its eight bytes an object is a pointer of the file's choice. Were
    numpy.dtype a safe global, complex() and set(), which torch allows, would follow it."""
    dtype = (b"cnumpy\ndtype\nX\2\0\0\0V8\x85R(K\3X\1\0\0\0|NX\1\0\0\0a\x85}X\1\0\0\0a"
             b"cnumpy\ndtype\nX\1\0\0\0O\x85RK\0\x86sK\x08K\1K\1tb")
    pointer = b"c_codecs\nencode\nX\x08\0\0\0AAAAAAAAX\6\0\0\0latin1\x86R"
    data = b"\x80\2cnumpy._core.multiarray\nscalar\n" + dtype + pointer + b"\x86R."
    save({}, tmp_path / "empty.pth")
    with zipfile.ZipFile(tmp_path / "empty.pth") as source:
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as target:
            for name in source.namelist():
                target.writestr(name, data if name.endswith("data.pkl") else source.read(name))
    assert type(read_file(str(tmp_path / "x.pth"))).__name__ == "Ignored"


# ---- Containers

def tar_of_torch_0_1(state, path):
    """As torch.save wrote until 0.1.12: a tar of three pickles, in two of which raw numbers stand between."""
    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return item[1:] if isinstance(item, str) and item.startswith("#") else None

    parts = {name: io.BytesIO() for name in ("sys_info", "pickle", "storages", "tensors")}
    state = {name: x.contiguous() for name, x in state.items() if "num_batches" not in name}
    pickle.dump({"protocol_version": 1000, "little_endian": True}, parts["sys_info"], 2)
    for name in ("storages", "tensors"):
        pickle.dump(len(state), parts[name], 2)
    for i, x in enumerate(state.values()):
        pickle.dump((i, "cpu", torch.FloatStorage), parts["storages"], 2)
        parts["storages"].write(struct.pack("<q", x.numel()) + x.numpy().tobytes())
        pickle.dump((1000 + i, i, torch.FloatTensor), parts["tensors"], 2)
        parts["tensors"].write(struct.pack(f"<ii{2 * x.dim() + 1}q", x.dim(), 0, *x.shape, *x.stride(), 0))
    pickle.dump([], parts["storages"], 2)
    Pickler(parts["pickle"], 2).dump(collections.OrderedDict(
        (name, f"#{1000 + i}") for i, name in enumerate(state)))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, part in parts.items():
            entry = tarfile.TarInfo(name)
            entry.size = part.tell()
            part.seek(0)
            archive.addfile(entry, part)


def script(state, path):
    net = make_resnet("resnet18").eval()
    torch.jit.save(torch.jit.trace(net, torch.zeros(1, 3, 64, 64)), path)


def wrote(**options):
    return lambda state, path: torch.save(state, path, **options)


def pickled(protocol):
    return lambda state, path: path.write_bytes(pickle.dumps(arrays(state), protocol))


NEED_TRUST = [
    ("resnet18-5c106cde.pth", tar_of_torch_0_1, "it is a tar file, as torch 0.1 wrote"),
    ("x.pth", wrote(pickle_protocol=4), "it has pickle protocol 4 or 5"),
    ("x.pth", wrote(pickle_protocol=5), "it has pickle protocol 4 or 5"),
    ("x.pth", wrote(pickle_protocol=4, _use_new_zipfile_serialization=False),
     "it has pickle protocol 4 or 5"),
    ("x.pt", script, "it is a TorchScript archive"),
    ("x.pth", lambda state, path: torch.save(make_resnet("resnet18"), path),
     "it asks for torchvision.models.resnet"),
    ("x.pth", lambda state, path: torch.save({"model": make_resnet("resnet18"), "epoch": 3}, path),
     "it asks for"),
    ("x.pth", pickled(2), "it is a pickle"), ("x.bin", pickled(4), "it is a pickle"),
    ("x.pkl", pickled(0), "it is a pickle"),
    ("x.pth", lambda state, path: path.write_bytes(pickle.dumps(dict(state), 2)), "it is a pickle"),
    ("x.pth", lambda state, path: torch.save(arrays(state), path), "NumPy's arrays need --trust")]


@pytest.mark.parametrize("name, write, word", NEED_TRUST, ids=[" ".join(row[::2]) for row in NEED_TRUST])
@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit", "ignore:Detected pickle")
def test_what_trust_would_read_is_named(name, write, word, tmp_path):
    state = {key: x.contiguous() for key, x in SMALL.items()}
    write(state, tmp_path / name)
    said = refusal(tmp_path / name)
    assert word in said and "--trust" in said and "damaged" not in said
    weights = read_weights(str(tmp_path / name), trust=True)
    assert weights.resnet == "resnet18"
    if "asks for" not in word and "TorchScript" not in word:            # those nets are random ones
        assert same(weights.backbone, {key: x if "num_batches" not in key else weights.backbone[key]
                                       for key, x in state.items()})


@pytest.mark.parametrize("write, name", [
    (lambda state, path: safetensors.torch.save_file(state, path), "x.bin"),
    (lambda state, path: safetensors.torch.save_file(state, path), "x.pth"),
    (wrote(), "x.safetensors"), (wrote(), "x.pkl"), (wrote(pickle_protocol=3), "x.pth"),
    (wrote(_use_new_zipfile_serialization=False), "x.pkl")])
@pytest.mark.filterwarnings("ignore:Detected pickle")
def test_the_ending_does_not_matter(write, name, tmp_path):
    state = {key: x.contiguous() for key, x in trunk("narrow18").items()}
    write(state, tmp_path / name)
    assert same(read_weights(str(tmp_path / name)).backbone, state)


@pytest.mark.parametrize("name, data, word", [
    ("resnet50.onnx", b"\x08\x07\x12\x07pytorch\x1a\x03", "as of ONNX or Caffe: convert"),
    ("x.pth", b"\x08\x08\x12\x07pytorch", "as of ONNX or Caffe: convert"),
    ("x.h5", b"\x89HDF\r\n\x1a\n", "HDF5, as Keras writes it: convert"),
    ("x.npz", b"PK\3\4", "NumPy, JAX or TensorFlow: convert"),
    ("flax_model.msgpack", b"\x83", "JAX or TensorFlow: convert"),
    ("model.safetensors.index.json", b'{"metadata": {}, "weight_map": {}}',
     "an index of shards: give one file"),
    ("x.pth", b"\n<!DOCTYPE html><html>", "a web page"), ("x.safetensors", b"<html>", "a web page"),
    ("x.pth", b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
    ("x.pth.gz", b"\x1f\x8b\x08", "no file of tensors: it begins with"),
    ("x.pth", b"", "no file of tensors: it begins with b''"),
    ("x.caffemodel", b"\n\x08ResNet-50", "as of ONNX or Caffe: convert")])
def test_what_pytorch_does_not_read_has_a_word_of_its_own(name, data, word, tmp_path):
    (tmp_path / name).write_bytes(data)
    for trust in (False, True):
        said = refusal(tmp_path / name, trust=trust)
        assert word in said and "--trust" not in said


def test_a_class_of_the_program_that_wrote_it(tmp_path):
    data = pickle.dumps({"a": 1}, 2).replace(b"X\1\0\0\0a", b"c__main__\nNothing\n")
    (tmp_path / "x.pth").write_bytes(data)
    assert "save a state_dict()" in refusal(tmp_path / "x.pth", trust=True)


# ---- What stands beside the trunk is not looked at

BESIDE = {
    "text": np.str_("a"), "texts": np.array(["a", "b"]), "objects": np.array([{"a": 1}, None], dtype=object),
    "date": np.datetime64("2020-01-01"), "dates": np.array(["2020-01-01"], dtype="M8[D]"),
    "records": np.zeros(2, dtype=[("a", "f4")]), "numbers": np.arange(4),
    "long doubles": np.zeros(2, np.longdouble),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
    "meta": torch.zeros(3, device="meta"), "sparse": torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "complex": torch.ones(3) * 1j}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_the_tensors_of_the_place_are_looked_at(kind, tmp_path):
    value = BESIDE[kind]() if callable(BESIDE[kind]) else BESIDE[kind]
    content = {"state_dict": {**trunk("narrow18"), "mean": value}, "more": {kind: value}}
    path = save(content, tmp_path / "x.pth")
    for trust in (False, True):
        assert same(read_weights(path, trust=trust).backbone, trunk("narrow18"))


def test_dates_of_python_need_trust(tmp_path):
    path = save({"state_dict": trunk("narrow18"), "on": datetime.date(2020, 1, 1)}, tmp_path / "x.pth")
    assert "it asks for datetime.date, which may run code: --trust" in refusal(path)
    assert read_weights(path, trust=True).resnet == "narrow18"


def test_arrays_of_the_other_byte_order(tmp_path):
    small = {name: x.astype(x.dtype.newbyteorder(">")) for name, x in arrays(trunk("narrow18")).items()}
    weights = read_weights(save(small, tmp_path / "x.pkl"), trust=True)
    assert torch.equal(weights.backbone["bn1.bias"], trunk("narrow18")["bn1.bias"])


# ---- Wrappers, spellings of a prefix, averages

WRAPPERS = [("layer1.", "layer1._orig_mod."), ("conv1.", "conv1._orig_mod."),
            ("layer1.0.", "layer1._orig_mod.0."),
            ("layer2.0.", "layer2.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
            (".bn2.", "._checkpoint_wrapped_module.bn2.")]


@pytest.mark.parametrize("rule", WRAPPERS, ids=[rule[1] for rule in WRAPPERS])
def test_wrappers_of_torch_compile_fsdp_and_checkpointing(rule, tmp_path):
    content = {"model": under("_orig_mod.", renamed(trunk("narrow18"), rule))}
    weights = read_weights(save(content, tmp_path / "x.pth"))
    assert same(weights.backbone, trunk("narrow18")) and weights.source == "narrow18 at 'model.'"
    assert not weights.dropped


def test_a_wrapped_net_beside_another_is_not_mixed_with_it(tmp_path):
    small, other = trunk("narrow18"), trunk("narrow18", 5000)
    path = save({**small, **under("_orig_mod.", other)}, tmp_path / "x.pth")
    assert "two ResNets, at '' and '_orig_mod.'" in refusal(path)
    assert same(read_weights(path, prefix="").backbone, small)
    content = {**under("backbone.", small), "backbone.0.weight": torch.zeros(16, 3, 7, 7)}
    path = save(content, tmp_path / "x.pth")
    weights = read_weights(path)
    assert same(weights.backbone, small) and weights.dropped == ("backbone.0.weight",)


@pytest.mark.parametrize("prefix", [
    "state_dict.model.backbone.bottom_up.", "state_dict.model.backbone.bottom_up",
    "state_dict.model.backbone.",
    "model.backbone.bottom_up", "model.backbone", "state_dict._orig_mod.model.backbone.bottom_up"])
def test_prefix_in_the_files_spelling_and_in_ours(prefix, tmp_path):
    small, other = (detectron2_names(trunk("narrow18", start), "fpn") for start in (1, 5000))
    content = {"state_dict": {**under("_orig_mod.model.", small), **under("_orig_mod.twin.", other)}}
    path = save(content, tmp_path / "x.pth")
    assert "two ResNets" in refusal(path)
    assert same(read_weights(path, prefix=prefix).backbone, trunk("narrow18"))
    said = refusal(path, prefix="backbone.bottom_up.")                  # which of the two?
    assert "two ResNets, at 'state_dict.model.backbone.' and 'state_dict.twin.backbone.'" in said


@pytest.mark.parametrize("place", ["teacher.backbone.", "state_dict_ema.", "model.module.encoder_k."])
def test_an_average_alone_is_taken_and_named(place, tmp_path):
    weights = read_weights(save(under(place, trunk("narrow18")), tmp_path / "x.pth"))
    assert same(weights.backbone, trunk("narrow18"))
    assert weights.source == f"narrow18 at {place!r}; it is a moving average"


def test_lightlys_moco_v2_needs_no_prefix(tmp_path):
    """Its benchmark's names; its example's, an nn.Sequential of the children; its MoCo module's."""
    net, old = make_resnet("narrow18"), make_resnet("narrow18")
    memory = {"criterion.memory_bank.bank": torch.zeros(4, 2),
              "projection_head.layers.0.weight": torch.zeros(2, 2)}
    for query, key in (("backbone.", "key_backbone."), ("backbone.", "momentum_backbone.")):
        states = {**under(query, net.state_dict()), **under(key, old.state_dict())}
        weights = read_weights(save({"state_dict": {**states, **memory}}, tmp_path / "x.ckpt"))
        assert same(weights.backbone, net.state_dict())
        assert f"'state_dict.backbone.'; a moving average is at 'state_dict.{key}'" in weights.source
    parts = [torch.nn.Sequential(*list(whole.children())[:-1]).state_dict() for whole in (net, old)]
    states = {**under("backbone.", parts[0]), **under("backbone_momentum.", parts[1])}
    weights = read_weights(save({"state_dict": {**states, **memory}}, tmp_path / "x.ckpt"))
    assert same(weights.backbone, net.state_dict())


def damaged(data):
    """{what: bytes}"""
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    return {"cut": data[:len(data) // 3], "flipped": bytes(flipped), "noise": b"\1\2\3\4" * 99}


@pytest.mark.parametrize("name, what", [
    ("x.pth", "cut"), ("x.pth", "flipped"), ("x.pth", "noise"), ("x.safetensors", "cut"), ("x.pkl", "noise")])
def test_damaged_files(name, what, tmp_path):
    """A changed bit of a .pth is noticed: a zip has check sums (safetensors has none)."""
    save({"a": torch.randn(1000), "b": torch.randn(1000)}, tmp_path / name)
    (tmp_path / name).write_bytes(damaged((tmp_path / name).read_bytes())[what])
    assert "damaged, or no file of tensors: " in refusal(tmp_path / name, trust=True)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path / "absent.pth", tmp_path):
        assert "there is no such file" in refusal(path)
