"""Stage 2a: what frozen weights know about class (Table 3a, Cls): linear classification, or k-NN.

    python probe_cls.py runs/insloc_c4 /data/imagenet                 # every GPU of this machine, or the CPU
    python probe_cls.py runs/insloc_c4 /data/imagenet --knn 20        # in minutes, to watch a run

The trunk is read as a plain ResNet, by the mean over its last map: C4's RoI head (res5) stands behind res4,
and an FPN is read at C5. The paper gives accuracies and no recipe, so a linear layer is trained by MoCo's.
The net stays in eval mode and is compared at the end, bit for bit, with the one that came in. k-NN reads a
random net, too. The linear layer does not, since that would double the time: give `random` for WEIGHTS, and
a lower --lr.
"""
import argparse
import math
import os
from itertools import repeat

import torch
import torch.nn.functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import stage
from insloc import generator_for
from weights import RESNETS, add_weights_arguments, centre_view, frozen_nets, read_photo

PAPER = {"SwAV": 70.1, "BYOL": 74.3, "MoCo-v2": 67.7, "InsLoc": 61.7}           # Table 3a, Cls: top-1, R50-C4


def get_args(argv=None):
    parser = stage.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", help="run directory, checkpoint of any system, or `random`")
    add("data", help="folder with train/CLASS/* and val/CLASS/*")
    add("--arch", choices=["c4", "fpn"], default="c4", help="both are read at C5 [paper, Table 3a: C4]")
    add("--epochs", type=int, default=100, help="the rate falls to a tenth at .6 and .8 of them [MoCo v2]")
    add("--lr", type=float, default=30.0, help="for batch 256 [MoCo v2]")
    add("--batch-size", type=int, default=256, help="images a step, all processes together [MoCo v2]")
    add("--knn", type=int, default=0, metavar="K", help="weighted k-NN instead; 20 is usual [ours: 0 is off]")
    add("--image-size", type=int, default=224, help="side of the crop, validation: of 8/7 of it [MoCo v2]")
    add("--resnet", choices=RESNETS, default="resnet50", help="of `random`; else WEIGHTS tell [paper 4.3]")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the frozen net [MoCo v2]")
    add_weights_arguments(parser)
    stage.add_machine_arguments(parser, "runs/cls_WEIGHTS, with --knn runs/knn_WEIGHTS")
    args = parser.parse_args(argv)
    stage.check_machine_arguments(parser, args)
    if args.epochs < 1 or args.batch_size < 1 or args.knn < 0 or args.image_size < 32 or not args.lr > 0:
        parser.error("--epochs, --batch-size must be at least 1, --knn 0, --image-size 32, --lr above 0")
    name = os.path.basename(os.path.abspath(args.weights)).split(".")[0]
    args.out = args.out or f"runs/{'knn' if args.knn else 'cls'}_{name}"
    return args


def find_data(args):
    """DATA -> the images of train and of val, a digest of their names, which hold the class."""
    stage.check_new(args, ("checkpoint.pth", "checkpoint_prev.pth", "results.json"))
    splits, names = [], []
    for split in ("train", "val"):
        try:
            images = Images(os.path.join(args.data, split), args.image_size, args.seed)
        except OSError as error:                                    # torchvision's: no folder, an empty class
            raise stage.Refusal(stage.last_line(error)) from error
        splits.append(images)
        names += [path.removeprefix(images.root) for path, _ in images.samples]
    train, val = splits
    if train.classes != val.classes or len(train.classes) < 2:
        unmatched = sorted(set(train.classes) ^ set(val.classes))[:3]
        raise stage.Refusal(f"{args.data}: train and val must hold the same classes, two or more; "
                            f"not so: {unmatched}")
    return train, val, stage.digest(map(os.fsencode, names))


class Images(ImageFolder):
    """uint8 (3, S, S) by address (epoch, index): MoCo's random view, or in epoch -1 the centre crop."""

    def __init__(self, folder, size, seed):
        super().__init__(folder)
        self.size, self.seed = size, seed
        self.random_view = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])

    def __getitem__(self, address):
        epoch, index = address
        image = read_photo(self.samples[index][0])
        if epoch < 0:
            return centre_view(image, self.size)
        torch.manual_seed(generator_for(self.seed, "sample", epoch, index).initial_seed())
        return self.random_view(image)


def knn(queries, bank, labels, n_classes, k=20, temperature=0.07):
    """Unit rows (N, D), (M, D), the bank's labels (M,) -> class scores (N, C); a vote weighs exp(cos / T)."""
    scores = []
    for chunk in queries.split(256):
        cosine, index = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)                          # (n, k)
        votes = torch.zeros(len(chunk), n_classes, device=chunk.device)
        scores.append(votes.scatter_add_(1, labels[index], (cosine / temperature).exp()))
    return torch.cat(scores)


def accuracy(scores, labels):
    """Scores (N, C), labels (N,) -> top-1 in %, and top-5 where there are more than five classes."""
    order = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = order == labels[:, None]
    result = {"top1": 100 * hits[:, 0].double().mean().item()}
    if scores.shape[1] > 5:
        result["top5"] = 100 * hits.any(dim=1).double().mean().item()
    return result


def main(rank, device, args, train, val, data_digest):
    # ---- the frozen nets, and the run in --out, if it goes on
    nets, sources = frozen_nets(args, "c4", device)         # without boxes a C4Encoder is its plain ResNet
    if not args.knn and "given" in nets:
        del nets["random"]
    settings, state = stage.start_probe(args, nets, data_digest, progress=None if args.knn else "curve")
    for name in nets:
        stage.say(f"{name}: {sources[name]}")
    stage.say(f"{len(train)} train, {len(val)} val images, {len(train.classes)} classes; "
              f"{args.world} x {args.device}")

    def encode(net, images, epoch, order):
        """Pairs of indices (n,), features (n, D), the same on all ranks; each encodes a part of a batch."""
        batches = order.split(args.batch_size)
        parts = [batch.tensor_split(args.world)[rank].tolist() for batch in batches]
        addresses = [list(zip(repeat(epoch), part or [0])) for part in parts]       # an empty part loads one
        loaded = stage.load(images, addresses, args.workers, pin_memory=args.device == "cuda")
        for batch, part, x in zip(batches, parts, loaded):
            x = x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                features = net.features(net.pixels(x))[:, 0].float().cpu()
            features = stage.gather_objects(features[:len(part)])
            yield batch.to(device), torch.cat(features).to(device)

    def encode_centres(net, images):
        """The features (N, D) of all images' centre crops, held once: those of ImageNet have 10.5 GB."""
        rows = None
        for batch, features in encode(net, images, -1, torch.arange(len(images))):
            if rows is None:
                rows = torch.empty(len(images), features.shape[1], device=device)
            rows[batch] = features
        return rows

    train_labels = torch.tensor(train.targets, device=device)
    val_labels = torch.tensor(val.targets, device=device)
    results = {}
    curve = state["curve"] if state else []
    if args.knn:
        for name, net in nets.items():
            bank = encode_centres(net, train)
            F.normalize(bank, out=bank)
            queries = F.normalize(encode_centres(net, val))
            scores = knn(queries, bank, train_labels, len(train.classes), args.knn)
            results[name] = accuracy(scores, val_labels)
    else:
        # ---- MoCo's linear classifier, the same on all ranks
        (name, net), = nets.items()
        val_features = encode_centres(net, val)
        fc = torch.nn.Linear(val_features.shape[1], len(train.classes))
        fc.weight.data.normal_(0, 0.01, generator=generator_for(args.seed, "fc"))
        fc.bias.data.zero_()
        optimizer = torch.optim.SGD(fc.to(device).parameters(), lr=args.lr, momentum=0.9)
        if state:
            fc.load_state_dict(state["fc"])
            optimizer.load_state_dict(state["optimizer"])
        for epoch in range(len(curve), args.epochs):
            lr = args.lr * 0.1 ** ((epoch >= 0.6 * args.epochs) + (epoch >= 0.8 * args.epochs))
            optimizer.param_groups[0]["lr"] = lr
            order = torch.randperm(len(train), generator=generator_for(args.seed, "order", epoch))
            losses = []
            for batch, features in encode(net, train, epoch, order):
                loss = F.cross_entropy(fc(features), train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            loss = torch.stack(losses).mean().item()
            if not math.isfinite(loss):
                stage.leave(f"the loss is not finite in epoch {epoch + 1}: lower --lr")
            result = accuracy(fc(val_features), val_labels)
            curve.append({"epoch": epoch + 1, "lr": lr, "loss": loss, **result})
            stage.say(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.3f}, top-1 {result['top1']:.2f} %")
            if rank == 0:
                stage.save_checkpoint(args.out, {"settings": settings, "curve": curve, "fc": fc.state_dict(),
                                                 "optimizer": optimizer.state_dict()})
        results[name] = accuracy(fc(val_features), val_labels)

    # ---- the results, below them the paper's, where they are for the same classes
    chance = 100 / len(train.classes)
    is_papers = len(train.classes) == 1000 and not args.knn
    stage.write_results(args, settings, nets, {
        "results": results, "chance": chance, "curve": curve, "sources": sources,
        "paper": PAPER if is_papers else None})
    readout = f"the {args.knn} nearest neighbours" if args.knn else "a linear layer"
    for name, result in results.items():
        top5 = f", top-5 {result['top5']:.2f} %" if "top5" in result else ""
        stage.say(f"{name} weights, {readout}: top-1 {result['top1']:.2f} %{top5}")
    stage.say(f"chance: top-1 {chance:.2f} %")
    if is_papers:
        rows = ", ".join(f"{method} {top1}" for method, top1 in PAPER.items())
        stage.say(f"the paper, Table 3a, ResNet-50, ImageNet, top-1: {rows}")


if __name__ == "__main__":
    stage.launch(main, get_args(), find_data)
