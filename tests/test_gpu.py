"""What only a GPU can show; skipped where there is none. The twin without one is test_fake_cuda.py."""
import contextlib
import json
import os
from unittest import mock

import pytest
import torch

import insloc
import pretrain
from conftest import seeded, write_images

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = ("--resnet resnet18 --image-size 64 --batch-size 32 --bn-group 8 --queue-size 64 --lr 0.02 --ema 0.9 "
         "--epochs 1 --nprocs 1 --workers 2 --log-every 2 --seed 3")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"), 64)            # two steps of 32


def run(line, pictures, out, **replaced):
    """pretrain.py on GPU 0, with some of its names replaced. Returns its logged steps."""
    args = pretrain.get_args(f"{SMALL} {line} --out {out} {pictures}".split())
    prepared = pretrain.find_data(args)
    os.makedirs(out, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(pretrain, name, value))
        pretrain.stage.run(0, "env://", pretrain.main, args, prepared)
    with open(f"{out}/log.jsonl") as f:
        return [line for line in map(json.loads, f) if "loss" in line]


@pytest.mark.parametrize("line", [
    "--arch c4 --method insloc", "--arch fpn --method insloc", "--arch c4 --method moco",
    "--arch fpn --method cp --aug-on composite --nesterov", "--arch c4 --method cp --precision fp32"])
def test_no_line_of_a_step_waits_for_the_gpu(line, pictures, tmp_path):
    """A wait raises, from the momentum update to the end of the step."""
    steps = []

    def momentum_update(*args):
        torch.cuda.set_sync_debug_mode("error")
        steps.append(insloc.momentum_update(*args))

    class Queue(insloc.KeyQueue):
        def enqueue(self, keys):
            super().enqueue(keys)
            torch.cuda.set_sync_debug_mode("default")

    try:
        logged = run(line, pictures, tmp_path / "run", momentum_update=momentum_update, KeyQueue=Queue)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 2
    assert [entry["step"] for entry in logged] == [2]
    assert 0 < logged[0]["loss"] < 100 and logged[0]["memory_gb"] > 0


@pytest.mark.parametrize("arch", ["c4", "fpn"])
def test_the_gpu_computes_what_the_cpu_computes(arch, pictures, tmp_path):
    """In float64: two steps, parameters and queue. RoIAlign adds up in another order there."""
    states = []
    for device in ("cuda", "cpu"):
        run(f"--arch {arch} --precision fp64 --device {device}", pictures, tmp_path / device)
        states.append(torch.load(tmp_path / device / "checkpoint.pth", weights_only=True))
    for part in ("encoder_q", "encoder_k", "queue"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=1e-6, atol=1e-8)


def test_augmentation_is_that_of_the_cpu():
    params = insloc.photometric_params(32, seeded(1))
    images = torch.rand(32, 3, 96, 96, generator=seeded(2))
    boxes = torch.tensor([[8.0, 16, 80, 90]]).repeat(32, 1)
    on_cpu, _ = insloc.photometric(images, params, boxes)
    on_gpu, _ = insloc.photometric(images.cuda(), params, boxes)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-5)


def test_what_a_gpu_run_leaves_behind_lies_on_the_cpu_and_goes_on(pictures, tmp_path):
    out = tmp_path / "run"
    run("--arch c4 --save-steps 1", pictures, out)
    for name in ("checkpoint.pth", "checkpoint_prev.pth", "backbone.pth"):
        state = torch.load(out / name, weights_only=True)
        tensors = [x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor)]
        assert len(tensors) > 50 and all(x.device.type == "cpu" for x in tensors)
    os.remove(out / "checkpoint.pth")
    run("--arch c4 --save-steps 1 --resume", pictures, out)
    assert torch.load(out / "checkpoint.pth", weights_only=True)["step"] == 2


def test_bf16_is_the_default_where_the_gpu_has_it():
    in_hardware = torch.cuda.get_device_capability() >= (8, 0)
    assert pretrain.get_args(["none", "--arch", "c4"]).precision == ("bf16" if in_hardware else "fp32")
