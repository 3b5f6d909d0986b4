"""The pictures of README and docs, drawn from generated images by the method's own code.

    python tools/figures.py toy/images docs         # after `make demo` or `python tools/toy.py toy`

OUT/composites.png  four samples, query and key, as pretrain.py draws them
OUT/step.png    one instance through a step, Fig. 2 of the paper with the names of insloc.py
OUT/groups.png  two ranks of two groups: the keys that Shuffle-BN gives to each
OUT/results/swap.png  the second study, if its files are in OUT/results
"""
import os
import sys

import matplotlib
import torch
from torchvision.ops import box_iou

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "docs", "results")]
import check  # noqa: E402
import pretrain  # noqa: E402
from insloc import (batches, choose_backgrounds, crop_box, generator_for, grid_anchors,  # noqa: E402
                    photometric, read_image)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, Rectangle  # noqa: E402

LADDER = ("random_bn", "moco", "cp", "insloc")
RED, ORANGE, BLUE, GREY = "#e01e1e", "#e07a1e", "#143cff", "#666666"
GROUPS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")
MONO = {"fontsize": 7.5, "family": "monospace"}
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def canvas(w, h):
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


def draw_step(args, paths, out, i=2):
    """Sample i of a group, from its file to the loss."""
    views, make_group = pretrain.make_data(args, paths)
    samples = [views[key] for key in next(batches(len(paths), args.batch_size, args.bn_group, 1, seed=4))]
    group = make_group(samples)
    sources = [sample["source"] for sample in samples]
    chosen = choose_backgrounds(sources, generator_for(args.seed, "group", *samples[0]["group"]))[i]
    image = read_image(os.fsdecode(paths[sources[i]]))
    generator = generator_for(args.seed, "sample", 0, sources[i])           # draws again what Views drew
    anchors, unit, image_unit = grid_anchors(), 1.25 / 256, 1.35 / max(image.shape[1:])
    image_corner = 0.85 - image.shape[2] * image_unit / 2, 2.75 - image.shape[1] * image_unit / 2

    figure, axes = canvas(13.2, 5.3)
    picture(axes, 0.85, 2.75, image, "an image I", size=1.35)
    for row, (side, y, colour) in enumerate((("query", 1.5, RED), ("key", 4.0, ORANGE))):
        letter, view, crop = side[0], group[side], samples[i][side]
        top, left, h, w = crop_box(*image.shape[1:], ratio=views.ratio, generator=generator)
        torch.randint(0, 2, (2,), generator=generator)                  # the sides, drawn by Views.crop
        frame(axes, image_corner, (left, top, left + w, top + h), image_unit, colour, 1.5)
        picture(axes, 2.75, y - 0.55, crop, f"crop $I_{letter}$", size=max(crop.shape[1:]) * unit * 0.8)
        picture(axes, 2.75, y + 0.72, samples[chosen[row]]["backgrounds"][0], f"background $B_{letter}$", 0.9)
        arrow(axes, (1.55, 2.65 if row == 0 else 2.85), (2.2, y - 0.35), color=colour)
        augmented, _ = photometric(view["images"] / 255, view, view["boxes"])
        picture(axes, 4.75, y, view["images"][i], f"$I'_{letter}, b_{letter}$")
        picture(axes, 6.75, y, augmented[i], "augmented in $b$")
        for x in (4.75, 6.75):
            frame(axes, (x - 0.625, y - 0.625), view["boxes"][i], unit, RED, 1.8)
        if side == "query":
            for anchor in anchors[box_iou(view["boxes"][i:i + 1], anchors)[0] > 0.5][::5]:
                frame(axes, (6.125, y - 0.625), anchor, unit, BLUE, 0.25, zorder=3)
            frame(axes, (6.125, y - 0.625), view["drawn_boxes"][i], unit, BLUE, 2.2, zorder=3)
        arrow(axes, (3.35, y), (4.08, y), "paste")
        arrow(axes, (5.4, y), (6.08, y), "photo-\nmetric" if side == "query" else "shuffle,\nphoto-\nmetric")
        arrow(axes, (7.45, y), (8.1, y))
        block(axes, 9.0, y, f"encoder_{letter}\nres4, roi_pool,\nres5, mean, MLP")
        arrow(axes, (9.9, y), (10.75, y), f"{letter} (N,1,128)")
    axes.text(6.75, 2.45, "jitter_boxes: the query pools an anchor\n(thick blue), the key its true box (red)",
              ha="center", va="top", fontsize=7.5, color=BLUE, zorder=5, bbox=ON_WHITE)
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


def draw_swap(folder):
    """FOLDER/swap.png of the second study: where each net's feature looks, the two cosines, the gradient.

    The maps are rows of FOLDER/narrow18/METHOD_s0/swap.png, which probe_loc.py drew on generated images.
    """
    figure = pyplot.figure(figsize=(11, 5.2), dpi=100)
    titles = ["composite", "random", *(check.NAMES[method] for method in LADDER[1:])]
    for position, method in enumerate(("composite", *LADDER)):
        run = "insloc" if method == "composite" else method
        pixels = pyplot.imread(os.path.join(folder, f"narrow18/{run}_s0/swap.png"))
        height = (len(pixels) - 2) // 3                         # rows: composites, random net, given net
        first = 0 if method == "composite" else 2 * height
        axes = figure.add_axes([0.04, 0.8 - 0.195 * position, 0.37, 0.19])
        axes.imshow(pixels[first:first + height + 2])
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(titles[position], fontsize=9)
    cosines = {"same_instance": "same instance, other background",
               "same_background": "other instance, same background"}
    shares = {"gradient_inside": "energy of the gradient", "area_inside": "area"}
    for position, (title, lines) in enumerate((("cosine", cosines), ("share inside the box", shares))):
        axes = figure.add_axes([0.48, 0.58 - 0.5 * position, 0.5, 0.36], ylim=(-0.1, 1.05), title=title)
        for color, (key, label) in zip((RED, GREY), lines.items()):
            for x, method in enumerate(LADDER):
                values = check.swap("narrow18", method, key)
                axes.plot([x] * len(values), values, "o", color=color, label="" if x else label)
        axes.set_xticks(range(len(LADDER)), titles[1:])
        axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.62))
    figure.savefig(os.path.join(folder, "swap.png"))


if __name__ == "__main__":
    if len(sys.argv) != 3 or not os.path.isdir(sys.argv[1]) or not os.path.isdir(sys.argv[2]):
        sys.exit(f"usage: {sys.argv[0]} IMAGES OUT, both folders")
    images, out = sys.argv[1:]
    args = pretrain.get_args(["--arch", "c4", "--device", "cpu", "--nprocs", "1", "--bn-group", "8",
                              "--batch-size", "16", "--out", out, images])
    paths, _ = pretrain.find_data(args)
    draw_step(args, paths, out)
    args.seed = 38                                          # with it none of the four samples turns grey
    pretrain.save_composites(args, paths, 4)
    draw_groups(out)
    if os.path.isdir(os.path.join(out, "results", "narrow18")):
        draw_swap(os.path.join(out, "results"))
