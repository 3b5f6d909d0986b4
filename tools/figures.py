"""The documents' pictures, drawn by the method's own code from the photographs in docs/photos.

    python tools/figures.py docs                        # all but swap.png
    python tools/figures.py docs --point mine runs/cls_mine/results.json runs/det_mine/results.json
    python tools/figures.py docs/results --run moco runs/moco --run insloc runs/insloc --loose /data/imagenet

OUT/composites.png  three instances, pasted twice each: what the two encoders see, and which boxes they pool
OUT/step.png        one instance through a step: Fig. 2 of the paper with the names of insloc.py
OUT/groups.png      two ranks of two groups: the keys that Shuffle-BN gives to each
OUT/fig1.png        Fig. 1: detection over classification, Table 3a's numbers, and a point for each --point
OUT/fig4.png        Fig. 4: the cells of the localization probe on a photograph
OUT/swap.png        with --run, and then alone: on which pixels each net's feature depends (C4 nets)
OUT/loose.png       with --loose, too: where a linear layer on each net's feature moves a loose box
"""
import argparse
import csv
import json
import os
import sys

import matplotlib
import torch
from torchvision.ops import box_iou

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import probe_box  # noqa: E402
import probe_loc  # noqa: E402
import stage  # noqa: E402
from insloc import (C4Encoder, MakeGroup, Views, choose_backgrounds, crop_box, generator_for,  # noqa: E402
                    grid_anchors, jitter_boxes, paste, photometric, read_image)
from weights import Pixels, load_trunk, read_weights  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, Rectangle  # noqa: E402

PHOTOS = [os.path.join(ROOT, "docs", "photos", f"{name}.jpg")
          for name in ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")]
ASTRONAUT, CAT, COFFEE, HUBBLE, RETINA, ROCKET = range(6)
EPOCH, STEP = 7, 54         # they decide the draws of the group that is shown; chosen by eye
RED, ORANGE, BLUE, GREY = "#e01e1e", "#e07a1e", "#143cff", "#666666"
GROUPS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")
MONO = {"fontsize": 7.5, "family": "monospace"}
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}


# ---- Parts of a picture ----------------------------------------------------------------------------------

def canvas(w, h):
    """A figure of w x h inches, and axes in inches that fill it, y downwards."""
    figure = pyplot.figure(figsize=(w, h), dpi=110)
    axes = figure.add_axes([0, 0, 1, 1], xlim=(0, w), ylim=(h, 0))
    axes.axis("off")
    return figure, axes


def arrow(axes, start, end, text="", color=GREY, **more):
    axes.add_artist(ConnectionPatch(start, end, "data", "data", arrowstyle="-|>", color=color,
                                    mutation_scale=11, shrinkA=2, shrinkB=2, **more))
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 0.07, text, ha="center", va="bottom",
              color=color, **MONO)


def picture(axes, x, y, image, title, size=1.25):
    """uint8 or [0, 1] (3, h, w), its longer side `size` inches, centred at (x, y)."""
    h, w = (side * size / max(image.shape[1:]) for side in image.shape[1:])
    axes.imshow(image.permute(1, 2, 0), extent=(x - w / 2, x + w / 2, y + h / 2, y - h / 2), zorder=2)
    axes.text(x, y - h / 2 - 0.05, title, ha="center", va="bottom", fontsize=8, zorder=5, bbox=ON_WHITE)


def frame(axes, corner, box, unit, color, width, zorder=4):
    """A box (4,) of an image whose top left corner is at `corner` and whose pixel is `unit` inches."""
    x1, y1, x2, y2 = (float(side) * unit for side in box)
    axes.add_patch(Rectangle((corner[0] + x1, corner[1] + y1), x2 - x1, y2 - y1, fill=False, color=color,
                             linewidth=width, zorder=zorder))


def block(axes, x, y, text, color="#eeeeee"):
    axes.add_patch(FancyBboxPatch((x - 0.87, y - 0.42), 1.74, 0.84, boxstyle="round,pad=0.02",
                                  facecolor=color, edgecolor=GREY, zorder=2))
    axes.text(x, y, text, ha="center", va="center", zorder=3, **MONO)


# ---- The method's pictures -------------------------------------------------------------------------------

class Shown:
    """One group of the six photographs, as a loader worker makes it, and what its samples are made of."""

    def __init__(self, epoch, step):
        self.epoch = epoch
        views = Views(PHOTOS)
        self.samples = [views[epoch, step, 0, index] for index in range(len(PHOTOS))]
        self.group = MakeGroup()(self.samples)
        sources = [sample["source"] for sample in self.samples]
        generator = generator_for(0, "group", *self.samples[0]["seeds"])    # draws again what MakeGroup drew
        self.backgrounds = choose_backgrounds(sources, generator)           # (N, 2): of query and of key

    def augmented(self, side, i):
        """The composite of sample i, augmented inside its box: (3, S, S) in [0, 1]."""
        view = self.group[side]
        images, _ = photometric(view["images"] / 255, view, view["boxes"])
        return images[i]

    def crops(self, i):
        """Where the query's and the key's crop lie in photograph i, xyxy."""
        h, w = read_image(PHOTOS[i]).shape[1:]
        generator = generator_for(0, "sample", self.epoch, i)                   # draws again what Views drew
        boxes = []
        for _ in ("query", "key"):
            top, left, crop_h, crop_w = crop_box(h, w, generator=generator)
            torch.randint(0, 2, (2,), generator=generator)                    # the sides, drawn by Views.crop
            boxes.append((left, top, left + crop_w, top + crop_h))
        return boxes


def draw_composites(shown, out):
    """Above: a photograph with its two crops, the query, the key, all anchors. Below: two more pairs."""
    figure = pyplot.figure(figsize=(10, 5.4), dpi=100)
    margin = 14                                                 # pixels round the canvas: anchors leave it

    def panel(row, column, image, title):
        axes = figure.add_axes([0.005 + 0.2485 * column, 0.5 - 0.49 * row, 0.243, 0.455])
        axes.imshow(image.permute(1, 2, 0))
        axes.set_title(title, fontsize=11, pad=3)
        axes.set(xlim=(-margin, 256 + margin), ylim=(256 + margin, -margin))
        axes.axis("off")
        return axes

    def pair(row, column, i):
        for offset, side, title in ((0, "query", "query"), (1, "key", "its key")):
            axes = panel(row, column + offset, shown.augmented(side, i), title)
            frame(axes, (0, 0), shown.group[side]["boxes"][i], 1, RED, 2.5)
            if side == "query":
                frame(axes, (0, 0), shown.group[side]["drawn_boxes"][i], 1, BLUE, 2.5)

    photo = read_image(PHOTOS[CAT])
    longer = max(photo.shape[1:])
    axes = panel(0, 0, photo, "an image and two crops of it")
    centre = photo.shape[1] / 2
    axes.set(xlim=(-10, longer + 10), ylim=(centre + longer / 2 + 10, centre - longer / 2 - 10))
    for box, name in zip(shown.crops(CAT), ("query", "key")):
        frame(axes, (0, 0), box, 1, "white", 2.5)
        axes.text(box[0] + 8, box[3] - 8, name, color="white", fontsize=10, weight="bold")
    pair(0, 1, CAT)
    box = shown.group["query"]["boxes"][CAT]
    anchors = grid_anchors()
    matches = anchors[box_iou(box[None], anchors)[0] > 0.5]
    axes = panel(0, 3, shown.augmented("query", CAT), f"all {len(matches)} anchors with IoU > 0.5")
    for anchor in matches:
        frame(axes, (0, 0), anchor, 1, BLUE, 0.6)
    frame(axes, (0, 0), box, 1, RED, 2.5)
    pair(1, 0, ASTRONAUT)
    pair(1, 2, COFFEE)
    figure.savefig(os.path.join(out, "composites.png"), pil_kwargs={"optimize": True})


def draw_step(shown, out, i=CAT):
    """Sample i, from its file to the loss."""
    image = read_image(PHOTOS[i])
    unit, image_unit = 1.25 / 256, 1.35 / max(image.shape[1:])
    image_corner = 0.85 - image.shape[2] * image_unit / 2, 2.75 - image.shape[1] * image_unit / 2
    figure, axes = canvas(13.2, 5.3)
    picture(axes, 0.85, 2.75, image, "an image I", size=1.35)
    for row, (side, y, color) in enumerate((("query", 1.5, RED), ("key", 4.0, ORANGE))):
        letter, view, crop = side[0], shown.group[side], shown.samples[i][side]
        background = shown.samples[shown.backgrounds[i][row]]["backgrounds"][0]
        corner = 6.125, y - 0.625
        frame(axes, image_corner, shown.crops(i)[row], image_unit, color, 1.5)
        picture(axes, 2.75, y - 0.55, crop, f"crop $I_{letter}$", size=max(crop.shape[1:]) * unit * 0.8)
        picture(axes, 2.75, y + 0.72, background, f"background $B_{letter}$", 0.9)
        arrow(axes, (1.55, 2.65 if row == 0 else 2.85), (2.2, y - 0.35), color=color)
        picture(axes, 4.75, y, view["images"][i], f"$I'_{letter}, b_{letter}$")
        picture(axes, 6.75, y, shown.augmented(side, i), "augmented in $b$")
        frame(axes, (4.125, y - 0.625), view["boxes"][i], unit, RED, 1.8)
        frame(axes, corner, view["boxes"][i], unit, RED, 1.8)
        if side == "query":
            frame(axes, corner, view["drawn_boxes"][i], unit, BLUE, 2.2, zorder=5)
        arrow(axes, (3.35, y), (4.08, y), "paste")
        arrow(axes, (5.4, y), (6.08, y), "photo-\nmetric" if side == "query" else "shuffle,\nphoto-\nmetric")
        arrow(axes, (7.45, y), (8.1, y))
        block(axes, 9.0, y, f"encoder_{letter}\nres4, roi_pool,\nres5, mean, MLP")
        arrow(axes, (9.9, y), (10.75, y), f"{letter} (N,1,128)")
    axes.text(6.75, 2.62, "jitter_boxes: the query pools\nan anchor (blue), the key\nits pasted box (red)",
              ha="center", va="center", fontsize=7.5, color=BLUE, zorder=5, bbox=ON_WHITE)
    block(axes, 11.75, 1.5, "info_nce\n(loss, Eq. 2)", "#ffe9d6")
    block(axes, 11.75, 4.0, "KeyQueue\n65,536 negatives", "#e2ecff")
    arrow(axes, (8.6, 1.95), (8.6, 3.55), linestyle="dashed")
    axes.text(8.65, 2.75, "momentum_update", color=GREY, va="center", **MONO)
    arrow(axes, (10.35, 3.85), (11.2, 1.95))
    axes.text(10.75, 2.75, "positive", fontsize=7.5, color=GREY, va="center", ha="right")
    arrow(axes, (11.95, 3.55), (11.95, 1.95))
    axes.text(12.0, 2.75, "negatives", fontsize=7.5, color=GREY, va="center")
    axes.text(11.75, 4.65, "enqueue(k) after the loss", ha="center", color=GREY, **MONO)
    arrow(axes, (11.75, 1.05), (9.0, 1.05), connectionstyle="arc3,rad=.2", color=RED)
    axes.text(10.4, 0.6, "gradient, to encoder_q alone", ha="center", fontsize=7.5, color=RED)
    figure.savefig(os.path.join(out, "step.png"))


def draw_groups(out, size=4):
    """Two ranks of two groups of `size`: which keys each group encodes."""
    permutation = torch.randperm(4 * size, generator=generator_for(0, "shuffle", 0))
    figure, axes = canvas(11, 3.6)
    place = {}
    for row, (y, order) in enumerate(((0.95, range(4 * size)), (2.45, permutation.tolist()))):
        for p, origin in enumerate(order):
            x = 1.75 + 0.47 * p + 0.25 * (p // size) + 0.35 * (p // (2 * size))
            place[row, origin] = x + 0.21
            axes.add_patch(Rectangle((x, y), 0.42, 0.42, facecolor=GROUPS[origin // size], zorder=3))
            axes.text(x + 0.21, y + 0.21, str(origin), color="white", ha="center", va="center", fontsize=8,
                      zorder=4)
            if p % size == 0:
                axes.add_patch(Rectangle((x - 0.06, y - 0.06), 0.47 * size + 0.07, 0.54, fill=False,
                                         edgecolor=GREY))
            if p % (2 * size) == 0 and row == 0:
                axes.text(x + 0.47 * size + 0.1, 0.62, f"rank {p // (2 * size)}: two groups, one after the "
                          "other", ha="center", fontsize=9)
        axes.text(1.55, y + 0.21, ("queries\nq0 ... q15", "keys\nas encoded")[row], ha="right", va="center",
                  fontsize=9)
    for origin in range(4 * size):
        axes.plot([place[0, origin], place[1, origin]], [1.4, 2.42], color=GROUPS[origin // size],
                  linewidth=0.8, zorder=1)
    axes.text(5.6, 0.18, "A frame is a BatchNorm group: its images share mean and variance. "
              "A number is an instance; its colour is its query's group.", ha="center", fontsize=9)
    axes.text(5.6, 3.2, "shuffle: every rank gets all key images as bytes (all-gather) and encodes its share "
              "of the permutation.\nThe embeddings return to all ranks (all-gather) in the order of the "
              "queries: for the loss, and into equal queues.", ha="center", va="center", fontsize=9)
    figure.savefig(os.path.join(out, "groups.png"))


# ---- The paper's figures 1 and 4 -------------------------------------------------------------------------

def paper_points():
    """{method: (linear classification, AP of boxes on COCO 1x)} of Table 3a."""
    points = {}
    with open(os.path.join(ROOT, "docs", "paper_tables.csv"), newline="") as file:
        for line in csv.DictReader(file):
            if line["table"] == "3a" and line["metric"] in ("linear_cls_top1", "APbb"):
                points.setdefault(line["method"], {})[line["metric"]] = float(line["value"])
    return {method: (values["linear_cls_top1"], values["APbb"]) for method, values in points.items()}


def own_point(classification, detection):
    """Top-1 from probe_cls.py's results.json and AP of boxes from finetune_det.py's."""
    with open(classification) as file:
        top1 = json.load(file)["results"]["given"]["top1"]
    with open(detection) as file:
        return top1, json.load(file)["mean"]["APbb"]


def draw_fig1(points, out):
    """points: {name: (top-1, AP)} of one's own runs."""
    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=100, layout="constrained")
    for found, color, marker, label in ((paper_points(), GREY, "o", "the paper, Table 3a"),
                                        (points, RED, "*", "these runs")):
        if found:
            axes.scatter(*zip(*found.values()), color=color, marker=marker, s=60, label=label)
        for name, (top1, ap) in found.items():
            axes.annotate(name, (top1, ap), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set_xlabel("linear classification, top-1")
    axes.set_ylabel("detection, AP of boxes, COCO 1x")
    axes.margins(0.15)
    axes.legend(fontsize=9, loc="lower left")
    figure.savefig(os.path.join(out, "fig1.png"))


def draw_fig4(out):
    """The nine cells of probe_loc.py on a photograph, squashed to the probe's 224 pixels."""
    image = Views.resize(read_image(PHOTOS[ASTRONAUT]), (224, 224))
    figure, axes = canvas(3, 3)
    picture(axes, 1.5, 1.5, image, "", size=2.9)
    for cell, box in enumerate(probe_loc.grid_boxes(224)):
        unit = 2.9 / 224
        frame(axes, (0.05, 0.05), box, unit, "white", 2)
        x, y = ((box[:2] + box[2:]) / 2 * unit + 0.05).tolist()
        axes.text(x, y, str(cell), ha="center", va="center", fontsize=18, color="white", zorder=6,
                  bbox={"facecolor": GREY, "edgecolor": "none", "alpha": 0.6, "boxstyle": "circle"})
    figure.savefig(os.path.join(out, "fig4.png"))


# ---- Where a net's feature looks -------------------------------------------------------------------------

def composite_of(instance, background, size):
    """A photograph pasted in the middle of another one: uint8 (3, S, S), its box (4,)."""
    side = 5 * size // 8
    foreground = Views.resize(read_image(PHOTOS[instance]), (side, side))
    return paste(Views.resize(read_image(PHOTOS[background]), (size, size)), foreground, size // 4, size // 4)


def frozen(path, size):
    """The net of a run; `.pixels` makes its input of uint8 images."""
    weights = read_weights(path)
    net = C4Encoder(weights.resnet, roi_size=size // 16).eval().requires_grad_(False)
    load_trunk(net.resnet, weights)
    net.pixels = Pixels(weights)
    return net


def draw_swap(runs, out, size):
    """A row for each background; columns: the composite, then the nets of `runs`."""
    images, boxes = map(torch.stack, zip(composite_of(CAT, ROCKET, size), composite_of(CAT, COFFEE, size)))
    columns = len(runs) + 1
    figure = pyplot.figure(figsize=(2 * columns, 4.3), dpi=100)

    def panel(row, column, image, title, **more):
        axes = figure.add_axes([column / columns + 0.002, 0.47 - 0.47 * row, 1 / columns - 0.004, 0.46])
        axes.imshow(image, extent=(0, size, size, 0), **more)
        frame(axes, (0, 0), boxes[row], 1, RED, 1.5)
        axes.axis("off")
        if row == 0:
            axes.set_title(title, fontsize=11, pad=4)

    for row in range(2):
        panel(row, 0, images[row].permute(1, 2, 0), "the cat, twice")
    for column, (name, path) in enumerate(runs, 1):
        energy = probe_box.energy_map(frozen(path, size), images, boxes[:, None])
        for row in range(2):
            panel(row, column, energy[row, 0].sqrt(), name, cmap="gray", vmin=0)
    figure.savefig(os.path.join(out, "swap.png"))


def correction_layer(net, dataset, size):
    """probe_box.py's linear layer from the feature of a loose box to its offsets, trained on `dataset`."""
    features, boxes = [], []
    for images, some in torch.utils.data.DataLoader(dataset, batch_size=64):
        features.append(net.features(net.pixels(images), some).unflatten(0, some.shape[:2]).flatten(2))
        boxes.append(some)
    x, _, offsets = probe_box.loose_rows(torch.cat(features), torch.cat(boxes), size)
    return probe_box.ridge(x, offsets, held_out=len(x) // 10)


def draw_loose(runs, data, out, size):
    """A row for each composite, a column for each net: the pasted box, a loose one, its correction."""
    folder = os.path.join(data, "train")
    paths = [(os.path.join(folder, os.fsdecode(name)), "") for name in stage.find_images(folder)]
    entries = probe_box.composites(probe_box.some_of(paths, 2000, 0, "subset"), size, 0, "train")
    dataset = probe_box.Boxes(entries, size, 0, "loose of train")
    pairs = ((CAT, ROCKET), (ASTRONAUT, COFFEE), (COFFEE, RETINA))
    images, boxes = map(torch.stack, zip(*[composite_of(*pair, size) for pair in pairs]))
    loose = jitter_boxes(boxes, grid_anchors(size), generator=generator_for(0, "loose", size))
    figure, panels = pyplot.subplots(3, len(runs), figsize=(2.2 * len(runs), 6.8), dpi=100, squeeze=False)
    for column, (name, path) in enumerate(runs):
        net = frozen(path, size)
        layer = correction_layer(net, dataset, size)
        features = net.features(net.pixels(images), loose)[:, 0]
        corrected = probe_box.moved_by(loose, layer(features.double()))
        panels[0, column].set_title(name, fontsize=11, pad=4)
        for row, axes in enumerate(panels[:, column]):
            axes.imshow(images[row].permute(1, 2, 0), extent=(0, size, size, 0))
            for box, color in ((boxes, RED), (loose, BLUE), (corrected, "yellow")):
                frame(axes, (0, 0), box[row], 1, color, 1.8)
            axes.set(xlim=(-size / 16, size * 17 / 16), ylim=(size * 17 / 16, -size / 16))
            axes.axis("off")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.955, 0.02, 0.02)
    figure.savefig(os.path.join(out, "loose.png"))


def main():
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("out", help="folder that gets the pictures")
    parser.add_argument("--point", nargs=3, action="append", default=[], metavar=("NAME", "CLS", "DET"),
                        help="a point of fig1.png: results.json of probe_cls.py and of finetune_det.py")
    parser.add_argument("--run", nargs=2, action="append", default=[], metavar=("NAME", "RUN"),
                        help="a column of swap.png and loose.png: a C4 run, or a file of weights")
    parser.add_argument("--loose", metavar="DATA", help="draw loose.png, too: DATA/train trains its layers")
    parser.add_argument("--image-size", type=int, default=96, help="canvas of swap.png and loose.png")
    args = parser.parse_args()
    if not os.path.isdir(args.out):
        sys.exit(f"figures.py: {args.out}: no such folder")
    if args.loose and not args.run:
        sys.exit("figures.py: --loose needs --run, a column each")
    if args.run:
        draw_swap(args.run, args.out, args.image_size)
        if args.loose:
            draw_loose(args.run, args.loose, args.out, args.image_size)
        return
    shown = Shown(EPOCH, STEP)
    draw_composites(shown, args.out)
    draw_step(shown, args.out)
    draw_groups(args.out)
    draw_fig1({name: own_point(*files) for name, *files in args.point}, args.out)
    draw_fig4(args.out)


if __name__ == "__main__":
    main()
