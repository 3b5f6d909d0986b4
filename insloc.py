"""InsLoc: Instance Localization for Self-supervised Detection Pretraining (arXiv 2102.08318), the method.

The sections stand in the order in which data meets them:

    1 sampling and pasting       two crops of an image, pasted on backgrounds          Sec. 4.1, Eq. 3-4
    2 box jitter                 true box -> an anchor that overlaps it                Sec. 4.2, Fig. 3
    3 photometric augmentation   MoCo v2's, on whole tensors, inside the boxes         Sec. 5
    4 dataset and groups         a loader worker's way from files to a BatchNorm group
    5 encoders                   composite and box -> embeddings, C4 and FPN           Sec. 4.3, Eq. 5-6
    6 contrast                   queue of keys, InfoNCE, momentum update               Eq. 2
    7 weights                    any system's checkpoint -> torchvision, detectron2

Nothing here knows of processes or command lines, and importing it does nothing: the loop is in pretrain.py.
Every random draw takes a generator. Most functions and classes can be copied out alone; the others say what
they need ("needs: ...").

Letters in shapes: N images, S side of the square canvas, A anchors, L feature levels, D embedding width, K
queue size, B keys of a step. Sizes are (h, w). Boxes are float xyxy in pixels, half-open: a pasted (h, w)
crop has x2 - x1 = w.
"""
import argparse
import hashlib
import io
import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, box_iou, roi_align

PIXEL_MEAN = (0.485, 0.456, 0.406)      # RGB in [0, 1], ImageNet's, as torchvision's backbones have it
PIXEL_STD = (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------------------
# 1  Sampling and pasting (Sec. 4.1)
# ------------------------------------------------------------------------------------------------------------

def generator_for(*key):
    """A CPU generator whose stream is decided by `key` alone (ints and strings).

    Seeding by (seed, epoch, sample) instead of by process makes every draw independent of the number of ranks
    and of workers, and of where a run was stopped and resumed. Hashed, since neighbouring integers are poor
    seeds.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def crop_box(height, width, scale=(0.2, 1.0), ratio=(0.5, 2.0), generator=None):
    """Where the random crop lies in an image of (height, width) pixels: (top, left, h, w), ints.

    Area fraction U(scale), aspect w / h log-uniform in `ratio`. After ten tries that do not fit into the
    image, the largest centre crop with an allowed aspect, as torchvision's RandomResizedCrop does. [paper:
    "random crop"; ranges: released code]
    """
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        log_aspect = torch.empty(1).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator)
        aspect = log_aspect.exp().item()
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - w + 1, (1,), generator=generator).item()
            return top, left, h, w
    h = min(height, max(1, round(width / ratio[0])))
    w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def paste(background, foreground, top, left, out=None):
    """The composition C of Eq. 3-4: background (3, S, S), foreground (3, h, w) -> new composite, box (4,).

    Any dtype, the box float32; the inputs stay untouched. out: a (3, S, S) tensor to write into.
    ValueError if the foreground leaves the canvas.
    """
    h, w = foreground.shape[-2:]
    if top < 0 or left < 0 or top + h > background.shape[-2] or left + w > background.shape[-1]:
        raise ValueError(f"a {h}x{w} foreground at top {top}, left {left} leaves the canvas "
                         f"of {background.shape[-2]}x{background.shape[-1]}")
    composite = background.clone() if out is None else out.copy_(background)
    composite[:, top:top + h, left:left + w] = foreground
    return composite, torch.tensor([left, top, left + w, top + h], dtype=torch.float32)              # Eq. 3


# ------------------------------------------------------------------------------------------------------------
# 2  Box jitter (Sec. 4.2, Fig. 3)
# ------------------------------------------------------------------------------------------------------------

def grid_anchors(image_size=256, stride=16, sizes=None, ratios=(0.5, 0.75, 1.0, 1.5, 2.0)):
    """RPN's anchors on a square canvas: (A, 4) float32, by row, column, size, ratio; 5120 for the defaults.

    sizes: 32, 64, 128, 256 on a canvas of 256, on others in proportion, else large boxes would match none.
    ratio = h / w at area size**2. Centres at 0, stride, 2 stride, ...; boxes are not clipped. [values:
    released code]
    """
    sizes = sizes or [image_size / n for n in (8, 4, 2, 1)]
    size = torch.tensor(sizes, dtype=torch.float64)[:, None]
    ratio = torch.tensor(ratios, dtype=torch.float64)[None, :]
    half_h, half_w = (size * ratio.sqrt() / 2).flatten(), (size / ratio.sqrt() / 2).flatten()
    cell = torch.stack([-half_w, -half_h, half_w, half_h], dim=1)                        # (sizes * ratios, 4)
    centre = torch.arange(0, image_size, stride, dtype=torch.float64)
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)                       # (rows * columns, 1, 4)
    return (shift + cell).reshape(-1, 4).float()


def jitter_boxes(boxes, anchors, min_iou=0.5, generator=None):
    """Each box (N, 4) is replaced by one of the anchors (A, 4) with IoU > min_iou, uniformly chosen: (N, 4).

    Only the query's box is jittered: pooled features must then say "the instance" although the box also
    covers background. A box that no anchor matches gets the anchor of highest IoU. DIVERGES: the release
    thins the matches by NMS with random scores first; the paper does not mention it.
    """
    iou = box_iou(boxes, anchors)                                                                # (N, A)
    match = iou > min_iou
    lot = match * (1 - torch.rand(iou.shape, generator=generator))      # in (0, 1] for matches, else 0
    return anchors[torch.where(match.any(dim=1, keepdim=True), lot, iou).argmax(dim=1)]


# ------------------------------------------------------------------------------------------------------------
# 3  Photometric augmentation (Sec. 5 "data augmentation", MoCo v2's) on whole tensors
# ------------------------------------------------------------------------------------------------------------

def photometric_params(n, generator=None):
    """MoCo v2's augmentation drawn for n images: a dict of CPU tensors, one row an image.

    order (n, 4) long: which of 0 brightness, 1 contrast, 2 saturation, 3 hue comes first, second, ...;
    brightness, contrast, saturation (n,) factors in [0.6, 1.4] and hue (n,) in [-0.1, 0.1], as torchvision's
    adjust_* functions take them; jitter (p .8), gray (p .2), flip (p .5) (n,) bool; sigma (n,) in pixels,
    U(.1, 2) with p .5, else 0 = no blur.
    """
    def uniform(low, high):
        return torch.empty(n).uniform_(low, high, generator=generator)

    return {
        "order": torch.rand(n, 4, generator=generator).argsort(dim=1),
        "brightness": uniform(0.6, 1.4),
        "contrast": uniform(0.6, 1.4),
        "saturation": uniform(0.6, 1.4),
        "hue": uniform(-0.1, 0.1),
        "jitter": uniform(0, 1) < 0.8,
        "gray": uniform(0, 1) < 0.2,
        "sigma": uniform(0.1, 2.0) * (uniform(0, 1) < 0.5),
        "flip": uniform(0, 1) < 0.5,
    }


def photometric(images, params, boxes=None):
    """Colour jitter, grayscale, blur and flip of images (N, 3, H, W) in [0, 1] -> new images, boxes.

    params: see `photometric_params`. With boxes (N, 4), on whole pixels, everything happens inside them as
    if each were an image of its own, and not one pixel outside changes; a flip turns the inside round and
    leaves the box where it is. With None the whole images are augmented. Keep the parameters on the CPU:
    which samples an operation takes is decided there, so that no line waits for a GPU. DIVERGES: the
    release augments the composite (`--aug-on composite`); the paper says foreground. needs: shift_hue
    """
    n, _, height, width = images.shape
    device, dtype = images.device, images.dtype
    images = images.contiguous()                             # plane by plane: twice as fast as pixel by pixel
    given = boxes
    if boxes is None:
        boxes = torch.tensor([[0.0, 0.0, width, height]]).expand(n, 4)
    x1, y1, x2, y2 = boxes.to(device, non_blocking=True).round().long().split(1, dim=1)          # (N, 1) each
    column, row = torch.arange(width, device=device), torch.arange(height, device=device)
    inside_x, inside_y = (column >= x1) & (column < x2), (row >= y1) & (row < y2)           # (N, W), (N, H)
    mask = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]                               # (N, 1, H, W)
    area = mask.sum(dim=(2, 3), keepdim=True, dtype=dtype)

    def to_gray(x):                                                                           # ITU-R 601 luma
        return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]

    def per_image(x):                                                                   # (N,) -> (N, 1, 1, 1)
        return x.to(device, dtype, non_blocking=True)[:, None, None, None]

    # Brightness, contrast and saturation blend an image with black, with its mean gray and with its gray
    # version: one affine map x -> a x + b gray(x) + c mean(gray(x)), clamped; a sample whose turn it is for
    # hue (or that has no jitter) has a=1, b=c=0.
    x, jitter, order = images, params["jitter"], params["order"]
    for turn in range(4):
        brightness, contrast, saturation, hue = (jitter & (order[:, turn] == op) for op in range(4))
        one, zero = torch.ones(n), torch.zeros(n)
        a = torch.where(brightness, params["brightness"], one)
        a = torch.where(contrast, params["contrast"], torch.where(saturation, params["saturation"], a))
        b, c = torch.where(saturation, 1 - a, zero), torch.where(contrast, 1 - a, zero)
        gray = to_gray(x)
        mean = (gray * mask).sum(dim=(2, 3), keepdim=True) / area
        x = (per_image(a) * x + (per_image(b) * gray + per_image(c) * mean)).clamp(0, 1)
        which = hue.nonzero().squeeze(1)
        if len(which):
            index = which.to(device, non_blocking=True)
            x[index] = shift_hue(x[index], per_image(params["hue"][which]))

    x = torch.where(per_image(params["gray"]) > 0, to_gray(x), x)

    # A blur is linear and separable: one matrix for the rows, one for the columns, each with 17 taps. Weights
    # that fall outside the box are dropped and the others renormalised, so nothing of the background leaks in
    # (torchvision mirrors there instead).
    which = (params["sigma"] > 0).nonzero().squeeze(1)
    if len(which):
        index = which.to(device, non_blocking=True)

        def blur_matrix(inside):                                                         # (n, X) -> (n, X, X)
            position = torch.arange(inside.shape[1], device=device, dtype=dtype)
            distance = position[:, None] - position[None, :]
            weight = torch.exp(-0.5 * (distance.clamp(-9, 9) / per_image(params["sigma"][which])[:, 0]) ** 2)
            weight = weight * (distance.abs() <= 8) * inside[index][:, None, :]
            return weight / weight.sum(dim=2, keepdim=True).clamp(min=1e-12)

        blur_y, blur_x = blur_matrix(inside_y)[:, None], blur_matrix(inside_x)[:, None]
        x[index] = blur_y @ x[index] @ blur_x.transpose(2, 3)

    flip = params["flip"].to(device, non_blocking=True)[:, None]
    flipped = torch.where(inside_x & flip, x1 + x2 - 1 - column, column)
    x = x.gather(3, flipped[:, None, None, :].expand_as(x))
    return torch.where(mask, x, images), given


def shift_hue(x, turn):
    """Hue of x (N, 3, H, W) in [0, 1] turned by `turn` (N, 1, 1, 1) full circles: RGB -> HSV -> RGB."""
    value, chroma = x.amax(dim=1, keepdim=True), x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    r, g, b = x.split(1, dim=1)
    hue = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)            # in sixths of the circle
    hue = torch.where(value == r, (g - b) / safe, hue)
    # Each channel falls from `value` by `chroma` over one sixth of the circle; red, green and blue stand 5, 3
    # and 1 sixths ahead.
    ahead = (5 - 2 * torch.arange(3, device=x.device))[:, None, None]
    k = (ahead + hue + 6 * turn) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------------
# 4  Dataset and groups: the work of a loader worker
# ------------------------------------------------------------------------------------------------------------

class Unreadable(Exception):
    """Too many files in a row cannot be read: the data is gone, not merely damaged."""


class PathList:
    """A list of paths, relative to `root` or absolute, packed into two tensors; reads like a list.

    A Python list of 1.3 million strings is copied page by page into every forked worker as its reference
    counts change; two tensors are shared. Bytes, since a file name need not be UTF-8.
    """

    def __init__(self, paths, root=""):
        encoded = [os.fsencode(path) for path in paths]
        self.root = root
        self.data = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8))
        self.ends = torch.tensor([len(path) for path in encoded], dtype=torch.int64).cumsum(0)

    def __len__(self):
        return len(self.ends)

    def name(self, index):
        """Bytes, as listed."""
        start = self.ends[index - 1].item() if index else 0
        return self.data[start:self.ends[index].item()].numpy().tobytes()

    def __getitem__(self, index):
        return os.path.join(self.root, os.fsdecode(self.name(index)))

    def digest(self):
        """Eight hex digits that tell two lists apart, wherever their roots are."""
        return hashlib.sha256(self.data.numpy().tobytes() + self.ends.numpy().tobytes()).hexdigest()[:8]


def jpeg_pixels(data):
    """Height x width in the header of a JPEG (bytes), 0 where none is found: costs 0.2 % of a decode."""
    view, at = memoryview(data), 2
    while at + 9 <= len(view) and view[0] == view[at] == 0xFF:              # from marker to marker
        if 0xC0 <= view[at + 1] <= 0xCF and view[at + 1] not in (0xC4, 0xC8, 0xCC):         # start of frame
            return (view[at + 5] << 8 | view[at + 6]) * (view[at + 7] << 8 | view[at + 8])
        at += 2 + (view[at + 2] << 8 | view[at + 3])
    return 0


def read_image(path):
    """An image file as uint8 (3, H, W), RGB, pixel by pixel in memory: so it crops and resizes fastest.

    JPEG by torchvision, anything else (and what that refuses) by Pillow. EXIF rotation is ignored, as
    ImageFolder does. Any exception means that the file cannot be used.    needs: jpeg_pixels
    """
    if not os.path.isfile(path):                                     # a pipe or a device would block for ever
        raise OSError("not a file")
    data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    if 0 < jpeg_pixels(data.numpy()) <= 2 * PIL.Image.MAX_IMAGE_PIXELS:  # Pillow's limit; decoder has none
        try:
            return torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)
        except RuntimeError:
            pass                                        # a rare kind of JPEG, or a broken one: Pillow decides
    with PIL.Image.open(io.BytesIO(data.numpy())) as image:
        if image.mode in ("F", "I") and image.format != "PNG":
            raise OSError(f"pixels of mode {image.mode} have no known range")
        if image.mode.startswith("I"):                         # 16 bits a pixel: Pillow would clip, not scale
            image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class Views(torch.utils.data.Dataset):
    """Eq. 3-4 up to the pasting: an image, decoded once, gives two random resized crops and a background.

    Items are asked for by key (epoch, step, group, index), see `batches`; an item is a dict: view_q, view_k
    uint8 (3, h, w), background uint8 (3, S, S), source (the image's index), damaged (indices that could not
    be read), key.

    fg_size: (low, high), both included, of the sides that a crop is resized to; None: (S, S), no background
    needed (moco, ra). keep_aspect: fit the crop into the drawn sides instead of stretching it to them, as
    released. dataset_backgrounds: decode two more images for the backgrounds, as released, instead of taking
    the group's. A file that cannot be read is replaced by another one, drawn from the sample's own generator.
    needs: generator_for, crop_box, read_image, Unreadable
    """

    def __init__(self, paths, seed=0, image_size=256, fg_size=(128, 256), ratio=(0.5, 2.0), keep_aspect=False,
                 dataset_backgrounds=False):
        self.paths, self.seed, self.image_size, self.fg_size = paths, seed, image_size, fg_size
        self.ratio, self.keep_aspect, self.dataset_backgrounds = ratio, keep_aspect, dataset_backgrounds

    def __len__(self):
        return len(self.paths)

    def read(self, index, damaged, generator):
        for _ in range(10):
            try:
                return read_image(self.paths[index]), index
            except Exception as error:          # decoders fail in many ways; the caller counts and names
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:80]
                damaged.append(index)
                index = torch.randint(len(self.paths), (1,), generator=generator).item()
        raise Unreadable(f"ten files in a row cannot be read, {self.paths[damaged[-1]]!r} for one ({reason})")

    def crop(self, image, generator):
        top, left, h, w = crop_box(*image.shape[-2:], ratio=self.ratio, generator=generator)
        size = [self.image_size, self.image_size]
        if self.fg_size:
            low, high = self.fg_size
            size = torch.randint(low, high + 1, (2,), generator=generator).tolist()    # h and w independently
            if self.keep_aspect:                # into the drawn sides, long to long and short to short
                fit = min(max(size) / max(h, w), min(size) / min(h, w))
                size = [max(1, round(h * fit)), max(1, round(w * fit))]
        return self.resize(image[:, top:top + h, left:left + w], size)

    def squash(self, image):
        return self.resize(image, [self.image_size, self.image_size])                 # the aspect is not kept

    @staticmethod
    def resize(image, size):
        """Memory stays pixel by pixel, which torch sees by the strides of a batch: 1.6 times as fast."""
        batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]

    def __getitem__(self, key):
        epoch, step, group, index = key
        generator, damaged = generator_for(self.seed, "sample", epoch, index), []
        image, source = self.read(index, damaged, generator)
        item = {"view_q": self.crop(image, generator), "view_k": self.crop(image, generator),
                "source": source, "damaged": damaged, "key": (step, group)}
        if self.fg_size and not self.dataset_backgrounds:
            item["background"] = self.squash(image)
        elif self.fg_size:
            taken = [source]                    # two more images, neither the sample itself nor each other
            for name in ("background_q", "background_k"):
                for _ in range(100):
                    index = torch.randint(len(self.paths), (1,), generator=generator).item()
                    background, index = self.read(index, damaged, generator)
                    if index not in taken:
                        break
                else:
                    raise Unreadable("no three different images can be read")
                taken.append(index)
                item[name] = self.squash(background)
        return item


class MakeGroup:
    """The collate function: the samples of a BatchNorm group -> composites, boxes, augmentation parameters.

    Returns {"query": view, "key": view, "damaged": indices}; a view is a dict: images uint8 (N, 3, S, S) in
    channels_last memory, boxes (N, 4) the true ones, jittered (N, 4) (differs for queries only), and the
    tensors of `photometric_params`.

    Backgrounds come from the other samples of the group: in a random group they are uniformly random other
    training images, at no decode. Query and key of one instance get different ones; else a shared background
    could give the positive away. DIVERGES: the release decodes two more images a sample
    (`Views(dataset_backgrounds=True)`). flip_moves_box: for augmentation of the whole composite, where a flip
    moves the box with it. needs: generator_for, paste, grid_anchors, jitter_boxes,
    photometric_params
    """

    def __init__(self, seed=0, image_size=256, pasting=True, jitter=True, flip_moves_box=False):
        self.seed, self.image_size, self.pasting, self.jitter = seed, image_size, pasting, jitter
        self.flip_moves_box = flip_moves_box
        self.anchors = grid_anchors(image_size)

    def __call__(self, samples):
        generator = generator_for(self.seed, "group", *samples[0]["key"])
        n, size = len(samples), self.image_size
        group = {"damaged": [index for sample in samples for index in sample["damaged"]]}
        if "background" in samples[0]:
            chosen = self.choose_backgrounds([sample["source"] for sample in samples], generator)
        for side, name in enumerate(("query", "key")):
            view = photometric_params(n, generator)
            # Shared memory, as default_collate has it: a worker would otherwise copy all to hand it over.
            storage = torch.UntypedStorage._new_shared(n * size * size * 3)
            images = torch.empty(0, dtype=torch.uint8).set_(storage).view(n, size, size, 3)
            view["images"] = images.permute(0, 3, 1, 2)                             # pixel by pixel in memory
            view["boxes"] = torch.tensor([[0.0, 0.0, size, size]]).repeat(n, 1)
            for i, sample in enumerate(samples):
                image = sample["view_" + name[0]]
                if self.pasting:
                    background = samples[chosen[i][side]]["background"] if "background" in sample \
                        else sample["background_" + name[0]]
                    h, w = image.shape[-2:]
                    top = torch.randint(0, size - h + 1, (1,), generator=generator).item()
                    left = torch.randint(0, size - w + 1, (1,), generator=generator).item()
                    _, view["boxes"][i] = paste(background, image, top, left, view["images"][i])   # Eq. 3, 4
                else:
                    view["images"][i] = image
            if self.flip_moves_box:
                x1, y1, x2, y2 = view["boxes"].unbind(dim=1)
                flipped = torch.stack([size - x2, y1, size - x1, y2], dim=1)
                view["boxes"] = torch.where(view["flip"][:, None], flipped, view["boxes"])
            view["jittered"] = view["boxes"]
            group[name] = view
        if self.jitter:                                                         # Sec. 4.2: the query alone
            query = group["query"]
            query["jittered"] = jitter_boxes(query["boxes"], self.anchors, generator=generator)
        return group

    @staticmethod
    def choose_backgrounds(source, generator):
        """N image indices -> for each sample two positions in the group: query's and key's background."""
        chosen = []
        for own in source:
            taken, pair = {own}, []
            for _ in range(2):
                candidates = [j for j, other in enumerate(source) if other not in taken]
                if not candidates:
                    raise ValueError("a group needs three different images: a sample and two backgrounds; "
                                     "take larger groups, or repair damaged images")
                pair.append(candidates[torch.randint(len(candidates), (1,), generator=generator).item()])
                taken.add(source[pair[-1]])
            chosen.append(pair)
        return chosen


def batches(n_images, batch_size, group_size, epochs, seed=0, start_step=0, groups=None):
    """The batch sampler of a whole run: step by step, each group's list of keys (epoch, step, group, index).

    A step takes batch_size images, split into batch_size / group_size groups; the last incomplete batch of an
    epoch is dropped. start_step: resume there. groups: the positions of this rank's groups in the step (a
    range); None is all of them. needs: generator_for
    """
    steps = n_images // batch_size
    for epoch in range(start_step // steps, epochs):
        order = torch.randperm(n_images, generator=generator_for(seed, "order", epoch))
        for step in range(max(start_step, epoch * steps), (epoch + 1) * steps):
            first = (step - epoch * steps) * batch_size
            for group in range(batch_size // group_size) if groups is None else groups:
                members = order[first + group * group_size:first + (group + 1) * group_size].tolist()
                yield [(epoch, step, group, index) for index in members]


# ------------------------------------------------------------------------------------------------------------
# 5  Encoders (Sec. 4.3): the detector's own parts, so that fine-tuning adds RPN and predictors alone
# ------------------------------------------------------------------------------------------------------------

def roi_pool(features, boxes, size, scale):
    """Eq. 5-6: features (N, C, h, w), boxes (N, 4) or (N, M, 4) -> (N*M, C, size, size), image by image.

    Boxes in pixels of the image, scale that of the features. detectron2's ROIAlignV2: aligned, adaptive
    number of samples. In float32 whatever autocast gives, since bfloat16 cannot hold box corners; dtype and
    memory format come back as they were (roi_align itself returns contiguous).
    """
    boxes = boxes.reshape(len(boxes), -1, 4)                                                     # (N, M, 4)
    image = torch.arange(len(boxes), device=boxes.device)[:, None, None].expand(-1, boxes.shape[1], 1)
    x = features if features.dtype == torch.float64 else features.float()
    rois = torch.cat([image.to(x.dtype), boxes.to(x.dtype)], dim=2).reshape(-1, 5)
    x = roi_align(x, rois, size, spatial_scale=scale, sampling_ratio=-1, aligned=True)
    if features.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(features.dtype)


def unit(x):
    """Embeddings onto the unit sphere, in float32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


class C4Encoder(nn.Module):
    """R50-C4: ResNet up to res4, RoIAlign, res5 as the head, mean, two-layer MLP.

    With boxes=None it is MoCo v2's network. Parameters: 27,966,656 for resnet50. `.resnet` has
    torchvision's names, without fc. needs: roi_pool, unit
    """
    levels = ("c4",)

    def __init__(self, resnet="resnet50", dim=128):
        super().__init__()
        self.resnet = getattr(torchvision.models, resnet)(weights=None)
        width = self.resnet.fc.in_features
        self.resnet.fc = nn.Identity()
        self.dim = dim
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))

    def res4(self, images):
        """(N, 3, H, W) normalised RGB -> (N, 1024, H/16, W/16)."""
        net = self.resnet
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return net.layer3(net.layer2(net.layer1(x)))

    def features(self, images, boxes=None):
        """What a detector's RoI head sees: (N, 1, 2048), or (N*M, 1, 2048) for boxes (N, M, 4)."""
        x = self.res4(images)
        if boxes is not None:
            x = roi_pool(x, boxes, size=14, scale=1 / 16)                                        # Eq. 5, 6
        return self.resnet.layer4(x).mean(dim=(2, 3))[:, None]

    def forward(self, images, boxes=None):
        """(N, 3, H, W), boxes (N, 4) or (N, M, 4) -> embeddings (N, 1, D) or (N*M, 1, D) of length 1."""
        return unit(self.projector(self.features(images, boxes)))


class FPNEncoder(nn.Module):
    """R50-FPN: every box is pooled on all levels P2..P5, one head serves them, each level has its own queue.

    fpn: 256 channels, BatchNorm on lateral and output convolutions, as detectron2's FPN with NORM "BN".
    box_head: 4 x (conv 3x3, BatchNorm, ReLU), fc 1024, ReLU, as detectron2's FastRCNNConvFCHead; its
    BatchNorm sees the levels together. projector: the two-layer MLP. Parameters: 43,242,688 for resnet50.
    [head: released code]            needs: roi_pool, unit
    """
    levels = ("p2", "p3", "p4", "p5")

    def __init__(self, resnet="resnet50", dim=128):
        super().__init__()
        self.resnet = getattr(torchvision.models, resnet)(weights=None)
        width = self.resnet.fc.in_features
        self.resnet.fc = nn.Identity()
        self.fpn = FeaturePyramidNetwork([width // n for n in (8, 4, 2, 1)], 256, norm_layer=nn.BatchNorm2d)
        head = OrderedDict()
        for i in range(1, 5):
            head[f"conv{i}"] = nn.Conv2d(256, 256, 3, padding=1, bias=False)
            head[f"bn{i}"] = nn.BatchNorm2d(256)
            head[f"relu{i}"] = nn.ReLU(inplace=True)
            nn.init.kaiming_normal_(head[f"conv{i}"].weight, mode="fan_out", nonlinearity="relu")
        head.update(flatten=nn.Flatten(), fc1=nn.Linear(256 * 7 * 7, 1024), relu5=nn.ReLU(inplace=True))
        nn.init.kaiming_uniform_(head["fc1"].weight, a=1)                                     # c2_xavier_fill
        nn.init.zeros_(head["fc1"].bias)
        self.box_head = nn.Sequential(head)
        self.dim = dim
        self.projector = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(inplace=True), nn.Linear(1024, dim))

    def pyramid(self, images):
        """(N, 3, H, W) -> [P2, P3, P4, P5], each (N, 256, H/s, W/s) at stride s = 4, 8, 16, 32."""
        net = self.resnet
        c2 = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
        c3 = net.layer2(c2)
        c4 = net.layer3(c3)
        c5 = net.layer4(c4)
        return list(self.fpn(OrderedDict(p2=c2, p3=c3, p4=c4, p5=c5)).values())

    def features(self, images, boxes):
        """boxes (N, 4) or (N, M, 4) for all levels, or a list of four such, one a level -> (N*M, 4, 1024)."""
        boxes = boxes if isinstance(boxes, (list, tuple)) else [boxes] * 4
        pooled = [roi_pool(p, b, size=7, scale=1 / stride)                                       # Eq. 5, 6
                  for p, b, stride in zip(self.pyramid(images), boxes, (4, 8, 16, 32))]
        x = torch.stack([p.permute(0, 2, 3, 1) for p in pooled], dim=1)   # (N*M, 4, 7, 7, 256), channels last
        return self.box_head(x.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, (-1, 4))

    def forward(self, images, boxes):
        """(N, 3, H, W) and boxes as in `features` -> embeddings (N*M, 4, D) of length 1, one a level."""
        return unit(self.projector(self.features(images, boxes)))


# ------------------------------------------------------------------------------------------------------------
# 6  Contrast (Sec. 4.1): queue of keys, InfoNCE, momentum update
# ------------------------------------------------------------------------------------------------------------

class KeyQueue(nn.Module):
    """The last `size` keys of each level, one a column: the negatives. Buffers, so that they are saved.

    keys (L, D, K), unit columns, random at the start; ptr: where the next key goes; filled: real keys so far,
    at most K.
    """

    def __init__(self, size=65536, dim=128, levels=1, generator=None):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(levels, dim, size, generator=generator), dim=1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys):
        """keys (B, L, D), the same on every rank, overwrite the oldest; B need not divide K."""
        size = self.keys.shape[2]
        skip = max(0, len(keys) - size)                # of more keys than the queue holds, the last ones stay
        column = (self.ptr + torch.arange(skip, len(keys), device=self.ptr.device)) % size
        self.keys[:, :, column] = keys[skip:].permute(1, 2, 0).to(self.keys.dtype)
        self.ptr.add_(len(keys)).remainder_(size)
        self.filled.add_(len(keys)).clamp_(max=size)


def info_nce(q, k, queue, temperature=0.2):
    """Eq. 2 per level: q, k (N, L, D), queue (L, D, K) -> loss (L,), mean over N; logits (N, L, 1 + K).

    The positive is the first logit. Gradients reach q alone. float32 at least, inside autocast too. Chance
    is log(1 + K): 11.09 for K = 65536, for alike keys.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = (x if x.dtype == torch.float64 else x.float() for x in (q, k.detach(), queue.detach()))
        positive = (q * k).sum(dim=2, keepdim=True)                                              # (N, L, 1)
        negative = torch.einsum("nld,ldk->nlk", q, queue)                                        # (N, L, K)
        logits = torch.cat([positive, negative], dim=2) / temperature
        return (logits.logsumexp(dim=2) - logits[:, :, 0]).mean(dim=0), logits                   # Eq. 2


@torch.no_grad()
def momentum_update(encoder_k, encoder_q, momentum=0.999):
    """key <- momentum * key + (1 - momentum) * query, in place, for every parameter.

    Parameters only: the key encoder's BatchNorm statistics are those of its own forward passes, as in MoCo.
    """
    torch._foreach_lerp_(list(encoder_k.parameters()), list(encoder_q.parameters()), 1 - momentum)


# ------------------------------------------------------------------------------------------------------------
# 7  Weights: any system's checkpoint -> torchvision's names -> detectron2's names
# ------------------------------------------------------------------------------------------------------------

class Weights(NamedTuple):
    backbone: dict          # torchvision's names, without fc: every tensor of the trunk
    extras: dict            # our names (fpn.*, box_head.*): neck and box head in whole, or nothing
    source: str             # "METHOD, resnet50 at PREFIX", METHOD spelt as in the paper's tables
    pixel_mean: tuple       # input = (image in [0, 1] - mean) / std, channels in the order below
    pixel_std: tuple
    channel_order: str
    dropped: tuple          # the file's own names of the tensors that are neither


# Who made a file, by its name or its tensors' names, first match: the numbers do not tell.
SYSTEMS = (
    ("InsLoc", r"insloc|roi_head\.(bbox|shared)_head\."), ("SwAV", r"swav|\bprototypes\."),
    ("SimCLR, converted", r"resnet50-1x|simclr[-_]v1"), ("SimCLR", r"simclr"),
    ("BYOL, converted", r"pretrain_res50x1|^byol\."), ("BYOL", r"byol|\bonline_net\."),
    ("InfoMin", r"infomin|\bhead_jig\."), ("Relative Loc.", r"relative[-_]loc"), ("MoCo-v1", r"moco[-_]?v1"),
    ("MoCo-v2", r"moco[-_]?v2|module\.encoder_q\.fc\.2\."), ("MoCo-v1", r"module\.encoder_q\.fc\.weight"),
    ("DenseCL", r"densecl"), ("PixPro", r"pixpro"), ("SoCo", r"soco"),
    ("Supervised", r"^resnet\d+-[0-9a-f]{8}|imagenet_r50|^R-\d+\.pkl|in1k|^model\.safetensors"))
# Their input where it is not ImageNet's RGB statistics. SwAV's loader has .228 for red; SimCLR's has none.
INPUTS = {"SwAV": (PIXEL_MEAN, (0.228, 0.224, 0.225)), "SimCLR, converted": ((0., 0., 0.), (1., 1., 1.))}

BLOCKS = {"lateral": "inner_blocks", "fpn": "layer_blocks", "output": "layer_blocks"}
SPELLINGS = tuple((re.compile(r"(^|\.)" + theirs), ours) for theirs, ours in (  # detectron2's, InsLoc's: ours
    (r"backbone\.bottom_up\.", r"\1backbone."),
    (r"(?:roi_heads|roi_head\.shared_head)\.(?=res5\.\d|layer4\.)", r"\1backbone."),  # C4's head: last stage
    (r"(?:backbone\.fpn_(lateral|output)(\d)|neck\.(lateral|fpn)_convs\.(\d))\.(norm\.|bn\.|conv\.)?",
     lambda m: f"{m[1]}fpn.{BLOCKS[m[2] or m[4]]}.{m[5] or int(m[3]) - 2}.{int(m[6] in ('norm.', 'bn.'))}."),
    (r"roi_head\.bbox_head\.shared_convs\.(\d)\.(conv|bn)\.",
     lambda m: f"{m[1]}box_head.{m[3]}{int(m[2]) + 1}."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", r"\1box_head.fc1."), (r"roi_heads\.box_head\.", r"\1box_head."),
    (r"stem\.conv1\.", r"\1conv1."), (r"res([2-5])\.(?=\d)", lambda m: f"{m[1]}layer{int(m[2]) - 1}."),
    (r"conv(\d)\.norm\.", r"\1bn\2."),
    (r"shortcut\.(norm\.)?", lambda m: f"{m[1]}downsample.{int(bool(m[2]))}.")))


class PickledDtype:
    """A number's dtype in a pickle; NumPy's own would let a file change the dtype of an array in use."""

    def __init__(self, name):
        self.dtype = np.dtype(name if isinstance(name, str) else "O")
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError("its arrays are not of numbers")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])

    def read(self, raw, shape, order="C"):
        array = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, self.dtype)
        return array.astype(self.dtype.newbyteorder("=")).reshape(shape, order=order)


class PickledArray(np.ndarray):
    """Empty until the pickle gives it its state."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        array = dtype.read(raw, shape)                                     # raises unless they fit each other
        super().__setstate__((1, array.shape, array.dtype, bool(fortran), array.tobytes()))


class ArraysOnly(pickle._Unpickler):               # in Python: the one in C reserves whatever a file asks for
    """Reads NumPy arrays of numbers in dicts and lists, as detectron2's .pkl files are.

    What the file names is not called: these methods stand for it.    needs: PickledDtype, PickledArray
    """
    ndarray = None

    def set_items(self, *items):                    # a key of tuples in tuples may take for ever to hash
        if any(not isinstance(key, (str, int)) for key in items[::2]):
            raise pickle.UnpicklingError("a key that is no name")
        dict.update(self.stack[-1], zip(items[::2], items[1::2]))

    def find_class(self, module, name):
        if module.split(".")[0] in ("numpy", "collections", "_codecs") and name in (
                "_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype", "encode", "OrderedDict"):
            return getattr(self, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def _reconstruct(self, kind, shape, code):
        return PickledArray(0)

    def _frombuffer(self, raw, dtype, shape, order):
        return dtype.read(raw, shape, order)

    def scalar(self, dtype, raw):
        return dtype.read(raw, ())[()]

    def dtype(self, name, align=False, copy=False):
        return PickledDtype(name)

    def OrderedDict(self):
        return {}

    def encode(self, text, encoding):
        return text.encode("latin1")

    def load_bytearray8(self):                      # pickle's own fills that many bytes before it reads one
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch = {**{code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in (
                    pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.DICT)},
                pickle.SETITEM[0]: lambda self: self.set_items(self.stack.pop(-2), self.stack.pop()),
                pickle.SETITEMS[0]: lambda self: self.set_items(*self.pop_mark()),
                pickle.BYTEARRAY8[0]: load_bytearray8}


def read_file(path, trust=False):
    """What torch.save, safetensors or a pickle of arrays wrote, unless it runs code.    needs: ArraysOnly"""
    differ = "features still differ a little: it pads strided layers at bottom and right only"
    if re.search(r"ckpt-\d+(\.(index|meta|data-.*))?$", path):
        raise ValueError("from TensorFlow: convert it first (SimCLR: github.com/tonylins/simclr-converter); "
                         + differ)
    if os.path.exists(path) and not os.path.isfile(path):           # a pipe or a device would block for ever
        raise ValueError("not a file")
    with open(path, "rb") as f:
        head = f.read(64)
        f.seek(0)
        try:
            if path.endswith(".safetensors"):
                data, dtypes = f.read(), {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}
                start = 8 + int.from_bytes(data[:8], "little")
                table = {name: x for name, x in json.loads(data[8:start]).items() if name != "__metadata__"}
                data = bytearray(data[start:])
                spans = sorted(x["data_offsets"] for x in table.values())       # without gap or overlap
                if [0, *(end for _, end in spans)] != [*(start for start, _ in spans), len(data)] or any(
                        math.prod(x["shape"]) * dtypes[x["dtype"]].itemsize != end - start
                        for x in table.values() for start, end in [x["data_offsets"]]):
                    raise ValueError("its tensors do not fill it")
                return {name: torch.frombuffer(data, dtype=dtypes[x["dtype"]], offset=x["data_offsets"][0],
                                               count=math.prod(x["shape"])).reshape(x["shape"])
                        for name, x in table.items()}
            if head[:2] == b"PK":                           # torch.load compares neither sizes nor check sums
                with zipfile.ZipFile(f) as archive:
                    if sum(part.file_size for part in archive.infolist()) > os.path.getsize(path):
                        raise ValueError("there is more in it than it is long")
                    if broken := archive.testzip():
                        raise ValueError(f"the check sum of {broken} is wrong")
                f.seek(0)
            if head[:2] == b"PK" or bytes.fromhex("8a0a6cfc9c46f9206aa85019") in head:    # torch.save
                with torch.serialization.safe_globals([argparse.Namespace]):  # PixPro's, InfoMin's opt
                    return torch.load(f, map_location="cpu", weights_only=not trust)
            if head[:1] == b"\x80":
                return (pickle.Unpickler if trust else ArraysOnly)(f, encoding="latin1").load()
        except Exception as error:                                              # a damaged or a hostile file
            asked = re.search(r"GLOBAL ([\w.]+)", str(error))
            asked = asked[1] if asked else getattr(error, "name", None) or ""
            if asked.split(".")[0] in ("haiku", "jax", "jaxlib", "dill"):
                raise ValueError(f"from JAX ({asked}): convert it first (BYOL: github.com/ajtejankar/byol-"
                                 f"convert); {differ} (70 instead of 74.6 % top-1)") from None
            if asked:
                raise ValueError(f"it asks for {asked}: --trust lets the file run code") from None
            raise ValueError(f"damaged: {str(error).split('. ')[0] or type(error).__name__}") from None
    raise ValueError(f"neither torch.save's, nor safetensors, nor a pickle: it begins with {head[:8]!r}")


def is_numbers(x):
    """A tensor or an array whose numbers are there, one by one: neither sparse, nor meta, nor complex, ..."""
    if isinstance(x, torch.Tensor):
        return (x.layout == torch.strided and x.device.type == "cpu" and not x.is_nested and x.dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
            torch.int16, torch.int8, torch.uint8, torch.bool))
    return isinstance(x, np.ndarray) and x.dtype.kind in "biuf"


def read_weights(path, trust=False):
    """Trunk, and neck and box head if there, of a run directory or of any system's checkpoint: Weights.

    One rule: of all places in the file where a ResNet may stand, the one with every tensor of a torchvision
    ResNet in its shape and no other layers; a moving average (key encoder, target, teacher) is no place. Else
    ValueError, with the nearest place and its faults. trust: the file may run code.
    needs: read_file, is_numbers, Weights, FPNEncoder, the tables above, PIXEL_MEAN, PIXEL_STD
    """
    if os.path.isdir(path):
        names = [name for name in ("checkpoint.pth", "checkpoint_prev.pth", "backbone.pth")
                 if os.path.exists(os.path.join(path, name))]
        if not names:
            raise ValueError("a directory without checkpoint.pth")
        path = os.path.join(path, names[0])
    content, clues, flat, theirs = read_file(path, trust), [os.path.basename(path)], {}, {}
    dicts = []

    def walk(node, prefix):
        dicts.append(prefix)
        if len(prefix) > 500 or len(dicts) > 100_000:     # a dict may hold itself, or another twice, ...
            raise ValueError("damaged: dicts in dicts without end")
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif is_numbers(value):
                name = f"{prefix}{key}"
                clues.append(name)
                for spelling, ours in SPELLINGS:
                    name = spelling.sub(ours, name)
                if name in flat:
                    raise ValueError(f"two tensors claim to be {name}")
                flat[name], theirs[name] = torch.as_tensor(value).detach(), clues[-1]

    walk(content if isinstance(content, dict) else {}, "")
    if any(name.endswith("res2_0_branch2a_w") for name in flat):
        raise ValueError("MSRA's net, with strides unlike torchvision's: only finetune_det.py takes it")

    found, average = [], re.compile(r"(^|[._])(k|ema|target|momentum|teacher|loss)[._]")
    places = {m[1] for m in (re.match(r"(.*?)(conv1|layer\d\.0\.conv1)\.weight$", x) for x in flat) if m}
    for resnet in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        with torch.device("meta"):
            net = getattr(torchvision.models, resnet)().state_dict()
            trunk = {name: x.shape for name, x in net.items() if not name.startswith("fc.")}
        for prefix in sorted(place for place in places if not average.search(place) and "layer" not in place):
            here = {name[len(prefix):]: x for name, x in flat.items() if name.startswith(prefix)}
            faults = [f"{name} is missing" for name in trunk if name not in here and "num_b" not in name]
            faults += [f"{name} is {tuple(here[name].shape)}, not {tuple(trunk[name])}" for name in trunk
                       if name in here and here[name].shape != trunk[name]]
            faults += [f"{name} is one too many" for name in here
                       if name not in trunk and re.match(r"(conv\d|bn\d|layer\d)\.", name)]
            found.append((len(faults), resnet, prefix, here, trunk, faults))
    if not found:
        raise ValueError(f"no ResNet (averages do not count); it has {', '.join(clues[1:4]) or 'nothing'}")
    count, resnet, prefix, here, trunk, faults = min(found, key=lambda place: place[0])
    if count:
        raise ValueError(f"no whole ResNet; nearest: {resnet} at {prefix or 'top level'!r}, with {count} "
                         f"fault{'s' * (count > 1)}: {'; '.join(faults[:4])}")
    for name in trunk:
        if name in here and not here[name].isfinite().all():
            raise ValueError(f"{theirs[prefix + name]} has values that are not finite")
    for other in (place for place in found if place[0] == 0):
        if any(not torch.equal(here[name], x) for name, x in other[3].items() if name in trunk):
            raise ValueError(f"two different ResNets, at {prefix!r} and {other[2]!r}: keep one in the file")

    def take(names, parent):            # counters of old files are missing; nothing depends on them
        return {name: flat[parent + name].float() if "num_batches" not in name else
                flat.get(parent + name, torch.zeros(())).long() for name in names}

    with torch.device("meta"):
        parts = {name: x.shape for name, x in FPNEncoder(resnet).state_dict().items()
                 if name.startswith(("fpn.", "box_head."))}
    parent = re.sub(r"(^|\.)(resnet|backbone)\.$", r"\1", prefix)
    if any(parent + name not in flat or flat[parent + name].shape != shape for name, shape in parts.items()
           if "num_batches" not in name):
        parts = {}                      # neck and box head in whole or not at all
    used = {prefix + name for name in trunk} | {parent + name for name in parts}
    args = content.get("args") if "encoder_q" in content else None      # a dict in a run of pretrain.py
    method = next((system for system, clue in SYSTEMS if any(re.search(clue, name, re.I) for name in clues)),
                  "unknown system")
    if isinstance(args, dict):
        ladder = {"moco": "MoCo-v2", "ra": "RA", "cp": "RA+CP", "insloc": "InsLoc"}
        method = ladder.get(args.get("method"), method)
    mean, std = INPUTS.get(method, (PIXEL_MEAN, PIXEL_STD))
    source = f"{method}, {resnet} at {prefix or 'top level'}"
    return Weights(take(trunk, prefix), take(parts, parent), source, mean, std, "RGB",
                   tuple(name for ours, name in theirs.items() if ours not in used))


def to_detectron2(weights, arch):
    """{detectron2's name: tensor} for its R50-C4 ("c4") or R50-FPN ("fpn"), to be loaded by exact names."""
    rules = ((r"^(conv1|bn1)\.", r"stem.\1."), (r"bn(\d)\.", r"conv\1.norm."),
             (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
             (r"downsample\.0\.", "shortcut."), (r"downsample\.1\.", "shortcut.norm."),
             (r"^fpn\.(inner|layer)_blocks\.(\d)\.(\d)\.", lambda m:
              f"fpn_{'lateral' if m[1] == 'inner' else 'output'}{int(m[2]) + 2}.{'norm.' * int(m[3])}"))
    renamed = {}
    for name, x in {**weights.backbone, **(weights.extras if arch == "fpn" else {})}.items():
        in_head = name.startswith("box_head" if arch == "fpn" else "layer4")    # C4's head is the last stage
        in_trunk = "backbone." if arch == "c4" or name.startswith("fpn") else "backbone.bottom_up."
        for ours, theirs in rules:
            name = re.sub(ours, theirs, name)
        renamed[("roi_heads." if in_head else in_trunk) + name] = x
    return renamed
