"""Stage 2a: what frozen weights know about class (Sec. 5.2, Table 3a, Cls): linear classification, or k-NN.

    python probe_cls.py runs/insloc_c4 /data/imagenet                 # every GPU of this machine, or the CPU
    python probe_cls.py runs/insloc_c4 /data/imagenet --knn 20        # in minutes, to watch a run

The trunk is read as a plain ResNet, the mean over its last map: C4's RoI head (res5) stands behind res4, FPN
is read at C5. One linear layer is trained by MoCo's recipe; the net stays in eval mode and is compared at the
end, bit for bit, with the one that came in. k-NN reads a random net, too. The linear layer does not, since
that would double the time: give `random` for WEIGHTS, with a lower --lr.
"""
import argparse
import json
import math
import os

import torch
import torch.nn.functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import stage
from insloc import generator_for, make_resnet, read_image
from weights import RESNETS, Pixels, add_weights_arguments, load_trunk, random_weights, read_weights

PAPER = {"SwAV": 70.1, "BYOL": 74.3, "MoCo-v2": 67.7, "InsLoc": 61.7}           # Table 3a, Cls: top-1, R50-C4


def get_args(argv=None):
    parser = stage.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", help="run directory, checkpoint of any system, or `random`")
    add("data", help="folder with train/CLASS/* and val/CLASS/*")
    add("--arch", choices=["c4", "fpn"], default="c4", help="both are read at C5 [paper 5.2: C4]")
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
    train = Images(os.path.join(args.data, "train"), args.image_size, args.seed)
    val = Images(os.path.join(args.data, "val"), args.image_size, args.seed)
    if train.classes != val.classes or len(train.classes) < 2:
        unmatched = sorted(set(train.classes) ^ set(val.classes))[:3]
        stage.fail(f"{args.data}: train and val must hold the same classes, two or more; not so: {unmatched}")
    names = [path.removeprefix(images.root) for images in (train, val) for path, _ in images.samples]
    return train, val, stage.digest(map(os.fsencode, names))


class Images(ImageFolder):
    """uint8 (3, S, S) by key (epoch, index): MoCo's random view, or in epoch -1 the centre crop."""

    def __init__(self, folder, size, seed):
        super().__init__(folder)
        self.seed = seed
        self.random_view = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
        self.centre_view = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size)])      # 224 out of 256

    def __getitem__(self, key):
        epoch, index = key
        path = self.samples[index][0]
        try:
            image = read_image(path)
        except Exception as error:              # decoders fail in many ways; an accuracy of the rest misleads
            raise OSError(f"{path} cannot be read: {stage.last_line(error)}") from None
        if epoch < 0:
            longest = 4 * min(image.shape[1:])  # a long strip, resized as a whole, would take gigabytes
            image = v2.functional.center_crop(image, [min(side, longest) for side in image.shape[1:]])
            return self.centre_view(image)
        torch.manual_seed(generator_for(self.seed, "sample", epoch, index).initial_seed())
        return self.random_view(image)


def make_net(weights, seed):
    """torchvision's ResNet without fc, with these weights or random ones, behind the pixels that it knows."""
    torch.manual_seed(seed)
    resnet = make_resnet(weights.resnet)
    load_trunk(resnet, weights)
    return torch.nn.Sequential(Pixels(weights), resnet)


def knn(queries, bank, labels, n_classes, k=20, temperature=0.07):
    """Unit rows (N, D), (M, D), the bank's labels (M,) -> class scores (N, C); a vote weighs exp(cos / T)."""
    scores = []
    for chunk in queries.split(256):
        cosine, index = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)                          # (n, k)
        votes = torch.zeros(len(chunk), n_classes, device=chunk.device)
        scores.append(votes.scatter_add_(1, labels[index], (cosine / temperature).exp()))
    return torch.cat(scores)


def accuracy(scores, labels):
    """Percentages: the right class comes first; it is among the first five."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {f"top{k}": 100 * hits[:, :k].any(dim=1).double().mean().item() for k in (1, 5)}


def main(rank, device, args, train, val, data_digest):
    say = print if rank == 0 else lambda *given, **more: None
    digest = lambda net: stage.digest(x.cpu().numpy().tobytes() for x in net.state_dict().values())

    # ---- the frozen nets: for k-NN a random one beside the given one
    found = {"random": random_weights(args.resnet)}
    if args.weights != "random":
        try:
            given = read_weights(args.weights, args.trust, args.prefix, args.input)
        except (OSError, ValueError) as error:
            stage.leave(f"{args.weights}: {error}")
        random = random_weights(given.resnet)
        found = {"random": random, "given": given} if args.knn else {"given": given}
    nets = torch.nn.ModuleDict({name: make_net(weights, args.seed) for name, weights in found.items()})
    nets.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    # ---- the run in --out, if it goes on, and the other ranks: the same settings, images and nets
    settings = {**vars(args), "images": data_digest, "nets": digest(nets)}
    state = stage.resume(args, settings, stage.LOCAL | {"world", "weights", "trust"}, say)
    curve = state["curve"] if state else []
    stage.check_ranks({**settings, "epochs done": len(curve)})
    sources = {name: weights.source for name, weights in found.items()}
    say(f"{sources}; {len(train)} train, {len(val)} val images; {args.world} x {args.device}", flush=True)

    def encode(net, images, epoch, order):
        """Pairs of indices (n,), features (n, D), the same on all ranks; each encodes a part of a batch."""
        batches = order.split(args.batch_size)
        parts = [batch.tensor_split(args.world)[rank].tolist() for batch in batches]
        loader = torch.utils.data.DataLoader(
            images, batch_sampler=[[(epoch, index) for index in part or [0]] for part in parts],
            num_workers=args.workers, pin_memory=args.device == "cuda",
            multiprocessing_context="fork" if args.workers else None)
        for batch, part, x in zip(batches, parts, loader):
            x = x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                features = net(x).float().cpu()
            features = stage.gather_objects(features[:len(part)])       # for an empty part one was loaded
            yield batch.to(device), torch.cat(features).to(device)

    def encode_centres(net, images):
        """The features (N, D) of the centre crops of all images."""
        return torch.cat([features for _, features in encode(net, images, -1, torch.arange(len(images)))])

    train_labels, val_labels = (torch.tensor(images.targets, device=device) for images in (train, val))
    results = {}
    for name, net in nets.items():
        val_features = encode_centres(net, val)
        if args.knn:
            bank = F.normalize(encode_centres(net, train))
            scores = knn(F.normalize(val_features), bank, train_labels, len(train.classes), args.knn)
            results[name] = accuracy(scores, val_labels)

    if not args.knn:
        # ---- MoCo's linear classifier, the same on all ranks
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
            if not (math.isfinite(loss) and fc.weight.isfinite().all()):
                stage.leave(f"the loss is not finite in epoch {epoch + 1}: lower --lr")
            result = accuracy(fc(val_features), val_labels)
            curve.append({"epoch": epoch + 1, "lr": lr, "loss": loss, **result})
            say(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.3f}, top-1 {result['top1']:.2f} %", flush=True)
            if rank == 0:
                stage.save_checkpoint(args.out, {"settings": settings, "curve": curve, "fc": fc.state_dict(),
                                                 "optimizer": optimizer.state_dict()})
        results[name] = accuracy(fc(val_features), val_labels)

    # ---- the results, below them the paper's
    if digest(nets) != settings["nets"]:
        stage.fail("a frozen net has changed: the results are void")
    if rank == 0:
        text = json.dumps({"results": results, "chance": 100 / len(train.classes), "curve": curve,
                           "paper": PAPER, "sources": sources, "settings": settings,
                           "commit": stage.commit()}, indent=1)
        stage.write_atomically(f"{args.out}/results.json", lambda f: f.write(text.encode()))
    for name, result in results.items():
        say(f"{name}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %")
    say(f"chance: {100 / len(train.classes):.2f} %; paper, Table 3a, linear, ImageNet, R50-C4: {PAPER}")


if __name__ == "__main__":
    stage.launch(main, get_args(), find_data)
