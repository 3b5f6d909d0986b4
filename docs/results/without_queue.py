"""The FPN's steps with the age of keys taken out: python without_queue.py PHOTOS/train OUT.jsonl [STEPS, by twenties]

InfoNCE against the other keys of the batch, all encoded just now by the query encoder itself; images, boxes, shuffle and
optimizer as in `pretrain.py --arch fpn --resnet resnet18 --image-size 96 --batch-size 64 --bn-group 32 --lr .012
--precision bf16 --seed 0`, the rate constant.
"""
import json
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from insloc import FPNEncoder, batches, generator_for  # noqa: E402
from pretrain import augment, boxes_of, find_images, get_args, make_data  # noqa: E402

data, out, steps = sys.argv[1], sys.argv[2], int((sys.argv[3:] or [100])[0])
args = get_args(["--arch", "fpn", "--resnet", "resnet18", "--image-size", "96", "--batch-size", "64", "--bn-group", "32",
                 "--precision", "bf16", "--device", "cpu", "--out", "none", data])
paths = find_images(args)
views, make_group = make_data(args, paths)
groups = batches(len(paths), args.batch_size, args.bn_group, args.epochs, args.seed)
torch.manual_seed(args.seed)
encoder = FPNEncoder(args.resnet).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(encoder.parameters(), lr=.012, momentum=.9, weight_decay=1e-4)


def encode(view):
    images, boxes = augment(view, args), boxes_of(view, args, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        return encoder(images, boxes)


open(out, "w").close()
losses, hits = [], []
for step in range(1, steps + 1):
    batch = [make_group([views[key] for key in next(groups)]) for _ in range(2)]
    permutation = torch.randperm(args.batch_size, generator=generator_for(args.seed, "shuffle", step - 1))
    key = {name: torch.cat([group["key"][name] for group in batch])[permutation] for name in batch[0]["key"]}
    with torch.no_grad():
        k = torch.cat([encode({name: values[rows] for name, values in key.items()})
                       for rows in (slice(0, 32), slice(32, 64))])[permutation.argsort()]
    optimizer.zero_grad()
    for first, group in zip((0, 32), batch):
        logits = torch.einsum("nld,bld->nbl", encode(group["query"]), k)                      # (32, 64, 4)
        own = torch.arange(first, first + 32)
        loss = F.cross_entropy(logits / args.temperature, own[:, None].expand(-1, 4), reduction="none").mean(dim=0)
        (loss.sum() / 2).backward()
        losses.append(loss.detach())
        hits.append((logits.argmax(dim=1) == own[:, None]).float().mean(dim=0))
    optimizer.step()
    if step % 20 == 0:
        line = {"step": step, "loss": torch.stack(losses).mean(dim=0).tolist(),     # P2, P3, P4, P5; chance 4.16
                "acc_batch": torch.stack(hits).mean(dim=0).tolist()}                # chance .0156
        print(line, flush=True)
        with open(out, "a") as f:
            f.write(json.dumps(line) + "\n")
        losses, hits = [], []
