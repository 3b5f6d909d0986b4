"""Section 7 of insloc.py: one file a row of public checkpoint formats, in its nesting, with its prefixes and
with what else such a file holds (key encoder, target net, queue, optimizer); files that are wrong or hostile;
the name maps against tables."""
import argparse
import csv
import json
import os
import pickle
import re
import types

import numpy as np
import pytest
import torch
import torchvision

from insloc import PIXEL_MEAN, PIXEL_STD, C4Encoder, FPNEncoder, Weights, read_weights, to_detectron2

HERE = os.path.dirname(os.path.abspath(__file__))


def table(name):
    with open(os.path.join(HERE, name)) as f:
        return list(csv.reader(f))[1:]


def numbered(names_and_shapes, start):
    """A tensor a name, each of one value of its own, in next to no memory (a file stores one number)."""
    def number(i, name):
        return torch.tensor(start + i if "num_batches" in name else start + i + 0.5)
    return {name: number(i, name).expand(shape) for i, (name, shape) in enumerate(names_and_shapes.items())}


def shapes(resnet):
    with torch.device("meta"):
        return {name: x.shape for name, x in getattr(torchvision.models, resnet)().state_dict().items()}


def trunk(resnet="resnet50", start=1):
    return numbered({name: shape for name, shape in shapes(resnet).items() if name[:3] != "fc."}, start)


def under(prefix, state):
    return {prefix + name: x for name, x in state.items()}


NET, OTHER = trunk(), trunk(start=5000)
FC = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
MLP = {"fc.0.weight": torch.zeros(3, 2), "fc.0.bias": torch.zeros(3),
       "fc.2.weight": torch.zeros(2, 3), "fc.2.bias": torch.zeros(2)}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(64, 3, 7, 7)}},
             "param_groups": [{"lr": 0.03, "params": [0]}]}
UNCOUNTED = {name: x for name, x in NET.items() if "num_batches" not in name}
BODY = {name: x for name, x in NET.items() if not name.startswith("layer4")}
LAST = {name: x for name, x in NET.items() if name.startswith("layer4")}
OTHER_BODY = {name: OTHER[name] for name in BODY}
OTHER_LAST = {name: OTHER[name] for name in LAST}
# The released names of neck and box head -> detectron2's.
RELEASED = {row[0]: row[1] for row in table("keymap_fpn.csv") if row[0] not in NET}
with torch.device("meta"):
    PARTS = {name: x.shape for name, x in FPNEncoder().state_dict().items()
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

# file name, content, method, pixel mean and std if they are not ImageNet's
ROWS = [
    ("random_r50-5d0fa71b.pth", {"state_dict": NET}, "unknown system"),
    ("resnet50-0676ba61.pth", {**NET, **FC}, "Supervised"),
    ("imagenet_r50-21352794.pth", {"state_dict": NET}, "Supervised"),
    ("relative_loc_r50-342c9097.pth", {"state_dict": NET}, "Relative Loc."),
    ("relative-loc_resnet50_8xb64-steplr-70e_in1k_20220825-daae1b41.pth", {**META, "state_dict": {
        **under("backbone.", NET), "neck.fc.weight": torch.zeros(2, 2),
        "head.fc_cls.weight": torch.zeros(2, 2),
        "data_preprocessor.mean": torch.zeros(3)}}, "Relative Loc."),
    ("moco_v1_200ep_pretrain.pth.tar", {
        "epoch": 200, "arch": "resnet50", "optimizer": OPTIMIZER, "state_dict": {
        **under("module.encoder_q.", {**NET, **FC}), **under("module.encoder_k.", {**OTHER, **FC}),
        "module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1)}}, "MoCo-v1"),
    ("pretrained.pth.tar", {"epoch": 200, "arch": "resnet50", "optimizer": OPTIMIZER, "state_dict": {
        **under("module.encoder_q.", {**NET, **MLP}), **under("module.encoder_k.", {**OTHER, **MLP}),
        "module.queue": torch.zeros(128, 8)}}, "MoCo-v2"),
    ("model_final_checkpoint_phase199.torch", {
        "phase_idx": 199, "classy_state_dict": {"base_model": {"model": {
        "trunk": under("_feature_blocks.", NET), "heads": {"0.clf.0.weight": torch.zeros(2, 2)}}},
            "loss": under("moco_encoder.trunk._feature_blocks.", OTHER), "optimizer": OPTIMIZER}},
     "unknown system"),
    ("InfoMin_200.pth", {"opt": argparse.Namespace(lr=0.03), "epoch": 200,
                         "contrast": {"memory": torch.zeros(8, 2)},
                         "model": {**under("module.encoder.", NET), "module.head.0.weight": torch.zeros(2, 2),
                                   "module.head_jig.fc1.weight": torch.zeros(2, 2)},
                         "model_ema": under("encoder.", OTHER)}, "InfoMin"),
    ("resnet50-1x.pth", {"state_dict": {**NET, **FC}}, "SimCLR", (0, 0, 0), (1, 1, 1)),
    ("simclr_rn50_200ep_simclr_8node_phase.torch", {"classy_state_dict": {"base_model": {"model": {
        "trunk": under("_feature_blocks.", NET), "heads": {}}}}}, "SimCLR"),
    ("simclr_r50_bs256_ep200-4577e9a6.pth", {"state_dict": NET}, "SimCLR"),
    ("pretrain_res50x1.pth.tar", UNCOUNTED, "BYOL"),
    ("byol.pth", {"state_dict": {**UNCOUNTED, **FC}}, "BYOL"),
    ("byol_r50_bs256_accmulate16_ep300-5df46722.pth", {"state_dict": NET}, "BYOL"),
    ("byol_resnet50_16xb256-coslr-200e_in1k_20220825-de817331.pth", {**META, "state_dict": {
        **under("backbone.", NET), **under("target_net.module.0.", OTHER),
        "neck.fc.weight": torch.zeros(2, 2)}}, "BYOL"),
    ("epoch_300.pth", {**META, "state_dict": {
        **under("online_net.0.", NET), **under("backbone.", NET), **under("target_net.0.", OTHER),
        "online_net.1.fc0.weight": torch.zeros(2, 2)}}, "BYOL"),
    ("swav_200ep_pretrain.pth.tar", {
        **under("module.", NET), "module.projection_head.0.weight": torch.zeros(2, 2),
        "module.prototypes.weight": torch.zeros(2, 2)}, "SwAV", PIXEL_MEAN, (0.228, 0.224, 0.225)),
    ("checkpoint.pth.tar", {"epoch": 3, "optimizer": OPTIMIZER, "state_dict": {
        **under("module.", NET), "module.prototypes.weight": torch.zeros(2, 2)}},
     "SwAV", PIXEL_MEAN, (0.228, 0.224, 0.225)),
    ("insloc_fpn_200ep.pth", {**META, "state_dict": {
        **under("backbone.", NET), **under("backbone_k.", OTHER), **HEADS, **JUNK,
        "rpn_head.x.weight": torch.zeros(2, 2)}}, "InsLoc"),
    ("epoch_200.pth", {**META, "state_dict": {
        **under("backbone.", BODY), **under("backbone_k.", OTHER_BODY),
        **under("roi_head.shared_head.", LAST), **under("roi_head_k.shared_head.", OTHER_LAST),
        "roi_head.bbox_head.fc_cls.weight": torch.zeros(2, 2)}}, "InsLoc"),
    ("densecl_r50_imagenet_200ep.pth", {"state_dict": NET, "author": "x"}, "DenseCL"),
    ("pixpro_ckpt_epoch_100.pth", {"opt": argparse.Namespace(lr=1.0), "optimizer": OPTIMIZER, "model": {
        **under("module.encoder.", NET), **under("module.encoder_k.", OTHER),
        **under("module.projector.", MLP)}}, "PixPro"),
    ("soco_ckpt_epoch_100.pth", {"opt": argparse.Namespace(), "model": {
        **under("module.encoder.", NET), **under("module.encoder_k.", OTHER),
        "module.neck.lateral.weight": torch.zeros(2),
        "module.neck_k.lateral.weight": torch.zeros(2), "module.head.fc.weight": torch.zeros(2)}}, "SoCo"),
    ("byol-solo-ep=999.ckpt", {
        "pytorch-lightning_version": "1.5", "optimizer_states": [OPTIMIZER], "state_dict": {
            **under("backbone.", NET), **under("momentum_backbone.", OTHER), **under("projector.", MLP)}},
     "BYOL"),
    ("pcl_v2_epoch200.pth.tar", {"state_dict": {
        **under("module.encoder_q.", NET), **under("module.encoder_k.", OTHER),
        **under("module.encoder_q.", MLP)}}, "MoCo-v2"),
]


def same(got, want):
    return got.keys() == want.keys() and all(
        torch.equal(got[name], want[name].to(got[name].dtype)) for name in want)


def counted(state):
    """What is to come of a trunk: counters where a file has none are zero."""
    return {name: state.get(name, torch.zeros((), dtype=torch.long)) for name in NET}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_public_format(row, tmp_path):
    name, content, method, *convention = row
    torch.save(content, tmp_path / name)
    weights = read_weights(str(tmp_path / name))
    own = UNCOUNTED if name in ("pretrain_res50x1.pth.tar", "byol.pth") else NET
    assert same(weights.backbone, counted(own))
    assert re.split("[ ,]* resnet50 at|,", weights.source)[0].strip(",") == method
    assert (weights.pixel_mean, weights.pixel_std) == tuple(convention or (PIXEL_MEAN, PIXEL_STD))
    assert weights.channel_order == "RGB"
    assert len(weights.extras) == (74 if name == "insloc_fpn_200ep.pth" else 0)
    taken = len(own) + len(weights.extras)

    def tensors(node):
        return sum(tensors(x) if isinstance(x, dict) else isinstance(x, torch.Tensor) for x in node.values())
    assert taken + len(weights.dropped) == tensors(content)         # every tensor is accounted for


def test_detectron2_pickles_without_trust(tmp_path):
    """MoCo's converted .pkl (no prefix, NumPy) and detectron2's torchvision one, in every pickle protocol."""
    small = trunk("resnet18")
    back = {name.replace("backbone.", "").replace("roi_heads.", ""): x.numpy() for name, x in to_detectron2(
        Weights(small, {}, "", (), (), "RGB", ()), "c4").items()}
    for protocol in (2, 3, 4, 5):
        with open(tmp_path / "R-50.pkl", "wb") as f:
            pickle.dump({"model": {**back, "stem.fc.weight": np.zeros((2, 2))},
                         "__author__": "MOCO", "matching_heuristics": True},
                        f, protocol=protocol)
        weights = read_weights(str(tmp_path / "R-50.pkl"))
        assert same(weights.backbone, small) and weights.source == "Supervised, resnet18 at model."


def test_safetensors(tmp_path):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    small = {**trunk("resnet18"), "fc.weight": torch.zeros(10, 512)}
    for name, x in small.items():
        raw = x.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32" if x.is_floating_point() else "I64", "shape": list(x.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    small.pop("fc.weight")
    assert same(read_weights(str(tmp_path / "model.safetensors")).backbone, small)


@pytest.mark.parametrize("resnet", ["resnet18", "resnet34", "resnet101", "resnet152"])
def test_the_shapes_tell_which_resnet(resnet, tmp_path):
    torch.save(under("module.", trunk(resnet)), tmp_path / "x.pth")
    weights = read_weights(str(tmp_path / "x.pth"))
    assert same(weights.backbone, trunk(resnet)) and weights.source.endswith(f"{resnet} at module.")


@pytest.mark.parametrize("arch", ["c4", "fpn"])
def test_our_run_directories(arch, tmp_path):
    torch.manual_seed(0)
    encoder_q, encoder_k = (C4Encoder if arch == "c4" else FPNEncoder)("resnet18"), C4Encoder("resnet18")
    torch.save({"encoder_q": encoder_q.state_dict(), "encoder_k": encoder_k.state_dict(),
                "queue": {"keys": torch.zeros(1, 2, 3)}, "optimizer": OPTIMIZER, "step": 7,
                "args": {"arch": arch, "method": "insloc", "resnet": "resnet18"}},
               tmp_path / "checkpoint.pth")
    weights = read_weights(str(tmp_path))
    own = encoder_q.state_dict()
    assert same(weights.backbone, {name[7:]: x for name, x in own.items() if name.startswith("resnet.")})
    assert same(weights.extras, {name: x for name, x in own.items()
                                 if name.startswith(("fpn.", "box_head."))})
    assert len(weights.extras) == (74 if arch == "fpn" else 0)
    assert weights.source.startswith("InsLoc, resnet18")
    assert {"encoder_q.projector.0.weight", "queue.keys"} <= set(weights.dropped)
    torch.save({name[7:]: x for name, x in own.items() if name.startswith("resnet.")},
               tmp_path / "backbone.pth")
    assert same(read_weights(str(tmp_path / "backbone.pth")).backbone, weights.backbone)
    os.rename(tmp_path / "checkpoint.pth", tmp_path / "checkpoint_prev.pth")
    assert same(read_weights(str(tmp_path)).backbone, weights.backbone)


def test_maps_to_detectron2_are_the_tables():
    """All names, and that each carries the tensor that the table says, not a neighbour."""
    weights = Weights(NET, {}, "", (), (), "RGB", ())
    assert same(to_detectron2(weights, "c4"), {theirs: NET[ours] for ours, theirs in table("keymap_c4.csv")})
    released = {**NET, **HEADS}
    want = {theirs: released[ours] for ours, theirs in table("keymap_fpn.csv")}
    assert len(want) == 392
    assert same(to_detectron2(weights, "fpn"), {name: x for name, x in want.items() if "bottom_up" in name})


def test_released_fpn_file_arrives_at_detectron2(tmp_path):
    torch.save({"state_dict": {**under("backbone.", NET), **HEADS, **JUNK}}, tmp_path / "insloc.pth")
    weights = read_weights(str(tmp_path / "insloc.pth"))
    want = {theirs: {**NET, **HEADS}[ours] for ours, theirs in table("keymap_fpn.csv")}
    assert same(to_detectron2(weights, "fpn"), want)
    assert {name: x.shape for name, x in weights.extras.items()} == PARTS
    torch.save({"model": to_detectron2(weights, "fpn")}, tmp_path / "back.pth")     # and back again
    again = read_weights(str(tmp_path / "back.pth"))
    assert same(again.backbone, weights.backbone) and same(again.extras, weights.extras)
    torch.save({"model": to_detectron2(weights, "c4")}, tmp_path / "back.pth")
    assert same(read_weights(str(tmp_path / "back.pth")).backbone, weights.backbone)


def test_half_a_head_is_not_used(tmp_path):
    heads = {name: x for name, x in HEADS.items() if "shared_fcs.0.bias" not in name}
    torch.save({"state_dict": {**under("backbone.", NET), **heads}}, tmp_path / "insloc.pth")
    weights = read_weights(str(tmp_path / "insloc.pth"))
    assert weights.extras == {} and {"state_dict." + name for name in heads} <= set(weights.dropped)


@pytest.mark.parametrize("content, said", [
    ({"state_dict": under("module.encoder_q.", {
        k: x for k, x in NET.items() if k != "layer3.5.conv2.weight"})},
     "resnet50 at 'state_dict.module.encoder_q.', with 1 fault: layer3.5.conv2.weight is missing"),
    ({**NET, "layer4.2.bn3.bias": torch.zeros(2047)}, "layer4.2.bn3.bias is (2047,), not (2048,)"),
    ({k: x for k, x in trunk("resnet101").items() if k != "layer3.22.bn1.weight"},
     "resnet101 at 'top level', with 1 fault: layer3.22"),
    ({k.replace("bn1", "norm1"): x for k, x in NET.items()}, "bn1.weight is missing"),
    ({**NET, "layer1.0.se.weight": torch.zeros(3)}, "layer1.0.se.weight is one too many"),
    (numbered(shapes("wide_resnet50_2"), 0), "layer1.0.conv1.weight is (128, 64, 1, 1), not (64, 64, 1, 1)"),
    ({k: x for k, x in NET.items() if k != "conv1.weight"}, "conv1.weight is missing"),
    ({**under("a.", NET), **under("b.", OTHER)}, "two different ResNets, at 'a.' and 'b.'"),
    (under("module.encoder.module.l_to_ab.", {**NET, "conv1.weight": NET["conv1.weight"][:, :1]}),
     "(64, 1, 7, 7)"),
    ({"state_dict": under("module.encoder_k.", NET)}, "averages do not count"),
    ({"state_dict": {"patch_embed.proj.weight": torch.zeros(3)}},
     "it has state_dict.patch_embed.proj.weight"),
    ({"epoch": 3}, "it has nothing"), (3, "it has nothing"), (torch.zeros(3), "it has nothing"),
])
def test_what_is_not_whole_is_refused(content, said, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        read_weights(str(tmp_path / "x.pth"))
    assert said in str(error.value) and "\n" not in str(error.value)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_hostile_files_do_not_run(how, tmp_path):
    content, path = {"model": NET, "extra": Hostile(str(tmp_path / "ran"))}, str(tmp_path / "x.pkl")
    if how == "pickle":
        with open(path, "wb") as f:
            pickle.dump({"model": {"a": np.zeros(3)}, "extra": content["extra"]}, f)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match="--trust"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()
    if how != "pickle":
        assert same(read_weights(path, trust=True).backbone, NET) and (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["numpy.f2py.run_main", "numpy.load", "collections.namedtuple",
                                  "_codecs.decode", "builtins.eval"])
def test_a_pickle_names_nothing_but_arrays(name, tmp_path):
    module, name = name.rsplit(".", 1)
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
                                     + b"\x8c" + bytes([len(name)])
                                     + name.encode() + b"\x93.")
    with pytest.raises(ValueError, match="--trust"):
        read_weights(str(tmp_path / "x.pkl"))


def test_originals_of_jax_and_tensorflow_are_refused_by_name(tmp_path):
    (tmp_path / "pretrain_res50x1.pkl").write_bytes(b"\x80\x04\x8c\x05haiku\x8c\x07FlatMap\x93.")
    with pytest.raises(ValueError, match="byol-convert.*pads"):
        read_weights(str(tmp_path / "pretrain_res50x1.pkl"))
    for path in ("model.ckpt-225206", "model.ckpt-225206.index", "model.ckpt-225206.data-00000-of-00001"):
        with pytest.raises(ValueError, match="simclr-converter.*pads"):
            read_weights(str(tmp_path / path))


def test_other_files_and_no_file(tmp_path):
    torch.save(NET, tmp_path / "x.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:5000])
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "msra.pkl").write_bytes(pickle.dumps({"blobs": {"res2_0_branch2a_w": np.zeros(3)}}))
    for name, said in (("cut.pth", "damaged"), ("page.pth", "begins with b'<!DOCTYP"),
                       ("msra.pkl", "finetune_det.py"),
                       (".", "a directory without checkpoint.pth")):
        with pytest.raises(ValueError) as error:
            read_weights(str(tmp_path / name))
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_weights(str(tmp_path / "absent.pth"))


def test_half_precision_and_plain_names_load_into_torchvision(tmp_path):
    halves = {name: x.half() if x.is_floating_point() else x for name, x in trunk("resnet18", 1).items()}
    torch.save(halves, tmp_path / "x.pth")
    weights = read_weights(str(tmp_path / "x.pth"))
    net = torchvision.models.resnet18()
    net.fc = torch.nn.Identity()
    net.load_state_dict(weights.backbone)
    assert {x.dtype for x in weights.backbone.values()} == {torch.float32, torch.int64}
    assert isinstance(weights, tuple) and isinstance(types.SimpleNamespace(**weights._asdict()).source, str)
