"""Section 4 of insloc.py, dataset and groups, against Pillow, counts and samples of solid colours."""
import collections
import io
import itertools
import math
import os
import random
import signal

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from conftest import iou_of_pairs, seeded, uneven
from test_photometric import inside_mask, nothing

import insloc
from insloc import (MakeGroup, TooFewImages, Unreadable, Views, batches, choose_backgrounds, grid_anchors,
                    photometric, read_image)

sides = pytest.mark.parametrize("name", ["query", "key"])


def picture(height, width, seed=0):
    """Smooth, so that JPEG keeps it."""
    small = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), PIL.Image.Resampling.BICUBIC)


def solid_files(folder, n):
    """n files, file i all in the colour (10 i + 5, 0, 0)."""
    for i in range(n):
        PIL.Image.new("RGB", (30, 24), (10 * i + 5, 0, 0)).save(folder / f"{i:03}.png")
    return [str(folder / f"{i:03}.png") for i in range(n)]


def files_in(*images):
    """Of solid_files, those that are seen."""
    return {(colour - 5) // 10 for image in images for colour in image[0].unique().tolist()}


def damage(path, kind="text"):
    """A file that is no image, in the place of `path`."""
    whole = io.BytesIO()
    picture(64, 64).save(whole, format="PNG" if kind == "half PNG" else "JPEG", quality=95)
    half = whole.getvalue()[:len(whole.getvalue()) // 2]
    path.write_bytes({"text": b"not an image\n" * 20, "empty": b"", "header": half[:15]}.get(kind, half))


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- read_image

@pytest.mark.parametrize("mode, suffix, tolerance", [
    ("RGB", "jpg", 3), ("L", "jpg", 1), ("CMYK", "jpg", 3), ("RGB", "png", 0), ("L", "png", 0),
    ("RGBA", "png", 0), ("LA", "png", 0), ("P", "png", 0), ("1", "png", 0), ("P", "gif", 0)])
@pytest.mark.parametrize("height, width", [(33, 50), (1, 1), (1, 70)])
def test_read_image_is_pillows_rgb(tmp_path, mode, suffix, tolerance, height, width):
    image = picture(height, width)
    if mode in ("RGBA", "LA"):
        image.putalpha(picture(height, width, 1).convert("L"))
    image.convert(mode).save(tmp_path / f"image.{suffix}")
    read = read_image(tmp_path / f"image.{suffix}")
    assert read.dtype == torch.uint8 and read.shape == (3, height, width)
    expected = np.asarray(PIL.Image.open(tmp_path / f"image.{suffix}").convert("RGB")).astype(int)
    assert np.abs(read.permute(1, 2, 0).numpy() - expected).max() <= tolerance


def test_read_image_scales_16_bits(tmp_path):
    levels = np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16)
    PIL.Image.fromarray(levels).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png").numpy() == levels // 257).all()


@pytest.mark.parametrize("form, tolerance", [("JPEG", 40), ("PNG", 0)])     # ImageNet has a PNG called .JPEG
def test_read_image_ignores_rotation_and_the_files_name(tmp_path, form, tolerance):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6                                            # turned by 90 degrees, says the camera
    picture(20, 30).save(tmp_path / "image.jpg", format=form, exif=exif)
    read = read_image(tmp_path / "image.jpg").permute(1, 2, 0).numpy()
    assert np.abs(read - np.asarray(picture(20, 30)).astype(int)).max() <= tolerance


def test_read_image_leaves_what_torchvision_refuses_to_pillow(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError

    picture(20, 30).save(tmp_path / "image.jpg")
    monkeypatch.setattr(torchvision.io, "decode_jpeg", refuse)
    expected = np.asarray(PIL.Image.open(tmp_path / "image.jpg"))
    assert np.array_equal(read_image(tmp_path / "image.jpg").permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_read_image_refuses_decompression_bombs_by_their_header(tmp_path, suffix, monkeypatch):
    picture(20, 20).save(tmp_path / f"bomb.{suffix}")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 199)             # Pillow's error is above twice this
    with pytest.raises(OSError, match="decompression bomb"):
        read_image(tmp_path / f"bomb.{suffix}")


@pytest.mark.parametrize("kind", [
    "text", "empty", "header", "half", "half PNG", "missing", "folder", "pipe", "float"])
def test_read_image_raises_for_what_is_no_image(tmp_path, kind):
    path = tmp_path / "image.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "float":
        PIL.Image.new("F", (4, 4), 1).save(path, format="TIFF")         # of no known range
    elif kind != "missing":
        damage(path, kind)
    # Nobody writes into the pipe, so that opening it waits: better an error than a test that never ends.
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for ever"))
    signal.alarm(20)
    try:
        with pytest.raises(OSError):
            read_image(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", [KeyError("x"), SyntaxError("broken PNG"), ZeroDivisionError()])
def test_whatever_pillow_raises_says_that_the_file_cannot_be_used(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    picture(20, 30).save(tmp_path / "image.png")
    monkeypatch.setattr(PIL.Image.Image, "convert", fail)
    with pytest.raises(OSError) as caught:
        read_image(tmp_path / "image.png")
    assert caught.value.__cause__ is error and str(caught.value)


@pytest.mark.parametrize("error", [NameError, AttributeError, TypeError, ValueError])
def test_a_bug_in_read_image_is_no_unreadable_file(tmp_path, monkeypatch, error):
    def bug(*_, **__):
        raise error("a slip of the keyboard")

    picture(20, 30).save(tmp_path / "image.jpg")
    monkeypatch.setattr(np, "fromfile", bug)
    with pytest.raises(error, match="keyboard"):
        Views([str(tmp_path / "image.jpg")])[0, 0, 0, 0]


# ---- Views

def test_crops_and_background_equal_pillows_resize(tmp_path, monkeypatch):
    picture(90, 140).save(tmp_path / "a.png")
    parts = [(10, 30, 60, 80), (0, 5, 90, 40)]
    answers = {(90, 140, (3 / 4, 4 / 3)): iter(parts)}
    monkeypatch.setattr(insloc, "crop_box", lambda h, w, ratio, generator: next(answers[h, w, ratio]))
    item = Views([str(tmp_path / "a.png")], image_size=48, fg_size=(40, 40))[0, 0, 0, 0]
    images, sizes = [item["query"], item["key"], *item["backgrounds"]], (40, 40, 48)
    for image, (top, left, h, w), size in zip(images, [*parts, (0, 0, 90, 140)], sizes, strict=True):
        part = picture(90, 140).crop((left, top, left + w, top + h))
        expected = np.asarray(part.resize((size, size), PIL.Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1


@sides
def test_sides_of_a_crop_are_uniform_independent_and_include_both_ends(tmp_path, name):
    views = Views(solid_files(tmp_path, 1), image_size=10, fg_size=(7, 10))
    counts = collections.Counter(views[epoch, 0, 0, 0][name].shape for epoch in range(800))
    assert set(counts) == {(3, h, w) for h in range(7, 11) for w in range(7, 11)}
    assert uneven(counts.values(), 16) < 5


@pytest.mark.parametrize("h, w", [(90, 60), (60, 90), (50, 100), (70, 70), (100, 99)])
def test_keep_aspect_fits_the_crop_into_the_drawn_sides(monkeypatch, h, w):
    monkeypatch.setattr(insloc, "crop_box", lambda *size, ratio, generator: (0, 0, h, w))
    image, views = torch.zeros(3, 100, 100, dtype=torch.uint8), Views(["x"], keep_aspect=True)
    for seed in range(100):
        # The longer side into the longer drawn one, the shorter into the shorter, as mmcv's imrescale does.
        short, long = torch.randint(128, 257, (2,), generator=seeded(seed)).sort()[0].tolist()
        scale = min(long / max(h, w), short / min(h, w))
        assert views.crop(image, seeded(seed)).shape == (3, round(h * scale), round(w * scale))


@pytest.mark.parametrize("backgrounds", ["group", "dataset"])
def test_items_depend_on_seed_epoch_and_index_alone(tmp_path, backgrounds):
    paths = solid_files(tmp_path, 6)
    for i, path in enumerate(paths):
        picture(40, 50, seed=i).save(path)
    damage(tmp_path / "003.png")                                        # its replacement is drawn
    views, again, other_seed = (Views(paths, seed, 32, (16, 32), backgrounds=backgrounds)
                                for seed in (0, 0, 1))
    addresses = list(itertools.product(range(2), range(2), range(2), range(6)))
    items = {address: views[address] for address in addresses}
    torch.manual_seed(99)
    random.Random(0).shuffle(addresses)
    for epoch, step, group, index in addresses:
        item = again[epoch, step, group, index]
        assert item["seeds"] == (step, group)
        assert_equal(item, dict(items[epoch, 0, 0, index], seeds=(step, group)))
        for other in (items[1 - epoch, step, group, index], other_seed[epoch, step, group, index],
                      items[epoch, step, group, (index + 1) % 6], {"query": item["key"]}):
            assert not torch.equal(item["query"], other["query"])


def test_an_unreadable_file_is_replaced_by_any_other_and_reported(tmp_path):
    views = Views(solid_files(tmp_path, 12), image_size=32, fg_size=(16, 32))
    damage(tmp_path / "004.png")
    items = [views[epoch, 0, 0, 4] for epoch in range(40)]
    for item in items:
        assert set(item["unreadable"]) == {4}
        assert files_in(item["query"], item["key"], *item["backgrounds"]) == {item["source"]} != {4}
    assert len({item["source"] for item in items}) > 8
    assert views[0, 0, 0, 5]["unreadable"] == [] and views[0, 0, 0, 5]["source"] == 5


def test_ten_unreadable_files_in_a_row_are_an_error_that_names_one():
    views, unreadable = Views([f"file{i}" for i in range(30)]), []
    with pytest.raises(Unreadable) as error:
        views.read(7, unreadable, seeded())
    assert len(unreadable) == 10 and f"'file{unreadable[-1]}': not a file" in str(error.value)


def test_dataset_backgrounds_are_two_other_images_uniformly(tmp_path):
    views = Views(solid_files(tmp_path, 7), image_size=16, fg_size=(8, 16), backgrounds="dataset")
    damage(tmp_path / "006.png")                                        # replaced and reported, too
    items = [views[epoch, 0, 0, 2] for epoch in range(600)]
    assert all(image.shape == (3, 16, 16) for item in items for image in item["backgrounds"])
    assert {i for item in items for i in item["unreadable"]} == {6} and files_in(items[0]["query"]) == {2}
    pairs = collections.Counter(tuple(files_in(x).pop() for x in item["backgrounds"]) for item in items)
    assert set(pairs) == set(itertools.permutations([0, 1, 3, 4, 5], 2))
    assert uneven(pairs.values(), 20) < 5


@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
@pytest.mark.parametrize("encode", [os.fsdecode, os.fsencode])
def test_paths_may_be_str_or_bytes_and_need_not_be_utf8(tmp_path, kind, encode):
    names = [b"two words.png", b"line\nbreak.png", b"\xff\xfe not utf-8", "\N{SNOWMAN}.png".encode(), b"z"]
    paths = [os.path.join(os.fsencode(tmp_path), name) for name in names]
    for written, path in zip(solid_files(tmp_path, len(names)), paths):
        os.rename(written, path)
    views = Views(kind([encode(path) for path in paths]), image_size=16, fg_size=(8, 16))
    items = [views[0, 0, 0, i] for i in range(len(names))]
    assert [files_in(item["query"]) for item in items] == [{i} for i in range(len(names))]


# ---- MakeGroup. Samples of solid colours: red says which, green which part (0 ground, 100 query, 200 key).

def solid_samples(n, size=32, sources=None, **more):
    def part(i, green, h, w):
        return torch.tensor([i, green, 0], dtype=torch.uint8)[:, None, None].repeat(1, h, w)

    samples = []
    for i, (query, key) in enumerate(np.random.default_rng(0).integers(size // 2, size, (n, 2, 2)).tolist()):
        samples.append({"query": part(i, 100, *query), "key": part(i, 200, *key), "seeds": (0, 0),
                        "backgrounds": [part(i, 0, size, size)], "source": (sources or range(n))[i],
                        "unreadable": [i] * i, **more})
    return samples


def grounds(view):
    """The colour around each box, a list of three; fails if there is more than one."""
    inside = inside_mask(view["boxes"], *view["images"].shape[2:])[:, 0]
    outside = [image[:, ~mask].unique(dim=1) for image, mask in zip(view["images"], inside)]
    assert all(colours.shape == (3, 1) for colours in outside)
    return torch.cat(outside, dim=1).T.tolist()


@pytest.mark.parametrize("name, green", [("query", 100), ("key", 200)])
def test_groups_paste_each_view_into_the_canvas(name, green):
    samples = solid_samples(8)
    view = MakeGroup(image_size=32)(samples)[name]
    assert view["images"].dtype == torch.uint8 and view["images"].shape == (8, 3, 32, 32)
    assert view["images"].is_contiguous(memory_format=torch.channels_last)
    assert view["boxes"].min() >= 0 and view["boxes"].max() <= 32
    for i, mask in enumerate(inside_mask(view["boxes"], 32, 32)[:, 0]):
        x1, y1, x2, y2 = view["boxes"][i].tolist()
        assert (y2 - y1, x2 - x1) == samples[i][name].shape[1:]
        assert (view["images"][i][:, mask] == torch.tensor([i, green, 0])[:, None]).all()


def test_backgrounds_are_of_other_samples_and_differ_between_query_and_key():
    offsets = {"query": collections.Counter(), "key": collections.Counter()}
    for step in range(60):
        group = MakeGroup(image_size=32)(solid_samples(8, seeds=(step, 3)))
        behind = {name: grounds(group[name]) for name in offsets}
        assert all(query != key for query, key in zip(behind["query"], behind["key"]))
        for name, colours in behind.items():
            assert all(colour[1:] == [0, 0] for colour in colours)
            offsets[name].update((red - i) % 8 for i, (red, _, _) in enumerate(colours))
    for counts in offsets.values():                             # any other, and not always the neighbour
        assert 0 not in counts and uneven(counts.values(), 7) < 5


def test_backgrounds_are_uniform_over_the_other_images():
    sources, generator = [40, 7, 7, 13, 99], seeded(17)         # 1 and 2 show one image: a replaced file
    chosen = [choose_backgrounds(sources, generator) for _ in range(1500)]
    assert all(len({sources[i], sources[query], sources[key]}) == 3
               for pairs in chosen for i, (query, key) in enumerate(pairs))
    counts = collections.Counter(tuple(pairs[0]) for pairs in chosen)
    assert set(counts) == {(1, 3), (1, 4), (2, 3), (2, 4), (3, 1), (3, 2), (3, 4), (4, 1), (4, 2), (4, 3)}
    for (query, _), count in counts.items():                    # a fourth each; uniformly of what is left
        p = 1 / 4 / (2 if query < 3 else 3)
        assert abs(count - 1500 * p) < 5 * math.sqrt(1500 * p * (1 - p))


@pytest.mark.parametrize("sources", [(0, 1), (0, 1, 1), (5, 5, 5), (0, 1, 0, 1)])
def test_a_group_of_fewer_than_three_images_is_refused(sources):
    with pytest.raises(TooFewImages, match="three different images"):
        MakeGroup(image_size=32)(solid_samples(len(sources), sources=sources))
    MakeGroup(image_size=32)(solid_samples(3))                          # three will do


@pytest.mark.parametrize("backgrounds, brought", [
    ("group", 2), ("group", 0), ("dataset", 1), ("dataset", 3), ("none", 1)])
def test_a_sample_must_bring_the_backgrounds_that_its_group_pastes_on(backgrounds, brought):
    samples = solid_samples(4, backgrounds=[torch.zeros(3, 32, 32, dtype=torch.uint8)] * brought)
    with pytest.raises(ValueError, match=f"brings {brought} backgrounds"):
        MakeGroup(image_size=32, backgrounds=backgrounds)(samples)


def test_an_unknown_way_to_choose_backgrounds_is_refused():
    with pytest.raises(KeyError, match="Group"):
        MakeGroup(image_size=32, backgrounds="Group")(solid_samples(4))


@sides
@pytest.mark.parametrize("crop", [
    torch.zeros(3, 33, 8).byte(), torch.zeros(3, 8, 33).byte(), torch.zeros(3, 8, 8)], ids=["h", "w", "f"])
def test_a_crop_that_is_no_uint8_or_larger_than_the_canvas_is_refused(name, crop):
    with pytest.raises(ValueError, match="must be uint8, at most 32x32"):
        MakeGroup(image_size=32)(solid_samples(4, **{name: crop}))


@pytest.mark.parametrize("size", [24, 40])
def test_backgrounds_of_another_size_than_the_canvas_are_refused(size):
    with pytest.raises((RuntimeError, ValueError), match="canvas|size"):
        MakeGroup(image_size=32)(solid_samples(8, size))


def test_a_sample_need_not_say_what_was_unreadable():
    samples = solid_samples(4)
    expected = MakeGroup(image_size=32)(samples)
    for sample in samples:
        del sample["unreadable"]
    group = MakeGroup(image_size=32)(samples)
    assert group.pop("unreadable") == [] != expected.pop("unreadable")
    assert_equal(group, expected)


def test_group_uses_the_backgrounds_that_the_samples_bring():
    samples = solid_samples(4)
    for sample in samples:
        sample["backgrounds"] = [sample["backgrounds"][0] + 50, sample["backgrounds"][0] + 150]
    for n in (4, 1):
        group = MakeGroup(image_size=32, backgrounds="dataset")(samples[:n])
        assert grounds(group["query"]) == [[50 + i, 50, 50] for i in range(n)]
        assert grounds(group["key"]) == [[150 + i, 150, 150] for i in range(n)]


@sides
def test_boxes_are_uniform_on_the_canvas_and_reach_the_far_edges(name):
    black, counts = torch.zeros(3, 16, 16, dtype=torch.uint8), collections.Counter()
    for step in range(100):
        samples = solid_samples(16, 16, seeds=(step, 0), query=black[:, :14, :11], key=black[:, :14, :11])
        counts.update((x1, y1) for x1, y1, _, _ in MakeGroup(image_size=16)(samples)[name]["boxes"].tolist())
    assert set(counts) == set(itertools.product(range(6), range(3)))
    assert uneven(counts.values(), 18) < 5


def test_only_the_querys_boxes_are_jittered_and_nothing_else_depends_on_it():
    group, still = (MakeGroup(jitter=jitter)(solid_samples(6, 256)) for jitter in (True, False))
    jittered = group["query"].pop("drawn_boxes")
    assert (jittered[:, None] == grid_anchors(256)).all(dim=2).any(dim=1).all()
    assert iou_of_pairs(group["query"]["boxes"], jittered).min() > 0.5 - 1e-6
    assert torch.equal(group["key"]["drawn_boxes"], group["key"]["boxes"])
    assert torch.equal(still["query"].pop("drawn_boxes"), still["query"]["boxes"])
    assert_equal(group, still)                                  # cp and insloc see the same composites


def test_group_is_decided_by_its_seeds():
    torch.manual_seed(1)
    first = MakeGroup(0, 32)(solid_samples(5))
    torch.manual_seed(2)
    assert_equal(MakeGroup(0, 32)(solid_samples(5)), first)
    for seed, step, number in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        other = MakeGroup(seed, 32)(solid_samples(5, seeds=(step, number)))
        for name in ("images", "boxes", "drawn_boxes", "order", "brightness"):
            assert not torch.equal(other["query"][name], first["query"][name])
            assert not torch.equal(first["key"][name], first["query"][name])            # drawn apart
    assert first["unreadable"] == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]


@sides
def test_flip_of_the_composite_moves_the_box_with_the_foreground(name):
    still, moved = (MakeGroup(flip_moves_box=flips)(solid_samples(16, 256)) for flips in (False, True))
    boxes, flip = moved[name]["boxes"], moved[name]["flip"]
    assert 2 < flip.sum() < 14 and torch.equal(moved[name]["images"], still[name]["images"])
    assert torch.equal(boxes[~flip], still[name]["boxes"][~flip])
    flipped, _ = photometric(moved[name]["images"] / 255, dict(nothing(16), flip=flip))
    assert torch.equal(flipped[:, 1:2] > 0.2, inside_mask(boxes, 256, 256))     # that is the foreground
    assert iou_of_pairs(boxes, moved[name]["drawn_boxes"]).min() > 0.5 - 1e-6      # jittered after the flip


def test_without_pasting_a_view_is_a_crop_that_fills_the_canvas(tmp_path):
    picture(40, 50).save(tmp_path / "a.png")
    views = Views([str(tmp_path / "a.png")], image_size=32, backgrounds="none")     # one image will do
    item = views[0, 0, 0, 0]
    assert item["backgrounds"] == []
    group = MakeGroup(image_size=32, backgrounds="none", jitter=False)([item] * 2)
    for name in ("query", "key"):
        assert torch.equal(group[name]["images"], torch.stack([item[name]] * 2))
        assert group[name]["boxes"].tolist() == group[name]["drawn_boxes"].tolist() == [[0, 0, 32, 32]] * 2


# ---- batches and the loader

@pytest.mark.parametrize("backgrounds", ["group", "dataset"])
def test_loader_workers_and_the_global_generator_change_nothing(tmp_path, backgrounds):
    views = Views(solid_files(tmp_path, 10), 0, 32, (16, 32), backgrounds=backgrounds)
    damage(tmp_path / "003.png")                                        # its replacement is drawn

    def epoch(workers):
        torch.manual_seed(workers)
        before = torch.get_rng_state()
        loader = torch.utils.data.DataLoader(
            views, batch_sampler=batches(10, 8, 4, 1), collate_fn=MakeGroup(0, 32, backgrounds),
            num_workers=workers, generator=torch.Generator())
        groups = list(loader)
        assert torch.equal(torch.get_rng_state(), before)
        return groups

    alone = epoch(0)
    assert len(alone) == 2 and alone[0]["unreadable"] + alone[1]["unreadable"]
    assert_equal(epoch(1), alone)
    assert_equal(epoch(2), alone)


def test_batches_are_permutations_cut_into_groups():
    groups = list(batches(53, 12, 4, epochs=5, seed=3))
    assert [group[0][:3] for group in groups] == [(n // 12, n // 3, n % 3) for n in range(60)]
    assert all(len(group) == 4 and len({address[:3] for address in group}) == 1 for group in groups)
    orders = [[index for group in groups for e, _, _, index in group if e == epoch] for epoch in range(5)]
    assert all(len(seen) == len(set(seen)) == 48 and set(seen) <= set(range(53)) for seen in orders)
    assert len({tuple(order) for order in orders}) == 5 and orders[0] != sorted(orders[0])
    assert set().union(*orders) == set(range(53))                       # every epoch drops others
    assert list(batches(53, 12, 4, 5, seed=3)) == groups != list(batches(53, 12, 4, 5, seed=4))
    counts = collections.Counter(next(batches(6, 1, 1, 1, seed=seed))[0][3] for seed in range(600))
    assert uneven(counts.values(), 6) < 5


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("start", range(10))
def test_batches_resume_at_any_step_and_split_among_ranks(ranks, start):
    share = 4 // ranks
    parts = [list(batches(26, 8, 2, 3, start_step=start, own_groups=range(first, first + share)))
             for first in range(0, 4, share)]
    together = [part[step * share:(step + 1) * share] for step in range(9 - start) for part in parts]
    assert sum(together, []) == list(batches(26, 8, 2, 3))[start * 4:]
    assert all(len(part) == (9 - start) * share for part in parts)


@pytest.mark.parametrize("n_images, batch_size, group_size", [(7, 8, 4), (20, 10, 4)])
def test_batches_that_would_leave_out_images_are_refused(n_images, batch_size, group_size):
    with pytest.raises(ValueError, match=f"{n_images} images"):
        next(batches(n_images, batch_size, group_size, 1))
