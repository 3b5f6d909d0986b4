"""Stage 2a: what frozen weights know about class (Sec. 5.2, Table 3a, Cls): linear classification, or k-NN.

    python probe_cls.py runs/insloc_c4 /data/imagenet                 # every GPU of this machine, or the CPU
    python probe_cls.py runs/insloc_c4 /data/imagenet --knn 20        # in minutes, to watch a run
    torchrun --nproc-per-node 8 probe_cls.py runs/insloc_c4 /data/imagenet
    python -m pdb probe_cls.py random DATA --resnet resnet18 --device cpu --workers 0       # step through it

DATA holds train/CLASS/* and val/CLASS/*. WEIGHTS is a run directory, a checkpoint of any system in the
paper's tables, or `random`. The readout is the trunk as a plain ResNet: C4's RoI head (res5) stands behind
res4 again, FPN is read at C5, without neck and head. One linear layer is trained by MoCo's recipe; the net
stays in eval mode and is compared at the end, bit for bit, with the one that came in.
"""
import argparse
import hashlib
import json
import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from insloc import (PIXEL_MEAN, PIXEL_STD, C4Encoder, PathList, Unreadable, crop_box, generator_for,
                    read_file, read_image, read_weights, roi_pool)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PAPER = {"SwAV": 70.1, "BYOL": 74.3, "MoCo-v2": 67.7, "InsLoc": 61.7}           # Table 3a, Cls: top-1, R50-C4
# What may change between a run and its continuation.
FREE = {"weights", "data", "out", "resume", "nprocs", "workers", "device", "trust"}


def get_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("weights", help="run directory, checkpoint of any system, or `random`")
    add("data", help="folder with train/CLASS/* and val/CLASS/*")
    add("--arch", choices=["c4", "fpn"], default="c4", help="fpn reads C5, the same trunk [paper 5.2: C4]")
    add("--epochs", type=int, default=100, help="[MoCo v2]")
    add("--lr", type=float, default=30.0, help="for batch 256 [MoCo v2]")
    add("--milestones", type=int, nargs="*", metavar="EPOCH",
        help="the rate falls to a tenth there, at .6 and .8 of the epochs unless given [MoCo v2: 60 80]")
    add("--batch-size", type=int, default=256, help="images a step over all processes [MoCo v2]")
    add("--knn", type=int, metavar="K", help="weighted k-NN, no training; 20 is usual [ours: off]")
    add_machine(parser, "runs/cls_WEIGHTS, with --knn runs/knn_WEIGHTS")
    args = parser.parse_args(argv)
    check_machine(parser, args, "knn" if args.knn else "cls")
    if args.milestones is None:
        args.milestones = [-(-args.epochs * 6 // 10), -(-args.epochs * 8 // 10)]
    if args.knn is not None and args.knn < 1:
        parser.error("--knn must be at least 1")
    return args


# ---- What probe_loc.py imports, down to `launch`: arguments, weights, files, processes ---------------------

def add_machine(parser, out):
    """The arguments that both probes have."""
    add = parser.add_argument
    add("--resnet", default="resnet50", choices=[f"resnet{depth}" for depth in (18, 34, 50, 101, 152)],
        help="trunk of `random`; else the weights tell [paper 4.3]")
    add("--image-size", type=int, default=224, help="side of the crop, validation: of 8/7 of it [MoCo v2]")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the frozen net [MoCo v2]")
    add("--trust", action="store_true", help="unpickle WEIGHTS that are more than tensors [ours: off]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[ours: a GPU if there is one]")
    add("--nprocs", type=int, help="processes to start, none under torchrun [ours: one a GPU, or one]")
    add("--workers", type=int, help="loader workers a process [ours: its share of the cores, at most 8]")
    add("--seed", type=int, default=0, help="[ours: 0]")
    add("--out", help=f"folder for results.json and checkpoint.pth [ours: {out}]")
    add("--resume", action="store_true", help="go on where the run in --out was stopped [ours: off]")


def check_machine(parser, args, kind):
    """Derives what was not given; parser.error prints one line and exits with status 2."""
    for name in ("epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.image_size < 32 or args.image_size % 32:
        parser.error(f"--image-size {args.image_size}: must be a multiple of 32, the stride of the network")
    args.out = args.out or f"runs/{kind}_" + os.path.basename(os.path.normpath(args.weights)).split(".")[0]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count() if args.device == "cuda" else None
    if gpus == 0:
        parser.error("--device cuda: torch sees no GPU; use --device cpu, or install a driver")
    if "RANK" in os.environ:
        if not {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            parser.error("RANK is set, but not WORLD_SIZE, MASTER_ADDR and MASTER_PORT: start by torchrun, or unset it")
        args.nprocs, gpus = int(os.environ["WORLD_SIZE"]), None
    args.nprocs = (gpus or 1) if args.nprocs is None else args.nprocs
    if args.nprocs < 1 or gpus and args.nprocs > gpus:
        parser.error(f"--nprocs {args.nprocs}: at least 1" + (f", at most {gpus} GPUs" if gpus else ""))
    if args.batch_size < args.nprocs:
        parser.error(f"--batch-size {args.batch_size}: less than an image a process, of {args.nprocs}")
    if args.workers is None:                                # on the CPU the net itself needs the cores
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", args.nprocs))
        args.workers = max(0, min(8, cores - (args.device == "cpu")))


def fail(message):
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {message}")


def read_trunk(args):
    """WEIGHTS -> Weights, or None for `random`; the ResNet's name. What cannot be read ends in one line."""
    if args.weights == "random":
        return None, args.resnet
    try:
        weights = read_weights(args.weights, trust=args.trust)
    except (OSError, ValueError) as error:
        fail(f"{args.weights}: {error}")
    blocks = {".".join(name.split(".")[:2]) for name in weights.backbone if name.startswith("layer")}
    return weights, f"resnet{2 + len(blocks) * (3 if 'layer1.0.conv3.weight' in weights.backbone else 2)}"


def fingerprint(net):
    """{name: digest} of every tensor of a net, BatchNorm statistics included."""
    return {name: hashlib.sha256(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            for name, x in net.state_dict().items()}


def check_frozen(net, before):
    """Error unless every tensor of the net is, bit for bit, what its fingerprint `before` says."""
    after = fingerprint(net)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        fail(f"the frozen net changed, the result is void: {len(changed)} of {len(before)} tensors, "
             f"such as {changed[0]}")


def normalise(images, weights, device):
    """uint8 RGB (N, 3, h, w) -> float on the device, in the weights' channel order and pixel statistics."""
    x = images.to(device, non_blocking=True).float() / 255
    mean, std = (weights.pixel_mean, weights.pixel_std) if weights else (PIXEL_MEAN, PIXEL_STD)
    x = x.flip(1) if weights and weights.channel_order == "BGR" else x
    x = (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


def read_or_refuse(path):
    """The image; Unreadable, naming the file, if it does not open: an accuracy of the rest would mislead."""
    try:
        return read_image(path)
    except Exception as error:                              # decoders fail in many ways
        raise Unreadable(f"{path} cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from error


def centre_crop(image, size):
    """MoCo's validation view, uint8 (3, size, size): for 224 the short side is resized to 256 first."""
    return TF.center_crop(TF.resize(image, [size * 8 // 7], antialias=True), [size, size])


def load(dataset, batches, args):
    """Batches of the dataset's items, by lists of keys. A file that does not open ends the run in a line."""
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=args.workers,
                                         pin_memory=args.device == "cuda",
                                         multiprocessing_context="fork" if args.workers else None)
    try:
        yield from loader
    except Unreadable as error:                             # a worker's comes with its traceback in front
        lines = [line for line in str(error).splitlines() if "cannot be read" in line]
        fail(lines[-1].split("Unreadable: ")[-1])


def write(folder, name, write_to):
    """write_to(file) beside, then renamed: a kill leaves the old file whole."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path + ".tmp", "wb") as f:
        write_to(f)
    os.replace(path + ".tmp", path)


def read_state(args):
    """--out's checkpoint.pth where there is something to go on from, else None. A refusal is one line."""
    path = os.path.join(args.out, "checkpoint.pth")
    if not os.path.exists(path):
        return None
    if not args.resume:
        fail(f"{args.out} already holds a run: --resume goes on with it, --out starts another")
    try:
        state = read_file(path)
        state["args"]
    except Exception as error:                              # a damaged file fails in many ways
        fail(f"{path} is no checkpoint of a probe ({type(error).__name__}); remove it, or name another --out")
    differ = [f"--{name.replace('_', '-')} {state['args'].get(name)} then, {value} now"
              for name, value in vars(args).items() if name not in FREE and state["args"].get(name) != value]
    if differ:
        fail(f"cannot resume {args.out} with other settings: {'; '.join(differ)}")
    return state


def gather(x, world, total):
    """Each rank's rows, of images rank, rank + world, ... -> all (total, ...), in order, on every rank."""
    if world == 1:
        return x
    n = -(-total // world)
    parts = [x.new_empty(n, *x.shape[1:]) for _ in range(world)]
    dist.all_gather(parts, torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])]))
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def start_process(rank, rendezvous, args, images):
    """Joins this process to the others, each of which needs an image of either split. Returns its device."""
    if args.nprocs > images:
        fail(f"{args.nprocs} processes for {images} images; give fewer --nprocs")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", args.nprocs))
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    elif args.nprocs > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if args.nprocs > 1:
        backend = "nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=args.nprocs)
    return device


def launch(main, args, *found):
    """main(rank, rendezvous, args, *found) here, if alone or under torchrun, or in --nprocs new processes."""
    read_trunk(args)                                        # a refusal is one line, before anything starts
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")
    if args.nprocs == 1 or "RANK" in os.environ:
        return main(int(os.environ.get("RANK", 0)), "env://", args, *found)
    with tempfile.TemporaryDirectory() as folder:
        everything = f"file://{folder}/rendezvous", args, *found
        try:
            mp.start_processes(main, everything, args.nprocs, start_method="spawn")
        except mp.ProcessExitedException as error:          # unless killed, the process has said why
            sys.exit(error.exit_code if error.exit_code > 0 else f"{error}; --resume goes on")


# ---- Linear classification and k-NN ------------------------------------------------------------------------

def find_classes(data):
    """DATA -> class names, (PathList, labels (N,)) of train, of val; what is missing ends in one line."""
    splits, classes = [], None
    for split in ("train", "val"):
        folder, paths, labels = os.path.join(data, split), [], []
        if not os.path.isdir(folder):
            fail(f"{data} has no folder {split!r}; expected are {data}/train/CLASS/* and {data}/val/CLASS/*")
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        classes = found if split == "train" else classes
        if len(classes) < 2:
            fail(f"{folder} has {len(classes)} class folder(s); a classifier needs at least two")
        unknown = sorted(set(found) - set(classes))
        if unknown:
            fail(f"{folder} has {len(unknown)} class(es) that {data}/train lacks, such as {unknown[0]!r}")
        for label, name in enumerate(classes):
            files = sorted(os.listdir(os.path.join(folder, name))) if name in found else []
            files = [file for file in files if file.lower().endswith(EXTENSIONS) and file[0] != "."]
            if not files and split == "train":
                fail(f"{folder}/{name} has no images; endings looked for: {' '.join(EXTENSIONS)}")
            paths += [os.path.join(folder, name, file) for file in files]
            labels += [label] * len(files)
        if not paths:
            fail(f"{folder} has no images in class folders; endings looked for: {' '.join(EXTENSIONS)}")
        splits.append((PathList(paths), torch.tensor(labels)))
    return classes, *splits


class Images(torch.utils.data.Dataset):
    """Items by key (epoch, index): uint8 (3, S, S), label. Epoch -1: centre crop, else random."""

    def __init__(self, paths, labels, size, seed=0):
        self.paths, self.labels, self.size, self.seed = paths, labels, size, seed

    def __getitem__(self, key):
        epoch, index = key
        image, label = read_or_refuse(self.paths[index]), self.labels[index]
        if epoch < 0:
            return centre_crop(image, self.size), label
        generator = generator_for(self.seed, "sample", epoch, index)    # RandomResizedCrop, flip, no colour
        top, left, h, w = crop_box(*image.shape[-2:], (0.08, 1), (3 / 4, 4 / 3), generator)
        image = TF.resized_crop(image, top, left, h, w, [self.size, self.size], antialias=True)
        return (image.flip(2) if torch.rand(1, generator=generator) < 0.5 else image), label


def knn(queries, bank, labels, n_classes, k=20, temperature=0.07):
    """Unit rows (N, D), (M, D), the bank's labels (M,) -> class scores (N, C); a vote weighs exp(cos / T)."""
    scores = []
    for chunk in queries.split(256):
        cosine, index = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)                          # (n, k)
        votes = torch.zeros(len(chunk), n_classes, device=chunk.device)
        scores.append(votes.scatter_add_(1, labels[index], (cosine / temperature).exp()))
    return torch.cat(scores)


def accuracy(scores, labels):
    """Percentages: the right class comes first; is among the first five (None where there are no more)."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    top1, top5 = (100 * hits[:, :k].any(dim=1).double().mean().item() for k in (1, 5))
    return {"top1": top1, "top5": top5 if scores.shape[1] > 5 else None}


def main(rank, rendezvous, args, found, state):
    world, start = args.nprocs, time.time()
    talk = print if rank == 0 else (lambda *_, **__: None)
    classes, (train_paths, train_labels), (val_paths, val_labels) = found
    n, size = len(train_paths), args.batch_size
    device = start_process(rank, rendezvous, args, min(n, len(val_paths)))

    # ---- the frozen net: a plain torchvision ResNet without fc
    weights, resnet = read_trunk(args)
    torch.manual_seed(args.seed)
    encoder = C4Encoder(resnet).eval().requires_grad_(False)
    if weights:
        encoder.resnet.load_state_dict(weights.backbone)
    encoder.to(device, memory_format=torch.channels_last if device.type == "cuda" else None)
    net, before = encoder.resnet, fingerprint(encoder.resnet)
    source = weights.source if weights else f"random init, seed {args.seed}"
    if args.arch == "c4" and args.image_size == 224:        # RoIAlign of a whole image is the identity:
        res4 = encoder.res4(torch.randn(1, 3, 224, 224, device=device))     # RoI head = plain ResNet
        whole = torch.tensor([[0.0, 0.0, 224.0, 224.0]], device=device)
        pooled = roi_pool(res4, whole, size=14, scale=1 / 16)
        torch.testing.assert_close(pooled, res4)

    def encode(images):
        """uint8 RGB (N, 3, S, S) -> (N, D) float32 on the device."""
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return net(normalise(images, weights, device)).float()

    def centre_features(paths, labels):
        """(N, D): the centre crops of all images, on every rank."""
        keys, share = [(-1, i) for i in range(rank, len(paths), world)], max(1, size // world)
        batches = [keys[i:i + share] for i in range(0, len(keys), share)]
        mine = [encode(images) for images, _ in load(Images(paths, labels, args.image_size), batches, args)]
        return gather(torch.cat(mine), world, len(paths))

    talk(f"{args.weights}: {source}, {resnet}; {n} train, {len(val_paths)} val images, {len(classes)} "
         f"classes, chance {100 / len(classes):.1f} %; {world} process(es), {args.device}", flush=True)
    val_features, val_labels, curve = centre_features(val_paths, val_labels), val_labels.to(device), []

    if args.knn:
        bank = F.normalize(centre_features(train_paths, train_labels), dim=1)
        scores = knn(F.normalize(val_features, dim=1), bank, train_labels.to(device), len(classes), args.knn)
    else:
        # ---- MoCo's linear classifier: N(0, .01) and 0 at the start, SGD, no decay, net in eval mode
        fc = torch.nn.Linear(val_features.shape[1], len(classes))
        fc.weight.data.normal_(0, 0.01, generator=generator_for(args.seed, "fc"))
        fc.bias.data.zero_()
        optimizer = torch.optim.SGD(fc.to(device).parameters(), lr=args.lr, momentum=0.9)
        if state:
            if state["net"] != before:
                fail(f"{args.out} was begun with other weights than {args.weights}")
            fc.load_state_dict(state["fc"])
            optimizer.load_state_dict(state["optimizer"])
            curve = state["curve"]
            talk(f"resuming after epoch {len(curve)}", flush=True)
        first, starts = len(curve), [i for i in range(0, n, size) if n - i >= world]

        def shares():
            """The keys of this rank's part of each batch, of all epochs to come."""
            for epoch in range(first, args.epochs):
                order = torch.randperm(n, generator=generator_for(args.seed, "order", epoch)).tolist()
                for i in starts:
                    yield [(epoch, index) for index in order[i:i + size][rank::world]]

        batches = load(Images(train_paths, train_labels, args.image_size, args.seed), shares(), args)
        for epoch in range(first, args.epochs):
            optimizer.param_groups[0]["lr"] = lr = args.lr * 0.1 ** sum(epoch >= m for m in args.milestones)
            total = torch.zeros((), device=device)
            for i in starts:
                images, labels = next(batches)
                loss = F.cross_entropy(fc(encode(images)), labels.to(device), reduction="sum")
                loss = loss / min(size, n - i)              # ranks add up to the mean over the batch
                optimizer.zero_grad()
                loss.backward()
                if world > 1:
                    dist.all_reduce(fc.weight.grad), dist.all_reduce(fc.bias.grad)
                optimizer.step()
                total += loss.detach() / len(starts)
            if world > 1:
                dist.all_reduce(total)
            if not total.isfinite() or not fc.weight.isfinite().all():
                fail(f"the loss is not finite in epoch {epoch + 1}; lower --lr")
            result = accuracy(fc(val_features), val_labels)
            curve.append({"epoch": epoch + 1, "lr": lr, "loss": total.item(), **result})
            talk(f"epoch {epoch + 1}/{args.epochs}: lr {lr:g}, loss {total:.3f}, "
                 f"val top-1 {result['top1']:.2f} %, {time.time() - start:.0f} s", flush=True)
            if rank == 0:
                everything = {"args": vars(args), "net": before, "fc": fc.state_dict(), "curve": curve,
                              "optimizer": optimizer.state_dict()}
                write(args.out, "checkpoint.pth", lambda f: torch.save(everything, f))
        scores = fc(val_features).detach()

    check_frozen(net, before)
    if rank == 0:
        readout, result = f"{args.knn}-NN" if args.knn else "linear", accuracy(scores, val_labels)
        everything = {"weights": args.weights, "source": source, "resnet": resnet, "readout": readout,
                      **result, "chance": 100 / len(classes), "train_images": n, "val_images": len(val_paths),
                      "paper": PAPER, "curve": curve, "args": vars(args), "torch": torch.__version__,
                      "seconds": round(time.time() - start, 1)}
        write(args.out, "results.json", lambda f: f.write(json.dumps(everything, indent=1).encode()))
        top5 = f", top-5 {result['top5']:.2f} %" if result["top5"] is not None else ""
        paper = ", ".join(f"{name} {value}" for name, value in PAPER.items())
        print(f"\n{args.weights}, {readout}, {args.data}: top-1 {result['top1']:.2f} %{top5}\n"
              f"paper, Table 3a, linear, ImageNet, R50-C4: {paper}\nwrote {args.out}/results.json")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = get_args()
    launch(main, arguments, find_classes(arguments.data), None if arguments.knn else read_state(arguments))
