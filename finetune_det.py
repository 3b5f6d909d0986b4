"""Stage 3: fine-tune a detector with detectron2 from any system's weights, and report AP (arXiv 2102.08318,
Sec. 5).

    python finetune_det.py runs/insloc_fpn --protocol coco-fpn-1x --data /data       # every GPU, else the CPU
    python finetune_det.py swav_200ep_pretrain.pth.tar --protocol voc-c4 --data /data --trials 5
    python finetune_det.py random --protocol coco-c4-1x --train-images A --train-json a.json \\
        --val-images B --val-json b.json                                    # a detection set of one's own
    python finetune_det.py runs/insloc_c4 --protocol coco-c4-1x --export insloc_c4.pkl     # for use elsewhere

Model, data loaders, trainer and evaluators are detectron2's; `build_config` says how the protocols set them.
KEY VALUE pairs at the end override any key of detectron2's configuration, e.g. SOLVER.IMS_PER_BATCH 8.
"""
import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import json
import logging
import os
import pickle
import re
import statistics
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torchvision.io import write_png
from torchvision.transforms.functional import resize
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from insloc import PIXEL_MEAN, PIXEL_STD, Weights, read_file, read_weights, to_detectron2

for message in (".*torch.jit.script", "torch.meshgrid", ".*broadcast_buffers"):         # detectron2's own
    warnings.filterwarnings("ignore", message)
logging.getLogger("torch.fx").setLevel(logging.ERROR)
try:
    import detectron2.engine.defaults
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, detection_utils
    from detectron2.data.datasets.coco import load_coco_json
    from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
    from detectron2.engine import DefaultTrainer, hooks, launch
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
    from detectron2.evaluation.pascal_voc_evaluation import parse_rec
    from detectron2.layers import get_norm
    from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY, build_model
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead, Res5ROIHeads
    from detectron2.structures import BoxMode
    from detectron2.utils import comm
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.file_io import PathManager
    from detectron2.utils.logger import setup_logger
except ImportError as error:
    sys.exit(f"finetune_det.py: error: detectron2 cannot be imported ({error}); `make install` brings it")

HERE = os.path.dirname(os.path.abspath(__file__))
# Protocol: detector, iterations of 16 images, where the rate falls, warm-up, training images, tables.
PROTOCOLS = {
    "voc-c4": ("c4", 24000, (18000, 22000), 100, 16551, ("1",)),                            # Sec. 5.1.1
    "coco-c4-1x": ("c4", 90000, (60000, 80000), 1000, 118287, ("4a", "3a")),                # Sec. 5.1.2
    "coco-c4-2x": ("c4", 180000, (120000, 160000), 1000, 118287, ("2a",)),
    "coco-fpn-1x": ("fpn", 90000, (60000, 80000), 1000, 118287, ("4c", "3b")),
    "coco-fpn-2x": ("fpn", 180000, (120000, 160000), 1000, 118287, ("2b",)),
    "minicoco-c4": ("c4", 9000, (6000, 8000), 1000, 11828, ("5",)),     # Sec. 5.3: 12 epochs [ours: 1x / 10]
}
# What no pre-training has: RPN 6 tensors, predictor 4, extra norm 5, mask head 4 (C4) or 28 (FPN).
NEW_PARTS = ("proposal_generator.rpn_head.", "roi_heads.box_predictor.", "roi_heads.mask_head.",
             "roi_heads.res5.norm.", "roi_heads.box_head.fc_extra_norm.")
# What may change from a trial to its continuation, since it changes nothing of what is learnt.
FREE = ("MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD",
        "OUTPUT_DIR")


def fail(message):
    sys.exit(f"finetune_det.py: error: {message}" if comm.is_main_process() else 1)


def brief(error):
    """An exception as one line: of a long message the first and the last."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys(lines[:1] + lines[-1:]))}"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, fail = parser.add_argument, parser.error           # fail: one line, exit status 2
    add("weights", help="run directory, checkpoint of any system, detectron2:// address, or `random`")
    add("--protocol", choices=list(PROTOCOLS), required=True, help="[paper 5.1 to 5.3]")
    add("--data", metavar="DIR", help="holds coco/, or VOC2007/ and VOC2012/, as DETECTRON2_DATASETS does")
    add("--train-images", metavar="DIR", help="a detection set of one's own instead: its pictures,")
    add("--train-json", metavar="FILE", help="its boxes (and masks) as COCO json,")
    add("--val-images", metavar="DIR", help="the same for evaluation,")
    add("--val-json", metavar="FILE", help="with the same classes")
    add("--classes", help="a,b,c: these of a VOC tree, its VOC2012 may be absent [detectron2: VOC's 20]")
    add("--minicoco-list", metavar="FILE", help="image ids of minicoco-c4, one a line [ours: a tenth of the "
        "sorted ids, by NumPy's PCG64(0), since the paper's list is not public]")
    add("--trials", type=int, default=1, help="with seeds SEED, SEED + 1, ... [ours: 1; paper: 5 on VOC]")
    add("--seed", type=int, default=0, help="of the first trial [ours: 0]")
    add("--out", help="[ours: runs/det_PROTOCOL]")
    add("--resume", action="store_true", help="go on with what --out holds [ours: off]")
    add("--eval-only", action="store_true", help="of --out's detectors, or MODEL.WEIGHTS FILE [ours: off]")
    add("--export", metavar="FILE.pkl", help="only write WEIGHTS for detectron2 [ours: off]")
    add("--pictures", type=int, default=8, help="validation pictures drawn into detections.png [ours: 8]")
    add("--nprocs", type=int, help="processes to start, under torchrun none [ours: one a GPU, one on CPU]")
    add("--trust", action="store_true", help="let the weights' file run its code, as pickles may [ours: off]")
    add("opts", nargs="*", metavar="KEY VALUE", help="detectron2 configuration")
    args = parser.parse_intermixed_args(argv)

    args.out = args.out or f"runs/det_{args.protocol}"
    own = [args.train_images, args.train_json, args.val_images, args.val_json]
    given = dict(zip(args.opts[::2], args.opts[1::2]))
    if any(own) != all(own) or not args.export and bool(args.data) == any(own):
        fail("give --data DIR, or --train-images, --train-json, --val-images and --val-json")
    if args.classes and (args.protocol != "voc-c4" or any(own)):
        fail("--classes is for a VOC tree; a COCO json names its own classes")
    if args.minicoco_list and args.protocol != "minicoco-c4":
        fail("--minicoco-list is for --protocol minicoco-c4")
    if len(args.opts) % 2:
        fail(f"{args.opts[-1]}: overrides come in pairs, KEY VALUE")
    if args.trials < 1 or args.nprocs is not None and args.nprocs < 1 or args.pictures < 0 or args.seed < 0:
        fail("--trials and --nprocs must be at least 1, --pictures and --seed at least 0")
    if "MODEL.WEIGHTS" in given and (not args.eval_only or args.trials > 1):
        fail("MODEL.WEIGHTS names one detector for --eval-only; a training starts from the first argument")

    cuda = torch.cuda.is_available()
    args.device = given.get("MODEL.DEVICE", "cuda" if cuda else "cpu")
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    args.nprocs = args.nprocs or gpus or 1
    if "RANK" in os.environ:                                # torchrun
        args.nprocs = int(os.environ["LOCAL_WORLD_SIZE"])
    if args.device != "cpu" and not gpus or cuda and args.nprocs > max(gpus, 1):
        fail(f"{args.nprocs} processes on {args.device}: torch has {gpus} GPUs for them (for several on the "
             "CPU hide all GPUs, CUDA_VISIBLE_DEVICES=)")
    return args


# ---- What the protocols add to detectron2's models: a norm where features enter the predictors

@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """R50-C4 with a norm after the last residual block (Sec. 5.3), as MoCo's detectors have it."""
    @classmethod
    def _build_res5_block(cls, cfg):
        res5, channels = super()._build_res5_block(cfg)
        if cfg.MODEL.RESNETS.NORM:
            res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHeadExtraNorm(FastRCNNConvFCHead):
    """R50-FPN's box head with a norm after fc1's ReLU [released code]."""
    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        norm, channels = cfg.MODEL.ROI_BOX_HEAD.NORM, self.output_shape.channels
        if norm:                                            # detectron2's "BN" is for maps alone
            self.add_module("fc_extra_norm", torch.nn.BatchNorm1d(channels) if norm == "BN" else
                            get_norm(norm, channels))


class Trainer(DefaultTrainer):
    """detectron2's, told which evaluator a dataset has."""
    @classmethod
    def build_evaluator(cls, cfg, name):
        if name.startswith("coco"):
            return COCOEvaluator(name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
        return PascalVOCDetectionEvaluator(name)


def build_config(protocol, weights=None, data=None, world=8, device="cuda", msra=False, opts=()):
    """The protocol in detectron2's terms, overrides merged. -> it, lines: how it differs from the paper."""
    arch, iterations, steps, warmup, *_ = PROTOCOLS[protocol]
    cfg, given, notes, norm = get_cfg(), get_cfg(), [], "BN" if device == "cpu" else "SyncBN"
    try:
        given.merge_from_list(list(opts))
    except (KeyError, AssertionError, ValueError, TypeError) as error:
        fail(f"override: {error.args[0]}")
    mean, std = (weights.pixel_mean, weights.pixel_std) if weights else (PIXEL_MEAN, PIXEL_STD)
    depth = re.search(r"resnet(\d+) at", weights.source) if weights else None

    # Common to all [MoCo v2 and released code]
    cfg.MODEL.DEVICE = device
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0                            # every layer is trained
    cfg.MODEL.RESNETS.DEPTH = int(depth[1]) if depth else given.MODEL.RESNETS.DEPTH                     # 50
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if cfg.MODEL.RESNETS.DEPTH < 50 else 256
    cfg.MODEL.RESNETS.NORM = norm                               # [paper 5: SyncBN everywhere]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = msra                      # torchvision strides in the 3x3
    cfg.MODEL.PIXEL_MEAN = [round(255 * x, 3) for x in mean]    # the input that the weights were trained with
    cfg.MODEL.PIXEL_STD = [round(255 * x, 3) for x in std]
    cfg.INPUT.FORMAT = weights.channel_order if weights else "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (640, 672, 704, 736, 768, 800)
    cfg.INPUT.MIN_SIZE_TEST = 800
    cfg.TEST.PRECISE_BN.ENABLED = True
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    if protocol == "voc-c4":
        cfg.INPUT.MIN_SIZE_TRAIN = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
        cfg.MODEL.MASK_ON = False
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 20
    if arch == "c4":                                            # [MoCo v2]
        cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 6000, 1000
        cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeadsExtraNorm"
    else:                                                       # [released code]
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.NORM = cfg.MODEL.ROI_BOX_HEAD.NORM = cfg.MODEL.ROI_MASK_HEAD.NORM = norm
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 2000, 1000
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        # The release has the extra norm where the box head is pre-trained, not in its baselines.
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead" + "ExtraNorm" * bool(weights and weights.extras)
        cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 4, 1
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 4, 14
    if data:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = data.train, data.test
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(data.classes)
        cfg.MODEL.MASK_ON = cfg.MODEL.MASK_ON and data.masks
        cfg.INPUT.MASK_FORMAT = "bitmask" if data.rle else "polygon"
    if device == "cpu":
        cfg.DATALOADER.NUM_WORKERS = min(4, len(os.sched_getaffinity(0)) - 1)               # [detectron2: 4]
        notes.append("SyncBatchNorm does not run on the CPU: BatchNorm instead, each process by itself")

    # Two images a GPU as in the paper, up to its 16; for another batch the linear rule.
    own = set(opts[::2])
    batch = min(16, 2 * world) // world * world or world
    batch = given.SOLVER.IMS_PER_BATCH if "SOLVER.IMS_PER_BATCH" in own else batch
    if batch < 1 or batch % world:
        fail(f"SOLVER.IMS_PER_BATCH {batch} does not divide by {world} processes")
    total = given.SOLVER.MAX_ITER if "SOLVER.MAX_ITER" in own else round(iterations * 16 / batch)
    for key, paper, value in (
            ("IMS_PER_BATCH", 16, batch), ("BASE_LR", 0.02, 0.02 * batch / 16),
            ("MAX_ITER", iterations, total),
            ("STEPS", steps, tuple(round(step * total / iterations) for step in steps)),
            ("WARMUP_ITERS", warmup, round(warmup * total / iterations))):
        how, value = ("given", given.SOLVER[key]) if f"SOLVER.{key}" in own else ("linear rule", value)
        cfg.SOLVER[key] = value
        if value != paper:
            notes.append(f"SOLVER.{key} {value}, paper {paper} ({how})")
    cfg.merge_from_list(list(opts))
    if arch == "c4" and cfg.MODEL.RESNETS.DEPTH < 50:
        fail("detectron2's C4 head is made of bottleneck blocks: "
             f"ResNet-{cfg.MODEL.RESNETS.DEPTH} needs an fpn protocol")
    return cfg, notes


# ---- Data

def find_sets(args, say):
    """[(detectron2's name, folder, json or VOC's split)], training first, evaluation last; all is there."""
    top = args.data
    if args.train_json:
        sets, tree = [("coco_own_train", args.train_images, args.train_json),
                      ("coco_own_val", args.val_images, args.val_json)], "pictures and COCO json as given"
    elif args.protocol == "voc-c4":
        sets = [(f"voc_{year}_{split}", f"{top}/VOC{year}", split)
                for year, split in ((2007, "trainval"), (2012, "trainval"), (2007, "test"))]
        if args.classes and not os.path.exists(f"{top}/VOC2012"):
            say(f"no {top}/VOC2012: training on VOC2007's trainval alone")
            del sets[1]
        tree = (f"{top}/{{VOC2007,VOC2012}}/{{Annotations/*.xml, JPEGImages/*.jpg, "
                "ImageSets/Main/trainval.txt}, and VOC2007/ImageSets/Main/test.txt")
    else:
        coco = top if os.path.exists(f"{top}/annotations") else f"{top}/coco"
        sets = [(f"coco_2017_{x}", f"{coco}/{x}2017", f"{coco}/annotations/instances_{x}2017.json")
                for x in ("train", "val")]
        tree = (f"{top}/coco/{{annotations/instances_train2017.json, annotations/instances_val2017.json, "
                "train2017/*.jpg, val2017/*.jpg}")
    for name, folder, labels in sets:
        parts = (f"{folder}/{x}" for x in ("Annotations", "JPEGImages", f"ImageSets/Main/{labels}.txt"))
        for path in parts if name.startswith("voc") else (folder, labels):
            if not os.path.exists(path):
                fail(f"{path} is missing; detectron2 expects {tree}")
    return sets


def read_set(name, folder, labels, classes):
    """detectron2's list of pictures with their boxes, as xyxy. classes: of a VOC tree."""
    for catalog in (DatasetCatalog, MetadataCatalog):           # detectron2 has some of the names elsewhere
        if name in catalog.list():
            catalog.remove(name)
    meta, voc = MetadataCatalog.get(name), name.startswith("voc")
    at = folder if voc else labels
    try:
        if voc:
            places = {name: i for i, name in enumerate(classes)}        # None for a class not among them
            items = load_voc_instances(folder, labels, SimpleNamespace(index=places.get))
            meta.set(thing_classes=list(classes), dirname=folder, year=int(name[4:8]), split=labels)
            for item in items if labels == "test" else ():      # evaluation would stumble much later
                at = os.path.join(folder, "Annotations/", item["image_id"] + ".xml")
                parse_rec(at)
        else:
            items = load_coco_json(labels, folder, name)
            meta.set(json_file=labels, image_root=folder)
        for box in (box for item in items for box in item["annotations"]):
            box["bbox"] = BoxMode.convert(list(box["bbox"]), box["bbox_mode"], BoxMode.XYXY_ABS)
            box["bbox_mode"] = BoxMode.XYXY_ABS
    except Exception as error:                                  # any: a label file is what somebody wrote
        fail(f"{at}: cannot be read as {'VOC' if voc else 'COCO'} labels: {brief(error)}")
    absent = [item["file_name"] for item in items if not os.path.isfile(item["file_name"])]
    if absent or not items:
        fail(f"{name}: {len(absent)} of {len(items)} pictures are missing, such as {(absent or [folder])[0]}")
    return items


def minicoco_list(items, path):
    """Sorted image ids of Mini-COCO: those in the file, or a tenth of them all."""
    ids = sorted(item["image_id"] for item in items)
    if not path:
        order = np.random.Generator(np.random.PCG64(0)).permutation(ids)
        return sorted(order[:max(1, len(ids) // 10)].tolist())
    with open(path) as f:
        chosen = set(f.read().split())
    unknown = chosen - {str(x) for x in ids}
    if unknown or not chosen:
        fail(f"--minicoco-list {path}: {min(unknown, default='none')} is no image of the training set")
    return [x for x in ids if str(x) in chosen]


def load_data(args, say=print):
    """Registers the protocol's data, checked, under detectron2's names.

    -> train, test: those names; classes; masks: whether all boxes have one, rle: some not as polygons; list:
    Mini-COCO's image ids; images, boxes: of training.
    """
    found, chosen, masks, rle, classes = {}, [], True, False, None
    counts = {"training": collections.Counter(), "validation": collections.Counter()}
    *train, test = sets = find_sets(args, say)
    wanted = [name.strip() for name in args.classes.split(",")] if args.classes else CLASS_NAMES
    for name, folder, labels in sets:
        items, role = read_set(name, folder, labels, wanted), "validation" if name == test[0] else "training"
        here = MetadataCatalog.get(name).thing_classes
        if classes not in (None, here):
            fail(f"{labels}: its classes are not those of the training set ({len(here)} and {len(classes)})")
        classes = here
        if args.protocol == "minicoco-c4" and role == "training":
            chosen = minicoco_list(items, args.minicoco_list)
            few = set(chosen)
            items = [item for item in items if item["image_id"] in few]
        dropped = collections.Counter()
        for item in items:
            every, item["annotations"] = item["annotations"], []
            for box in every:
                x1, y1, x2, y2 = box["bbox"]
                known, solid = box["category_id"] is not None, x2 > x1 and y2 > y1
                masks = masks and "segmentation" in box
                dropped["without area" if known else "of other classes"] += not (known and solid)
                if known and solid:
                    item["annotations"].append(box)
                    if not box.get("iscrowd"):                  # crowds are not trained on
                        counts[role][classes[box["category_id"]]] += 1
                        rle = rle or role == "training" and isinstance(box.get("segmentation"), dict)
        if dropped.total():
            say(f"{name}: dropped {', '.join(f'{n} boxes {why}' for why, n in dropped.items() if n)}")
        found[name] = items
        DatasetCatalog.register(name, functools.partial(found.get, name))
    for role, count in counts.items():
        empty = [name for name in classes if not count[name]]
        if not count:
            fail(f"no {role} picture has a box")
        if empty:
            say(f"warning: {len(empty)} of {len(classes)} classes have no {role} box: {', '.join(empty[:8])}")
    if args.protocol == "voc-c4" and args.train_json:
        say("voc-c4 on a COCO json: COCO's AP, not VOC2007's of 11 points as in the paper's rows")
    elif not masks and args.protocol != "voc-c4":
        say("not every box has a mask: MODEL.MASK_ON False, boxes alone")
    train = tuple(name for name, *_ in train)
    return SimpleNamespace(train=train, test=test[:1], classes=classes, masks=masks, rle=rle, list=chosen,
                           images=sum(len(found[name]) for name in train), boxes=counts["training"].total())


# ---- Weights

def get_weights(args):
    """WEIGHTS -> Weights (None: random), and the arrays of MSRA's net, whose names detectron2 matches."""
    if args.weights == "random":
        return None, None
    try:
        path = PathManager.get_local_path(args.weights) if "://" in args.weights else args.weights
        content = read_file(path, args.trust) if path.endswith(".pkl") else {}
        blobs = content.get("blobs", content) if isinstance(content, dict) else {}
        if isinstance(blobs, dict) and "res2_0_branch2a_w" in blobs:
            mean, std = [x / 255 for x in (103.53, 116.28, 123.675)], [1 / 255] * 3     # [detectron2]
            return Weights({}, {}, "Supervised, MSRA's, by detectron2", mean, std, "BGR", ()), blobs
        return read_weights(path, args.trust), None
    except Exception as error:                                  # any: a file or an address from anywhere
        fail(f"{args.weights}: {error if isinstance(error, ValueError) else brief(error)}")


def load_weights(model, weights, arch, blobs=None):
    """Weights into detectron2's model by exact name. -> names loaded, names left at their random init.

    ValueError unless what is left is what no pre-training has: 15 tensors for VOC C4, 19 for COCO C4, 43 for
    FPN (112 without neck and box head, and without the extra norm then). blobs: MSRA's net.
    """
    own = model.state_dict()
    if blobs:                           # not by detectron2's own reader, which would run the pickle's code
        before = {name: x.clone() for name, x in own.items()}
        arrays = {name: x for name, x in blobs.items() if not name.endswith("_momentum")}
        DetectionCheckpointer(model)._load_model(
            {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True})
        state = {name: x for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
        need = {name for name in own if name.endswith(("weight", "bias"))}      # Caffe2's norms are affine alone
    else:
        state, need = to_detectron2(weights, arch), set(own)
        wrong = [name for name, x in state.items() if name not in own or own[name].shape != x.shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors do not fit the detector that is configured: {wrong[0]}")
        model.load_state_dict(state, strict=False)
    new = NEW_PARTS + (() if weights.extras or arch == "c4" else ("backbone.fpn_", "roi_heads.box_head."))
    lost = sorted(name for name in need - state.keys() if not name.startswith(new))
    if lost:
        raise ValueError(f"{len(lost)} tensors would stay at their random init: {', '.join(lost[:3])}")
    return sorted(state), sorted(own.keys() - state.keys())


def grouped(names):
    """'backbone.res2 12, roi_heads.box_head 5': how many of the names begin alike."""
    count = collections.Counter(".".join(name.split(".")[:2]) for name in names)
    return f"{len(names):4d}  " + ", ".join(f"{name} {n}" for name, n in count.items())


def export(args):
    """WEIGHTS as a file that detectron2 loads by MODEL.WEIGHTS, with the keys that must go with it."""
    weights, msra = get_weights(args)
    if not weights or msra:
        fail("--export: nothing to write, `random` and MSRA's file are detectron2's own")
    arch = PROTOCOLS[args.protocol][0]
    cfg, _ = build_config(args.protocol, weights)
    with open(args.export, "wb") as f:
        pickle.dump({"model": {name: x.numpy() for name, x in to_detectron2(weights, arch).items()},
                     "__author__": f"InsLoc's finetune_det.py, from {weights.source}"}, f)
    keys = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.BACKBONE.FREEZE_AT",
            *(f"MODEL.RESNETS.{x}" for x in ("DEPTH", "RES2_OUT_CHANNELS", "STRIDE_IN_1X1", "NORM")))
    if arch == "fpn":
        keys += ("MODEL.FPN.NORM", *(f"MODEL.ROI_BOX_HEAD.{x}" for x in ("NAME", "NUM_CONV", "NUM_FC", "NORM")))
    values = {key: str(x).replace(" ", "") for key, x in flat(cfg).items()}     # a word each for the shell
    values["MODEL.ROI_BOX_HEAD.NAME"] = "FastRCNNConvFCHead"                    # the extra norm is ours alone
    print(f"{args.export}: R{cfg.MODEL.RESNETS.DEPTH}-{arch.upper()} from {weights.source}; use it with "
          f"detectron2's Base-RCNN-{'C4' if arch == 'c4' else 'FPN'}.yaml and MODEL.WEIGHTS {args.export} "
          + " ".join(f"{key} {values[key]}" for key in keys))


# ---- Pictures and numbers

def draw_detections(cfg, model, data, path, count):
    """A sheet of validation pictures, each twice: truth; what scores 0.5, or the best three if none does."""
    items = [item for item in DatasetCatalog.get(data.test[0]) if item["annotations"]]
    colors = "lime", "cyan", "magenta", "orange", "red"
    mapper, cells = DatasetMapper(cfg, is_train=False), []
    for item in items[::max(1, len(items) // count)][:count]:
        image = torch.from_numpy(detection_utils.read_image(item["file_name"], "RGB").copy()).permute(2, 0, 1)
        truth = [{key: x for key, x in box.items() if key != "segmentation" or cfg.MODEL.MASK_ON}
                 for box in item["annotations"]]
        truth = detection_utils.annotations_to_instances(truth, image.shape[1:], mask_format="bitmask")
        with torch.no_grad():
            found = model.eval()([mapper(item)])[0]["instances"].to("cpu")
        found = found[found.scores >= 0.5] if (found.scores >= 0.5).any() else found[:3]
        scale = min(480 / image.shape[2], 360 / image.shape[1])
        image = resize(image, [int(scale * side) for side in image.shape[1:]])
        for boxes, masks, names in (
                (truth.gt_boxes.tensor, truth.gt_masks.tensor if truth.has("gt_masks") else (),
                 [data.classes[x] for x in truth.gt_classes]),
                (found.pred_boxes.tensor, found.pred_masks if found.has("pred_masks") else (),
                 [f"{data.classes[x]} {score:.2f}" for x, score in zip(found.pred_classes, found.scores)])):
            cell, tints = image, [colors[i % len(colors)] for i in range(len(boxes))]
            if len(masks):
                masks = F.interpolate(masks[None].float(), image.shape[1:])[0] > 0.5
                cell = draw_segmentation_masks(cell, masks, alpha=0.4, colors=tints)
            if len(boxes):
                cell = draw_bounding_boxes(cell, boxes * scale, names, colors=tints, width=2)
            cells.append(F.pad(cell, (0, 480 - cell.shape[2], 0, 360 - cell.shape[1]), value=255))
    write_png(make_grid(cells, nrow=4, padding=4), path)


def draw_curves(out, trials, path):
    """Training loss and, where TEST.EVAL_PERIOD asks for it, AP over the iterations of every trial."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4))
    left, right = figure.add_subplot(xlabel="iteration"), None
    for trial in range(trials):
        lines = {}
        with contextlib.suppress(FileNotFoundError), open(f"{out}/trial{trial}/metrics.json") as f:
            for line in f:
                if line.endswith("}\n"):                        # a kill may have cut one; what a resumed run
                    line = json.loads(line)                     # writes again counts
                    lines[line["iteration"]] = line
        for kind, style in (("total_loss", "-"), ("bbox/AP", "o-"), ("segm/AP", "s--")):
            points = [(at, lines[at][kind]) for at in sorted(lines) if kind in lines[at]]
            if points and kind != "total_loss":
                right = right or left.twinx()
            if points:
                (left if kind == "total_loss" else right).plot(
                    *zip(*points), style, color=f"C{trial}", alpha=0.7, label=f"{kind}, trial {trial}")
    for axes, side, label in ((left, "left", "training loss"), (right, "right", "AP")):
        if axes and axes.lines:
            axes.legend(loc=f"upper {side}")
            axes.set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def paper_rows(protocol, method):
    """{'paper: InsLoc, 200 epochs': {'APbb': '39.5', ...}}: what the paper has of this method, protocol."""
    path = os.path.join(HERE, "docs", "paper_tables.csv")
    if not os.path.exists(path):                    # a script copied without docs/: the results come first
        return {f"paper: not shown, {path} is missing": {}}
    with open(path) as f:
        table = [row for row in csv.DictReader(f) if row["arch"].startswith(("Mask", "Faster"))]
    for number in PROTOCOLS[protocol][-1]:
        rows = {}
        for row in table:
            if row["table"] == number and row["method"] == method:
                name = f"paper: {method}" + (f", {row['epochs']} epochs" if row["epochs"] else "")
                rows.setdefault(name, {})[row["metric"]] = f"{float(row['value']):.1f}"
        if rows:
            return rows
    return {}


def commit():
    """The commit that this file is of, or "unknown" outside of a checkout."""
    with contextlib.suppress(OSError):
        git = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=40"],
                             capture_output=True, text=True)
        return git.stdout.strip() or "unknown"
    return "unknown"


def report(args, cfg, notes, data, source, trials, say):
    """results.json, and the table in the paper's columns with the paper's numbers below ours."""
    ours, means, deviations = {}, {}, {}
    for kind, suffix in (("bbox", "bb"), ("segm", "mk")):
        for metric in ("AP", "AP50", "AP75") if kind in trials[0] else ():
            label = metric + suffix * (args.protocol != "voc-c4")       # Table 1 has boxes alone
            values, ours[label] = [trial[kind][metric] for trial in trials], "-"
            if None not in values:                                      # None: no detection at all
                means[label] = statistics.fmean(values)
                ours[label] = f"{means[label]:.1f}"
            if None not in values and len(values) > 1:
                deviations[label] = statistics.stdev(values)
                ours[label] += f" ± {deviations[label]:.1f}"
    method = source.split(",")[0]
    rows = {f"this run: {method}, {len(trials)} trial{'s' * (len(trials) > 1)}": ours,
            **paper_rows(args.protocol, method)}
    width = max(len(name) for name in rows)
    say("\n" + " " * width + "".join(f"{label:>12}" for label in ours))
    for name, row in rows.items():
        say(f"{name:<{width}}" + "".join(f"{row.get(label, '-'):>12}" for label in ours))
    if len(rows) == 1:
        say(f"(the paper has no row of {method} under this protocol)")
    _, iterations, _, _, images, _ = PROTOCOLS[args.protocol]
    say(f"this run: {cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} out of {data.images} "
        f"training images; paper: {iterations} of 16 out of {images}")
    listed = "".join(f"{image}\n" for image in data.list)
    result = {"protocol": args.protocol, "weights": args.weights, "source": source, "mean": means,
              "deviation": deviations, "trials": trials, "paper": rows, "differs_from_paper": notes,
              "commit": commit(), "torch": torch.__version__, "detectron2": detectron2.__version__,
              "data": {"train": data.train, "test": data.test, "classes": data.classes, "images": data.images,
                       "boxes": data.boxes,
                       "list_sha256": hashlib.sha256(listed.encode()).hexdigest() if listed else None},
              "arguments": vars(args), "config": cfg}
    with open(os.path.join(args.out, "results.json"), "w") as f:
        json.dump(result, f, indent=1)
    if listed:
        with open(os.path.join(args.out, "minicoco.txt"), "w") as f:
            f.write(listed)
        say(f"{args.out}/minicoco.txt: sha256 {result['data']['list_sha256']}")
    say(f"wrote {args.out}/results.json, curves.png, trial*/detections.png, trial*/model_final.pth")


# ---- A trial, all trials

def flat(cfg, prefix=""):
    """{'SOLVER.MAX_ITER': 90000, ...} of a nested configuration."""
    result = {}
    for key, value in cfg.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result


def same_config(cfg, eval_only):
    """Stops if the trial was begun with another configuration, to evaluate it with another input."""
    with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as f:
        old, new = flat(yaml.safe_load(f)), flat(yaml.safe_load(cfg.dump()))
    keys = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD") if eval_only else new.keys() - FREE
    changed = [f"{key} {new[key]}, was {old.get(key)}" for key in sorted(keys) if old.get(key) != new[key]]
    if changed:
        fail(f"{cfg.OUTPUT_DIR} was begun with another configuration: {'; '.join(changed[:3])}")


def train(cfg, weights, msra, arch, resume, say):
    """A trial from its start, or from where it was killed. -> the detector, its metrics."""
    last, begun = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"), 0
    resume = resume and os.path.exists(last)
    if resume:
        with open(last) as f:
            begun = int("0" + re.sub(r"\D", "", f.read()))
    # The iteration goes in: else a run that is often killed would see the same first images again and again.
    seed_all_rng(cfg.SEED + 1000 * begun + comm.get_rank())
    trainer = Trainer(cfg)
    model = getattr(trainer.model, "module", trainer.model)
    for hook in trainer._hooks:                                 # keep the last two, not all
        if isinstance(hook, hooks.PeriodicCheckpointer):
            hook.max_to_keep = 2
    if resume:
        trainer.resume_or_load(resume=True)
        say(f"going on at iteration {trainer.start_iter} of {cfg.SOLVER.MAX_ITER}")
    else:
        if weights:
            loaded, left = load_weights(model, weights, arch, msra)
            say("loaded       ", grouped(loaded))
            say("left at init ", grouped(left))
            say("dropped      ", grouped([*weights.dropped, *(weights.extras if arch == "c4" else ())]))
        if comm.is_main_process():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as f:
                f.write(cfg.dump())
    trainer.train()
    return model, getattr(trainer, "_last_eval_results", None)


def main(args, data=None):
    first, world = comm.is_main_process(), comm.get_world_size()
    say = functools.partial(print, flush=True) if first else (lambda *_, **__: None)
    data = data or load_data(args, say=lambda *_: None)
    (weights, msra), arch = get_weights(args), PROTOCOLS[args.protocol][0]
    cfg, notes = build_config(args.protocol, weights, data, world, args.device, bool(msra), args.opts)
    source, file = weights.source if weights else "Random init", cfg.MODEL.WEIGHTS
    say(f"{source}; input {cfg.INPUT.FORMAT}, mean {cfg.MODEL.PIXEL_MEAN}, std {cfg.MODEL.PIXEL_STD}")
    say(f"{data.images} training images, {data.boxes} boxes, {len(data.classes)} classes", *notes, sep="\n")

    # detectron2 logs everything to OUT/log.txt; the console gets its progress and its warnings, no traces.
    for name in ("detectron2", "fvcore"):
        for handler in setup_logger(args.out, comm.get_rank(), name=name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.addFilter(lambda record: not record.exc_info and (
                    record.levelno >= logging.WARNING
                    or record.name.endswith(("utils.events", "evaluation.evaluator"))))
    if args.device == "cpu":                                    # detectron2 always names a GPU here
        detectron2.engine.defaults.create_ddp_model = functools.partial(
            detectron2.engine.defaults.create_ddp_model, device_ids=None)

    trials = []
    for trial in range(args.trials):
        here = os.path.join(args.out, f"trial{trial}")
        done = os.path.join(here, "results.json")
        cfg.defrost()
        cfg.SEED, cfg.OUTPUT_DIR = args.seed + trial, here
        if not args.eval_only:
            cfg.MODEL.WEIGHTS = args.weights if weights else ""
        cfg.freeze()
        say(f"trial {trial}: seed {cfg.SEED}")
        try:
            if os.path.exists(os.path.join(here, "last_checkpoint")) and not file:
                same_config(cfg, args.eval_only)
            if args.eval_only:
                path, model = file or os.path.join(here, "model_final.pth"), build_model(cfg)
                model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
                metrics = Trainer.test(cfg, model)
            elif args.resume and os.path.exists(done):
                say(f"trial {trial}: done before")
                with open(done) as f:
                    trials.append(json.load(f))
                continue
            else:
                model, metrics = train(cfg, weights, msra, arch, args.resume, say)
        except Exception as error:                              # an override, a picture, memory, the disk
            logging.getLogger("detectron2").exception("trial %d", trial)
            hint = "; try a lower SOLVER.BASE_LR" * isinstance(error, FloatingPointError)
            sys.exit(f"finetune_det.py: error: trial {trial}: {brief(error)}{hint}; see {args.out}/log.txt")
        metrics = {kind: {name: None if value != value else float(value) for name, value in values.items()}
                   for kind, values in (metrics or {}).items()}
        trials.append({"seed": cfg.SEED, **metrics})
        if first:
            os.makedirs(here, exist_ok=True)
            with open(done, "w") as f:
                json.dump(trials[-1], f, indent=1)
            if args.pictures:
                draw_detections(cfg, model, data, os.path.join(here, "detections.png"), args.pictures)
    if first:
        draw_curves(args.out, args.trials, os.path.join(args.out, "curves.png"))
        report(args, cfg, notes, data, source, trials, say)


def start():
    args = get_args()
    if args.export:
        return export(args)
    begun = [name for name in ("results.json", "trial0") if os.path.exists(os.path.join(args.out, name))]
    if begun and not args.resume and not (args.eval_only and "MODEL.WEIGHTS" not in args.opts[::2]):
        fail(f"{args.out} holds a run: --resume goes on with it, --out starts another")
    os.makedirs(args.out, exist_ok=True)
    if "RANK" in os.environ:                                    # torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        return main(args)
    data = load_data(args)                                      # its faults are told before processes start
    get_weights(args)
    launch(main, args.nprocs, dist_url="auto", args=(args, data if args.nprocs == 1 else None))


if __name__ == "__main__":
    try:
        start()
    except OSError as error:                                    # of --out, --export, --minicoco-list
        fail(brief(error))
    except KeyboardInterrupt:
        fail("stopped; the same command with --resume goes on from the last checkpoint")
    except torch.multiprocessing.ProcessExitedException as error:   # it has said why, unless it was killed
        sys.exit(error.exit_code if error.exit_code > 0 else f"finetune_det.py: error: {error}")
