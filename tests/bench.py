"""Speed and memory, each figure a ratio within one run: prints a table, appends a JSON line a row to --json.

    python tests/bench.py loader IMAGES          # a loader worker against the textbook pipeline and bare decoding
    python tests/bench.py step --arch c4         # the step against its bare encoder passes; where the rest goes
    python tests/bench.py train IMAGES           # the program against the textbook loop, end to end
    python tests/bench.py memory IMAGES          # of the recipe; of a loader worker; of 1.3 million paths
    python tests/bench.py ranks IMAGES           # bytes sent for Shuffle-BN; two processes against one
    python tests/bench.py precision IMAGES       # the loss of bf16 beside that of fp32
    python tests/bench.py long IMAGES            # 20,000 steps of a tiny net: memory and files of each process
    python tests/bench.py kills IMAGES           # the same command again and again, killed at random times

On a GPU the paper's recipe, on the CPU a ResNet-18 at 128 px; what follows `--` goes to pretrain.py. No test
asserts a time: machines differ and are shared. What is compared runs in turns, and the median ratio is printed.
"""
import argparse
import contextlib
import copy
import glob
import io
import itertools
import json
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch
import torch.distributed as dist
import torchvision
from torchvision.transforms import functional as V1

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import pretrain                                                                              # noqa: E402
from insloc import (PIXEL_MEAN, PIXEL_STD, C4Encoder, FPNEncoder, MakeGroup, PathList, Views,       # noqa: E402
                    batches, grid_anchors, info_nce, jitter_boxes, momentum_update)

CUDA = torch.cuda.is_available()
SMALL = ("--resnet resnet18 --image-size 128 --batch-size 64 --queue-size 4096 --precision bf16 --lr .012 --ema .99 "
         "--device cpu").split()


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, {gpu}, torch {torch.__version__}, {platform.system()}"


def in_turns(rounds, **work):
    """Each function once a round, in turn: {name: [a figure a round]}; the first round warms up."""
    figures = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, function in work.items():
            figure = function()
            if i:
                figures[name].append(figure)
    return figures


def ratio(over, under):
    return statistics.median(a / b for a, b in zip(over, under))


# ---- loader ------------------------------------------------------------------------------------------------

class Textbook(torch.utils.data.Dataset):
    """A sample as the released code makes it, by Pillow and torchvision: three decodes, two augmented composites."""

    def __init__(self, paths, size=256):
        self.paths, self.size, self.anchors = paths, size, grid_anchors(size)

    def __len__(self):
        return len(self.paths)

    def read(self, index):
        with PIL.Image.open(self.paths[index]) as image:
            return image.convert("RGB")

    def __getitem__(self, index):
        image, size, out, rng = self.read(index), self.size, [], random.Random(index)
        for _ in range(2):
            composite = self.read(rng.randrange(len(self))).resize((size, size), PIL.Image.BILINEAR)
            crop = torchvision.transforms.RandomResizedCrop.get_params(image, (0.2, 1.0), (0.5, 2.0))
            w, h = rng.randint(size // 2, size), rng.randint(size // 2, size)
            x, y = rng.randint(0, size - w), rng.randint(0, size - h)
            composite.paste(V1.resized_crop(image, *crop, (h, w)), (x, y))
            if rng.random() < 0.8:
                composite = torchvision.transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)(composite)
            if rng.random() < 0.2:
                composite = V1.to_grayscale(composite, 3)
            if rng.random() < 0.5:
                composite = composite.filter(PIL.ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
            if rng.random() < 0.5:
                composite, x = V1.hflip(composite), size - w - x
            out += [V1.normalize(V1.to_tensor(composite), PIXEL_MEAN, PIXEL_STD),
                    torch.tensor([x, y, x + w, y + h], dtype=torch.float32)]
        out[1] = jitter_boxes(out[1][None], self.anchors)[0]
        return out


def images_of(args):
    if args.images is None:
        sys.exit(f"bench.py: error: {args.command} needs IMAGES, a folder or a list")
    return pretrain.find_images(argparse.Namespace(data=args.images, out=os.devnull, resume=False, batch_size=32))


def loader(args):
    paths = images_of(args)
    torch.set_num_threads(1)
    rng, textbook = random.Random(0), Textbook(paths)
    some = [rng.randrange(len(paths)) for _ in range(args.count)]
    raw = [torch.from_numpy(np.fromfile(paths[i], dtype=np.uint8)) for i in some]
    files = [data.numpy().tobytes() for data in raw]

    def cpu(work):
        def timed():
            started = time.process_time()
            work()
            return (time.process_time() - started) / args.count * 1e3
        return timed

    def by_pillow():
        for data in files:
            with PIL.Image.open(io.BytesIO(data)) as image:
                image.convert("RGB")

    def process(count):
        """CPU seconds of a loader worker of `count` groups from its fork to its end, hand-over to the parent included."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        keys = itertools.islice(batches(len(paths), 32, 32, count), count)
        for group in torch.utils.data.DataLoader(Views(paths), batch_sampler=list(keys), collate_fn=MakeGroup(),
                                                 num_workers=1):
            del group
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime

    def worker():
        """An image's share; start and end of the process, which a run pays once, fall out of the difference."""
        count = -(-args.count // 8)                     # groups: four times as many images as the others have
        return (process(1 + count) - process(1)) / (32 * count) * 1e3

    times = in_turns(
        args.rounds, worker=worker,
        torchvision=cpu(lambda: [torchvision.io.decode_jpeg(r, mode=torchvision.io.ImageReadMode.RGB) for r in raw]),
        pillow=cpu(by_pillow), textbook=cpu(lambda: [textbook[i] for i in some]))
    fastest = min("torchvision", "pillow", key=lambda name: statistics.median(times[name]))
    return [{"row": "loader", **{f"ms_{name}": statistics.median(values) for name, values in times.items()},
             "textbook / ours": ratio(times["textbook"], times["worker"]),
             f"decode ({fastest}) / ours": ratio(times[fastest], times["worker"])}]


# ---- step --------------------------------------------------------------------------------------------------

def settings_of(args, *more):
    """pretrain.py's arguments: the paper's on a GPU, small ones on the CPU, then those after `--`."""
    return ["--arch", args.arch, "--nprocs", "1", *([] if CUDA else SMALL), *more, *args.pretrain]


def random_groups(settings):
    """A step's groups from random crops, through the program's own collate function."""
    size, generator = settings.image_size, torch.Generator().manual_seed(0)
    make_group = pretrain.make_data(settings, PathList([b"x"]))[1]

    def image(h, w):
        return torch.randint(256, (h, w, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)

    def sample(i):
        h, w, *more = torch.randint(settings.fg_size[0], settings.fg_size[1] + 1, (4,), generator=generator).tolist()
        return {"view_q": image(h, w), "view_k": image(*more), "background": image(size, size), "source": i,
                "damaged": [], "key": (0, 0)}

    return [make_group([sample(i) for i in range(settings.bn_group)])
            for _ in range(settings.batch_size // settings.bn_group)]


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def run_steps(settings, count, at_step, *patches):
    """pretrain.main, alone in this process, on data in memory; at_step() is called where each step begins."""
    groups = random_groups(settings)

    def loader(*_, **__):
        while True:
            yield from copy.deepcopy(groups)

    def momentum(*arguments):
        at_step()
        momentum_update(*arguments)

    paths = PathList([b"%d" % i for i in range(settings.batch_size)])                # an epoch is a step
    with tempfile.TemporaryDirectory() as settings.out, contextlib.ExitStack() as stack:
        settings.epochs, settings.log_every, settings.save_steps = count, count + 1, count + 1
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for place, name, value in [(torch.utils.data, "DataLoader", loader), (pretrain, "momentum_update", momentum),
                                   (pretrain, "save_composites", lambda *_: None), *patches]:
            stack.enter_context(mock.patch.object(place, name, value))
        pretrain.main(0, settings, paths)


def step(args):
    """Each step of the program is followed by the encoder passes alone: queries forward and backward, keys forward."""
    settings = pretrain.get_args(["none", *settings_of(args)])
    device = torch.device(settings.device)
    if CUDA:
        torch.backends.cudnn.benchmark = True
    q, k = ((FPNEncoder if args.arch == "fpn" else C4Encoder)(settings.resnet)
            .to(device, memory_format=torch.channels_last) for _ in range(2))
    if settings.compile:
        q.compile(), k.compile()
    view = random_groups(settings)[0]["query"]
    view["images"] = view["images"].to(device)
    images, boxes = pretrain.augment(view, settings), pretrain.boxes_of(view, settings, device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16")

    def bare():
        for _ in range(settings.batch_size // settings.bn_group):
            with torch.no_grad(), autocast:
                k(images, boxes)
        q.zero_grad()
        for _ in range(settings.batch_size // settings.bn_group):
            with autocast:
                out = q(images, boxes)
            out.sum().backward()

    steps, bares, parts, resumed = [], [], {}, None

    def at_step():
        nonlocal resumed
        began = now()
        if resumed is not None:
            steps.append(began - resumed)
            bare()
            bares.append(now() - began)
        resumed = now()

    run_steps(settings, args.rounds + 3, at_step)

    def timed(name, function):
        def wrapper(*arguments, **more):
            began = now()
            result = function(*arguments, **more)
            parts.setdefault(name, []).append(now() - began)
            return result
        return wrapper

    # Once more, each part by the clock, which on a GPU makes it wait: shares, not a second measurement.
    run_steps(settings, args.rounds, lambda: parts.setdefault("step", []).append(now()),
              *((pretrain, name, timed(name, getattr(pretrain, name))) for name in ("augment", "shuffle", "info_nce")),
              (pretrain.KeyQueue, "enqueue", timed("enqueue", pretrain.KeyQueue.enqueue)),
              (torch.optim.SGD, "step", timed("SGD", torch.optim.SGD.step)))
    began = parts.pop("step")
    whole = (began[-1] - began[0]) / (len(began) - 1)
    shares = {f"share of {name}": sum(values) / args.rounds / whole for name, values in parts.items()}
    return [{"row": f"step {args.arch}", "settings": " ".join(settings_of(args)),
             "ms_step": statistics.median(steps[2:]) * 1e3,
             "ms_bare": statistics.median(bares[2:]) * 1e3, "step / bare": ratio(steps[2:], bares[2:]), **shares}]


# ---- train -------------------------------------------------------------------------------------------------

def run_program(args, *more, **environment):
    """pretrain.py as a process of its own -> the lines of its log that have a loss."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, pretrain.__file__, args.images, *settings_of(args, *more), "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        if done.returncode:
            sys.exit(f"bench.py: error: {done.stderr.strip()}")
        with open(os.path.join(out, "log.jsonl")) as f:
            return [line for line in map(json.loads, f) if "loss" in line]


def textbook_loop(args, settings, paths, count):
    """MoCo's loop in float32 and contiguous memory, a whole batch at once: images/s with its loader, and without."""
    device, size = torch.device(settings.device), settings.batch_size
    q = (FPNEncoder if args.arch == "fpn" else C4Encoder)(settings.resnet).to(device)
    k, levels = copy.deepcopy(q), len(q.levels)
    queue = torch.nn.functional.normalize(torch.randn(levels, 128, settings.queue_size, device=device), dim=1)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(Textbook(paths, settings.image_size), size, shuffle=True, drop_last=True,
                                         num_workers=settings.workers, pin_memory=CUDA)

    def batches_for_ever():
        while True:
            yield from loader

    def one_step(batch):
        images_q, boxes_q, images_k, boxes_k = (x.to(device, non_blocking=True) for x in batch)
        with torch.no_grad():
            for a, b in zip(k.parameters(), q.parameters()):
                a.mul_(settings.ema).add_(b, alpha=1 - settings.ema)
            order = torch.randperm(size, device=device)
            keys = k(images_k[order], boxes_k[order])[order.argsort()]
        loss, _ = info_nce(q(images_q, boxes_q), keys, queue, settings.temperature)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        queue[:, :, :size] = keys.permute(1, 2, 0)

    source = batches_for_ever()
    batch = next(source)
    for _ in range(3):
        one_step(batch)
    began = now()
    for _ in range(count):
        one_step(batch)
    alone = now()
    for _ in range(4 * settings.workers):                   # what the loader had prepared meanwhile is no measure
        next(source)
    loading = now()
    for _ in range(count):
        one_step(next(source))
    return count * size / (now() - loading), count * size / (alone - began)


def train(args):
    paths = images_of(args)
    settings = pretrain.get_args([args.images, *settings_of(args)])
    epochs = str(-(-(args.count // 10 + 20) // (len(paths) // settings.batch_size)))
    lines = run_program(args, "--epochs", epochs, "--log-every", "10")[1:]                      # the first warms up
    theirs, their_step = textbook_loop(args, settings, paths, max(3, args.count // 40))
    times, resumed = [], []

    def at_step():
        times.append(now() - resumed[0]) if resumed else None
        resumed[:] = [now()]

    run_steps(settings, 8, at_step)
    ours = statistics.median(line["images_per_s"] for line in lines)
    our_step = settings.batch_size / statistics.median(times[2:])
    return [{"row": f"train {args.arch}", "settings": " ".join(settings_of(args)), "images/s": ours,
             "data_wait": statistics.median(line["data_wait"] for line in lines), "textbook images/s": theirs,
             "ours / textbook": ours / theirs, "step alone, ours / textbook": our_step / their_step}]


# ---- memory ------------------------------------------------------------------------------------------------

def proportional(pid):
    """MB of a process's memory, shared pages divided among those who share them."""
    with open(f"/proc/{pid}/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("Pss:")) / 1e3


class Touch(torch.utils.data.Dataset):
    """Reads paths all over the index, as training does."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return sum(len(self.paths[i]) for i in range(index, len(self.paths), 64 * 13))


def index_rank(rank, paths, queue, go_on):
    loader = iter(torch.utils.data.DataLoader(Touch(paths), num_workers=8, multiprocessing_context="fork"))
    for _ in range(63):
        next(loader)
    queue.put(sum(proportional(pid) for pid in [os.getpid(), *(w.pid for w in loader._workers)]))
    go_on.wait()


def index_memory(paths, ranks=8):
    """MB that 8 ranks with 8 loader workers each have, all together."""
    context = torch.multiprocessing.get_context("spawn")
    queue, go_on = context.Queue(), context.Event()
    run = torch.multiprocessing.start_processes(index_rank, (paths, queue, go_on), ranks, join=False)
    total = sum(queue.get(timeout=300) for _ in range(ranks))
    go_on.set()
    run.join()
    return total


def memory(args):
    rows = []
    for arch in ("c4", "fpn"):
        args.arch, row = arch, {"row": f"memory {arch}", "GB batch 256": "not run: no GPU",
                                   "GB batch 512": "not run: no GPU"}
        for batch in (256, 512) if CUDA else ():
            settings = pretrain.get_args(["none", *settings_of(args), "--batch-size", str(batch)])
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
            run_steps(settings, 3, lambda: None)
            row[f"GB batch {batch}"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row)

    paths = images_of(args)
    keys = list(batches(len(paths), 32, 32, 20 + args.count * 32 // len(paths)))[:args.count]
    loader = iter(torch.utils.data.DataLoader(Views(paths), batch_sampler=keys, collate_fn=MakeGroup(), num_workers=1))
    pid, megabytes = loader._workers[0].pid, []
    for _ in range(len(keys) - 3):
        next(loader)
        with open(f"/proc/{pid}/status") as f:
            megabytes.append(next(int(line.split()[1]) / 1e3 for line in f if line.startswith("RssAnon")))
    rows.append({"row": "memory worker", "groups of 32": len(megabytes),
                 "MB after a tenth": megabytes[len(megabytes) // 10],
                 "MB at the end": megabytes[-1], "MB at most": max(megabytes)})

    with tempfile.TemporaryDirectory() as folder:
        for i in range(1300):
            os.mkdir(os.path.join(folder, f"n{i:08d}"))
        for i in range(1000):
            open(os.path.join(folder, f"n01440764_{i:05d}.JPEG"), "w").close()
        with open(os.path.join(folder, "list.txt"), "w") as f:
            f.writelines(f"n{i:08d}/../n01440764_{j:05d}.JPEG\n" for i in range(1300) for j in range(1000))
        began = time.perf_counter()
        index = pretrain.find_images(argparse.Namespace(data=f.name, out=os.devnull, resume=False, batch_size=32))
        took = time.perf_counter() - began
    many, few = index_memory(index), index_memory(PathList([index.name(i) for i in range(1000)]))
    rows.append({"row": "memory index", "paths": len(index), "s to build": took,
                 "MB of the index": (index.data.nbytes + index.ends.nbytes) / 1e6,
                 "MB more in 8 x (1 + 8) processes than with 1000 paths": many - few})
    return rows


# ---- ranks -------------------------------------------------------------------------------------------------

def counting_rank(rank, settings, paths, rendezvous, queue):
    """pretrain.main, with what goes through torch.distributed counted: bytes that leave this rank, by their kind."""
    sent, to_all, to_each, reduce = {}, dist.all_gather, dist.all_to_all_single, dist.all_reduce

    def all_to_all(received, rows, output_split_sizes, input_split_sizes):
        kind = "images" if rows.dtype == torch.uint8 else "boxes and parameters"
        away = sum(input_split_sizes) - input_split_sizes[rank]
        sent[kind] = sent.get(kind, 0) + away * rows[0].nbytes
        return to_each(received, rows, output_split_sizes=output_split_sizes, input_split_sizes=input_split_sizes)

    def all_gather(parts, rows):
        kind = "embeddings" if rows.dim() == 3 else "statistics"
        sent[kind] = sent.get(kind, 0) + rows.nbytes * (settings.nprocs - 1)
        return to_all(parts, rows)

    def all_reduce(values, *arguments, **more):
        sent["flags and totals"] = sent.get("flags and totals", 0) + values.nbytes
        return reduce(values, *arguments, **more)

    dist.all_to_all_single, dist.all_gather, dist.all_reduce = all_to_all, all_gather, all_reduce
    pretrain.main(rank, settings, paths, rendezvous)
    queue.put(sent)


def ranks(args):
    paths, world, size, rows = images_of(args), 8, 64, []
    with tempfile.TemporaryDirectory() as out:
        settings = pretrain.get_args(f"none --arch c4 --resnet resnet18 --image-size {size} --batch-size 32 --bn-group 4 "
                                     f"--queue-size 64 --epochs 2 --workers 0 --nprocs {world} --device cpu --precision "
                                     f"fp32 --out {out}".split())
        steps = 2 * (len(paths) // 32)
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        run = torch.multiprocessing.start_processes(counting_rank, (settings, paths, f"file://{out}/meet", queue), world,
                                                    join=False)
        sent = [queue.get() for _ in range(world)]
        run.join()
    mean = {kind: sum(counts[kind] for counts in sent) / world / steps for kind in sent[0]}
    floats = (world - 1) * 32 // world * 3 * size ** 2 * 4
    rows.append({"row": "ranks, bytes a rank and step", "settings": f"{world} ranks, 32 images of {size} px, {steps} steps",
                 **{f"sent, {kind}": value for kind, value in mean.items()}, "all-gather of float images": floats,
                 "all-gather / ours": floats / mean["images"]})
    args.arch = "c4"
    speeds = in_turns(args.rounds, **{f"processes_{n}": lambda n=n: run_program(
        args, "--epochs", "1", "--nprocs", str(n), "--workers", "1", "--log-every", "2",
        OMP_NUM_THREADS="1")[-1]["images_per_s"] for n in (1, 2)})
    rows.append({"row": "ranks, speed", "settings": " ".join(settings_of(args)),
                 **{f"images/s {name}": statistics.median(values) for name, values in speeds.items()},
                 "two / one": ratio(speeds["processes_2"], speeds["processes_1"])})
    return rows


# ---- precision ---------------------------------------------------------------------------------------------

def precision(args):
    paths = images_of(args)
    size = pretrain.get_args(["none", *settings_of(args)]).batch_size
    more = ["--epochs", str(-(-200 // (len(paths) // size))), "--log-every", "20"]
    half, full = ([line["loss"] for line in run_program(args, *more, "--precision", name)][:10]
                  for name in ("bf16", "fp32"))
    return [{"row": f"precision {args.arch}", "settings": " ".join(settings_of(args, *more)),
             "bf16, means of 20 steps": [round(x, 4) for x in half], "fp32, the same": [round(x, 4) for x in full],
             "largest difference, %": max(abs(a / b - 1) for a, b in zip(half, full)) * 100}]


# ---- long --------------------------------------------------------------------------------------------------

class Tiny(torchvision.models.ResNet):
    """A ResNet-18 of one block a stage and an eighth of the width: 20,000 steps in minutes."""

    def __init__(self, weights=None):
        super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        self.fc = torch.nn.Linear(64, 1)

    def _make_layer(self, block, planes, *rest, **options):
        return super()._make_layer(block, planes // 8, *rest, **options)


def launch_tiny():
    torchvision.models.resnet18 = Tiny
    pretrain.launch()


PROGRAM = [sys.executable, "-c", f"import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); "
           "import bench; bench.launch_tiny()"]
TINY = ("--arch c4 --resnet resnet18 --image-size 32 --batch-size 6 --bn-group 3 --queue-size 32 --lr .001 --workers 1 "
        "--nprocs 1 --device cpu").split()


def own_memory(pid):
    """MB of a process that no file backs: of torch's libraries the share falls and rises with others that use them."""
    with open(f"/proc/{pid}/status") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith(("RssAnon", "RssShmem"))) / 1000


def long(args):
    """20,000 steps through the whole program; every ten seconds memory and open files of each of its processes."""
    paths = images_of(args)
    epochs = -(-args.steps // (len(paths) // 6))
    with tempfile.TemporaryDirectory() as out:
        command = [*PROGRAM, *TINY, "--epochs", str(epochs), *"--save-steps 500 --keep 3 --log-every 100".split()]
        run = subprocess.Popen([*command, "--out", out, args.images],
                               stdout=subprocess.DEVNULL)
        seen = []                                                           # (MB, open files) of main and worker
        while run.poll() is None:
            time.sleep(10)
            with contextlib.suppress(OSError):
                with open(f"/proc/{run.pid}/task/{run.pid}/children") as f:
                    pids = [run.pid, *map(int, f.read().split())]
                seen.append([(own_memory(pid), len(os.listdir(f"/proc/{pid}/fd"))) for pid in pids])
        with open(os.path.join(out, "log.jsonl")) as f:
            lines = [line for line in map(json.loads, f) if "loss" in line]
        kept, log_size = len(glob.glob(os.path.join(out, "checkpoint_0*"))), os.path.getsize(f.name)
    seen = [sample for sample in seen if len(sample) == 2]
    tenth, last = seen[len(seen) // 10], seen[-2]
    return [{"row": "long", "status": run.returncode, "steps": lines[-1]["step"], "minutes": len(seen) / 6,
             **{f"{who}, {what}, {when}": sample[i][j] for i, who in enumerate(("main", "worker"))
                for j, what in enumerate(("MB", "open files"))
                for when, sample in (("after a tenth", tenth), ("at the end", last))},
             "bytes of log a line": log_size / len(lines), "numbered checkpoints": kept}]


def kills(args):
    """The run killed at random times, started again by the same command until it is done; and the run left alone."""
    rng, killed, early, states = random.Random(args.seed), [], 0, []                    # early: no checkpoint yet
    with tempfile.TemporaryDirectory() as folder:
        names = os.path.join(folder, "images.txt")
        with open(names, "w") as f:
            paths = images_of(args)
            f.write("\n".join(os.path.abspath(paths[i]) for i in range(60)))
        for out, left_alone in ((f"{folder}/whole", True), (f"{folder}/killed", False)):
            command = [*PROGRAM, names, *TINY, "--epochs", "100", "--save-steps", "7", "--resume",
                       "--out", out]
            while True:
                run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       start_new_session=True)
                try:
                    run.wait(None if left_alone or len(killed) == 60 else rng.uniform(0.5, 15))
                    break
                except subprocess.TimeoutExpired:
                    number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
                    os.killpg(run.pid, number)
                    killed.append((number.name, run.wait()))
                    early += not os.path.exists(os.path.join(out, "checkpoint.pth"))
            states.append({**pretrain.read_file(os.path.join(out, "checkpoint.pth")), "args": None})
    parts = ("step", "encoder_q", "encoder_k", "queue", "optimizer", "statistics")
    return [{"row": "kills", "status": run.returncode, "steps": states[1]["step"], "kills": len(killed),
             "before a checkpoint": early, "by signal": ", ".join(f"{name} {sum(n == name for n, _ in killed)}"
                                                                  for name in ("SIGKILL", "SIGTERM", "SIGINT")),
             "same bits": all(repr(flat(states[0][part])) == repr(flat(states[1][part])) for part in parts)}]


def flat(x):
    """Tensors in dicts and lists as bytes."""
    if isinstance(x, dict):
        return {name: flat(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [flat(value) for value in x]
    return x.numpy().tobytes() if isinstance(x, torch.Tensor) else x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["loader", "step", "train", "memory", "ranks", "precision", "long", "kills"])
    add("images", nargs="?", help="a folder or list of JPEGs, of the size that ImageNet has them")
    add("--arch", choices=["c4", "fpn"], default="c4")
    add("--json", help="append the rows to this file")
    add("--rounds", type=int, default=5)
    add("--count", type=int, default=320, help="images a round (loader), groups (memory), a tenth of steps (train)")
    add("--steps", type=int, default=20_000, help="of long")
    add("--seed", type=int, default=0, help="of kills")
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        ours, theirs = ours[:ours.index("--")], ours[ours.index("--") + 1:]
    args = parser.parse_args(ours)
    args.pretrain = theirs
    for row in globals()[args.command](args):
        row = {"machine": machine(), "command": "python " + " ".join(sys.argv), **row}
        for name, value in row.items():
            print(f"{name:28s} {value:.4g}" if isinstance(value, float) else f"{name:28s} {value}")
        print(flush=True)
        if args.json:
            with open(args.json, "a") as f:
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
