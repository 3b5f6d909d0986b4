"""A GPU on a machine without one: CUDA tensors are fake, CPU tensors are real.

Of a fake tensor torch works out shape, dtype, strides and device, but no numbers (torch's FakeTensorMode, a
private part: `missing` says whether it is as expected). Under FakeGPU a line that waits for the GPU raises
Waits, and one that mixes devices raises Mixes, both at that line. It counts kernels and bytes, too.

Not seen: what autograd's engine, NCCL and the kernels themselves do.
"""
import collections
import contextlib
import linecache
import os
import signal
import sys
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

from stage import SIGNALS

try:
    from torch._subclasses.fake_tensor import (DataDependentOutputException, DynamicOutputShapeException,
                                               FakeTensor, FakeTensorMode)
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError:                                     # `missing` says so
    FakeTensor = FakeStore = None
    FakeTensorMode = object

TOOLS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TOOLS)
FOLDERS = (ROOT, TOOLS, os.path.join(ROOT, "tests"))
aten = torch.ops.aten
# What starts no kernel.
VIEWS = set("device view expand permute transpose select slice unsqueeze squeeze detach t unbind split alias "
            "as_strided _unsafe_view split_with_sizes lift_fresh empty empty_like empty_strided".split())


class Waits(AssertionError):
    """A line waits for the GPU."""


class Mixes(AssertionError):
    """A line mixes devices."""


def project_line():
    """(file, function, text) of the innermost line of the project that runs, this file left out."""
    frame = sys._getframe()
    while frame:
        path = os.path.abspath(frame.f_code.co_filename)
        if os.path.dirname(path) in FOLDERS and path != os.path.abspath(__file__):
            text = linecache.getline(path, frame.f_lineno).strip()
            return os.path.basename(path), frame.f_code.co_name, text
        frame = frame.f_back
    return "", "", ""


def is_real(x):
    return isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)


class FakeGPU(FakeTensorMode):
    """FakeTensorMode for CUDA tensors alone; work without one is done as ever, with numbers.

    may_wait: texts; a project line that holds one of them may wait all the same.
    strict: while it is set a wait raises. Else it gives zeros, and yes to a question.
    unpinned: bytes that may be copied out of memory that is not pinned. CUDA stages up to 64 KB without a
    wait; a test with small images wants less.
    """

    avoid_device_init = True            # no device is asked for, although cuda.is_available says yes

    def __init__(self, may_wait=(), unpinned=2 ** 16):
        super().__init__(allow_non_fake_inputs=True)
        self.may_wait = may_wait
        self.unpinned = unpinned
        self.strict = False
        self.waited = []                # the lines of may_wait that waited; once, if one after the other
        self.pinned = []                # tensors in pinned memory
        self.depth = 0
        self.start_counting()

    def start_counting(self):
        self.kernels = 0
        self.bytes = 0
        self.operations = collections.Counter()
        self.copies = []                # bytes of each copy to the GPU

    def wait(self, reason):
        """Raises if the line that runs must not wait."""
        line = project_line()
        if not self.strict:
            return
        if not any(text in line[2] for text in self.may_wait):
            raise Waits(f"{reason}: {' | '.join(line)}")
        if self.waited[-1:] != [line]:
            self.waited.append(line)

    def check_copy(self, real, non_blocking):
        """A copy of a CPU tensor to the GPU."""
        if not non_blocking:
            self.wait("a blocking copy to the GPU")
        if real.nbytes > self.unpinned:
            memory = real.untyped_storage().data_ptr()
            if all(x.untyped_storage().data_ptr() != memory for x in self.pinned):
                self.wait(f"a copy of {real.nbytes} bytes out of memory that is not pinned")
        self.copies.append(real.nbytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fake = [x for x in leaves if isinstance(x, FakeTensor)]
        real = [x for x in leaves if is_real(x)]
        device = torch.device(kwargs.get("device") or "cpu")
        if not fake and device.type != "cuda":
            return func(*args, **kwargs)                            # the CPU's own work, with numbers
        if func is aten._to_copy.default:
            if fake and torch.device(kwargs.get("device") or args[0].device).type == "cpu":
                self.wait("a copy from the GPU")
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if real:
                self.check_copy(real[0], kwargs.get("non_blocking"))
        elif func is aten.copy_.default and fake and real:
            if is_real(args[0]):
                self.wait("a copy from the GPU")
                return args[0].zero_()
            if args[1].dim() or args[1].nbytes > 8:                 # a number travels with the kernel
                non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
                self.check_copy(args[1], non_blocking)
        elif func is aten._local_scalar_dense.default:
            self.wait("a number of the GPU is asked for")
            return True if args[0].dtype == torch.bool else torch.zeros((), dtype=args[0].dtype).item()
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            index = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
            if any(is_real(x) for x in index) or is_real(args[0]):
                raise Waits(f"an index on another device: {' | '.join(project_line())}")
            if len(args) > 2 and is_real(args[2]) and args[2].dim():
                raise Mixes(f"a value on another device: {' | '.join(project_line())}")
            if any(x.dtype in (torch.bool, torch.uint8) for x in index):
                raise Waits(f"a mask as index: {' | '.join(project_line())}")
        elif any(x.dim() for x in real) or real and func in (aten.stack.default, aten.cat.default):
            shapes = [tuple(x.shape) for x in real]
            raise Mixes(f"{func} of GPU tensors and CPU {shapes}: {' | '.join(project_line())}")
        args, kwargs = tree_map(lambda x: self.from_tensor(x) if is_real(x) else x, (args, kwargs))
        self.depth += 1
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Waits(f"{func} needs numbers of the GPU: {' | '.join(project_line())}") from error
        finally:
            self.depth -= 1
        name = func._schema.name.split("::")[1]
        if self.depth == 0 and name not in VIEWS:
            self.kernels += 1
            self.bytes += sum(x.nbytes for x in [*fake, *tree_leaves(out)] if isinstance(x, FakeTensor))
            self.operations[name] += 1
        return out


def fake_backward(loss, *args, **kwargs):
    """Autograd's engine asks for a real device: gives every parameter of the graph a gradient instead."""
    seen = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                node.variable.grad = torch.empty_like(node.variable)
            todo += [following for following, _ in node.next_functions]


class FakeDDP(torch.nn.Module):
    def __init__(self, module, *args, **kwargs):
        super().__init__()
        self.module = module
        self.forward = module.forward


@contextlib.contextmanager
def gpu_here(gpu, count=2):
    """What torch says about the machine: `count` GPUs of the fake kind. `gpu` is a FakeGPU."""
    def init_process_group(backend, *_, rank, world_size, init=dist.init_process_group, **__):
        init("fake", store=FakeStore(), rank=rank, world_size=world_size)

    def all_gather_object(found, value):
        found[:] = [value] * len(found)

    def pin_memory(data, device=None):
        gpu.pinned += [x for x in tree_leaves(data) if isinstance(x, torch.Tensor)]
        return data

    cuda = {"device_count": lambda: count, "is_available": lambda: True, "current_device": lambda: 0,
            "init": lambda: None, "set_device": lambda device: None, "max_memory_allocated": lambda *_: 0,
            "is_bf16_supported": lambda *_, **__: True,
            "synchronize": lambda *_: gpu.wait("torch.cuda.synchronize")}
    patches = [
        *[(f"torch.cuda.{name}", value) for name, value in cuda.items()],
        ("torch.accelerator.is_available", lambda: True),
        ("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None),
        ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        ("torch.utils.data._utils.pin_memory.pin_memory", pin_memory),
        ("torch.Tensor.backward", fake_backward),
        ("torch.autograd.grad", lambda outputs, inputs, **_: (torch.empty_like(inputs),)),
        ("torch.nn.parallel.DistributedDataParallel", FakeDDP),
        ("torch.distributed.init_process_group", init_process_group),
        ("torch.distributed.all_gather_object", all_gather_object),
    ]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with contextlib.ExitStack() as stack:
        for name, value in patches:
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def missing():
    """Why fake CUDA does not work with this torch; "" if it does."""
    if FakeTensor is None:
        return f"torch {torch.__version__} has no FakeTensorMode, or no fake process group, where expected"
    gpu = FakeGPU()
    try:
        with gpu_here(gpu), gpu:
            x = torch.nn.Linear(3, 4).to("cuda")(torch.ones(2, 3).to("cuda", non_blocking=True))
            fake_backward(x.sum())
            if not (isinstance(x, FakeTensor) and x.device.type == "cuda" and x.shape == (2, 4)):
                return f"torch {torch.__version__}: a CUDA tensor is not faked, but {type(x)} on {x.device}"
            if is_real(torch.ones(2)) is False:
                return f"torch {torch.__version__}: CPU tensors are faked"
            gpu.strict = True
            for wait in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x.nonzero(), lambda: x[x > 0]):
                try:
                    wait()
                    return f"torch {torch.__version__}: a wait is not seen"
                except Waits:
                    pass
    except Exception as error:
        return f"torch {torch.__version__}: {type(error).__name__}: {str(error)[:200]}"
    return ""
