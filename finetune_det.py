"""Stage 3: fine-tune a detector with detectron2 from any system's weights, and report AP (paper, Sec. 5).

    python finetune_det.py runs/insloc_fpn --protocol coco-fpn-1x --data /data       # every GPU, else the CPU
    python finetune_det.py swav_200ep_pretrain.pth.tar --protocol voc-c4 --data /data --trials 5
    python finetune_det.py random --protocol coco-c4-1x --train-images A --train-json a.json \\
        --val-images B --val-json b.json                                    # a detection set of one's own
    python finetune_det.py runs/insloc_c4 --protocol coco-c4-1x --export insloc_c4.pth     # for use elsewhere

Model, loaders, trainer and evaluators are detectron2's; build_config says how the protocols set them. KEY
VALUE pairs at the end override any key of its configuration, e.g. SOLVER.IMS_PER_BATCH 16. Before anything is
trained, the truth of the validation set goes through the evaluator as if it were the detections.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import io
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.io import write_png
from torchvision.transforms.functional import resize
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import stage
from weights import INPUTS, Weights, read_weights, to_detectron2

for message in (".*torch.jit.script", "torch.meshgrid", ".*broadcast_buffers"):         # detectron2's own
    warnings.filterwarnings("ignore", message)
for name in ("torch.fx", "torch.utils.cpp_extension"):
    logging.getLogger(name).setLevel(logging.ERROR)
try:
    import detectron2.engine.defaults
    from detectron2 import evaluation, modeling
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, datasets, detection_utils
    from detectron2.engine import DefaultTrainer, default_setup, hooks
    from detectron2.layers import get_norm
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead, Res5ROIHeads
    from detectron2.structures import Instances
    from detectron2.utils import comm
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.file_io import PathManager
except ImportError as error:
    sys.exit(f"finetune_det.py: error: detectron2 cannot be imported ({error}); `make install` brings it")

ZOO = os.path.join(os.path.dirname(detectron2.__file__), "model_zoo", "configs")
VOC_C4 = "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml"             # detectron2's own configurations
COCO_C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
COCO_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
# Protocol: detector, what it starts from, iterations of 16 images, where the rate falls, warm-up, training
# images, tables of the paper.
PROTOCOLS = {
    "voc-c4": ("c4", VOC_C4, 24000, (18000, 22000), 100, 16551, ("1",)),                    # Sec. 5.1.1
    "coco-c4-1x": ("c4", COCO_C4, 90000, (60000, 80000), 1000, 118287, ("4a", "3a")),       # Sec. 5.1.2
    "coco-c4-2x": ("c4", COCO_C4, 180000, (120000, 160000), 1000, 118287, ("2a", "4b")),
    "coco-fpn-1x": ("fpn", COCO_FPN, 90000, (60000, 80000), 1000, 118287, ("4c", "3b")),
    "coco-fpn-2x": ("fpn", COCO_FPN, 180000, (120000, 160000), 1000, 118287, ("2b", "4d")),
    "minicoco-c4": ("c4", COCO_C4, 9000, (6000, 8000), 1000, 11828, ("5",)),    # Sec. 5.3 [ours: 1x / 10]
}
# What no pre-training has: RPN 6 tensors, predictor 4, extra norm 5, mask head 4 (C4) or 28 (FPN).
NEW_PARTS = ("proposal_generator.rpn_head.", "roi_heads.box_predictor.", "roi_heads.mask_head.",
             "roi_heads.res5.norm.", "roi_heads.box_head.fc_extra_norm.")
# Keys that change nothing of what is learnt: they may differ from the paper, and when a run is resumed.
FREE = {"MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"}
# Keys for which this program has arguments of its own.
RESERVED = {"SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "DATASETS.TRAIN", "DATASETS.TEST"}
# detectron2's readers of labels, and the variable that says which one they are at.
READERS = {"load_voc_instances": "anno_file", "parse_rec": "filename", "load_coco_json": "img_dict"}
SETTINGS = "settings.json"                          # in --out: what a resumed run must agree with


def get_args(argv=None):
    parser = stage.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", help="run directory, checkpoint of any system, detectron2:// address, or `random`")
    add("--protocol", choices=list(PROTOCOLS), required=True, help="[paper 5.1 to 5.3]")
    add("--data", metavar="DIR", help="holds coco/, or VOC2007/ and VOC2012/, as DETECTRON2_DATASETS does")
    add("--train-images", metavar="DIR", help="a detection set of one's own instead: its pictures,")
    add("--train-json", metavar="FILE", help="its boxes (and masks) as COCO json,")
    add("--val-images", metavar="DIR", help="the same for evaluation,")
    add("--val-json", metavar="FILE", help="with the same classes")
    add("--classes", help="a,b,c: those of a VOC tree, its VOC2012 may be absent [detectron2: VOC's 20]")
    add("--trials", type=int, default=1, help="with seeds SEED, SEED + 1, ... [ours: 1; paper: 5 on VOC]")
    add("--eval-only", action="store_true", help="evaluate the detectors in --out again [ours: off]")
    add("--export", metavar="FILE.pth", help="only write WEIGHTS for detectron2 [ours: off]")
    add("--input", choices=list(INPUTS), default="imagenet", help="what WEIGHTS were trained on [MoCo v2]")
    add("--prefix", help="where in its file the trunk is [ours: the one place with a whole ResNet]")
    add("--trust", action="store_true", help="let the weights' file run code, as pickles may [ours: off]")
    stage.add_machine_arguments(parser, out="runs/det_PROTOCOL")
    add("opts", nargs="*", metavar="KEY VALUE", help="detectron2 configuration")
    args = parser.parse_intermixed_args(argv)

    args.out = args.out or f"runs/det_{args.protocol}"
    args.classes = args.classes.split(",") if args.classes else list(datasets.pascal_voc.CLASS_NAMES)
    given = dict(zip(args.opts[::2], args.opts[1::2]))
    own = [args.train_images, args.train_json, args.val_images, args.val_json]
    if any(own) != all(own) or not args.export and bool(args.data) == any(own):
        parser.error("give --data DIR, or --train-images, --train-json, --val-images and --val-json")
    if args.export and (args.weights == "random" or not args.export.endswith(".pth")):
        parser.error("--export FILE.pth writes WEIGHTS of a file, and detectron2 wants the ending .pth")
    if len(args.opts) % 2:
        parser.error(f"{args.opts[-1]}: overrides come in pairs, KEY VALUE")
    if given.keys() & RESERVED:
        parser.error(f"{min(given.keys() & RESERVED)} is set by an argument of this program, see --help")
    if args.trials < 1 or args.seed >= 2 ** 31:
        parser.error("--trials must be at least 1, --seed below 2**31")
    if args.device == "auto":
        args.device = given.get("MODEL.DEVICE", "auto")
    stage.check_machine_arguments(parser, args)
    if given.get("MODEL.DEVICE", args.device) != args.device:
        parser.error(f"MODEL.DEVICE {given['MODEL.DEVICE']} and --device {args.device}: give --device alone")
    return args


# ---- What is added to detectron2 -------------------------------------------------------------------------

@modeling.ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """R50-C4 with a norm after the last residual block (Sec. 5.3), as MoCo's detectors have it."""

    @classmethod
    def _build_res5_block(cls, cfg):
        res5, channels = super()._build_res5_block(cfg)
        if cfg.MODEL.RESNETS.NORM:
            res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels


@modeling.ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHeadExtraNorm(FastRCNNConvFCHead):
    """R50-FPN's box head with a norm after fc1's ReLU [released code]."""

    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        norm, channels = cfg.MODEL.ROI_BOX_HEAD.NORM, self.output_shape.channels
        # detectron2's "BN" is for maps, this one for vectors.
        layer = torch.nn.BatchNorm1d(channels) if norm == "BN" else get_norm(norm, channels)
        self.add_module("fc_extra_norm", layer)


class Trainer(DefaultTrainer):
    """detectron2's, told which evaluator a dataset has."""

    @classmethod
    def build_evaluator(cls, cfg, name):
        if name.startswith("voc"):
            return evaluation.PascalVOCDetectionEvaluator(name)
        return evaluation.COCOEvaluator(name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def read_image(path, format=None, read=detection_utils.read_image):
    """detectron2's, in whose place it is put, with errors that name the file."""
    try:
        return read(path, format)
    except Exception as error:
        raise OSError(f"{path}: {error}") from error


detection_utils.read_image = read_image


# ---- Protocols -------------------------------------------------------------------------------------------

def flat(cfg, prefix=""):
    """{'SOLVER.MAX_ITER': 90000, ...} of a nested configuration."""
    result = {}
    for key, value in cfg.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result


def build_config(protocol, weights, data=None, world=8, device="cuda", opts=()):
    """The protocol in detectron2's terms, overrides merged. -> it, lines: how it differs from the paper."""
    arch, base, iterations, steps, warmup, images, _ = PROTOCOLS[protocol]
    norm = "BN" if device == "cpu" else "SyncBN"
    given = get_cfg()
    given.merge_from_list(list(opts))
    own_depth = "MODEL.RESNETS.DEPTH" in opts
    depth = given.MODEL.RESNETS.DEPTH if own_depth else int(weights.resnet.removeprefix("resnet"))
    if arch == "c4" and depth < 50:
        raise ValueError(f"detectron2's C4 head is made of bottlenecks: ResNet-{depth} needs an fpn protocol")

    # Common to all [MoCo v2 and released code]
    cfg = get_cfg()
    cfg.merge_from_file(os.path.join(ZOO, base))
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = ""                                      # load_weights loads them, by exact names
    cfg.MODEL.BACKBONE.FREEZE_AT = 0                            # every layer is trained
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    cfg.MODEL.RESNETS.NORM = norm                               # [paper 5: SyncBN everywhere]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = weights.stride_in_1x1     # torchvision strides in the 3x3
    cfg.MODEL.PIXEL_MEAN = [round(255 * x, 3) for x in weights.pixel_mean]
    cfg.MODEL.PIXEL_STD = [round(255 * x, 3) for x in weights.pixel_std]
    cfg.INPUT.FORMAT = weights.channel_order
    cfg.TEST.PRECISE_BN.ENABLED = True
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.STEPS = steps
    cfg.SOLVER.WARMUP_ITERS = warmup
    if arch == "c4":                                            # [MoCo v2]
        cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeadsExtraNorm"
    else:                                                       # [released code]
        cfg.MODEL.FPN.NORM = cfg.MODEL.ROI_BOX_HEAD.NORM = cfg.MODEL.ROI_MASK_HEAD.NORM = norm
        cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 4
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        if weights.extras:              # the release's baselines, whose box head is new, have no extra norm
            cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHeadExtraNorm"
    if data:
        cfg.DATASETS.TRAIN = tuple(name for name, *_ in data.sets[:-1])
        cfg.DATASETS.TEST = (data.sets[-1][0],)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(data.classes)
        cfg.MODEL.MASK_ON = data.masks
        cfg.INPUT.MASK_FORMAT = "bitmask" if data.run_length else "polygon"
    paper = flat(cfg)

    # Two images a GPU, as in the paper. For another batch detectron2's linear rule, counted in images.
    batch = given.SOLVER.IMS_PER_BATCH if "SOLVER.IMS_PER_BATCH" in opts else 2 * world
    if batch < 1 or batch % world:
        raise ValueError(f"SOLVER.IMS_PER_BATCH {batch} does not divide by {world} processes")
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 16
    cfg = Trainer.auto_scale_workers(cfg, batch)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0                         # Trainer would scale it once more
    cfg.SOLVER.CHECKPOINT_PERIOD = paper["SOLVER.CHECKPOINT_PERIOD"]            # a kill must not cost more
    total = given.SOLVER.MAX_ITER if "SOLVER.MAX_ITER" in opts else cfg.SOLVER.MAX_ITER
    falls = {min(round(step * total / iterations), total - 1) for step in steps} - {0}
    cfg.SOLVER.STEPS = tuple(sorted(falls))                     # the scheduler takes none at the end
    cfg.SOLVER.WARMUP_ITERS = round(warmup * total / iterations)
    cfg.merge_from_list(list(opts))

    notes = []
    for key, value in flat(cfg).items():
        if value != paper[key] and key not in FREE:
            notes.append(f"{key} {value}, paper {paper[key]} ({'given' if key in opts else 'linear rule'})")
    if data and data.images != images:
        notes.append(f"{data.images} training images, paper {images}")
    if device == "cpu":
        notes.append("SyncBatchNorm does not run on the CPU: BatchNorm instead, each process by itself")
    seen = cfg.SOLVER.IMS_PER_BATCH // (world if device == "cpu" else 1)
    if seen < 16:
        notes.append(f"BatchNorm, precise BN too, sees {seen} images at a time, paper 16: on a large card "
                     "SOLVER.IMS_PER_BATCH 16 gives the paper's batch")
    return cfg, notes


def explain(error):
    """An exception in one line: the label that was read, the kind if it is not ours, the message."""
    text = stage.last_line(error)[:300]
    if not isinstance(error, (ValueError, OSError)):
        text = f"{type(error).__name__}: {text}"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        variable = READERS.get(frame.f_code.co_name)
        if variable in frame.f_locals:
            text = f"{str(frame.f_locals[variable])[:200]}: {text}"
    return text


# ---- Data ------------------------------------------------------------------------------------------------

def find_sets(args):
    """[(detectron2's name, folder, COCO json or VOC's split)], training first, validation last."""
    if args.train_json:
        return [("coco_train", args.train_images, args.train_json),
                ("coco_val", args.val_images, args.val_json)]
    if args.protocol == "voc-c4":
        sets = [("voc2007_trainval", f"{args.data}/VOC2007", "trainval"),
                ("voc2012_trainval", f"{args.data}/VOC2012", "trainval"),
                ("voc2007_test", f"{args.data}/VOC2007", "test")]
        return [one for one in sets if "2007" in one[0] or os.path.exists(one[1])]    # one's own has no 2012
    coco = args.data if os.path.exists(f"{args.data}/annotations") else f"{args.data}/coco"
    return [(f"coco_{split}", f"{coco}/{split}2017", f"{coco}/annotations/instances_{split}2017.json")
            for split in ("train", "val")]


def mend_coco(path, copy, tenth):
    """Path of a COCO json with what only the evaluation asks for, without what is not used: it, or a copy.

    tenth: of its images, Mini-COCO. ValueError names what would be lost in silence.
    """
    with open(path) as f:
        content = json.load(f)
    times = collections.Counter(image["id"] for image in content["images"])
    for image in content["images"]:
        if times[image["id"]] > 1:
            raise ValueError(f"{image['file_name']} has the id {image['id']!r} of another image: renumber")
    for box in content["annotations"]:
        if box["image_id"] not in times:
            raise ValueError(f"annotation {box.get('id')!r} has image_id {box['image_id']!r}, which is no "
                             "image of this file (a string is no number): correct or remove it")
    kept = set(times)
    if tenth:                                       # the paper's list is not public
        order = np.random.Generator(np.random.PCG64(0)).permutation(sorted(times))
        kept = set(order[:max(1, len(times) // 10)].tolist())
    old = [box for box in content["annotations"] if box["image_id"] in kept]
    ids = [box.get("id") for box in old]
    renumber = not all(ids) or len(set(ids)) < len(ids)             # COCO's evaluation takes 0 for unmatched
    unused = {"keypoints"}
    if not all(any(box.get("segmentation") or ()) for box in old):  # boxes alone: detectron2 would leave out
        unused.add("segmentation")                                  # those whose polygons are empty
    boxes = []
    for number, box in enumerate(old, start=1):
        box = {"iscrowd": 0, "area": box["bbox"][2] * box["bbox"][3], **box}
        if renumber:
            box["id"] = number
        boxes.append({key: value for key, value in box.items() if key not in unused})
    images = [image for image in content["images"] if image["id"] in kept]
    categories = [{**category, "name": str(category["name"])} for category in content["categories"]]
    better = {**content, "images": images, "annotations": boxes, "categories": categories}
    if better == content:
        return path
    stage.write_atomically(copy, lambda f: f.write(json.dumps(better).encode()))
    return copy


def picture_fault(item):
    """Why detectron2 cannot use a picture with its boxes, "" if it can. Reads the header, not the pixels."""
    width, height = item["width"], item["height"]
    try:
        with Image.open(item["file_name"]) as picture:
            turned = picture.getexif().get(0x112, 1) > 4            # detectron2 turns it as EXIF says
            found = picture.size[::-1] if turned else picture.size
            kind = picture.mode
        if found != (width, height):
            return f"is {found[0]} x {found[1]}, its label says {width} x {height}"
        if kind.startswith(("I", "F")):
            return f"has pixels of kind {kind}, which detectron2 clips to white: convert it to 8 bits"
        if max(found) > 100 * min(found):
            return f"is {width} x {height}: resized, nothing would be left of its shorter side"
        for number, box in enumerate(item["annotations"]):
            left, top, *sides = box["bbox"]
            mask = box.get("segmentation")
            if isinstance(mask, dict) and list(mask["size"]) != [height, width]:
                return f"has at box {number} a mask of another height and width, {mask['size']}"
            if isinstance(mask, list):
                points = np.concatenate(mask).reshape(-1, 2)
                middle = (points.min(axis=0) + points.max(axis=0)) / 2 - (left, top)
                if (middle < -2).any() or (middle > np.add(sides, 2)).any():
                    return f"has at box {number} polygons that lie outside of the box"
    except Exception as error:                                      # any: labels are what somebody wrote
        return f"cannot be used: {explain(error)}"
    return ""


def read_set(args, name, folder, labels):
    """detectron2's list of a set's pictures, their classes, and the json or VOC's split to register.

    ValueError names the file and the entry that would end the run, or that would be lost.
    """
    source = f"{folder}/ImageSets/Main/{labels}.txt" if name.startswith("voc") else labels
    try:
        if name.startswith("voc"):
            with open(source) as f:
                names = f.read().splitlines()
            odd = [x for x in names if x.split() != [x] or "#" in x]
            if odd or len(names) < 2:
                raise ValueError(f"{odd[:1]}: detectron2 takes two names or more, one a line, no space, no #")
            items, classes = datasets.load_voc_instances(folder, labels, args.classes), args.classes
        else:
            tenth = args.protocol == "minicoco-c4" and name == "coco_train"
            labels = mend_coco(labels, os.path.join(args.out, f"{name}.json"), tenth)
            items = datasets.load_coco_json(labels, folder, name)
            classes = MetadataCatalog.get(name).thing_classes
    except Exception as error:                                      # any: labels are what somebody wrote
        raise ValueError(f"{source}: {explain(error)}") from error
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for item, fault in zip(items, pool.map(picture_fault, items)):
            if fault:
                raise ValueError(f"{item['file_name']} {fault}")
    return items, classes, labels


def load_data(args):
    """Reads and checks the protocol's sets. -> what all processes must know of them."""
    data = SimpleNamespace(sets=[], classes=None, masks=args.protocol != "voc-c4", run_length=False,
                           chosen=[], digests=[], images=0, boxes=0)
    for name, folder, labels in find_sets(args):
        items, classes, labels = read_set(args, name, folder, labels)
        boxes = [box for item in items for box in item["annotations"] if not box.get("iscrowd")]
        if not boxes:
            raise ValueError(f"{labels} of {folder}: no box, or crowds (iscrowd 1) alone")
        if data.classes not in (None, classes):
            raise ValueError(f"{labels}: its classes, {classes[:9]}, are not training's, {data.classes[:9]}")
        data.classes = classes
        data.masks = data.masks and all("segmentation" in box for box in boxes)
        digests = [stage.digest([repr((item["image_id"], item["annotations"])).encode()]) for item in items]
        data.digests.append(stage.digest(digest.encode() for digest in digests))
        data.sets.append((name, folder, labels))
        if name.endswith(("train", "trainval")):
            data.run_length |= any(isinstance(box.get("segmentation"), dict) for box in boxes)
            data.images += len(items)
            data.boxes += len(boxes)
            data.chosen += [item["image_id"] for item in items if args.protocol == "minicoco-c4"]
    return data


def register(data):
    """detectron2 reads the sets by their names, in each process by itself, when it needs them."""
    for name, folder, labels in data.sets:
        if name.startswith("voc"):
            datasets.register_pascal_voc(name, folder, labels, int(name[3:7]), data.classes)
        else:
            datasets.register_coco_instances(name, {}, labels, folder)


# ---- The rehearsal, and pictures -------------------------------------------------------------------------

def perfect(item):
    """What a perfect detector finds in a picture: its labels, inside of it, without crowds. -> Instances"""
    boxes = [box for box in item["annotations"] if not box.get("iscrowd")]
    size = (item["height"], item["width"])
    truth = detection_utils.annotations_to_instances(boxes, size, mask_format="bitmask")
    found = Instances(size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
    found.scores = torch.ones(len(boxes))
    found.pred_boxes.clip(size)
    if truth.has("gt_masks"):
        found.pred_masks = truth.gt_masks.tensor
    return found


def rehearse(cfg, source):
    """Evaluates the validation set's truth as if it were detections, and draws a picture. All ranks call it.

    -> on rank 0, why its AP is not 100. ValueError if it is under 99, or cannot be had.
    """
    lost, seen, notes = [], set(), []
    evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    evaluator.reset()
    if comm.is_main_process():
        items = DatasetCatalog.get(cfg.DATASETS.TEST[0])
        for item in items:
            found = perfect(item)
            evaluator.process([item], [{"instances": found}])
            whole = found.pred_boxes.nonempty()
            if found.has("pred_masks"):
                whole &= found.pred_masks.flatten(1).any(dim=1)
            lost += [item["file_name"] for _ in range(int((~whole).sum()))]
            seen.update(found.pred_classes.tolist())
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        draw(cfg, [item for item in items if item["annotations"]][:1], perfect, f"{cfg.OUTPUT_DIR}/truth.png")
    with contextlib.redirect_stdout(io.StringIO()):
        results = evaluator.evaluate() or {}
    for kind, values in results.items():
        if not values["AP"] > 99.95:
            notes.append(f"the truth of {source} itself reaches {kind} AP {values['AP']:.1f}, not 100: "
                         f"{len(lost)} boxes have no area or mask in their picture {lost[:1]}, "
                         f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES - len(seen)} classes have no box (--classes)")
            if not values["AP"] > 99:
                raise ValueError(notes[-1])
    return notes


@torch.no_grad()
def draw(cfg, items, detect, path):
    """A sheet of pictures, each twice: the truth; what `detect` finds with score 0.5, or its best three."""
    classes, cells = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes, []
    for item in items:
        image = torch.from_numpy(read_image(item["file_name"], "RGB").copy()).permute(2, 0, 1)
        scale = min(480 / item["width"], 360 / item["height"])
        image = resize(image, [max(1, int(scale * side)) for side in image.shape[1:]])
        found = detect(item)
        sure = found.scores >= 0.5
        for shown in (perfect(item), found[sure] if sure.any() else found[:3]):
            shown, cell = shown[shown.pred_boxes.nonempty()], image
            colors = [("lime", "cyan", "magenta", "orange", "red")[i % 5] for i in range(len(shown))]
            names = [f"{classes[i]} {score:.2f}" for i, score in zip(shown.pred_classes, shown.scores)]
            if shown.has("pred_masks") and names:
                masks = F.interpolate(shown.pred_masks[None].float(), image.shape[1:])[0] > 0.5
                cell = draw_segmentation_masks(cell, masks, alpha=0.4, colors=colors)
            if names:
                cell = draw_bounding_boxes(cell, shown.pred_boxes.tensor * scale, names, colors, width=2)
            cells.append(F.pad(cell, (0, 480 - cell.shape[2], 0, 360 - cell.shape[1]), value=255))
    write_png(make_grid(cells, nrow=4, padding=4), path)


# ---- Weights ---------------------------------------------------------------------------------------------

def get_weights(args):
    """WEIGHTS, read and whole; without any tensor for `random`."""
    if args.weights == "random":
        return Weights({}, {}, "resnet50", "random init", *INPUTS[args.input], ())
    try:
        path = PathManager.get_local_path(args.weights) if "://" in args.weights else args.weights
        weights = read_weights(path, trust=args.trust, prefix=args.prefix, input=args.input)
        int(weights.resnet.removeprefix("resnet"))
    except Exception as error:                                      # any: a file or an address from anywhere
        raise ValueError(f"{args.weights}: {explain(error)}") from error
    return weights


def load_weights(model, weights, arch):
    """Weights into detectron2's model by exact name. -> names loaded, names left at their random init.

    ValueError unless what is left is what no pre-training has: 15 tensors for VOC C4, 19 for COCO C4, 43 for
    FPN (112 without neck and box head, and without the extra norm then).
    """
    own, state = model.state_dict(), to_detectron2(weights, arch)
    new = NEW_PARTS
    if arch == "fpn" and not weights.extras:
        new = (*NEW_PARTS, "backbone.fpn_", "roi_heads.box_head.")
    left = sorted(own.keys() - state.keys())
    lost = [name for name in left if not name.startswith(new)]
    lost += [name for name, x in state.items() if name not in own or own[name].shape != x.shape]
    if lost:
        raise ValueError(f"{len(lost)} tensors do not fit the detector that is configured, or would stay "
                         f"random, such as {lost[0]}")
    model.load_state_dict(state, strict=False)
    return sorted(state), left


def export(args):
    """WEIGHTS as a file that detectron2 loads by MODEL.WEIGHTS. Prints the keys that must go with it."""
    arch, base, *_ = PROTOCOLS[args.protocol]
    weights = get_weights(args)
    stage.write_atomically(args.export, lambda f: torch.save({"model": to_detectron2(weights, arch)}, f))
    theirs = get_cfg()
    theirs.merge_from_file(os.path.join(ZOO, base))
    theirs, ours = flat(theirs), flat(build_config(args.protocol, weights)[0])
    ours["MODEL.WEIGHTS"] = args.export
    keys = [key for key in ours if key.startswith(("MODEL.", "INPUT.")) and not key.endswith(".NAME") and
            ours[key] != theirs[key]]                               # names: the extra norm is ours alone
    pairs = [f"{key} {ours[key]}".replace(", ", ",") for key in keys]           # a word each for the shell
    print(f"{args.export}: {weights.source}; use it with detectron2's {base} and", *pairs)


# ---- Results ---------------------------------------------------------------------------------------------

def paper_rows(protocol):
    """{'paper: InsLoc, 200 epochs': {'APbb': '39.5', ...}}: all rows of the paper's tables of a protocol."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "docs", "paper_tables.csv")
    if not os.path.exists(path):                    # a script copied without docs/: the results come first
        return {f"paper: not shown, {path} is missing": {}}
    rows = {}
    with open(path) as f:
        for row in csv.DictReader(f):
            if row["table"] in PROTOCOLS[protocol][-1] and row["arch"].startswith(("Mask", "Faster")):
                name = f"paper: {row['method']}" + (f", {row['epochs']} epochs" if row["epochs"] else "")
                rows.setdefault(name, {})[row["metric"]] = f"{float(row['value']):.1f}"
    return rows


def report(args, cfg, notes, data, source, trials):
    """results.json, and the table in the paper's columns with all rows of the paper below ours."""
    means, deviations, ours = {}, {}, {}
    for kind, suffix in (("bbox", "bb"), ("segm", "mk")):
        for metric in ("AP", "AP50", "AP75") if kind in trials[0] else ():
            label = metric if args.protocol == "voc-c4" else metric + suffix    # Table 1 has boxes alone
            values = [trial[kind][metric] for trial in trials]      # nan: no detection at all
            means[label] = float(np.mean(values))
            ours[label] = f"{means[label]:.1f}"
            if len(values) > 1:
                deviations[label] = float(np.std(values, ddof=1))
                ours[label] += f" ± {deviations[label]:.1f}"
    rows = {"": {label: label for label in ours}, f"this run: mean of {len(trials)}": ours,
            **paper_rows(args.protocol)}
    width = max(len(name) for name in rows)
    for name, row in rows.items():
        print(f"{name:<{width}}" + "".join(f"{row.get(label, '-'):>12}" for label in ours))
    result = {"protocol": args.protocol, "source": source, "mean": means, "deviation": deviations,
              "trials": trials, "differs_from_paper": notes, "data": vars(data), "commit": stage.commit(),
              "torch": torch.__version__, "detectron2": detectron2.__version__, "arguments": vars(args),
              "config": cfg}
    if data.chosen:
        path = os.path.join(args.out, "minicoco.txt")
        listed = "".join(f"{image}\n" for image in data.chosen).encode()
        stage.write_atomically(path, lambda f: f.write(listed))
        result["list_sha256"] = hashlib.sha256(listed).hexdigest()
        print(f"{path}: sha256 {result['list_sha256']}")
    path = os.path.join(args.out, "evaluation.json" if args.eval_only else "results.json")
    stage.write_atomically(path, lambda f: f.write(json.dumps(result, indent=1).encode()))
    print(f"wrote {path}; trial*/detections.png; curves: tensorboard --logdir {args.out}")


# ---- The run ---------------------------------------------------------------------------------------------

def main(rank, device, args):
    """What stage.launch runs in each process. Whatever goes wrong in it is told in one line."""
    try:
        fine_tune(rank, device, args)
    except Exception as error:                                      # any: overrides, labels, pictures
        logging.getLogger("detectron2").exception("what happened")
        hint = "; try a lower SOLVER.BASE_LR" if isinstance(error, FloatingPointError) else ""
        if args.world > 1 and isinstance(error, RuntimeError):
            time.sleep(30)          # another process failed, says why, and has this one ended by its launcher
        stage.fail(explain(error) + hint)


def make_plan(args):
    """Weights, data and protocol, checked, and compared with the run that --out holds, if any."""
    weights, data = get_weights(args), load_data(args)
    opts = ["DATALOADER.NUM_WORKERS", args.workers, *args.opts]
    cfg, notes = build_config(args.protocol, weights, data, args.world, args.device, opts)
    settings = {**flat(cfg), "SEED": args.seed, "labels": data.digests,
                "weights": stage.digest(x.numpy().tobytes() for x in weights.backbone.values())}
    settings = json.loads(json.dumps(settings))                     # as it will be read again
    if os.path.exists(os.path.join(args.out, SETTINGS)):
        with open(os.path.join(args.out, SETTINGS)) as f:
            begun = json.load(f)
        inputs = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"}
        changed = stage.differences(begun, settings, settings.keys() - inputs if args.eval_only else FREE)
        if changed:
            raise ValueError(f"{args.out} was begun otherwise, give another --out: {changed}")
    return data, cfg, notes, settings


def train(cfg, weights, arch, last, say):
    """A trial from its start, or from its `last` checkpoint. -> the detector, its metrics."""
    begun = int("0" + re.sub(r"\D", "", last))
    # The iteration goes in: else a run that is often killed would see the same first images again and again.
    seed_all_rng(cfg.SEED + 1000 * begun + comm.get_rank())
    trainer = Trainer(cfg)
    model = getattr(trainer.model, "module", trainer.model)
    for hook in trainer._hooks:
        if isinstance(hook, hooks.PeriodicCheckpointer):
            hook.max_to_keep = 2
    if last:
        trainer.resume_or_load(resume=True)
        say(f"going on at iteration {trainer.start_iter} of {cfg.SOLVER.MAX_ITER}")
    elif weights.backbone:
        loaded, left = load_weights(model, weights, arch)
        dropped = [*weights.dropped, *(weights.extras if arch == "c4" else ())]
        for what, names in (("loaded", loaded), ("left at random init", left), ("dropped", dropped)):
            places = sorted({re.sub(r"\d", "", ".".join(name.split(".")[:2])) for name in names})
            say(f"{what}: {len(names)} tensors, {', '.join(places)[:200]}")
    trainer.train()
    return model, getattr(trainer, "_last_eval_results", None)


def fine_tune(rank, device, args):
    say = functools.partial(print, flush=True) if rank == 0 else (lambda *_, **__: None)
    if args.world > 1:
        comm.create_local_process_group(args.nprocs)
    if device.type == "cpu":                                        # detectron2 always names a GPU here
        detectron2.engine.defaults.create_ddp_model = functools.partial(
            detectron2.engine.defaults.create_ddp_model, device_ids=None)

    # ---- What is done: planned and checked on rank 0, which alone reads all labels ----
    stage.check_ranks(vars(args))
    data, cfg, notes, settings = stage.gather_objects(make_plan(args) if rank == 0 else None)[0]
    weights = get_weights(args)
    register(data)
    cfg.SEED = args.seed
    cfg.OUTPUT_DIR = args.out
    with contextlib.redirect_stdout(io.StringIO()):                 # environment and keys go to OUT/log.txt,
        default_setup(cfg, args)
    for part in ("utils.events", "evaluation.evaluator"):           # progress to the console, too
        logging.getLogger(f"detectron2.{part}").addHandler(logging.StreamHandler(sys.stdout))
    say(f"{weights.source}; input {cfg.INPUT.FORMAT}, mean {cfg.MODEL.PIXEL_MEAN}, std {cfg.MODEL.PIXEL_STD}")
    say(f"{data.images} training images, {data.boxes} boxes, {len(data.classes)} classes; masks {data.masks}")

    # ---- The evaluation, rehearsed ----
    cfg.OUTPUT_DIR = os.path.join(args.out, "rehearsal")
    notes += rehearse(cfg, data.sets[-1][2])
    say(*notes, sep="\n")
    if rank == 0 and not args.eval_only:
        path = os.path.join(args.out, SETTINGS)
        stage.write_atomically(path, lambda f: f.write(json.dumps(settings).encode()))

    # ---- Trials ----
    trials = []
    for trial in range(args.trials):
        here = os.path.join(args.out, f"trial{trial}")
        done, last = os.path.join(here, "results.json"), ""
        if os.path.exists(os.path.join(here, "last_checkpoint")):
            with open(os.path.join(here, "last_checkpoint")) as f:
                last = f.read()
        stage.check_ranks({f"trial {trial}": (last, os.path.exists(done))})
        if os.path.exists(done) and not args.eval_only:
            say(f"trial {trial}: done before")
            with open(done) as f:
                trials.append(json.load(f))
            continue
        cfg.SEED = args.seed + trial
        cfg.OUTPUT_DIR = here
        say(f"trial {trial}: seed {cfg.SEED}")
        if args.eval_only:
            model = modeling.build_model(cfg)
            state = torch.load(os.path.join(here, "model_final.pth"), map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            metrics = Trainer.test(cfg, model)
        else:
            model, metrics = train(cfg, weights, PROTOCOLS[args.protocol][0], last, say)
        if rank == 0:
            trials.append({"seed": cfg.SEED, **metrics})
            if not args.eval_only:
                stage.write_atomically(done, lambda f: f.write(json.dumps(trials[-1], indent=1).encode()))
            items = [item for item in DatasetCatalog.get(cfg.DATASETS.TEST[0]) if item["annotations"]]
            mapper = DatasetMapper(cfg, is_train=False)
            model.eval()
            draw(cfg, items[::max(1, len(items) // 8)][:8],
                 lambda item: model([mapper(item)])[0]["instances"].to("cpu"), f"{here}/detections.png")
    if rank == 0:
        report(args, cfg, notes, data, weights.source, trials)


def prepare(args):
    """What stage.launch runs once, before main. -> more arguments of main: none"""
    if not args.eval_only:
        stage.check_new(args, [SETTINGS])
    return ()


if __name__ == "__main__":
    arguments = get_args()
    if not arguments.export:
        stage.launch(main, arguments, prepare)
    else:
        try:
            export(arguments)
        except (ValueError, OSError) as error:
            stage.fail(str(error))
