"""InsLoc: Instance Localization for Self-supervised Detection Pretraining (arXiv 2102.08318), the method.

The sections stand in the order in which data meets them:

    1 sampling and pasting       two crops of an image, pasted on backgrounds          Sec. 4.1, Eq. 3-4
    2 box jitter                 pasted box -> an anchor that overlaps it              Sec. 4.2, Fig. 3
    3 photometric augmentation   MoCo v2's, on whole tensors, inside the boxes         Sec. 5
    4 dataset and groups         a loader worker's way from files to a BatchNorm group
    5 encoders                   composite and box -> embeddings, C4 and FPN           Sec. 4.3, Eq. 5-6
    6 contrast                   queue of keys, InfoNCE, momentum update               Eq. 2

Nothing here talks to other processes or reads a command line, and importing it does nothing: the loop is in
pretrain.py. Every random draw takes a generator. Most functions and classes can be copied out alone; the
others say what they need ("needs: ...").

Letters in shapes: N images, S side of the square canvas, A anchors, L feature levels, D embedding width, K
queue size, B keys of a step. Sizes are (h, w). Boxes are float xyxy in pixels, half-open: a pasted (h, w)
crop has x2 - x1 = w.
"""
import dataclasses
import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, box_iou, roi_align

PIXEL_MEAN = (0.485, 0.456, 0.406)      # RGB in [0, 1], ImageNet's, as torchvision's backbones have it
PIXEL_STD = (0.229, 0.224, 0.225)


# ---- 1  Sampling and pasting (Sec. 4.1) ------------------------------------------------------------------

def generator_for(*seeds):
    """A CPU generator whose stream is decided by `seeds` alone (ints and strings).

    Seeding by (seed, epoch, image) instead of by process makes every draw independent of ranks, of workers
    and of where a run was resumed. The seeds are hashed, since neighbouring integers make poor ones.
    """
    digest = hashlib.blake2b(repr(seeds).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def crop_box(height, width, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), generator=None):
    """Where the random crop lies in an image of (height, width) pixels: (top, left, h, w), ints.

    Its share of the area is U(scale), its aspect w / h is log-uniform in `ratio`. After ten draws that do not
    fit, it is the largest centre crop with an allowed aspect, as in torchvision's RandomResizedCrop.
    [defaults: MoCo v2, which the augmentation of the foreground follows, Sec. 5]
    """
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        log_aspect = torch.empty(1).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator)
        aspect = log_aspect.exp().item()
        h = round(math.sqrt(area / aspect))
        w = round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - w + 1, (1,), generator=generator).item()
            return top, left, h, w
    h = min(height, max(1, round(width / ratio[0])))
    w = min(width, max(1, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def paste(background, foreground, top, left):
    """The composition C of Eq. 3-4: background (3, S, S), foreground (3, h, w) -> new composite, box (4,).

    The box is float32. The inputs stay untouched. ValueError if they differ in channels, dtype or device, or
    if the foreground leaves the canvas.
    """
    channels, h, w = foreground.shape
    height, width = background.shape[1:]
    kind = (channels, foreground.dtype, foreground.device)
    if kind != (len(background), background.dtype, background.device):
        raise ValueError("foreground and background must agree in channels, dtype and device")
    if not (0 <= top <= height - h and 0 <= left <= width - w):
        raise ValueError(f"a {h}x{w} crop at top {top}, left {left} leaves the canvas of {height}x{width}")
    composite = background.clone()
    composite[:, top:top + h, left:left + w] = foreground
    return composite, torch.tensor([left, top, left + w, top + h], dtype=torch.float32)              # Eq. 3


# ---- 2  Box jitter (Sec. 4.2, Fig. 3) --------------------------------------------------------------------

def grid_anchors(image_size=256, stride=16, sizes=None, ratios=(0.5, 0.75, 1.0, 1.5, 2.0)):
    """RPN's anchors on a square canvas: (A, 4) float32, by row, column, size, ratio; 5120 for the defaults.

    Sizes are by default an eighth of the canvas to the canvas: on canvases other than 256 a large box would
    match no anchor of fixed sizes. ratio = h / w at area size**2. Centres lie at 0, stride, 2 stride, ...;
    boxes are not clipped. [values: released code]
    """
    sizes = sizes or (image_size / 8, image_size / 4, image_size / 2, image_size)
    size = torch.tensor(sizes, dtype=torch.float64)[:, None]
    ratio = torch.tensor(ratios, dtype=torch.float64)[None, :]
    half_h = (size * ratio.sqrt() / 2).flatten()
    half_w = (size / ratio.sqrt() / 2).flatten()
    cell = torch.stack([-half_w, -half_h, half_w, half_h], dim=1)                        # (sizes * ratios, 4)
    centre = torch.arange(0, image_size, stride, dtype=torch.float64)
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)                       # (rows * columns, 1, 4)
    return (shift + cell).reshape(-1, 4).float()


def jitter_boxes(boxes, anchors, min_iou=0.5, generator=None):
    """Each box (N, 4) is replaced by one of the anchors (A, 4) with IoU > min_iou, uniformly chosen: (N, 4).

    Only the query's box is jittered: what it pools must then still say "the instance", although the anchor
    also covers background. A box that no anchor matches gets the anchor of highest IoU. DIVERGES: the release
    thins the matches by NMS with random scores first; the paper does not mention it.
    """
    iou = box_iou(boxes, anchors)                                                                # (N, A)
    matches = (iou > min_iou).float()
    best = F.one_hot(iou.argmax(dim=1), len(anchors)).float()
    weights = torch.where(matches.any(dim=1, keepdim=True), matches, best)
    return anchors[torch.multinomial(weights, 1, generator=generator).squeeze(1)]


# ---- 3  Photometric augmentation (Sec. 5, "data augmentation": MoCo v2's) on whole tensors ---------------

def photometric_params(n, generator=None):
    """MoCo v2's augmentation drawn for n images: a dict of CPU tensors, one row an image.

    order (n, 4) long: which of 0 brightness, 1 contrast, 2 saturation, 3 hue comes first, second, ...;
    brightness, contrast, saturation (n,) factors in [0.6, 1.4] and hue (n,) in [-0.1, 0.1], as torchvision's
    adjust_* functions take them; colour (p .8, whether these four happen), gray (p .2), flip (p .5), (n,)
    bool; sigma (n,) of the blur in pixels, U(.1, 2) with p .5, else 0 = no blur.
    """
    def uniform(low, high):
        return torch.empty(n).uniform_(low, high, generator=generator)

    return {
        "order": torch.rand(n, 4, generator=generator).argsort(dim=1),
        "brightness": uniform(0.6, 1.4),
        "contrast": uniform(0.6, 1.4),
        "saturation": uniform(0.6, 1.4),
        "hue": uniform(-0.1, 0.1),
        "colour": uniform(0, 1) < 0.8,
        "gray": uniform(0, 1) < 0.2,
        "sigma": uniform(0.1, 2.0) * (uniform(0, 1) < 0.5),
        "flip": uniform(0, 1) < 0.5,
    }


def photometric(images, params, boxes=None):
    """Colour jitter, grayscale, blur and flip of images (N, 3, H, W) in [0, 1] -> new images, boxes.

    params: see `photometric_params`. With boxes (N, 4), rounded to whole pixels, everything happens inside
    them as if each were an image of its own, and no pixel outside changes; a flip mirrors the inside and
    leaves the box where it is. With boxes=None the whole images are augmented; MakeGroup moves their boxes
    with a flip. The boxes come back as they are. Parameters and boxes stay on the CPU, so that no line waits
    for a GPU. Images keep their dtype; half precision is computed in float32. Call it outside of autocast.
    ValueError for images of integers, and for a box that leaves its image.
    DIVERGES: the paper augments the foreground, the release the composite (boxes=None).
    needs: box_masks, affine_maps, shift_hue, blur_matrix
    """
    height, width = images.shape[2:]
    region = torch.tensor([[0.0, 0.0, width, height]]).expand(len(images), 4)
    if boxes is not None:
        region = boxes.round()
    limits = torch.tensor([width, height, width, height])
    if not images.is_floating_point() or (region < 0).any() or (region > limits).any():
        raise ValueError("images must be float, in [0, 1], and no box may leave its image")
    dtype = torch.promote_types(images.dtype, torch.float32)

    def put(x):                                         # from the CPU to where the images are
        return x.to(images.device, dtype, non_blocking=True)

    def indices_of(chosen):                             # bool (N,) -> the indices of those n images, there
        return chosen.nonzero().squeeze(1).to(images.device, non_blocking=True)

    # Whole images are changed below. Means and blur see the inside alone, and the last line keeps the inside.
    inside_x, inside_y, mirrored = box_masks(put(region), height, width)
    inside = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]                           # (N, 1, H, W)
    weights = inside.flatten(1).to(dtype)                                                     # (N, HW)
    mean_weights = (weights / weights.sum(dim=1, keepdim=True))[:, :, None]                   # (N, HW, 1)
    matrices, mean_matrices = affine_maps(params)
    matrices = put(matrices)                                                                  # (N, 5, 3, 3)
    mean_matrices = put(mean_matrices)                                                        # (N, 4, 3, 3)
    hue = put(params["hue"])[:, None, None]
    sigma = put(params["sigma"])[:, None]

    x = images.to(dtype).flatten(2)                                                              # (N, 3, HW)
    for turn in range(4):                                       # colour jitter, in each image's own order
        offset = mean_matrices[:, turn] @ (x @ mean_weights)                                     # (N, 3, 1)
        x = torch.baddbmm(offset, matrices[:, turn], x).clamp(0, 1)
        some = indices_of(params["colour"] & (params["order"][:, turn] == 3))   # hue alone is no affine map
        x[some] = shift_hue(x[some], hue[some])
    x = matrices[:, 4] @ x                                                                       # grayscale
    x = x.unflatten(2, (height, width))                                                       # (N, 3, H, W)

    some = indices_of(params["sigma"] > 0)                                                       # blur
    blur_y = blur_matrix(inside_y[some], sigma[some])[:, None]                                # (n, 1, H, H)
    blur_x = blur_matrix(inside_x[some], sigma[some])[:, None]                                # (n, 1, W, W)
    x[some] = blur_y @ x[some] @ blur_x.transpose(2, 3)

    some = indices_of(params["flip"])                                                            # flip
    columns = mirrored[some][:, None, None, :].expand(-1, 3, height, -1)                      # (n, 3, H, W)
    x[some] = x[some].gather(3, columns)
    return torch.where(inside, x, images).to(images.dtype), boxes


def box_masks(boxes, height, width):
    """Boxes (N, 4) -> inside_x (N, W), inside_y (N, H), bool; mirrored (N, W): each column's in a flip."""
    x1, y1, x2, y2 = boxes.split(1, dim=1)                                                   # (N, 1) each
    column = torch.arange(width, device=boxes.device)
    row = torch.arange(height, device=boxes.device)
    inside_x = (column >= x1) & (column < x2)
    inside_y = (row >= y1) & (row < y2)
    return inside_x, inside_y, torch.where(inside_x, x1 + x2 - 1 - column, column).long()


def affine_maps(params):
    """Colour jitter without hue, then grayscale: matrices (N, 5, 3, 3), mean_matrices (N, 4, 3, 3), float64.

    In turn t the pixel p (3,) becomes matrices[:, t] p + mean_matrices[:, t] m, clamped, where m is the mean
    pixel; grayscale is matrices[:, 4] p. Brightness, contrast and saturation blend the image with black, with
    its mean gray and with its own gray. Hue, and an image without colour jitter, have the identity and zero.
    """
    identity = torch.eye(3, dtype=torch.float64)
    to_gray = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64).expand(3, 3)    # torchvision's luma
    order = params["order"]
    no_hue = torch.ones(len(order))
    factors = torch.stack([params["brightness"], params["contrast"], params["saturation"], no_hue], dim=1)
    factors = factors.gather(1, order)                                          # (N, 4), one a turn
    factors = torch.where(params["colour"][:, None], factors, 1.0)[:, :, None, None]
    is_contrast = (order == 1)[:, :, None, None]
    is_saturation = (order == 2)[:, :, None, None]
    matrices = factors * identity + (1 - factors) * is_saturation * to_gray                     # (N, 4, 3, 3)
    mean_matrices = (1 - factors) * is_contrast * to_gray
    grayscale = torch.where(params["gray"][:, None, None, None], to_gray, identity)             # (N, 1, 3, 3)
    return torch.cat([matrices, grayscale], dim=1), mean_matrices


def shift_hue(x, shift):
    """Pixels x (N, 3, P) in [0, 1], their hue shifted by `shift` (N, 1, 1) full circles: RGB -> HSV -> RGB.

    With H in sixths of the circle, V = high and V S = chroma, HSV's formula gives a channel as
    V - V S clamp(min(k, 4 - k), 0, 1), where k = (n + H) mod 6, and n = 5 for red, 3 for green, 1 for blue.
    """
    high = x.amax(dim=1, keepdim=True)
    low = x.amin(dim=1, keepdim=True)
    chroma = high - low
    r, g, b = x.split(1, dim=1)
    hue = torch.where(high == g, b - r + 2 * chroma, r - g + 4 * chroma)
    hue = torch.where(high == r, g - b, hue) / chroma.clamp(min=1e-12)              # in sixths of the circle
    n = (5 - 2 * torch.arange(3, device=x.device))[:, None]                         # 5, 3, 1
    k = (hue + (n + 6 * shift)) % 6
    return torch.lerp(high, low, torch.minimum(k, 4 - k).clamp(0, 1))               # V - V S ...


def blur_matrix(inside, sigma):
    """Gaussian blur along one axis: inside (N, X) bool, sigma (N, 1) -> (N, X, X), with 17 taps.

    Weights that fall outside the box are dropped and the others renormalised, so that nothing of the
    background leaks in. DIVERGES: torchvision and Pillow mirror or repeat the border instead.
    """
    position = torch.arange(inside.shape[1], device=inside.device, dtype=sigma.dtype)
    distance = position[:, None] - position[None, :]                                             # (X, X)
    near = distance.clamp(-9, 9)                # far weights do not count, and denormal numbers are slow
    weight = torch.exp(-0.5 * (near / sigma[:, :, None]) ** 2)                                # (N, X, X)
    weight = weight * (distance.abs() <= 8) * inside[:, None, :]
    return weight / weight.sum(dim=2, keepdim=True).clamp(min=1e-12)


# ---- 4  Dataset and groups: the work of a loader worker --------------------------------------------------

class Unreadable(OSError):
    """The data is gone, not merely damaged: too many files in a row cannot be read."""


class TooFewImages(ValueError):
    """A group has no three different images: a sample and two backgrounds."""


def read_image(path):
    """An image file as uint8 (3, H, W), RGB, pixel by pixel in memory: so it crops and resizes fastest.

    Pillow reads the header and refuses decompression bombs. A JPEG is decoded by torchvision, anything else,
    and what that refuses, by Pillow. EXIF rotation is ignored, as in torchvision's ImageFolder. OSError if
    the file cannot be used.
    """
    def of_pillow(function, *args):
        try:
            return function(*args)
        except Exception as error:                              # a bad file makes Pillow fail in many ways
            raise OSError(str(error) or type(error).__name__) from error

    if not os.path.isfile(path):                                     # a pipe or a device would block for ever
        raise OSError("not a file")
    with of_pillow(PIL.Image.open, path) as image:
        if image.format in ("JPEG", "MPO"):                 # MPO: several JPEGs, the first is the picture
            data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            try:
                return torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)
            except RuntimeError:
                pass                                    # a rare kind of JPEG, or a broken one: Pillow decides
        if image.mode in ("F", "I") and image.format != "PNG":
            raise OSError(f"pixels of mode {image.mode} have no known range")
        if image.mode.startswith("I"):                         # 16 bits a pixel: Pillow would clip, not scale
            pixels = of_pillow(np.asarray, image)
            image = PIL.Image.fromarray((pixels.clip(0, 65535) / 257).astype(np.uint8))
        return torch.from_numpy(np.array(of_pillow(image.convert, "RGB"))).permute(2, 0, 1)


@dataclasses.dataclass
class Views(torch.utils.data.Dataset):
    """Image files as samples of MakeGroup: each file is decoded once, for two random crops and a background.

    views[address] is a sample; `batches` makes addresses. A file that cannot be read is replaced by another
    one, drawn from the sample's own generator. Unreadable is raised after ten of them.
    needs: generator_for, crop_box, read_image, Unreadable
    """
    paths: Sequence                     # str or bytes; forked workers share a NumPy array, but copy a list
    seed: int = 0
    image_size: int = 256               # S
    fg_size: tuple = (128, 256)         # h and w of a crop are drawn from this range, ends included
    ratio: tuple = (3 / 4, 4 / 3)       # w / h of a crop before it is resized [MoCo v2]
    keep_aspect: bool = False           # whether the resized crop has this ratio, too
    backgrounds: str = "group"          # "group", "dataset" or "none": see MakeGroup

    def __getitem__(self, address):
        epoch, step, group_number, index = address
        generator = generator_for(self.seed, "sample", epoch, index)
        canvas = [self.image_size, self.image_size]         # backgrounds are squashed to it
        unreadable = []
        image, source = self.read(index, unreadable, generator)
        query = self.crop(image, generator)
        key = self.crop(image, generator)
        backgrounds = []
        if self.backgrounds == "group":
            backgrounds = [self.resize(image, canvas)]
        elif self.backgrounds == "dataset":
            others = self.read_two(source, unreadable, generator)
            backgrounds = [self.resize(other, canvas) for other in others]
        return {"query": query, "key": key, "backgrounds": backgrounds, "source": source,
                "seeds": (step, group_number), "unreadable": unreadable}

    def read_two(self, source, unreadable, generator):
        """Two images, neither the one at `source` nor twice the same. Unreadable if there are no such two."""
        found = {}
        for _ in range(100):
            drawn = torch.randint(len(self.paths), (1,), generator=generator).item()
            image, index = self.read(drawn, unreadable, generator)
            if index != source:
                found[index] = image
            if len(found) == 2:
                return list(found.values())
        raise Unreadable("no three different images can be read")

    def read(self, index, unreadable, generator):
        """The image at `index`, or at another index if that cannot be read, and its index."""
        for _ in range(10):
            path = os.fsdecode(self.paths[index])
            try:
                return read_image(path), index
            except OSError as error:                        # the caller counts and names these files
                reason = str(error).partition("\n")[0][:80]
                unreadable.append(index)
                index = torch.randint(len(self.paths), (1,), generator=generator).item()
        raise Unreadable(f"ten files in a row cannot be read, such as {path!r}: {reason}")

    def crop(self, image, generator):
        """A random crop, stretched to random sides, as the paper says: MoCo v2's crop, then a random aspect.

        DIVERGES: the release keeps the crop's aspect, which it draws from (1/2, 2): keep_aspect and ratio.
        """
        top, left, h, w = crop_box(*image.shape[-2:], ratio=self.ratio, generator=generator)
        size = [self.image_size, self.image_size]           # where nothing is pasted
        if self.backgrounds != "none":
            low, high = self.fg_size
            size = torch.randint(low, high + 1, (2,), generator=generator).tolist()      # h, w independently
            if self.keep_aspect:                # into the drawn sides, long to long and short to short
                fit = min(max(size) / max(h, w), min(size) / min(h, w))
                size = [max(1, round(h * fit)), max(1, round(w * fit))]
        return self.resize(image[:, top:top + h, left:left + w], size)

    @staticmethod
    def resize(image, size):
        """uint8 (3, H, W) -> (3, h, w), bilinear with antialiasing.

        The two permutes make a batch with channels_last strides, for which torch is 1.6 times as fast.
        """
        batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]


@dataclasses.dataclass
class MakeGroup:
    """The collate function: samples of a BatchNorm group -> its composites, boxes, augmentation parameters.

    A sample is a dict, from Views or from a data set of your own:
        query, key    uint8 (3, h, w), h and w at most S: two crops of one image
        source        int: which image that is
        backgrounds   a list of uint8 (3, S, S). "group": the image itself, behind crops of other samples;
                      "dataset": two, behind this query and this key; "none": nothing, a crop is the canvas
        seeds         ints, of Views (step, group number): the first sample's decide every draw of the group
        unreadable    indices of files that could not be read; may be absent
    Returns {"query": view, "key": view, "unreadable": indices}. A view is a dict: images uint8 (N, 3, S, S),
    channels_last in memory; boxes (N, 4), where crops are pasted; drawn_boxes (N, 4), for queries a random
    anchor, for keys `boxes` again; and the tensors of `photometric_params`. ValueError for samples of another
    form, and TooFewImages for a group of fewer than three different images.

    DIVERGES: the paper's background is any other training image, for which the release decodes two more
    images a sample ("dataset"). In a "group" they cost no decode, but are not independent of each other.
    needs: generator_for, paste, grid_anchors, jitter_boxes, photometric_params, choose_backgrounds
    """
    seed: int = 0
    image_size: int = 256               # S
    backgrounds: str = "group"          # "group", "dataset" or "none"
    jitter: bool = True
    flip_moves_box: bool = False        # for augmentation of the whole composite, where a flip moves the box

    def __call__(self, samples):
        generator = generator_for(self.seed, "group", *samples[0]["seeds"])
        behind_queries, behind_keys = zip(*self.choose(samples, generator))
        unreadable = []
        for sample in samples:
            unreadable += sample.get("unreadable", [])
        key = self.make_view("key", samples, behind_keys, generator)                                 # Eq. 4
        query = self.make_view("query", samples, behind_queries, generator)                          # Eq. 3
        if self.jitter:                                 # drawn last: without it the composites are the same
            anchors = grid_anchors(self.image_size)
            query["drawn_boxes"] = jitter_boxes(query["boxes"], anchors, generator=generator)   # Sec. 4.2
        return {"query": query, "key": key, "unreadable": unreadable}

    def choose(self, samples, generator):
        """What the query and the key of each sample are pasted on: N pairs of images."""
        count = {"group": 1, "dataset": 2, "none": 0}[self.backgrounds]
        for sample in samples:
            if len(sample["backgrounds"]) != count:
                raise ValueError(f"a sample brings {len(sample['backgrounds'])} backgrounds, "
                                 f"with backgrounds={self.backgrounds!r} it must be {count}")
        if self.backgrounds == "none":                  # a crop covers whatever it is pasted on: here itself
            return [(sample["query"], sample["key"]) for sample in samples]
        if self.backgrounds == "dataset":
            return [sample["backgrounds"] for sample in samples]
        own = [sample["backgrounds"][0] for sample in samples]
        pairs = choose_backgrounds([sample["source"] for sample in samples], generator)
        return [(own[i], own[j]) for i, j in pairs]

    def make_view(self, name, samples, backgrounds, generator):
        """Draws a view's augmentation, and pastes each sample's crop `name` at a random place, uniformly."""
        size = self.image_size
        view = photometric_params(len(samples), generator)
        images = torch.empty(len(samples), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        boxes = torch.empty(len(samples), 4)
        for i, (sample, background) in enumerate(zip(samples, backgrounds)):
            crop = sample[name]
            h, w = crop.shape[1:]
            if crop.dtype != torch.uint8 or max(h, w) > size:
                raise ValueError(f"a crop of {crop.dtype}, {h}x{w}: it must be uint8, at most {size}x{size}")
            top = torch.randint(0, size - h + 1, (1,), generator=generator).item()      # the far edge, too
            left = torch.randint(0, size - w + 1, (1,), generator=generator).item()
            images[i], boxes[i] = paste(background, crop, top, left)
        if self.flip_moves_box:
            x1, y1, x2, y2 = boxes.unbind(dim=1)
            flipped = torch.stack([size - x2, y1, size - x1, y2], dim=1)
            boxes = torch.where(view["flip"][:, None], flipped, boxes)
        return {**view, "images": images, "boxes": boxes, "drawn_boxes": boxes}


def choose_backgrounds(sources, generator):
    """Sources of N samples -> N pairs: at which positions the query's and the key's background stand.

    Each is uniform among the samples of other images. The two are of different images, since a shared
    background could give the positive away. TooFewImages if there are no three different images.
    needs: TooFewImages
    """
    if len(set(sources)) < 3:
        raise TooFewImages("a group needs three different images, a sample and two backgrounds: take larger "
                           "groups, or repair damaged images")
    sources = torch.tensor(sources)
    allowed = sources[:, None] != sources                                                        # (N, N)
    behind_query = torch.multinomial(allowed.float(), 1, generator=generator)                    # (N, 1)
    allowed &= sources[behind_query] != sources
    behind_key = torch.multinomial(allowed.float(), 1, generator=generator)                      # (N, 1)
    return torch.cat([behind_query, behind_key], dim=1).tolist()


def batches(n_images, batch_size, group_size, epochs, seed=0, start_step=0, own_groups=None):
    """The batch sampler of a whole run: step by step, the list of addresses of each group.

    An address is (epoch, step, group number, image's index). Each epoch has its own order and drops the last
    incomplete batch. start_step: where to resume. own_groups: the numbers of this rank's groups; None is all.
    ValueError for fewer images than a batch, and for a batch that groups do not divide.
    needs: generator_for
    """
    if n_images < batch_size or batch_size % group_size:
        raise ValueError(f"no batches of {batch_size} of {n_images} images in groups of {group_size}")
    if own_groups is None:
        own_groups = range(batch_size // group_size)
    steps = n_images // batch_size
    for epoch in range(start_step // steps, epochs):
        order = torch.randperm(n_images, generator=generator_for(seed, "order", epoch))
        for step in range(max(start_step, epoch * steps), (epoch + 1) * steps):
            for group_number in own_groups:
                first = (step - epoch * steps) * batch_size + group_number * group_size
                indices = order[first:first + group_size].tolist()
                yield [(epoch, step, group_number, index) for index in indices]


# ---- 5  Encoders (Sec. 4.3): the detector's own parts, so that fine-tuning adds RPN and predictors alone -

class NarrowResNet(torchvision.models.ResNet):
    """A ResNet with blocks of a quarter of the width, for tests and small studies on a CPU."""

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)


def make_resnet(name):
    """torchvision's ResNet, or `narrow18`, without fc; `.inplanes` is its width.

    needs: NarrowResNet
    """
    if name == "narrow18":
        net = NarrowResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
    else:
        net = getattr(torchvision.models, name)(weights=None)
    net.fc = nn.Identity()
    return net


def roi_pool(features, boxes, size, scale):
    """Eq. 5-6: features (N, C, h, w), boxes (N, 4) or (N, M, 4) -> (N*M, C, size, size), image by image.

    Boxes are in pixels of the image, scale is that of the features. This is detectron2's ROIAlignV2: aligned,
    adaptive number of samples. It runs in float32 whatever autocast gives, since bfloat16 cannot hold box
    corners; dtype and memory format come back as they were. ValueError for boxes of another number of images.
    """
    if len(boxes) != len(features):
        raise ValueError(f"boxes of {len(boxes)} images, features of {len(features)}")
    boxes = boxes.reshape(len(boxes), -1, 4)                                                     # (N, M, 4)
    image = torch.arange(len(boxes), device=boxes.device)[:, None, None].expand(-1, boxes.shape[1], 1)
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    rois = torch.cat([image.to(x.dtype), boxes.to(x.dtype)], dim=2).reshape(-1, 5)
    x = roi_align(x, rois, size, spatial_scale=scale, sampling_ratio=-1, aligned=True)
    if features.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(features.dtype)


def unit(x):
    """Embeddings (..., D) onto the unit sphere, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class C4Encoder(nn.Module):
    """R50-C4: the ResNet up to res4, RoIAlign, res5 as the head, the mean, a two-layer MLP.

    With boxes=None it is MoCo v2's network. It has 27,966,656 parameters for resnet50. roi_size: 14 is
    detectron2's; with image_size / 16 RoIAlign of the whole canvas is the identity.
    needs: make_resnet, roi_pool, unit
    """
    levels = ("c4",)

    def __init__(self, resnet="resnet50", dim=128, roi_size=14):
        super().__init__()
        self.resnet = make_resnet(resnet)
        width = self.resnet.inplanes
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
        self.dim = dim
        self.roi_size = roi_size

    def res4(self, images):
        """(N, 3, H, W) normalised RGB -> (N, 1024, H/16, W/16)."""
        net = self.resnet
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return net.layer3(net.layer2(net.layer1(x)))

    def features(self, images, boxes=None):
        """What a detector's RoI head sees: (N, 1, 2048), or (N*M, 1, 2048) for boxes (N, M, 4)."""
        x = self.res4(images)
        if boxes is not None:
            x = roi_pool(x, boxes, self.roi_size, scale=1 / 16)                                  # Eq. 5, 6
        return self.resnet.layer4(x).mean(dim=(2, 3))[:, None]

    def forward(self, images, boxes=None):
        """(N, 3, H, W), boxes (N, 4) or (N, M, 4) -> embeddings (N, 1, D) or (N*M, 1, D) of length 1."""
        return unit(self.projector(self.features(images, boxes)))


class FPNEncoder(nn.Module):
    """R50-FPN: every box is pooled on all levels P2..P5, one head serves them, each level has its own queue.

    fpn has 256 channels and BatchNorm after every convolution, as detectron2's FPN with NORM "BN". box_head
    is 4 x (conv 3x3, BatchNorm, ReLU), fc 1024, ReLU, as detectron2's FastRCNNConvFCHead; its BatchNorm sees
    the levels together [released code]. projector is the two-layer MLP. DIVERGES: it has nn.Linear's init,
    the released one Xavier's, with N(0, .01) for the last layer. 43,242,688 parameters for resnet50.
    needs: make_resnet, roi_pool, unit
    """
    levels = ("p2", "p3", "p4", "p5")

    def __init__(self, resnet="resnet50", dim=128):
        super().__init__()
        self.resnet = make_resnet(resnet)
        width = self.resnet.inplanes
        widths = [width // 8, width // 4, width // 2, width]
        self.fpn = FeaturePyramidNetwork(widths, 256, norm_layer=nn.BatchNorm2d)
        head = OrderedDict()
        for i in range(1, 5):
            head[f"conv{i}"] = nn.Conv2d(256, 256, 3, padding=1, bias=False)
            head[f"bn{i}"] = nn.BatchNorm2d(256)
            head[f"relu{i}"] = nn.ReLU(inplace=True)
            nn.init.kaiming_normal_(head[f"conv{i}"].weight, mode="fan_out", nonlinearity="relu")
        head["flatten"] = nn.Flatten()
        head["fc1"] = nn.Linear(256 * 7 * 7, 1024)
        head["relu5"] = nn.ReLU(inplace=True)
        nn.init.kaiming_uniform_(head["fc1"].weight, a=1)                       # detectron2's c2_xavier_fill
        nn.init.zeros_(head["fc1"].bias)
        self.box_head = nn.Sequential(head)
        self.projector = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(inplace=True), nn.Linear(1024, dim))
        self.dim = dim

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
        pooled = []
        for level, level_boxes, stride in zip(self.pyramid(images), boxes, (4, 8, 16, 32), strict=True):
            x = roi_pool(level, level_boxes, size=7, scale=1 / stride)                           # Eq. 5, 6
            pooled.append(x.permute(0, 2, 3, 1))
        x = torch.stack(pooled, dim=1)                                                   # (N*M, 4, 7, 7, 256)
        x = x.flatten(0, 1).permute(0, 3, 1, 2)                         # (N*M*4, 256, 7, 7), channels last
        return self.box_head(x).unflatten(0, (-1, 4))

    def forward(self, images, boxes):
        """(N, 3, H, W) and boxes as in `features` -> embeddings (N*M, 4, D) of length 1, one a level."""
        return unit(self.projector(self.features(images, boxes)))


# ---- 6  Contrast (Sec. 4.1): queue of keys, InfoNCE, momentum update -------------------------------------

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
        """keys (B, L, D), any B, the same on every rank, overwrite the oldest and take the queue's dtype."""
        levels, dim, size = self.keys.shape
        if keys.shape[1:] != (levels, dim):
            raise ValueError(f"keys of {tuple(keys.shape)} for a queue of levels x dim = {levels} x {dim}")
        skip = max(0, len(keys) - size)                # of more keys than the queue holds, the last ones stay
        column = (self.ptr + torch.arange(skip, len(keys), device=self.ptr.device)) % size
        self.keys[:, :, column] = keys[skip:].permute(1, 2, 0).to(self.keys.dtype)
        self.ptr.add_(len(keys)).remainder_(size)
        self.filled.add_(len(keys)).clamp_(max=size)


def info_nce(q, k, queue, temperature=0.2):
    """Eq. 2 per level: q, k (N, L, D), queue (L, D, K) -> loss (L,), mean over N; logits (N, L, 1 + K).

    The positive is the first logit. Gradients reach q alone. Computed in q's dtype, float32 at least, inside
    autocast too. If all keys are alike, the loss is log(1 + K): 11.09 for K = 65536.
    """
    if q.shape != k.shape:
        raise ValueError(f"q of {tuple(q.shape)}, k of {tuple(k.shape)}: each query has one key")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(dtype)
        k = k.detach().to(dtype)
        queue = queue.detach().to(dtype)
        positive = (q * k).sum(dim=2, keepdim=True)                                              # (N, L, 1)
        negative = torch.einsum("nld,ldk->nlk", q, queue)                                        # (N, L, K)
        logits = torch.cat([positive, negative], dim=2) / temperature
        return (logits.logsumexp(dim=2) - logits[:, :, 0]).mean(dim=0), logits                   # Eq. 2


@torch.no_grad()
def momentum_update(encoder_k, encoder_q, momentum=0.999):
    """k <- momentum k + (1 - momentum) q, in place, for every parameter k of encoder_k and q of encoder_q.

    Parameters only: the key encoder's BatchNorm statistics are those of its own forward passes, as in MoCo.
    """
    for k, q in zip(encoder_k.parameters(), encoder_q.parameters(), strict=True):
        k.lerp_(q, 1 - momentum)
