"""Do swap's figures come from BatchNorm's statistics? Estimates them again on composites of training images.

    python docs/results/second/reestimate.py RUN PHOTOS OUT.pth                    # of a trained net
    python docs/results/second/reestimate.py narrow18 PHOTOS OUT.pth [SEED]        # of a random one, or resnet18
    python probe_loc.py OUT.pth PHOTOS --image-size 96 --protocol swap --seed SEED
"""
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))
import probe_loc  # noqa: E402
from weights import RESNETS, random_weights, read_weights  # noqa: E402

run, photos, out, *seed = sys.argv[1:]
args = probe_loc.get_args([run, photos, "--image-size", "96", "--device", "cpu", "--nprocs", "1", "--seed",
                           *(seed or ["0"]), "--out", os.devnull])
found = random_weights(run) if run in RESNETS else read_weights(run)
net = probe_loc.make_net(found, args).train()
for module in net.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.reset_running_stats()
        module.momentum = None                      # the plain average over batches
paths, _, _ = probe_loc.find_data(args)
order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(1))[:len(paths) // 32 * 32][:1024]
views = probe_loc.ProtocolImages([paths[i] for i in order], "swap", args)
with torch.no_grad():
    for first in range(0, len(order), 32):
        images, boxes = (torch.cat(parts) for parts in zip(*[views[i] for i in range(first, first + 32)]))
        net.features(net.pixels(images), boxes)
torch.save(net.resnet.state_dict(), out)
