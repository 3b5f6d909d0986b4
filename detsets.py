"""Detection sets: what their label files say, mended, counted and rehearsed; nothing of the method.

1. `load_data` reads every entry and takes what can be taken as meant. What it changes or leaves out is
   counted, and said in one line a kind with the first file. VOC's xml becomes COCO's json.
2. `rehearse` gives the truth of the validation set to the evaluator, as if a detector had found it. The AP
   that the truth reaches is the ceiling of this set.
3. `draw` draws the truth, so that somebody can look at it.
Whatever goes wrong in 1 and 2 lies in the files: `reading` makes it one line that names the file.
"""
import collections
import contextlib
import io
import json
import math
import os
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import escape

import numpy as np
import torch
from detectron2 import evaluation
from detectron2.data import DatasetCatalog, MetadataCatalog, datasets, detection_utils
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image
from torchvision.transforms.functional import pad, resize
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

import stage

VOC_OBJECT = ("<object><name>{}</name><pose>Unspecified</pose><truncated>0</truncated>"
              "<difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
              "</bndbox></object>")


@contextlib.contextmanager
def reading(place, kinds=Exception):
    """Makes exceptions inside one line, a Refusal that names the place. kinds: classes that are no bugs."""
    try:
        yield
    except kinds as error:
        ours = isinstance(error, (stage.Refusal, ValueError, OSError))
        kind = "" if ours else f"{type(error).__name__}: "          # the message alone may be a mere key
        raise stage.Refusal(f"{place}: {kind}{stage.last_line(error)[:300]}") from error


def read_image(path, format=None, read=detection_utils.read_image):
    """detectron2's function, in whose place it is put; its errors name the file."""
    with reading(path):
        return read(path, format)


detection_utils.read_image = read_image


# ---- 1  Read and mend ------------------------------------------------------------------------------------

def number(value, key):
    """A number, which a label file may also write as a string. ValueError names the key."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, (float, str)):
        with contextlib.suppress(ValueError):
            if math.isfinite(float(value)):
                return int(float(value)) if float(value).is_integer() else float(value)
    raise ValueError(f"{key} is {value!r}, which is no number")


def identity(value, key):
    """An id: a number, or a string that is none. ValueError names the key."""
    return value if isinstance(value, str) and not value.isdecimal() else number(value, key)


def mend_image(entry, folder):
    """An image's entry with the size of its picture. ValueError if detectron2 cannot use the picture."""
    with Image.open(os.path.join(folder, entry["file_name"])) as picture:
        turned = picture.getexif().get(0x112, 1) > 4                # detectron2 turns it as EXIF says
        width, height = picture.size[::-1] if turned else picture.size
        mode = picture.mode
    for key, side in (("width", width), ("height", height)):
        if entry.get(key) is not None and number(entry[key], key) != side:
            raise ValueError(f"it is {width} x {height}, its label's {key} is {entry[key]}")
    if mode.startswith(("I", "F")):
        raise ValueError(f"pixels of kind {mode}, which detectron2 clips to white")
    if max(width, height) > 100 * min(width, height):
        raise ValueError(f"{width} x {height}: resized, nothing would be left of its shorter side")
    return {**entry, "width": width, "height": height}


def mend_numbers(entry, categories):
    """An annotation with numbers where numbers belong. ValueError and KeyError name the key."""
    entry = {key: value for key, value in entry.items() if key not in ("keypoints", "ignore")} | {
        "image_id": identity(entry["image_id"], "image_id"),
        "category_id": identity(entry["category_id"], "category_id"),
        "bbox": [number(side, "bbox") for side in entry["bbox"] or ()],
        "iscrowd": entry.get("iscrowd") or entry.get("ignore") or 0}
    if entry["iscrowd"] is not True:
        entry["iscrowd"] = number(entry["iscrowd"], "iscrowd")
    if entry["category_id"] not in categories:
        raise ValueError(f"category_id {entry['category_id']} is no category of this file")
    if len(entry["bbox"]) != 4:
        raise ValueError(f"bbox is {entry['bbox']}, not four numbers")
    return entry


def are_corners(entries, images):
    """Whether each bbox is x1 y1 x2 y2: all fit their pictures so, and as x y w h some leave them by far."""
    leaves = False
    for entry in entries:
        x, y, w, h = entry["bbox"]
        width, height = images[entry["image_id"]]["width"], images[entry["image_id"]]["height"]
        if not (0 <= x < w <= width + 0.5 and 0 <= y < h <= height + 0.5):
            return False
        leaves |= x + w > 1.05 * width or y + h > 1.05 * height
    return leaves


def mend_box(entry, image, corners):
    """Cuts a box at the border of its picture, in place, and sets its area. -> what is said of it, or None"""
    x1, y1, x2, y2 = entry["bbox"]
    if not corners:
        x2, y2 = x1 + x2, y1 + y2
    width, height = image["width"], image["height"]
    leaves = min(x1, y1) < -0.5 or x2 > width + 0.5 or y2 > height + 0.5        # half a pixel is rounding
    if leaves or corners:
        x1, x2 = np.clip((x1, x2), 0, width).tolist()
        y1, y2 = np.clip((y1, y2), 0, height).tolist()
        entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    try:
        entry["area"] = number(entry.get("area"), "area")
    except ValueError:
        entry["area"] = (x2 - x1) * (y2 - y1)
    if x2 <= x1 or y2 <= y1:
        return "boxes have no area in their picture: nothing trains on them or finds them"
    if corners:
        return "boxes have a bbox of corners x1 y1 x2 y2, or some would leave their picture: taken so"
    return "boxes leave their picture: cut at its border" if leaves else None


def run_lengths(text):
    """The lengths that a compressed run-length mask states, by pycocotools' format."""
    lengths, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48                                  # five of the value, and if more follow
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)                     # the sign
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value, shift = 0, 0
    return lengths


def mend_mask(mask, box, image):
    """A mask of a box x y w h in a form that detectron2 reads, or None; and what is said of it, or None."""
    said, polygons = None, []
    if isinstance(mask, dict):
        size, counts = [number(side, "size") for side in mask["size"]], mask["counts"]
        if isinstance(counts, list):
            counts = lengths = [number(length, "counts") for length in counts]
        else:
            lengths = run_lengths(counts)
        if size != [image["height"], image["width"]] or sum(lengths) != math.prod(size) or min(lengths) < 0:
            # pycocotools would never return, or decode memory that nobody wrote.
            return None, "boxes have a run-length mask that does not fill height x width of its picture"
        return {"size": size, "counts": counts}, None
    if mask and (not isinstance(mask[0], list) or len(mask[0]) == 2):
        mask = [mask]                                               # one polygon, or its points in pairs
    for polygon in mask or ():
        points = np.asarray(polygon, dtype=float).ravel().tolist()
        if len(points) == 4:
            x1, y1, x2, y2 = points
            points = [x1, y1, x2, y1, x2, y2, x1, y2]
            said = "boxes have a polygon of two corners: taken as a rectangle"
        if len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            said = "boxes have a polygon that is none, of fewer than three corners: left out"
        else:
            polygons.append(polygon if polygon == points else points)
    if not polygons:
        return None, said
    points = np.concatenate(polygons).reshape(-1, 2)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2 - box[:2]
    if (middle < -2).any() or (middle > np.add(box[2:], 2)).any():
        return None, "boxes have polygons that lie outside of the box"
    return polygons, said


def mend_masks(entries, images, said):
    """Mends the masks of annotations in place. All are left out if one box has none that can be used."""
    without = []
    for entry in entries:
        image = images[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        with reading(f"{image['file_name']}: a box {entry['bbox']}, segmentation"):
            mask, fault = mend_mask(entry.get("segmentation"), entry["bbox"], image)
        if fault:
            said[fault].append(image["file_name"])
        if mask is None and entry["iscrowd"]:
            mask = [[x, y, x + w, y, x + w, y + h, x, y + h]]       # a region that does not count, about so
        if mask is None:
            without.append(image["file_name"])
        entry["segmentation"] = mask
    if without:
        said["boxes have no mask that can be used: masks are left out, boxes alone are trained"] = without
        for entry in entries:
            del entry["segmentation"]


def mend_boxes(entries, images, said):
    """Mends boxes and crowds of annotations in place. ValueError if all boxes are shares of their picture."""
    if entries and all(max(entry["bbox"]) <= 1 for entry in entries):
        raise ValueError(f"annotations: bbox is {entries[0]['bbox']}, a share of the picture, as all in this "
                         "file; COCO's is x, y, width, height in pixels")
    corners = are_corners(entries, images)
    only_crowds = all(entry["iscrowd"] for entry in entries)
    for entry in entries:
        name = images[entry["image_id"]]["file_name"]
        fault = mend_box(entry, images[entry["image_id"]], corners)
        if fault:
            said[fault].append(name)
        if only_crowds:                             # CVAT and datumaro write it beside every run-length mask
            entry["iscrowd"] = 0
            said["boxes are crowds (iscrowd 1) like all of this file: taken as things"].append(name)
        elif entry["iscrowd"]:
            said["boxes are crowds (iscrowd 1): nothing trains on them or counts them"].append(name)


def mend(content, folder, masks, tenth, said):
    """COCO's json in a form that detectron2 and pycocotools read.

    masks: whether they are used. tenth: of the images, Mini-COCO. said: {what some boxes have: their places}.
    """
    images, entries, categories = {}, [], {}
    for entry in content["categories"]:
        key = identity(entry["id"], "id of a category")
        categories[key] = {**entry, "id": key, "name": str(entry["name"])}
    for i, entry in enumerate(content["images"]):
        with reading(f"images[{i}] {entry.get('file_name')}"):
            key = identity(entry["id"], "id")
            if key in images:
                raise ValueError("another image has the same id: renumber")
            images[key] = {**entry, "id": key}
    for i, entry in enumerate(content["annotations"]):
        with reading(f"annotations[{i}]"):
            entry = mend_numbers(entry, categories)
        if entry["image_id"] in images:
            entries.append(entry)
        else:
            said["boxes have an image_id that this file does not list: left out"].append(f"annotations[{i}]")
    order = np.random.Generator(np.random.PCG64(0)).permutation(sorted(images))
    if tenth:                                       # the paper's list is not public
        kept = set(order[:max(1, len(images) // 10)].tolist())
        images = {key: image for key, image in images.items() if key in kept}
        entries = [entry for entry in entries if entry["image_id"] in kept]
    for key, image in images.items():
        with reading(os.path.join(folder, image["file_name"])):
            images[key] = mend_image(image, folder)
    mend_boxes(entries, images, said)
    if masks:
        mend_masks(entries, images, said)
    ids = {entry.get("id") for entry in entries}
    renumber = len(ids) < len(entries) or not all(type(key) is int and key > 0 for key in ids)
    for i, entry in enumerate(entries, start=1):
        if renumber:
            entry["id"] = i                         # COCO's evaluation takes 0 for unmatched
        if not masks:
            entry.pop("segmentation", None)
    return {**content, "images": [*images.values()], "annotations": entries,
            "categories": [*categories.values()]}


def match_classes(content, training):
    """Gives a set the categories of the training set, matched by their names. ValueError if it has others."""
    if content["categories"] == training:
        return
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    ids = {entry["name"]: entry["id"] for entry in training}
    others = sorted(set(names.values()) - ids.keys())
    if others:
        raise ValueError(f"its classes {others[:9]} are none of training's, {list(ids)[:9]}")
    for entry in content["annotations"]:
        entry["category_id"] = ids[names[entry["category_id"]]]
    content["categories"] = training


def read_voc(folder, split, classes, said):
    """A split of a VOC tree as COCO's json; an image's id is its place in the list, so any name will do."""
    images, entries = [], []
    lines = Path(folder, "ImageSets", "Main", f"{split}.txt").read_text(encoding="utf-8-sig").splitlines()
    for name in filter(None, map(str.strip, lines)):
        path = Path(folder, "Annotations", f"{name}.xml")
        with reading(path):
            if path.exists():
                tree = xml.etree.ElementTree.parse(path)
            else:                                                   # datumaro writes none without a box
                tree = xml.etree.ElementTree.Element("annotation")
                said["pictures have no xml file: taken as pictures without a box"].append(path.name)
            image = {side: tree.findtext(f"size/{side}") for side in ("width", "height")}
            image.update(id=len(images) + 1, file_name=f"{name}.jpg")
            if not Path(folder, "JPEGImages", image["file_name"]).exists() and tree.findtext("filename"):
                image["file_name"] = tree.findtext("filename")      # a PNG, for example
            images.append(image)
            for thing in tree.findall("object"):
                label = (thing.findtext("name") or "").strip()
                if label not in classes:
                    raise ValueError(f"name is {label!r}, none of --classes {','.join(classes)}")
                corners = [number(thing.findtext(f"bndbox/{key}"), key)
                           for key in ("xmin", "ymin", "xmax", "ymax")]
                x1, y1, x2, y2 = map(round, corners)                # counted from 1, both ends included
                if [x1, y1, x2, y2] != corners:
                    said["boxes have corners that are no whole numbers: rounded"].append(path.name)
                entries.append({"id": len(entries) + 1, "image_id": image["id"], "iscrowd": 0,
                                "category_id": classes.index(label) + 1,
                                "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                                "difficult": number(thing.findtext("difficult") or 0, "difficult")})
    categories = [{"id": i, "name": name.replace("/", "_")} for i, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": entries, "categories": categories}


def write_voc(content, folder):
    """COCO's json as the VOC tree that detectron2's evaluator reads: a list, and an xml file a picture."""
    names = {entry["id"]: escape(entry["name"]) for entry in content["categories"]}
    things = {entry["id"]: "" for entry in content["images"]}
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        things[entry["image_id"]] += VOC_OBJECT.format(names[entry["category_id"]], entry["difficult"],
                                                       x + 1, y + 1, x + w, y + h)
    for part in ("Annotations", "ImageSets/Main"):
        os.makedirs(f"{folder}/{part}", exist_ok=True)
    for image_id, text in things.items():
        Path(folder, "Annotations", f"{image_id}.xml").write_text(f"<annotation>{text}</annotation>")
    Path(folder, "ImageSets", "Main", "val.txt").write_text("".join(f"{image_id}\n" for image_id in things))


def find_sets(args):
    """[(detectron2's name, folder, COCO json or VOC's split)], training first, validation last."""
    if args.train_json:
        return [("coco_train", args.train_images, args.train_json),
                ("coco_val", args.val_images, args.val_json)]
    if args.protocol == "voc-c4":
        sets = [("voc2007_trainval", f"{args.data}/VOC2007", "trainval"),
                ("voc2012_trainval", f"{args.data}/VOC2012", "trainval"),
                ("voc2007_test", f"{args.data}/VOC2007", "test")]
        return [one for one in sets if "2007" in one[0] or os.path.exists(one[1])]    # one's own has no 2012
    coco = args.data if os.path.exists(f"{args.data}/annotations") else f"{args.data}/coco"
    return [(f"coco_{split}", f"{coco}/{split}2017", f"{coco}/annotations/instances_{split}2017.json")
            for split in ("train", "val")]


def register(name, folder, labels, classes):
    """A set under detectron2's name. Each process reads it by itself, when it needs it."""
    datasets.register_coco_instances(name, {}, labels, folder)
    MetadataCatalog.get(name).set(thing_classes=classes)
    if name.startswith("voc"):                                      # where write_voc wrote
        MetadataCatalog.get(name).set(dirname=labels.removesuffix(".json"), split="val", year=2007)


def mend_set(args, name, folder, labels, training, said):
    """Reads and mends a set. -> its content, the json that detectron2 reads, the folder of its pictures"""
    copy = f"{args.out}/{name}.json"
    tenth = args.protocol == "minicoco-c4" and name == "coco_train"
    if name.startswith("voc"):
        folder, content = f"{folder}/JPEGImages", read_voc(folder, labels, args.classes, said)
        content = mend(content, folder, False, tenth, said)
        match_classes(content, training or content["categories"])
        write_voc(content, copy.removesuffix(".json"))
    else:
        before = json.loads(Path(labels).read_bytes())
        content = mend(before, folder, args.protocol != "voc-c4", tenth, said)
        match_classes(content, training or content["categories"])
        if content == before:                                       # COCO itself: nothing had to change
            return content, labels, folder
    stage.write_atomically(copy, lambda file: file.write(json.dumps(content).encode()))
    return content, copy, folder


def load_data(args):
    """Mends, counts and registers the protocol's sets. -> what all processes must know of them

    sets: [(detectron2's name, folder, json)], validation last; digests of their labels; images: of training;
    masks: whether all boxes have one; run_length: whether one of training is no polygon; notes: lines, said
    already; source: labels and folder of validation.
    """
    data = SimpleNamespace(sets=[], digests=[], images=0, masks=True, run_length=False, notes=[])
    categories = None
    for name, folder, labels in find_sets(args):
        data.source = f"{labels} of {folder}"
        said = collections.defaultdict(list)
        with reading(data.source):
            content, labels, folder = mend_set(args, name, folder, labels, categories, said)
            images, boxes = content["images"], content["annotations"]
            for fault, places in said.items():
                total = len(images if fault.startswith("pictures") else boxes)
                data.notes.append(f"{data.source}: {len(places)} of {total} {fault} (first: {places[0]})")
                stage.say(data.notes[-1])
            if not boxes:
                raise ValueError("it has no box")
            categories = content["categories"]
            data.classes = [entry["name"] for entry in sorted(categories, key=lambda entry: entry["id"])]
        register(name, folder, labels, data.classes)
        data.sets.append((name, folder, labels))
        data.digests.append(stage.digest(repr(entry).encode() for entry in [*images, *boxes]))
        data.masks = data.masks and "segmentation" in boxes[0]
        if name.endswith(("train", "trainval")):
            data.images += len(images)
            data.run_length |= any(isinstance(box.get("segmentation"), dict) and not box["iscrowd"]
                                   for box in boxes)
        if args.protocol == "minicoco-c4" and name == "coco_train":
            data.minicoco = sorted(image["id"] for image in images)
            data.minicoco_digest = stage.digest(str(image).encode() for image in data.minicoco)
    return data


# ---- 2  Rehearse -----------------------------------------------------------------------------------------

def build_evaluator(cfg, name):
    """detectron2's evaluator of a set: VOC's AP or COCO's."""
    if name.startswith("voc"):
        return evaluation.PascalVOCDetectionEvaluator(name)
    return evaluation.COCOEvaluator(name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def perfect(item):
    """What a perfect detector finds in a picture: its labels, inside of it, without crowds. -> Instances"""
    boxes = [box for box in item["annotations"] if not box.get("iscrowd")]
    size = (item["height"], item["width"])
    truth = detection_utils.annotations_to_instances(boxes, size, mask_format="bitmask")
    found = Instances(size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes,
                      scores=torch.ones(len(boxes)))
    found.pred_boxes.clip(size)
    if truth.has("gt_masks"):
        found.pred_masks = truth.gt_masks.tensor
    return found


def find_all(name, evaluator):
    """Gives the truth of a set to its evaluator. -> the known reasons why its AP may be under 100"""
    lost, crowded, seen = [], [], set()
    for item in DatasetCatalog.get(name):
        found = perfect(item)
        evaluator.process([item], [{"instances": found}])
        whole = found.pred_boxes.nonempty()
        if found.has("pred_masks"):
            whole &= found.pred_masks.flatten(1).any(dim=1)
        lost += [item["file_name"]] * int((~whole).sum())
        seen.update(found.pred_classes.tolist())
        if found.pred_classes.bincount(minlength=1).max() > 100:
            crowded.append(item["file_name"])
    reasons = []
    if lost:
        reasons.append(f"{len(lost)} boxes have no area or mask in their picture (first: {lost[0]})")
    if crowded and not name.startswith("voc"):
        reasons.append(f"{len(crowded)} pictures have more than 100 boxes of a class, COCO's AP counts 100 "
                       f"(first: {crowded[0]})")
    absent = len(MetadataCatalog.get(name).thing_classes) - len(seen)
    if absent and name.startswith("voc"):
        reasons.append(f"{absent} classes have no box (--classes)")
    return reasons


def rehearse(cfg, source):
    """Evaluates the validation set's truth as if it were detections, and draws a picture. All ranks call it.

    -> on rank 0 a line for each AP under 100, the ceiling of the set. A truth that finds nothing is refused.
    """
    evaluator = build_evaluator(cfg, cfg.DATASETS.TEST[0])
    evaluator.reset()
    if not comm.is_main_process():
        evaluator.evaluate()
        return []
    notes = []
    with reading(source), contextlib.redirect_stdout(io.StringIO()):
        reasons = find_all(cfg.DATASETS.TEST[0], evaluator) or ["the evaluator does not say why"]
        draw(cfg, 1, perfect, f"{cfg.OUTPUT_DIR}/truth.png")
        for kind, values in evaluator.evaluate().items():
            if not values["AP"] > 99.95:
                notes.append(f"the truth of {source} itself reaches {kind} AP {values['AP']:.1f}, the "
                             f"ceiling of this set: {'; '.join(reasons)}")
            if not values["AP"] > 0:
                raise ValueError(f"the truth itself reaches {kind} AP {values['AP']}: {'; '.join(reasons)}")
    return notes


# ---- 3  Draw ---------------------------------------------------------------------------------------------

@torch.no_grad()
def draw(cfg, count, detect, path):
    """`count` pictures, each twice: the truth; what `detect` finds with score 0.5, or its best three."""
    classes = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
    items = [item for item in DatasetCatalog.get(cfg.DATASETS.TEST[0]) if item["annotations"]]
    cells = []
    for item in items[::max(1, len(items) // count)][:count]:
        image = torch.from_numpy(read_image(item["file_name"], "RGB").copy()).permute(2, 0, 1)
        scale = min(480 / item["width"], 360 / item["height"])
        image = resize(image, [max(1, int(scale * side)) for side in image.shape[1:]])
        found = detect(item)
        sure = found.scores >= 0.5
        for shown in (perfect(item), found[sure] if sure.any() else found[:3]):
            shown, cell = shown[shown.pred_boxes.nonempty()], image
            if len(shown) and shown.has("pred_masks"):
                masks = resize(shown.pred_masks.float(), image.shape[1:]) > 0.5
                cell = draw_segmentation_masks(cell, masks, alpha=0.4, colors="lime")
            if len(shown):
                names = [f"{classes[i]} {score:.2f}" for i, score in zip(shown.pred_classes, shown.scores)]
                cell = draw_bounding_boxes(cell, shown.pred_boxes.tensor * scale, names, "lime", width=2)
            cells.append(pad(cell, [0, 0, 480 - cell.shape[2], 360 - cell.shape[1]], fill=255) / 255)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_image(cells, path, nrow=4, padding=4)
