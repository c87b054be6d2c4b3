"""What `cost.predict` says is what the counters find: for the forms as 10_fast_karat writes them, and the package's."""

import itertools

import pytest
import torch
from einops import einsum, rearrange
from torch.nn.functional import scaled_dot_product_attention

import karat_lite as kl
from karat_lite.analysis import cost

SIZES = [(2, 3, 65, 16), (8, 3, 65, 64), (2, 2, 197, 64)]


def scores(q, k):
    return (q * q.shape[-1] ** -0.5) @ k.mT


def softmax(q, k, v):
    return scores(q, k).softmax(-1) @ v


def broadcast(q, k, v, coef, weight=None):
    """Every unit on every score: the N x N map, then the values."""
    ms = rearrange(scores(q, k), "B h k q -> B h k 1 q 1") * torch.arange(1, coef.shape[-1] // 2 + 1)
    a, b = rearrange(coef, "h p q (two G) -> two h 1 p q G", two=2)
    y = (a * ms.cos() + b * ms.sin()).sum(-1).sum(-1)
    return (y if weight is None else einsum(weight, y, "h n p, B h k p -> B h k n")) @ v


def features(q, k, v, coef, weight=None):
    """The maps of a row side by side, one product: with the coefficients, or with values mixed over tokens."""
    ms = torch.arange(1, coef.shape[-1] // 2 + 1)[:, None] * scores(q, k)[..., None, :]
    psi = torch.cat([ms.cos(), ms.sin()], dim=-2).flatten(-2)
    if weight is None:
        return psi @ einsum(coef, v, "h n q F, B h n d -> B h F q d").flatten(2, 3)
    return (psi @ rearrange(coef, "h p q F -> h (F q) p")) @ (weight.mT @ v)


def recompute(q, k, v, coef, weight=None):
    basis = kl.Fourier(coef.shape[-1] // 2)
    return kl.functional.karat_attention(q, k, v, basis, coef, weight, backend="recompute")


def measured(attention, batch, heads, tokens, width, grid=None, rank=None):
    """(bytes kept, counts) of forward and backward."""
    torch.manual_seed(0)
    tensors = [torch.randn(batch, heads, tokens, width) for _ in range(3)]
    if grid:
        tensors.append(torch.randn(heads, rank or tokens, tokens, 2 * grid))
        tensors += [torch.randn(heads, tokens, rank)] if rank else []
    tensors = [x.requires_grad_() for x in tensors]
    step = lambda: torch.autograd.grad(attention(*tensors).sum(), tensors)  # noqa: E731
    return cost.kept_bytes(lambda: attention(*tensors), given=tensors[3:]), cost.count(step)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form, attention", [("softmax", softmax), ("fused softmax", scaled_dot_product_attention)])
def test_softmax_is_predicted(form, attention, size):
    kept, count = measured(attention, *size)
    names = dict(zip(("batch", "heads", "tokens", "width"), size, strict=True))
    expected = cost.predict(form, **names)
    assert (expected.kept, expected.flops) == (kept, count.flops)
    assert expected.bytes_visited == pytest.approx(count.bytes_visited, rel=0.1)


KARAT = [
    (attention, grid, rank, size)
    for attention, (grid, rank), size in itertools.product(
        [broadcast, features, recompute], [(1, 12), (3, 12), (7, 4), (2, 24), (3, None)], SIZES
    )
    if attention is not broadcast or rank or size[2] <= 65  # beyond that broadcast takes gigabytes: the point of it all
]


@pytest.mark.parametrize("attention, grid, rank, size", KARAT)
def test_karat_is_predicted(attention, grid, rank, size):
    batch, heads, tokens, width = size
    form, r = attention.__name__, rank or tokens
    kept, count = measured(attention, *size, grid, rank)
    got = cost.predict(form, batch=batch, heads=heads, tokens=tokens, width=width, grid=grid, rank=rank)
    units = 12 * batch * heads * tokens**2 * r * grid if form == "broadcast" else 0
    assert got.flops - units == count.flops
    assert got.kept == pytest.approx(kept, abs=8 * grid)  # autograd also keeps the numbers m = 1 .. G
    assert got.bytes_visited == pytest.approx(count.bytes_visited, rel=0.2)


def test_products_in_place_are_counted():
    """backend="recompute" sums gradients in place; FlopCounterMode alone sees new tensors only."""
    total, a, b = torch.zeros(3, 4, 6), torch.ones(3, 4, 5), torch.ones(3, 5, 6)
    assert cost.count(lambda: total.baddbmm_(a, b)).flops == 2 * 3 * 4 * 5 * 6
    assert cost.count(lambda: total[0].addmm_(a[0], b[0])).flops == 2 * 4 * 5 * 6


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="unknown form 'recomputed': did you mean 'recompute'"):
        cost.predict("recomputed", batch=1, heads=1, tokens=5, width=4)
