"""detsets.py: what label files say and how it is taken, what is counted and said, the rehearsal, pictures."""
import json
import os
import re
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import toy
from PIL import Image

import detsets
import finetune_det as ft
import stage
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.data.detection_utils import annotations_to_instances, transform_instance_annotations
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from weights import INPUTS, Weights

FPN = ["random", "--protocol", "coco-fpn-1x", "--device", "cpu"]
RANDOM = Weights({}, {}, "resnet50", "random init", *INPUTS["imagenet"], ())


def read_json(path):
    with open(path) as f:
        return json.load(f)


def write_json(path, content):
    with open(path, "w") as f:
        json.dump(content, f)


def empty_catalogs():
    """A process registers its sets once; these tests do it again and again."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in ("coco_train", "coco_val", "voc2007_trainval", "voc2012_trainval", "voc2007_test"):
            if name in catalog.list():
                catalog.remove(name)


def own_arguments(world, out):
    """The toy world's COCO part as a set of one's own, its json files in `out`."""
    arguments = []
    for name in ("train", "val"):
        arguments += [f"--{name}-images", world / "coco" / f"{name}2017"]
        arguments += [f"--{name}-json", out / f"{name}.json"]
    return arguments


def own_set(world, out, edit=lambda content: None, split="val", protocol="coco-fpn-1x"):
    """Arguments for such a set, one of its json files edited."""
    for name in ("train", "val"):
        content = read_json(world / "coco" / "annotations" / f"instances_{name}2017.json")
        if split in (name, "both"):
            edit(content)
        write_json(out / f"{name}.json", content)
    command = ["random", "--protocol", protocol, "--device", "cpu", "--out", out / "out"]
    return ft.get_args([str(x) for x in [*command, *own_arguments(world, out)]])


def loaded(args):
    empty_catalogs()
    os.makedirs(args.out, exist_ok=True)
    return detsets.load_data(args)


def rehearsed(args):
    """What finetune_det.py does before it trains: the sets, the configuration, the rehearsal's notes."""
    data = loaded(args)
    cfg, _ = ft.build_config(args.protocol, RANDOM, data, 1, "cpu")
    cfg.OUTPUT_DIR = args.out
    return data, cfg, detsets.rehearse(cfg, data.source)


def refused(args):
    with pytest.raises(stage.Refusal) as error:
        rehearsed(args)
    line = str(error.value)
    assert "\n" not in line and len(line) < 500
    return line


def boxes_of(name):
    """All boxes of a registered set as detectron2 trains on them, rows of x y w h."""
    return np.array([box["bbox"] for item in DatasetCatalog.get(name) for box in item["annotations"]])


def voc_args(data, out, classes=toy.CLASSES):
    return ft.get_args(["random", "--protocol", "voc-c4", "--data", str(data), "--device", "cpu",
                        "--classes", ",".join(classes), "--out", str(out)])


def test_the_toy_world_in_both_layouts_is_whole(world, tmp_path):
    data, cfg, notes = rehearsed(own_set(world, tmp_path))
    assert notes == [] and data.masks and not data.run_length
    assert [labels for *_, labels in data.sets] == [f"{tmp_path}/{x}.json" for x in ("train", "val")]
    assert data.notes == []                                     # and nothing was copied
    assert cfg.DATASETS.TRAIN == ("coco_train",) and cfg.DATASETS.TEST == ("coco_val",)
    voc, cfg, notes = rehearsed(voc_args(world, tmp_path))
    assert notes == [] and not voc.masks and voc.classes == data.classes
    assert voc.images == data.images == 20
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5 and not cfg.MODEL.MASK_ON
    assert cfg.DATASETS.TRAIN == ("voc2007_trainval", "voc2012_trainval")
    assert os.path.getsize(tmp_path / "truth.png") > 5000


def test_coco_layout_and_own_json_are_the_same_set(world, tmp_path):
    data = loaded(ft.get_args(["random", *FPN[1:], "--data", str(world), "--out", str(tmp_path)]))
    own = loaded(own_set(world, tmp_path))
    assert data.digests == own.digests and data.images == own.images == 20


def test_truth_is_what_a_detector_returns(world, tmp_path):
    """By the second implementation of COCO: its own masks and boxes, crowds left out."""
    def crowd(content):
        content["annotations"][0]["iscrowd"] = 1
    data, _, notes = rehearsed(own_set(world, tmp_path, crowd))
    coco = COCO(data.sets[-1][2])
    found = 0
    for item in DatasetCatalog.get("coco_val"):
        boxes = coco.loadAnns(coco.getAnnIds(item["image_id"], iscrowd=False))
        truth = detsets.perfect(item)
        assert len(truth) == len(boxes)
        for i, box in enumerate(boxes):
            x, y, w, h = box["bbox"]
            assert torch.allclose(truth.pred_boxes.tensor[i], torch.tensor([x, y, x + w, y + h]))
            assert np.array_equal(truth.pred_masks[i].numpy(), coco.annToMask(box).astype(bool))
        found += len(boxes)
    assert notes == [] and found == len(coco.anns) - 1


def every(key, value=None):
    """An edit that sets a key of every box, or takes it away."""
    def edit(content):
        for box in content["annotations"]:
            box.pop(key, None)
            if value is not None:
                box[key] = value
    return edit


def one(part, index, key, value=None):
    """The same with one box, image or category."""
    def edit(content):
        content[part][index].pop(key)
        if value is not None:
            content[part][index][key] = value
    return edit


def keypoints_on_some(content):
    content["annotations"][1].update(keypoints=[1, 2, 2], num_keypoints=1)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("edit", [every("area"), every("iscrowd"), every("keypoints", [3, 4, 2]), every("id"),
                                  keypoints_on_some])
def test_what_is_missing_or_not_used_is_mended(edit, split, world, tmp_path):
    data, _, notes = rehearsed(own_set(world, tmp_path, edit, split))
    assert notes == [] and data.masks
    with open(tmp_path / "out" / f"coco_{split}.json") as f:
        boxes = json.load(f)["annotations"]
    assert all({"id", "area", "iscrowd"} <= box.keys() and "keypoints" not in box for box in boxes)


def test_a_box_with_id_0_counts_as_matched(world, tmp_path, monkeypatch):
    def from_zero(content):
        for i, box in enumerate(content["annotations"]):
            box["id"] = i
    args = own_set(world, tmp_path, from_zero)
    assert rehearsed(args)[2] == []
    monkeypatch.setattr(detsets, "mend", lambda content, *_: content)       # the fault is real
    assert "itself reaches" in rehearsed(args)[2][0]


def test_class_names_that_are_numbers(world, tmp_path):
    def edit(content):
        for category in content["categories"]:
            category["name"] = category["id"]
    data, _, notes = rehearsed(own_set(world, tmp_path, edit, "both"))
    assert notes == [] and data.classes == ["1", "3", "7", "8", "20"]


# Numbers that are none, but mean one.

def strings(*keys, start=0, stop=None, step=1):
    def edit(content):
        for part in ("images", "annotations", "categories"):
            for entry in content[part][start:stop:step]:
                for key in keys:
                    if key in entry:
                        value = entry[key]
                        entry[key] = [f"{x:.4f}" for x in value] if key == "bbox" else str(value)
    return edit


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("edit", [
    strings("width", "height"), strings("id", "image_id", "category_id"), strings("id", start=1, stop=2),
    strings("bbox"), strings("bbox", stop=9, step=2), strings("area", "iscrowd"),
    every("iscrowd", False), every("iscrowd", "0"), every("ignore", 0),
    one("annotations", 3, "area"), one("annotations", 3, "iscrowd"), one("images", 1, "height"),
    one("images", 1, "width")])
def test_what_is_certain_is_taken(edit, split, world, tmp_path):
    plain = loaded(own_set(world, tmp_path))
    before = boxes_of(f"coco_{split}")
    data, _, notes = rehearsed(own_set(world, tmp_path, edit, split))
    assert notes == data.notes == [] and data.masks and data.images == plain.images
    assert np.allclose(boxes_of(f"coco_{split}"), before, atol=1e-4)


def test_null_is_taken_like_nothing(world, tmp_path):
    def edit(content):
        for entry in content["images"] + content["annotations"]:
            entry.update({key: None for key in ("width", "height", "area", "iscrowd") if key in entry})
        content["annotations"][0]["id"] = None
    data, _, notes = rehearsed(own_set(world, tmp_path, edit, "both"))
    assert notes == data.notes == [] and data.masks


def test_ids_that_are_names(world, tmp_path):
    def edit(content):
        for entry in content["images"]:
            entry["id"] = f"picture {entry['id']}"
        for entry in content["annotations"]:
            entry["image_id"] = f"picture {entry['image_id']}"
    data, _, notes = rehearsed(own_set(world, tmp_path, edit, "both"))
    assert notes == data.notes == [] and data.masks


def test_corners_are_recognised_where_they_leave_the_picture(world, tmp_path):
    def corners(content):
        for box in content["annotations"]:
            x, y, w, h = box["bbox"]
            box["bbox"] = [x, y, x + w, y + h]
    loaded(own_set(world, tmp_path))
    before = boxes_of("coco_val")
    data, _, notes = rehearsed(own_set(world, tmp_path, corners))
    assert notes == [] and data.masks and len(data.notes) == 1
    assert f"{len(before)} of {len(before)} boxes have a bbox of corners" in data.notes[0]
    assert np.allclose(boxes_of("coco_val"), before, atol=0.01)


def test_a_box_that_leaves_its_picture_is_cut(world, tmp_path):
    def wide(content):
        content["annotations"][2]["bbox"][2] += 1000
        del content["annotations"][2]["segmentation"]
    data, _, notes = rehearsed(own_set(world, tmp_path, wide))
    content = read_json(tmp_path / "out" / "coco_val.json")
    box = content["annotations"][2]
    (image,) = [image for image in content["images"] if image["id"] == box["image_id"]]
    assert notes == [] and box["bbox"][0] + box["bbox"][2] == image["width"]
    assert f"1 of {len(content['annotations'])} boxes leave their picture: cut" in data.notes[0]
    assert image["file_name"] in data.notes[0]


def test_boxes_of_other_images_are_left_out(world, tmp_path):
    data, _, notes = rehearsed(own_set(world, tmp_path, one("annotations", 4, "image_id", 77)))
    assert notes == [] and "1 of" in data.notes[0] and "(first: annotations[4])" in data.notes[0]


# Masks.

@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("value", [None, [], [[]]])
def test_boxes_without_masks_are_boxes_alone(value, split, world, tmp_path):
    data, cfg, notes = rehearsed(own_set(world, tmp_path, every("segmentation", value), split))
    assert notes == [] and not data.masks and not cfg.MODEL.MASK_ON
    assert "boxes have no mask that can be used: masks are left out" in data.notes[-1]
    for name in ("train", "val"):                               # and none of the boxes is lost
        whole = len(read_json(tmp_path / f"{name}.json")["annotations"])
        assert sum(len(item["annotations"]) for item in DatasetCatalog.get(f"coco_{name}")) == whole


def polygons_of_a_larger_picture(content):
    for box in content["annotations"]:
        box["segmentation"] = [[3 * x for x in polygon] for polygon in box["segmentation"]]


def polygons_as_shares(content):
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for box in content["annotations"]:
        width, height = sizes[box["image_id"]]
        box["segmentation"] = [(np.reshape(polygon, (-1, 2)) / (width, height)).flatten().tolist()
                               for polygon in box["segmentation"]]


def run_length(counts, turned=False):
    """An edit that gives the first box a run-length mask."""
    def edit(content):
        size = [content["images"][0]["height"], content["images"][0]["width"]]
        content["annotations"][0]["segmentation"] = {"size": size[::-1] if turned else size, "counts": counts}
    return edit


@pytest.mark.parametrize("edit, said", [
    (one("annotations", 3, "segmentation", [[]]), ""), (one("annotations", 3, "segmentation"), ""),
    (one("annotations", 3, "segmentation", [[4, 5]]), "fewer than three corners"),
    (polygons_of_a_larger_picture, "outside of the box"), (polygons_as_shares, "outside of the box"),
    (run_length([0, 10 ** 6]), "does not fill"), (run_length([5, 5]), "does not fill"),
    (run_length([]), "does not fill"), (run_length([-5, 10]), "does not fill"),
    (run_length("04"), "does not fill"), (run_length("PPPP0"), "does not fill"),
    (run_length([100], turned=True), "does not fill")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_are_left_out_aloud(edit, said, split, world, tmp_path):
    """pycocotools would never return from some of these."""
    data, cfg, notes = rehearsed(own_set(world, tmp_path, edit, split))
    assert notes == [] and not data.masks and not cfg.MODEL.MASK_ON
    assert all(f"{split}.json" in note and ".jpg" in note for note in data.notes)
    assert said in data.notes[0] and "masks are left out" in data.notes[-1]
    config, lines = ft.build_config("coco-fpn-1x", RANDOM, data)
    assert "MODEL.MASK_ON False, protocol True (the labels)" in lines


def as_run_lengths(content, compressed=True):
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for box in content["annotations"]:
        mask = mask_util.merge(mask_util.frPyObjects(box["segmentation"], *sizes[box["image_id"]]))
        counts = mask["counts"].decode()
        if not compressed:
            flat = mask_util.decode(mask).flatten(order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
            counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        box["segmentation"] = {"size": list(mask["size"]), "counts": counts}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("compressed", [True, False])
def test_run_length_masks(compressed, split, world, tmp_path):
    edit = lambda content: as_run_lengths(content, compressed)              # noqa: E731
    data, cfg, notes = rehearsed(own_set(world, tmp_path, edit, split))
    assert notes == data.notes == [] and data.masks
    assert cfg.INPUT.MASK_FORMAT == ("bitmask" if split == "train" else "polygon")


def test_run_lengths_are_read_as_pycocotools_reads_them():
    rng = np.random.default_rng(0)
    for share in (0.001, 0.5, 0.999):
        mask = np.asfortranarray(rng.random((97, 213)) < share, dtype=np.uint8)
        flat = mask.flatten(order="F")
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
        want = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        assert detsets.run_lengths(mask_util.encode(mask)["counts"].decode()) == want


def test_a_polygon_of_two_corners_is_a_rectangle(world, tmp_path):
    def rectangle(content):                                                 # labelme's
        box = content["annotations"][0]
        x, y, w, h = box["bbox"]
        box["segmentation"] = [[x + w, y + h, x, y]]
    data, _, notes = rehearsed(own_set(world, tmp_path, rectangle))
    assert notes == [] and data.masks and "taken as a rectangle" in data.notes[0]
    item = next(item for item in DatasetCatalog.get("coco_val") if item["annotations"])
    found = detsets.perfect(item)
    assert found.pred_masks[0].sum() == pytest.approx(float(found.pred_boxes.area()[0]), rel=0.1)


@pytest.mark.parametrize("form", [
    lambda polygon: list(map(str, polygon)), lambda polygon: np.reshape(polygon, (-1, 2)).tolist()])
def test_other_ways_to_write_a_polygon(form, world, tmp_path):
    def edit(content):
        for box in content["annotations"]:
            box["segmentation"] = [form(box["segmentation"][0])]
    plain = rehearsed(own_set(world, tmp_path))[0]
    data, _, notes = rehearsed(own_set(world, tmp_path, edit))
    assert notes == data.notes == [] and data.masks and data.digests[0] == plain.digests[0]


# What is refused.

@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("edit, said", [
    (one("images", 2, "id", 2), "images[2] 000000000003.jpg: another one has the same id"),
    (one("images", 2, "id", "a"), "some ids of images are numbers and some are words"),
    (one("categories", 0, "id", "a"), "some ids of categories are numbers and some are words"),
    (one("images", 2, "id", None), "images[2] 000000000003.jpg: KeyError: 'id'"),
    (one("images", 2, "id", True), "id is True, which is no number"),
    (one("annotations", 4, "image_id"), "annotations[4]: KeyError: 'image_id'"),
    (one("annotations", 2, "category_id", 77), "annotations[2]: category_id 77 is no category"),
    (one("annotations", 2, "bbox"), "annotations[2]: KeyError: 'bbox'"),
    (one("annotations", 2, "bbox", [1, 2]), "annotations[2]: bbox is [1, 2], not four numbers"),
    (one("annotations", 2, "bbox", [1, None, 3, 4]), "annotations[2]: bbox is None, which is no number"),
    (one("annotations", 2, "bbox", [1, True, 3, 4]), "annotations[2]: bbox is True, which is no number"),
    (one("annotations", 2, "bbox", "1 2 3 4"), "annotations[2]: bbox is ' ', which is no number"),
    (one("annotations", 2, "area", "much"), "annotations[2]: area is 'much', which is no number"),
    (one("annotations", 2, "iscrowd", "no"), "annotations[2]: iscrowd is 'no', which is no number"),
    (every("bbox", [0.1, 0.2, 0.3, 0.4]), "bbox is [0.1, 0.2, 0.3, 0.4], a share of the picture"),
    (one("images", 1, "width", 7), "000000000002.jpg: it is "),
    (one("images", 1, "height", "tall"), "000000000002.jpg: height is 'tall', which is no number"),
    (one("annotations", 0, "segmentation", {"size": [9, 9]}), "segmentation: KeyError: 'counts'"),
    (one("annotations", 0, "segmentation", [["a", "b", "c", "d", "e", "f"]]), "000000000001.jpg: a box"),
    (one("images", 3, "file_name", "absent.jpg"), "absent.jpg")])
def test_what_would_end_a_run_ends_it_before(edit, said, split, world, tmp_path):
    line = refused(own_set(world, tmp_path, edit, split))
    assert said in line and f"{split}.json" in line


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"images": [], "annotations": [], "categories": []}',
                                  '{"images": 3, "annotations": [], "categories": []}'])
def test_a_file_that_is_no_coco_json(text, world, tmp_path):
    args = own_set(world, tmp_path)
    with open(args.val_json, "w") as f:
        f.write(text)
    assert "val.json" in refused(args)


def test_a_class_that_training_has_not(world, tmp_path):
    args = own_set(world, tmp_path, one("categories", 0, "name", "else"))
    assert "its classes ['else'] are none of training's, ['circle', " in refused(args)


def test_classes_are_matched_by_name(world, tmp_path):
    """labelme2coco numbers them as it meets them, and leaves out those without a box."""
    plain = loaded(own_set(world, tmp_path))
    before = [[box["category_id"] for box in item["annotations"]] for item in DatasetCatalog.get("coco_val")]
    def renumbered(content):
        used = sorted({box["category_id"] for box in content["annotations"]}, reverse=True)
        for box in content["annotations"]:
            box["category_id"] = used.index(box["category_id"])
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        content["categories"] = [{"id": i, "name": names[number]} for i, number in enumerate(used)]
    data, _, notes = rehearsed(own_set(world, tmp_path, renumbered))
    after = [[box["category_id"] for box in item["annotations"]] for item in DatasetCatalog.get("coco_val")]
    assert notes == data.notes == [] and data.classes == plain.classes and after == before


def test_crowds_are_said_and_crowds_alone_are_things(world, tmp_path):
    data, _, notes = rehearsed(own_set(world, tmp_path, every("iscrowd", 1)))
    assert notes == [] and "taken as things" in data.notes[0] and data.masks
    assert not any(box["iscrowd"] for item in DatasetCatalog.get("coco_val") for box in item["annotations"])

    def some(content):
        content["annotations"][0]["iscrowd"] = 1
    data, _, notes = rehearsed(own_set(world, tmp_path, some))
    assert notes == [] and "1 of" in data.notes[0] and "nothing trains on them" in data.notes[0]


# ---- the ceiling

def flat_boxes(count):
    def edit(content):
        for box in content["annotations"][:count]:
            box["bbox"][2] = 0
            box["segmentation"] = [[box["bbox"][0], box["bbox"][1]] * 3]
    return edit


def test_boxes_without_area_lower_the_ceiling(world, tmp_path):
    data, _, notes = rehearsed(own_set(world, tmp_path, flat_boxes(2)))
    assert "2 of" in data.notes[0] and "boxes have no area" in data.notes[0] and "01.jpg" in data.notes[0]
    for note, kind in zip(notes, ("bbox", "segm"), strict=True):
        assert f"itself reaches {kind} AP" in note and "the ceiling of this set" in note
        assert "2 boxes have no area or mask in their picture" in note and "01.jpg" in note


def test_a_truth_that_finds_nothing_is_refused(world, tmp_path):
    def away(content):
        for box in content["annotations"]:
            box["bbox"][0] += 1000
            box.pop("segmentation")
    assert "itself reaches bbox AP" in refused(own_set(world, tmp_path, away))


def test_more_than_100_boxes_of_a_class_lower_the_ceiling(world, tmp_path):
    def dense(content):
        rng = np.random.default_rng(0)
        for box in content["annotations"]:
            box.pop("segmentation")
        for number in range(150):
            x, y = rng.uniform(0, 150, 2).tolist()
            content["annotations"].append({"id": 1000 + number, "image_id": 1, "category_id": 1,
                                           "bbox": [x, y, 20, 10]})
    (note,) = rehearsed(own_set(world, tmp_path, dense))[2]
    assert "1 pictures have more than 100 boxes of a class" in note and "000000000001.jpg" in note


# ---- pictures

def with_picture(world, out, picture, name="000000000002.jpg", **how):
    """The toy world's COCO part, one validation picture replaced, the json saying its size."""
    (out / "coco").mkdir()
    for part in ("train2017", "annotations"):
        os.symlink(world / "coco" / part, out / "coco" / part)
    (out / "coco" / "val2017").mkdir()
    for path in (world / "coco" / "val2017").iterdir():
        os.symlink(path, out / "coco" / "val2017" / path.name)
    os.remove(out / "coco" / "val2017" / "000000000002.jpg")
    picture.save(out / "coco" / "val2017" / name, **how)

    def edit(content):
        content["images"][1].update(file_name=name, width=picture.size[0], height=picture.size[1])
        content["annotations"] = [box for box in content["annotations"] if box["image_id"] != 2]
        content["annotations"].append({"id": 900, "image_id": 2, "category_id": 1, "bbox": [0, 0, 2, 1]})
        every("segmentation")(content)
    args = own_set(world, out, edit)
    args.val_images = str(out / "coco" / "val2017")
    return args


def test_a_picture_turned_by_exif_is_taken_as_it_is_seen(world, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    args = with_picture(world, tmp_path, Image.new("RGB", (60, 40)), exif=exif)
    assert "000000000002.jpg: it is 40 x 60, its label's width is 60" in refused(args)
    content = read_json(args.val_json)
    content["images"][1].update(width=40, height=60)
    write_json(args.val_json, content)
    data, cfg, notes = rehearsed(args)
    cfg.DATALOADER.NUM_WORKERS = 0
    assert notes == []
    assert next(iter(ft.Trainer.build_test_loader(cfg, "coco_val")))[0]["image"].shape[0] == 3


@pytest.mark.parametrize("picture, said", [
    (Image.fromarray(np.full((40, 60), 30000, dtype=np.uint16)), "a.png: pixels of kind I;16"),
    (Image.new("RGB", (20000, 2)), "a.png: 20000 x 2: resized")], ids=["16 bits", "extreme"])
def test_pictures_that_cannot_be_used(picture, said, world, tmp_path):
    assert said in refused(with_picture(world, tmp_path, picture, "a.png"))


def test_a_long_picture_is_drawn(world, tmp_path):
    _, cfg, notes = rehearsed(with_picture(world, tmp_path, Image.new("RGB", (3000, 31)), "a.png"))
    detsets.draw(cfg.DATASETS.TEST[0], [detsets.perfect], str(tmp_path / "a.png"))
    assert notes == [] and Image.open(tmp_path / "a.png").size == (4 * 484 + 4, 2 * 364 + 4)


def test_a_cut_jpeg_is_named_in_training_and_evaluation(world, tmp_path):
    args = with_picture(world, tmp_path, Image.effect_noise((90, 80), 60).convert("RGB"))
    path = os.path.join(args.val_images, "000000000002.jpg")
    os.truncate(path, os.path.getsize(path) // 2)
    args.train_images, args.train_json = args.val_images, args.val_json
    data = loaded(args)                             # its header is whole
    opts = ["DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"]
    cfg, _ = ft.build_config(args.protocol, RANDOM, data, 1, "cpu", opts)
    for loader in (ft.Trainer.build_train_loader(cfg), ft.Trainer.build_test_loader(cfg, "coco_val")):
        with pytest.raises(stage.Refusal) as error:
            for _ in zip(range(20), loader):
                pass
        assert str(error.value).startswith(f"{path}: image file is truncated")


# ---- VOC trees

def voc_tree(world, out, list_edit=None, xml_edit=None, name="500001"):
    """The toy world's VOC part; its test list or one of its xml files edited."""
    for year in ("VOC2007", "VOC2012"):
        shutil.copytree(world / year, out / year)
    if list_edit:
        path = out / "VOC2007" / "ImageSets" / "Main" / "test.txt"
        path.write_text(list_edit(path.read_text()))
    if xml_edit:
        path = out / ("VOC2007" if name < "9" else "VOC2012") / "Annotations" / f"{name}.xml"
        path.write_text(xml_edit(path.read_text()))
    return voc_args(out, out / "out")


@pytest.mark.parametrize("list_edit, said", [
    (lambda text: text + "my picture\n", "/my picture.jpg: "), (lambda text: text + "a#1\n", "/a#1.jpg: "),
    (lambda text: "", "it has no box"), (lambda text: text + "absent\n", "/absent.jpg: ")])
def test_voc_lists_that_name_what_is_not_there(list_edit, said, world, tmp_path):
    line = refused(voc_tree(world, tmp_path, list_edit))
    assert said in line and "VOC2007" in line


@pytest.mark.parametrize("list_edit", [lambda text: text + "\n\n", lambda text: text.replace("\n", "\r\n"),
                                       lambda text: text.split()[1]])
def test_voc_lists_of_other_forms(list_edit, world, tmp_path):
    data, _, notes = rehearsed(voc_tree(world, tmp_path, list_edit))
    assert data.notes == [] and all("classes have no box" in note for note in notes)


def test_a_picture_without_an_xml_file_is_one_without_a_box(world, tmp_path):
    args = voc_tree(world, tmp_path)
    os.remove(tmp_path / "VOC2007" / "Annotations" / "500001.xml")
    data, _, notes = rehearsed(args)
    assert notes == [] and len(data.notes) == 1
    assert "1 of 8 pictures have no xml file" in data.notes[0] and "500001.xml" in data.notes[0]
    assert DatasetCatalog.get("voc2007_test")[1]["annotations"] == []


def test_names_with_spaces_and_other_endings(world, tmp_path):
    args = voc_tree(world, tmp_path, lambda text: text.replace("500001", "my picture"))
    root = tmp_path / "VOC2007"
    Image.open(root / "JPEGImages" / "500001.jpg").save(root / "JPEGImages" / "my picture.png")
    text = (root / "Annotations" / "500001.xml").read_text()
    (root / "Annotations" / "my picture.xml").write_text(text.replace("500001.jpg", "my picture.png"))
    data, _, notes = rehearsed(args)
    assert data.notes == notes == []


@pytest.mark.parametrize("pattern, new, said", [
    ("(?s).*", "", "no element found"), ("<name>", "<name>un", "none of --classes"),
    ("xmin>", "left>", "xmin is None, which is no number"),
    ("<xmin>.*?</xmin>", "<xmin>far</xmin>", "xmin is 'far', which is no number"),
    ("<difficult>.*?</difficult>", "<difficult>?</difficult>", "difficult is '?', which is no number")])
@pytest.mark.parametrize("name", ["500001", "000001", "900001"])
def test_xml_files_are_named(name, pattern, new, said, world, tmp_path):
    args = voc_tree(world, tmp_path, None, lambda text: re.sub(pattern, new, text), name)
    line = refused(args)
    assert f"{name}.xml: " in line and said in line


@pytest.mark.parametrize("pattern, new", [
    ("<pose>.*?</pose>", ""), ("<truncated>.*?</truncated>", ""), ("<difficult>.*?</difficult>", ""),
    ("<size>.*?</size>", ""), ("<xmin>(.*?)</xmin>", r"<xmin>\1.0</xmin>"), ("(?s)<object>.*</object>", "")])
def test_xml_files_of_other_forms(pattern, new, world, tmp_path):
    loaded(voc_args(world, tmp_path / "plain"))
    before = boxes_of("voc2007_trainval")
    args = voc_tree(world, tmp_path, None, lambda text: re.sub(pattern, new, text), "000001")
    data, _, notes = rehearsed(args)
    assert notes == data.notes == []
    if "object" not in pattern:
        assert np.array_equal(boxes_of("voc2007_trainval"), before)
    args = voc_tree(world, tmp_path / "test", None, lambda text: re.sub(pattern, new, text))
    data, _, notes = rehearsed(args)
    assert notes == data.notes == []


def test_voc_corners_from_0_and_floats_are_cut_rounded_counted_and_said(world, tmp_path):
    def edit(text):
        text = re.sub("<xmin>.*?</xmin>", "<xmin>0</xmin>", text, count=1)
        text = re.sub("<ymax>.*?</ymax>", "<ymax>5000</ymax>", text, count=1)
        return re.sub("<xmax>(.*?)</xmax>", r"<xmax>\1.4</xmax>", text, count=1)
    data, _, notes = rehearsed(voc_tree(world, tmp_path, None, edit))
    assert notes == []
    cut, rounded = sorted(data.notes, key=lambda note: "rounded" in note)
    assert "boxes leave their picture: cut" in cut and "500001.jpg" in cut and "1 of" in cut
    assert "corners that are no whole numbers" in rounded and "500001.jpg" in rounded and "1 of" in rounded
    item = DatasetCatalog.get("voc2007_test")[1]
    x, y, w, h = item["annotations"][0]["bbox"]
    assert x == 0 and y + h == item["height"] and w == int(w)


@pytest.fixture
def oracle(world, tmp_path):
    """oracle(edit) -> arguments of a tree whose xml files are all edited, and a dict of its splits as
    detectron2's own register_pascal_voc names them."""
    names = {}

    def make(edit):
        args = voc_tree(world, tmp_path)
        for path in sorted(tmp_path.glob("VOC20*/Annotations/*.xml")):
            path.write_text(edit(path.read_text(), int(path.stem)))
        for split, year in (("trainval", 2007), ("trainval", 2012), ("test", 2007)):
            names[f"voc{year}_{split}"] = name = f"oracle_{year}_{split}"
            register_pascal_voc(name, str(tmp_path / f"VOC{year}"), split, year, toy.CLASSES)
        return args, names

    yield make
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def floats_and_difficult(text, number):
    """Corners as some of VOC2012 are, every second picture's objects difficult."""
    if number > 900000:
        text = re.sub("<xmin>(.*?)</xmin>", r"<xmin>\1.700000762939453</xmin>", text)
        text = re.sub("<ymax>(.*?)</ymax>", r"<ymax>\g<1>.0</ymax>", text)
    return text.replace("<difficult>0", f"<difficult>{number % 2}")


def test_training_on_voc_is_detectron2s_own(oracle):
    """The same pictures in the same order, the same classes, and the same boxes bit for bit."""
    args, names = oracle(floats_and_difficult)
    data = loaded(args)
    assert data.notes == []
    fractions = 0
    for name in ("voc2007_trainval", "voc2012_trainval"):
        assert MetadataCatalog.get(name).thing_classes == MetadataCatalog.get(names[name]).thing_classes
        for mine, theirs in zip(DatasetCatalog.get(name), DatasetCatalog.get(names[name]), strict=True):
            size = (mine["height"], mine["width"])
            assert (mine["file_name"], *size) == (theirs["file_name"], theirs["height"], theirs["width"])
            ours = annotations_to_instances([transform_instance_annotations(box, [], size)
                                             for box in mine["annotations"]], size)
            want = annotations_to_instances([transform_instance_annotations(box, [], size)
                                             for box in theirs["annotations"]], size)
            assert torch.equal(ours.gt_boxes.tensor, want.gt_boxes.tensor)
            assert torch.equal(ours.gt_classes, want.gt_classes)
            fractions += int((want.gt_boxes.tensor % 1 != 0).sum())
    assert fractions > 5


@pytest.mark.parametrize("difficult", [True, False])
def test_evaluation_on_voc_is_detectron2s_own(difficult, oracle):
    """Loose, doubled and wrong detections, through detectron2's evaluator of the tree as it stands."""
    args, names = oracle(floats_and_difficult if difficult else lambda text, number: text)
    loaded(args)
    rng = np.random.default_rng(0)
    name = "voc2007_test"
    ours, theirs = (PascalVOCDetectionEvaluator(x) for x in (name, names[name]))
    ours.reset()
    theirs.reset()
    for mine, other in zip(DatasetCatalog.get(name), DatasetCatalog.get(names[name]), strict=True):
        truth = detsets.perfect(mine)
        boxes = truth.pred_boxes.tensor.repeat(3, 1)
        classes = truth.pred_classes.repeat(3)
        found = Instances((mine["height"], mine["width"]),
                          pred_boxes=Boxes(boxes + torch.tensor(rng.normal(0, 2, boxes.shape)).float()),
                          pred_classes=torch.where(torch.tensor(rng.random(len(classes)) < 0.2), 0, classes),
                          scores=torch.tensor(rng.random(len(classes))))
        ours.process([mine], [{"instances": found}])
        theirs.process([other], [{"instances": found}])
    result = ours.evaluate()["bbox"]
    assert result == theirs.evaluate()["bbox"] and 1 < result["AP75"] < 99


def test_what_the_evaluator_reads_is_the_tree(world, tmp_path):
    """`difficult` too, which VOC's AP leaves out."""
    args = voc_tree(world, tmp_path, None, lambda text: text.replace("<difficult>0", "<difficult>1"))
    loaded(args)
    names = (tmp_path / "VOC2007" / "ImageSets" / "Main" / "test.txt").read_text().split()
    for number, name in enumerate(names, start=1):
        ours = parse_rec(f"{args.out}/voc2007_test/Annotations/{number}.xml")
        assert ours == parse_rec(str(tmp_path / "VOC2007" / "Annotations" / f"{name}.xml"))


def test_a_class_with_a_slash_and_an_ampersand(world, tmp_path):
    args = voc_tree(world, tmp_path)
    for path in tmp_path.glob("VOC20*/Annotations/*.xml"):
        path.write_text(path.read_text().replace("<name>cross<", "<name>a/b &amp; c<"))
    args.classes = ["a/b & c" if name == "cross" else name for name in toy.CLASSES]
    data, _, notes = rehearsed(args)
    assert notes == data.notes == [] and "a_b & c" in data.classes


def test_twenty_classes_for_five(world, tmp_path):
    args = voc_args(world, tmp_path, [*toy.CLASSES, "unicorn"])
    (note,) = rehearsed(args)[2]
    assert "itself reaches bbox AP 83.3" in note and "1 classes have no box (--classes)" in note


def test_voc2012_may_be_absent_from_a_tree_of_ones_own(world, tmp_path):
    os.symlink(world / "VOC2007", tmp_path / "VOC2007")
    data, _, notes = rehearsed(voc_args(tmp_path, tmp_path))
    assert [name for name, *_ in data.sets] == ["voc2007_trainval", "voc2007_test"] and notes == []


# ---- Mini-COCO

def test_minicoco_is_a_tenth_by_a_fixed_seed(world, tmp_path):
    with open(world / "coco" / "annotations" / "instances_train2017.json") as f:
        ids = sorted(image["id"] for image in json.load(f)["images"])
    data, _, notes = rehearsed(own_set(world, tmp_path, protocol="minicoco-c4"))
    first = np.random.Generator(np.random.PCG64(0)).permutation(ids)[:2].tolist()
    assert data.minicoco == sorted(first) and data.images == 2 and notes == []
    assert [item["image_id"] for item in DatasetCatalog.get("coco_train")] == data.minicoco
    big = np.random.Generator(np.random.PCG64(0)).permutation(np.arange(118287))[:118287 // 10]
    assert len(big) == 11828 == ft.PROTOCOLS["minicoco-c4"].images


