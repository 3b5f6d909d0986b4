"""Stage 2b: what frozen weights know about place (Sec. 5.2, Fig. 4, Table 3a, Loc): which cell of the grid?

    python probe_loc.py runs/insloc_c4 /data/imagenet                 # every GPU of this machine, or the CPU

The RoI feature of each of an image's 3x3 cells (C4: RoIAlign on res4, res5, mean; FPN: box head on P2 to P5;
no projector, which transfer drops) goes to one linear layer that names the cell. The paper says little more,
so there are three protocols of it, and a random net beside the given one. Under `full`, the paper's words,
zero padding tells the place, and a random net beats trained ones (docs/results). `reflect` takes the zeros
away. Compare weights under one protocol and one readout only.

`swap` trains nothing and measures the paper's reason for pasting (Sec. 4.1): each image, pasted at one place
on two backgrounds, should have the same RoI feature. swap.png shows on which pixels the feature depends.
"""
import argparse
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import center_crop, resize
from torchvision.utils import draw_bounding_boxes, save_image

import stage
from insloc import C4Encoder, FPNEncoder, generator_for, paste, read_image
from weights import RESNETS, Pixels, add_weights_arguments, load_trunk, random_weights, read_weights

PAPER = {"SwAV": 58.4, "BYOL": 67.6, "MoCo-v2": 71.9, "InsLoc": 74.2}           # Table 3a, Loc: R50-C4, 3x3
PROTOCOLS = ["full",        # one forward pass of the image, its cells as boxes
             "reflect",     # the same, every convolution padding by reflection: a border without zeros
             "alone",       # every cell cut out and seen by itself: content alone
             "swap"]        # no cells: an image pasted at one place on two backgrounds
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
    add("--swap-images", type=int, default=1000, help="at most; 300 at least are wanted [ours: minutes]")
    add("--epochs", type=int, default=10, help="of the linear layers, cosine [ours: 180 steps, weak]")
    add("--image-size", type=int, default=224, help="side of the centre crop, out of 8/7 of it [MoCo v2]")
    add("--resnet", choices=RESNETS, default="resnet50", help="of `random`; else WEIGHTS tell [paper 4.3]")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the frozen net [MoCo v2]")
    add_weights_arguments(parser)
    stage.add_machine_arguments(parser, "runs/loc_WEIGHTS")
    args = parser.parse_args(argv)
    stage.check_machine_arguments(parser, args)
    if args.epochs < 1 or args.train_images < max(2, args.world) or args.swap_images <= max(3, args.world):
        parser.error("--epochs must be at least 1, --train-images 2, --swap-images 4, more than processes")
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
        if len(names) <= max(3, args.world):
            stage.fail(f"{folder} has {len(names)} images; needed are four, and more than processes")
        paths.append([os.path.join(folder, os.fsdecode(name)) for name in names])
        all_names += [split.encode(), *names]
    return *paths, stage.digest(all_names)


def grid_boxes(size, grid=3):
    """The cells of a square of `size` pixels, row by row: (grid**2, 4). They tile it, whatever the size."""
    edge = torch.linspace(0, size, grid + 1)
    return torch.stack([edge[[x, y, x + 1, y + 1]] for y in range(grid) for x in range(grid)])


class ProtocolImages(torch.utils.data.Dataset):
    """An image under a protocol: P pictures, uint8 (P, 3, h, w), and M boxes of each (P, M, 4).

    `full`, `reflect`: the image, its cells. `alone`: a picture for each cell, not resampled, since resampling
    some of them would blur these alone. `swap`: the image, pasted as a box of sides U{S / 2..3 S / 4} on two
    others. Images 2 i and 2 i + 1 share backgrounds, place and size.
    """

    def __init__(self, paths, protocol, args):
        self.paths, self.protocol = paths, protocol
        self.size, self.grid, self.seed = args.image_size, args.grid, args.seed

    def read(self, index):
        """The centre crop of an image, uint8 (3, S, S)."""
        try:
            image = read_image(self.paths[index])
        except Exception as error:              # decoders fail in many ways; an accuracy of the rest misleads
            raise OSError(f"{self.paths[index]} cannot be read: {stage.last_line(error)}") from None
        longest = 4 * min(image.shape[1:])      # a long strip, resized as a whole, would take gigabytes
        image = center_crop(image, [min(side, longest) for side in image.shape[1:]])
        return center_crop(resize(image, [self.size * 8 // 7]), [self.size, self.size])     # 224 out of 256

    def __getitem__(self, index):
        image = self.read(index)
        if self.protocol == "swap":
            pair = index // 2
            generator = generator_for(self.seed, "swap", pair)
            draw = lambda low, high: torch.randint(low, high + 1, (), generator=generator).item()
            h, w = (draw(self.size // 2, self.size * 3 // 4) for _ in range(2))
            top, left = draw(0, self.size - h), draw(0, self.size - w)
            others = torch.randperm(len(self.paths) - 2, generator=generator)[:2]
            others += 2 * (others >= 2 * pair)                              # neither image of this pair
            pasted = [paste(self.read(other), resize(image, [h, w]), top, left) for other in others]
            composites, boxes = zip(*pasted)
            return torch.stack(composites), torch.stack(boxes)[:, None]
        boxes = grid_boxes(self.size, self.grid)
        if self.protocol == "alone":
            side = self.size // self.grid
            cells = [image[:, y:y + side, x:x + side] for x, y in boxes[:, :2].int().tolist()]
            return torch.stack(cells), torch.tensor([0.0, 0.0, side, side]).expand(len(cells), 1, 4)
        return image[None], boxes[None]


def make_net(weights, args):
    """The encoder of these weights, with the pixels that it knows. What the weights lack is random."""
    torch.manual_seed(args.seed)
    roi_size = min(14, args.image_size // 16)                   # as pretrain.py chooses it
    net = FPNEncoder(weights.resnet) if args.arch == "fpn" else C4Encoder(weights.resnet, roi_size=roi_size)
    load_trunk(net.resnet, weights)
    net.load_state_dict(weights.extras, strict=False)           # those of an FPN mean nothing to a C4Encoder
    net.pixels = Pixels(weights)
    return net


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


def pixel_energy(features, images, keys):
    """How much features (N, D) depend on each pixel of images (N, 3, S, S) that require grad: (N, S, S).

    It is the squared gradient of features . v, v a random direction by key. Its mean over directions is the
    squared norm of the Jacobian, |d features / d pixel|^2. Frees the graph.
    """
    v = torch.stack([torch.randn(features.shape[1], generator=generator_for(*key)) for key in keys])
    gradient, = torch.autograd.grad((features * v.to(features.device)).sum(), images)
    return gradient.square().sum(dim=1)


def share_inside(energy, boxes):
    """Energy (N, S, S), boxes (N, 4) of whole pixels -> the part of it that lies in the box (N,)."""
    centres = torch.arange(energy.shape[1], device=energy.device) + 0.5
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)
    rows, columns = (y1 < centres) & (centres < y2), (x1 < centres) & (centres < x2)            # (N, S)
    return (energy * rows[:, :, None] * columns[:, None]).sum(dim=(1, 2)) / energy.sum(dim=(1, 2))


def swap_scores(features):
    """Cosines of features (N, 2, D) of N images on two backgrounds; images 2 i and 2 i + 1 share both.

    same_instance: an image on its two backgrounds. same_background: two images at one place on one background
    (the leak). same_place: these two on different backgrounds, the part of the leak that place and size make.
    top1: for which percentage of the images the nearest feature on another background is its own.
    """
    sets = F.normalize(features - features.mean(dim=0), dim=2)
    a, b = sets.unbind(dim=1)
    own = torch.arange(len(a), device=a.device)
    twins = sets[0::2] @ sets[1::2].transpose(1, 2)             # (N / 2, 2, 2): by the backgrounds of the two
    return {"same_instance": (a * b).sum(dim=1).mean().item(),
            "same_background": twins.diagonal(dim1=1, dim2=2).mean().item(),
            "same_place": twins.flip(2).diagonal(dim1=1, dim2=2).mean().item(),
            "top1": 100 * ((a @ b.T).argmax(dim=1) == own).double().mean().item()}


def draw_swap(nets, views, path):
    """Two images, each on two backgrounds; below them a row for each net: the pixels its feature depends on.

    Brightness is the root of the energy, relative to the picture's largest.
    """
    images, boxes = (torch.cat(parts) for parts in zip(views[0], views[1]))         # (4, 3, S, S), (4, 1, 4)
    rows = [images]
    for net in nets.values():
        pad_by(net, "zeros")
        x = net.pixels(images.to(net.pixels.mean.device)).requires_grad_()
        energy = 0
        for t in range(16):
            features = net.features(x, boxes.to(x.device)).flatten(1)
            energy += pixel_energy(features, x, [("draw", t, i) for i in range(4)])
        energy = F.avg_pool2d(energy[:, None], 4)                       # strides leave a pattern of squares
        energy = F.interpolate(energy / energy.amax(dim=(2, 3), keepdim=True), scale_factor=4)
        rows.append((255 * energy.sqrt()).byte().cpu().expand(-1, 3, -1, -1))
    frames = (boxes - torch.tensor([0, 0, 1, 1])).repeat(len(rows), 1, 1)           # a frame's last pixels
    cells = [draw_bounding_boxes(*cell, colors="red") / 255 for cell in zip(torch.cat(rows), frames)]
    save_image(cells, path, nrow=4)


def main(rank, device, args, train, val, data_digest):
    say = print if rank == 0 else lambda *given, **more: None
    digest = lambda net: stage.digest(x.cpu().numpy().tobytes() for x in net.state_dict().values())

    # ---- the frozen nets: a random one, and beside it the given one
    found = {"random": random_weights(args.resnet)}
    if args.weights != "random":
        try:
            found["given"] = read_weights(args.weights, args.trust, args.prefix, args.input)
        except (OSError, ValueError) as error:
            stage.leave(f"{args.weights}: {error}")
        found["random"] = random_weights(found["given"].resnet)
    nets = nn.ModuleDict({name: make_net(weights, args) for name, weights in found.items()})
    nets.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    # ---- the run in --out, if it goes on, and the other ranks: the same settings, images and nets
    settings = {**vars(args), "images": data_digest, "nets": digest(nets)}
    state = stage.resume(args, settings, stage.LOCAL | {"world", "weights", "trust"}, say)
    lines = state["lines"] if state else []
    stage.check_ranks({**settings, "lines done": len(lines)})
    subset = torch.randperm(len(train), generator=generator_for(args.seed, "subset"))[:args.train_images]
    held_out = max(1, round(len(subset) / 10))
    chosen = torch.randperm(len(val), generator=generator_for(args.seed, "swap"))[:args.swap_images]
    swapped = [val[i] for i in chosen[:len(chosen) // 2 * 2]]                   # an even number: pairs
    sources = {name: f"{weights.source}, {len(weights.extras)} tensors of an FPN's neck and box head"
               for name, weights in found.items()}
    say(f"{sources}; {len(subset)} train, {len(val)} val images; {args.world} x {args.device}", flush=True)

    def encode(net, paths, protocol, indices):
        """RoI features (N, M, D) of N images, on every rank; each encodes a part of them.

        M are the cells, or under `swap` the backgrounds. Then also (N, M, 2): the shares of the gradient's
        energy, and of the area, that lie inside the box.
        """
        pad_by(net, "reflect" if protocol == "reflect" else "zeros")
        own = indices.tensor_split(args.world)[rank]
        loader = torch.utils.data.DataLoader(
            ProtocolImages(paths, protocol, args), batch_size=32, sampler=own.tolist(),
            num_workers=args.workers, pin_memory=args.device == "cuda",
            multiprocessing_context="fork" if args.workers else None)
        parts, shares = [], []
        for batch, (images, boxes) in zip(own.split(32), loader):       # (n, P, 3, h, w), (n, P, M / P, 4)
            x = net.pixels(images.flatten(0, 1).to(device, non_blocking=True))
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_(protocol == "swap")
            boxes = boxes.flatten(0, 1).to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                features = net.features(x, boxes).flatten(1)
            if protocol == "swap":
                keys = [(args.seed, "direction", index) for index in batch.repeat_interleave(2).tolist()]
                energy = share_inside(pixel_energy(features, x, keys), boxes[:, 0])
                area = (boxes[:, 0, 2:] - boxes[:, 0, :2]).prod(dim=1) / args.image_size ** 2
                shares.append(torch.stack([energy, area], dim=1).view(len(images), 2, 2))
            parts.append(features.detach().float().view(len(images), images.shape[1] * boxes.shape[1], -1))
        gather = lambda parts: torch.cat(stage.gather_objects(torch.cat(parts).cpu())).to(device)
        found = [gather(rows) for rows in (parts, shares) if rows]
        if not all(rows.isfinite().all() for rows in found):
            stage.leave("the weights give features, or gradients, that are not finite")
        return found

    def locate(net, protocol):
        """Features once, then linear layers on them, the same on all ranks; a held-out tenth chooses one."""
        features, = encode(net, train, protocol, subset)
        heads = train_heads(features[held_out:], RATES, args.epochs, generator_for(args.seed, "heads"))
        best = max(range(len(RATES)), key=lambda i: confusion(features[:held_out], heads[i]).trace())
        features, = encode(net, val, protocol, torch.arange(len(val)))
        table = confusion(features, heads[best])                                                     # (M, M)
        return {"top1": table.diag().mean().item(), "chance": 100 / args.grid ** 2, "lr": RATES[best],
                "confusion": table.tolist()}

    def swap(net):
        features, shares = encode(net, swapped, "swap", torch.arange(len(swapped)))
        shares = dict(zip(("gradient_inside", "area_inside"), shares.mean(dim=(0, 1)).tolist()))
        return {**swap_scores(features), "chance": 100 / len(swapped), **shares}

    for protocol in args.protocol:
        for name, net in nets.items():
            line = next((line for line in lines if (line["protocol"], line["net"]) == (protocol, name)), None)
            if not line:                                        # else done before the run was stopped
                result = swap(net) if protocol == "swap" else locate(net, protocol)
                line = {"protocol": protocol, "net": name, **result}
                lines.append(line)
                if rank == 0:
                    stage.save_checkpoint(args.out, {"settings": settings, "lines": lines})
            numbers = [f"{key} {value:.4g}" for key, value in line.items() if isinstance(value, float)]
            say(f"{protocol:8} {name:7}", ", ".join(numbers), flush=True)

    # ---- the results, below them the paper's
    if digest(nets) != settings["nets"]:
        stage.fail("a frozen net has changed: the results are void")
    if rank == 0:
        text = json.dumps({"lines": lines, "paper": PAPER, "sources": sources, "settings": settings,
                           "commit": stage.commit()}, indent=1)
        stage.write_atomically(f"{args.out}/results.json", lambda f: f.write(text.encode()))
        if "swap" in args.protocol:
            draw_swap(nets, ProtocolImages(swapped, "swap", args), f"{args.out}/swap.png")
    paper = f"; paper, Table 3a, R50-C4, top1 of full: {PAPER}" if "full" in args.protocol else ""
    say(f"wrote {args.out}/results.json{paper}")


if __name__ == "__main__":
    stage.launch(main, get_args(), find_data)
