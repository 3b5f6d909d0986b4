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
    if type(value) is int:                                          # no bool
        return value
    with contextlib.suppress(ValueError):
        if isinstance(value, (float, str)) and math.isfinite(float(value)):
            return int(float(value)) if float(value).is_integer() else float(value)
    raise ValueError(f"{key} is {value!r}, which is no number")


def numbers(values, key):
    """A list of numbers. ValueError names the key."""
    return [number(value, key) for value in values]


def identity(value, key):
    """An id: a number, or a string that is none. ValueError names the key."""
    return value if isinstance(value, str) and not value.isdecimal() else number(value, key)


def by_id(content, part):
    """{id: entry} of the images or categories of a json. ValueError if detectron2 could not sort the ids."""
    found = {}
    for i, entry in enumerate(content[part]):
        with reading(f"{part}[{i}] {entry.get('file_name') or entry.get('name')}"):
            key = identity(entry["id"], "id")
            if key in found:
                raise ValueError("another one has the same id: renumber")
            found[key] = {**entry, "id": key}
    if len(set(map(type, found))) > 1:
        raise ValueError(f"some ids of {part} are numbers and some are words: renumber")
    return found


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


def mend_annotation(entry, categories):
    """An annotation with numbers where numbers belong; area 0 if it has none. ValueError names the key."""
    crowd = entry.get("iscrowd") or entry.get("ignore") or 0
    mended = {**entry,
              "image_id": identity(entry["image_id"], "image_id"),
              "category_id": identity(entry["category_id"], "category_id"),
              "bbox": numbers(entry["bbox"] or (), "bbox"),
              "area": number(entry.get("area") or 0, "area"),
              "iscrowd": 1 if crowd is True else number(crowd, "iscrowd")}
    for key in ("keypoints", "ignore"):                             # not used; detectron2 stumbles on them
        mended.pop(key, None)
    if mended["category_id"] not in categories:
        raise ValueError(f"category_id {mended['category_id']} is no category of this file")
    if len(mended["bbox"]) != 4:
        raise ValueError(f"bbox is {mended['bbox']}, not four numbers")
    return mended


def mend_boxes(entries, images, said):
    """Cuts boxes at the border of their pictures and gives them areas, in place; says what is odd of them.

    ValueError if all boxes are shares of their picture.
    """
    names, sizes, boxes = [], [], []
    for entry in entries:
        picture = images[entry["image_id"]]
        names.append(picture["file_name"])
        sizes.append((picture["width"], picture["height"]))
        boxes.append(entry["bbox"])
    names = np.array(names)
    sizes = np.array(sizes)
    boxes = np.array(boxes, dtype=float)
    if boxes.max() <= 1:
        raise ValueError(f"annotations: bbox is {entries[0]['bbox']}, a share of the picture, as all in this "
                         "file; COCO's is x, y, width, height in pixels")
    low, high = np.hsplit(boxes, 2)
    fit_as_corners = (low >= 0) & (high > low) & (high <= sizes + 0.5)      # half a pixel is rounding
    corners = fit_as_corners.all() and (low + high > 1.05 * sizes).any()    # as x y w h some are far outside
    if not corners:
        high = low + high
    leaves = ((low < -0.5) | (high > sizes + 0.5)).any(axis=1)
    low, high = np.clip(low, 0, sizes), np.clip(high, 0, sizes)
    mended = np.hstack([low, high - low]).tolist()
    for entry, box, has_left in zip(entries, mended, leaves):
        if corners or has_left:
            entry["bbox"] = box
        entry["area"] = entry["area"] or entry["bbox"][2] * entry["bbox"][3]
    empty = (high <= low).any(axis=1)
    said["boxes have no area in their picture: nothing trains on them or finds them"] += names[empty].tolist()
    said["boxes leave their picture: cut at its border"] += names[leaves].tolist()
    if corners:
        fault = "boxes have a bbox of corners x1 y1 x2 y2, or some would leave their picture: taken so"
        said[fault] += names.tolist()


def mend_crowds(entries, images, said):
    """Takes crowds alone as things, in place; says where boxes are crowds."""
    crowds = [entry for entry in entries if entry["iscrowd"]]
    fault = "boxes are crowds (iscrowd 1): nothing trains on them or counts them"
    if len(crowds) == len(entries):                 # CVAT and datumaro write it beside every run-length mask
        fault = "boxes are crowds (iscrowd 1) like all of this file: taken as things"
    for entry in crowds:
        entry["iscrowd"] = int(len(crowds) < len(entries))
        said[fault].append(images[entry["image_id"]]["file_name"])


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


def mend_run_length(mask, image):
    """A run-length mask, or None if it does not fill its picture; what is said of it, or None."""
    size, counts = numbers(mask["size"], "size"), mask["counts"]
    if isinstance(counts, list):
        counts = lengths = numbers(counts, "counts")
    else:
        lengths = run_lengths(counts)
    if size != [image["height"], image["width"]] or sum(lengths) != math.prod(size) or min(lengths) < 0:
        # pycocotools would never return, or decode memory that nobody wrote.
        return None, "boxes have a run-length mask that does not fill height x width of its picture"
    return {"size": size, "counts": counts}, None


def mend_polygons(mask, box):
    """The polygons of a box x y w h, each x1 y1 x2 y2 ..., or None; what is said of them, or None."""
    polygons, fault = [], None
    for polygon in mask or ():
        points = np.ravel(np.asarray(polygon, dtype=float)).tolist()        # of strings, or of pairs, too
        if len(points) == 4:
            x1, y1, x2, y2 = points
            points = [x1, y1, x2, y1, x2, y2, x1, y2]
            fault = "boxes have a polygon of two corners: taken as a rectangle"
        if len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            fault = "boxes have a polygon that is none, of fewer than three corners: left out"
        else:
            polygons.append(polygon if polygon == points else points)       # those of COCO fill 2 GB once
    if not polygons:
        return None, fault
    points = np.concatenate(polygons).reshape(-1, 2)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2 - box[:2]
    if (middle < -2).any() or (middle > np.add(box[2:], 2)).any():
        return None, "boxes have polygons that lie outside of the box"
    return polygons, fault


def mend_masks(entries, images, said):
    """Mends the masks of annotations in place. -> whether each box has one"""
    without = []
    for entry in entries:
        image, mask = images[entry["image_id"]], entry.get("segmentation")
        with reading(f"{image['file_name']}: a box {entry['bbox']}, segmentation"):
            if isinstance(mask, dict):
                mask, fault = mend_run_length(mask, image)
            else:
                mask, fault = mend_polygons(mask, entry["bbox"])
        entry["segmentation"] = mask
        if fault:
            said[fault].append(image["file_name"])
        if mask is None:
            without.append(image["file_name"])
    said["boxes have no mask that can be used: masks are left out, boxes alone are trained"] += without
    return not without


def mend(content, folder, masks, tenth, said):
    """COCO's json in a form that detectron2 and pycocotools read.

    masks: whether they are used. tenth: of the images, Mini-COCO. said: {what some boxes have: their places}.
    """
    categories, images = by_id(content, "categories"), by_id(content, "images")
    for category in categories.values():
        category["name"] = str(category["name"])
    listed = set(images)
    if tenth:                                       # the paper's list is not public
        order = np.random.Generator(np.random.PCG64(0)).permutation(sorted(images)).tolist()
        for key in order[max(1, len(order) // 10):]:
            del images[key]
    for key, image in images.items():
        with reading(os.path.join(folder, image["file_name"])):
            images[key] = mend_image(image, folder)
    entries = []
    for i, entry in enumerate(content["annotations"]):
        with reading(f"annotations[{i}]"):
            entry = mend_annotation(entry, categories)
        if entry["image_id"] in images:
            entries.append(entry)
        elif entry["image_id"] not in listed:
            said["boxes have an image_id that this file does not list: left out"].append(f"annotations[{i}]")
    if not entries:
        raise ValueError(f"it has no box in its images, {len(content['annotations'])} elsewhere")
    mend_boxes(entries, images, said)
    mend_crowds(entries, images, said)
    if not masks or not mend_masks(entries, images, said):
        for entry in entries:
            entry.pop("segmentation", None)
    ids = {entry.get("id") for entry in entries}
    if len(ids) < len(entries) or not all(type(key) is int and key > 0 for key in ids):
        for i, entry in enumerate(entries, start=1):
            entry["id"] = i                         # COCO's evaluation takes 0 for unmatched
    return {**content, "images": list(images.values()), "annotations": entries,
            "categories": list(categories.values())}


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
            picture = f"{name}.jpg"
            if not Path(folder, "JPEGImages", picture).exists():    # a PNG, for example
                picture = tree.findtext("filename") or picture
            images.append({"id": len(images) + 1, "file_name": picture,
                           "width": tree.findtext("size/width"), "height": tree.findtext("size/height")})
            for thing in tree.findall("object"):
                label = (thing.findtext("name") or "").strip()
                if label not in classes:
                    raise ValueError(f"name is {label!r}, none of --classes {','.join(classes)}")
                x1, y1, x2, y2 = [number(thing.findtext(f"bndbox/{key}"), key)
                                  for key in ("xmin", "ymin", "xmax", "ymax")]
                entries.append({"id": len(entries) + 1, "image_id": len(images), "iscrowd": 0,
                                "category_id": classes.index(label) + 1,
                                "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],     # both ends included
                                "difficult": number(thing.findtext("difficult") or 0, "difficult")})
    categories = [{"id": i, "name": name.replace("/", "_")} for i, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": entries, "categories": categories}


def write_voc(content, folder, said):
    """COCO's json as the VOC tree that detectron2's evaluator reads: a list, and an xml file a picture.

    The evaluator takes whole numbers alone, so the boxes are rounded, in `content` too.
    """
    names = {entry["id"]: escape(entry["name"]) for entry in content["categories"]}
    things = collections.defaultdict(str)
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        x1, y1, x2, y2 = round(x), round(y), round(x + w), round(y + h)
        if [x1, y1, x2, y2] != [x, y, x + w, y + h]:
            said["boxes have corners that are no whole numbers: rounded for the evaluation"].append(
                content["images"][entry["image_id"] - 1]["file_name"])
        entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        things[entry["image_id"]] += (
            f"<object><name>{names[entry['category_id']]}</name><pose>Unspecified</pose><truncated>0</truncated>"
            f"<difficult>{entry['difficult']}</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>")
    xmls, lists = Path(folder, "Annotations"), Path(folder, "ImageSets", "Main")
    xmls.mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    listed = ""
    for image in content["images"]:
        listed += f"{image['id']}\n"
        (xmls / f"{image['id']}.xml").write_text(f"<annotation>{things[image['id']]}</annotation>")
    (lists / "val.txt").write_text(listed)


def find_sets(args):
    """[(detectron2's name, folder, COCO json or VOC's split)], training first, validation last."""
    if args.train_json:
        return [("coco_train", args.train_images, args.train_json),
                ("coco_val", args.val_images, args.val_json)]
    if args.protocol == "voc-c4":
        sets = [("voc2007_trainval", f"{args.data}/VOC2007", "trainval")]
        if os.path.exists(f"{args.data}/VOC2012"):                  # one's own has none
            sets.append(("voc2012_trainval", f"{args.data}/VOC2012", "trainval"))
        return [*sets, ("voc2007_test", f"{args.data}/VOC2007", "test")]
    coco = f"{args.data}/coco"
    return [("coco_train", f"{coco}/train2017", f"{coco}/annotations/instances_train2017.json"),
            ("coco_val", f"{coco}/val2017", f"{coco}/annotations/instances_val2017.json")]


def register(name, folder, labels, classes):
    """A set under detectron2's name. Each process reads it by itself, when it needs it."""
    metadata = {"thing_classes": classes}
    if name == "voc2007_test":                                      # where write_voc wrote
        metadata.update(dirname=labels.removesuffix(".json"), split="val", year=2007)
    datasets.register_coco_instances(name, metadata, labels, folder)


def load_set(args, name, folder, labels, training, said):
    """Reads and mends a set, whose classes are those of `training`, if given.

    -> its content, the folder of its pictures, the json that detectron2 reads: the given one, where nothing
    had to change, as in COCO itself, or a copy in --out.
    """
    copy = f"{args.out}/{name}.json"
    if name.startswith("voc"):
        folder, before = f"{folder}/JPEGImages", read_voc(folder, labels, args.classes, said)
    else:
        before = json.loads(Path(labels).read_bytes())
    tenth = args.protocol == "minicoco-c4" and name == "coco_train"
    content = mend(before, folder, args.protocol != "voc-c4", tenth, said)
    match_classes(content, training or content["categories"])
    if name == "voc2007_test":
        write_voc(content, copy.removesuffix(".json"), said)
    if name.startswith("voc") or content != before:
        stage.write_atomically(copy, lambda file: file.write(json.dumps(content).encode()))
        labels = copy
    return content, folder, labels


def load_data(args):
    """Mends, counts and registers the protocol's sets. -> what all processes must know of them

    sets: [(detectron2's name, folder, json)], validation last; classes: their names; digests of their labels;
    images: how many train; minicoco: their ids, if they are a tenth; masks: whether all boxes have one;
    run_length: whether one of training is no polygon; notes: lines, said already; source: labels and folder
    of validation.
    """
    data = SimpleNamespace(sets=[], digests=[], images=0, masks=True, run_length=False, notes=[])
    categories = None
    for name, folder, labels in find_sets(args):
        data.source = f"{labels} of {folder}"
        said = collections.defaultdict(list)
        with reading(data.source):
            content, folder, labels = load_set(args, name, folder, labels, categories, said)
        images, boxes, categories = content["images"], content["annotations"], content["categories"]
        for fault, places in said.items():
            if places:
                total = len(images if fault.startswith("pictures") else boxes)
                data.notes.append(f"{data.source}: {len(places)} of {total} {fault} (first: {places[0]})")
                stage.say(data.notes[-1])
        data.classes = [entry["name"] for entry in sorted(categories, key=lambda entry: entry["id"])]
        register(name, folder, labels, data.classes)
        data.sets.append((name, folder, labels))
        data.digests.append(stage.digest(map(str.encode, map(repr, [*images, *boxes]))))
        data.masks &= "segmentation" in boxes[0]
        if name.endswith(("train", "trainval")):
            data.images += len(images)
            for box in boxes:
                data.run_length |= isinstance(box.get("segmentation"), dict) and not box["iscrowd"]
            if args.protocol == "minicoco-c4":
                data.minicoco = sorted(image["id"] for image in images)
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
    return "; ".join(reasons) or "the evaluator does not say why"


def rehearse(cfg, source):
    """Evaluates the validation set's truth as if it were detections, and draws it. All ranks call it.

    -> on rank 0 a line for each AP under 100, the ceiling of the set. A truth that finds nothing is refused.
    """
    name, notes = cfg.DATASETS.TEST[0], []
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    if not comm.is_main_process():
        evaluator.evaluate()
        return notes
    with reading(source), contextlib.redirect_stdout(io.StringIO()):
        reasons = find_all(name, evaluator)
        for kind, values in evaluator.evaluate().items():
            reached = f"the truth itself reaches {kind} AP {values['AP']:.1f}"
            if not values["AP"] > 0:
                raise ValueError(f"{reached}: {reasons}")
            if values["AP"] < 99.95:
                notes.append(f"{source}: {reached}, the ceiling of this set: {reasons}")
    stage.attempt("truth.png", draw, name, [perfect], f"{cfg.OUTPUT_DIR}/truth.png")
    return notes


# ---- 3  Draw ---------------------------------------------------------------------------------------------

def draw_cell(item, found, classes):
    """A picture with what was found, in 480 x 360 pixels. -> (3, 360, 480) in [0, 1]"""
    cell = torch.from_numpy(read_image(item["file_name"], "RGB").copy()).permute(2, 0, 1)
    scale = min(480 / item["width"], 360 / item["height"])
    cell = resize(cell, [max(1, int(scale * side)) for side in cell.shape[1:]])
    found = found[found.pred_boxes.nonempty()]
    if len(found) and found.has("pred_masks"):
        masks = resize(found.pred_masks.float(), cell.shape[1:]) > 0.5
        cell = draw_segmentation_masks(cell, masks, alpha=0.4, colors="lime")
    if len(found):
        names = [f"{classes[i]} {score:.2f}" for i, score in zip(found.pred_classes, found.scores)]
        cell = draw_bounding_boxes(cell, found.pred_boxes.tensor * scale, names, "lime", width=2)
    return pad(cell, [0, 0, 480 - cell.shape[2], 360 - cell.shape[1]], fill=255) / 255


@torch.no_grad()
def draw(name, detectors, path, count=8):
    """`count` pictures of a set, each with what each detector finds with score 0.5, or its best three."""
    classes = MetadataCatalog.get(name).thing_classes
    items = [item for item in DatasetCatalog.get(name) if item["annotations"]]
    cells = []
    for item in items[::max(1, len(items) // count)][:count]:
        for detect in detectors:
            found = detect(item)
            sure = found.scores >= 0.5
            cells.append(draw_cell(item, found[sure] if sure.any() else found[:3], classes))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_image(cells, path, nrow=4, padding=4)
