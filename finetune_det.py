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
import json
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

import stage
from weights import add_weights_arguments, random_weights, read_weights, to_detectron2

warnings.filterwarnings("ignore", ".*torch.jit.script|torch.meshgrid|.*broadcast_buffers")        # theirs
for name in ("torch.fx", "torch.utils.cpp_extension"):
    logging.getLogger(name).setLevel(logging.ERROR)
try:
    import detectron2.engine.defaults
    from detectron2 import modeling
    from detectron2.config import get_cfg
    from detectron2.data import DatasetMapper, MetadataCatalog, datasets
    from detectron2.engine import DefaultTrainer, default_setup, hooks
    from detectron2.layers import get_norm
    from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
    from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead, Res5ROIHeads
    from detectron2.utils import comm
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.file_io import PathManager

    from detsets import build_evaluator, draw, load_data, perfect, reading, register, rehearse
except ImportError as error:
    sys.exit(f"finetune_det.py: error: detectron2 cannot be imported ({error}); `make install` brings it")

ZOO = os.path.join(os.path.dirname(detectron2.__file__), "model_zoo", "configs")
VOC_C4 = "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml"             # detectron2's own configurations
COCO_C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
COCO_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
# iterations: of 16 images; steps: where the rate falls; images: of the training set; tables: of the paper.
Protocol = collections.namedtuple("Protocol", "arch base iterations steps warmup images tables")
PROTOCOLS = {
    "voc-c4": Protocol("c4", VOC_C4, 24000, (18000, 22000), 100, 16551, ("1",)),                # Sec. 5.1.1
    "coco-c4-1x": Protocol("c4", COCO_C4, 90000, (60000, 80000), 1000, 118287, ("4a", "3a")),   # Sec. 5.1.2
    "coco-c4-2x": Protocol("c4", COCO_C4, 180000, (120000, 160000), 1000, 118287, ("2a", "4b")),
    "coco-fpn-1x": Protocol("fpn", COCO_FPN, 90000, (60000, 80000), 1000, 118287, ("4c", "3b")),
    "coco-fpn-2x": Protocol("fpn", COCO_FPN, 180000, (120000, 160000), 1000, 118287, ("2b", "4d")),
    "minicoco-c4": Protocol("c4", COCO_C4, 9000, (6000, 8000), 1000, 11828, ("5",)),    # Sec. 5.3 [ours]
}
# What no pre-training has: RPN 6 tensors, predictor 4, extra norm 5, mask head 4 (C4) or 28 (FPN).
NEW_PARTS = ("proposal_generator.rpn_head.", "roi_heads.box_predictor.", "roi_heads.mask_head.",
             "roi_heads.res5.norm.", "roi_heads.box_head.fc_extra_norm.")
# Keys that change nothing of what is learnt: they may differ from the protocol, and in a resumed run.
FREE = {"MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"}
# Keys for which this program has arguments of its own.
RESERVED = {"SEED", "OUTPUT_DIR", "MODEL.WEIGHTS", "DATASETS.TRAIN", "DATASETS.TEST"}
BEGUN = "trial0/last_checkpoint"                     # in an --out that holds a run
# Keys that follow from the labels.
OF_LABELS = {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.MASK_ON", "INPUT.MASK_FORMAT"}
# Of MODEL's keys these may differ where a detector is only evaluated: how it is trained, where, SyncBN or BN.
NOT_EVALUATED = re.compile("DEVICE|NORM$|_TEST$|_TRAIN$|FREEZE_AT|BATCH_SIZE|FRACTION|LOSS")


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
    args.classes = list(map(str.strip, args.classes.split(",")))
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

def basic_stage(cfg, number):
    """The blocks of stage 0 to 3, detectron2's res2 to res5, of a ResNet-18 or 34 in any width."""
    count = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[cfg.MODEL.RESNETS.DEPTH][number]
    width = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2 ** number
    before = width // 2 if number > 0 else cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    strides = [2 if number > 0 else 1] + [1] * (count - 1)
    return ResNet.make_stage(BasicBlock, count, in_channels=before, out_channels=width,
                             stride_per_block=strides, norm=cfg.MODEL.RESNETS.NORM)


@modeling.BACKBONE_REGISTRY.register()
def build_narrow_backbone(cfg, input_shape):
    """A ResNet-18 or 34 of another width than detectron2's own, with an FPN if one is configured."""
    stem = BasicStem(input_shape.channels, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM)
    stages = [basic_stage(cfg, number) for number in range(4)]
    net = ResNet(stem, stages, out_features=cfg.MODEL.RESNETS.OUT_FEATURES,
                 freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    if not cfg.MODEL.FPN.IN_FEATURES:
        return net
    return FPN(net, cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM,
               LastLevelMaxPool(), cfg.MODEL.FPN.FUSE_TYPE)


@modeling.ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """C4's head with a norm after the last residual block (Sec. 5.3), as MoCo's detectors have it.

    detectron2's own builds res5 of bottlenecks alone; this one of ResNet-18's and 34's blocks, too.
    """

    @classmethod
    def _build_res5_block(cls, cfg):
        if cfg.MODEL.RESNETS.DEPTH < 50:
            blocks = basic_stage(cfg, 3)
            res5, channels = torch.nn.Sequential(*blocks), blocks[-1].out_channels
        else:
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
        return build_evaluator(cfg, name)


@contextlib.contextmanager
def building():
    """Makes one line of what detectron2 refuses of KEY VALUE. What any other file raises is a bug."""
    try:
        yield
    except (AssertionError, KeyError, ValueError) as error:
        place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not {"detectron2", "fvcore", "yacs"} & set(place.parts):
            raise
        raise stage.Refusal(f"KEY VALUE: {stage.last_line(error)}") from error


@contextlib.contextmanager
def running():
    """Makes one line of what the world does to a training: pictures, losses and workers that fail."""
    try:
        yield
    except stage.Refusal as error:                  # a loader worker puts its traceback in front
        raise stage.Refusal(stage.last_line(error).split("Refusal: ")[-1]) from error
    except FloatingPointError as error:             # detectron2 puts all losses behind
        reason = str(error).splitlines()[0]
        raise stage.Refusal(f"the training has diverged, lower SOLVER.BASE_LR: {reason}") from error
    except RuntimeError as error:
        if not re.search(r"DataLoader worker .*(killed|exited)", str(error)):
            raise
        raise stage.Refusal("a DataLoader worker was killed: if memory or /dev/shm is short, take fewer "
                            "--workers or 0, or docker's --shm-size") from error


# ---- Protocols -------------------------------------------------------------------------------------------

def flat(cfg, prefix=""):
    """{'SOLVER.MAX_ITER': 90000, ...} of a nested configuration."""
    result = {}
    for key, value in cfg.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def protocol_config(protocol, weights, device, depth):
    """A Protocol in detectron2's terms, for 8 GPUs, as it stands without any label or override."""
    norm = "BN" if device == "cpu" else "SyncBN"
    cfg = get_cfg()
    cfg.merge_from_file(os.path.join(ZOO, protocol.base))

    # Common to all [MoCo v2 and released code]
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = ""                                      # load_weights loads them, by exact names
    cfg.MODEL.BACKBONE.FREEZE_AT = 0                            # every layer is trained
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    cfg.MODEL.RESNETS.NORM = norm                               # [paper 5: SyncBN everywhere]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = weights.stride_in_1x1     # torchvision strides in the 3x3
    cfg.MODEL.PIXEL_MEAN = np.round(255 * np.array(weights.pixel_mean), 3).tolist()
    cfg.MODEL.PIXEL_STD = np.round(255 * np.array(weights.pixel_std), 3).tolist()
    cfg.INPUT.FORMAT = weights.channel_order
    cfg.TEST.PRECISE_BN.ENABLED = True
    cfg.SOLVER.MAX_ITER = protocol.iterations
    cfg.SOLVER.STEPS = protocol.steps
    cfg.SOLVER.WARMUP_ITERS = protocol.warmup
    if protocol.arch == "c4":                                   # [MoCo v2]
        cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeadsExtraNorm"
    else:                                                       # [released code]
        cfg.MODEL.FPN.NORM = cfg.MODEL.ROI_BOX_HEAD.NORM = cfg.MODEL.ROI_MASK_HEAD.NORM = norm
        cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 4
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        if weights.extras:              # the release's baselines, whose box head is new, have no extra norm
            cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHeadExtraNorm"
    if weights.resnet.startswith("narrow"):                     # [ours: for studies on a CPU]
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS //= 4
        cfg.MODEL.BACKBONE.NAME = "build_narrow_backbone"
    return cfg


def build_config(protocol, weights, data=None, world=8, device="cuda", opts=()):
    """The protocol for these labels, processes and overrides. -> it, lines: what differs"""
    terms = PROTOCOLS[protocol]
    wanted = get_cfg()
    with building():
        wanted.merge_from_list(list(opts))
    given = {key: value for key, value in flat(wanted).items() if key in opts[::2]}
    depth = given.get("MODEL.RESNETS.DEPTH", int(re.sub(r"\D", "", weights.resnet)))
    cfg = protocol_config(terms, weights, device, depth)
    stated = flat(cfg)

    # Two images a GPU, as MoCo's. For another batch than 16 detectron2's linear rule, counted in images.
    cfg.SOLVER.IMS_PER_BATCH = given.get("SOLVER.IMS_PER_BATCH", 2 * world)
    scale = cfg.SOLVER.IMS_PER_BATCH / 16
    cfg.SOLVER.BASE_LR *= scale
    total = given.get("SOLVER.MAX_ITER", round(terms.iterations / scale))
    cfg.SOLVER.MAX_ITER = total
    falls = {min(round(step * total / terms.iterations), total - 1) for step in terms.steps} - {0}
    cfg.SOLVER.STEPS = tuple(sorted(falls))                     # the scheduler takes none at the end
    cfg.SOLVER.WARMUP_ITERS = round(terms.warmup * total / terms.iterations)

    if data:
        cfg.DATASETS.TRAIN = tuple(name for name, *_ in data.sets[:-1])
        cfg.DATASETS.TEST = (data.sets[-1][0],)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(data.classes)
        cfg.MODEL.MASK_ON = data.masks
        cfg.INPUT.MASK_FORMAT = "bitmask" if data.run_length else "polygon"
        for key in given.keys() & OF_LABELS:
            value = flat(cfg)[key]
            if given[key] != value and str(given[key]) not in ("False", "bitmask"):
                raise stage.Refusal(f"{key} {given[key]}, but the labels make it {value}: leave it out")
    cfg.merge_from_list(list(opts))
    return cfg, differences(protocol, cfg, stated, given, data, world)


def differences(protocol, cfg, stated, given, data, world):
    """Lines: how a configuration differs from the protocol, whose keys and values are `stated`."""
    notes = []
    for key, value in flat(cfg).items():
        if value != stated[key] and key not in FREE and not key.startswith("DATASETS."):
            why = "given" if key in given else "the labels" if key in OF_LABELS else "linear rule"
            notes.append(f"{key} {value}, protocol {stated[key]} ({why})")
    images = data.images if data else PROTOCOLS[protocol].images
    if images != PROTOCOLS[protocol].images:
        notes.append(f"{images} training images, protocol {PROTOCOLS[protocol].images}")
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images
    if protocol == "minicoco-c4" and round(epochs, 1) != 12:
        notes.append(f"{cfg.SOLVER.MAX_ITER} iterations are {epochs:.1f} epochs, the paper says 12")
    depth, width = cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    if (depth, width) != (50, 256):
        notes.append(f"a ResNet-{depth} with {width} channels in res2, paper ResNet-50 with 256")
    on_cpu = cfg.MODEL.DEVICE == "cpu"
    if on_cpu:
        notes.append("SyncBatchNorm does not run on the CPU: BatchNorm instead, each process by itself")
    seen = cfg.SOLVER.IMS_PER_BATCH // (world if on_cpu else 1)
    if seen < 16:
        notes.append(f"BatchNorm, precise BN too, sees {seen} images at a time, MoCo's 16: on a large card "
                     "SOLVER.IMS_PER_BATCH 16 gives that batch")
    return notes


# ---- Weights ---------------------------------------------------------------------------------------------

def get_weights(args):
    """WEIGHTS, read and whole; for `random` an empty set, which loads nothing."""
    if args.weights == "random":
        return random_weights(input=args.input)
    try:
        path = PathManager.get_local_path(args.weights)             # a file, or an address of detectron2
        return read_weights(path, trust=args.trust, prefix=args.prefix, input=args.input)
    except (ValueError, OSError) as error:
        raise stage.Refusal(f"{args.weights}: {stage.last_line(error)}") from error


def load_weights(model, weights, arch):
    """Weights into detectron2's model by exact name. -> names loaded, names left at their random init.

    Refused unless what is left is what no pre-training has: 15 tensors for VOC C4, 19 for COCO C4, 43 for
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
        raise stage.Refusal(f"{len(lost)} tensors do not fit the detector that is configured, or would stay "
                            f"random, such as {lost[0]}")
    model.load_state_dict(state, strict=False)
    return sorted(state), left


def export(args):
    """WEIGHTS as a file that detectron2 loads by MODEL.WEIGHTS. Prints the keys that must go with it."""
    arch, base, *_ = PROTOCOLS[args.protocol]
    weights = get_weights(args)
    if "narrow" in weights.resnet or arch == "c4" and int(weights.resnet.removeprefix("resnet")) < 50:
        raise stage.Refusal(f"detectron2 itself builds no {arch} of {weights.resnet}, only this program does")
    stage.write_atomically(args.export, lambda f: torch.save({"model": to_detectron2(weights, arch)}, f))
    theirs = get_cfg()
    theirs.merge_from_file(os.path.join(ZOO, base))
    theirs, ours = flat(theirs), flat(build_config(args.protocol, weights)[0])
    ours["MODEL.WEIGHTS"] = args.export
    words = []
    for key, value in ours.items():
        named = key.endswith(".NAME")                               # the extra norm is ours alone
        if key.startswith(("MODEL.", "INPUT.")) and not named and value != theirs[key]:
            words += [key, str(value).replace(" ", "")]             # a word each for the shell
    print(f"{args.export}: {weights.source}; use it with detectron2's {base} and", *words)


# ---- Results ---------------------------------------------------------------------------------------------

def paper_rows(protocol, classes):
    """{'paper: InsLoc, 200 epochs': {'APbb': '39.5', ...}}: all rows of the paper's tables of a protocol.

    None beside the numbers of other classes than VOC's 20 or COCO's 80.
    """
    rows = collections.defaultdict(dict)
    papers = MetadataCatalog.get("voc_2007_test" if protocol == "voc-c4" else "coco_2017_val").thing_classes
    if set(classes) != set(papers):
        return rows
    table = Path(__file__).with_name("docs") / "paper_tables.csv"
    try:
        for row in csv.DictReader(table.read_text().splitlines()):
            if row["table"] in PROTOCOLS[protocol].tables and row["arch"].startswith(("Mask", "Faster")):
                name = f"paper: {row['method']}" + (f", {row['epochs']} epochs" if row["epochs"] else "")
                rows[name][row["metric"]] = f"{float(row['value']):.1f}"
    except (OSError, KeyError, ValueError) as error:
        stage.say(f"the paper's rows will be missing below the result: {stage.last_line(error)}")
    return rows


def report(args, cfg, notes, data, source, trials, paper):
    """results.json; then the table in the paper's columns, with all rows of the paper below ours."""
    means, deviations, ours = {}, {}, {}
    for kind, ending in (("bbox", "bb"), ("segm", "mk")):
        for metric in ("AP", "AP50", "AP75"):
            values = [trial[kind][metric] for trial in trials if kind in trial]     # nan: no detection at all
            if not values:
                continue
            label = metric if args.protocol == "voc-c4" else metric + ending
            means[label] = float(np.mean(values))
            ours[label] = f"{means[label]:.1f}"
            if len(values) > 1:
                deviations[label] = float(np.std(values, ddof=1))
                ours[label] += f" ± {deviations[label]:.1f}"
    result = {"protocol": args.protocol, "source": source, "mean": means, "deviation": deviations,
              "trials": trials, "differs_from_protocol": notes, "data": vars(data), "commit": stage.commit(),
              "torch": torch.__version__, "detectron2": detectron2.__version__, "arguments": vars(args),
              "config": cfg}
    path = os.path.join(args.out, "evaluation.json" if args.eval_only else "results.json")
    stage.write_atomically(path, lambda f: f.write(json.dumps(result, indent=1).encode()))
    stage.say(f"wrote {path}; trial*/detections.png; curves: tensorboard --logdir {args.out}")
    rows = {"": dict(zip(ours, ours)), f"this run: mean of {len(trials)}": ours, **paper}
    width = max(map(len, rows))
    for name, row in rows.items():
        stage.say(f"{name:<{width}}" + "".join(f"{row.get(label, '-'):>12}" for label in ours))


# ---- The run ---------------------------------------------------------------------------------------------

def prepare(args):
    """What stage.launch runs once, before main. -> more arguments of main: none"""
    if not args.eval_only:
        stage.check_new(args, [BEGUN])
        return ()
    for trial in range(args.trials):
        path = os.path.join(args.out, f"trial{trial}", "model_final.pth")
        if not os.path.exists(path):
            raise stage.Refusal(f"{path} is not there: --eval-only evaluates trials that were trained")
    return ()


def check_settings(args, cfg, data, weights):
    """Writes the settings of a run to --out, or compares them with those of the run that --out holds."""
    settings = {**flat(cfg), "SEED": args.seed, "--protocol": args.protocol, "labels": data.digests,
                "weights": stage.digest(x.numpy().tobytes() for x in weights.backbone.values())}
    settings = {key: str(value) for key, value in settings.items()}
    path = Path(args.out, "settings.json")
    if not path.exists() or not Path(args.out, BEGUN).exists():
        stage.write_atomically(str(path), lambda f: f.write(json.dumps(settings).encode()))
        return
    free = FREE
    if args.eval_only:
        free = {key for key in settings if not key.startswith(("MODEL.", "INPUT.FORMAT", "--protocol"))
                or NOT_EVALUATED.search(key)}
    with reading(path):
        before = json.loads(path.read_text())
    changed = stage.differences(before, settings, free)
    if changed:
        raise stage.Refusal(f"{args.out} was begun otherwise, give another --out: {changed[:300]}")


def newest_checkpoint(folder):
    """The name of a trial's newest checkpoint, "" if it has none. Mends detectron2's pointer to it."""
    pointer = Path(folder, "last_checkpoint")
    name = pointer.read_text() if pointer.exists() else ""
    if name and not Path(folder, name).exists():
        older = sorted(Path(folder).glob("model_[0-9]*.pth"))
        if not older:
            raise stage.Refusal(f"{pointer} names {name}, which is gone, and there is no older one: give "
                                "another --out")
        stage.say(f"{pointer} names {name}, which is gone: {older[-1].name} is used")
        name = older[-1].name
        pointer.write_text(name)
    return name


def train(cfg, weights, arch, last):
    """A trial from its start, or from its `last` checkpoint. -> the detector, its metrics."""
    begun = int("0" + re.sub(r"\D", "", last))
    # The iteration goes in: else a run that is often killed would see the same first images again and again.
    seed_all_rng(cfg.SEED + 1000 * begun + comm.get_rank())
    with building():
        trainer = Trainer(cfg)
    model = getattr(trainer.model, "module", trainer.model)
    save = trainer.checkpointer.save
    full_disk = reading(f"{cfg.OUTPUT_DIR}, a checkpoint", (OSError, RuntimeError))
    trainer.checkpointer.save = full_disk(save)
    for hook in trainer._hooks:
        if isinstance(hook, hooks.PeriodicCheckpointer):
            hook.max_to_keep = 2
    if last:
        with reading(f"{cfg.OUTPUT_DIR}/{last}"):
            trainer.resume_or_load(resume=True)
        stage.say(f"going on at iteration {trainer.start_iter} of {cfg.SOLVER.MAX_ITER}")
    elif weights.backbone:
        loaded, left = load_weights(model, weights, arch)
        dropped = [*weights.dropped, *(weights.extras if arch == "c4" else ())]
        for what, names in (("loaded", loaded), ("left at random init", left), ("dropped", dropped)):
            places = sorted({re.sub(r"\d", "", ".".join(name.split(".")[:2])) for name in names})
            stage.say(f"{what}: {len(names)} tensors, {', '.join(places)[:200]}")
    with running():
        trainer.train()
    return model, getattr(trainer, "_last_eval_results", None)


def evaluate(cfg):
    """The detector of a trial that was trained, and its metrics."""
    with building():
        model = Trainer.build_model(cfg)
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    with reading(path):
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    with running():
        return model, Trainer.test(cfg, model)


def draw_detections(cfg, model):
    """detections.png of a trial: pictures of the validation set, with the truth and with what is found."""
    mapper = DatasetMapper(cfg, is_train=False)

    def detect(item):
        return model([mapper(item)])[0]["instances"].to("cpu")

    model.eval()
    draw(cfg.DATASETS.TEST[0], [perfect, detect], f"{cfg.OUTPUT_DIR}/detections.png")


def main(rank, device, args):
    """What stage.launch runs in each process."""
    if args.world > 1:
        comm.create_local_process_group(args.nprocs)
    if device.type == "cpu":                                        # detectron2 always names a GPU here
        detectron2.engine.defaults.create_ddp_model = functools.partial(
            detectron2.engine.defaults.create_ddp_model, device_ids=None)

    # ---- What is done: planned and checked on rank 0, which alone reads all labels ----
    stage.check_ranks(vars(args))
    arch, weights, plan = PROTOCOLS[args.protocol].arch, get_weights(args), None
    if rank == 0:
        data = load_data(args)
        paper = paper_rows(args.protocol, data.classes)             # read before anything is trained
        opts = ["DATALOADER.NUM_WORKERS", args.workers, *args.opts]
        cfg, notes = build_config(args.protocol, weights, data, args.world, args.device, opts)
        check_settings(args, cfg, data, weights)
        plan = data, cfg, notes
    data, cfg, notes = stage.gather_objects(plan)[0]
    if rank > 0:                                                    # rank 0 has registered them
        for name, folder, labels in data.sets:
            register(name, folder, labels, data.classes)
    cfg.SEED = args.seed
    cfg.OUTPUT_DIR = args.out
    with contextlib.redirect_stdout(io.StringIO()):                 # environment and keys go to OUT/log.txt,
        default_setup(cfg, args)
    for part in ("utils.events", "evaluation.evaluator"):           # progress to the console, too
        logging.getLogger(f"detectron2.{part}").addHandler(logging.StreamHandler(sys.stdout))
    stage.say(f"{weights.source}; input {cfg.INPUT.FORMAT}, mean {cfg.MODEL.PIXEL_MEAN}, "
              f"std {cfg.MODEL.PIXEL_STD}")

    # ---- The evaluation, rehearsed ----
    cfg.OUTPUT_DIR = os.path.join(args.out, "rehearsal")
    notes += rehearse(cfg, data.source)
    for note in notes:
        stage.say(note)

    # ---- Trials ----
    trials = []
    for trial in range(args.trials):
        cfg.SEED = args.seed + trial
        cfg.OUTPUT_DIR = os.path.join(args.out, f"trial{trial}")
        done, last = Path(cfg.OUTPUT_DIR, "results.json"), newest_checkpoint(cfg.OUTPUT_DIR)
        stage.check_ranks({f"trial {trial}": (last, done.exists())})
        if done.exists() and not args.eval_only:
            stage.say(f"trial {trial}: done before")
            with reading(done):
                trials.append(json.loads(done.read_text()))
            continue
        stage.say(f"trial {trial}: seed {cfg.SEED}")
        model, metrics = evaluate(cfg) if args.eval_only else train(cfg, weights, arch, last)
        if rank == 0:
            trials.append({"seed": cfg.SEED, **metrics})
            if not args.eval_only:
                stage.write_atomically(str(done), lambda f: f.write(json.dumps(trials[-1]).encode()))
            stage.attempt("detections.png", draw_detections, cfg, model)
    if rank == 0:
        report(args, cfg, notes, data, weights.source, trials, paper)


if __name__ == "__main__":
    arguments = get_args()
    if arguments.export:
        try:
            export(arguments)
        except stage.Refusal as refusal:
            sys.exit(f"finetune_det.py: error: {refusal}")
    else:
        stage.launch(main, arguments, prepare)
