"""COCO's instances as one class: python one_class.py INSTANCES.json OUT.json [FRACTION of the picture]

Boxes of less than FRACTION become crowds, which detectron2 does not train on and COCO's evaluation ignores.
"""
import json
import sys

source, out, fraction = sys.argv[1], sys.argv[2], float((sys.argv + [0])[3])
with open(source) as f:
    data = json.load(f)
area = {image["id"]: image["height"] * image["width"] for image in data["images"]}
data["categories"] = [{"id": 1, "name": "object"}]
for annotation in data["annotations"]:
    annotation["category_id"] = 1
    if annotation["bbox"][2] * annotation["bbox"][3] < fraction * area[annotation["image_id"]]:
        annotation["iscrowd"] = 1
with open(out, "w") as f:
    json.dump(data, f)
