"""A run of pretrain.main on a GPU that is not there: no line of a step waits for it, none mixes devices.

What waits is what must: the log line, and the copy of a checkpoint. See fake_cuda.py; the GPU's twin is
test_gpu.py.
"""
import contextlib
import json
import os
from unittest import mock

import pytest
import torch

import fake_cuda
import pretrain
import probe_box
import probe_cls
import probe_loc
from conftest import write_images
from fake_cuda import FakeDDP, FakeGPU, Mixes, Waits, gpu_here

WHY = fake_cuda.missing()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)

# The lines that wait on purpose: two of a log line, and one that copies what a checkpoint holds.
LOG = ("*losses, acc_queue, acc_batch = ", '"queue_filled": queue.filled.item()')
SAVE = ("value = value.cpu()",)
# A probe's encoding loop takes each batch's features to the CPU, and probe_cls.py those of all ranks back;
# the directions of swap's gradients are drawn on the CPU.
PROBES = (".cpu()", "yield batch.to(device), torch.cat(features).to(device)", "v.to(features.device)")


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("sixteen"), 16)             # two steps of 8 an epoch


def run(line, photos, out, world=1, **replaced):
    """pretrain.py on fake GPUs, as rank 0 of `world`, some of its names replaced. Returns the FakeGPU."""
    gpu = FakeGPU(may_wait=(*LOG, *SAVE), unpinned=2 ** 13)                 # the images of a view have 49 KB
    update = replaced.get("momentum_update", pretrain.momentum_update)
    gpu.steps = 0

    def momentum_update(*args):                     # from the first one on nothing else may wait
        gpu.strict = True
        gpu.steps += 1
        return update(*args)

    replaced = {**replaced, "momentum_update": momentum_update, "DistributedDataParallel": FakeDDP}
    command = (f"--resnet narrow18 --image-size 64 --batch-size 8 --bn-group 4 --epochs 1 --queue-size 8 "
               f"--device cuda --nprocs {world} --workers 0 --log-every 2 --out {out} {line} {photos}")
    with gpu_here(gpu), contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(pretrain, name, value))
        args = pretrain.get_args(command.split())
        prepared = pretrain.find_data(args)
        os.makedirs(out, exist_ok=True)
        with gpu:
            pretrain.stage.run(0, "env://", pretrain.main, args, prepared)
    return gpu


def in_order(waited, texts):
    return len(waited) == len(texts) and all(text in line[2] for line, text in zip(waited, texts))


@pytest.mark.parametrize("line, world", [
    ("--arch c4 --method insloc", 2),
    *(pytest.param(line, world, marks=pytest.mark.slow) for line, world in [
        ("--arch c4 --method insloc", 1),
        ("--arch fpn --method insloc", 1),
        ("--arch fpn --method insloc", 2),
        ("--arch c4 --method cp --aug-on composite --nesterov", 2),
        ("--arch c4 --method moco", 1),
        ("--arch c4 --method ra --precision fp32", 2),
        ("--arch fpn --method moco --precision fp64", 1),
        ("--arch fpn --method ra --fill-queue", 2),
        ("--arch fpn --method cp --backgrounds dataset --keep-aspect", 1),
        ("--arch fpn --method insloc --jitter-levels all --fg-size 32 48", 1)])])
def test_no_line_of_a_step_waits_or_mixes_devices(line, world, sixteen, tmp_path):
    gpu = run(line, sixteen, tmp_path / "run", world)
    assert gpu.steps == 2
    assert in_order(gpu.waited, [*LOG, *SAVE])      # one log line and one checkpoint, after two steps


@pytest.mark.slow
def test_what_a_gpu_run_leaves_behind_lies_on_the_cpu_and_goes_on(sixteen, tmp_path):
    """Two checkpoints; the newer one is thrown away, and the run goes on from the one before."""
    out = tmp_path / "run"
    line = "--arch c4 --epochs 2 --save-steps 2"
    gpu = run(line, sixteen, out)
    assert gpu.steps == 4
    assert in_order(gpu.waited, 2 * [*LOG, *SAVE])
    for name in ("checkpoint.pth", "checkpoint_prev.pth", "backbone.pth"):
        torch.load(out / name, weights_only=True)   # fails for a tensor with a tag cuda:0
    os.remove(out / "checkpoint.pth")
    gpu = run(f"{line} --resume", sixteen, out)
    assert gpu.steps == 2
    assert torch.load(out / "checkpoint.pth", weights_only=True)["step"] == 4
    with open(out / "log.jsonl") as f:
        logged = [json.loads(text) for text in f]
    assert [entry["step"] for entry in logged if "loss" in entry] == [2, 4]


def run_probe(probe, line, folder, **replaced):
    """A probe on a fake GPU, of random weights. Strict in its loops over a DataLoader alone."""
    for split in ("train", "val"):
        for name in ("one", "two"):
            write_images(folder / "data" / split / name, 6)
    gpu = FakeGPU(may_wait=PROBES, unpinned=2 ** 13)

    class Watched(torch.utils.data.DataLoader):
        def __iter__(self):
            gpu.strict = True
            try:
                yield from super().__iter__()
            finally:
                gpu.strict = False

    os.makedirs(folder / "run")
    command = (f"random {folder}/data --resnet narrow18 --image-size 96 --device cuda --nprocs 1 --workers 0 "
               f"--out {folder}/run {line}")
    with gpu_here(gpu), mock.patch.object(torch.utils.data, "DataLoader", Watched), \
            mock.patch.multiple(probe.stage, commit=lambda: "none", **replaced):
        args = probe.get_args(command.split())
        prepared = probe.find_data(args)
        with gpu:
            probe.stage.run(0, "env://", probe.main, args, prepared)
    return gpu


@pytest.mark.parametrize("probe, line", [
    (probe_cls, "--epochs 1 --batch-size 4 --precision bf16"), (probe_cls, "--knn 2 --batch-size 4"),
    (probe_loc, "--arch c4 --epochs 1"), (probe_loc, "--arch fpn --epochs 1 --precision bf16"),
    (probe_box, "--protocol swap --arch c4"), (probe_box, "--protocol swap --arch fpn --precision bf16")])
def test_the_probes_encode_without_waits_but_for_taking_the_features(probe, line, tmp_path):
    gpu = run_probe(probe, line, tmp_path, save_checkpoint=lambda *_: None)
    waits = {probe_cls: {"encode"}, probe_loc: set(), probe_box: {"pixel_energy"}}
    assert {function for _, function, _ in gpu.waited} == waits[probe]


def test_what_a_probe_saves_lies_on_the_cpu(tmp_path):
    run_probe(probe_cls, "--epochs 1 --batch-size 4", tmp_path)
    torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)


# ----------------------------------------------------------------------------------------------------------
# Planted faults. Each function takes the place of the one of pretrain.py that it is named after; the line
# marked `fault` must be the one that is blamed.
# ----------------------------------------------------------------------------------------------------------

FAULTS = []


def fault(name, error, world=1):
    def register(function):
        FAULTS.append(pytest.param(name, function, error, world, id=function.__name__))
        return function
    return register


@fault("augment", Waits)
def blocking_to(view, args, device, original=pretrain.augment):
    view["images"].to(device)                                                               # fault
    return original(view, args, device)


@fault("augment", Mixes)
def mean_on_the_cpu(view, args, device, original=pretrain.augment):
    return original(view, args, device) - torch.tensor(pretrain.PIXEL_MEAN)[:, None, None]  # fault


@fault("all_gather", Waits, world=2)
def gathered_through_the_cpu(rows, world, original=pretrain.all_gather):
    return original(rows.cpu(), world)                                                      # fault


@fault("info_nce", Waits)
def decision(q, k, queue, temperature, original=pretrain.info_nce):
    loss, logits = original(q, k, queue, temperature)
    if not loss.isfinite().all():                                                           # fault
        raise FloatingPointError
    return loss, logits


@pytest.mark.parametrize("name, function, error, world", FAULTS)
def test_a_planted_fault_is_caught_at_its_line(name, function, error, world, sixteen, tmp_path):
    with pytest.raises(error, match="# fault$"):
        run("--arch c4", sixteen, tmp_path / "run", world, save_composites=lambda *_: None,
            **{name: function})
