"""Weights: any system's checkpoint -> torchvision's names -> detectron2's names (nothing of the method).

One rule reads them all: the one place in the file whose layers a torchvision ResNet loads with strict=True. A
place is what stands before torchvision's names: "state_dict.module.encoder_q." for example.
"""
import argparse
import math
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
from insloc import C4Encoder, FPNEncoder, make_resnet, read_image

RESNETS = ("resnet50", "resnet18", "narrow18", "resnet34", "resnet101", "resnet152")
INPUTS = {              # mean and std of pixels, order of channels, stride in the 1x1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB", False),
    "zero-one": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "RGB", False),
    "caffe": ((103.53 / 255, 116.28 / 255, 123.675 / 255), (1 / 255, 1 / 255, 1 / 255), "BGR", True)}
# What a file may say of its net, in words as `words_of` writes them, and the inputs that fit.
SAYS = [(r"caffe(?!2)|msra|detectron2 model zoo|res2_0_branch2a_w", {"caffe"}),                 # its name
        (r"to_rgb false|format bgr", {"caffe"}),                        # mmdetection's, detectron2's
        (r"to_rgb true|format rgb", {"imagenet", "zero-one"}),
        (r"style caffe|(stride_in_1x1|downsample_in_bottleneck) true", {"caffe"}),      # Hugging Face's
        (r"style pytorch|stride_in_1x1 false", {"imagenet", "zero-one"})]
TRIPLE = re.compile(r"(?<![^ .])(?:(?:pixel|image|img|rgb|new)_)?(mean|std)s? NUM NUM NUM(?![\d.]| \d)"
                    .replace("NUM", r"(\d+\.?\d*)"))                    # three numbers, and no fourth
BESIDE = ("config.json", "preprocessor_config.json", "config.yaml")     # timm's, Hugging Face's, detectron2's
CONTAINERS = {          # who reads a file: how it begins
    "safetensors": rb".{8}\{",
    "torch": rb"PK|.{257}ustar|.{,20}"                                  # torch.save; of torch 0.1; before 1.6
             + re.escape(torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")),
    "pickle": rb"\x80"}                                                 # of protocol 2 or above
FOREIGN = {             # how a file begins that nobody reads: what it is, and what to do
    b"<": "a web page: fetch the file itself",
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` fetches the file itself",
    b"{": "JSON, perhaps an index of shards: give one file of all tensors",
    b"\x08": "a protocol buffer, as of ONNX or Caffe: convert it to PyTorch first",
    b"\x89HDF": "HDF5, as Keras writes it: convert it to PyTorch first"}
TRUST = "which may run code: --trust reads it"
ANSWERS = {             # what a reader says where it fails, and what that means
    r"GLOBAL (\S+)": rf"it asks for \1, {TRUST}",
    "Unsupported operand": f"it has pickle protocol 4 or 5, {TRUST}",
    "TorchScript": f"it is a TorchScript archive, {TRUST}",
    r"\.tar format": f"it is a tar file, as torch 0.1 wrote, {TRUST}",
    r"^No module named '([^'.]+)|^cannot import name '\w+' from '([^'.]+)":
        r"install \1\2, which it asks for (JAX's files must be converted)",
    "(.*(?:get|has no) attribute .*)": r"save a state_dict() with the program that wrote it: \1"}
IGNORED = ("argparse.Namespace numpy.dtype numpy.ndarray "              # of NumPy 1 and of NumPy 2
           "numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct "
           "numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct")
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


def add_weights_arguments(parser):
    """Adds --input, --prefix and --trust, which say how to read WEIGHTS."""
    add = parser.add_argument
    add("--input", choices=INPUTS, help="the pixels WEIGHTS know [ours: imagenet, if they say no other]")
    add("--prefix", help="the place in WEIGHTS to take [ours: the only one with a whole trunk]")
    add("--trust", action="store_true", help="let WEIGHTS run code, as a pickle does [ours: off]")


# ---- What a file holds -----------------------------------------------------------------------------------

def container_of(path):
    """Returns "safetensors", "torch" or "pickle": who reads the file. ValueError if nobody does."""
    with open(path, "rb") as file:
        head = file.read(300)
    for container, start in CONTAINERS.items():
        if re.match(start, head, re.DOTALL):
            return container
    for start, what in FOREIGN.items():
        if head.lstrip().startswith(start):
            raise ValueError(f"it is {what}")
    if path.endswith(".pkl"):                                           # of protocol 0 or 1
        return "pickle"
    raise ValueError(f"damaged, or no file of tensors: it begins with {head[:8]}")


def read_file(path, trust=False):
    """Returns what torch.save, safetensors or a pickle wrote, on the CPU. Only with trust can it run code.

    ValueError if it cannot be read, in one line that says what to do.
    """
    if re.search(r"\.(npy|npz|msgpack)$|ckpt-\d+(\.(index|meta|data.*))?$", path):
        raise ValueError("it is from NumPy, JAX or TensorFlow: convert it to PyTorch first")
    if not os.path.isfile(path):                                        # a pipe or a device might never end
        raise ValueError("there is no such file; in a folder, checkpoint.pth is looked for")
    container = container_of(path)
    if container == "pickle" and not trust:
        raise ValueError(f"it is a pickle, {TRUST}")
    try:
        if container == "safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():        # torch.load does not compare
            raise ValueError("a check sum is wrong")
        ignored = [(Ignored, name) for name in IGNORED.split()]
        with open(path, "rb") as file, torch.serialization.safe_globals(ignored):
            if container == "pickle":
                return pickle.load(file, encoding="latin1")
            return torch.load(file, map_location="cpu", weights_only=not trust)
    except Exception as error:                                          # torch.load raises whatever it meets
        message = str(error) or type(error).__name__
    for words, answer in ANSWERS.items():
        met = re.search(words, message)
        if met:
            raise ValueError(met.expand(answer))
    raise ValueError(f"damaged, or no file of tensors: {message.splitlines()[0].split('. ')[0]}")


def leaves(value, name=""):
    """Yields pairs of a name, the keys of dicts in dicts joined by dots, and what stands there."""
    if isinstance(value, (Ignored, argparse.Namespace)):
        value = vars(value)
    elif isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from leaves(part, f"{name}.{key}" if name else str(key))


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
        raise ValueError(f"{name} is quantised, sparse, without values, or not of floating-point numbers")
    return tensor.detach().to("cpu", torch.int64 if is_counter else torch.float32)


# ---- What it says of its net -----------------------------------------------------------------------------

def words_of(path, content):
    """Returns what a file and the configurations beside it say, a line for each entry, as words in small
    letters with a space between them: "img_norm_cfg dict mean 103.53 116.28 123.675 to_rgb false"."""
    lines = [f"file {os.path.basename(path)}"]
    for name, value in content:
        is_readable = isinstance(value, np.ndarray) or is_dense(value)
        if is_readable and math.prod(value.shape) == 3:                 # perhaps a buffer of the pixels' mean
            value = value.flatten().tolist()
        lines.append(f"{name} {value}" if isinstance(value, (str, int, float, list, tuple)) else name)
    for name in BESIDE:
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.isfile(beside):
            with open(beside, errors="replace") as file:
                lines.append(file.read(10 ** 6))
    return "\n".join(re.sub(r"[^\w.]+", " ", line.lower()) for line in lines)


def inputs_said(words):
    """Returns {what the words say of the net's input: the set of inputs that fit}."""
    said = {}
    for pattern, fits in SAYS:
        met = re.search(pattern, words)
        if met:
            said[met[0]] = fits
    for kind, *numbers in TRIPLE.findall(words):
        values, fits = np.array(numbers, float), set()
        for name, (mean, std, _, _) in INPUTS.items():
            for value in (values, values / 255):                        # of pixels up to 1, or up to 255
                if np.allclose(value, mean if kind == "mean" else std, rtol=0.02, atol=0.001):
                    fits.add(name)
        said["{} {:g} {:g} {:g}".format(kind, *values)] = fits
    if "proposal_generator." in words and not said and "res5.norm." not in words:       # that norm is MoCo's
        said["proposal_generator, and detectron2 takes BGR by default"] = {"caffe"}
    return said


def check_input(words, given):
    """Returns a remark if the words contradict the given input, or ''. ValueError if none is given.

    A wrong input costs much AP, and nothing else shows it.
    """
    said = inputs_said(words)
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
    places = set(re.findall(r"^(.*?)layer\d\.\d+\.conv\d\.weight$", "\n".join(tensors), re.MULTILINE))
    if prefix is not None:
        place = prefix and our_name(prefix.rstrip(".") + ".")
        longer = sorted(other for other in places if place and other.endswith(f".{place}"))
        return longer if longer and place not in places else [place], ""
    averages = sorted(filter(AVERAGE.search, places))
    others = sorted(places.difference(averages))
    if averages and others:
        return others, f"; a moving average is at {averages[0]!r}, --prefix takes it"
    return others or averages, "; it is a moving average" if averages else ""


def trunk_at(place, tensors):
    """Returns the name of the ResNet whose layers stand at a place, and {torchvision's name: tensor} of it.

    ValueError, with the faults of the nearest ResNet, if none loads them with strict=True.
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
    raise ValueError(min(faults, key=count_faults))


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
        except ValueError as error:
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


def extras_at(place, resnet, tensors):
    """Returns {our name: tensor} of the neck and box head at a place: in whole, or nothing."""
    with torch.device("meta"):
        encoder = FPNEncoder(resnet).state_dict()
    extras = {}
    for name in filter(re.compile(r"(fpn|box_head)\.").match, encoder):
        tensor = tensors.get(place + name)
        if tensor is None or tensor.shape != encoder[name].shape:
            return {}
        extras[name] = numbers_of(name, tensor)
    return extras


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
    extras = extras_at(parent, resnet, tensors)
    for name, x in {**backbone, **extras}.items():
        if not x.sum().isfinite() or name.endswith("running_var") and x.min() < -1e-5:
            raise ValueError(f"{name} has values that are not finite, or variances below 0")
    for name in backbone:
        theirs.pop(place + name, None)                                  # a counter may be none of the file's
    for name in extras:
        theirs.pop(parent + name)
    source = f"{resnet} at {place!r}{remark}"
    return Weights(backbone, extras, resnet, source, *INPUTS[input or "imagenet"], tuple(theirs.values()))


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


# ---- Frozen networks and the images they see: what the probes share --------------------------------------

def frozen_nets(args, arch, device):
    """A probe's networks {"random": net, "given": net} and {name: what it was read from}.

    The random net has the ResNet of WEIGHTS, and stands alone if they are `random`. What a file lacks of an
    encoder is random, too. The networks are in eval mode and ask for no gradient; `.pixels` makes their input
    of uint8 images. Refusal if WEIGHTS cannot be read.
    """
    if args.weights == "random":
        found = {"random": random_weights(args.resnet)}
    else:
        try:
            given = read_weights(args.weights, args.trust, args.prefix, args.input)
        except (OSError, ValueError) as error:
            raise stage.Refusal(f"{args.weights}: {error}") from error
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
    except OSError as error:
        raise stage.Refusal(f"{path} cannot be read: {stage.last_line(error)}") from error


def centre_view(image, size):
    """The centre crop (3, size, size) of an image (3, H, W) whose short side is 8/7 of it. [MoCo v2]"""
    longest = 4 * min(image.shape[1:])          # a long strip, resized as a whole, would take gigabytes
    image = center_crop(image, [min(side, longest) for side in image.shape[1:]])
    return center_crop(resize(image, [size * 8 // 7]), [size, size])    # 224 out of 256
