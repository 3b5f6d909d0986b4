"""Do swap's figures come from BatchNorm's statistics? Estimates them again on composites of training images.

    python docs/results/second/reestimate.py RUN PHOTOS OUT.pth            # of a trained net
    python docs/results/second/reestimate.py narrow18 PHOTOS OUT.pth [SEED [SIZE]]     # of a random one
    python probe_box.py OUT.pth PHOTOS --image-size 96 --protocol swap --seed SEED
"""
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))
import probe_box  # noqa: E402
from weights import RESNETS, frozen_nets  # noqa: E402

run, photos, out = sys.argv[1:4]
seed = sys.argv[4] if len(sys.argv) > 4 else "0"
size = sys.argv[5] if len(sys.argv) > 5 else "96"
net_is = ["random", photos, "--resnet", run] if run in RESNETS else [run, photos]
args = probe_box.get_args([*net_is, "--image-size", size, "--device", "cpu", "--nprocs", "1", "--seed", seed,
                           "--out", os.devnull])
nets, _ = frozen_nets(args, "c4", "cpu")
net = nets["random" if run in RESNETS else "given"]
train = probe_box.with_folders(probe_box.stage.find_splits(args)[0], f"{photos}/train/")
order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:len(train) // 32 * 32][:1024]
entries = probe_box.composites([train[i] for i in order], args.image_size, args.seed, "swap")
composites = probe_box.Boxes(entries, args.image_size, args.seed, "loose")


def batches():
    """Thirty-two images on their two backgrounds, with the pasted boxes."""
    for first in range(0, len(composites), 64):
        pictures, boxes = zip(*[composites[item] for item in range(first, first + 64)])
        yield torch.stack(pictures), torch.stack(boxes)[:, :1]


probe_box.estimate_batchnorm(net, batches())
torch.save(net.resnet.state_dict(), out)
