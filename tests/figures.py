"""The README's diagrams, drawn from generated images by the method's own code.

    python tests/figures.py toy/images docs         # after `make demo` or `python tests/toy.py toy`

OUT/step.png    one instance through a step, Fig. 2 of the paper with the names of insloc.py
OUT/groups.png  two ranks of two groups: the keys that Shuffle-BN gives to each
OUT/results/ladder.png  curves of the runs in OUT/results, if there are any
"""
import glob
import json
import os
import sys

import matplotlib
import torch
from torchvision.ops import box_iou

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import pretrain  # noqa: E402
from insloc import crop_box, generator_for, grid_anchors, photometric, read_image  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, Rectangle  # noqa: E402

RED, BLUE, GREY = "#e01e1e", "#143cff", "#666666"
GROUPS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")


def canvas(w, h):
    figure = pyplot.figure(figsize=(w, h), dpi=110)
    axes = figure.add_axes([0, 0, 1, 1], xlim=(0, w), ylim=(h, 0))
    axes.axis("off")
    return figure, axes


def arrow(axes, start, end, text="", color=GREY, style="-|>", **kwargs):
    axes.add_artist(ConnectionPatch(start, end, "data", "data", arrowstyle=style, color=color, mutation_scale=11,
                                    shrinkA=2, shrinkB=2, **kwargs))
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 0.07, text, ha="center", va="bottom",
                  fontsize=7.5, color=color, family="monospace")


def picture(axes, x, y, image, title, size=1.25):
    """uint8 or [0, 1] (3, h, w), its longer side `size` inches, centred at (x, y)."""
    h, w = (side * size / max(image.shape[1:]) for side in image.shape[1:])
    axes.imshow(image.permute(1, 2, 0), extent=(x - w / 2, x + w / 2, y + h / 2, y - h / 2), zorder=2)
    axes.text(x, y - h / 2 - 0.05, title, ha="center", va="bottom", fontsize=8, zorder=5,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})


def block(axes, x, y, text, w=1.5, h=0.6, color="#eeeeee"):
    axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0.02", facecolor=color,
                                  edgecolor=GREY, zorder=2))
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, family="monospace", zorder=3)


def draw_step(data, out):
    args = pretrain.get_args(["--arch", "c4", "--device", "cpu", "--nprocs", "1", "--bn-group", "8", "--batch-size",
                              "16", "--out", out, data])
    paths = pretrain.find_images(args)
    views, make_group = pretrain.make_data(args, paths)
    samples = [views[key] for key in next(pretrain.batches(len(paths), 16, 8, 1, seed=4))]
    group, i = make_group(samples), 2
    chosen = make_group.choose_backgrounds([s["source"] for s in samples],
                                           generator_for(args.seed, "group", *samples[0]["key"]))[i]
    image = read_image(paths[samples[i]["source"]])
    generator = generator_for(args.seed, "sample", 0, samples[i]["source"])
    anchors, unit = grid_anchors(), 1.25 / 256

    figure, axes = canvas(13.2, 5.3)
    picture(axes, 0.85, 2.75, image, "an image I", size=1.35)
    colours = (RED, "#e07a1e")
    for row, (side, y) in enumerate((("query", 1.5), ("key", 4.0))):
        letter, view = side[0], group[side]
        top, left, h, w = crop_box(*image.shape[1:], ratio=views.ratio, generator=generator)
        torch.randint(0, 2, (2,), generator=generator)                  # the sides, drawn by Views.crop
        scale = 1.35 / max(image.shape[1:])
        corner = 0.85 - image.shape[2] * scale / 2 + left * scale, 2.75 - image.shape[1] * scale / 2 + top * scale
        axes.add_patch(Rectangle(corner, w * scale, h * scale, fill=False, color=colours[row], linewidth=1.5, zorder=3))
        crop = samples[i]["view_" + letter]
        picture(axes, 2.75, y - 0.55, crop, f"crop $I_{letter}$", size=max(crop.shape[1:]) * unit * 0.8)
        picture(axes, 2.75, y + 0.72, samples[chosen[row]]["background"], f"background $B_{letter}$", size=0.9)
        arrow(axes, (1.55, 2.65 if row == 0 else 2.85), (2.2, y - 0.35), color=colours[row])
        before, box = view["images"][i], view["boxes"][i]
        after = photometric(view["images"] / 255, view, view["boxes"])[0][i]
        for x, canvas_image, title in ((4.75, before, f"$I'_{letter}, b_{letter}$"), (6.75, after, "augmented in $b$")):
            picture(axes, x, y, canvas_image, title)
            x1, y1, x2, y2 = (box * unit).tolist()
            axes.add_patch(Rectangle((x - 0.625 + x1, y - 0.625 + y1), x2 - x1, y2 - y1, fill=False, color=RED,
                                     linewidth=1.8, zorder=4))
            if row == 0 and x > 6:
                near = anchors[box_iou(box[None], anchors)[0] > 0.5]
                for drawn, width in [*((anchor, 0.25) for anchor in near[::5]), (view["jittered"][i], 2.2)]:
                    x1, y1, x2, y2 = (drawn * unit).tolist()
                    axes.add_patch(Rectangle((x - 0.625 + x1, y - 0.625 + y1), x2 - x1, y2 - y1, fill=False,
                                             color=BLUE, linewidth=width, zorder=3))
        arrow(axes, (3.35, y), (4.08, y), "paste")
        arrow(axes, (5.4, y), (6.08, y), "photo-\nmetric" if row == 0 else "shuffle,\nphoto-\nmetric")
        arrow(axes, (7.45, y), (8.1, y))
        block(axes, 9.0, y, f"encoder_{letter}\nres4, roi_pool,\nres5, mean, MLP", w=1.75, h=0.85)
        arrow(axes, (9.9, y), (10.75, y), f"{letter} (N,1,128)")
    axes.text(6.75, 2.45, "jitter_boxes: pool an anchor (thick blue);\nof a key the true box (red)", ha="center",
              va="top", fontsize=7.5, color=BLUE, zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    arrow(axes, (8.6, 1.95), (8.6, 3.55), linestyle="dashed")
    axes.text(8.65, 2.75, "momentum_update", fontsize=7.5, family="monospace", color=GREY, va="center")
    block(axes, 11.75, 1.5, "info_nce\n(loss, Eq. 2)", w=1.7, h=0.85, color="#ffe9d6")
    block(axes, 11.75, 4.0, "KeyQueue\n65,536 negatives", w=1.7, h=0.85, color="#e2ecff")
    arrow(axes, (10.35, 3.85), (11.2, 1.95))
    axes.text(10.75, 2.75, "positive", fontsize=7.5, color=GREY, va="center", ha="right")
    arrow(axes, (11.95, 3.55), (11.95, 1.95))
    axes.text(12.0, 2.75, "negatives", fontsize=7.5, color=GREY, va="center")
    axes.text(11.75, 4.6, "enqueue(k) after the loss", ha="center", fontsize=7.5, color=GREY, family="monospace")
    arrow(axes, (11.75, 1.05), (9.0, 1.05), connectionstyle="arc3,rad=.2", color=RED)
    axes.text(10.4, 0.6, "gradient, to encoder_q alone", ha="center", fontsize=7.5, color=RED)
    figure.savefig(os.path.join(out, "step.png"))


def draw_groups(out, seed=0, step=0, size=4):
    permutation = torch.randperm(4 * size, generator=generator_for(seed, "shuffle", step))
    figure, axes = canvas(11, 3.6)
    place = {}
    for row, (y, order) in enumerate(((0.95, range(4 * size)), (2.45, permutation.tolist()))):
        for p, origin in enumerate(order):
            x = 1.75 + 0.47 * p + 0.25 * (p // size) + 0.35 * (p // (2 * size))
            axes.add_patch(Rectangle((x, y), 0.42, 0.42, facecolor=GROUPS[origin // size], edgecolor="none", zorder=3))
            axes.text(x + 0.21, y + 0.21, str(origin), color="white", ha="center", va="center", fontsize=8, zorder=4)
            place[row, origin] = x + 0.21
            if p % size == 0:
                axes.add_patch(Rectangle((x - 0.06, y - 0.06), 0.47 * size + 0.07, 0.54, fill=False, edgecolor=GREY))
            if p % (2 * size) == 0:
                axes.text(x + 0.47 * size + 0.1, 0.62, f"rank {p // (2 * size)}: two groups, one after the other",
                          ha="center", fontsize=9)
        axes.text(1.55, y + 0.21, ("queries\nq0 ... q15", "keys\nas encoded")[row], ha="right", va="center", fontsize=9)
    for origin in range(4 * size):
        axes.plot([place[0, origin], place[1, origin]], [1.4, 2.42], color=GROUPS[origin // size], linewidth=0.8,
                  zorder=1)
    axes.text(5.6, 0.18, "A frame is a BatchNorm group: its images share mean and variance. "
              "A number is an instance; its colour, its query's group.", ha="center", fontsize=9)
    axes.text(5.6, 3.2, "shuffle: key images travel as bytes, their boxes and parameters beside them, each to one rank "
              "(all-to-all); the embeddings\nreturn to all ranks (all-gather, argsort of the permutation), in the "
              "queries' order: into the loss, and into equal queues.", ha="center", va="center", fontsize=9)
    figure.savefig(os.path.join(out, "groups.png"))


def draw_ladder(folder):
    """loss and acc_batch of every FOLDER/RUN/log.jsonl."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for path in sorted(glob.glob(os.path.join(folder, "*_s*", "log.jsonl"))):
        with open(path) as f:
            lines = [line for line in map(json.loads, f) if "loss" in line]
        for one, name in zip(axes, ("loss", "acc_batch")):
            one.plot([line["step"] for line in lines], [line[name] for line in lines],
                     label=os.path.basename(os.path.dirname(path)), linewidth=1.2)
            one.set(xlabel="step", title=name)
    axes[0].legend()
    figure.savefig(os.path.join(folder, "ladder.png"), dpi=100)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not os.path.isdir(sys.argv[1]) or not os.path.isdir(sys.argv[2]):
        sys.exit(f"usage: {sys.argv[0]} IMAGES OUT, both folders")
    draw_step(*sys.argv[1:])
    draw_groups(sys.argv[2])
    if glob.glob(os.path.join(sys.argv[2], "results", "*_s*")):
        draw_ladder(os.path.join(sys.argv[2], "results"))
