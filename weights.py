"""Weights: any system's checkpoint -> torchvision's names -> detectron2's names (nothing of the method).

One rule reads them all: the one place in the file whose layers a torchvision ResNet loads with strict=True. A
place is what stands before torchvision's names: "state_dict.module.encoder_q." for example.
"""
import argparse
import os
import pickle
import re
import zipfile
from typing import NamedTuple

import numpy as np
import safetensors
import torch

from insloc import FPNEncoder, make_resnet

RESNETS = ("resnet50", "resnet18", "narrow18", "resnet34", "resnet101", "resnet152")
INPUTS = {              # mean and std of pixels, order of channels, stride in the 1x1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB", False),
    "zero-one": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "RGB", False),
    "caffe": ((103.53 / 255, 116.28 / 255, 123.675 / 255), (1 / 255, 1 / 255, 1 / 255), "BGR", True)}
SAYS = [                # what a file may say of its net, the inputs that fit, and how it is written
    ("Caffe by its name", {"caffe"},
     r"^(file|.*__author__): .*(caffe|msra|detectron2 model zoo)|res2_0_branch2a_w"),
    ("that it is a detector of detectron2's, by default of BGR", {"caffe"},
     r"\A(?s:(?!.*(pixel_mean|\bformat\W{1,5}(bgr|rgb)|res5\.norm\.)).*)proposal_generator\."),
    ("BGR", {"caffe"}, r"to_rgb\W{1,5}false|\bformat\W{1,5}bgr"),
    ("RGB", {"imagenet", "zero-one"}, r"to_rgb\W{1,5}true|\bformat\W{1,5}rgb"),
    ("stride in the 1x1", {"caffe"}, r"\bstyle\W{1,5}caffe|(stride_(in_)?1x1|in_bottleneck)\W{1,5}true"),
    ("stride in the 3x3", {"imagenet", "zero-one"}, r"\bstyle\W{1,5}pytorch|stride_(in_)?1x1\W{1,5}false"),
    ("dilated layers", set(), r"\bdilations?\W{1,5}[\d, ]*[2-9]|\baux_classifier\.|\boutput_stride\W+(8|16)"),
    ("layers against aliasing", set(), r"\bresnet(aa|blur)\d"),
    ("norms of another eps", set(), r"(norm_cfg\W+dict\([^)]*\beps|bn_eps)\W{1,4}(?!1e-0?5\b)\d")]
TRIPLE = re.compile(r"\b(?:(?:pixel|image|img|rgb|new)_)?(mean|std)s?\b\W{1,12}?NUM[\s,-]+NUM[\s,-]+NUM"
                    r"(?![\d.]|[\s,-]*\d)".replace("NUM", r"(\d+\.?\d*(?:e-?\d+)?)"))
BESIDE = ("config.json", "preprocessor_config.json", "config.yaml")     # timm's, Hugging Face's, detectron2's
FOREIGN = {             # what is no file of PyTorch's and what to do: how it begins, or how its name ends
    "empty: fetch it again": rb"\A\|",
    "a web page: fetch the file itself": rb"\A\s*<(!doctype|html)",
    "a pointer of Git LFS: `git lfs pull` fetches the file itself": rb"\Aversion https://git-lfs",
    "compressed: unpack it first": rb"\A(\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf)",
    "JSON, perhaps an index of shards: give one file of all tensors": rb"\A\s*\{",
    "HDF5, as Keras writes it: convert it to PyTorch first": rb"\A\x89HDF",
    "an ONNX graph: convert it to PyTorch first": rb"\A\x08[\x01-\x20]\x12|\.onnx\Z",
    "an array or archive of NumPy's: convert it to PyTorch first": rb"\A\x93NUMPY|\.npz\Z"}
NEEDS_TRUST = {         # what only a reader that runs code takes, and how the error of the other one says so
    "asks for ": r"GLOBAL (\S+)",
    "is a pickle": "a pickle that()",
    "has pickle protocol 4 or 5": "Unsupported operand()",
    "is a TorchScript archive": "TorchScript()",
    "is a tar file, as torch 0.1 wrote": r"\.tar format()"}
AVERAGE = re.compile(r"(^|[._])(k|key|ema|target|momentum|teacher|loss)[._]")       # loss: MoCo's in VISSL
WRAPPER = re.compile(r"\b_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)\.")
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


def random_weights(resnet="resnet50", input=None):
    """Returns Weights that hold no tensor: what they are loaded into keeps its random init."""
    return Weights({}, {}, resnet, "random init", *INPUTS[input or "imagenet"], ())


class Pixels(torch.nn.Module):
    """Turns uint8 RGB images (N, 3, H, W) into the input that these weights know, float32.

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
    """Loads the trunk into torchvision's ResNet, with the strides that the weights were trained with."""
    resnet.load_state_dict(weights.backbone or resnet.state_dict())
    for block in resnet.modules():
        if weights.stride_in_1x1 and hasattr(block, "conv3"):           # a bottleneck
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


class Ignored:
    """Stands for options and NumPy's objects. NumPy's own classes would let a file follow any pointer."""
    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):                         # a Namespace's options
            vars(self).update(state)


class NotWhole(ValueError):
    """Says what a place in a file lacks of a trunk."""


def add_weights_arguments(parser):
    """Adds --input, --prefix and --trust, which say how to read WEIGHTS."""
    add = parser.add_argument
    add("--input", choices=INPUTS, help="the pixels WEIGHTS know [ours: imagenet, if they say no other]")
    add("--prefix", help="the place in WEIGHTS to take [ours: the only one with a whole trunk]")
    add("--trust", action="store_true", help="let WEIGHTS run code, as a pickle does [ours: off]")


# ---- What a file holds -----------------------------------------------------------------------------------

def load(path, head, trust):
    """Returns what torch.save, safetensors or a pickle wrote on the CPU; `head` is how the file begins."""
    is_zip = head.startswith(b"PK")
    is_torchs = is_zip or head[257:262] == b"ustar" or b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." in head[:30]
    if head[8:9] == b"{" and not is_torchs:
        with safetensors.safe_open(path, "pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}
            return {"__metadata__": file.metadata(), **content}
    if is_zip and zipfile.ZipFile(path).testzip():                      # torch.load compares no check sums
        raise ValueError("a check sum is wrong")
    with open(path, "rb") as file:
        if is_torchs:
            names = "argparse.Namespace numpy.dtype numpy.ndarray"
            for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
                names += f" {module}.scalar {module}._reconstruct"
            with torch.serialization.safe_globals([(Ignored, name) for name in names.split()]):
                return torch.load(file, map_location="cpu", weights_only=not trust)
        if not head.startswith(b"\x80") and not path.endswith(".pkl"):
            raise ValueError(f"it begins with {head[:8]}")
        if not trust:
            raise pickle.UnpicklingError("a pickle that torch.save did not write")
        return pickle.load(file, encoding="latin1")


def read_file(path, trust=False):
    """Returns what torch.save, safetensors or a pickle wrote, on the CPU. Only with trust can it run code.

    ValueError if it cannot be read, in one line that says what to do.
    """
    if re.search(r"\.(npy|msgpack)$|ckpt-\d+(\.(index|meta|data.*))?$", path):
        raise ValueError("it is from JAX or TensorFlow: convert it to PyTorch first")
    if not os.path.isfile(path):                                        # a pipe or a device might never end
        raise ValueError("there is no such file; in a folder, checkpoint.pth is looked for")
    with open(path, "rb") as file:
        head = file.read(300)
    for what, pattern in FOREIGN.items():
        if re.search(pattern, head + b"|" + os.fsencode(path), re.IGNORECASE):
            raise ValueError(f"it is {what}")
    try:
        return load(path, head, trust)
    except ImportError as error:
        raise ValueError(f"install {error.name}, which it asks for (JAX's files must be converted)") from None
    except AttributeError as error:
        raise ValueError(f"save a state_dict() with the program that wrote it: {error}") from None
    except Exception as error:                                          # torch.load raises whatever it meets
        for what, pattern in NEEDS_TRUST.items():
            met = re.search(pattern, str(error))
            if met:
                raise ValueError(f"it {what}{met[1]}, which may run code: --trust reads it") from None
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(f"damaged, or no file of tensors: {reason}") from None


def leaves(content):
    """Yields pairs of a name, the keys of dicts in dicts joined by dots, and what stands there."""
    stack, seen = [("", content)], set()
    while stack:
        name, value = stack.pop()
        inside = vars(value) if type(value) in (Ignored, argparse.Namespace) else value
        if isinstance(value, torch.nn.Module):
            inside = value.state_dict()
        if not isinstance(inside, dict):
            yield name, value
        elif id(value) not in seen:                                     # a dict may hold itself
            seen.add(id(value))
            for key, part in reversed(inside.items()):
                stack.append((f"{name}.{key}" if name else str(key), part))


def is_dense(tensor):
    """Tells a tensor whose numbers can be read from quantised, sparse, nested, meta and distributed ones."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return is_plain and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def numbers_of(name, tensor):
    """Returns a layer's tensor or array on the CPU: float32, or int64 if it is BatchNorm's counter."""
    is_counter = name.endswith("num_batches_tracked")
    if isinstance(tensor, np.ndarray) and tensor.dtype.kind in "iuf":   # of either byte order
        tensor = torch.from_numpy(tensor.astype(np.float32 if tensor.dtype.kind == "f" else np.int64))
    if not is_dense(tensor) or not (is_counter or tensor.is_floating_point()):
        raise NotWhole(f"{name} is quantised, sparse, without values, or not of floating-point numbers")
    return tensor.detach().to("cpu", torch.int64 if is_counter else torch.float32)


# ---- What it says of its net -----------------------------------------------------------------------------

def words_of(path, content):
    """Returns what a file, and the configurations beside it, say in words, as lines of 'name: value'."""
    lines = [f"file: {os.path.basename(path)}"]
    for name, value in content:
        if is_dense(value) and value.numel() == 3:                      # perhaps a buffer of the pixels' mean
            value = value.flatten().tolist()
        lines.append(f"{name}: {value}" if isinstance(value, (str, int, float, list, tuple)) else name)
    for name in BESIDE:
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.isfile(beside):
            with open(beside, errors="replace") as file:
                lines.append(file.read(10 ** 6))
    return "\n".join(lines).lower()


def check_input(words, given):
    """Returns a remark if the words contradict the given input, or ''. ValueError if none is given.

    A wrong input costs much AP, and nothing else shows it.
    """
    said = {what: fits for what, fits, pattern in SAYS if re.search(pattern, words, re.MULTILINE)}
    for kind, *numbers in TRIPLE.findall(words):
        values, fits = np.array(numbers, float), set()
        for name, (mean, std, _, _) in INPUTS.items():
            for value in (values, values / 255):                        # of pixels up to 1, or up to 255
                if np.allclose(value, mean if kind == "mean" else std, rtol=0.02, atol=0.001):
                    fits.add(name)
        said["{} {:g} {:g} {:g}".format(kind, *values)] = fits
    against = ", ".join(what for what, fits in said.items() if (given or "imagenet") not in fits)
    if not against:
        return ""
    if given:
        return f"; --input {given} was given, but it, or a configuration beside it, says {against}"
    fits = set(INPUTS).intersection(*said.values())
    advice = f"--input {min(fits)} takes it" if fits else "no --input is that, yet one that is given holds"
    raise ValueError(f"it, or a configuration beside it, says {against}: {advice}")


# ---- Where its trunk is ----------------------------------------------------------------------------------

def our_name(name, is_caffe2=False):
    """Returns a tensor's or place's name in torchvision's words, or ours for neck and box head."""
    name = WRAPPER.sub("", name)
    if is_caffe2 and not name.endswith("_momentum"):                    # res2_0_branch2a_bn_s
        name = re.sub(r"\.[ws]$", ".weight", name.replace("_", "."))
        name = re.sub(r"\.b$", ".bias", name)                           # res2.0.branch2a.bn.weight
    for theirs, ours in OTHERS + DETECTRON2:
        if theirs in name:
            name = re.sub(r"\b" + re.escape(theirs), ours, name)
    return name


def in_our_names(file):
    """Turns {the file's own name: tensor} into {our name: tensor} and {our name: the file's own}."""
    is_caffe2 = any(name.endswith("res2_0_branch2a_w") for name in file)
    tensors, theirs = {}, {}
    for name, tensor in file.items():
        ours = our_name(name, is_caffe2)
        if ours in tensors:                                             # the second one keeps its own name
            ours = name
        tensors[ours] = tensor
        theirs[ours] = name
        if name.endswith("_bn_s"):          # Caffe2's norms are scale and shift alone; BatchNorm's adds 1e-5
            tensors[ours.replace("weight", "running_mean")] = tensor * 0
            tensors[ours.replace("weight", "running_var")] = tensor * 0 + (1 - 1e-5)
    return tensors, theirs


def candidates(tensors, prefix):
    """Returns the places to look at and a remark on moving averages, which are taken if nothing else is."""
    matches = [re.match(r"(.*?)layer\d\.\d+\.conv\d\.weight$", name) for name in tensors]
    places = sorted({match[1] for match in matches if match})
    if prefix is not None:
        place = prefix and our_name(prefix.rstrip(".") + ".")
        longer = [other for other in places if place and other.endswith(f".{place}")]
        return longer if longer and place not in places else [place], ""
    averages = [place for place in places if AVERAGE.search(place)]
    others = [place for place in places if place not in averages]
    if not averages or not others:
        return places, "; it is a moving average" if averages else ""
    return others, f"; a moving average is at {averages[0]!r}, --prefix takes it"


def trunk_at(place, tensors):
    """Returns the name of the ResNet whose layers stand at a place, and {torchvision's name: tensor} of it.

    NotWhole if no ResNet loads them with strict=True, with the faults of the nearest one.
    """
    layers, faults = {}, []
    for name, tensor in tensors.items():
        if re.match(re.escape(place) + r"(conv\d|bn\d|layer\d\.\d+)\.", name):
            layers[name[len(place):]] = numbers_of(name, tensor)
    for resnet in RESNETS:
        with torch.device("meta"):                                      # shapes alone, until it loads
            net = make_resnet(resnet)
        try:
            net.load_state_dict(layers, assign=True)                    # counters that are missing become 0
            return resnet, net.state_dict()
        except RuntimeError as error:
            faults.append(f"{resnet} at {place!r}: {' '.join(str(error).split())}")
    raise NotWhole(min(faults, key=count_faults))


def count_faults(text):
    """Returns how many layers load_state_dict's message names: in quotation marks, or as a mismatch."""
    return text.count('"') + 2 * text.count("size mismatch")


def choose_place(tensors, prefix):
    """Returns the one place that has a whole trunk, its ResNet, the trunk, and a remark on averages.

    ValueError if there is none, with the nearest and its faults, or if there are two that differ.
    """
    places, remark = candidates(tensors, prefix)
    found, faults = [], []
    for place in places:
        try:
            found.append((place, *trunk_at(place, tensors)))
        except NotWhole as error:
            faults.append(str(error))
    if not found:
        names = ", ".join(list(tensors)[:3]) or "no tensors (NumPy's arrays need --trust)"
        nearest = min(faults, key=count_faults, default=f"none, it has {names}")[:300]
        raise ValueError(f"no whole ResNet with torchvision's stem and blocks{remark}; nearest: {nearest}")
    place, resnet, trunk = found[0]
    for other, _, twin in found[1:]:
        if not all(map(torch.equal, trunk.values(), twin.values())):
            raise ValueError(f"two ResNets, at {place!r} and {other!r}: --prefix PREFIX chooses one")
    return place, resnet, trunk, remark


def read_weights(path, trust=False, prefix=None, input=None):
    """Reads the weights of a run directory of ours or any system's checkpoint, which with trust may run code.

    prefix: the place to take, a moving average's too, in the file's words or ours. input: a key of INPUTS, or
    None for imagenet, unless the file says otherwise. ValueError, in one line, if it does, if no place has a
    whole trunk, if two that differ have one, or if a value is not finite.
    """
    if os.path.isdir(path):
        runs = [os.path.join(path, f"{name}.pth") for name in ("checkpoint", "checkpoint_prev", "backbone")]
        path = next(filter(os.path.exists, runs), path)
    content = list(leaves(read_file(path, trust)))
    file = {name: x for name, x in content if isinstance(x, (torch.Tensor, np.ndarray))}
    tensors, theirs = in_our_names(file)
    place, resnet, backbone, remark = choose_place(tensors, prefix)
    remark += check_input(words_of(path, content), input)

    parent = re.sub(r"\b(resnet|backbone)\.$", "", place)
    with torch.device("meta"):
        encoder = FPNEncoder(resnet).state_dict()
    parts = {name: x.shape for name, x in encoder.items() if name.startswith(("fpn.", "box_head."))}
    extras = {name: numbers_of(name, tensors[parent + name]) for name in parts if parent + name in tensors}
    if {name: x.shape for name, x in extras.items()} != parts:          # in whole, or nothing
        extras = {}
    for name, x in {**backbone, **extras}.items():
        if not x.sum().isfinite() or name.endswith("running_var") and x.min() < -1e-5:
            raise ValueError(f"{name} has values that are not finite, or variances below 0")
    used = {place + name for name in backbone} | {parent + name for name in extras}
    dropped = tuple(name for ours, name in theirs.items() if ours not in used)
    source = f"{resnet} at {place!r}{remark}"
    return Weights(backbone, extras, resnet, source, *INPUTS[input or "imagenet"], dropped)


def to_detectron2(weights, arch):
    """Returns {detectron2's name: tensor} for its R50-C4 ("c4") or R50-FPN ("fpn"), loaded by exact names."""
    renamed = {}
    for name, tensor in {**weights.backbone, **(weights.extras if arch == "fpn" else {})}.items():
        for theirs, ours in DETECTRON2:
            name = name.replace(ours, theirs)
        place = "backbone." if arch == "c4" or name.startswith("fpn_") else "backbone.bottom_up."
        if name.startswith("box_head." if arch == "fpn" else "res5."):          # C4's head is the last stage
            place = "roi_heads."
        renamed[place + re.sub(r"^conv1\.", "stem.conv1.", name)] = tensor
    return renamed
