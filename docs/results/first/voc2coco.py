"""A VOC tree's split of the five animal classes as COCO JSON: python voc2coco.py VOC2007 SPLIT OUT.json"""
import json
import sys
import xml.etree.ElementTree as ElementTree

root, split, out = sys.argv[1:]
names = ["cat", "cow", "dog", "horse", "sheep"]
images, annotations = [], []
with open(f"{root}/ImageSets/Main/{split}.txt") as f:
    stems = f.read().split()
for number, stem in enumerate(stems):
    tree = ElementTree.parse(f"{root}/Annotations/{stem}.xml")
    w, h = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    images.append({"id": number, "file_name": f"{stem}.jpg", "width": w, "height": h})
    for item in tree.findall("object"):
        x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]        # VOC counts from 1, the last pixel included
        annotations.append({"id": len(annotations) + 1, "image_id": number, "bbox": box, "area": box[2] * box[3],
                            "category_id": names.index(item.findtext("name")) + 1, "iscrowd": 0, "segmentation": []})
with open(out, "w") as f:
    json.dump({"images": images, "annotations": annotations,
               "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)]}, f)
