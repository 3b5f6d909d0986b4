"""Speed and memory, each figure a ratio within one run: rows of a table, and a JSON line a row in --json.

    python tools/bench.py train [IMAGES]      # the program against the textbook loop, end to end
    python tools/bench.py loader [IMAGES]     # a loader worker against the textbook's and bare decoding
    python tools/bench.py step --arch c4      # the step against its bare encoder passes
    python tools/bench.py compile --arch c4   # the step without and with --compile
    python tools/bench.py precision [IMAGES]  # the loss of bf16 beside that of fp32
    python tools/bench.py memory [IMAGES]     # of the GPU; of a loader worker
    python tools/bench.py ranks [IMAGES]      # two processes of one thread against one, on the CPU
    python tools/bench.py kernels             # kernels and bytes of a step's parts, counted without a GPU
    python tools/bench.py parts --arch c4     # the same parts by the clock, on a GPU by torch.profiler, too

On a GPU the paper's recipe, on the CPU a ResNet-18 at 128 px, with --tiny only whether it runs; what follows
`--` goes to pretrain.py. Without IMAGES pictures are made up. No test asserts a time: machines differ and are
shared. What is compared runs in one process or in turns, and the median is printed. See `make gpu`.
"""
import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import random
import resource
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import fake_cuda                                                                             # noqa: E402
import insloc                                                                                # noqa: E402
import pretrain                                                                              # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
SMALL = "--resnet resnet18 --image-size 128 --batch-size 64 --queue-size 4096 --lr .012 --ema .99"
TINY = "--resnet narrow18 --image-size 64 --batch-size 8 --bn-group 4 --queue-size 16 --workers 1"
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


def made_up_pictures(folder, count):
    """JPEGs of ImageNet's usual size: clouds of colour with grain."""
    for i in range(count):
        rng = np.random.default_rng(i)
        clouds = PIL.Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((500, 375))
        grainy = np.asarray(clouds) + rng.normal(0, 12, (375, 500, 1))
        PIL.Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i:05d}.jpg", quality=90)


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
                                         drop_last=True, num_workers=settings.workers, pin_memory=CUDA)
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
    for _ in range(3 * settings.workers):               # what the loader had prepared meanwhile is no measure
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
        query, key = (image(*rng.integers(low, high + 1, 2)) for _ in range(2))
        return {"query": query, "key": key, "backgrounds": [image(canvas, canvas)], "source": i,
                "unreadable": [], "group": (0, 0)}

    groups = [make_group([sample(i) for i in range(settings.bn_group)])
              for _ in range(settings.batch_size // settings.bn_group)]
    return torch.utils.data._utils.pin_memory.pin_memory(groups) if CUDA else groups


def run_steps(settings, count, at_step, *patches):
    """pretrain.main alone, on data in memory; at_step() is called where each step begins."""
    groups = random_groups(settings)

    def momentum_update(*arguments):
        at_step()
        insloc.momentum_update(*arguments)

    settings.epochs = count                                             # an epoch is a step
    settings.log_every = settings.save_steps = count + 1
    paths = np.array([b"%d" % i for i in range(settings.batch_size)])
    patches = [(torch.utils.data, "DataLoader", lambda *_, **__: itertools.cycle(groups)),
               (pretrain, "momentum_update", momentum_update), (pretrain, "save_composites", lambda *_: None),
               (pretrain, "save", lambda *_: ""), *patches]
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


def make_encoder(arch, settings, device):
    if arch == "fpn":
        encoder = insloc.FPNEncoder(settings.resnet)
    else:
        encoder = insloc.C4Encoder(settings.resnet, roi_size=settings.roi_size)
    return encoder.to(device, memory_format=torch.channels_last)


# ---- Rows ------------------------------------------------------------------------------------------------

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

    def process(groups):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        keys = list(itertools.islice(insloc.batches(len(paths), 32, 32, groups), groups))
        for group in torch.utils.data.DataLoader(insloc.Views(paths), batch_sampler=keys, num_workers=1,
                                                 collate_fn=insloc.MakeGroup()):
            del group
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime

    groups = -(-args.count // 8)                # a process's start and end fall out of a difference
    times = in_turns(
        args.rounds, worker=lambda: (process(1 + groups) - process(1)) / (32 * groups) * 1e3,
        decode=timed(lambda i: image_io.decode_jpeg(raw[i], mode=image_io.ImageReadMode.RGB)),
        textbook=timed(lambda i: textbook[some[i]]))
    return [{"row": "loader", **{f"ms an image, {name}": median(values) for name, values in times.items()},
             "textbook / ours": ratio(times["textbook"], times["worker"]),
             "decode / ours": ratio(times["decode"], times["worker"])}]


def train(args):
    settings = pretrain.get_args([args.images, *settings_of(args)])
    paths = images_of(args)
    epochs = -(-(args.count // 10 + 20) // (len(paths) // settings.batch_size))
    lines = run_program(args, "--epochs", str(epochs), "--log-every", "10")[1:]         # the first warms up
    theirs, their_step = textbook_loop(args, settings, paths, max(3, args.count // 40))
    ours = median(line["images_per_s"] for line in lines)
    our_step = settings.batch_size / median(step_seconds(settings, args.rounds))
    return [{"row": f"train {args.arch}", "images/s": ours, "textbook images/s": theirs,
             "ours / textbook": ours / theirs, "step alone, ours / textbook": our_step / their_step,
             "data_wait": median(line["data_wait"] for line in lines)}]


def step(args):
    """Each step is followed by the encoder passes alone: keys forward, queries forward and backward."""
    settings = pretrain.get_args(["none", *settings_of(args)])
    q, k = (make_encoder(args.arch, settings, DEVICE) for _ in range(2))
    view = random_groups(settings)[0]["query"]
    images = pretrain.augment(view, settings, DEVICE)
    boxes = pretrain.boxes_of(view, settings, DEVICE)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=settings.precision == "bf16")
    steps, bares, resumed = [], [], []

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
    return [{"row": f"step {args.arch}", "ms": median(steps[2:]) * 1e3, "ms, bare": median(bares[2:]) * 1e3,
             "step / bare": ratio(steps[2:], bares[2:])}]


def compile(args):
    milliseconds = []
    for more in ([], ["--compile"]):
        settings = pretrain.get_args(["none", *settings_of(args, *more)])
        milliseconds.append(median(step_seconds(settings, args.rounds)) * 1e3)
    return [{"row": f"compile {args.arch}", "ms": milliseconds[0], "ms, compiled": milliseconds[1],
             "without / with": milliseconds[0] / milliseconds[1]}]


def precision(args):
    size = pretrain.get_args(["none", *settings_of(args)]).batch_size
    steps = 10 if args.tiny else 200
    more = ["--epochs", str(-(-steps // (len(images_of(args)) // size))), "--log-every", str(steps // 10)]
    half, full = ([line["loss"] for line in run_program(args, *more, "--precision", name)][:10]
                  for name in ("bf16", "fp32"))
    return [{"row": f"precision {args.arch}", "steps": steps, "bf16, loss of each tenth": half, "fp32": full,
             "largest difference, %": max(abs(a / b - 1) for a, b in zip(half, full)) * 100}]


def memory(args):
    rows = []
    for args.arch in ("c4", "fpn") if CUDA else ():
        row = {"row": f"memory {args.arch}"}
        for groups in (8, 16):
            settings = pretrain.get_args(["none", *settings_of(args)])
            settings.batch_size = groups * settings.bn_group
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run_steps(settings, 3, lambda: None)
            row[f"GB with {groups} groups"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row)

    paths = images_of(args)
    count = 8 + args.count // 4
    keys = list(itertools.islice(insloc.batches(len(paths), 32, 32, count), count))
    groups = iter(torch.utils.data.DataLoader(insloc.Views(paths), batch_sampler=keys, num_workers=1,
                                              collate_fn=insloc.MakeGroup()))
    megabytes = []
    for _ in range(count - 3):                          # the worker has ended when the last ones are taken
        next(groups)
        with open(f"/proc/{groups._workers[0].pid}/status") as f:
            megabytes.append(next(int(line.split()[1]) / 1e3 for line in f if line.startswith("RssAnon")))
    return [*rows, {"row": "memory worker", "groups of 32": len(megabytes), "MB after a tenth":
                    megabytes[len(megabytes) // 10], "MB at the end": megabytes[-1]}]


def ranks(args):
    def speed(count):
        more = f"--epochs 1 --nprocs {count} --workers 1 --log-every 2 --device cpu --precision fp32"
        return run_program(args, *more.split(), OMP_NUM_THREADS="1")[-1]["images_per_s"]

    speeds = in_turns(args.rounds, one=lambda: speed(1), two=lambda: speed(2))
    return [{"row": "ranks", **{f"images/s, {name}": median(values) for name, values in speeds.items()},
             "two / one": ratio(speeds["two"], speeds["one"])}]


def measure_parts(arch, settings, device, measure):
    """measure(name, work, times a step, of 8 groups) for each part of a step of the paper's recipe."""
    encoder_q, encoder_k = (make_encoder(arch, settings, device) for _ in range(2))
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


def kernels(args):
    """As torch calls them: an indexed tensor counts whole, a _foreach_ as one. Backward cannot run."""
    if why := fake_cuda.missing():
        sys.exit(f"bench.py: error: {why}")
    rows = []
    for arch in ("c4", "fpn"):
        gpu = fake_cuda.FakeGPU()
        saved = {}

        def keep(x):                                    # what autograd saves for backward, each memory once
            saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        def measure(name, work):
            gpu.start_counting()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                result = work()
            if name != "backward":
                rows.append({"row": f"kernels {arch}, {name}", "kernels": gpu.kernels, "GB": gpu.bytes / 1e9,
                             "copies to the GPU": len(gpu.copies)})
            return result

        with fake_cuda.gpu_here(gpu), gpu:
            settings = pretrain.get_args(["none", "--arch", arch, "--nprocs", "1", "--device", "cuda"])
            encoder, queue = measure_parts(arch, settings, torch.device("cuda", 0), measure)
            own = {x.untyped_storage()._cdata for x in [*encoder.parameters(), queue.keys]}
            saved_bytes = sum(nbytes for memory, nbytes in saved.items() if memory not in own)
            fixed_bytes = 4 * sum(p.nbytes for p in encoder.parameters()) + queue.keys.nbytes
        rows.append({"row": f"kernels {arch}, memory", "GB saved for backward": saved_bytes / 1e9,
                     "GB with parameters x 4 and queue": (saved_bytes + fixed_bytes) / 1e9})
    return rows


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
    return rows


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    rows = (train, loader, step, compile, precision, memory, ranks, kernels, parts)
    add("row", choices=[function.__name__ for function in rows])
    add("images", nargs="?", help="a folder or list of JPEGs, of the size that ImageNet has them")
    add("--arch", choices=["c4", "fpn"], default="c4")
    add("--json", help="append the rows to this file")
    add("--rounds", type=int, default=5)
    add("--count", type=int, default=320, help="images (loader), 4 x groups (memory), 10 x steps (train)")
    add("--tiny", action="store_true", help="only see whether it runs")
    ours = sys.argv[1:]
    theirs = ours[ours.index("--") + 1:] if "--" in ours else []
    args = parser.parse_args(ours[:len(ours) - len(theirs)])
    args.pretrain = theirs
    with tempfile.TemporaryDirectory() as folder:
        if not args.images and args.row in ("train", "loader", "precision", "memory", "ranks"):
            made_up_pictures(folder, 64 if args.tiny else 1024)
            args.images = folder
        found = globals()[args.row](args)
    for row in found:
        for name, value in list(row.items())[1:]:
            value = f"{value:.4g}" if isinstance(value, float) else value
            print(f"| {row['row']} | {name} | {value} |", flush=True)
        if args.json:
            with open(args.json, "a") as f:
                command = "bench.py " + " ".join(sys.argv[1:])
                f.write(json.dumps({"machine": machine(), "command": command, **row}) + "\n")


if __name__ == "__main__":
    main()
