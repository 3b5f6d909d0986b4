"""Weights: any system's checkpoint -> torchvision's names -> detectron2's names (nothing of the method).

One rule reads them all: the one place in the file whose layers a torchvision ResNet loads with strict=True. A
place is what stands before torchvision's names: "state_dict.module.encoder_q." for example.
"""
import os
import pickle
import re
import zipfile
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torchvision.transforms.v2.functional import center_crop, resize

import stage
from insloc import C4Encoder, FPNEncoder, read_image

RESNETS = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "narrow18")
INPUTS = {              # what no file says: mean and std of pixels, order of channels, stride in the 1x1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB", False),
    "zero-one": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "RGB", False),
    "caffe": ((103.53 / 255, 116.28 / 255, 123.675 / 255), (1 / 255, 1 / 255, 1 / 255), "BGR", True)}
AVERAGE = re.compile(r"(^|[._])(k|key|ema|target|momentum|teacher|loss)[._]")       # loss: MoCo's in VISSL
# Parts of names: others' -> detectron2's; detectron2's -> torchvision's, and ours for neck and box head.
OTHERS = [(".convolution.", "."), (".normalization.", ".norm."), (".conv.", "."), (".bn.", ".norm."),
          ("backbone.bottom_up.", "backbone."), ("backbone.fpn_", "fpn_"), ("stem.conv1.", "conv1."),
          ("roi_heads.res5.", "backbone.res5."), ("roi_heads.box_head.", "box_head."),
          ("roi_head.shared_head.", "backbone."), ("roi_head.bbox_head.shared_fcs.0.", "box_head.fc1."),
          ("backbone.0.", "backbone.conv1."), ("backbone.1.", "backbone.bn1."),
          ("embedder.embedder.", "conv1."), ("res.conv1.", "conv1."), ("branch1.", "shortcut.")]
DETECTRON2 = [("shortcut.norm.", "downsample.1."), ("shortcut.", "downsample.0.")]
for i in range(4):
    OTHERS += [(f"neck.lateral_convs.{i}.", f"fpn_lateral{i + 2}."),                    # the released InsLoc
               (f"neck.fpn_convs.{i}.", f"fpn_output{i + 2}."),
               (f"roi_head.bbox_head.shared_convs.{i}.", f"box_head.conv{i + 1}."),
               (f"encoder.stages.{i}.layers.", f"res{i + 2}."), (f".layer.{i}.", f".conv{i + 1}."),
               (f"backbone.{i + 4}.", f"backbone.res{i + 2}."), (f"branch2{'abcd'[i]}.", f"conv{i + 1}.")]
    DETECTRON2 += [(f"res{i + 2}.", f"layer{i + 1}."), (f"conv{i + 1}.norm.", f"bn{i + 1}."),
                   (f"fpn_lateral{i + 2}.norm.", f"fpn.inner_blocks.{i}.1."),
                   (f"fpn_lateral{i + 2}.", f"fpn.inner_blocks.{i}.0."),
                   (f"fpn_output{i + 2}.norm.", f"fpn.layer_blocks.{i}.1."),
                   (f"fpn_output{i + 2}.", f"fpn.layer_blocks.{i}.0.")]


class Weights(NamedTuple):
    backbone: dict          # {torchvision's name: tensor}: the whole trunk, without fc
    extras: dict            # {our name, fpn.* or box_head.*: tensor}: neck and box head in whole, or nothing
    resnet: str             # "resnet50"
    source: str             # "resnet50 at 'state_dict.module.encoder_q.'", and where a moving average stands
    pixel_mean: tuple       # the net's input is (image in [0, 1] - mean) / std, channels in the order below
    pixel_std: tuple
    channel_order: str      # "RGB" or "BGR"
    stride_in_1x1: bool     # of a bottleneck, as Caffe's nets; torchvision's stride in the 3x3
    dropped: tuple          # the file's own names of the tensors that are neither trunk nor extras


def random_weights(resnet="resnet50", input="imagenet"):
    """Weights without a tensor: what they are loaded into keeps its random init."""
    return Weights({}, {}, resnet, "random init", *INPUTS[input], ())


class Pixels(torch.nn.Module):
    """uint8 RGB images (N, 3, H, W) -> the input that these weights know, float32.

    torchvision's Normalize would copy mean and std to the GPU in every call, and wait for it.
    """
    def __init__(self, weights):
        super().__init__()
        self.register_buffer("mean", torch.tensor(weights.pixel_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(weights.pixel_std)[:, None, None])
        self.is_bgr = weights.channel_order == "BGR"

    def forward(self, images):
        images = images.float() / 255
        return ((images.flip(1) if self.is_bgr else images) - self.mean) / self.std


def load_trunk(resnet, weights):
    """The trunk into torchvision's ResNet, with the strides that the weights were trained with."""
    resnet.load_state_dict(weights.backbone or resnet.state_dict())
    for block in resnet.modules():
        if weights.stride_in_1x1 and hasattr(block, "conv3"):           # a bottleneck
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


class Ignored:
    """Stands for options and NumPy's numbers. NumPy's own classes would let a file follow any pointer."""
    def __init__(self, *arguments):
        pass
    __setstate__ = __init__


def add_weights_arguments(parser):
    """--input, --prefix, --trust: how to read WEIGHTS."""
    add = parser.add_argument
    add("--input", choices=INPUTS, default="imagenet", help="the pixels WEIGHTS know [ours: most files']")
    add("--prefix", help="the place in WEIGHTS to take [ours: the only one with a whole trunk]")
    add("--trust", action="store_true", help="let WEIGHTS run code, as a pickle does [ours: off]")


def read_file(path, trust=False):
    """What torch.save, safetensors or a pickle wrote, on the CPU. Only with trust can the file run code.

    ValueError if it cannot be read, in one line that says what to do.
    """
    if re.search(r"\.npy$|ckpt-\d+(\.(index|meta|data.*))?$", path):
        raise ValueError("from JAX or TensorFlow: convert it to PyTorch first")
    if not os.path.isfile(path):                                        # a pipe or a device might never end
        raise ValueError("there is no such file; in a folder, checkpoint.pth is looked for")
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    is_pickle = path.endswith(".pkl") and not is_zip
    if is_pickle and not trust:
        raise ValueError("it is a pickle, which may run code: --trust reads it")
    ignored = "argparse.Namespace numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray.scalar"
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        if is_pickle:
            with open(path, "rb") as file:
                return pickle.load(file, encoding="latin1")
        if is_zip and zipfile.ZipFile(path).testzip():                  # torch.load compares no check sums
            raise ValueError("a check sum is wrong")
        with torch.serialization.safe_globals([(Ignored, name) for name in ignored.split()]):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except ImportError as error:
        raise ValueError(f"install {error.name}, which it asks for (JAX's files must be converted)") from None
    except Exception as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise ValueError(f"it asks for {asked[1]}, which may run code: --trust reads it") from None
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(f"damaged, or no file of tensors: {reason}") from None


def tensors_in(content, place=""):
    """Pairs of a name, the keys of dicts in dicts joined by dots, and a tensor, float32 or int64."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from tensors_in(value, f"{place}{key}.")
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            tensor = torch.as_tensor(value).detach()
            yield f"{place}{key}", tensor.float() if tensor.is_floating_point() else tensor.long()


def read_weights(path, trust=False, prefix=None, input="imagenet"):
    """Weights of a run directory of ours or any system's checkpoint, which with trust may run code.

    prefix: the place to take, a moving average's too. input: a key of INPUTS. ValueError, in one line, if no
    place is whole (it names the nearest and its faults), or two that differ are.
    """
    if os.path.isdir(path):
        runs = [os.path.join(path, f"{name}.pth") for name in ("checkpoint", "checkpoint_prev", "backbone")]
        path = next(filter(os.path.exists, runs), path)
    content = read_file(path, trust)
    content = content if isinstance(content, dict) else {}
    file = dict(tensors_in(content))
    caffe2 = any(name.endswith("res2_0_branch2a_w") for name in file)
    maker = f"{os.path.basename(path)} {content.get('__author__')}"
    if input != "caffe" and (caffe2 or re.search("detectron2 model zoo|caffe|msra", maker, re.IGNORECASE)):
        raise ValueError("trained on BGR pixels, as Caffe's nets: --input caffe says so")
    tensors, theirs = {}, {}
    for name, tensor in file.items():
        ours = name
        if caffe2 and not name.endswith("_momentum"):                   # res2_0_branch2a_bn_s
            ours = re.sub(r"\.[ws]$", ".weight", name.replace("_", "."))
            ours = re.sub(r"\.b$", ".bias", ours)                       # res2.0.branch2a.bn.weight
        for old, new in OTHERS + DETECTRON2:
            ours = re.sub(r"\b" + re.escape(old), new, ours) if old in ours else ours
        tensors[ours] = tensor
        theirs[ours] = name
        if name.endswith("_bn_s"):          # Caffe2's norms are scale and shift alone; BatchNorm's adds 1e-5
            tensors[ours.replace("weight", "running_mean")] = torch.zeros_like(tensor)
            tensors[ours.replace("weight", "running_var")] = torch.full_like(tensor, 1 - 1e-5)

    matches = [re.match(r"(.*?)layer\d\.\d+\.conv\d\.weight$", name) for name in tensors]
    places = {match[1] for match in matches if match}
    averages = sorted(place for place in places if prefix is None and AVERAGE.search(place))
    hint = f"; a moving average is at {averages[0]!r}, --prefix takes it" if averages else ""
    whole, faults = [], []
    chosen = places.difference(averages) if prefix is None else [prefix and prefix.rstrip(".") + "."]
    for place in sorted(chosen):
        here = {name[len(place):]: x for name, x in tensors.items() if name.startswith(place)}
        layers = {name: x for name, x in here.items() if re.match(r"(conv\d|bn\d|layer\d\.\d+)\.", name)}
        for resnet in RESNETS:
            with torch.device("meta"):                                  # shapes alone, until it loads
                encoder = FPNEncoder(resnet)
            try:
                encoder.resnet.load_state_dict(layers, assign=True)     # counters that are missing become 0
                whole.append((place, resnet, encoder))
                break
            except RuntimeError as error:
                faults.append(f"{resnet} at {place!r}: {' '.join(str(error).split())}")
    if not whole:
        nearest = min(faults, key=lambda text: text.count('"') + 2 * text.count("size mismatch"),
                      default=f"none, it has {', '.join(list(file)[:3]) or 'no tensors'}")[:300]
        raise ValueError(f"no whole ResNet with torchvision's stem and blocks{hint}; nearest: {nearest}")
    place, resnet, encoder = whole[0]
    backbone = encoder.resnet.state_dict()
    for other, _, twin in whole[1:]:
        if not all(map(torch.equal, backbone.values(), twin.resnet.state_dict().values())):
            raise ValueError(f"two ResNets, at {place!r} and {other!r}: --prefix PREFIX chooses one")

    parent = re.sub(r"\b(resnet|backbone)\.$", "", place)
    shapes = {name: x.shape for name, x in encoder.state_dict().items() if re.match("fpn|box_head", name)}
    extras = {name: tensors[parent + name] for name in shapes if parent + name in tensors}
    if {name: x.shape for name, x in extras.items()} != shapes:         # in whole, or nothing
        extras = {}
    for name, x in {**backbone, **extras}.items():
        if not x.sum().isfinite():                                      # faster than one by one
            raise ValueError(f"{name} has values that are not finite")
    used = {place + name for name in backbone} | {parent + name for name in extras}
    dropped = tuple(name for ours, name in theirs.items() if ours not in used)
    return Weights(backbone, extras, resnet, f"{resnet} at {place!r}{hint}", *INPUTS[input], dropped)


def to_detectron2(weights, arch):
    """{detectron2's name: tensor} for its R50-C4 ("c4") or R50-FPN ("fpn"), to be loaded by exact names."""
    renamed = {}
    for name, tensor in {**weights.backbone, **(weights.extras if arch == "fpn" else {})}.items():
        for theirs, ours in DETECTRON2:
            name = name.replace(ours, theirs)
        place = "backbone." if arch == "c4" or name.startswith("fpn_") else "backbone.bottom_up."
        if name.startswith("box_head." if arch == "fpn" else "res5."):          # C4's head is the last stage
            place = "roi_heads."
        renamed[place + re.sub(r"^conv1\.", "stem.conv1.", name)] = tensor
    return renamed


# ---- Frozen networks and the images they see: what the probes share --------------------------------------

def frozen_nets(args, arch, device):
    """A probe's networks {"random": net, "given": net} and {name: what it was read from}.

    The random net has the ResNet of WEIGHTS, and stands alone if they are `random`. What a file lacks of an
    encoder is random, too. The networks are in eval mode and ask for no gradient; `.pixels` makes their input
    of uint8 images. Refusal if WEIGHTS cannot be read.
    """
    found = {"random": random_weights(args.resnet)}
    if args.weights != "random":
        try:
            given = read_weights(args.weights, args.trust, args.prefix, args.input)
        except (OSError, ValueError) as error:
            raise stage.Refusal(f"{args.weights}: {error}") from None
        found = {"random": random_weights(given.resnet), "given": given}
    nets, sources = torch.nn.ModuleDict(), {}
    for name, weights in found.items():
        torch.manual_seed(args.seed)
        if arch == "fpn":
            encoder = FPNEncoder(weights.resnet)
            source = f"{weights.source}, {len(weights.extras)} tensors of its neck and box head"
        else:
            encoder = C4Encoder(weights.resnet, roi_size=min(14, args.image_size // 16))    # as pretrain.py
            source = weights.source
        load_trunk(encoder.resnet, weights)
        encoder.load_state_dict(weights.extras, strict=False)           # those of an FPN mean nothing to C4
        encoder.pixels = Pixels(weights)
        nets[name] = encoder
        sources[name] = source
    return nets.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), sources


def read_photo(path):
    """An image file as uint8 (3, H, W). Refusal if it cannot be read: a score of the others would mislead."""
    try:
        return read_image(path)
    except Exception as error:                                          # decoders fail in many ways
        raise stage.Refusal(f"{path} cannot be read: {stage.last_line(error)}") from None


def centre_view(image, size):
    """The centre crop (3, size, size) of an image (3, H, W) whose short side is 8/7 of it. [MoCo v2]"""
    longest = 4 * min(image.shape[1:])          # a long strip, resized as a whole, would take gigabytes
    image = center_crop(image, [min(side, longest) for side in image.shape[1:]])
    return center_crop(resize(image, [size * 8 // 7]), [size, size])    # 224 out of 256
