"""Stage 2b: what frozen weights know about place (Sec. 5.2, Fig. 4, Table 3a, Loc): which cell of the grid?

    python probe_loc.py runs/insloc_c4 /data/imagenet                 # every GPU of this machine, or the CPU

The RoI feature of each of an image's 3x3 cells (C4: RoIAlign on res4, res5, mean; FPN: box head on P2 to P5;
no projector, which transfer drops) goes to one linear layer that names the cell. The paper says no more:
neither how the layer is trained, nor whether the net sees the cells in the image or one by one. So there are
three protocols, and a random net beside the given one. `full` is our reading of the paper. There zero padding
tells the place, and a random net beats trained ones (docs/results). `reflect` takes the zeros away. Compare
weights under one protocol and one readout only.
"""
import argparse
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

import stage
from insloc import generator_for
from weights import RESNETS, add_weights_arguments, centre_view, frozen_nets, read_photo

PAPER = {"SwAV": 58.4, "BYOL": 67.6, "MoCo-v2": 71.9, "InsLoc": 74.2}           # Table 3a, Loc: R50-C4, 3x3
PROTOCOLS = ["full",        # one forward pass of the image, its cells as boxes
             "reflect",     # the same, every convolution padding by reflection: a border without zeros
             "alone"]       # every cell cut out and seen by itself: content alone
RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]       # the paper names none: a held-out tenth chooses


def get_args(argv=None):
    parser = stage.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", help="run directory, checkpoint of any system, or `random`")
    add("data", help="folder with train/ and val/, images at any depth; labels are not used")
    add("--arch", choices=["c4", "fpn"], default="c4", help="whose RoI features [paper 5.2: R50-C4]")
    add("--protocol", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="see above [ours: all]")
    add("--grid", type=int, default=3, help="cells a side [paper 5.2: M = 9]")
    add("--train-images", type=int, default=5000, help="at most; more are a stronger readout [ours: weak]")
    add("--epochs", type=int, default=10, help="of the linear layers, cosine [ours: 180 steps, weak]")
    add("--image-size", type=int, default=224, help="side of the centre crop, out of 8/7 of it [MoCo v2]")
    add("--resnet", choices=RESNETS, default="resnet50", help="of `random`; else WEIGHTS tell [paper 4.3]")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the frozen net [MoCo v2]")
    add_weights_arguments(parser)
    stage.add_machine_arguments(parser, "runs/loc_WEIGHTS")
    args = parser.parse_args(argv)
    stage.check_machine_arguments(parser, args)
    if args.epochs < 1 or args.train_images < max(2, args.world):
        parser.error("--epochs must be at least 1, --train-images 2 and as many as processes")
    if args.grid < 2 or args.image_size % 32 or args.image_size < max(64, 8 * args.grid):
        parser.error("--grid must be at least 2, --image-size a multiple of 32 from 64 on, cells of 8 pixels")
    args.out = args.out or "runs/loc_" + os.path.basename(os.path.abspath(args.weights)).split(".")[0]
    return args


find_data = stage.find_splits


def grid_boxes(size, grid=3):
    """The cells of a square of `size` pixels, row by row: (grid**2, 4). They tile it, whatever the size."""
    edge = torch.linspace(0, size, grid + 1)
    first = torch.cartesian_prod(edge[:-1], edge[:-1])                                  # (grid**2, 2): y1, x1
    last = torch.cartesian_prod(edge[1:], edge[1:])
    return torch.cat([first.flip(1), last.flip(1)], dim=1)


class ProtocolImages(torch.utils.data.Dataset):
    """An image under a protocol: P pictures, uint8 (P, 3, h, w), and M boxes of each (P, M, 4).

    `full`, `reflect`: the image and its cells. `alone`: a picture for each cell, not resampled, since
    resampling some of them would blur these alone.
    """

    def __init__(self, paths, protocol, size, grid):
        self.paths, self.protocol, self.size, self.grid = paths, protocol, size, grid

    def __getitem__(self, index):
        image = centre_view(read_photo(self.paths[index]), self.size)
        boxes = grid_boxes(self.size, self.grid)
        if self.protocol != "alone":
            return image[None], boxes[None]
        side = self.size // self.grid
        cells = [image[:, y:y + side, x:x + side] for x, y in boxes[:, :2].int().tolist()]
        return torch.stack(cells), torch.tensor([0.0, 0.0, side, side]).expand(len(cells), 1, 4)


def pad_by(net, mode):
    """Makes every convolution pad by "zeros" or "reflect"."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = mode


def train_heads(features, rates, epochs, generator, batch_size=256):
    """Features (N, M, D) -> a linear layer for each rate: SGD, cosine, no decay, all on the same batches."""
    n, m, d = features.shape
    heads = nn.ModuleList(nn.Linear(d, m) for _ in rates).to(features.device)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(n / batch_size))
    for _ in range(epochs):
        for batch in torch.randperm(n, generator=generator).split(batch_size):
            x = features[batch.to(features.device)].flatten(0, 1)                                # (n * M, D)
            cells = torch.arange(m, device=x.device).repeat(len(batch))
            loss = sum(F.cross_entropy(head(x), cells) for head in heads)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return heads.requires_grad_(False)


def confusion(features, head):
    """Features (N, M, D) -> (M, M): for which percentage of the images the layer takes cell i for cell j."""
    guess = head(features).argmax(dim=2)                                                         # (N, M)
    return 100 * F.one_hot(guess, features.shape[1]).double().mean(dim=0)


def main(rank, device, args, train, val, data_digest):
    # ---- the frozen nets, and the run in --out, if it goes on
    nets, sources = frozen_nets(args, args.arch, device)
    settings, state = stage.start_probe(args, nets, data_digest, progress="lines")
    order = torch.randperm(len(train), generator=generator_for(args.seed, "subset"))
    train = [train[i] for i in order[:args.train_images]]
    held_out = max(1, round(len(train) / 10))
    for name, source in sources.items():
        stage.say(f"{name}: {source}")
    stage.say(f"{len(train)} train, {len(val)} val images; {args.world} x {args.device}")

    def encode(net, paths, protocol):
        """RoI features (N, M, D) of the M cells of N images, on every rank; each encodes a part of them."""
        pad_by(net, "reflect" if protocol == "reflect" else "zeros")
        own = torch.arange(len(paths)).tensor_split(args.world)[rank]
        batches = [batch.tolist() for batch in own.split(32)]
        dataset = ProtocolImages(paths, protocol, args.image_size, args.grid)
        loaded = stage.load(dataset, batches, args.workers, pin_memory=args.device == "cuda")
        parts = []
        for images, boxes in loaded:                                    # (n, P, 3, h, w), (n, P, M / P, 4)
            x = images.flatten(0, 1).to(device, non_blocking=True)
            x = net.pixels(x).contiguous(memory_format=torch.channels_last)
            boxes = boxes.flatten(0, 1).to(device, non_blocking=True)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                features = net.features(x, boxes)
            parts.append(features.float().view(len(images), args.grid ** 2, -1))
        features = torch.cat(stage.gather_objects(torch.cat(parts).cpu())).to(device)
        if not features.isfinite().all():
            stage.leave("the weights give features that are not finite")
        return features

    def locate(net, protocol):
        """Features once, then linear layers on them, the same on all ranks; a held-out tenth chooses one."""
        features = encode(net, train, protocol)
        heads = train_heads(features[held_out:], RATES, args.epochs, generator_for(args.seed, "heads"))
        best = max(range(len(RATES)), key=lambda i: confusion(features[:held_out], heads[i]).trace())
        table = confusion(encode(net, val, protocol), heads[best])                                   # (M, M)
        return {"top1": table.diag().mean().item(), "chance": 100 / args.grid ** 2, "lr": RATES[best],
                "confusion": table.tolist()}

    found = {}
    for line in state["lines"] if state else []:
        found[line["protocol"], line["net"]] = line
    for protocol in args.protocol:
        for name, net in nets.items():
            if (protocol, name) not in found:                           # else done before the run was stopped
                found[protocol, name] = {"protocol": protocol, "net": name, **locate(net, protocol)}
                if rank == 0:
                    stage.save_checkpoint(args.out, {"settings": settings, "lines": list(found.values())})
            line = found[protocol, name]
            stage.say(f"{protocol:8} {name:7} top-1 {line['top1']:.2f} %, at the rate {line['lr']:g}")

    # ---- the results, below them the paper's
    lines = list(found.values())
    stage.write_results(args, settings, nets, {"lines": lines, "paper": PAPER, "sources": sources})
    stage.say(f"chance: top-1 {100 / args.grid ** 2:.2f} %")
    if "full" in args.protocol and args.grid == 3:
        rows = ", ".join(f"{method} {top1}" for method, top1 in PAPER.items())
        stage.say(f"the paper, Table 3a, ResNet-50 C4, by a protocol that is not known in full: {rows}")
    stage.say(f"wrote {args.out}/results.json")


if __name__ == "__main__":
    stage.launch(main, get_args(), find_data)
