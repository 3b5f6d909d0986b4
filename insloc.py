"""InsLoc: Instance Localization for Self-supervised Detection Pretraining (arXiv 2102.08318), the method.

The sections stand in the order in which data meets them:

    1 sampling and pasting       two crops of an image, pasted on backgrounds          Sec. 4.1, Eq. 3-4
    2 box jitter                 true box -> an anchor that overlaps it                Sec. 4.2, Fig. 3
    3 photometric augmentation   MoCo v2's, on whole tensors, inside the boxes         Sec. 5
    4 dataset and groups         a loader worker's way from files to a BatchNorm group
    5 encoders                   composite and box -> embeddings, C4 and FPN           Sec. 4.3, Eq. 5-6
    6 contrast                   queue of keys, InfoNCE, momentum update               Eq. 2

Nothing here knows of processes or command lines, and importing it does nothing: the loop is in pretrain.py.
Every random draw takes a generator. Most functions and classes can be copied out alone; the others say what
they need ("needs: ...").

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

    Seeding by (seed, epoch, sample) instead of by process makes every draw independent of the number of ranks
    and of workers, and of where a run was stopped and resumed. The seeds are hashed, since neighbouring integers
    make poor ones.
    """
    digest = hashlib.blake2b(repr(seeds).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def crop_box(height, width, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), generator=None):
    """Where the random crop lies in an image of (height, width) pixels: (top, left, h, w), ints.

    The area fraction is U(scale), the aspect w / h log-uniform in `ratio`. After ten tries that do not fit,
    it is the largest centre crop with an allowed aspect, as in torchvision's RandomResizedCrop. [MoCo v2,
    whose augmentation the paper takes]
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


def paste(background, foreground, top, left, out=None):
    """The composition C of Eq. 3-4: background (3, S, S), foreground (3, h, w) -> new composite, box (4,).

    Any dtype; the box is float32. The inputs stay untouched. out: a (3, S, S) tensor to write into.
    ValueError if the foreground leaves the canvas.
    """
    h, w = foreground.shape[-2:]
    if top < 0 or left < 0 or top + h > background.shape[-2] or left + w > background.shape[-1]:
        raise ValueError(f"a {h}x{w} foreground at top {top}, left {left} leaves the canvas "
                         f"of {background.shape[-2]}x{background.shape[-1]}")
    composite = background.clone() if out is None else out.copy_(background)
    composite[:, top:top + h, left:left + w] = foreground
    return composite, torch.tensor([left, top, left + w, top + h], dtype=torch.float32)              # Eq. 3


# ---- 2  Box jitter (Sec. 4.2, Fig. 3) --------------------------------------------------------------------

def grid_anchors(image_size=256, stride=16, sizes=None, ratios=(0.5, 0.75, 1.0, 1.5, 2.0)):
    """RPN's anchors on a square canvas: (A, 4) float32, by row, column, size, ratio; 5120 for the defaults.

    sizes: 32, 64, 128, 256 on a canvas of 256. On other canvases they scale with it, since a large box would
    match no anchor of fixed sizes; the stride stays. ratio = h / w at area size**2. Centres lie at 0, stride,
    2 stride, ...; boxes are not clipped. [values: released code]
    """
    sizes = sizes or [image_size / n for n in (8, 4, 2, 1)]
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

    Only the query's box is jittered: its pooled features must then say "the instance" although the box also
    covers background. A box that no anchor matches gets the anchor of highest IoU. DIVERGES: the release
    thins the matches by NMS with random scores first; the paper does not mention it.
    """
    iou = box_iou(boxes, anchors)                                                                # (N, A)
    matches = (iou > min_iou).float()
    best = F.one_hot(iou.argmax(dim=1), len(anchors)).float()
    weights = torch.where(matches.any(dim=1, keepdim=True), matches, best)
    return anchors[torch.multinomial(weights, 1, generator=generator).squeeze(1)]


# ---- 3  Photometric augmentation (Sec. 5 "data augmentation", MoCo v2's) on whole tensors ----------------

def photometric_params(n, generator=None):
    """MoCo v2's augmentation drawn for n images: a dict of CPU tensors, one row an image.

    order (n, 4) long: which of 0 brightness, 1 contrast, 2 saturation, 3 hue comes first, second, ...;
    brightness, contrast, saturation (n,) factors in [0.6, 1.4] and hue (n,) in [-0.1, 0.1], as torchvision's
    adjust_* functions take them; colour (p .8), gray (p .2), flip (p .5) (n,) bool; sigma (n,) in pixels,
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
        "colour": uniform(0, 1) < 0.8,
        "gray": uniform(0, 1) < 0.2,
        "sigma": uniform(0.1, 2.0) * (uniform(0, 1) < 0.5),
        "flip": uniform(0, 1) < 0.5,
    }


def photometric(images, params, boxes=None):
    """Colour jitter, grayscale, blur and flip of images (N, 3, H, W) in [0, 1] -> new images, boxes.

    params: see `photometric_params`; they and the boxes stay on the CPU, so that no line waits for a GPU.
    With boxes (N, 4), on whole pixels, everything happens inside them as if each were an image of its own,
    and no pixel outside changes; a flip turns the inside round and leaves the box where it is. With None the
    whole images are augmented. DIVERGES: the release augments the composite (`--aug-on composite`); the paper
    says foreground. needs: affine_maps, shift_hue, blur_matrix
    """
    n, _, height, width = images.shape
    whole = torch.tensor([[0.0, 0.0, width, height]]).expand(n, 4)
    hue_turn = (params["order"] == 3).float().argmax(dim=1)
    hue_turn = torch.where(params["colour"], hue_turn, 4)
    # Work on the images in the order of their turn for hue, 4 for none: those that have an operation before
    # hue, or after it, are then a slice. Turn t's images start at starts[t].
    by_hue = hue_turn.argsort()
    starts = [(hue_turn < turn).sum().item() for turn in range(5)]
    blurred = (params["sigma"][by_hue] > 0).float().argsort(descending=True)
    n_blurred = (params["sigma"] > 0).sum().item()

    # All that the device needs goes there as one matrix (N, 99), in one copy.
    parts = (*affine_maps(params), params["hue"], params["sigma"], params["flip"],
             whole if boxes is None else boxes)
    packed = torch.cat([part.reshape(n, -1) for part in parts], dim=1)[by_hue]
    indices = torch.stack([by_hue, by_hue.argsort(), blurred], dim=1)
    packed = torch.cat([packed, indices], dim=1).to(images.device, images.dtype, non_blocking=True)
    matrices, mean_matrices, hue, sigma, flip, box, indices = packed.split([45, 45, 1, 1, 1, 4, 3], dim=1)
    matrices = matrices.reshape(n, 5, 3, 3)
    mean_matrices = mean_matrices.reshape(n, 5, 3, 3)
    by_hue, back, blurred = indices.long().unbind(dim=1)

    x1, y1, x2, y2 = box.round().split(1, dim=1)                                                 # (N, 1) each
    column = torch.arange(width, device=images.device)
    row = torch.arange(height, device=images.device)
    inside_x = (column >= x1) & (column < x2)                                                    # (N, W)
    inside_y = (row >= y1) & (row < y2)                                                          # (N, H)
    inside = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]                           # (N, 1, H, W)
    mean_weights = inside.flatten(1)[:, :, None] / ((x2 - x1) * (y2 - y1))[:, :, None]           # (N, HW, 1)

    x = images.flatten(2)[by_hue]                                                                # (N, 3, HW)

    def change(turn, first, last):                      # in place: the affine operation of a slice's images
        if first < last:
            part = x[first:last]
            offset = mean_matrices[first:last, turn] @ (part @ mean_weights[first:last])         # (n, 3, 1)
            torch.clamp(torch.baddbmm(offset, matrices[first:last, turn], part), 0, 1, out=part)

    for turn in range(3):
        change(turn, starts[turn + 1], starts[4])               # what comes before hue
    if starts[4]:
        x[:starts[4]] = shift_hue(x[:starts[4]], hue[:starts[4], :, None])
    for turn in range(1, 4):
        change(turn, 0, starts[turn])                           # what comes after it
    x = (matrices[:, 4] @ x).unflatten(2, (height, width))                                      # grayscale

    if n_blurred:
        blurred = blurred[:n_blurred]
        blur_y = blur_matrix(inside_y[blurred], sigma[blurred])
        blur_x = blur_matrix(inside_x[blurred], sigma[blurred])
        x[blurred] = blur_y[:, None] @ x[blurred] @ blur_x[:, None].transpose(2, 3)

    mirrored = torch.where(inside_x & (flip > 0), x1 + x2 - 1 - column, column).long()           # (N, W)
    x = x.gather(3, mirrored[:, None, None, :].expand_as(x))
    return torch.where(inside[back], x[back], images), boxes


def affine_maps(params):
    """Colour jitter without hue, then grayscale, as five affine maps an image: two (N, 5, 3, 3) tensors.

    In turn t the pixel p (3,) becomes matrices[:, t] p + mean_matrices[:, t] m, clamped, where m is the mean
    pixel. Brightness, contrast and saturation blend the image with black, with its mean gray and with its own
    gray; hue, and an image without jitter, have the identity and zero.
    """
    identity = torch.eye(3, dtype=torch.float64)
    to_gray = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64).expand(3, 3)    # ITU-R 601 luma
    order = params["order"]
    no_hue = torch.ones(len(order))
    factors = torch.stack([params["brightness"], params["contrast"], params["saturation"], no_hue], dim=1)
    factors = factors.gather(1, order)                                          # (N, 4), one a turn
    factors = torch.where(params["colour"][:, None], factors, 1.0)[:, :, None, None]
    is_contrast = (order == 1)[:, :, None, None]
    is_saturation = (order == 2)[:, :, None, None]
    matrices = factors * identity + (1 - factors) * is_saturation * to_gray                     # (N, 4, 3, 3)
    mean_matrices = (1 - factors) * is_contrast * to_gray
    last = torch.where(params["gray"][:, None, None, None], to_gray, identity)                  # (N, 1, 3, 3)
    return torch.cat([matrices, last], dim=1), torch.cat([mean_matrices, torch.zeros_like(last)], dim=1)


def shift_hue(x, turns):
    """Hue of pixels x (N, 3, P) in [0, 1] turned by `turns` (N, 1, 1) full circles: RGB -> HSV -> RGB."""
    high = x.amax(dim=1, keepdim=True)
    low = x.amin(dim=1, keepdim=True)
    chroma = high - low
    r, g, b = x.split(1, dim=1)
    hue = torch.where(high == g, b - r + 2 * chroma, r - g + 4 * chroma)
    hue = torch.where(high == r, g - b, hue) / chroma.clamp(min=1e-12)              # in sixths of the circle
    # Each channel falls from high to low over one sixth of the circle, stays there for two, and rises; red,
    # green and blue stand 5, 3 and 1 sixths ahead.
    ahead = (5 - 2 * torch.arange(3, device=x.device))[:, None]
    k = (hue + (ahead + 6 * turns)) % 6
    return torch.lerp(high, low, torch.minimum(k, 4 - k).clamp(0, 1))


def blur_matrix(inside, sigma):
    """Gaussian blur along one axis: inside (N, X) bool, sigma (N, 1) -> (N, X, X), with 17 taps.

    Weights that fall outside the box are dropped and the others renormalised, so that nothing of the
    background leaks in. DIVERGES: torchvision and Pillow mirror or repeat the border instead.
    """
    position = torch.arange(inside.shape[1], device=inside.device, dtype=sigma.dtype)
    distance = position[:, None] - position[None, :]                                             # (X, X)
    weight = torch.exp(-0.5 * (distance.clamp(-9, 9) / sigma[:, :, None]) ** 2)                  # (N, X, X)
    weight = weight * (distance.abs() <= 8) * inside[:, None, :]
    return weight / weight.sum(dim=2, keepdim=True).clamp(min=1e-12)


# ---- 4  Dataset and groups: the work of a loader worker --------------------------------------------------

class Unreadable(OSError):
    """The data is gone, not merely damaged: too many files in a row cannot be read."""


class TooFewImages(ValueError):
    """A group has no three different images, so that a background would show the sample itself."""


def read_image(path):
    """An image file as uint8 (3, H, W), RGB, pixel by pixel in memory: so it crops and resizes fastest.

    Pillow reads the header and refuses decompression bombs. A JPEG is decoded by torchvision, anything else,
    and what that refuses, by Pillow. EXIF rotation is ignored, as in torchvision's ImageFolder. Any exception
    means that the file cannot be used.
    """
    if not os.path.isfile(path):                                     # a pipe or a device would block for ever
        raise OSError("not a file")
    with PIL.Image.open(path) as image:
        if image.format in ("JPEG", "MPO"):                 # MPO: several JPEGs, the first is the picture
            data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            try:
                return torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)
            except RuntimeError:
                pass                                    # a rare kind of JPEG, or a broken one: Pillow decides
        if image.mode in ("F", "I") and image.format != "PNG":
            raise OSError(f"pixels of mode {image.mode} have no known range")
        if image.mode.startswith("I"):                         # 16 bits a pixel: Pillow would clip, not scale
            image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@dataclasses.dataclass
class Views(torch.utils.data.Dataset):
    """Eq. 3-4 up to the pasting: an image, decoded once, gives two random resized crops and a background.

    Items are asked for by address (epoch, step, group number, index), see `batches`; an item is a dict: query,
    key uint8 (3, h, w), backgrounds (a list of uint8 (3, S, S)), source (the image's index), unreadable
    (indices), seeds (step, group number). A file that cannot be read is replaced by another one, drawn from
    the sample's own generator. Unreadable after ten of them.
    needs: generator_for, crop_box, read_image, Unreadable
    """
    paths: Sequence                     # str or bytes; forked workers share a NumPy array, but copy a list
    seed: int = 0
    image_size: int = 256
    fg_size: tuple = (128, 256)         # sides of a crop, ends included
    ratio: tuple = (3 / 4, 4 / 3)       # w / h of the crop before it is resized
    keep_aspect: bool = False           # fit the crop into the drawn sides, do not stretch it, as released
    backgrounds: str = "group"          # or "dataset": two more images for this sample, as released; or "none"

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
                "unreadable": unreadable, "seeds": (step, group_number)}

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
            try:
                return read_image(os.fsdecode(self.paths[index])), index
            except Exception as error:          # decoders fail in many ways; the caller counts and names
                reason = (str(error) or type(error).__name__).splitlines()[0][:80]
                unreadable.append(index)
                index = torch.randint(len(self.paths), (1,), generator=generator).item()
        path = os.fsdecode(self.paths[unreadable[-1]])
        raise Unreadable(f"ten files in a row cannot be read, such as {path!r}: {reason}")

    def crop(self, image, generator):
        top, left, h, w = crop_box(*image.shape[-2:], ratio=self.ratio, generator=generator)
        size = [self.image_size, self.image_size]
        if self.backgrounds != "none":
            low, high = self.fg_size
            size = torch.randint(low, high + 1, (2,), generator=generator).tolist()    # h and w independently
            if self.keep_aspect:                # into the drawn sides, long to long and short to short
                fit = min(max(size) / max(h, w), min(size) / min(h, w))
                size = [max(1, round(h * fit)), max(1, round(w * fit))]
        return self.resize(image[:, top:top + h, left:left + w], size)

    @staticmethod
    def resize(image, size):
        """Memory stays pixel by pixel, which torch sees by the strides of a batch: 1.6 times as fast."""
        batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]


@dataclasses.dataclass
class MakeGroup:
    """The collate function: the samples of a BatchNorm group -> composites, boxes, augmentation parameters.

    Returns {"query": view, "key": view, "unreadable": indices}. A view is a dict: images uint8 (N, 3, S, S)
    in channels_last memory, boxes (N, 4) the pasted ones, drawn_boxes (N, 4) (differ for queries only), and the
    tensors of `photometric_params`.

    Backgrounds come from the other samples of the group and cost no decode. Each alone is a uniformly random
    other training image, but within a group they are not independent. DIVERGES: the release decodes two more
    images a sample (backgrounds="dataset").
    needs: generator_for, paste, grid_anchors, jitter_boxes, photometric_params, choose_backgrounds
    """
    seed: int = 0
    image_size: int = 256
    backgrounds: str = "group"
    jitter: bool = True
    flip_moves_box: bool = False        # for augmentation of the whole composite, where a flip moves the box

    def __call__(self, samples):
        generator = generator_for(self.seed, "group", *samples[0]["seeds"])
        size = self.image_size
        backgrounds = [sample["backgrounds"] for sample in samples]
        if self.backgrounds == "none":      # a crop that fills the canvas covers whatever it is pasted on
            backgrounds = [[sample["query"], sample["key"]] for sample in samples]
        elif self.backgrounds == "group":
            pairs = choose_backgrounds([sample["source"] for sample in samples], generator)
            backgrounds = [[backgrounds[i][0] for i in pair] for pair in pairs]
        group = {"unreadable": [index for sample in samples for index in sample.get("unreadable", [])]}
        for side, name in ((1, "key"), (0, "query")):      # jitter is drawn last: it changes no composite
            view = photometric_params(len(samples), generator)
            images = torch.empty(len(samples), size, size, 3, dtype=torch.uint8)
            if torch.utils.data.get_worker_info():          # a worker would otherwise copy it to hand it over
                images.share_memory_()
            view["images"] = images.permute(0, 3, 1, 2)                             # pixel by pixel in memory
            view["boxes"] = torch.empty(len(samples), 4)
            for i, sample in enumerate(samples):
                h, w = sample[name].shape[-2:]
                top = torch.randint(0, size - h + 1, (1,), generator=generator).item()
                left = torch.randint(0, size - w + 1, (1,), generator=generator).item()
                _, view["boxes"][i] = paste(backgrounds[i][side], sample[name], top, left, view["images"][i])
            if self.flip_moves_box:
                x1, y1, x2, y2 = view["boxes"].unbind(dim=1)
                flipped = torch.stack([size - x2, y1, size - x1, y2], dim=1)
                view["boxes"] = torch.where(view["flip"][:, None], flipped, view["boxes"])
            view["drawn_boxes"] = view["boxes"]
            if self.jitter and name == "query":                                 # Sec. 4.2: the query alone
                view["drawn_boxes"] = jitter_boxes(view["boxes"], grid_anchors(size), generator=generator)
            group[name] = view
        return group


def choose_backgrounds(sources, generator):
    """Indices of N images -> (N, 2): for each sample the positions of query's and key's background.

    Each is uniform among the samples of other images. The two are of different images, since a shared
    background could give the positive away. TooFewImages if there are no three different images.
    needs: TooFewImages
    """
    if len(set(sources)) < 3:
        raise TooFewImages("a group needs three different images, a sample and two backgrounds: take larger "
                         "groups, or repair damaged images")
    sources = torch.tensor(sources)
    for_query = sources[:, None] != sources                                                      # (N, N)
    query = torch.multinomial(for_query.float(), 1, generator=generator)                         # (N, 1)
    for_key = for_query & (sources[query] != sources)
    key = torch.multinomial(for_key.float(), 1, generator=generator)
    return torch.cat([query, key], dim=1).tolist()


def batches(n_images, batch_size, group_size, epochs, seed=0, start_step=0, own_groups=None):
    """The batch sampler of a whole run: step by step, the list of addresses of each group.

    An address is (epoch, step, group number, index).

    A step takes batch_size images, split into batch_size / group_size groups; the last incomplete batch of an
    epoch is dropped. start_step: resume there. own_groups: the numbers of this rank's groups (a
    range); None is all of them. needs: generator_for
    """
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
    """Blocks at a quarter of their width, for tests and small studies on a CPU."""

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)


def make_resnet(name):
    """torchvision's ResNet, or `narrow18`, without fc; `.inplanes` is its width.    needs: NarrowResNet"""
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
    corners; dtype and memory format come back as they were (roi_align itself returns contiguous).
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

    With boxes=None it is MoCo v2's network. Parameters: 27,966,656 for resnet50. roi_size: 14 [detectron2];
    with image_size / 16 RoIAlign of the whole canvas is the identity. needs: make_resnet, roi_pool, unit
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

    fpn: 256 channels, BatchNorm on lateral and output convolutions, as detectron2's FPN with NORM "BN".
    box_head: 4 x (conv 3x3, BatchNorm, ReLU), fc 1024, ReLU, as detectron2's FastRCNNConvFCHead; its
    BatchNorm sees the levels together. projector: the two-layer MLP. Parameters: 43,242,688 for resnet50.
    [head: released code]            needs: make_resnet, roi_pool, unit
    """
    levels = ("p2", "p3", "p4", "p5")

    def __init__(self, resnet="resnet50", dim=128):
        super().__init__()
        self.resnet = make_resnet(resnet)
        widths = [self.resnet.inplanes // n for n in (8, 4, 2, 1)]
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
        for level, level_boxes, stride in zip(self.pyramid(images), boxes, (4, 8, 16, 32)):
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
