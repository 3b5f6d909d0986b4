"""Stage 2b: what frozen weights know about place (Sec. 5.2, Fig. 4, Table 3a, Loc): which cell of the grid?

    python probe_loc.py runs/insloc_c4 /data/imagenet                 # every GPU of this machine, or the CPU

The RoI feature of each of an image's 3x3 cells (C4: RoIAlign on res4, res5, mean; FPN: box head on P2 to P5;
no projector, which transfer drops) goes to one linear layer that names the cell. The paper says little more,
so there are three protocols, and a random net beside the given one. Under `full`, the paper's words, zero
padding tells the place: a random net beats trained ones with every readout that was tried, and scores 99 with
most (docs/results). `reflect` with few steps of plain SGD comes nearest to the paper's claim; many steps find
what is left of the border. Compare weights under one protocol and one readout only.
"""
import argparse
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import center_crop, resize

import stage
from insloc import C4Encoder, FPNEncoder, generator_for, read_image
from weights import INPUTS, RESNETS, Weights, read_weights

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
    add("--protocol", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="[paper 5.2: full; ours: all]")
    add("--grid", type=int, default=3, help="cells a side [paper 5.2: M = 9]")
    add("--train-images", type=int, default=5000, help="at most; more are a stronger readout [ours: weak]")
    add("--epochs", type=int, default=10, help="of the linear layers, cosine [ours: 180 steps, weak]")
    add("--image-size", type=int, default=224, help="side of the centre crop, out of 8/7 of it [MoCo v2]")
    add("--resnet", choices=RESNETS, default="resnet50", help="of `random`; else WEIGHTS tell [paper 4.3]")
    add("--input", choices=INPUTS, default="imagenet", help="the pixels WEIGHTS know [ours: most files']")
    add("--prefix", help="the place in WEIGHTS to take [ours: the only one with a whole trunk]")
    add("--trust", action="store_true", help="let WEIGHTS run code, as a pickle does [ours: off]")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the frozen net [MoCo v2]")
    stage.add_machine_arguments(parser, "runs/loc_WEIGHTS")
    args = parser.parse_args(argv)
    stage.check_machine_arguments(parser, args)
    if args.epochs < 1 or args.train_images < max(2, args.world):
        parser.error("--epochs must be at least 1, --train-images 2, and one for each process")
    if args.grid < 2 or args.image_size % 32 or args.image_size < max(64, 8 * args.grid):
        parser.error("--grid must be at least 2, --image-size a multiple of 32 from 64 on, cells of 8 pixels")
    args.out = args.out or "runs/loc_" + os.path.basename(os.path.abspath(args.weights)).split(".")[0]
    return args


def find_data(args):
    """DATA -> the paths of train, of val, a digest of their names."""
    stage.check_new(args, ("checkpoint.pth", "checkpoint_prev.pth", "results.json"))
    paths, all_names = [], []
    for split in ("train", "val"):
        folder = os.path.join(args.data, split)
        names = stage.find_images(folder)
        if len(names) < max(2, args.world):
            stage.fail(f"{folder} has {len(names)} images; needed are two, and one for each process")
        paths.append([os.path.join(folder, os.fsdecode(name)) for name in names])
        all_names += [split.encode(), *names]
    return *paths, stage.digest(all_names)


def grid_boxes(size, grid=3):
    """The cells of a square of `size` pixels, row by row: (grid**2, 4). They tile it, whatever the size."""
    edge = torch.linspace(0, size, grid + 1)
    return torch.stack([edge[[x, y, x + 1, y + 1]] for y in range(grid) for x in range(grid)])


class Cells(torch.utils.data.Dataset):
    """An image under a protocol: uint8 (1, 3, S, S) and M boxes (1, M, 4); `alone`: M cells (M, 3, s, s), a
    box each (M, 1, 4). Cells are not resampled: where only some are, the blur tells them apart."""

    def __init__(self, paths, protocol, size, grid):
        self.paths, self.protocol, self.size, self.grid = paths, protocol, size, grid

    def __getitem__(self, index):
        try:
            image = read_image(self.paths[index])
        except Exception as error:              # decoders fail in many ways; an accuracy of the rest misleads
            raise OSError(f"{self.paths[index]} cannot be read: {stage.last_line(error)}") from None
        longest = 4 * min(image.shape[1:])      # a long strip, resized as a whole, would take gigabytes
        image = center_crop(image, [min(side, longest) for side in image.shape[1:]])
        image = center_crop(resize(image, [self.size * 8 // 7]), [self.size, self.size])    # 224 out of 256
        boxes = grid_boxes(self.size, self.grid)
        if self.protocol == "alone":
            side = self.size // self.grid
            cells = [image[:, y:y + side, x:x + side] for x, y in boxes[:, :2].int().tolist()]
            return torch.stack(cells), torch.tensor([0.0, 0.0, side, side]).expand(len(cells), 1, 4)
        return image[None], boxes[None]


def make_net(weights, args):
    """The encoder of these weights; what they lack is random. pixels (2, 3, 1, 1): their mean, std."""
    torch.manual_seed(args.seed)
    net = FPNEncoder(weights.resnet) if args.arch == "fpn" else C4Encoder(weights.resnet)
    net.resnet.load_state_dict(weights.backbone or net.resnet.state_dict())
    net.load_state_dict(weights.extras, strict=False)           # those of an FPN mean nothing to a C4Encoder
    for block in net.modules():
        if weights.stride_in_1x1 and hasattr(block, "conv3"):                           # a bottleneck
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    net.register_buffer("pixels", torch.tensor([weights.pixel_mean, weights.pixel_std])[:, :, None, None])
    net.is_bgr = weights.channel_order == "BGR"
    return net


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
    say = print if rank == 0 else lambda *given, **more: None
    digest = lambda net: stage.digest(x.cpu().numpy().tobytes() for x in net.state_dict().values())

    # ---- the frozen nets: a random one, and beside it the given one
    found = {"random": Weights({}, {}, args.resnet, "random init", *INPUTS["imagenet"], ())}
    if args.weights != "random":
        try:
            found["given"] = read_weights(args.weights, args.trust, args.prefix, args.input)
        except (OSError, ValueError) as error:
            stage.leave(f"{args.weights}: {error}")
        found["random"] = found["random"]._replace(resnet=found["given"].resnet)
    nets = nn.ModuleDict({name: make_net(weights, args) for name, weights in found.items()})
    nets.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    # ---- the run in --out, if it goes on, and the other ranks: the same settings, images and nets
    settings = {**vars(args), "images": data_digest, "nets": digest(nets)}
    state = stage.resume(args, settings, stage.LOCAL | {"world", "weights", "trust"}, say)
    lines = state["lines"] if state else []
    stage.check_ranks({**settings, "lines done": len(lines)})
    subset = torch.randperm(len(train), generator=generator_for(args.seed, "subset"))[:args.train_images]
    held_out = max(1, round(len(subset) / 10))
    sources = {name: f"{weights.source}, {len(weights.extras)} tensors of an FPN's neck and box head"
               for name, weights in found.items()}
    say(f"{sources}; {len(subset)} train, {len(val)} val images; {args.world} x {args.device}", flush=True)

    def encode(net, paths, protocol, indices):
        """RoI features (N, M, D) of the M cells of N images, on every rank; each encodes a part of them."""
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = "reflect" if protocol == "reflect" else "zeros"
        loader = torch.utils.data.DataLoader(
            Cells(paths, protocol, args.image_size, args.grid), batch_size=32,
            sampler=indices.tensor_split(args.world)[rank].tolist(), num_workers=args.workers,
            pin_memory=args.device == "cuda", multiprocessing_context="fork" if args.workers else None)
        parts = []
        for images, boxes in loader:                            # (n, P, 3, h, w), (n, P, M / P, 4)
            x = images.flatten(0, 1).to(device, non_blocking=True).float() / 255
            x = ((x.flip(1) if net.is_bgr else x) - net.pixels[0]) / net.pixels[1]
            boxes = boxes.flatten(0, 1).to(device, non_blocking=True)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                features = net.features(x.contiguous(memory_format=torch.channels_last), boxes)
            parts.append(features.flatten(1).float().unflatten(0, (len(images), -1)))
        return torch.cat(stage.gather_objects(torch.cat(parts).cpu())).to(device)

    for protocol in args.protocol:
        for name, net in nets.items():
            if any(line["protocol"] == protocol and line["net"] == name for line in lines):
                continue                                        # done before the run was stopped
            # ---- features once, then linear layers on them, the same on all ranks
            features = encode(net, train, protocol, subset)
            if not features.isfinite().all():
                stage.leave(f"{name} weights give features that are not finite")
            heads = train_heads(features[held_out:], RATES, args.epochs, generator_for(args.seed, "heads"))
            best = max(range(len(RATES)), key=lambda i: confusion(features[:held_out], heads[i]).trace())
            table = confusion(encode(net, val, protocol, torch.arange(len(val))), heads[best])   # (M, M)
            lines.append({"protocol": protocol, "net": name, "top1": table.diag().mean().item(),
                          "lr": RATES[best], "confusion": table.tolist()})
            say(f"{protocol:8} {name:7} {lines[-1]['top1']:6.2f} %", flush=True)
            if rank == 0:
                stage.save_checkpoint(args.out, {"settings": settings, "lines": lines})

    # ---- the results, below them the paper's
    if digest(nets) != settings["nets"]:
        stage.fail("a frozen net has changed: the results are void")
    if rank == 0:
        text = json.dumps({"lines": lines, "chance": 100 / args.grid ** 2, "paper": PAPER, "sources": sources,
                           "settings": settings, "commit": stage.commit()}, indent=1)
        stage.write_atomically(f"{args.out}/results.json", lambda f: f.write(text.encode()))
    say(f"chance {100 / args.grid ** 2:.1f}; paper, Table 3a, R50-C4: {PAPER}; wrote {args.out}/results.json")


if __name__ == "__main__":
    stage.launch(main, get_args(), find_data)
