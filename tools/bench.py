"""Speed and memory: a figure is a ratio within one run where that is possible.

    python tools/bench.py train [IMAGES]      # the program against the textbook loop, end to end
    python tools/bench.py loader [IMAGES]     # a loader worker against the textbook's and bare decoding
    python tools/bench.py step --arch c4      # the step against its bare encoder passes
    python tools/bench.py compile --arch c4   # the step without and with --compile
    python tools/bench.py precision [IMAGES]  # the loss of bf16 beside that of fp32
    python tools/bench.py memory [IMAGES]     # of the GPU; of a loader worker
    python tools/bench.py ranks [IMAGES]      # two processes of one thread against one, on the CPU
    python tools/bench.py kernels             # kernels and bytes of a step's parts, counted without a GPU
    python tools/bench.py parts --arch c4     # the same parts by the clock, on a GPU by torch.profiler, too
    python tools/bench.py gpu [IMAGES]        # `make gpu`: tests, then rows by worth, nine minutes in all

It prints the rows of a table, and appends each to --json as soon as it is measured. On a GPU it takes the
paper's recipe, on the CPU a ResNet-18 at 128 px; --tiny shows only whether it runs. What follows `--` goes to
pretrain.py. Without IMAGES, pictures are made up. What is compared runs in one process or in turns, and the
median is printed. No test asserts a time, since machines differ and are shared.
"""
import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
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
from torchvision import io as image_io
from torchvision import transforms as T
from torchvision.transforms import functional as V1

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import fake_cuda                                                                             # noqa: E402
import insloc                                                                                # noqa: E402
import pretrain                                                                              # noqa: E402
import toy                                                                                   # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
SMALL = "--resnet resnet18 --image-size 128 --batch-size 64 --queue-size 4096 --lr .012 --ema .99"
TINY = "--resnet narrow18 --image-size 64 --batch-size 8 --bn-group 4 --queue-size 16 --workers 1"
COUNTS = {"loader": 320, "train": 50, "precision": 200, "memory": 88}
median = statistics.median


def machine():
    with open("/proc/cpuinfo") as f:
        names = [line.split(":")[1].strip() for line in f if line.startswith("model name")] or ["unknown CPU"]
    gpu = torch.cuda.get_device_name() if CUDA else "no GPU"
    return f"{len(os.sched_getaffinity(0))} cores of {names[0]}, {gpu}, torch {torch.__version__}"


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


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
    return median(a / b for a, b in zip(over, under))


def make_up_picture(folder, number):
    """A JPEG of ImageNet's usual size: clouds of colour with grain."""
    rng = np.random.default_rng(number)
    clouds = PIL.Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((500, 375))
    grainy = np.asarray(clouds) + rng.normal(0, 12, (375, 500, 1))
    PIL.Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(f"{folder}/{number:05d}.jpg", quality=90)


def make_up_pictures(folder, count):
    os.makedirs(folder)
    with multiprocessing.get_context("fork").Pool() as pool:
        pool.map(functools.partial(make_up_picture, folder), range(count))


def images_of(args):
    return pretrain.find_data(argparse.Namespace(data=args.images, out=os.devnull, resume=False, batch_size=1,
                                                 preview=None))[0]


def settings_of(args, *more):
    """pretrain.py's arguments: the paper's on a GPU, small ones on the CPU, then those after `--`."""
    small = TINY.split() if args.tiny else [] if CUDA else SMALL.split()
    return ["--arch", args.arch, "--nprocs", "1", *small, *more, *args.pretrain]


# ---- The textbook: the released code's pipeline and MoCo's loop -------------------------------------------

class Textbook(torch.utils.data.Dataset):
    """A sample by Pillow and torchvision, as the release makes it: three decodes, two composites."""

    def __init__(self, paths, size=256):
        self.paths = paths
        self.size = size
        self.anchors = insloc.grid_anchors(size)
        blur = T.Lambda(lambda image: image.filter(PIL.ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
        self.augment = T.Compose([T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                                  T.RandomGrayscale(0.2), T.RandomApply([blur], 0.5)])

    def __len__(self):
        return len(self.paths)

    def read(self, index):
        with PIL.Image.open(os.fsdecode(self.paths[index])) as image:
            return image.convert("RGB")

    def __getitem__(self, index):
        rng = random.Random(index)
        image = self.read(index)
        size = self.size
        sample = []
        for _ in range(2):
            composite = self.read(rng.randrange(len(self))).resize((size, size), PIL.Image.BILINEAR)
            crop = T.RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))
            w, h = rng.randint(size // 2, size), rng.randint(size // 2, size)
            x, y = rng.randint(0, size - w), rng.randint(0, size - h)
            composite.paste(V1.resized_crop(image, *crop, (h, w)), (x, y))
            composite = self.augment(composite)
            if rng.random() < 0.5:
                composite = V1.hflip(composite)
                x = size - w - x
            sample.append(V1.normalize(V1.to_tensor(composite), insloc.PIXEL_MEAN, insloc.PIXEL_STD))
            sample.append(torch.tensor([x, y, x + w, y + h], dtype=torch.float32))
        sample[1] = insloc.jitter_boxes(sample[1][None], self.anchors)[0]
        return sample


def textbook_loop(args, settings, paths, count):
    """A whole batch at once, in float32: images/s with its loader, and without."""
    q = make_encoder(args.arch, settings, DEVICE)
    k = copy.deepcopy(q)
    size = settings.batch_size
    queue = insloc.KeyQueue(settings.queue_size, 128, len(q.levels)).to(DEVICE).keys
    optimizer = torch.optim.SGD(q.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(Textbook(paths, settings.image_size), size, shuffle=True,
                                         drop_last=True, num_workers=settings.workers, pin_memory=CUDA,
                                         prefetch_factor=1 if settings.workers else None)
    source = itertools.chain.from_iterable(itertools.repeat(loader))

    def one_step(batch):
        images_q, boxes_q, images_k, boxes_k = (x.to(DEVICE, non_blocking=True) for x in batch)
        with torch.no_grad():
            for a, b in zip(k.parameters(), q.parameters()):
                a.mul_(settings.ema).add_(b, alpha=1 - settings.ema)
            order = torch.randperm(size, device=DEVICE)
            keys = k(images_k[order], boxes_k[order])[order.argsort()]
        loss, _ = insloc.info_nce(q(images_q, boxes_q), keys, queue, settings.temperature)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        queue[:, :, :size] = keys.permute(1, 2, 0)

    batch = next(source)
    for _ in range(3):
        one_step(batch)
    began = now()
    for _ in range(count):
        one_step(batch)
    alone = now() - began
    for _ in range(settings.workers):                   # what the loader had prepared meanwhile is no measure
        next(source)
    began = now()
    for _ in range(count):
        one_step(next(source))
    return count * size / (now() - began), count * size / alone


# ---- The program: as a process of its own, and its loop alone ---------------------------------------------

def run_program(args, *more, **environment):
    """pretrain.py -> the lines of its log that have a loss."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, pretrain.__file__, args.images, *settings_of(args, *more), "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        if done.returncode:
            sys.exit(f"bench.py: error: {done.stderr.strip()}")
        with open(os.path.join(out, "log.jsonl")) as f:
            return [line for line in map(json.loads, f) if "loss" in line]


def random_groups(settings):
    """A step's groups from random crops, through the program's own collate function."""
    rng = np.random.default_rng(0)
    make_group = pretrain.make_data(settings, [])[1]
    canvas = settings.image_size
    low, high = settings.fg_size or (canvas, canvas)

    def image(h, w):
        return torch.from_numpy(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).permute(2, 0, 1)

    def sample(i):
        query = image(*rng.integers(low, high + 1, 2))
        key = image(*rng.integers(low, high + 1, 2))
        return {"query": query, "key": key, "backgrounds": [image(canvas, canvas)], "source": i,
                "seeds": (0, 0)}

    groups = []
    for _ in range(settings.batch_size // settings.bn_group):
        groups.append(make_group([sample(i) for i in range(settings.bn_group)]))
    return torch.utils.data._utils.pin_memory.pin_memory(groups) if CUDA else groups


def run_steps(settings, count, at_step):
    """pretrain.main alone, on data in memory; at_step() is called where each step begins."""
    groups = random_groups(settings)

    def momentum_update(*arguments):
        at_step()
        insloc.momentum_update(*arguments)

    settings.epochs = count                                             # an epoch is a step
    settings.log_every = settings.save_steps = count + 1
    paths = np.array([b"%d" % i for i in range(settings.batch_size)])
    patches = [(pretrain.stage, "load", lambda *_: itertools.cycle(groups)),
               (pretrain.stage, "collect_signals", list), (pretrain, "momentum_update", momentum_update),
               (pretrain, "save_composites", lambda *_: None), (pretrain, "save", lambda *_: None),
               (pretrain, "save_curves", lambda *_: None)]
    with tempfile.TemporaryDirectory() as settings.out, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for place, name, value in patches:
            stack.enter_context(mock.patch.object(place, name, value))
        pretrain.main(0, DEVICE, settings, paths, "none")


def step_seconds(settings, count):
    """Of each step but the first two and the last."""
    began = []
    run_steps(settings, count + 3, lambda: began.append(now()))
    return [after - before for before, after in zip(began, began[1:])][2:]


def worker_groups(paths, count):
    """`count` groups of 32 images, by the program's dataset and collate function, from one worker."""
    addresses = itertools.islice(insloc.batches(len(paths), 32, 32, count), count)
    return torch.utils.data.DataLoader(insloc.Views(paths), batch_sampler=list(addresses), num_workers=1,
                                       collate_fn=insloc.MakeGroup())


def make_encoder(arch, settings, device):
    if arch == "fpn":
        encoder = insloc.FPNEncoder(settings.resnet)
    else:
        encoder = insloc.C4Encoder(settings.resnet, roi_size=settings.roi_size)
    return encoder.to(device, memory_format=torch.channels_last)


# ---- Rows: each is measured, then yielded ----------------------------------------------------------------

def loader(args):
    """CPU time an image. A worker's is that of its process, hand-over to the parent included."""
    paths = images_of(args)
    torch.set_num_threads(1)
    textbook = Textbook(paths)
    some = random.Random(0).choices(range(len(paths)), k=args.count)
    raw = [torch.from_numpy(np.fromfile(os.fsdecode(paths[i]), dtype=np.uint8)) for i in some]

    def timed(work):
        def once():
            started = time.process_time()
            for i in range(args.count):
                work(i)
            return (time.process_time() - started) / args.count * 1e3
        return once

    def process(count):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        for group in worker_groups(paths, count):
            del group
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime

    groups = -(-args.count // 8)                # a process's start and end fall out of a difference
    times = in_turns(
        args.rounds, worker=lambda: (process(1 + groups) - process(1)) / (32 * groups) * 1e3,
        decode=timed(lambda i: image_io.decode_jpeg(raw[i], mode=image_io.ImageReadMode.RGB)),
        textbook=timed(lambda i: textbook[some[i]]))
    row = {"row": "loader"}
    for name, values in times.items():
        row[f"ms an image, {name}"] = median(values)
    row["textbook / ours"] = ratio(times["textbook"], times["worker"])
    row["decode / ours"] = ratio(times["decode"], times["worker"])
    yield row


def train(args):
    settings = pretrain.get_args([args.images, *settings_of(args)])
    paths = images_of(args)
    epochs = -(-args.count // (len(paths) // settings.batch_size))
    every = max(1, args.count // 5)
    lines = run_program(args, "--epochs", str(epochs), "--log-every", str(every))[1:]   # the first warms up
    ours = median([line["images_per_s"] for line in lines])
    yield {"row": f"train {args.arch}", "images/s": ours,
           "data_wait": median([line["data_wait"] for line in lines])}
    our_step = settings.batch_size / median(step_seconds(settings, args.rounds))
    theirs, their_step = textbook_loop(args, settings, paths, max(3, args.count // 6))
    yield {"row": f"train {args.arch}, textbook", "images/s": theirs, "ours / textbook": ours / theirs,
           "step alone, ours / textbook": our_step / their_step}


def step(args):
    """Each step is followed by the encoder passes alone: keys forward, queries forward and backward."""
    settings = pretrain.get_args(["none", *settings_of(args)])
    q = make_encoder(args.arch, settings, DEVICE)
    k = make_encoder(args.arch, settings, DEVICE)
    view = random_groups(settings)[0]["query"]
    images = pretrain.augment(view, settings, DEVICE)
    boxes = pretrain.boxes_of(view, settings, DEVICE)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=settings.precision == "bf16")
    steps = []
    bares = []
    resumed = []

    def bare():
        q.zero_grad()
        for _ in range(settings.batch_size // settings.bn_group):
            with torch.no_grad(), autocast:
                k(images, boxes)
            with autocast:
                out = q(images, boxes)
            out.sum().backward()

    def at_step():
        began = now()
        if resumed:
            steps.append(began - resumed[-1])
            bare()
            bares.append(now() - began)
        resumed.append(now())

    run_steps(settings, args.rounds + 3, at_step)
    yield {"row": f"step {args.arch}", "images/s": settings.batch_size / median(steps[2:]),
           "images/s, bare": settings.batch_size / median(bares[2:]), "ms": median(steps[2:]) * 1e3,
           "ms, bare": median(bares[2:]) * 1e3, "step / bare": ratio(steps[2:], bares[2:])}


def compile(args):
    settings = pretrain.get_args(["none", *settings_of(args)])
    without = median(step_seconds(settings, args.rounds)) * 1e3
    yield {"row": f"compile {args.arch}", "ms, not compiled": without}
    settings = pretrain.get_args(["none", *settings_of(args, "--compile")])
    compiled = median(step_seconds(settings, args.rounds)) * 1e3
    yield {"row": f"compile {args.arch}", "ms, compiled": compiled, "without / with": without / compiled}


def precision(args):
    size = pretrain.get_args(["none", *settings_of(args)]).batch_size
    epochs = -(-args.count // (len(images_of(args)) // size))
    more = ["--epochs", str(epochs), "--log-every", str(max(1, args.count // 10))]
    losses = {}
    for name in ("bf16", "fp32"):
        lines = run_program(args, *more, "--precision", name)
        losses[name] = [line["loss"] for line in lines][:10]
        yield {"row": f"precision {args.arch}, {name}", "steps": args.count,
               "loss of each tenth": losses[name]}
    apart = [abs(half / full - 1) for half, full in zip(losses["bf16"], losses["fp32"])]
    yield {"row": f"precision {args.arch}", "largest difference, %": max(apart) * 100}


def memory(args):
    for args.arch in ("c4", "fpn") if CUDA else ():
        for groups in (8, 16):
            settings = pretrain.get_args(["none", *settings_of(args)])
            settings.batch_size = groups * settings.bn_group
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run_steps(settings, 3, lambda: None)
            yield {"row": f"memory {args.arch}", "groups": groups,
                   "GB": torch.cuda.max_memory_allocated() / 1e9}

    groups = iter(worker_groups(images_of(args), args.count))
    megabytes = []
    for _ in range(args.count - 3):                     # the worker has ended when the last ones are taken
        next(groups)
        with open(f"/proc/{groups._workers[0].pid}/status") as f:
            found = [line.split()[1] for line in f if line.startswith("RssAnon")]
        megabytes.append(int(found[0]) / 1e3)
    yield {"row": "memory worker", "groups of 32": len(megabytes),
           "MB after a tenth": megabytes[len(megabytes) // 10], "MB at the end": megabytes[-1]}


def ranks(args):
    def speed(count):
        more = f"--epochs 1 --nprocs {count} --workers 1 --log-every 2 --device cpu --precision fp32"
        return run_program(args, *more.split(), OMP_NUM_THREADS="1")[-1]["images_per_s"]

    speeds = in_turns(args.rounds, one=lambda: speed(1), two=lambda: speed(2))
    yield {"row": "ranks", "images/s, one": median(speeds["one"]), "images/s, two": median(speeds["two"]),
           "two / one": ratio(speeds["two"], speeds["one"])}


def measure_parts(arch, settings, device, measure):
    """measure(name, work) runs each part of a step, of one group, and returns what work() returns."""
    encoder_q = make_encoder(arch, settings, device)
    encoder_k = make_encoder(arch, settings, device)
    queue = insloc.KeyQueue(settings.queue_size, 128, len(encoder_q.levels)).to(device)
    optimizer = torch.optim.SGD(encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4,
                                foreach=device.type == "cuda")          # as by default, for fake tensors, too
    view = random_groups(settings)[0]["query"]
    view["images"] = view["images"].to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")

    def forward(encoder):
        with autocast:
            return encoder(images, pretrain.boxes_of(view, settings, device))

    images = measure("augment", lambda: pretrain.augment(view, settings, device))
    with torch.no_grad():
        k = measure("key forward", lambda: forward(encoder_k))
    q = measure("query forward", lambda: forward(encoder_q))
    loss, _ = measure("loss", lambda: insloc.info_nce(q, k, queue.keys))
    measure("backward", lambda: loss.sum().backward())
    optimizer.step()                                    # the first one makes the momentum's buffers
    measure("optimizer", optimizer.step)
    measure("momentum update", lambda: insloc.momentum_update(encoder_k, encoder_q))
    measure("enqueue", lambda: queue.enqueue(k.repeat(settings.batch_size // len(k), 1, 1)))
    return encoder_q, queue


def count_kernels(arch):
    """The rows of `kernels` for an encoder."""
    gpu = fake_cuda.FakeGPU()
    rows = []
    saved = {}

    def keep(x):                                        # what autograd saves for backward, each memory once
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    def measure(name, work):
        gpu.start_counting()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            result = work()
        if name != "backward":                          # it does not run on fake tensors
            rows.append({"row": f"kernels {arch}, {name}", "kernels": gpu.kernels, "GB": gpu.bytes / 1e9,
                         "copies to the GPU": len(gpu.copies)})
        return result

    with fake_cuda.gpu_here(gpu), gpu:
        settings = pretrain.get_args(["none", "--arch", arch, "--nprocs", "1", "--device", "cuda"])
        encoder, queue = measure_parts(arch, settings, torch.device("cuda", 0), measure)
        fixed_bytes = queue.keys.nbytes
        saved.pop(queue.keys.untyped_storage()._cdata, None)
        for p in encoder.parameters():
            fixed_bytes += 4 * p.nbytes
            saved.pop(p.untyped_storage()._cdata, None)
    saved_bytes = sum(saved.values())
    rows.append({"row": f"kernels {arch}, memory", "GB saved for backward": saved_bytes / 1e9,
                 "GB with parameters x 4 and queue": (saved_bytes + fixed_bytes) / 1e9})
    return rows


def kernels(args):
    """As torch calls them: an indexed tensor counts whole, a _foreach_ as one. Backward cannot run."""
    why = "hide the GPU: CUDA_VISIBLE_DEVICES= python tools/bench.py kernels" if CUDA else fake_cuda.missing()
    if why:
        sys.exit(f"bench.py: error: {why}")
    yield from count_kernels("c4")
    yield from count_kernels("fpn")


def parts(args):
    """Of each part's second run: its time, on a GPU also the kernels that ran and their time."""
    rows = []

    def measure(name, work):
        if name != "backward":                          # it frees what it needs
            work()
        began = now()
        with torch.profiler.profile() if CUDA else contextlib.nullcontext() as profiler:
            result = work()
            row = {"row": f"parts {args.arch}, {name}", "ms": (now() - began) * 1e3}
        if CUDA:
            ran = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA
                   and not event.name.startswith(("Memcpy", "Memset"))]
            row["kernels"] = len(ran)
            row["ms on the GPU"] = sum(event.time_range.elapsed_us() for event in ran) / 1e3
        rows.append(row)
        return result

    measure_parts(args.arch, pretrain.get_args(["none", *settings_of(args)]), DEVICE, measure)
    yield from rows


# ---- All that a GPU has to tell, in nine minutes ----------------------------------------------------------

ROW_SECONDS = 60
BY_WORTH = ("step --arch c4", "step --arch fpn", "memory", "train --arch c4",
            "precision --arch c4 --count 40", "parts --arch c4", "parts --arch fpn", "compile --arch c4")


def run_limited(command, seconds, folder, stdout=None):
    """Runs a command in the project's folder for at most that long. Returns "done", or how it ended."""
    environment = {**os.environ, "TMPDIR": folder}          # what a killed process leaves goes with `folder`
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace",
                               cwd=ROOT, env=environment, start_new_session=True)
    try:
        errors = process.communicate(timeout=seconds)[1].strip()
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)          # it and its workers, also after Ctrl-C here
        process.wait()
    if process.returncode:
        return f"FAILED: {errors.splitlines()[-1] if errors else f'status {process.returncode}'}"
    return "done"


def gpu(args):
    """The GPU's tests, then rows by worth. What is cut off keeps the rows that it has measured."""
    python = sys.executable
    commands = {"tests": [python, "-m", "pytest", "-q", "tests/test_gpu.py"]}
    common = ["--rounds", str(args.rounds)]
    if args.json:
        common += ["--json", os.path.abspath(args.json)]
    if args.tiny:
        common += ["--tiny"]
    for row in BY_WORTH:
        name, *options = row.split()
        commands[row] = [python, os.path.abspath(__file__), name, os.path.abspath(args.images), *options,
                         *common, "--", *args.pretrain]
    if importlib.util.find_spec("detectron2"):
        toy.write_world(f"{args.folder}/toy", train=0, val=0)
        overrides = ("SOLVER.MAX_ITER 20 SOLVER.IMS_PER_BATCH 4 TEST.PRECISE_BN.NUM_ITER 5 "
                     f"SOLVER.AMP.ENABLED {CUDA}")
        for protocol in ("coco-c4-1x", "coco-fpn-1x"):
            commands[f"finetune {protocol}"] = [
                python, "finetune_det.py", "random", "--protocol", protocol, "--data", f"{args.folder}/toy",
                "--nprocs", "1", "--out", f"{args.folder}/{protocol}", *overrides.split()]
    deadline = time.monotonic() + args.seconds
    for name, command in commands.items():
        began = time.monotonic()
        seconds = min(ROW_SECONDS, deadline - began)
        stdout = subprocess.DEVNULL if name.startswith("finetune") else None        # its result is no measure
        result = "no time was left"
        if seconds > 5:
            result = run_limited(command, seconds, args.folder, stdout)
        yield {"row": f"gpu, {name}", "result": result, "seconds": time.monotonic() - began}


def emit(row, path):
    """Prints a row, and appends it to the file `path`."""
    for name, value in row.items():
        if name != "row":
            value = f"{value:.4g}" if isinstance(value, float) else value
            print(f"| {row['row']} | {name} | {value} |", flush=True)
    if path:
        with open(path, "a") as f:
            f.write(json.dumps({"machine": machine(), "command": ["bench.py", *sys.argv[1:]], **row}) + "\n")


def get_args(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("row", choices=list(ROWS))
    add("images", nargs="?", help="a folder or list of JPEGs, of the size that ImageNet has them")
    add("--arch", choices=["c4", "fpn"], default="c4")
    add("--json", help="append the rows to this file")
    add("--rounds", type=int, default=5)
    add("--count", type=int, help=f"images (loader), groups (memory) or steps (train, precision); {COUNTS}")
    add("--seconds", type=int, default=540, help=f"for all of gpu [540]; a row has {ROW_SECONDS}")
    add("--tiny", action="store_true", help="only see whether it runs")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.pretrain = argv[end + 1:]
    args.count = args.count or (10 if args.tiny else COUNTS.get(args.row))
    return args


ROWS = {function.__name__: function
        for function in (train, loader, step, compile, precision, memory, ranks, kernels, parts, gpu)}


def main():
    args = get_args(sys.argv[1:])
    with tempfile.TemporaryDirectory() as args.folder:
        if not args.images and args.row in ("train", "loader", "precision", "memory", "ranks", "gpu"):
            args.images = os.path.join(args.folder, "pictures")
            make_up_pictures(args.images, 64 if args.tiny else 1024)
        if args.row == "gpu":
            print("| row | figure | measured |\n|---|---|---|", flush=True)
        for row in ROWS[args.row](args):
            emit(row, args.json)


if __name__ == "__main__":
    main()
