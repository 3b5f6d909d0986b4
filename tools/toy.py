"""A small generated data set, in the three layouts that the stages read.

    python tools/toy.py OUT [--seed 0] [--train 512] [--val 128] [--det-train 160] [--det-val 60]

OUT/images/{train,val}/CLASS/*.jpg   one large shape a picture, its class the folder   pretrain.py, probe_*.py
OUT/swatches/{train,val}/HUE/*.jpg   a pattern alone, twice as many, the folder a hue  `make demo`
OUT/coco/...                         several shapes with polygons, COCO json           finetune_det.py
OUT/VOC2007, OUT/VOC2012             the same pictures, VOC xml                        finetune_det.py

Shapes and grounds have random textures, colours, sizes, turns and light, so that no colour tells a class
and no two pictures are alike. A swatch is all pattern: two crops of it look alike, those of another do not,
and a small network learns that in minutes, hue first. Each picture has a generator of its own, so the number
of pictures changes nothing in a picture.
"""
import argparse
import colorsys
import json
import os
import shutil
import sys

import numpy as np
from PIL import Image, ImageDraw

HUES = {"red": 0.0, "yellow": 0.15, "green": 0.35, "blue": 0.6, "magenta": 0.82}      # of swatches
CLASSES = ("circle", "cross", "square", "star", "triangle")
COCO_IDS = (1, 3, 7, 8, 20)                                 # with gaps, as COCO's
VOC_XML = """<annotation><folder>{folder}</folder><filename>{name}.jpg</filename>
<size><width>{w}</width><height>{h}</height><depth>3</depth></size><segmented>0</segmented>
{objects}</annotation>
"""
VOC_OBJECT = """<object>
<name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>
"""


def texture(rng, h, w, colours=None):
    """(h, w, 3) float in [0, 1]: two colours (None: random) mixed by a random pattern, under uneven light."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    period = rng.uniform(8, 40)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period
    v = (y * np.cos(angle) - x * np.sin(angle)) / period
    kind = rng.integers(6)
    if kind == 0:                                           # stripes
        mix = (u % 1 < rng.uniform(0.3, 0.7)).astype(np.float32)
    elif kind == 1:                                         # checks
        mix = ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    elif kind == 2:                                         # dots
        mix = ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < rng.uniform(0.04, 0.14)).astype(np.float32)
    elif kind == 3:                                         # waves
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * u + np.sin(2 * np.pi * v * rng.uniform(0.3, 1)))
    elif kind == 4:                                         # clouds: coarse noise, made smooth
        rows = rng.integers(3, 9)
        columns = rng.integers(3, 9)
        coarse = Image.fromarray(rng.integers(0, 256, (rows, columns), dtype=np.uint8))
        mix = np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    else:                                                   # a ramp
        mix = (u - u.min()) / (u.max() - u.min() + 1e-6)
    one, other = np.float32(rng.uniform(0, 1, (2, 3)) if colours is None else colours)
    light = 1 + rng.uniform(-0.4, 0.4) * (x / w - 0.5) + rng.uniform(-0.4, 0.4) * (y / h - 0.5)
    grain = rng.normal(0, 0.02, (h, w, 1)).astype(np.float32)
    return np.clip((one + mix[..., None] * (other - one)) * light[..., None] + grain, 0, 1)


def outline(rng, name):
    """(n, 2) corners x, y of a shape of radius 1 about 0, turned and a little stretched at random."""
    if name == "circle":
        angle = np.arange(40) * np.pi / 20
        radius = np.ones(40)
    elif name == "star":
        angle = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.45, 1.0)
    elif name == "cross":
        corners = np.array([(1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3)])
        corners = np.concatenate([corners, -corners]) / np.hypot(1, .3)
        angle = np.arctan2(corners[:, 1], corners[:, 0])
        radius = np.hypot(corners[:, 0], corners[:, 1])
    else:
        n = {"square": 4, "triangle": 3}[name]
        angle = np.arange(n) * 2 * np.pi / n
        radius = np.ones(n)
    angle = angle + rng.uniform(0, 2 * np.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1) * rng.uniform(0.8, 1.0, 2)


def fill(rng, canvas, corners):
    """Paints a textured polygon, its edge smooth, onto the canvas (h, w, 3), in place."""
    h, w = canvas.shape[:2]
    mask = Image.new("L", (3 * w, 3 * h))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners * 3], fill=255)
    mask = np.asarray(mask.resize((w, h), Image.Resampling.BOX), dtype=np.float32)[..., None] / 255
    canvas += mask * (texture(rng, h, w) - canvas)


def draw(seeds, sizes, radii, count):
    """A picture, uint8 (h, w, 3), and its objects, a list of (class index, corners (n, 2) x, y in pixels).

    Objects do not overlap. Up to three blobs without a name distract.
    seeds: ints; sizes: range of the picture's sides; radii: range of a shape's radius, as a share of the
    shorter side; count: range of the number of shapes.
    """
    rng = np.random.default_rng(seeds)
    h, w = rng.integers(sizes[0], sizes[1] + 1, 2)
    canvas = texture(rng, h, w)
    objects = []
    boxes = []
    for _ in range(rng.integers(0, 4)):
        blob = rng.uniform(0.02, 0.07) * min(h, w) * rng.uniform(0.5, 1, (7, 1))
        turn = np.sort(rng.uniform(0, 2 * np.pi, 7))
        fill(rng, canvas, blob * np.stack([np.cos(turn), np.sin(turn)], 1) + rng.uniform(0, 1, 2) * (w, h))
    for _ in range(rng.integers(count[0], count[1] + 1)):
        for _ in range(20):                                 # places tried
            label = rng.integers(len(CLASSES))
            radius = rng.uniform(*radii) * min(h, w)
            corners = outline(rng, CLASSES[label]) * radius
            corners += rng.uniform(radius, (w - radius, h - radius))
            low = corners.min(0)
            high = corners.max(0)
            if all((high < b[0]).any() or (low > b[1]).any() for b in boxes):
                boxes.append((low, high))
                objects.append((int(label), corners))
                fill(rng, canvas, corners)
                break
    return (canvas * 255).round().astype(np.uint8), objects


def swatch(seeds):
    """A picture that one pattern fills, of a dye on a paler ground: uint8 (h, w, 3), the name of its hue."""
    rng = np.random.default_rng(seeds)
    h, w = rng.integers(80, 129, 2)
    name = list(HUES)[rng.integers(len(HUES))]
    dye = colorsys.hsv_to_rgb((HUES[name] + rng.uniform(-0.03, 0.03)) % 1, 1, rng.uniform(0.6, 1))
    ground = colorsys.hsv_to_rgb(rng.uniform(0, 1), rng.uniform(0, 0.6), rng.uniform(0, 1))
    return (texture(rng, h, w, rng.permutation([dye, ground])) * 255).round().astype(np.uint8), name


def save(path, image):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(image).save(path, quality=92)


def write_coco(out, split, pictures):
    """pictures: list of (image, objects). Area by the shoelace formula; boxes xywh."""
    images, annotations = [], []
    for i, (image, objects) in enumerate(pictures):
        number = i + 1
        name = f"{number:012d}.jpg"
        save(f"{out}/coco/{split}2017/{name}", image)
        images.append({"id": number, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        for label, corners in objects:
            x, y = corners.T
            x1, y1 = corners.min(0)
            x2, y2 = corners.max(0)
            area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
            annotations.append({"id": len(annotations) + 1, "image_id": number,
                                "category_id": COCO_IDS[label], "iscrowd": 0, "area": float(area),
                                "bbox": [x1, y1, x2 - x1, y2 - y1],
                                "segmentation": [[round(float(c), 2) for c in corners.flatten()]]})
    categories = [{"id": number, "name": name} for number, name in zip(COCO_IDS, CLASSES)]
    os.makedirs(f"{out}/coco/annotations", exist_ok=True)
    with open(f"{out}/coco/annotations/instances_{split}2017.json", "w") as f:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, f)


def write_voc(out, year, split, pictures, start=0):
    """VOC's boxes are whole pixels, counted from 1, both ends included."""
    folder = f"{out}/VOC{year}"
    names = [f"{start + i:06d}" for i in range(len(pictures))]
    for name, (image, objects) in zip(names, pictures):
        save(f"{folder}/JPEGImages/{name}.jpg", image)
        text = ""
        for label, corners in objects:
            x1, y1 = np.floor(corners.min(0)).astype(int) + 1
            x2, y2 = np.ceil(corners.max(0)).astype(int)
            text += VOC_OBJECT.format(name=CLASSES[label], x1=x1, y1=y1, x2=x2, y2=y2)
        os.makedirs(f"{folder}/Annotations", exist_ok=True)
        with open(f"{folder}/Annotations/{name}.xml", "w") as f:
            h, w = image.shape[:2]
            f.write(VOC_XML.format(folder=f"VOC{year}", name=name, h=h, w=w, objects=text))
    os.makedirs(f"{folder}/ImageSets/Main", exist_ok=True)
    with open(f"{folder}/ImageSets/Main/{split}.txt", "w") as f:
        f.write("".join(name + "\n" for name in names))


def write_world(out, seed=0, train=512, val=128, det_train=160, det_val=60):
    """All three layouts. A picture's seeds are `seed`, the number of its set and its own number."""
    for number, split, count in ((0, "train", train), (1, "val", val)):
        for i in range(count):
            image, [(label, _)] = draw((seed, number, i), (140, 280), (0.28, 0.46), (1, 1))
            save(f"{out}/images/{split}/{CLASSES[label]}/{i:05d}.jpg", image)
        for i in range(2 * count):
            image, hue = swatch((seed, number, i))
            save(f"{out}/swatches/{split}/{hue}/{i:05d}.jpg", image)
    for number, split, count in ((2, "train", det_train), (3, "val", det_val)):
        pictures = []
        for i in range(count):
            fewest = 0 if i % 20 == 9 else 1                # some pictures may be empty
            pictures.append(draw((seed, number, i), (180, 320), (0.08, 0.25), (fewest, 6)))
        write_coco(out, split, pictures)
        if split == "val":
            write_voc(out, 2007, "test", pictures, start=500000)
        else:                                       # a half each, as the VOC protocol trains on both years
            write_voc(out, 2007, "trainval", pictures[:(count + 1) // 2])
            write_voc(out, 2012, "trainval", pictures[(count + 1) // 2:], start=900000)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="a folder that is not there yet, or empty")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (("train", 512), ("val", 128), ("det-train", 160), ("det-val", 60)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"pictures [{default}]")
    args = parser.parse_args(argv)
    if min(args.train, args.val, args.det_train, args.det_val, args.seed) < 0:
        parser.error("numbers must not be negative")
    try:
        if os.path.exists(args.out) and (not os.path.isdir(args.out) or os.listdir(args.out)):
            sys.exit(f"toy.py: error: {args.out} is there already, not an empty folder: name another")
        partial = args.out.rstrip("/") + ".partial"         # renamed when whole: a kill leaves no half world
        shutil.rmtree(partial, ignore_errors=True)
        print(f"writing generated pictures to {args.out}, which takes about 20 seconds", flush=True)
        write_world(partial, args.seed, args.train, args.val, args.det_train, args.det_val)
        os.rename(partial, args.out)
    except OSError as error:
        sys.exit(f"toy.py: error: {error}")
    print(f"wrote {args.out}: images ({args.train} + {args.val}), swatches (twice as many), "
          f"coco, VOC2007 and VOC2012 ({args.det_train} + {args.det_val})")


if __name__ == "__main__":
    main()
