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
import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pad, resize
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

import stage
from weights import add_weights_arguments, random_weights, read_weights, to_detectron2

warnings.filterwarnings("ignore", ".*torch.jit.script|torch.meshgrid|.*broadcast_buffers")        # theirs
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
BEGUN = "trial0/last_checkpoint"                     # in an --out that holds a run
# Functions that read what somebody else wrote, and the variable that says what they are at.
READERS = {"load_data": "source", "mended": "entry", "check_picture": "file", "read_weights": "path",
           "load_voc_instances": "anno_file", "parse_rec": "filename", "load_coco_json": "img_dict"}


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
    add("--classes", default=",".join(datasets.pascal_voc.CLASS_NAMES),
        help="a,b,c: those of a VOC tree, its VOC2012 may be absent [detectron2: VOC's 20]")
    add("--trials", type=int, default=1, help="with seeds SEED, SEED + 1, ... [ours: 1; paper: 5 on VOC]")
    add("--eval-only", action="store_true", help="evaluate the detectors in --out again [ours: off]")
    add("--export", metavar="FILE.pth", help="only write WEIGHTS for detectron2 [ours: off]")
    add_weights_arguments(parser)
    stage.add_machine_arguments(parser, out="runs/det_PROTOCOL")
    add("opts", nargs="*", metavar="KEY VALUE", help="detectron2 configuration")
    args = parser.parse_intermixed_args(argv)

    args.out = args.out or f"runs/det_{args.protocol}"
    args.classes = args.classes.split(",")
    own = [args.train_images, args.train_json, args.val_images, args.val_json]
    if any(own) != all(own) or not args.export and bool(args.data) == any(own):
        parser.error("give --data DIR, or --train-images, --train-json, --val-images and --val-json")
    if args.export and (args.weights == "random" or not args.export.endswith(".pth")):
        parser.error("--export FILE.pth writes WEIGHTS of a file, and detectron2 wants the ending .pth")
    given = dict(zip(args.opts[::2], args.opts[1::2]))
    if args.trials < 1:
        parser.error("--trials must be at least 1")
    if RESERVED & given.keys():
        parser.error(f"{min(RESERVED & given.keys())} is set by an argument of this program, see --help")
    args.device = given.get("MODEL.DEVICE", args.device)
    stage.check_machine_arguments(parser, args)
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
    given = dict(zip(opts[::2], opts[1::2]))
    depth = int(given.get("MODEL.RESNETS.DEPTH", weights.resnet.removeprefix("resnet")))

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
    batch = int(given.get("SOLVER.IMS_PER_BATCH", 2 * world))
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 16
    cfg = Trainer.auto_scale_workers(cfg, batch)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0                         # Trainer would scale it once more
    cfg.SOLVER.CHECKPOINT_PERIOD = paper["SOLVER.CHECKPOINT_PERIOD"]            # a kill must not cost more
    total = int(given.get("SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER))
    falls = {min(round(step * total / iterations), total - 1) for step in steps} - {0}
    cfg.SOLVER.STEPS = tuple(sorted(falls))                     # the scheduler takes none at the end
    cfg.SOLVER.WARMUP_ITERS = round(warmup * total / iterations)
    cfg.merge_from_list(list(opts))

    notes = [f"{key} {value}, paper {paper[key]} ({'given' if key in given else 'linear rule'})"
             for key, value in flat(cfg).items() if value != paper[key] and key not in FREE]
    if data and data.images != images:
        notes.append(f"{data.images} training images, paper {images}")
    if device == "cpu":
        notes.append("SyncBatchNorm does not run on the CPU: BatchNorm instead, each process by itself")
    seen = cfg.SOLVER.IMS_PER_BATCH // (world if device == "cpu" else 1)
    if seen < 16:
        notes.append(f"BatchNorm, precise BN too, sees {seen} images at a time, paper 16: on a large card "
                     "SOLVER.IMS_PER_BATCH 16 gives the paper's batch")
    return cfg, notes


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


def mended(path, copy, tenth):
    """A COCO json with what only the evaluation asks for, without what is not used. -> where it is

    That is `copy` if anything had to change. tenth: of its images, Mini-COCO. ValueError if anything would be
    lost in silence.
    """
    content = json.loads(Path(path).read_text())
    images, boxes = content["images"], content["annotations"]
    times = collections.Counter(image["id"] for image in images)
    for entry in images:
        if times[entry["id"]] > 1:
            raise ValueError("another image has the same id: renumber")
    for entry in boxes:
        if entry["image_id"] not in times:
            raise ValueError("its image_id is no image of this file (a string is no number)")
    if tenth:                                       # the paper's list is not public
        order = np.random.Generator(np.random.PCG64(0)).permutation(sorted(times))
        kept = set(order[:max(1, len(times) // 10)].tolist())
        images = [image for image in images if image["id"] in kept]
        boxes = [box for box in boxes if box["image_id"] in kept]
    masks = all(any(box.get("segmentation") or ()) for box in boxes)
    complete = all({"id", "area", "iscrowd"} <= box.keys() and "keypoints" not in box for box in boxes)
    numbered = len({box.get("id") for box in boxes} - {0}) == len(boxes)
    named = all(isinstance(entry["name"], str) for entry in content["categories"])
    for number, entry in enumerate(boxes, start=1):
        entry["id"] = number                        # COCO's evaluation takes 0 for unmatched
        entry.setdefault("iscrowd", 0)
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
        entry.pop("keypoints", None)
        if not masks:                               # boxes alone: detectron2 would leave out those whose
            entry.pop("segmentation", None)         # polygons are empty
    for entry in content["categories"]:
        entry["name"] = str(entry["name"])
    if masks and complete and numbered and named and not tenth:
        return path                                 # COCO itself: nothing had to change
    content.update(images=images, annotations=boxes)
    stage.write_atomically(copy, lambda f: f.write(json.dumps(content).encode()))
    return copy


def check_picture(item):
    """ValueError if detectron2 cannot use a picture with its boxes. Reads the header, not the pixels."""
    file, width, height = item["file_name"], item["width"], item["height"]
    with Image.open(file) as picture:
        turned = picture.getexif().get(0x112, 1) > 4                # detectron2 turns it as EXIF says
    found = picture.size[::-1] if turned else picture.size
    if found != (width, height):
        raise ValueError(f"it is {found[0]} x {found[1]}, its label says {width} x {height}")
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of kind {picture.mode}, which detectron2 clips to white")
    if max(found) > 100 * min(found):
        raise ValueError(f"{width} x {height}: resized, nothing would be left of its shorter side")
    for number, box in enumerate(item["annotations"]):
        left, top, *sides = box["bbox"]
        mask = box.get("segmentation")
        if isinstance(mask, dict) and list(mask["size"]) != [height, width]:
            raise ValueError(f"box {number} has a mask of another height and width, {mask['size']}")
        if isinstance(mask, list):
            points = np.concatenate(mask).reshape(-1, 2)
            middle = (points.min(axis=0) + points.max(axis=0)) / 2 - (left, top)
            if (middle < -2).any() or (middle > np.add(sides, 2)).any():
                raise ValueError(f"box {number} has polygons that lie outside of it")


def register(name, folder, labels, classes):
    """A set under detectron2's name. Each process reads it by itself, when it needs it."""
    if name.startswith("voc"):
        datasets.register_pascal_voc(name, folder, labels, int(name[3:7]), classes)
    else:
        datasets.register_coco_instances(name, {}, labels, folder)


def load_data(args):
    """Mends, registers and checks the protocol's sets. -> what all processes must know of them."""
    data = SimpleNamespace(sets=[], digests=[], images=0, classes=None, masks=args.protocol != "voc-c4",
                           run_length=False)
    for name, folder, labels in find_sets(args):
        source = f"{labels} of {folder}"
        tenth = args.protocol == "minicoco-c4" and name == "coco_train"
        if not name.startswith("voc"):
            labels = mended(labels, f"{args.out}/{name}.json", tenth)
        register(name, folder, labels, args.classes)
        items, classes = DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes
        for item in items:
            check_picture(item)
        boxes = [box for item in items for box in item["annotations"] if not box.get("iscrowd")]
        if not boxes:
            raise ValueError("no box, or crowds (iscrowd 1) alone")
        if data.classes not in (None, classes):
            raise ValueError(f"its classes, {classes[:9]}, are not training's, {data.classes[:9]}")
        data.classes = classes
        data.masks = data.masks and all("segmentation" in box for box in boxes)
        digests = [stage.digest([repr((item["image_id"], item["annotations"])).encode()]) for item in items]
        data.digests.append(stage.digest(digest.encode() for digest in digests))
        data.sets.append((name, folder, labels))
        data.source = source                                        # in the end validation's
        if name.endswith(("train", "trainval")):
            data.run_length |= any(isinstance(box.get("segmentation"), dict) for box in boxes)
            data.images += len(items)
        if tenth:
            data.minicoco = [item["image_id"] for item in items]
            data.minicoco_digest = stage.digest(str(image).encode() for image in data.minicoco)
    return data


# ---- The rehearsal, and pictures -------------------------------------------------------------------------

def perfect(item):
    """What a perfect detector finds in a picture: its labels, inside of it, without crowds. -> Instances"""
    boxes = [box for box in item["annotations"] if not box.get("iscrowd")]
    size = (item["height"], item["width"])
    truth = detection_utils.annotations_to_instances(boxes, size, mask_format="bitmask")
    found = Instances(size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes,
                      scores=torch.ones(len(boxes)))
    found.pred_boxes.clip(size)
    if truth.has("gt_masks"):
        found.pred_masks = truth.gt_masks.tensor
    return found


def rehearse(cfg, source):
    """Evaluates the validation set's truth as if it were detections, and draws a picture. All ranks call it.

    -> on rank 0, why its AP is not 100. ValueError if it is under 99, or cannot be had.
    """
    name = cfg.DATASETS.TEST[0]
    lost, seen, notes = [], set(), []
    evaluator = Trainer.build_evaluator(cfg, name)
    evaluator.reset()
    if comm.is_main_process():
        for item in DatasetCatalog.get(name):
            found = perfect(item)
            evaluator.process([item], [{"instances": found}])
            whole = found.pred_boxes.nonempty()
            if found.has("pred_masks"):
                whole &= found.pred_masks.flatten(1).any(dim=1)
            lost += [item["file_name"]] * int((~whole).sum())
            seen.update(found.pred_classes.tolist())
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        draw(cfg, 1, perfect, f"{cfg.OUTPUT_DIR}/truth.png")
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
def draw(cfg, count, detect, path):
    """`count` pictures, each twice: the truth; what `detect` finds with score 0.5, or its best three."""
    classes = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
    items = [item for item in DatasetCatalog.get(cfg.DATASETS.TEST[0]) if item["annotations"]]
    cells = []
    for item in items[::max(1, len(items) // count)][:count]:
        image = torch.from_numpy(read_image(item["file_name"], "RGB").copy()).permute(2, 0, 1)
        scale = min(480 / item["width"], 360 / item["height"])
        image = resize(image, [max(1, int(scale * side)) for side in image.shape[1:]])
        found = detect(item)
        sure = found.scores >= 0.5
        for shown in (perfect(item), found[sure] if sure.any() else found[:3]):
            shown, cell = shown[shown.pred_boxes.nonempty()], image
            if len(shown) and shown.has("pred_masks"):
                masks = resize(shown.pred_masks.float(), image.shape[1:]) > 0.5
                cell = draw_segmentation_masks(cell, masks, alpha=0.4, colors="lime")
            if len(shown):
                names = [f"{classes[i]} {score:.2f}" for i, score in zip(shown.pred_classes, shown.scores)]
                cell = draw_bounding_boxes(cell, shown.pred_boxes.tensor * scale, names, "lime", width=2)
            cells.append(pad(cell, [0, 0, 480 - cell.shape[2], 360 - cell.shape[1]], fill=255) / 255)
    save_image(cells, path, nrow=4, padding=4)


# ---- Weights ---------------------------------------------------------------------------------------------

def get_weights(args):
    """WEIGHTS, read and whole; without any tensor for `random`."""
    if args.weights == "random":
        return random_weights(input=args.input)
    path = PathManager.get_local_path(args.weights)                 # a file, or an address of detectron2
    return read_weights(path, trust=args.trust, prefix=args.prefix, input=args.input)


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
    rows = collections.defaultdict(dict)
    table = Path(__file__).with_name("docs") / "paper_tables.csv"
    for row in csv.DictReader(table.read_text().splitlines()):
        if row["table"] in PROTOCOLS[protocol][-1] and row["arch"].startswith(("Mask", "Faster")):
            name = f"paper: {row['method']}" + (f", {row['epochs']} epochs" if row["epochs"] else "")
            rows[name][row["metric"]] = f"{float(row['value']):.1f}"
    return rows


def report(args, cfg, notes, data, source, trials):
    """results.json; then the table in the paper's columns, with all rows of the paper below ours."""
    means, deviations, ours = {}, {}, {}
    for kind, metric in itertools.product(("bbox", "segm"), ("AP", "AP50", "AP75")):
        values = [trial[kind][metric] for trial in trials if kind in trial]     # nan: no detection at all
        if values:
            label = metric if args.protocol == "voc-c4" else metric + {"bbox": "bb", "segm": "mk"}[kind]
            means[label] = float(np.mean(values))
            ours[label] = f"{means[label]:.1f}"
        if len(values) > 1:
            deviations[label] = float(np.std(values, ddof=1))
            ours[label] += f" ± {deviations[label]:.1f}"
    result = {"protocol": args.protocol, "source": source, "mean": means, "deviation": deviations,
              "trials": trials, "differs_from_paper": notes, "data": vars(data), "commit": stage.commit(),
              "torch": torch.__version__, "detectron2": detectron2.__version__, "arguments": vars(args),
              "config": cfg}
    path = os.path.join(args.out, "evaluation.json" if args.eval_only else "results.json")
    stage.write_atomically(path, lambda f: f.write(json.dumps(result, indent=1).encode()))
    print(f"wrote {path}; trial*/detections.png; curves: tensorboard --logdir {args.out}")
    rows = {"": {label: label for label in ours}, f"this run: mean of {len(trials)}": ours,
            **paper_rows(args.protocol)}
    width = max(len(name) for name in rows)
    for name, row in rows.items():
        print(f"{name:<{width}}" + "".join(f"{row.get(label, '-'):>12}" for label in ours))


# ---- The run ---------------------------------------------------------------------------------------------

def explain(error):
    """An exception in one line: what was being read, the exception's kind if it is not ours, its message."""
    places = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        variable = READERS.get(frame.f_code.co_name)
        if variable in frame.f_locals:
            places.append(f"{str(frame.f_locals[variable])[:200]}: ")
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return "".join(places) + kind + stage.last_line(error)[:300]


def main(rank, device, args):
    """What stage.launch runs in each process. Whatever goes wrong in it is told in one line."""
    try:
        if args.export:
            export(args)
        else:
            fine_tune(rank, device, args)
    except Exception as error:                                      # any: overrides, labels, pictures
        if args.world > 1 and isinstance(error, RuntimeError):
            raise                       # another process has failed and says why; the launcher ends this one
        logging.getLogger("detectron2").debug("what happened", exc_info=True)     # to OUT/log.txt
        stage.fail(explain(error))


def make_plan(args):
    """Weights, data and protocol, checked, and compared with the run that --out holds, if any."""
    weights, data = get_weights(args), load_data(args)
    opts = ["DATALOADER.NUM_WORKERS", args.workers, *args.opts]
    cfg, notes = build_config(args.protocol, weights, data, args.world, args.device, opts)
    settings = {**flat(cfg), "SEED": args.seed, "labels": data.digests,
                "weights": stage.digest(x.numpy().tobytes() for x in weights.backbone.values())}
    settings = {key: str(value) for key, value in settings.items()}
    path = Path(args.out, "settings.json")
    if path.exists() and Path(args.out, BEGUN).exists():
        inputs = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1"}
        free = settings.keys() - inputs if args.eval_only else FREE
        changed = stage.differences(json.loads(path.read_text()), settings, free)
        if changed:
            raise ValueError(f"{args.out} was begun otherwise, give another --out: {changed}")
    else:
        stage.write_atomically(str(path), lambda f: f.write(json.dumps(settings).encode()))
    return data, cfg, notes


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
    data, cfg, notes = stage.gather_objects(make_plan(args) if rank == 0 else None)[0]
    weights = get_weights(args)
    for name, folder, labels in data.sets:
        if rank > 0:                                                # rank 0 has them
            register(name, folder, labels, data.classes)
    cfg.SEED = args.seed
    cfg.OUTPUT_DIR = args.out
    with contextlib.redirect_stdout(io.StringIO()):                 # environment and keys go to OUT/log.txt,
        default_setup(cfg, args)
    for part in ("utils.events", "evaluation.evaluator"):           # progress to the console, too
        logging.getLogger(f"detectron2.{part}").addHandler(logging.StreamHandler(sys.stdout))
    say(f"{weights.source}; input {cfg.INPUT.FORMAT}, mean {cfg.MODEL.PIXEL_MEAN}, std {cfg.MODEL.PIXEL_STD}")

    # ---- The evaluation, rehearsed ----
    cfg.OUTPUT_DIR = os.path.join(args.out, "rehearsal")
    notes += rehearse(cfg, data.source)
    say(*notes, sep="\n")

    # ---- Trials ----
    trials = []
    for trial in range(args.trials):
        here = os.path.join(args.out, f"trial{trial}")
        done, newest = Path(here, "results.json"), Path(here, "last_checkpoint")
        last = newest.read_text() if newest.exists() else ""
        stage.check_ranks({f"trial {trial}": (last, done.exists())})
        if done.exists() and not args.eval_only:
            say(f"trial {trial}: done before")
            trials.append(json.loads(done.read_text()))
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
                stage.write_atomically(str(done), lambda f: f.write(json.dumps(trials[-1]).encode()))
            mapper = DatasetMapper(cfg, is_train=False)
            model.eval()
            draw(cfg, 8, lambda item: model([mapper(item)])[0]["instances"].to("cpu"),
                 f"{here}/detections.png")
    if rank == 0:
        report(args, cfg, notes, data, weights.source, trials)


def prepare(args):
    """What stage.launch runs once, before main. -> more arguments of main: none"""
    if not args.eval_only:
        stage.check_new(args, [BEGUN])
    return ()


if __name__ == "__main__":
    arguments = get_args()
    if arguments.export:
        main(0, None, arguments)
    else:
        stage.launch(main, arguments, prepare)
