"""Section 6 of insloc.py: the queue against a deque, InfoNCE against NumPy, the momentum update by hand."""
import collections
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from torch import nn

from insloc import KeyQueue, info_nce, momentum_update


def unit_vectors(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=-1).to(dtype)


def test_queue_starts_as_random_unit_columns():
    queue = KeyQueue(300, 16, 2, seeded(40))
    assert queue.keys.shape == (2, 16, 300) and torch.allclose(queue.keys.norm(dim=1), torch.ones(2, 300))
    assert queue.keys.mean().abs() < 4 / math.sqrt(16 * 9600) and abs(queue.keys.std() - 0.25) < 0.01
    assert queue.ptr == 0 and queue.filled == 0
    assert [*queue.state_dict()] == ["keys", "ptr", "filled"] and not list(queue.parameters())
    assert torch.equal(queue.keys, KeyQueue(300, 16, 2, seeded(40)).keys)
    assert KeyQueue().keys.shape == (1, 128, 65536)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[4] * 6, [10, 10], [7, 1, 25, 2, 40, 10, 9], [0, 3, 0], [23, 23]])
def test_queue_equals_a_deque(sizes, dtype):
    queue, total = KeyQueue(10, 3, 2, seeded(41)).to(dtype), 0
    deque = collections.deque(queue.keys.permute(2, 0, 1).clone(), maxlen=10)           # oldest first
    for i, n in enumerate(sizes):
        keys = unit_vectors(n, 2, 3, seed=i, dtype=dtype).requires_grad_()
        queue.enqueue(keys)
        deque.extend(keys.detach())
        total += n
        assert queue.ptr == total % 10 and queue.filled == min(total, 10)
        oldest_first = queue.keys.roll(-int(queue.ptr), dims=2).permute(2, 0, 1)
        assert torch.equal(oldest_first, torch.stack(list(deque))) and not queue.keys.requires_grad


@pytest.mark.parametrize("shape", [(4, 1, 3), (4, 2, 1), (4, 3), (1, 2, 3, 1)])
def test_queue_refuses_keys_of_another_shape(shape):
    queue = KeyQueue(10, 3, 2, seeded(41))
    with pytest.raises(ValueError, match="2 x 3"):              # a broadcast would fill it with copies
        queue.enqueue(torch.ones(shape))
    assert queue.filled == 0


def test_queue_keeps_its_dtype():
    queue = KeyQueue(10, 3, 2, seeded(41))
    keys = unit_vectors(4, 2, 3).bfloat16()
    queue.enqueue(keys)
    assert queue.keys.dtype == torch.float32
    assert torch.equal(queue.keys[:, :, :4].permute(2, 0, 1), keys.float())


def slow_info_nce(q, k, queue, temperature):
    """Eq. 2 in float64 NumPy, sample by sample, level by level: losses (L,), logits, their sum's gradient."""
    q, k, queue = (x.detach().double().numpy() for x in (q, k, queue))
    losses, gradient = np.zeros(q.shape[1]), np.zeros_like(q)
    logits = np.zeros((*q.shape[:2], 1 + queue.shape[2]))
    for i, level in np.ndindex(q.shape[:2]):
        others = np.concatenate([k[i, level][None], queue[level].T])
        logits[i, level] = others @ q[i, level] / temperature
        share = np.exp(logits[i, level]) / np.exp(logits[i, level]).sum()
        losses[level] -= np.log(share[0]) / len(q)
        gradient[i, level] = (share @ others - k[i, level]) / temperature / len(q)
    return losses, logits, gradient


@pytest.mark.parametrize("arguments", [[], [0.07], [1.0]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_info_nce_equals_its_closed_form_and_teaches_the_query_alone(arguments, dtype, tolerance):
    q, k, queue = (unit_vectors(*shape, seed=len(shape) + shape[1], dtype=dtype).requires_grad_()
                   for shape in ((5, 2, 8), (5, 2, 8), (2, 8, 11)))
    loss, logits = info_nce(q, k, queue, *arguments)
    loss.sum().backward()
    assert k.grad is None and queue.grad is None and loss.dtype == logits.dtype == dtype
    expected = slow_info_nce(q, k, queue, *arguments or [0.2])
    for mine, theirs in zip((loss, logits, q.grad), expected, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 2, 8), (5, 1, 8), (5, 2, 1)])
def test_info_nce_refuses_to_broadcast_a_key(shape):
    with pytest.raises(ValueError, match="each query has one key"):
        info_nce(unit_vectors(5, 2, 8), unit_vectors(*shape), unit_vectors(2, 8, 11))


def test_info_nce_stays_finite_where_exp_would_not():
    one, queue = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    assert abs(info_nce(one, -one, queue, temperature=0.001)[0].item() - 2000) < 1
    assert info_nce(one, one, -queue[:, :, :1], temperature=0.001)[0].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_info_nce_is_float32_inside_autocast(dtype):
    q, k, queue = (unit_vectors(4, 1, 32, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    queue = queue.permute(1, 2, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(q, k, queue)
    torch.testing.assert_close(inside, info_nce(q.float(), k.float(), queue.float()), rtol=0, atol=0)


@pytest.mark.parametrize("similarity, expected", [(1.0, 6.19), (0.5, 8.69), (0.0, 11.19), (None, 11.09)])
def test_loss_of_the_first_step_and_chance(similarity, expected):
    # ln(1 + K E[exp(s / T)] exp(-s+ / T)) while the queue is random; ln(1 + K) where all keys are alike.
    q, other = unit_vectors(48, 1, 128, seed=4), unit_vectors(48, 1, 128, seed=5)
    if similarity is None:
        loss, _ = info_nce(q[:1], q[:1], q[0].T[None].expand(1, 128, 65536))
    else:
        across = F.normalize(other - (other * q).sum(dim=2, keepdim=True) * q, dim=2)
        k = similarity * q + math.sqrt(1 - similarity ** 2) * across
        loss, _ = info_nce(q, k, KeyQueue(65536, 128, 1, seeded(6)).keys)
    assert abs(loss.item() - expected) < 0.05


@pytest.mark.parametrize("arguments", [[], [0.9], [0.0], [1.0]])
def test_momentum_update_by_hand(arguments):
    key = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 5)).double()
    query = copy.deepcopy(key)
    for i, x in enumerate([*key.state_dict().values(), *query.state_dict().values()]):
        x.copy_(torch.randn(x.shape, generator=seeded(i)) * 10)         # the counter of batches is an integer
    k, q = copy.deepcopy(key).state_dict(), copy.deepcopy(query).state_dict()
    parameters = dict(key.named_parameters())
    (m,) = arguments or [0.999]
    momentum_update(key, query, *arguments)
    expected = {name: m * k[name] + (1 - m) * q[name] if name in parameters else k[name] for name in k}
    torch.testing.assert_close(key.state_dict(), expected, rtol=0, atol=1e-12)  # buffers are the key's own
    torch.testing.assert_close(query.state_dict(), q, rtol=0, atol=0)
    assert all(p is parameters[name] for name, p in key.named_parameters())     # in place
