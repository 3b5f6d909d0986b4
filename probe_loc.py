"""Stage 2b: what frozen weights know about place (Sec. 5.2, Fig. 4, Table 3a, Loc): which cell of the grid?

    python probe_loc.py runs/insloc_c4 /data/imagenet                 # every GPU of this machine, or the CPU
    torchrun --nproc-per-node 8 probe_loc.py runs/insloc_c4 /data/imagenet
    python -m pdb probe_loc.py random DATA --resnet resnet18 --device cpu --workers 0       # step through it

DATA holds train/ and val/ with images at any depth; WEIGHTS is a run directory, a checkpoint of any system in
the paper's tables, or `random`. An image is split into 3x3 cells; the RoI feature of each (C4: RoIAlign 14x14
on res4, res5, mean; FPN: box head on P2 to P5, concatenated; no projector, which transfer drops) goes to one
linear layer that names the cell. The paper says little more, so there are several protocols, and random
weights of the same network beside the given ones:

    full     one forward pass of the image, its cells as boxes: the paper's words
    gray     the layer of `full` on a constant image: what it says where there is no content
    reflect  as `full`, every convolution padding by reflection: a border without zeros
    placed   the image somewhere on another, its cells as boxes: seams, but no absolute place
    alone    every cell cut out and seen by itself: content alone

Under `full` zero padding tells the place: an untrained net beats the trained one with every readout that was
tried, and scores 99 with most: docs/results has the table. Nearest to "a random net near chance, pre-trained
ones above it" come `reflect` and `placed` with a weak readout, therefore the default: few epochs of plain SGD
on the features as they are. Standardised ones and more epochs find what is left of the border and of the
seams in a random net, and turn the order. Compare weights under one protocol and one readout only.

Processes, files and the reading of weights are probe_cls.py's, imported: both probes must agree on them.
"""
import argparse
import copy
import json
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as TF

from insloc import PIXEL_MEAN, C4Encoder, FPNEncoder, PathList, generator_for, paste
from probe_cls import (EXTENSIONS, add_machine, centre_crop, check_frozen, check_machine, fail, fingerprint,
                       gather, launch, load, normalise, read_or_refuse, read_state, read_trunk, start_process,
                       write)

PAPER = {"SwAV": 58.4, "BYOL": 67.6, "MoCo-v2": 71.9, "InsLoc": 74.2}           # Table 3a, Loc: R50-C4, 3x3
PROTOCOLS = ["full", "reflect", "placed", "alone"]


def get_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("weights", help="run directory, checkpoint of any system, or `random`")
    add("data", help="folder with train/ and val/, images at any depth; labels are not used")
    add("--arch", choices=["c4", "fpn"], default="c4", help="whose RoI features [paper 5.2: R50-C4]")
    add("--protocol", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="[paper 5.2: full; ours: all]")
    add("--grid", type=int, default=3, help="cells a side [paper 5.2: M = 9]")
    add("--train-images", type=int, default=5000, help="at most, drawn by the seed; with more of them the "
        "readout takes more steps and is no longer weak [ours: 180 steps]")
    add("--holdout", type=float, default=0.1, help="share of them that chooses the rate [ours: a tenth]")
    add("--features", choices=["raw", "unit", "standard"], default="raw", help="as they are, of length 1, or "
        "standardised by the training part [ours: a weak readout, see above]")
    add("--lr", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0], help="trained side "
        "by side, the best on the held-out images counts [ours: the paper names none]")
    add("--epochs", type=int, default=10, help="of the linear layers, cosine [ours: a weak readout]")
    add("--batch-size", type=int, default=256, help="images a step [MoCo v2]")
    add("--no-random", action="store_true", help="leave out the random net beside the weights [ours: off]")
    add_machine(parser, "runs/loc_WEIGHTS")
    args = parser.parse_args(argv)
    check_machine(parser, args, "loc")
    if args.grid < 2 or args.image_size // args.grid < 8:
        parser.error(f"--grid {args.grid}: at least 2, and cells of 8 pixels out of {args.image_size}")
    if not min(args.lr) > 0:
        parser.error("--lr must be above 0")
    if args.train_images < 2 or not 0 < args.holdout < 1:
        parser.error("--train-images must be at least 2, --holdout between 0 and 1")
    return args


def find_images(data):
    """DATA -> PathList of train, of val; what is missing ends in one line."""
    splits = []
    for split in ("train", "val"):
        folder = os.path.join(data, split)
        if not os.path.isdir(folder):
            fail(f"{data} has no folder {split!r}; expected are {data}/train and {data}/val with images")
        paths = sorted(os.path.join(root, file) for root, _, files in os.walk(folder, followlinks=True)
                       for file in files if file.lower().endswith(EXTENSIONS) and file[0] != ".")
        if len(paths) < 2:
            fail(f"{folder} has {len(paths)} image(s), not two; endings looked for: {' '.join(EXTENSIONS)}")
        splits.append(PathList(paths))
    return splits


def grid_boxes(size, grid=3):
    """The cells of a square of `size` pixels, row by row: (grid**2, 4). They tile it, whatever the size."""
    edge = torch.linspace(0, size, grid + 1)
    return torch.stack([edge[[x, y, x + 1, y + 1]] for y in range(grid) for x in range(grid)])


class Cells(torch.utils.data.Dataset):
    """An image under a protocol: uint8 (P, 3, h, w) pictures to pass forward, their boxes (P, M, 4).

    P = 1 with all cells as boxes; for `alone` P = grid**2 with one box each. Cells are not resampled: where
    only some are, the blur tells them apart. `placed`: on a canvas one cell wider, by whole cells, and what
    sticks out comes in again on the other side, so that every cell is equally often at every place. A plain
    paste on a canvas half as large again is no control: absolute place alone gives 60 % there.
    """

    def __init__(self, paths, protocol, size, grid, seed):
        self.paths, self.protocol, self.size, self.grid, self.seed = paths, protocol, size, grid, seed

    def __getitem__(self, index):
        image = centre_crop(read_or_refuse(self.paths[index]), self.size)
        boxes = grid_boxes(self.size, self.grid)
        if self.protocol == "alone":
            side = self.size // self.grid
            corners = boxes[:, :2].floor().long().tolist()
            cells = torch.stack([image[:, y:y + side, x:x + side] for x, y in corners])
            return cells, torch.tensor([0.0, 0.0, side, side]).expand(len(cells), 1, 4)
        if self.protocol == "placed":
            side, places = self.size // self.grid, self.grid + 1                        # places: cells a side
            generator = generator_for(self.seed, "placed", index)
            other = torch.randint(len(self.paths) - 1, (1,), generator=generator).item()
            ground = read_or_refuse(self.paths[other + (other >= index)])       # never the image itself
            ground = TF.resize(ground, [places * side, places * side], antialias=True)
            image, _ = paste(ground, image[:, :self.grid * side, :self.grid * side], 0, 0)
            shift = torch.randint(places, (2,), generator=generator)                    # x, y
            image = image.roll((side * shift.flip(0)).tolist(), dims=(1, 2))
            corners = torch.cartesian_prod(*[torch.arange(self.grid)] * 2).flip(1)      # x, y, row by row
            corners = (corners + shift) % places * side
            boxes = torch.cat([corners, corners + side], dim=1).float()
        return image[None], boxes[None]


def pad_by_reflection(net, on):
    """Every convolution of the net pads by reflection (on) or with zeros (off)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "reflect" if on else "zeros"


def train_heads(features, rates, epochs, batch_size, generator):
    """Features (N, M, D) of M cells -> for each learning rate a linear layer: weight (M, D), bias (M,).

    Side by side, on the same batches of images. SGD, momentum 0.9, no decay, cosine to zero.
    """
    n, m, d = features.shape
    heads = [[torch.zeros(shape, device=features.device, requires_grad=True) for shape in ((m, d), (m,))]
             for _ in rates]
    optimizer = torch.optim.SGD([{"params": head, "lr": lr} for head, lr in zip(heads, rates)], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-n // batch_size))
    for _ in range(epochs):
        for index in torch.randperm(n, generator=generator).split(batch_size):
            x = features[index.to(features.device)].flatten(0, 1)                                # (B * M, D)
            cells = torch.arange(m, device=x.device).repeat(len(index))
            loss = sum(F.cross_entropy(F.linear(x, *head), cells) for head in heads)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return [[p.detach() for p in head] for head in heads]


def confusion(features, head):
    """Features (N, M, D) -> (M, M): the percentage of the cells i that the layer takes for j."""
    guess = F.linear(features, *head).argmax(dim=2)                                              # (N, M)
    return 100 * F.one_hot(guess, features.shape[1]).double().mean(dim=0)


def summary(table):
    """(M, M) percentages -> accuracy over all cells, corners, edges without corners, inside (2x2: None)."""
    grid = round(len(table) ** 0.5)
    per_cell = table.diag().reshape(grid, grid)
    border = torch.ones(grid, grid, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    corner = torch.zeros(grid, grid, dtype=torch.bool)
    corner[::grid - 1, ::grid - 1] = True
    parts = {"top1": border | True, "corners": corner, "edges": border & ~corner, "centre": ~border}
    return {name: per_cell[where].mean().item() if where.any() else None for name, where in parts.items()}


def draw(lines, args, path):
    """The accuracy of each cell: a row a net, a column a protocol."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows, columns = (list(dict.fromkeys(line[key] for line in lines)) for key in ("net", "protocol"))
    figure, axes = pyplot.subplots(len(rows), len(columns), squeeze=False, layout="constrained",
                                   figsize=(2.2 * len(columns) + 1, 2.4 * len(rows)))
    for line in lines:
        ax = axes[rows.index(line["net"]), columns.index(line["protocol"])]
        per_cell = torch.tensor(line["confusion"]).diag().reshape(args.grid, args.grid)
        image = ax.imshow(per_cell.numpy(), vmin=0, vmax=100)
        for i, value in enumerate(per_cell.flatten().tolist()):
            ax.text(i % args.grid, i // args.grid, f"{value:.0f}", ha="center", va="center",
                    color="black" if value > 60 else "white")
        ax.set(title=f"{line['protocol']}, {line['net']}: {line['top1']:.1f}", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label=f"accuracy, % (chance {100 / args.grid ** 2:.1f})", shrink=0.7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(rank, rendezvous, args, found, state):
    world, start = args.nprocs, time.time()
    talk = print if rank == 0 else (lambda *_, **__: None)
    train_paths, val_paths = found
    total = min(len(train_paths), args.train_images)
    device = start_process(rank, rendezvous, args, min(total, len(val_paths)))

    # ---- the frozen nets: a random one, and beside it, of the same shape, the given one
    weights, resnet = read_trunk(args)
    torch.manual_seed(args.seed)
    nets = {"random": (FPNEncoder if args.arch == "fpn" else C4Encoder)(resnet)}
    if weights:
        given = copy.deepcopy(nets["random"])
        given.resnet.load_state_dict(weights.backbone)
        if args.arch == "fpn":
            given.load_state_dict({**given.state_dict(), **weights.extras})
            if not weights.extras:
                talk(f"{args.weights} holds no neck and no box head: theirs are random")
        nets = {"given": given} if args.no_random else {"given": given, **nets}
    for net in nets.values():
        net.to(device, memory_format=torch.channels_last if device.type == "cuda" else None)
        net.eval().requires_grad_(False)
    before = {name: fingerprint(net) for name, net in nets.items()}
    source = weights.source if weights else f"random init, seed {args.seed}"
    if state and state["nets"] != before:
        fail(f"{args.out} was begun with other weights than {args.weights}")
    lines = state["lines"] if state else []

    def encode(name, images, boxes):
        """uint8 RGB (N, 3, h, w), boxes (N, M, 4) -> (N * M, D) float32: RoI features after the head."""
        images = normalise(images, weights if name == "given" else None, device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return nets[name].features(images, boxes.to(device)).flatten(1).float()

    def extract(name, protocol, paths, indices):
        """(N, grid**2, D) of the images under a protocol, on every rank."""
        mine, features = indices[rank::world], []
        batches = [mine[i:i + 32] for i in range(0, len(mine), 32)]
        pad_by_reflection(nets[name], protocol == "reflect")
        dataset = Cells(paths, protocol, args.image_size, args.grid, args.seed)
        for images, boxes in load(dataset, batches, args):
            cells = encode(name, images.flatten(0, 1), boxes.flatten(0, 1))
            features.append(cells.unflatten(0, (len(images), args.grid ** 2)))
        pad_by_reflection(nets[name], False)
        return gather(torch.cat(features), world, len(indices))

    subset = torch.randperm(len(train_paths), generator=generator_for(args.seed, "subset")).tolist()[:total]
    held = min(total - 1, max(1, round(args.holdout * total)))
    talk(f"{args.weights}: {source}, {resnet} {args.arch}; {total} train images ({held} held out), "
         f"{len(val_paths)} val images; {args.image_size} px; {world} process(es), {args.device}", flush=True)
    for protocol in args.protocol:
        for name in nets:
            if any((line["protocol"], line["net"]) == (protocol, name) for line in lines):
                continue                                    # done before the run was stopped
            # ---- features once, then linear layers on them; every rank does the same from here on
            features = extract(name, protocol, train_paths, subset)
            mean, std = torch.zeros_like(features[0, 0]), torch.ones_like(features[0, 0])
            if args.features == "standard":
                mean, std = features[held:].mean(dim=(0, 1)), features[held:].std(dim=(0, 1))
                std = std.clamp(min=1e-5 * (mean.abs() + std).max().item() or 1)    # constant features

            def scaled(x):
                return F.normalize(x, dim=-1) if args.features == "unit" else (x - mean) / std

            features = scaled(features)
            if not features.isfinite().all():
                fail(f"{name} weights give features that are not finite")
            heads = train_heads(features[held:], args.lr, args.epochs, args.batch_size,
                                generator_for(args.seed, "heads"))
            scores = [confusion(features[:held], head).diag().mean().item() for head in heads]
            head, lr = max(zip(scores, heads, args.lr), key=lambda triple: triple[0])[1:]   # not by val
            features = extract(name, protocol, val_paths, list(range(len(val_paths))))
            tables = {protocol: confusion(scaled(features), head)}
            if protocol == "full":                          # the same layer where there is no content
                gray = torch.tensor(PIXEL_MEAN)[:, None, None].mul(255).round().byte()
                gray = gray.expand(1, 3, args.image_size, args.image_size)
                gray = encode(name, gray, grid_boxes(args.image_size, args.grid)[None])
                tables["gray"] = confusion(scaled(gray[None]), head)
            for shown, table in tables.items():
                lines.append({"protocol": shown, "net": name, **summary(table.cpu()), "lr": lr,
                              "held_out": scores, "confusion": table.tolist()})
                talk(f"{shown}, {name}: {lines[-1]['top1']:.2f} %, {time.time() - start:.0f} s", flush=True)
            if rank == 0:
                everything = {"args": vars(args), "nets": before, "lines": lines}
                write(args.out, "checkpoint.pth", lambda f: torch.save(everything, f))

    for name, net in nets.items():
        check_frozen(net, before[name])
    if rank == 0:
        everything = {"weights": args.weights, "source": source, "resnet": resnet, "lines": lines,
                      "paper": PAPER, "chance": 100 / args.grid ** 2, "train_images": total,
                      "val_images": len(val_paths), "args": vars(args), "torch": torch.__version__,
                      "seconds": round(time.time() - start, 1)}
        write(args.out, "results.json", lambda f: f.write(json.dumps(everything, indent=1).encode()))
        draw(lines, args, os.path.join(args.out, "loc.png"))
        titles = "all", "corners", "edges", "centre"
        print(f"\n{args.weights}, chance {100 / args.grid ** 2:.1f} %\n{'protocol':10}{'net':10}"
              + "".join(f"{title:>9}" for title in titles) + f"{'lr':>9}")
        for line in lines:
            values = [line[name] for name in ("top1", *titles[1:])]
            print(f"{line['protocol']:10}{line['net']:10}" + "".join(
                f"{'-' if value is None else f'{value:.1f}':>9}" for value in values) + f"{line['lr']:9g}")
        for name, value in PAPER.items():
            print(f"{'paper':10}{name:10}{value:9}")
        print(f"wrote {args.out}/results.json and {args.out}/loc.png")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = get_args()
    launch(main, arguments, find_images(arguments.data), read_state(arguments))
