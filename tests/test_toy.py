"""The generated data set: the same bytes every time, and annotations that are what was drawn."""
import hashlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import toy
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import ImageFolder

COUNTS = {"train": 40, "val": 15, "det_train": 12, "det_val": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "world"
    toy.write_world(str(out), **COUNTS)
    return out


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_writes_the_same_bytes_and_counts_change_no_picture(world, tmp_path):
    toy.write_world(str(tmp_path / "fewer"), **{**COUNTS, "train": 20})
    fewer = digests(tmp_path / "fewer")
    whole = digests(world)
    assert fewer.items() < whole.items() and len(whole) - len(fewer) == 20 + 40
    toy.write_world(str(tmp_path / "other"), seed=1, train=20, val=0, det_train=0, det_val=0)
    assert not set(digests(tmp_path / "other").values()) & set(whole.values())


def test_class_folders_are_what_imagefolder_reads(world):
    train, val = (ImageFolder(world / "images" / split) for split in ("train", "val"))
    assert train.classes == list(toy.CLASSES) and (len(train), len(val)) == (40, 15)
    assert len({train[i][0].size for i in range(40)}) > 20                      # sizes vary


def test_a_swatch_has_the_hue_of_its_folder(world):
    data = ImageFolder(world / "swatches" / "train")
    assert data.classes == sorted(toy.HUES) and len(data) == 80
    for image, label in data:
        hue, saturation, _ = np.asarray(image.convert("HSV")).reshape(-1, 3).T.astype(float) / 255
        dyed = hue[saturation > 0.7]
        away = (dyed - toy.HUES[data.classes[label]] + 0.5) % 1 - 0.5
        assert len(dyed) < 100 or abs(np.median(away)) < 0.06


def test_coco_polygons_areas_and_boxes_agree_with_each_other(world):
    coco = COCO(world / "coco/annotations/instances_train2017.json")
    assert len(coco.imgs) == 12 and coco.getCatIds() == list(toy.COCO_IDS)
    assert any(not coco.getAnnIds(imgIds=i) for i in coco.imgs)                 # a picture without objects
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows = np.nonzero(mask.any(1))[0]
        columns = np.nonzero(mask.any(0))[0]
        x, y, w, h = annotation["bbox"]
        drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        np.testing.assert_allclose((x, y, x + w, y + h), drawn, atol=2)     # corners thinner than a pixel
        assert abs(mask.sum() - annotation["area"]) < 0.1 * annotation["area"] + 10


def test_what_is_annotated_is_drawn(world):
    """A shape has a texture of its own: the picture without the shape differs there, and only there."""
    image, objects = toy.draw((0, 2, 0), (180, 320), (0.08, 0.25), (1, 6))
    saved = np.asarray(Image.open(world / "coco/train2017/000000000001.jpg"), dtype=int)
    assert np.abs(saved - image).mean() < 6                                     # JPEG's own error
    with open(world / "coco/annotations/instances_train2017.json") as f:
        annotations = [a for a in json.load(f)["annotations"] if a["image_id"] == 1]
    assert [toy.COCO_IDS[label] for label, _ in objects] == [a["category_id"] for a in annotations]
    for (_, corners), annotation in zip(objects, annotations):
        np.testing.assert_allclose(corners.flatten(), annotation["segmentation"][0], atol=0.006)


def test_voc_boxes_are_the_coco_boxes(world):
    """The same pictures: VOC counts whole pixels from 1, both ends included."""
    coco = COCO(world / "coco/annotations/instances_val2017.json")
    names = (world / "VOC2007/ImageSets/Main/test.txt").read_text().split()
    assert len(names) == 6
    for number, name in enumerate(names, start=1):
        tree = ElementTree.parse(world / f"VOC2007/Annotations/{name}.xml")
        image = Image.open(world / f"VOC2007/JPEGImages/{name}.jpg")
        assert (int(tree.find("size/width").text), int(tree.find("size/height").text)) == image.size
        theirs = []
        for box in tree.iter("bndbox"):
            theirs.append([int(box.find(side).text) for side in ("xmin", "ymin", "xmax", "ymax")])
        ours = []
        for annotation in coco.imgToAnns[number]:
            x, y, w, h = annotation["bbox"]
            ours.append([np.floor(x) + 1, np.floor(y) + 1, np.ceil(x + w), np.ceil(y + h)])
        assert theirs == ours
    for year in (2007, 2012):
        assert len((world / f"VOC{year}/ImageSets/Main/trainval.txt").read_text().split()) == 6


def test_no_colour_tells_the_class(world):
    """Nearest class mean of the mean colour, leave one out: near chance, one in five."""
    data = ImageFolder(world / "images" / "train")
    colours = np.stack([np.asarray(image).mean((0, 1)) for image, _ in data])
    labels = np.array(data.targets)
    hits = 0
    for i in range(len(labels)):
        rest = np.arange(len(labels)) != i
        means = [colours[rest & (labels == c)].mean(0) for c in range(5)]
        hits += np.argmin([np.linalg.norm(colours[i] - mean) for mean in means]) == labels[i]
    assert hits / len(labels) < 0.45                                            # chance .2, sd .063


@pytest.mark.parametrize("arguments, word", [
    (["{there}"], "not an empty folder"), (["{file}"], "not an empty folder"),
    (["{file}/deeper"], "Not a directory"),
    (["{new}", "--train", "-1"], "negative"), (["{new}", "--train", "many"], "invalid int")])
def test_refusals_are_one_line(tmp_path, arguments, word):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").touch()
    (tmp_path / "file").touch()
    places = {name: tmp_path / name for name in ("there", "file", "new")}
    command = [sys.executable, toy.__file__] + [argument.format(**places) for argument in arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and word in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
    assert not os.path.exists(tmp_path / "new")
