"""Stage 1: pre-train a detection backbone on unlabelled images by instance localization (arXiv 2102.08318,
Sec. 3 to 5).

    python pretrain.py --arch c4 --epochs 200 /data/imagenet         # every GPU of this machine, else the CPU
    python pretrain.py --arch fpn --method cp --nprocs 1 /data/imagenet       # a rung of Table 3b, on one GPU
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        pretrain.py --arch c4 --resume /data/imagenet                   # two machines, a shared run directory
    python -m pdb pretrain.py --arch c4 --workers 0 --nprocs 1 DATA      # step through it, nothing is spawned

The method is in insloc.py; the loop is in `main`, in full view: load groups, momentum update, shuffle and
encode the keys, then for each group encode the queries, loss, backward; optimizer step, enqueue.
"""
import argparse
import copy
import datetime
import json
import math
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch.nn.functional import interpolate
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import draw_bounding_boxes, make_grid

import stage
from insloc import (PIXEL_MEAN, PIXEL_STD, C4Encoder, FPNEncoder, KeyQueue, MakeGroup, TooFewImages,
                    Unreadable, Views, batches, generator_for, info_nce, momentum_update, photometric)
from stage import say
from weights import RESNETS, read_weights

# These may differ between a run and its continuation, since they change nothing of what is computed.
FREE = stage.LOCAL | {"world", "log_every", "save_steps", "preview", "compile"}
DATA_ERRORS = (Unreadable, TooFewImages)                        # here the data is at fault, not the program
# Folders beside `train` that are no classes: hidden ones, and splits such as val, Test_2 or unlabeled.
NO_CLASS = re.compile(r"\.|(train|val|valid|validation|test|testing|dev|eval|extra|unlabell?ed)([\W\d_]|$)",
                      re.IGNORECASE)


def get_args(argv=None):
    parser = stage.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", help="folder of images, searched to any depth (its `train` child alone, if there is one), or "
        "a text file of paths")
    add("--arch", choices=["c4", "fpn"], required=True, help="R50-C4 or R50-FPN [paper 4.3]")
    add("--method", choices=["moco", "ra", "cp", "insloc"], default="insloc", help="Table 3b's ladder: MoCo "
        "v2; with RoIAlign (C4 with a --roi-size of image_size / 16: moco again); with copy-paste; with box "
        "jitter = InsLoc [paper 5.2]")
    add("--resnet", choices=RESNETS, default="resnet50", help="trunk; the narrow ones are for small studies "
        "on a CPU [paper 4.3]")
    add("--epochs", type=int, default=200, help="200, or 400 [paper 5]")
    add("--batch-size", type=int, default=256, help="images a step, all processes together [paper 5: 8 x 32]")
    add("--bn-group", type=int, default=32, help="images that share BatchNorm statistics; below 8 these are "
        "noisy [paper 5: 32 a GPU]")
    add("--lr", type=float, default=0.03, help="at the start; cosine by epoch to 0 [paper 5]")
    add("--weight-decay", type=float, default=1e-4, help="on every parameter [paper 5]")
    add("--nesterov", action="store_true", help="Nesterov momentum [MoCo v2: off; released code: on]")
    add("--queue-size", type=int, default=65536, help="negatives a level [paper 5]")
    add("--fill-queue", action="store_true", help="no update before real keys fill the queue [ours: off]")
    add("--temperature", type=float, default=0.2, help="of Eq. 2 [paper 5]")
    add("--ema", type=float, default=0.999, help="momentum of the key encoder [paper 5]")
    add("--image-size", type=int, help="side of the canvas, a multiple of 32 [released code: 256; MoCo v2: "
        "224, for moco and ra]")
    add("--roi-size", type=int, help="what C4's RoIAlign pools to [detectron2: 14; ours: image_size / 16 on "
        "a canvas below 224]")
    add("--fg-size", type=int, nargs=2, metavar=("LOW", "HIGH"), help="sides of a pasted crop, ends "
        "included; half the canvas to the canvas [paper 4.1: 128 to 256]")
    add("--keep-aspect", action="store_true", help="draw a crop's aspect from 1/2 to 2, and keep it "
        "instead of stretching the crop to the drawn sides [paper 4.1: off; released code: on]")
    add("--aug-on", choices=["foreground", "composite"], default="foreground", help="where colour jitter, "
        "blur and flip act [paper 5; composite: released code]")
    add("--backgrounds", choices=["group", "dataset"], default="group", help="other samples of the group, or "
        "two more decodes a sample [ours: as random, at no decode; dataset: released code]")
    add("--jitter-levels", choices=["p5", "all"], default="p5", help="FPN levels that pool the jittered box "
        "[released code]")
    add("--init", metavar="WEIGHTS", help="start from any file that weights.py reads [ours: none]")
    add("--precision", choices=["bf16", "fp32", "fp64"], help="[ours: bf16 on a GPU that has it, else fp32]")
    add("--save-steps", type=int, help="steps between checkpoints [ours: one epoch, at least 500]")
    add("--log-every", type=int, default=10, help="steps between log lines [MoCo v2]")
    add("--preview", type=int, metavar="N", help="only draw N samples into composites.png [ours: off]")
    add("--compile", action="store_true", help="torch.compile the encoders [ours: off]")
    stage.add_machine_arguments(parser, "runs/METHOD_ARCH")
    args = parser.parse_args(argv)
    stage.check_machine_arguments(parser, args)

    # Defaults that depend on others, and every check that needs no data.
    pasting = args.method in ("cp", "insloc")
    in_hardware = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if in_hardware else "fp32")
    if args.image_size is None:
        args.image_size = 256 if pasting else 224
    if args.roi_size is None:
        args.roi_size = max(1, min(14, args.image_size // 16))
    args.out = args.out or f"runs/{args.method}_{args.arch}"
    args.resume = args.resume and not args.preview          # so that no picture goes into the folder of a run
    if args.image_size < 32 or args.image_size % 32:
        parser.error(f"--image-size {args.image_size}: must be a multiple of 32, the stride of the network")
    if not pasting and (args.fg_size or args.keep_aspect):
        parser.error(f"--method {args.method} pastes nothing: leave --fg-size and --keep-aspect out")
    if pasting:
        args.fg_size = args.fg_size or [args.image_size // 2, args.image_size]
        if not 1 <= args.fg_size[0] <= args.fg_size[1] <= args.image_size:
            parser.error(f"--fg-size: must be 1 <= LOW <= HIGH <= canvas {args.image_size}")
    for name in ("epochs", "batch_size", "queue_size", "roi_size", "log_every", "save_steps", "preview"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not (0 <= args.lr < math.inf and 0 <= args.weight_decay < math.inf):
        parser.error("--lr and --weight-decay must be numbers from 0 on")
    if not (0 <= args.ema <= 1 and 0 < args.temperature < math.inf):
        parser.error("--ema must be in [0, 1] and --temperature above 0")
    if args.bn_group < (3 if pasting else 2):
        parser.error("--bn-group must be at least 3, a sample and two backgrounds; without pasting 2")
    if args.batch_size % args.bn_group:
        parser.error(f"--batch-size {args.batch_size} is not a multiple of --bn-group {args.bn_group}")
    n_groups = args.batch_size // args.bn_group
    if n_groups < 2:
        parser.error("one BatchNorm group: no shuffle parts keys from queries, BatchNorm leaks the answer: "
                     f"take --batch-size {2 * args.bn_group}, or a smaller --bn-group")
    if n_groups % args.world:
        parser.error(f"{args.world} processes cannot share {n_groups} groups evenly: take a number that "
                     f"divides {n_groups}")
    return args


def find_data(args):
    """DATA -> paths, a NumPy bytes array, in the order of names, or of a list; their number and digest."""
    stage.check_new(args, ("log.jsonl", "checkpoint.pth", "checkpoint_prev.pth"))
    if os.path.isdir(args.data):
        source = root = choose_split(args.data)
        names = stage.find_images(root)
        looked_for = f"; looked for: {b' '.join(stage.ENDINGS).decode()}"
    else:
        source = args.data
        root, names = read_list(source)
        looked_for = ""
    needed = f"--preview {args.preview}" if args.preview else f"--batch-size {args.batch_size}"
    if len(names) < (args.preview or args.batch_size):
        raise stage.Refusal(f"{source} has {len(names)} images, less than {needed}{looked_for}")
    paths = np.array([os.path.join(os.fsencode(root), name) for name in names])
    return paths, f"{len(names)} files {stage.digest(names)}"


def choose_split(folder):
    """The folder's `train` child if it has one. Refuses it if it looks like a class among classes."""
    train = os.path.join(folder, "train")
    if not os.path.isdir(train):
        return folder
    with stage.touching(folder):
        neighbours = sorted(Path(folder).iterdir())
    for neighbour in neighbours:
        if NO_CLASS.match(neighbour.name):
            continue
        for path in neighbour.rglob("*"):
            if os.fsencode(path.suffix.lower()) in stage.ENDINGS:
                raise stage.Refusal(f"{folder} holds images in `train` and in {neighbour.name!r}, which is "
                                    f"no split: give {train} for that alone, or a text file of paths")
    say(f"taking {train!r} alone")
    return train


def read_list(path):
    """A text file, or pipe, of paths, one a line or ended by NUL -> the folder they start at; the paths."""
    pipe = os.path.exists(path) and Path(path).is_fifo()
    if not (pipe or os.path.isfile(path)):
        raise stage.Refusal(f"{path}: no such file or folder")
    with stage.touching(path), open(path, "rb") as f:
        text = f.read(2 ** 16)
        if set(text) & set(range(1, 9)):                            # no name has these; archives are large
            raise stage.Refusal(f"{path} is no text file of paths; if it is an archive, unpack it and give "
                                "the folder")
        text += f.read()
    names = text.split(b"\0") if b"\0" in text else text.splitlines()
    names = [name for name in names if name]
    root = "" if pipe else os.path.dirname(path)
    for name in names:
        if not os.path.isfile(os.path.join(os.fsencode(root), name)):
            raise stage.Refusal(f"{path} lists {os.fsdecode(name)[:200]!r}, and there is no such file")
    return root, names


def make_data(args, paths):
    """The dataset and the collate function of this method."""
    ratio = (1 / 2, 2) if args.keep_aspect else (3 / 4, 4 / 3)                  # [released code], [MoCo v2]
    backgrounds = args.backgrounds if args.method in ("cp", "insloc") else "none"
    dataset = Views(paths, args.seed, args.image_size, args.fg_size, ratio, args.keep_aspect, backgrounds)
    make_group = MakeGroup(args.seed, args.image_size, backgrounds, jitter=args.method == "insloc",
                           flip_moves_box=backgrounds != "none" and args.aug_on == "composite")
    return dataset, make_group


def make_networks(args, device, state):
    """Query encoder, key encoder, queue, optimizer: new, from --init, or out of the checkpoint `state`.

    The same on every rank.
    """
    torch.manual_seed(args.seed)
    with_neck = args.arch == "fpn" and args.method != "moco"            # MoCo v2 trains neither neck nor head
    encoder_q = FPNEncoder(args.resnet) if with_neck else C4Encoder(args.resnet, roi_size=args.roi_size)
    queue = KeyQueue(args.queue_size, encoder_q.dim, len(encoder_q.levels), generator_for(args.seed, "queue"))
    if args.init and not state:
        start_from(args.init, encoder_q, args.resnet, with_neck)
    dtype = dtype_of(args.precision)
    queue.to(device, dtype)
    encoder_q.to(device, dtype, memory_format=torch.channels_last)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)                  # starts as a copy
    optimizer = torch.optim.SGD(encoder_q.parameters(), lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, nesterov=args.nesterov)
    if state:
        encoder_q.load_state_dict(state["encoder_q"])
        encoder_k.load_state_dict(state["encoder_k"])
        queue.load_state_dict(state["queue"])
        optimizer.load_state_dict(state["optimizer"])
    return encoder_q, encoder_k, queue, optimizer


def start_from(init, encoder, resnet, with_neck):
    """Loads the weights of --init: the trunk, and the neck and box head if the file has them."""
    try:
        weights = read_weights(init)
    except (OSError, ValueError) as error:
        raise stage.Refusal(f"--init {init}: {error} (here without --input, --prefix, --trust)") from error
    if weights.resnet != resnet:
        raise stage.Refusal(f"--init {init}: give --resnet {weights.resnet}, as it is, not {resnet}")
    encoder.resnet.load_state_dict(weights.backbone)
    if with_neck:
        encoder.load_state_dict(weights.extras, strict=False)
    parts = "neck and box head" if weights.extras and with_neck else "the ResNet alone"
    say(f"starting from {weights.source}: {parts}, the rest random")


def dtype_of(precision):
    """The dtype of parameters and images; bfloat16 is autocast's."""
    return torch.float64 if precision == "fp64" else torch.float32


def check_compiler(device):
    """Refuses --compile where torch cannot compile: it needs a C++ compiler, on a GPU a C one and Triton."""
    try:
        torch.compile(torch.nn.ReLU())(torch.ones(2, device=device))
    except RuntimeError as error:
        reason = stage.first_line(error)
        raise stage.Refusal(f"--compile: torch cannot compile on this machine: {reason}") from error


def augment(view, args, device):
    """uint8 composites of a view -> augmented, normalised images (N, 3, S, S) on the device."""
    dtype = dtype_of(args.precision)
    images = view["images"].to(device, non_blocking=True).contiguous() / torch.tensor(255, dtype=dtype)
    inside = args.method in ("cp", "insloc") and args.aug_on == "foreground"                 # Sec. 5
    images, _ = photometric(images, view, view["boxes"] if inside else None)
    for channel, mean, std in zip(images.unbind(dim=1), PIXEL_MEAN, PIXEL_STD):
        channel.sub_(mean).div_(std)                        # by numbers: there is nothing to copy to a GPU
    return images.contiguous(memory_format=torch.channels_last)


def boxes_of(view, args, device):
    """The boxes to pool, (N, 4) or one such a level. A query's drawn boxes are jittered, a key's are not.

    DIVERGES: FPN's levels but P5 pool the pasted box, as released; the paper's plainest reading is that all
    levels pool the drawn one.
    """
    if args.method == "moco":
        return None
    pasted = view["boxes"].to(device, non_blocking=True)
    drawn = view["drawn_boxes"].to(device, non_blocking=True)
    if args.arch == "fpn" and args.jitter_levels == "p5":
        return [pasted, pasted, pasted, drawn]                                               # P2, P3, P4, P5
    return drawn


def all_gather(x, world):
    """(n, ...) of each rank -> (world * n, ...) on each, in the order of the ranks."""
    if world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def shuffle(views, rows, world, device):
    """Shuffle-BN: views of this rank's groups -> the view of the given `rows` of all ranks' views.

    Images travel as uint8 through the device, all to all ranks: 50 MB for 256 of them. Boxes and parameters
    stay on the CPU.
    """
    shuffled = {}
    for name in views[0]:
        own = [view[name] for view in views]
        if name == "images":
            own = [images.to(device, non_blocking=True) for images in own]       # out of pinned memory
        everyones = all_gather(torch.cat(own), world)
        shuffled[name] = everyones[rows.to(everyones.device, non_blocking=True)]
    return shuffled


def split(view, n):
    """A view -> views of n images each."""
    parts = []
    for first in range(0, len(view["images"]), n):
        parts.append({name: x[first:first + n] for name, x in view.items()})
    return parts


def accuracies(q, k, logits, first):
    """(2,): the shares of queries whose key beats the queue, and beats the other keys of the batch.

    q (N, L, D), k (B, L, D), logits (N, L, 1 + K); first: the row of k that is the first query's key.
    """
    own = torch.arange(first, first + len(q), device=q.device)[:, None]
    beats_queue = logits[:, :, 0] > logits[:, :, 1:].amax(dim=2)
    beats_batch = torch.einsum("nld,bld->nlb", q, k).argmax(dim=2) == own
    return torch.stack([beats_queue.double().mean(), beats_batch.double().mean()])


def save_composites(args, paths, count):
    """composites.png, as Fig. 3: of each sample the query, then the key, with the pasted box in red.

    The box that C4, or P5 of the FPN, pools is blue. It is hidden below the red one but for a jittered query,
    and open where its anchor leaves the canvas. Small canvases are enlarged, so that lines hide little.
    """
    dataset, make_group = make_data(args, paths)
    n = min(max(count, args.bn_group), len(paths))
    addresses = batches(len(paths), n, n, 1, args.seed)
    group = next(stage.load(dataset, addresses, 0, make_group, data_errors=DATA_ERRORS))
    mean, std = torch.tensor([PIXEL_MEAN, PIXEL_STD])[:, :, None, None]
    zoom = max(1, 256 // args.image_size)
    images = {}
    for name in ("query", "key"):
        pixels = (augment(group[name], args, "cpu").float() * std + mean) * 255
        images[name] = interpolate(pixels.round().byte(), scale_factor=zoom)
    panels = []
    for i in range(count):
        for name in ("query", "key"):
            pooled_and_pasted = torch.stack([group[name]["drawn_boxes"][i], group[name]["boxes"][i]])
            panels.append(draw_bounding_boxes(images[name][i], pooled_and_pasted * zoom, width=2,
                                              colors=[(20, 60, 255), (255, 30, 30)]))
    sheet = torchvision.io.encode_png(make_grid(panels, nrow=4, padding=6, pad_value=255))
    path = os.path.join(args.out, "composites.png")
    stage.write_atomically(path, lambda f: f.write(sheet.numpy().tobytes()))
    say(f"wrote {path}")


def save_curves(out, chance, queue_size, batch_size):
    """loss.png from log.jsonl: the loss and the two accuracies, each with its chance level (dotted)."""
    from matplotlib.figure import Figure
    records = [record for record in read_log(out) if "loss" in record]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, level in ((left, "loss", chance), (right, "acc_queue", 1 / (1 + queue_size)),
                              (right, "acc_batch", 1 / batch_size)):
        curve, = axes.plot(steps, [record[name] for record in records], label=name)
        axes.axhline(level, color=curve.get_color(), linestyle=":", label=f"chance {level:.4g}")
        axes.set_xlabel("step")
        axes.legend()
    right.set_ylim(bottom=0)
    figure.savefig(os.path.join(out, "loss.png"), dpi=120)


def read_log(out):
    """The objects of log.jsonl. A line torn by a kill, which can only be the last, is left out."""
    path = os.path.join(out, "log.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("}\n")]


def peak_memory(device):
    """GB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024                  # bytes there, KB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def start_log(args, step, data_digest):
    """log.jsonl with what it has up to `step` and a line about this start."""
    records = [record for record in read_log(args.out) if record["step"] <= step]
    records.append({"step": step, "args": vars(args), "images": data_digest, "commit": stage.commit(),
                    "torch": torch.__version__, "torchvision": torchvision.__version__,
                    "python": sys.version.split()[0]})
    text = "".join(json.dumps(record) + "\n" for record in records)
    stage.write_atomically(os.path.join(args.out, "log.jsonl"), lambda f: f.write(text.encode()))


def start_events(out, step):
    """TensorBoard's writer."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(out, purge_step=step + 1)


def log(out, events, record, last_step, seconds_a_step):
    """A step's numbers, to the terminal, log.jsonl and TensorBoard."""
    seconds_left = seconds_a_step * (last_step - record["step"])
    say(f"step {record['step']}/{last_step}  epoch {record['epoch']}  loss {record['loss']:.3f}  "
        f"acc_queue {record['acc_queue']:.3f}  acc_batch {record['acc_batch']:.3f}  "
        f"{record['images_per_s']:.1f} images/s  data wait {record['data_wait']:.0%}  "
        f"left {datetime.timedelta(seconds=round(seconds_left))}")
    path = os.path.join(out, "log.jsonl")
    with stage.touching(path), open(path, "a") as f:
        f.write(json.dumps(record) + "\n")
    if events:
        stage.attempt("TensorBoard", add_events, events, record)


def add_events(events, record):
    for name, value in record.items():
        events.add_scalar(name, value, record["step"])
    events.flush()


def save(out, state):
    """Writes checkpoint.pth and backbone.pth, for rank 0."""
    try:
        state = stage.save_checkpoint(out, state)
        trunk = {name.removeprefix("resnet."): tensor for name, tensor in state["encoder_q"].items()
                 if name.startswith("resnet.")}
        stage.write_atomically(os.path.join(out, "backbone.pth"), lambda f: torch.save(trunk, f))
    except stage.Refusal as refusal:
        raise stage.Refusal(f"step {state['step']} is not saved: {refusal}{stage.go_on(out)}") from refusal


def check_share(unreadable, paths):
    """All ranks leave if more than 1 % of the images cannot be read. unreadable: all ranks' indices."""
    if len(unreadable) > len(paths) / 100:
        names = [os.fsdecode(paths[index]) for index in sorted(unreadable)[:10]]
        stage.leave(f"{len(unreadable)} of {len(paths)} images cannot be read, over 1 %: {names}")


def introduce(args, encoder, n_images, epoch_steps, filling_steps, chance):
    """Says the run in numbers."""
    n_groups = args.batch_size // args.bn_group
    n_own = n_groups // args.world
    n_levels = len(encoder.levels)
    n_parameters = sum(p.numel() for p in encoder.parameters())
    say(f"""{args.method} {args.arch}: {args.resnet}, {n_parameters:,} parameters
device  {args.world} x {args.device}, {args.precision}, {args.workers} loader workers each
images  {n_images:,} in {args.data!r}; {n_images % args.batch_size} of them left out an epoch
step    {args.batch_size} images = {n_groups} BatchNorm groups x {args.bn_group}, {n_own} of them a process
steps   {args.epochs} epochs x {epoch_steps:,} = {args.epochs * epoch_steps:,}
queue   {args.queue_size:,} keys x {n_levels} levels, {filling_steps} steps fill it
chance  loss {chance:.2f} = {n_levels} x ln(1 + {args.queue_size}); acc_batch {1 / args.batch_size:.4f}""")
    if args.arch == "c4" and args.method == "ra" and args.roi_size * 16 == args.image_size:
        say("note    RoIAlign of the whole canvas is the identity: ra computes what moco does, bit for bit")
    if args.queue_size > n_images / 2:
        say("WARNING: the queue exceeds half of the images: an image's own older keys become its negatives; "
            f"--queue-size {2 ** int(math.log2(n_images / 2))} would fit")


def main(rank, device, args, paths, data_digest):
    world = args.world
    if args.preview:
        if rank == 0:
            save_composites(args, paths, args.preview)
        return
    signals = stage.collect_signals()                   # a request to stop waits here for the end of a step

    # ---- run directory: the checkpoint to go on from, and whether it and the ranks are of one run
    settings = {**vars(args), "images": data_digest}
    state = stage.resume(args, settings, FREE, "--init starts another --out from these weights")
    step = state["step"] if state else 0
    stage.check_ranks({**settings, "step": step})

    # ---- a step is `n_groups` BatchNorm groups; a rank works through `n_own` of them, one by one
    n_groups = args.batch_size // args.bn_group
    n_own = n_groups // world
    own_groups = range(rank * n_own, (rank + 1) * n_own)
    epoch_steps = len(paths) // args.batch_size
    last_step = args.epochs * epoch_steps
    save_steps = args.save_steps or max(epoch_steps, 500)
    filling_steps = math.ceil(args.queue_size / args.batch_size)
    if args.fill_queue and filling_steps >= last_step:
        stage.leave(f"--fill-queue: all {last_step} steps would only fill the queue; take a smaller "
                    "--queue-size, or more --epochs")

    # ---- networks and data
    torch.backends.cudnn.benchmark = True
    encoder_q, encoder_k, queue, optimizer = make_networks(args, device, state)
    levels = encoder_q.levels
    model = encoder_q
    if world > 1:
        model = DistributedDataParallel(encoder_q, [device] if args.device == "cuda" else None)
    if args.compile:
        check_compiler(device)
        encoder_q.compile()
        encoder_k.compile()
    dataset, make_group = make_data(args, paths)
    addresses = batches(len(paths), args.batch_size, args.bn_group, args.epochs, args.seed, step, own_groups)
    loader = stage.load(dataset, addresses, args.workers, make_group, args.device == "cuda", DATA_ERRORS)

    # ---- log and pictures
    chance = len(levels) * math.log(1 + args.queue_size)                # the loss of keys that are all alike
    introduce(args, encoder_q, len(paths), epoch_steps, filling_steps, chance)
    events = None
    if rank == 0:
        start_log(args, step, data_digest)
        events = stage.attempt("TensorBoard", start_events, args.out, step)
        save_composites(args, paths, min(8, args.batch_size))

    def state_after(step):
        return {"step": step, "settings": settings, "encoder_q": encoder_q.state_dict(),
                "encoder_k": encoder_k.state_dict(), "queue": queue.state_dict(),
                "optimizer": optimizer.state_dict()}

    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")
    totals = torch.zeros(len(levels) + 2, device=device, dtype=torch.float64)   # losses, acc_queue, acc_batch
    unreadable = set()                                  # indices of files, at the end of an epoch all ranks'
    first_step = logged_step = saved_step = step
    waited = 0.0
    started = logged_at = time.perf_counter()

    while step < last_step:
        epoch = step // epoch_steps
        lr = args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

        # Load this rank's groups of the step. If one rank cannot, all save what is trained so far, and leave.
        before = time.perf_counter()
        failure = ""
        try:
            batch = [next(loader) for _ in own_groups]
        except stage.Refusal as refusal:
            failure = f"loading step {step + 1}: {refusal}"
        failure = max(stage.gather_objects(failure))                    # "" is the smallest
        if failure:
            if rank == 0 and step > saved_step:
                save(args.out, state_after(step))
            stage.leave(failure + stage.go_on(args.out))
        waited += time.perf_counter() - before
        for group in batch:
            for index in sorted(set(group["unreadable"]) - unreadable):
                path = os.fsdecode(paths[index])
                stage.write_line(f"cannot read {path!r}: another image takes its place", sys.stdout)
            unreadable.update(group["unreadable"])

        # The key encoder follows the query encoder. MoCo does this after the queries' forward pass, which is
        # the same, since the optimizer steps last.
        momentum_update(encoder_k, encoder_q, args.ema)

        # Shuffle the keys over the groups of all ranks, so that BatchNorm sees a key among other images than
        # its query (Shuffle-BN). Encode them, a group at a time; all ranks get all embeddings, in order.
        permutation = torch.randperm(args.batch_size, generator=generator_for(args.seed, "shuffle", step))
        rows = permutation.chunk(world)[rank]
        key_view = shuffle([group["key"] for group in batch], rows, world, device)
        k = []
        for part in split(key_view, args.bn_group):
            images = augment(part, args, device)
            with torch.no_grad(), autocast:
                k.append(encoder_k(images, boxes_of(part, args, device)))                       # Eq. 6
        restore = permutation.argsort().to(device, non_blocking=True)
        k = all_gather(torch.cat(k), world)[restore]                                         # (B, L, D)

        # Encode the queries, a group at a time with a backward each: memory does not grow with the batch.
        optimizer.zero_grad()
        for group_number, group in zip(own_groups, batch):
            first = group_number * args.bn_group                        # its first query's row in k
            model.require_backward_grad_sync = group_number == own_groups[-1]   # DDP averages once a step
            images = augment(group["query"], args, device)
            with autocast:
                q = model(images, boxes_of(group["query"], args, device))                       # Eq. 5
            loss, logits = info_nce(q, k[first:first + args.bn_group], queue.keys, args.temperature)  # Eq. 2
            (loss.sum() / n_own).backward()             # sum over levels, mean over groups
            with torch.no_grad():                       # on the device until a line is logged
                totals += torch.cat([loss.double(), accuracies(q, k, logits, first)]) / n_own
        if step >= filling_steps or not args.fill_queue:
            optimizer.step()
        queue.enqueue(k)
        step += 1

        # All ranks decide together what comes after this step: a request to stop one rank stops all.
        stop = max(stage.gather_objects(signals[0] if signals else 0))
        save_now = bool(stop) or step % save_steps == 0 or step == last_step

        if step % args.log_every == 0 or save_now:
            if world > 1:
                dist.all_reduce(totals)
            *losses, acc_queue, acc_batch = (totals / world / (step - logged_step)).tolist()
            if not math.isfinite(sum(losses)):
                stage.leave(f"the loss of steps {logged_step + 1} to {step} is not finite: lower --lr, or "
                            f"try --precision fp32{stage.go_on(args.out)}")
            now = time.perf_counter()
            record = {"step": step, "epoch": epoch, "lr": lr, "loss": sum(losses),
                      **{f"loss_{level}": value for level, value in zip(levels, losses)},
                      "acc_queue": acc_queue, "acc_batch": acc_batch,
                      "images_per_s": (step - logged_step) * args.batch_size / (now - logged_at),
                      "data_wait": waited / (now - logged_at), "queue_filled": queue.filled.item(),
                      "memory_gb": peak_memory(device)}
            if rank == 0:
                log(args.out, events, record, last_step, (now - started) / (step - first_step))
            totals.zero_()
            logged_step = step
            logged_at = now
            waited = 0.0

        if save_now:
            saved_step = step
            if rank == 0:
                save(args.out, state_after(step))
                stage.attempt("loss.png", save_curves, args.out, chance, args.queue_size, args.batch_size)
        if step % epoch_steps == 0:
            unreadable = set().union(*stage.gather_objects(unreadable))
            check_share(unreadable, paths)
        if stop and step < last_step:
            stage.leave(f"stopped by {signal.Signals(stop).name} after step {step}; the same command with "
                        "--resume goes on", status=128 + stop)

    say(f"done, {last_step} steps: weights {args.out}/backbone.pth, curves {args.out}/loss.png")


if __name__ == "__main__":
    stage.launch(main, get_args(), find_data)
