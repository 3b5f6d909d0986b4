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
import contextlib
import copy
import datetime
import fcntl
import gc
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.util import Finalize

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import draw_bounding_boxes, make_grid

from insloc import (PIXEL_MEAN, PIXEL_STD, C4Encoder, FPNEncoder, KeyQueue, MakeGroup, PathList, Unreadable,
                    Views, batches, generator_for, grid_anchors, info_nce, momentum_update, photometric,
                    read_file, read_weights)

TORCHRUN = "RANK" in os.environ
EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff", b".ppm", b".pgm")
# What may change from a run to its continuation, since it changes nothing of what is computed.
FREE = {"data", "out", "resume", "nprocs", "workers", "device", "log_every", "save_steps", "keep", "preview",
        "compile", "trust", "timeout"}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, fail = parser.add_argument, parser.error           # fail: one line, exit status 2
    add("data", help="folder of images, searched to any depth (its `train` child alone, if there is one), or "
        "a text file of paths")
    add("--arch", choices=["c4", "fpn"], required=True, help="R50-C4 or R50-FPN [paper 4.3]")
    add("--method", choices=["moco", "ra", "cp", "insloc"], default="insloc", help="Table 3b's ladder: MoCo "
        "v2, with RoIAlign, with copy-paste, with box jitter = InsLoc [paper 5.2]")
    add("--resnet", choices=[f"resnet{depth}" for depth in (18, 34, 50, 101, 152)], default="resnet50",
        help="trunk [paper 4.3]")
    add("--epochs", type=int, default=200, help="200, or 400 [paper 5]")
    add("--batch-size", type=int, default=256, help="images a step, all processes together [paper 5: 8 x 32]")
    add("--bn-group", type=int, default=32, help="images that share BatchNorm statistics [paper 5: 32 a GPU]")
    add("--lr", type=float, default=0.03, help="at the start; cosine by epoch to 0 [paper 5]")
    add("--weight-decay", type=float, default=1e-4, help="on every parameter [paper 5]")
    add("--nesterov", action="store_true", help="Nesterov momentum [MoCo v2: off; released code: on]")
    add("--queue-size", type=int, default=65536, help="negatives a level [paper 5]")
    add("--fill-queue", action="store_true", help="take no optimizer step until real keys have replaced the "
        "queue's random ones; these steps count as others do [ours: off]")
    add("--temperature", type=float, default=0.2, help="of Eq. 2 [paper 5]")
    add("--ema", type=float, default=0.999, help="momentum of the key encoder [paper 5]")
    add("--image-size", type=int, help="side of the canvas, a multiple of 32 [released code: 256; MoCo v2: "
        "224, for moco and ra]")
    add("--fg-size", type=int, nargs=2, metavar=("LOW", "HIGH"), help="sides of a pasted crop, ends "
        "included; half the canvas to the canvas [paper 4.1: 128 to 256]")
    add("--keep-aspect", action="store_true", help="fit a crop into the drawn sides instead of stretching it "
        "to them [paper 4.1: off; released code: on]")
    add("--aug-on", choices=["foreground", "composite"], default="foreground", help="where colour jitter, "
        "blur and flip act [paper 5; composite: released code]")
    add("--backgrounds", choices=["group", "dataset"], default="group", help="other samples of the group, or "
        "two more decodes a sample [ours: as random, at no decode; dataset: released code]")
    add("--jitter-levels", choices=["p5", "all"], default="p5", help="FPN levels that pool the jittered box "
        "[released code]")
    add("--allow-one-group", action="store_true", help="although BatchNorm may leak the answer [ours: off]")
    add("--init", metavar="WEIGHTS", help="start from any file that insloc.read_weights reads [ours: none]")
    add("--trust", action="store_true", help="let --init's file run its code, as pickles may [ours: off]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[ours: a GPU if there is one]")
    add("--precision", choices=["bf16", "fp32", "fp64"], help="[ours: bf16 on a GPU that has it, else fp32]")
    add("--nprocs", type=int, help="processes to start, under torchrun none [ours: one a GPU, one on CPU]")
    add("--workers", type=int, help="loader workers a process [ours: its share of the cores, at most 8]")
    add("--seed", type=int, default=0, help="[ours: 0]")
    add("--out", help="run directory [ours: runs/METHOD_ARCH]")
    add("--resume", action="store_true", help="go on where the run in --out stopped; from step 0 if it has "
        "no checkpoint yet [ours: off]")
    add("--save-steps", type=int, help="steps between checkpoints [ours: one epoch, at least 500]")
    add("--keep", type=int, default=0, help="numbered checkpoints kept beside the last two [ours: 0]")
    add("--log-every", type=int, default=10, help="steps between log lines [MoCo v2]")
    add("--preview", type=int, metavar="N", help="only draw N samples into composites.png [ours: off]")
    add("--compile", action="store_true", help="torch.compile the encoders [ours: off]")
    add("--timeout", type=float, default=10, metavar="MIN", help="minutes to wait for another process or for "
        "data before the run ends [NCCL: 10]")
    args = parser.parse_args(argv)

    # Defaults that depend on others, and every check that needs no data.
    gpus = torch.cuda.device_count()
    if args.device == "auto":
        args.device = "cuda" if gpus else "cpu"
    if args.device == "cuda" and not gpus:
        fail("--device cuda: torch sees no GPU here; take --device cpu, or install a driver and CUDA torch")
    if not args.precision:
        args.precision = "bf16" if args.device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    pasting = args.method in ("cp", "insloc")
    args.image_size = args.image_size or (256 if pasting else 224)
    if args.image_size < 32 or args.image_size % 32:
        fail(f"--image-size {args.image_size}: must be a multiple of 32, the stride of the network")
    if args.fg_size and not pasting:
        fail(f"--fg-size: --method {args.method} pastes nothing")
    args.fg_size = (args.fg_size or [args.image_size // 2, args.image_size]) if pasting else None
    if pasting and not 1 <= args.fg_size[0] <= args.fg_size[1] <= args.image_size:
        fail("--fg-size {} {}: must be 1 <= LOW <= HIGH <= canvas {}".format(*args.fg_size, args.image_size))
    for name in "epochs batch_size bn_group queue_size log_every nprocs save_steps preview".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("lr", "weight_decay", "keep", "workers", "seed"):
        if not 0 <= (getattr(args, name) or 0) < 2 ** 63:
            fail(f"--{name.replace('_', '-')} must be a number from 0 on, and below 2**63")
    if not 0 < args.timeout < 1e6:
        fail("--timeout must be above 0")
    if not (0 <= args.ema <= 1 and 0 < args.temperature < math.inf):
        fail("--ema must be in [0, 1] and --temperature above 0")
    if args.bn_group < (3 if pasting else 2):
        fail(f"--bn-group {args.bn_group}: a group needs a sample and two backgrounds: 3 (without pasting 2)")
    if args.batch_size % args.bn_group:
        fail(f"--batch-size {args.batch_size} is not a multiple of --bn-group {args.bn_group}")
    groups = args.batch_size // args.bn_group
    if groups < 2 and not args.allow_one_group:
        fail("one BatchNorm group: no shuffle parts keys from queries, BatchNorm can leak the answer; take "
             f"--batch-size {2 * args.bn_group}, or a smaller --bn-group, or insist with --allow-one-group")
    args.nprocs = args.nprocs or (gpus if args.device == "cuda" else 1)
    if TORCHRUN:
        if not {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            fail("RANK is set, but not WORLD_SIZE, MASTER_ADDR and MASTER_PORT: start by torchrun, or unset "
                 "RANK")
        args.nprocs = int(os.environ["WORLD_SIZE"])
    if groups % args.nprocs:
        fits = max(n for n in range(1, min(groups, args.nprocs) + 1) if groups % n == 0)
        fail(f"{args.nprocs} processes cannot share {groups} groups evenly, at most --nprocs {fits} can")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", args.nprocs))
    if args.device == "cuda" and here > gpus:
        fail(f"{here} processes need as many GPUs, there are {gpus}: --nprocs {gpus}")
    if args.workers is None:                                # on the CPU the training itself needs the cores
        args.workers = max(1, min(8, len(os.sched_getaffinity(0)) // here - (args.device == "cpu")))
    args.out = args.out or f"runs/{args.method}_{args.arch}"
    return args


def find_images(args):
    """DATA -> PathList, sorted: the same folder gives every process and every run the same indices."""
    data, kept = args.data, os.path.join(args.out, "images.list")
    if not os.path.exists(data):
        sys.exit(f"pretrain.py: error: {data}: no such file or folder")
    names, missing, first = [], [], os.environ.get("RANK", "0") == "0"
    if os.path.isdir(data):
        data = data.rstrip("/") or "/"
        if os.path.isdir(os.path.join(data, "train")):
            data = os.path.join(data, "train")
            if first:
                print(f"taking {data!r} alone")
        root, seen = os.fsencode(data), set()               # seen: real folders, as a link may lead back up
        if os.path.isdir(args.out) and not os.path.samefile(args.out, data):        # its pictures are no data
            seen.add((os.stat(args.out).st_dev, os.stat(args.out).st_ino))
        for folder, subfolders, files in os.walk(root, followlinks=True):
            identity = (os.stat(folder).st_dev, os.stat(folder).st_ino)
            if identity in seen:
                subfolders.clear()
                continue
            seen.add(identity)
            names += [os.path.join(folder, name)[len(root.rstrip(b"/")) + 1:] for name in files
                      if name.lower().endswith(EXTENSIONS) and not name.startswith(b".")]
        names.sort()
    elif not os.path.isfile(data):                         # a device has no end, a pipe may have no beginning
        sys.exit(f"pretrain.py: error: {data}: neither a folder nor a file")
    else:
        root = os.path.dirname(os.fsencode(data))           # relative paths: from the folder of the list
        try:
            with open(data, "rb") as f:
                text = f.read()
        except OSError as error:
            sys.exit(f"pretrain.py: error: {error}")
        lines = text.split(b"\0") if b"\0" in text else text.replace(b"\r\n", b"\n").split(b"\n")
        names = [name for name in lines if name]
        missing = [name for name in names if not os.path.isfile(os.path.join(root, name))]
        if len(set(names)) < len(names) and first:
            print(f"WARNING: {data} names files more than once: their copies become each other's negatives")
    if args.resume and os.path.exists(kept) and holds_run(args, ("checkpoint.pth", "checkpoint_prev.pth")):
        with open(kept, "rb") as f:
            listed, names = names, f.read().split(b"\0")
        if listed != names and first:
            print(f"{args.data} has changed: the run keeps the {len(names)} images that it started with")
    elif missing:
        sys.exit(f"pretrain.py: error: {data}: {len(missing)} of {len(names)} listed files do not exist, "
                 f"the first is {os.fsdecode(missing[0])!r}")
    if len(names) < args.batch_size:
        sys.exit(f"pretrain.py: error: {data} has {len(names)} images, less than a batch of {args.batch_size}"
                 + ("" if names else f"; endings looked for: {b' '.join(EXTENSIONS).decode()}"))
    return PathList(names, os.fsdecode(root))


def holds_run(args, names=("log.jsonl", "checkpoint.pth", "checkpoint_prev.pth")):
    return any(os.path.exists(os.path.join(args.out, name)) for name in names)


def make_data(args, paths):
    """The dataset and the collate function of this method."""
    pasting = args.method in ("cp", "insloc")
    views = Views(paths, args.seed, args.image_size, args.fg_size, (1 / 2, 2) if pasting else (3 / 4, 4 / 3),
                  args.keep_aspect, args.backgrounds == "dataset")
    return views, MakeGroup(args.seed, args.image_size, pasting, jitter=args.method == "insloc",
                            flip_moves_box=pasting and args.aug_on == "composite")


def ignore_signals(_):
    """For loader workers: Ctrl-C and a cluster's SIGTERM reach them, but they must outlast the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_workers():
    """At exit: multiprocessing would send them the SIGTERM that they ignore, and wait for ever."""
    for worker in mp.active_children():
        worker.kill()


def on(device, tensor):
    """Copied to the device; unlike a plain .to(), without waiting until a GPU has done what it has to do."""
    return tensor.to(device, non_blocking=True)


def augment(view, args):
    """uint8 composites of a view -> augmented, normalised images (N, 3, S, S), where the composites are."""
    images = view["images"].to(torch.float64 if args.precision == "fp64" else torch.float32) / 255
    inside = args.method in ("cp", "insloc") and args.aug_on == "foreground"                 # Sec. 5
    images, _ = photometric(images, view, view["boxes"] if inside else None)
    mean, std = (on(images.device, torch.tensor(values, dtype=images.dtype)[:, None, None])
                 for values in (PIXEL_MEAN, PIXEL_STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def boxes_of(view, args, device):
    """The boxes to pool: true ones for keys, jittered ones for queries, FPN's on P5 alone by default."""
    if args.method == "moco":
        return None
    true, jittered = on(device, view["boxes"]), on(device, view["jittered"])
    return [true, true, true, jittered] if args.arch == "fpn" and args.jitter_levels == "p5" else jittered


def pack(view):
    """Boxes and parameters, a dict of (n, ...) tensors -> one float64 matrix (n, C), to travel as one."""
    return torch.cat([values.reshape(len(values), -1).double() for values in view.values()], dim=1)


def unpack(matrix, like):
    """The inverse of `pack`; names, shapes and dtypes are those of the dict `like`."""
    columns = matrix.split([values[0].numel() for values in like.values()], dim=1)
    return {name: part.reshape(like[name].shape).to(like[name].dtype) for name, part in zip(like, columns)}


def shuffle(rows, permutation, rank, world):
    """Shuffle-BN's way out: row p of all ranks' new rows (n, ...) is row permutation[p] of their old ones.

    All-to-all: a row travels to the one rank that will encode it.
    """
    n, device = len(rows), rows.device
    if world == 1:
        return rows[on(device, permutation)]
    mine = slice(rank * n, (rank + 1) * n)
    places, origins = permutation.argsort()[mine], permutation[mine] // n   # of old rows; ranks of new ones
    received, new = torch.empty_like(rows), torch.empty_like(rows)
    dist.all_to_all_single(received, rows[on(device, places.argsort())],
                           output_split_sizes=torch.bincount(origins, minlength=world).tolist(),
                           input_split_sizes=torch.bincount(places // n, minlength=world).tolist())
    new[on(device, origins.argsort(stable=True))] = received     # they come by rank, within a rank by place
    return new


def all_gather(rows, world):
    """(n, ...) of each rank -> (world * n, ...) on each, in the order of the ranks."""
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def all_finite(tensors):
    """A bool on their device, so that nobody waits; the largest magnitude of each shows inf and nan."""
    tensors = [x.detach() for x in tensors if x is not None and x.numel()]      # frozen: no gradient
    return torch.stack(torch._foreach_norm(tensors, ord=math.inf)).isfinite().all()


def save_composites(args, paths, count):
    """composites.png, as Fig. 3: of each sample the query, then the key, with the true box in red.

    On the query in blue the anchors that match it, thin, and the chosen one, thick. Anchors may leave the
    canvas, hence the grey frame.
    """
    views, make_group = make_data(args, paths)
    size = max(count, args.bn_group)
    try:
        group = make_group([views[key] for key in next(batches(len(paths), size, size, 1, args.seed))])
    except (Unreadable, ValueError) as error:
        sys.exit(f"pretrain.py: error: {error}")
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    anchors, frame, panels = grid_anchors(args.image_size), args.image_size // 4, []
    drawn = {name: ((augment(group[name], args).float() * std + mean) * 255).round().byte()
             for name in ("query", "key")}
    for i in range(count):
        for name in ("query", "key"):
            box, jittered = group[name]["boxes"][i:i + 1], group[name]["jittered"][i:i + 1]
            image = torch.nn.functional.pad(drawn[name][i], [frame] * 4, value=128)
            if not box.equal(jittered):
                near = torch.cat([anchors[torchvision.ops.box_iou(box, anchors)[0] > 0.5], jittered]) + frame
                image = image // 2 + draw_bounding_boxes(image, near, colors=(120, 170, 255)) // 2
                image = draw_bounding_boxes(image, jittered + frame, colors=(20, 60, 255), width=4)
            panels.append(draw_bounding_boxes(image, box + frame, colors=(255, 30, 30), width=3))
    path = os.path.join(args.out, "composites.png")
    torchvision.io.write_png(make_grid(panels, nrow=4, pad_value=255), path)
    print(f"wrote {path}", flush=True)


def save_curves(args, chance):
    """loss.png from log.jsonl: the loss and the two accuracies, each with its chance level (dotted)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [line for line in read_log(args) if "loss" in line]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, name in ((left, "loss"), (right, "acc_queue"), (right, "acc_batch")):
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    left.axhline(chance, color="grey", linestyle=":", label=f"chance {chance:.2f}")
    for label, count, color in (("queue", 1 + args.queue_size, "C0"), ("batch", args.batch_size, "C1")):
        right.axhline(1 / count, color=color, linestyle=":", label=f"chance in the {label}: 1 / {count}")
    left.set_xlabel("step"), right.set(xlabel="step", ylim=(0, 1)), left.legend(), right.legend()
    figure.savefig(os.path.join(args.out, "loss.png"), dpi=120)
    pyplot.close(figure)
    gc.collect()                        # figures hold themselves; 4 MB each would stay for many a checkpoint


def peak_memory(cuda):
    """GB: allocated on the GPU, or resident in this process."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def commit():
    """The commit that this file is of, or "unknown" outside of a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    with contextlib.suppress(OSError):
        git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
                             capture_output=True, text=True)
        return git.stdout.strip() or "unknown"
    return "unknown"


def read_log(args):
    """The objects of log.jsonl; a line torn by a kill is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError), open(os.path.join(args.out, "log.jsonl")) as f:
        for line in f:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def write_file(path, write, previous=None):
    """write(file) beside `path`, then rename: a kill or a full disk loses nothing. The old: `previous`."""
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")                        # a full disk needs the room
        raise
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(path + ".tmp", path)


def save(args, state):
    """checkpoint.pth, the one before as checkpoint_prev.pth, backbone.pth; --keep numbered copies."""
    path = os.path.join(args.out, "checkpoint.pth")
    write_file(path, lambda f: torch.save(state, f), previous=os.path.join(args.out, "checkpoint_prev.pth"))
    backbone = {name.removeprefix("resnet."): tensor for name, tensor in state["encoder_q"].items()
                if name.startswith("resnet.")}
    write_file(os.path.join(args.out, "backbone.pth"), lambda f: torch.save(backbone, f))
    if args.keep:
        copy_of = os.path.join(args.out, f"checkpoint_{state['step']:08d}.pth")
        with open(path, "rb") as source:
            write_file(copy_of, lambda f: shutil.copyfileobj(source, f))
        numbered = sorted(name for name in os.listdir(args.out) if re.fullmatch(r"checkpoint_\d+\.pth", name))
        for name in numbered[:-args.keep]:
            os.remove(os.path.join(args.out, name))


def load(args, paths, talk):
    """The newest checkpoint that can be read, None if there is none yet; it must be of the same settings."""
    found = [path for name in ("checkpoint.pth", "checkpoint_prev.pth")
             if os.path.exists(path := os.path.join(args.out, name))]
    for path in found:
        try:
            state = read_file(path)             # compares check sums, too
            if not isinstance(state, dict) or not {"step", "args", "images", "statistics"} <= state.keys():
                sys.exit(f"pretrain.py: error: {path} is no checkpoint of pretrain.py")
            break
        except (OSError, ValueError) as error:
            talk(f"{path} cannot be read: {str(error).splitlines()[0][:80]}")
    else:
        if found:
            sys.exit(f"pretrain.py: error: no readable checkpoint in {args.out}; another --out starts afresh")
        return talk(f"no checkpoint in {args.out} yet: starting at step 0")
    then, now = ({**settings, "images": digest} for settings, digest in
                 ((state["args"], state["images"]), (vars(args), paths.digest())))
    differ = sorted(f"{name} was {then.get(name, False)}, is {now[name]}"         # older than a switch: off
                    for name in now.keys() - FREE if then.get(name, False) != now[name])
    if differ:
        sys.exit(f"pretrain.py: error: cannot resume {args.out} with other settings: {'; '.join(differ)}")
    talk(f"resuming from {path}, step {state['step']}")
    return state


def main(rank, args, paths, rendezvous="env://"):
    world, cuda = args.nprocs, args.device == "cuda"
    talk = print if rank == 0 else lambda *_, **__: None

    signals = []                                        # a request to stop waits here for the end of a step
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))

    # ---- run directory, before the processes meet: a refusal is one line
    log_path = os.path.join(args.out, "log.jsonl")
    if rank == 0:
        try:
            lock = open(os.path.join(args.out, "lock"), "w")        # held until this process ends
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)        # not inherited by loader workers
        except BlockingIOError:
            sys.exit(f"pretrain.py: error: another process trains into {args.out}: give another --out")
        except OSError as error:
            sys.exit(f"pretrain.py: error: --out: {error}")
        if holds_run(args) and not args.resume:
            sys.exit(f"pretrain.py: error: {args.out} holds a run: --resume goes on, --out starts another")
    state = load(args, paths, talk) if args.resume else None
    weights = None
    if args.init and not state:
        try:
            weights = read_weights(args.init, args.trust)
        except (OSError, ValueError) as error:
            sys.exit(f"pretrain.py: error: --init {args.init}: {error}")
        if f" {args.resnet} at " not in weights.source:
            sys.exit(f"pretrain.py: error: --init {args.init}: {weights.source}, not --resnet {args.resnet}")

    # ---- device and processes
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    elif world > 1 and "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    if world > 1:                                   # gloo beside nccl: small CPU tensors wait for no GPU
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, rendezvous, rank=rank, world_size=world,
                                timeout=datetime.timedelta(minutes=args.timeout))

    def agree(value):
        """The largest of all ranks' ints: what one rank wants, all do, in the same step."""
        flag = torch.tensor([value])
        if world > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag.item()

    def leave(message, status=1):
        """Called by all ranks in the same step; rank 0 says why, and nobody leaves before it has."""
        if rank == 0:
            print(message, file=sys.stderr, flush=True)
        agree(0)
        sys.exit(status)

    settings = sorted((name, value) for name, value in vars(args).items() if name not in FREE)
    start = repr((settings, paths.digest(), state["step"] if state else 0)).encode()
    digest = int(hashlib.sha256(start).hexdigest()[:15], 16)
    if agree(digest) != -agree(-digest):
        leave("pretrain.py: error: the processes differ in images, settings or checkpoint: give all the same "
              "command and data, and an --out that they share")

    # ---- model: the same parameters and the same queue on every rank
    torch.manual_seed(args.seed)
    with_neck = args.arch == "fpn" and args.method != "moco"            # MoCo v2 trains neither neck nor head
    encoder_q = (FPNEncoder if with_neck else C4Encoder)(args.resnet)
    levels = encoder_q.levels
    queue = KeyQueue(args.queue_size, encoder_q.dim, len(levels), generator_for(args.seed, "queue"))
    if weights:
        encoder_q.resnet.load_state_dict(weights.backbone)
        encoder_q.load_state_dict(weights.extras if with_neck else {}, strict=False)
        rest = "neck and box head" if weights.extras and with_neck else "ResNet alone"
        talk(f"starting from {weights.source}: {rest}, the rest random")
        if (weights.pixel_mean, weights.pixel_std) != (PIXEL_MEAN, PIXEL_STD):
            talk("WARNING: these weights were trained with other pixel statistics than ours")
    dtype = torch.float64 if args.precision == "fp64" else torch.float32
    queue.to(device, dtype)
    encoder_q.to(device, dtype, memory_format=torch.channels_last)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)                  # starts as a copy
    optimizer = torch.optim.SGD(encoder_q.parameters(), lr=args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, nesterov=args.nesterov)
    # BatchNorm's running statistics are each rank's own, as are the groups that it normalises; nothing in
    # training reads them. Weights on disk carry their mean over the ranks.
    statistics = [b for module in (encoder_q, encoder_k) for b in module.buffers() if b.is_floating_point()]

    def set_statistics(values):
        for buffer, part in zip(statistics, values.split([b.numel() for b in statistics])):
            buffer.copy_(part.view_as(buffer))

    step, damaged = 0, set()                                # damaged: indices of files that could not be read
    if state:
        encoder_q.load_state_dict(state["encoder_q"])
        encoder_k.load_state_dict(state["encoder_k"])
        queue.load_state_dict(state["queue"])
        optimizer.load_state_dict(state["optimizer"])
        step, damaged = state["step"], set(state["damaged"])
    net = encoder_q
    if world > 1:
        net = DistributedDataParallel(encoder_q, [device] if cuda else None, broadcast_buffers=False)
    if state and len(state["statistics"]) == world:
        set_statistics(state["statistics"][rank])
    if args.compile:
        encoder_q.compile(), encoder_k.compile()

    # ---- data: a step is `groups` BatchNorm groups; a rank works through `mine` of them, one by one
    groups, epoch_steps = args.batch_size // args.bn_group, len(paths) // args.batch_size
    mine, last_step = groups // world, args.epochs * epoch_steps
    filling = math.ceil(args.queue_size / args.batch_size)
    if args.fill_queue and filling >= last_step:
        leave(f"pretrain.py: error: --fill-queue: all {last_step} steps would only fill the queue; take a "
              "smaller --queue-size, or more --epochs")
    save_steps = args.save_steps or max(epoch_steps, 500)
    views, make_group = make_data(args, paths)
    keys = batches(len(paths), args.batch_size, args.bn_group, args.epochs, args.seed, step,
                   range(rank * mine, (rank + 1) * mine))
    Finalize(None, kill_workers, exitpriority=0)
    # Forked also where this process was spawned: workers share torch and the paths, 420 MB each otherwise.
    loader = iter(torch.utils.data.DataLoader(
        views, batch_sampler=keys, collate_fn=make_group, num_workers=args.workers, pin_memory=cuda,
        worker_init_fn=ignore_signals, timeout=60 * args.timeout * (args.workers > 0),
        multiprocessing_context="fork" if args.workers else None))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # next() finds a dead worker, no handler in mid-save

    # ---- the run in numbers
    chance = len(levels) * math.log(1 + args.queue_size)
    parameters = sum(p.numel() for p in encoder_q.parameters())
    talk(f"""{args.method} {args.arch}: {args.resnet}, {parameters:,} parameters
device  {world} x {args.device}, {args.precision}, {args.workers} loader workers each
images  {len(paths):,} in {paths.root or "."!r}
step    {args.batch_size} images = {groups} BatchNorm groups x {args.bn_group}, {mine} of them a process
steps   {args.epochs} epochs x {epoch_steps:,} = {last_step:,}; {len(paths) % args.batch_size} images left out
rate    {args.lr}, by cosine to 0; momentum of the key encoder {args.ema}
queue   {args.queue_size:,} keys x {len(levels)} levels, {filling} steps fill it{" first" * args.fill_queue}
chance  loss {chance:.2f} = {len(levels)} x ln(1 + {args.queue_size}); acc_batch {1 / args.batch_size:.4f}""")
    if args.queue_size > len(paths) / 2:
        talk("WARNING: the queue exceeds half of the images: an image's own older keys become its negatives; "
             f"--queue-size {2 ** int(math.log2(len(paths) / 2))} would fit")
    if args.bn_group < 8:
        talk(f"WARNING: --bn-group {args.bn_group} gives noisy statistics, few backgrounds; take 8 or more")

    # ---- log and pictures
    if rank == 0:
        records = [r for r in read_log(args) if r["step"] <= step] if step else []  # later ones come again
        records.append({"step": step, "args": vars(args), "images": paths.digest(), "commit": commit(),
                        "torch": torch.__version__, "torchvision": torchvision.__version__,
                        "python": sys.version.split()[0]})
        write_file(log_path, lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in records))
        if step == 0:
            names = b"\0".join(paths.name(i) for i in range(len(paths)))
            write_file(os.path.join(args.out, "images.list"), lambda f: f.write(names))
        save_composites(args, paths, 8)
        from torch.utils.tensorboard import SummaryWriter
        events = SummaryWriter(args.out, purge_step=step + 1)

    def record(**values):
        if rank == 0:
            with open(log_path, "a") as f:
                f.write(json.dumps({"step": step, **values}) + "\n")

    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")
    totals = torch.zeros(len(levels) + 2, device=device, dtype=torch.float64)   # losses, acc_queue, acc_batch
    bad_step = torch.full((3,), math.inf, device=device, dtype=torch.float64)   # first not finite: loss, ...
    unreported, first_step, logged_step, waited = set(), step, step, 0.0
    started = logged_at = time.perf_counter()

    while step < last_step:
        epoch = step // epoch_steps
        for parameters in optimizer.param_groups:
            parameters["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))

        # Load this rank's groups of the step.
        before = time.perf_counter()
        try:
            batch = [next(loader) for _ in range(mine)]
        except (Unreadable, ValueError, RuntimeError, OSError, EOFError) as error:  # last two: a dead worker
            reason = (str(error).strip() or "a worker died").splitlines()[-1]     # a traceback ends so
            reason = re.sub(r"^(insloc\.Unreadable|ValueError): ", "", reason)
            sys.exit(f"pretrain.py: error: loading step {step + 1}: {reason}")
        waited += time.perf_counter() - before
        unreported.update(index for group in batch for index in group["damaged"])

        # The key encoder follows the query encoder.
        momentum_update(encoder_k, encoder_q, args.ema)

        # Shuffle the keys over the groups of all ranks, so that BatchNorm sees a key among other images than
        # its query (Shuffle-BN). Images travel as uint8, each to one rank; only embeddings come back, to all.
        permutation = torch.randperm(args.batch_size, generator=generator_for(args.seed, "shuffle", step))
        images = torch.cat([on(device, group["key"].pop("images")).permute(0, 2, 3, 1) for group in batch])
        key = {name: torch.cat([group["key"][name] for group in batch]) for name in batch[0]["key"]}
        key = unpack(shuffle(pack(key), permutation, rank, world), like=key)
        key["images"] = shuffle(images, permutation, rank, world).permute(0, 3, 1, 2)

        # Encode the keys, a group at a time.
        k = []
        for first in range(0, len(images), args.bn_group):
            group = {name: values[first:first + args.bn_group] for name, values in key.items()}
            images_k, boxes_k = augment(group, args), boxes_of(group, args, device)
            with torch.no_grad(), autocast:
                k.append(encoder_k(images_k, boxes_k))                                       # Eq. 4, 6
        k = all_gather(torch.cat(k), world)[on(device, permutation.argsort())]  # (B, L, D), as the queries

        # Encode the queries, a group at a time with a backward each: memory does not grow with the batch.
        optimizer.zero_grad()
        for i, group in enumerate(batch):
            first = (rank * mine + i) * args.bn_group
            own = torch.arange(first, first + args.bn_group, device=device)                  # rows of k
            query = {**group["query"], "images": on(device, group["query"]["images"])}
            last = world == 1 or i == mine - 1              # the ranks add up their gradients once a step
            images_q, boxes_q = augment(query, args), boxes_of(query, args, device)
            with contextlib.nullcontext() if last else net.no_sync():
                with autocast:
                    q = net(images_q, boxes_q)                                               # Eq. 3, 5
                loss, logits = info_nce(q, k[own], queue.keys, args.temperature)             # Eq. 2
                (loss.sum() / mine).backward()              # sum over levels, mean over groups
            with torch.no_grad():                           # stays on the device until a line is logged
                beats_queue = logits[:, :, 0] > logits[:, :, 1:].amax(dim=2)
                beats_batch = torch.einsum("nld,bld->nlb", q, k).argmax(dim=2) == own[:, None]
                accuracies = [beats.to(dtype).mean() for beats in (beats_queue, beats_batch)]
                totals += torch.stack([*loss, *accuracies]) / mine
        finite = [totals.isfinite().all(), all_finite(p.grad for p in encoder_q.parameters())]
        if not args.fill_queue or step >= filling:
            optimizer.step()
        finite = torch.stack([*finite, all_finite(list(encoder_q.parameters()))])       # on the device, too
        bad_step = torch.where(finite, bad_step, bad_step.clamp(max=step + 1))
        queue.enqueue(k)
        step += 1

        # What to do after this step, all ranks decide together.
        stop = agree(signals[0] if signals else 0)
        epoch_ends = step % epoch_steps == 0
        save_now = bool(stop) or step % save_steps == 0 or step == last_step
        if epoch_ends or save_now:
            found = [unreported] * world
            if world > 1:
                dist.all_gather_object(found, unreported)
            for index in sorted(set().union(*found) - damaged):
                talk(f"cannot read {paths[index]!r}: another image takes its place")
                record(damaged=paths[index])
            damaged, unreported = damaged.union(*found), set()
        too_many = epoch_ends and len(damaged) > len(paths) / 100
        save_now = save_now or too_many

        if step % args.log_every == 0 or save_now:
            if world > 1:
                dist.all_reduce(totals)
                dist.all_reduce(bad_step, op=dist.ReduceOp.MIN)
            first_bad, what = min(zip(bad_step.tolist(), ("loss is", "gradient is", "weights are")),
                                  key=lambda pair: pair[0])
            if first_bad < math.inf:
                leave(f"pretrain.py: error: in step {first_bad:.0f} the {what} not finite; {args.out} keeps "
                      "its last good checkpoint. Lower --lr, or try --precision fp32")
            *losses, acc_queue, acc_batch = (totals / world / (step - logged_step)).tolist()
            now = time.perf_counter()
            took = now - logged_at
            speed = (step - logged_step) * args.batch_size / took
            left = round((now - started) / (step - first_step) * (last_step - step))
            line = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "loss": sum(losses),
                    **{f"loss_{level}": value for level, value in zip(levels, losses)},
                    "acc_queue": acc_queue, "acc_batch": acc_batch, "images_per_s": speed,
                    "data_wait": waited / took, "queue_filled": queue.filled.item(),
                    "memory_gb": peak_memory(cuda)}
            talk(f"step {step}/{last_step}  epoch {epoch}  loss {sum(losses):.3f}  "
                 f"acc_queue {acc_queue:.3f}  acc_batch {acc_batch:.3f}  {speed:.1f} images/s  "
                 f"data wait {waited / took:.0%}  left {datetime.timedelta(seconds=left)}", flush=True)
            record(**line)
            for name, value in line.items() if rank == 0 else ():
                events.add_scalar(name, value, step)
            totals.zero_()
            logged_step, logged_at, waited = step, now, 0.0

        if save_now:
            own = torch.cat([torch.zeros(0, device=device, dtype=dtype), *(b.flatten() for b in statistics)])
            everyone = all_gather(own[None], world)                                  # (ranks, statistics)
            if not all_finite([*encoder_k.parameters(), everyone, queue.keys]):
                leave(f"pretrain.py: error: after step {step} keys or statistics are not finite; {args.out} "
                      "keeps its last good checkpoint. Lower --lr, or try --precision fp32")
            failure = None
            if rank == 0:
                set_statistics(everyone.mean(dim=0))
                try:
                    save(args, {"step": step, "args": vars(args), "images": paths.digest(),
                                "damaged": sorted(damaged), "encoder_q": encoder_q.state_dict(),
                                "encoder_k": encoder_k.state_dict(), "queue": queue.state_dict(),
                                "optimizer": optimizer.state_dict(), "statistics": everyone.cpu()})
                    save_curves(args, chance)
                    events.flush()
                except (OSError, RuntimeError) as error:    # torch.save turns a full disk into a RuntimeError
                    failure = error
                set_statistics(own)
            if agree(int(failure is not None)):
                leave(f"pretrain.py: error: cannot save step {step} ({failure}); the checkpoint before stays")
        if too_many:
            leave(f"pretrain.py: error: {len(damaged)} of {len(paths)} images cannot be read, more than 1 %: "
                  + ", ".join(repr(paths[index]) for index in sorted(damaged)[:10]))
        if stop and step < last_step:
            leave(f"stopped by {signal.Signals(stop).name} after step {step}; the same command with --resume "
                  "goes on", status=128 + stop)

    talk(f"done, {last_step} steps: weights {args.out}/backbone.pth, curves {args.out}/loss.png")
    if world > 1:
        dist.destroy_process_group()


def run(rank, args, *found):
    """`main`; what a machine may do to it anywhere ends in one line: a full disk, a process that is gone."""
    try:
        main(rank, args, *found)
    except OSError as error:
        sys.exit(f"pretrain.py: error: {error}; --resume goes on from the last checkpoint")
    except RuntimeError as error:                           # gloo has no exception of its own
        reason = (str(error).splitlines() or [""])[0]
        if re.search("out of memory|can't allocate memory", reason):
            sys.exit("pretrain.py: error: out of memory: take a smaller --bn-group (--batch-size may stay), "
                     f"--image-size, --queue-size or --resnet ({reason[:90]})")
        if not isinstance(error, dist.DistError) and not re.search("gloo/|pair closure", reason):
            raise
        sys.exit(f"pretrain.py: error: process {rank} of {args.nprocs} waits for one that hangs or is gone ("
                 f"{reason[:150]}); --resume goes on from the last checkpoint")


def launch():
    args = get_args()
    paths = find_images(args)
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        sys.exit(f"pretrain.py: error: --out: {error}")
    if args.preview:
        if holds_run(args):
            sys.exit(f"pretrain.py: error: {args.out} holds a run: give --preview another --out")
        if max(args.preview, args.bn_group) > len(paths):
            sys.exit(f"pretrain.py: error: {len(paths)} images are too few for --preview {args.preview}")
        save_composites(args, paths, args.preview)
    elif args.nprocs == 1 or TORCHRUN:              # alone, or a process of torchrun: no other is started
        run(int(os.environ["RANK"]) if TORCHRUN else 0, args, paths)
    else:
        start_processes(args, paths)


def start_processes(args, paths):
    """One process a rank; hands signals on to them and ends as they end."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(run, (args, paths, f"file://{folder}/rendezvous"), args.nprocs,
                                     join=False, start_method="spawn")

        def hand_on(number, frame):
            for process in context.processes:
                if process.is_alive():
                    os.kill(process.pid, number)

        signal.signal(signal.SIGTERM, hand_on)
        signal.signal(signal.SIGINT, hand_on)
        try:
            while not context.join(grace_period=10):
                pass
        except mp.ProcessExitedException as error:          # the rank has said why, unless it was killed
            if error.exit_code < 0:
                print(f"pretrain.py: error: {error}; --resume goes on from the last checkpoint",
                      file=sys.stderr)
            sys.exit(max(error.exit_code, 1))


if __name__ == "__main__":
    try:
        launch()
    except KeyboardInterrupt:                               # before training, where there is nothing to save
        sys.exit(130)
