"""Stage 2c: what the frozen feature of a box depends on: its background (Sec. 4.1), a loose fit (Sec. 4.2).

    python probe_box.py runs/insloc_c4 /data/imagenet                 # every GPU of this machine, or the CPU
    python probe_box.py runs/insloc_c4 /data/imagenet --boxes TRAIN.json TRAIN_DIR VAL.json VAL_DIR

The paper pastes instances and jitters boxes so that an instance's RoI feature becomes the instance's alone.
It does not measure that. These three protocols do; they are ours. A random net stands beside the given one.

`swap`: each image is pasted at one place on two backgrounds, and should have the same feature. Nothing is
trained. swap.png shows on which pixels the feature depends.

`loose`: a detector does not know the true box. Linear layers of its head name the class and regress the
offsets to the true box, both from the feature of a loose one. So eight anchors with IoU > .5 are drawn for
each pasted box, as InsLoc draws them for its queries. How alike are their features to the pasted box's own
(cosine, of both less their means)? Does a linear layer name the class from them, where DATA has class
folders, be it trained on own boxes or on loose ones? How much of the offsets does a linear layer explain (R2:
1 is all, 0 is chance)? An anchor's corners explain a part of them without any picture, since a small anchor
must grow. So R2 is given for features, for corners, and for features on what corners leave. loose.png shows
examples.

`boxes`: the same for real boxes of photographs, which are squashed to the canvas.
"""
import argparse
import copy
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_convert, box_iou
from torchvision.transforms.v2.functional import resize
from torchvision.utils import draw_bounding_boxes, save_image

import stage
from insloc import box_masks, generator_for, grid_anchors, jitter_boxes, paste
from weights import RESNETS, add_weights_arguments, centre_view, frozen_nets, read_photo

PROTOCOLS = ["swap", "loose", "boxes"]
BATCH = 64                                              # pictures that are encoded at a time
LOOSE = 8                                               # loose boxes for each pasted one
STRENGTHS = [10.0 ** power for power in range(-6, 3)]   # of ridge regression; a held-out tenth chooses


def get_args(argv=None):
    parser = stage.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", help="run directory, checkpoint of any system, or `random`")
    add("data", help="folder with train/ and val/, images at any depth, in class folders or not")
    add("--arch", choices=["c4", "fpn"], default="c4", help="whose RoI features [ours: as probe_loc.py]")
    add("--protocol", nargs="+", choices=PROTOCOLS, help="[ours: swap and loose; with --boxes all]")
    add("--boxes", nargs=4, metavar=("TRAIN.json", "TRAIN_DIR", "VAL.json", "VAL_DIR"),
        help="COCO jsons of boxes and the folders of their images [ours: none]")
    add("--images", type=int, default=1000, help="of val, or boxes, at most [ours: 300 at least are wanted]")
    add("--train-images", type=int, default=2000, help="the same of train, for the linear layers [ours]")
    add("--image-size", type=int, default=224, help="side of the canvas [ours: as probe_loc.py]")
    add("--resnet", choices=RESNETS, default="resnet50", help="of `random`; else WEIGHTS tell [paper 4.3]")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the frozen net [MoCo v2]")
    add_weights_arguments(parser)
    stage.add_machine_arguments(parser, "runs/box_WEIGHTS")
    args = parser.parse_args(argv)
    stage.check_machine_arguments(parser, args)
    args.protocol = args.protocol or PROTOCOLS[:3 if args.boxes else 2]
    if "boxes" in args.protocol and not args.boxes:
        parser.error("--protocol boxes needs --boxes TRAIN.json TRAIN_DIR VAL.json VAL_DIR")
    least = 4 if args.protocol == ["swap"] else 10
    if min(args.images, args.train_images) < max(least, args.world + 1):
        parser.error(f"--images and --train-images must be at least {least}, and more than processes")
    if args.image_size % 32 or args.image_size < 64:
        parser.error("--image-size must be a multiple of 32 from 64 on")
    args.out = args.out or "runs/box_" + os.path.basename(os.path.abspath(args.weights)).split(".")[0]
    return args


# ---- Data: a split is a list of (path, class), or of entries (path, class, box, path of a background) ----

def find_data(args):
    """{protocol: [its data set of train, of val]}, and a digest of the images' names and the label files."""
    size, seed = args.image_size, args.seed
    train, val, digest = stage.find_splits(args)
    train = with_folders(train, os.path.join(args.data, "train", ""))
    val = with_folders(val, os.path.join(args.data, "val", ""))
    train = some_of(train, args.train_images, seed, "subset")
    val = some_of(val, args.images, seed, "swap")
    pictures = [Boxes(composites(train, size, seed, "train"), size, seed, "loose of train"),
                Boxes(composites(val, size, seed, "swap"), size, seed, "loose")]
    data = {"swap": pictures, "loose": pictures}
    if args.boxes:
        needed = max(10, args.world + 1)                # an even number is used, one a process
        train = read_boxes(*args.boxes[:2], needed)
        val = read_boxes(*args.boxes[2:], needed)
        digest = stage.digest([digest.encode(), *[Path(name).read_bytes() for name in args.boxes[::2]]])
        train = some_of(train, args.train_images, seed, "boxes")
        val = some_of(val, args.images, seed, "boxes")
        data["boxes"] = [Boxes(split, size, seed, "boxes") for split in (train, val)]
    return data, digest


def some_of(split, count, *seeds):
    """At most `count` entries, by lot, those of a photograph together.

    They are an even number, since the images of composites are pairs.
    """
    of_photo = {}
    for entry in split:
        of_photo.setdefault(entry[0], []).append(entry)
    photos = list(of_photo.values())
    chosen = []
    for i in torch.randperm(len(photos), generator=generator_for(*seeds)):
        chosen += photos[i]
    chosen = chosen[:count]
    return chosen[:len(chosen) // 2 * 2]


def with_folders(paths, root):
    """[(path, the folder in `root` that holds it, or "")]."""
    return [(path, os.path.dirname(path.removeprefix(root)).split(os.sep)[0]) for path in paths]


def read_boxes(json_path, folder, needed):
    """[(image file, category id, (x1, y1, x2, y2), None)] of a COCO json without its crowds, or a Refusal."""
    boxes = []
    try:
        with open(json_path) as file:
            content = json.load(file)
        files = {image["id"]: os.path.join(folder, image["file_name"]) for image in content["images"]}
        for entry in content["annotations"]:
            x, y, w, h = map(float, entry["bbox"])
            category = int(entry["category_id"])
            if not entry.get("iscrowd"):
                boxes.append((files[entry["image_id"]], category, (x, y, x + w, y + h), None))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise stage.Refusal(f"{json_path} is no COCO json of boxes: {reason}") from error
    if len(boxes) < needed:
        raise stage.Refusal(f"{json_path} has {len(boxes)} boxes; {needed} are needed, some hundreds wanted")
    return boxes


def composites(split, size, seed, word):
    """The entries of composites: each two images of a split are pasted on the same two others, at one place.

    Entries 2 i and 2 i + 1 are image i. The pasted box has sides of U{size / 2..3 size / 4}. `word` seeds the
    draws, so that no split has the places of another.
    """
    entries = []
    for j in range(0, len(split), 2):
        generator = generator_for(seed, word, j // 2)
        h, w = torch.randint(size // 2, size * 3 // 4 + 1, (2,), generator=generator).tolist()
        top = torch.randint(size - h + 1, (), generator=generator).item()
        left = torch.randint(size - w + 1, (), generator=generator).item()
        others = torch.randperm(len(split) - 2, generator=generator)[:2]
        others += 2 * (others >= j)                                         # neither image of this pair
        for path, name in split[j:j + 2]:
            for other in others:
                entries.append((path, name, (left, top, left + w, top + h), split[other][0]))
    return entries


class Boxes(torch.utils.data.Dataset):
    """An entry's picture, uint8 (3, S, S), and boxes (1 + LOOSE, 4): its own, then loose ones.

    The picture is the centre of a photograph, pasted on that of another. Without a background it is the whole
    photograph, squashed. A loose box is an anchor with IoU > .5, or the best one if there is none.
    """

    def __init__(self, entries, size, seed, word):
        self.entries = entries
        self.size = size
        self.seeds = (seed, word)
        self.anchors = grid_anchors(size)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, item):
        path, _, box, background = self.entries[item]
        photo = read_photo(path)
        if background:
            x1, y1, x2, y2 = box
            foreground = resize(centre_view(photo, self.size), [y2 - y1, x2 - x1])
            picture, box = paste(centre_view(read_photo(background), self.size), foreground, y1, x1)
        else:
            h, w = photo.shape[1:]
            box = (torch.tensor(box) * self.size / torch.tensor([w, h, w, h])).clamp(0, self.size)
            picture = resize(photo, [self.size, self.size])
        generator = generator_for(*self.seeds, item)
        loose = jitter_boxes(box.expand(LOOSE, 4), self.anchors, generator=generator)
        return picture, torch.cat([box[None], loose])


def estimate_batchnorm(net, batches):
    """Replaces a frozen net's BatchNorm statistics by averages over batches of uint8 images and boxes."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None                                      # the plain average
    net.train()
    for images, boxes in batches:
        net.features(net.pixels(images), boxes[:, :1])
    net.eval()


# ---- swap ------------------------------------------------------------------------------------------------

def pixel_energy(features, images, seeds):
    """How much features (N, D) depend on each pixel of images (N, 3, S, S) that require grad: (N, S, S).

    It is the squared gradient of features . v, v a random direction by its seeds. Its mean over directions is
    |d features / d pixel|^2. Frees the graph.
    """
    v = torch.stack([torch.randn(features.shape[1], generator=generator_for(*words)) for words in seeds])
    gradient, = torch.autograd.grad((features * v.to(features.device)).sum(), images)
    return gradient.square().sum(dim=1)


def share_inside(energy, boxes):
    """Energy (N, S, S), boxes (N, 4) of whole pixels -> the part of it that lies in the box (N,)."""
    inside_x, inside_y, _ = box_masks(boxes, *energy.shape[1:])
    inside = inside_y[:, :, None] & inside_x[:, None]                                            # (N, S, S)
    return (energy * inside).sum(dim=(1, 2)) / energy.sum(dim=(1, 2))


def swap_scores(features):
    """Cosines of features (N, 2, D), less their mean, of N images on two backgrounds.

    Images 2 i and 2 i + 1 share both backgrounds, place and size.

    same_instance: an image on its two backgrounds. same_background: two images at one place on one background
    (the leak). same_place: these two on different backgrounds, the part of the leak that place and size make.
    top1: for which percentage of the images the nearest feature on another background is its own.
    """
    sets = F.normalize(features - features.mean(dim=0), dim=2)
    a, b = sets.unbind(dim=1)
    twins = sets[0::2] @ sets[1::2].transpose(1, 2)             # (N / 2, 2, 2): by the backgrounds of the two
    return {"same_instance": (a * b).sum(dim=1).mean().item(),
            "same_background": twins.diagonal(dim1=1, dim2=2).mean().item(),
            "same_place": twins.flip(2).diagonal(dim1=1, dim2=2).mean().item(),
            "top1": 100 * ((a @ b.T).argmax(dim=1) == torch.arange(len(a))).double().mean().item(),
            "chance": 100 / len(a)}


def energy_map(net, images, boxes):
    """uint8 images (N, 3, S, S), boxes (N, 1, 4) -> pixel energy over 16 directions (N, 1, S / 4, S / 4)."""
    device = net.pixels.mean.device
    x = net.pixels(images.to(device)).requires_grad_()
    energy = 0
    for t in range(16):
        features = net.features(x, boxes.to(device)).flatten(1)
        energy += pixel_energy(features, x, [("draw", t, i) for i in range(len(images))])
    return F.avg_pool2d(energy[:, None], 4)                             # strides leave a pattern of squares


def draw_swap(nets, dataset, path):
    """Two images, each on two backgrounds; below them a row for each net: the pixels its feature depends on.

    Brightness is the root of the energy, relative to the picture's largest.
    """
    images, boxes = torch.utils.data.default_collate([dataset[item] for item in range(4)])      # (4, 3, S, S)
    boxes = boxes[:, :1]
    rows = [images]
    for net in nets.values():
        energy = energy_map(net, images, boxes)
        energy = F.interpolate(energy / energy.amax(dim=(2, 3), keepdim=True), scale_factor=4)
        rows.append((255 * energy.sqrt()).byte().cpu().expand(-1, 3, -1, -1))
    cells = []
    for picture, box in zip(torch.cat(rows), boxes.repeat(len(rows), 1, 1)):
        frame = box - torch.tensor([0, 0, 1, 1])                        # its last pixels
        cells.append(draw_bounding_boxes(picture, frame, colors="red") / 255)
    save_image(cells, path, nrow=4)


# ---- loose, boxes ----------------------------------------------------------------------------------------

def offsets_between(loose, box):
    """Boxes (..., 4) -> what a detector regresses from the loose ones: dx, dy, dw, dh (..., 4), float64.

    The centres' distance in sizes of the loose box, and the logarithm of the sizes' ratio [detectron2's
    Box2BoxTransform, without weights].
    """
    loose = box_convert(loose.double(), "xyxy", "cxcywh")
    box = box_convert(box.double(), "xyxy", "cxcywh")
    shift = (box[..., :2] - loose[..., :2]) / loose[..., 2:]
    return torch.cat([shift, (box[..., 2:] / loose[..., 2:]).log()], dim=-1)


def moved_by(loose, offsets):
    """The boxes (..., 4) to which the offsets (..., 4) lead: the inverse of `offsets_between`."""
    loose = box_convert(loose, "xyxy", "cxcywh")
    centre = loose[..., :2] + offsets[..., :2] * loose[..., 2:]
    size = loose[..., 2:] * offsets[..., 2:].exp()
    return box_convert(torch.cat([centre, size], dim=-1), "cxcywh", "xyxy")


def ridge(x, y, held_out):
    """A linear layer: ridge regression of y (N, K) on x (N, D), in closed form, all float64.

    It minimises mean |y - layer(x)|^2 + s v |weight|^2, where v is the mean variance of x. The first
    `held_out` rows choose s out of STRENGTHS; the others train.
    """
    x_fit, y_fit = x[held_out:], y[held_out:]
    x_mean, y_mean = x_fit.mean(dim=0), y_fit.mean(dim=0)
    covariance = x_fit.T @ x_fit / len(x_fit) - torch.outer(x_mean, x_mean)                      # (D, D)
    with_y = x_fit.T @ (y_fit - y_mean) / len(x_fit)                                             # (D, K)
    values, vectors = torch.linalg.eigh(covariance)
    least = torch.inf
    layer = nn.Linear(x.shape[1], y.shape[1], dtype=torch.float64).requires_grad_(False)
    for strength in STRENGTHS:
        shrunk = values.clamp(min=0) + strength * values.mean().clamp(min=1e-12)        # x may be constant
        weight = vectors @ (vectors.T @ with_y / shrunk[:, None])                                # (D, K)
        bias = y_mean - x_mean @ weight
        error = (x[:held_out] @ weight + bias - y[:held_out]).square().mean()
        if error < least:
            least = error
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
    return layer


def explained(y, guess):
    """R2 of a guess of y (N, K), a mean over the K: 1 is all, 0 is what the mean of y explains."""
    rest = (y - guess).square().sum(dim=0)
    return (1 - rest / (y - y.mean(dim=0)).square().sum(dim=0)).mean().item()


def loose_rows(features, boxes, size):
    """Features (N, M, D), boxes (N, M, 4) -> of all loose boxes, in float64: features, corner terms, offsets.

    The 14 corner terms are what a box says without a picture: its corners in canvases, and their products.
    """
    corners = boxes[:, 1:].double() / size
    pairs = torch.combinations(torch.arange(4), with_replacement=True)                           # (10, 2)
    terms = torch.cat([corners, corners[..., pairs].prod(dim=-1)], dim=-1)
    offsets = offsets_between(boxes[:, 1:], boxes[:, :1])
    return features[:, 1:].double().flatten(0, 1), terms.flatten(0, 1), offsets.flatten(0, 1)


def class_scores(train_features, train_classes, features, classes):
    """Top-1 in %: class_own and class_loose of one layer, which was trained on each picture's own boxes.

    The layer of class_loose_trained was trained on loose boxes, as a detector's is. Features (N, M, D), lists
    of N classes. Chance is the largest class's share. {} unless train and val share two classes.
    """
    if len({*train_classes} & {*classes}) < 2:
        return {}
    names = sorted({*train_classes, *classes})
    train_wanted = torch.tensor(list(map(names.index, train_classes)))
    wanted = torch.tensor(list(map(names.index, classes)))
    targets = F.one_hot(train_wanted, len(names)).double()
    x_own = train_features[:, 0].double()
    x_loose = train_features[:, 1:].double().flatten(0, 1)
    of_own = ridge(x_own, targets, len(targets) // 10)
    of_loose = ridge(x_loose, targets.repeat_interleave(LOOSE, dim=0), len(targets) // 10 * LOOSE)
    right = (of_own(features.double()).argmax(dim=2) == wanted[:, None]).double()                # (N, M)
    loose_right = of_loose(features[:, 1:].double()).argmax(dim=2) == wanted[:, None]            # (N, LOOSE)
    return {"class_own": 100 * right[:, 0].mean().item(),
            "class_loose": 100 * right[:, 1:].mean().item(),
            "class_loose_trained": 100 * loose_right.double().mean().item(),
            "class_chance": 100 * wanted.bincount().max().item() / len(wanted)}


def loose_scores(train, val, size):
    """The figures of `loose` and `boxes`, and eight examples: item, its box, a loose one, its correction.

    train, val: items (N,), features (N, M, D), boxes (N, M, 4), N classes. The offsets are asked of linear
    layers on features and on corner terms. `beyond` has what the terms explain taken out of both sides.
    """
    _, train_features, train_boxes, train_classes = train
    items, features, boxes, classes = val
    own = features[:, :1] - features[:, :1].mean(dim=0)
    others = features[:, 1:] - features[:, 1:].mean(dim=(0, 1))
    x_train, terms_train, y_train = loose_rows(train_features, train_boxes, size)
    x, terms, y = loose_rows(features, boxes, size)
    held_out = len(train_features) // 10 * LOOSE
    layer = ridge(x_train, y_train, held_out)
    by_corners = ridge(terms_train, y_train, held_out)
    of_features = ridge(terms_train, x_train, held_out)
    beyond = ridge(x_train - of_features(terms_train), y_train - by_corners(terms_train), held_out)
    corrected = moved_by(boxes[:8, 1], layer(features[:8, 1].double()))
    corners = torch.stack([boxes[:8, 0], boxes[:8, 1], corrected], dim=1).tolist()
    return {"cosine": F.cosine_similarity(own, others, dim=2).mean().item(),
            **class_scores(train_features, train_classes, features, classes),
            "offsets": explained(y, layer(x)),
            "offsets_by_corners": explained(y, by_corners(terms)),
            "offsets_beyond_corners": explained(y - by_corners(terms), beyond(x - of_features(terms))),
            "pictures": len(items), "examples": [[item, *three] for item, three in zip(items, corners)]}


def draw_loose(examples, dataset, path):
    """A row for each net: pictures with their box in red, a loose one in blue, its correction in yellow."""
    cells = []
    for item, *corners in sum(examples, []):
        picture = resize(dataset[item][0], [224, 224])
        boxes = (torch.tensor(corners) * 224 / dataset.size).clamp(0, 223)
        cells.append(draw_bounding_boxes(picture, boxes, colors=["red", "blue", "yellow"], width=2) / 255)
    save_image(cells, path, nrow=len(examples[0]))


def main(rank, device, args, data, data_digest):
    # ---- the frozen nets, and the run in --out, if it goes on
    nets, sources = frozen_nets(args, args.arch, device)
    settings, state = stage.start_probe(args, nets, data_digest, progress="lines")
    for name, source in sources.items():
        stage.say(f"{name}: {source}")
    for protocol in args.protocol:
        n_train, n_val = map(len, data[protocol])
        stage.say(f"{protocol}: {n_train} pictures of train, {n_val} of val")
    stage.say(f"{args.world} x {args.device}")

    def load(dataset, items):
        """Batches of some items of a data set: pictures (n, 3, S, S), boxes (n, M, 4)."""
        batches = [batch.tolist() for batch in items.split(BATCH)]
        for loaded in stage.load(dataset, batches, args.workers, pin_memory=args.device == "cuda"):
            yield [tensor.to(device, non_blocking=True) for tensor in loaded]

    def encode(net, dataset, n_boxes, gradient=False):
        """Batches of this rank: items (n,), the net's input, boxes (n, M, 4), RoI features (n, M, D)."""
        own = torch.arange(len(dataset)).tensor_split(args.world)[rank]
        for items, (pictures, boxes) in zip(own.split(BATCH), load(dataset, own)):
            boxes = boxes[:, :n_boxes]
            x = net.pixels(pictures).contiguous(memory_format=torch.channels_last).requires_grad_(gradient)
            with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                features = net.features(x, boxes)                                       # (n * M, levels, D)
            yield items, x, boxes, features.float().unflatten(0, boxes.shape[:2]).flatten(2)

    def gather(parts):
        """Tuples of tensors (n, ...), one a batch -> these of all ranks' items (N, ...), on the CPU."""
        parts = [torch.cat(tensors).cpu() for tensors in zip(*parts)]
        whole = list(map(torch.cat, zip(*stage.gather_objects(parts))))
        for tensor in whole:
            if not tensor.isfinite().all():
                stage.leave("the weights give features, or gradients, that are not finite")
        return whole

    def swap(net, train, val):
        """The figures of `swap`: features of val's pasted boxes, and which part of the energy lies inside."""
        parts = []
        for items, x, boxes, features in encode(net, val, n_boxes=1, gradient=True):
            seeds = [(args.seed, "direction", image) for image in (items // 2).tolist()]
            inside = share_inside(pixel_energy(features[:, 0], x, seeds), boxes[:, 0])
            parts.append((features.detach(), boxes[:, 0], inside))
        features, boxes, inside = gather(parts)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) / args.image_size ** 2
        return {**swap_scores(features.view(-1, 2, features.shape[2])),     # an image on its two backgrounds
                "gradient_inside": inside.mean().item(), "area_inside": area.mean().item()}

    def loose(net, train, val):
        """The figures of `loose` and `boxes`, of the pictures that have loose boxes with IoU > .5."""
        splits = []
        for dataset in (train, val):
            parts = [(features, boxes) for _, _, boxes, features in encode(net, dataset, 1 + LOOSE)]
            features, boxes = gather(parts)
            iou = torch.cat([box_iou(box, loose_box)[0] for box, loose_box in boxes[:, :2, None]])
            items = (iou > 0.5).nonzero()[:, 0]
            if len(items) < 10:
                stage.leave(f"{len(items)} boxes of a split have an anchor with IoU > .5; 10 are needed")
            classes = [dataset.entries[item][1] for item in items]
            splits.append((items.tolist(), features[items], boxes[items], classes))
        result = loose_scores(*splits, args.image_size)
        return {**result, "left_out": len(val) - result["pictures"]}

    estimated = {}
    if args.protocol != ["swap"]:
        # A trained net has BatchNorm statistics of its training's pictures; so a random one gets them, too,
        # but for `swap`, which shows the plain one.
        random_bn = copy.deepcopy(nets["random"])
        pictures = data["loose"][0]
        estimate_batchnorm(random_bn, load(pictures, torch.arange(min(1024, len(pictures)))))
        estimated = {"random_bn": random_bn, **nets}
        del estimated["random"]
    nets_of = {"swap": nets, "loose": estimated, "boxes": estimated}

    found = {}
    for line in state["lines"] if state else []:
        found[line["protocol"], line["net"]] = line
    for protocol in args.protocol:
        measure = swap if protocol == "swap" else loose
        for name, net in nets_of[protocol].items():
            if (protocol, name) not in found:                           # else done before the run was stopped
                found[protocol, name] = {"protocol": protocol, "net": name, **measure(net, *data[protocol])}
                if rank == 0:
                    stage.save_checkpoint(args.out, {"settings": settings, "lines": list(found.values())})
            line = found[protocol, name]
            numbers = [f"{key} {value:.4g}" for key, value in line.items() if isinstance(value, float)]
            stage.say(f"{protocol:8} {name:9} {', '.join(numbers)}")

    # ---- the results, and a picture for each protocol
    stage.write_results(args, settings, nets, {"lines": list(found.values()), "sources": sources})
    if rank == 0:
        for protocol in args.protocol:
            name = f"{protocol}.png"
            what = (data[protocol][1], os.path.join(args.out, name))
            if protocol == "swap":
                stage.attempt(name, draw_swap, nets, *what)
            else:
                examples = [found[protocol, net]["examples"] for net in nets_of[protocol]]
                stage.attempt(name, draw_loose, examples, *what)
    stage.say(f"chance is 0 for cosines and offsets; wrote {args.out}/results.json")


if __name__ == "__main__":
    stage.launch(main, get_args(), find_data)
