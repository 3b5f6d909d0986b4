"""Damaged files of every kind: a reader raises or gives a right result. It never crashes, hangs."""
import collections
import io
import json
import os
import random
import resource
import signal

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp

from insloc import make_resnet, read_image
from weights import read_weights

pytestmark = pytest.mark.slow
LIMIT = 3 * 2 ** 30                         # bytes that a small file may make a reader reserve
PICTURES = [("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}),
            ("JPEG", "CMYK", {}), ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}),
            ("PNG", "I;16", {}), ("GIF", "P", {}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
            ("BMP", "RGB", {}), ("BMP", "P", {}), ("TIFF", "RGB", {}),
            ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("PPM", "RGB", {})]


def sources():
    """{kind of file: (its name, its bytes, its reader)}."""
    torch.manual_seed(0)
    trunk = {name: x.half() if x.is_floating_point() else x
             for name, x in make_resnet("narrow18").state_dict().items()}
    found, buffer = {}, io.BytesIO()
    torch.save({"state_dict": trunk, "epoch": 3}, buffer)
    found["zip"] = "x.pth", buffer.getvalue(), read_weights
    buffer = io.BytesIO()
    torch.save(trunk, buffer, _use_new_zipfile_serialization=False)
    found["torch.save before 1.6"] = "x.pth", buffer.getvalue(), read_weights
    found["safetensors"] = "x.safetensors", safetensors.torch.save(trunk), read_weights
    rng = np.random.default_rng(0)
    smooth = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 30))
    for kind, mode, options in PICTURES:
        buffer = io.BytesIO()
        deep = PIL.Image.fromarray(np.asarray(smooth)[:, :, 0].astype(np.uint16) * 257)
        (deep if mode == "I;16" else smooth.convert(mode)).save(buffer, kind, **options)
        found[" ".join([kind, mode, *map(str, options.values())])] = "x.img", buffer.getvalue(), read_image
    return found


def mutate(data, rng):
    """Flips a bit, writes noise, drops, repeats, sets a size to an absurd one, cuts; one to four times."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, n = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 1000))
        if rng.random() < 0.3:                              # headers and directories stand at the ends
            at = min(at, 200) if rng.random() < 0.5 else max(at, len(data) - 200)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + n] = rng.randbytes(n)
        elif kind == 2:
            del data[at:at + n]
        elif kind == 3:
            other = rng.randrange(len(data))
            data[at:at] = data[other:other + n]
        elif kind == 4:
            size = rng.choice((2, 4, 8))
            value = rng.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
            data[at:at + size] = value.to_bytes(size, rng.choice(("little", "big")))
        else:
            del data[at:]
        data = data or bytearray(1)
    return bytes(data)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(torch.equal(x, b.backbone[name]) for name, x in a.backbone.items())


def read_damaged(folder, count):
    """In a process of its own, as it may crash, with a limit of memory and of time for each file."""
    with open("/proc/self/statm") as f:
        reserved = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (reserved + LIMIT, reserved + LIMIT))
    tally = collections.Counter()
    for name, (file, data, read) in sources().items():
        path = f"{folder}/{file}"
        with open(path, "wb") as f:
            f.write(data)
        wanted = read(path)
        for i in range(count):
            with open(path, "wb") as f:
                f.write(mutate(data, random.Random(f"{name} {i}")))
            with open(f"{folder}/now", "w") as f:
                f.write(f"{name}, case {i}")
            signal.alarm(20)                                # its default is to end the process
            try:
                verdict = "right" if equal(wanted, read(path)) else "other values"
            except Exception as error:                      # a picture may raise anything, see Views.read
                clear = isinstance(error, (ValueError, OSError)) or read is read_image
                verdict = "error" if clear else f"unclear: {type(error).__name__}: {error}"
            signal.alarm(0)
            tally[f"{name}: {verdict}"] += 1
    with open(f"{folder}/tally", "w") as f:
        json.dump(tally, f)


def test_damaged_files_end_in_an_error_or_a_right_result(tmp_path):
    """20 mutations of each kind (FUZZ=1000 for a long night). Only zip has check sums: elsewhere changed
    numbers pass as numbers."""
    count = int(os.environ.get("FUZZ", 20))
    child = mp.get_context("spawn").Process(target=read_damaged, args=(str(tmp_path), count))
    child.start()
    child.join(200 + 5 * count)
    assert child.exitcode == 0, f"{(tmp_path / 'now').read_text()}: {child.exitcode}"   # -11 crash, -14 hang
    tally = json.loads((tmp_path / "tally").read_text())
    assert sum(tally.values()) == count * len(sources())
    assert not [name for name in tally if "unclear" in name or name == "zip: other values"]
