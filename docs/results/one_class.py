"""COCO's instances with all classes as one: python one_class.py INSTANCES.json OUT.json"""
import json
import sys

source, out = sys.argv[1:]
with open(source) as f:
    data = json.load(f)
data["categories"] = [{"id": 1, "name": "object"}]
for annotation in data["annotations"]:
    annotation["category_id"] = 1
with open(out, "w") as f:
    json.dump(data, f)
