"""The core operation block by block, for any linear basis on any device: what a block needs stays near the processor.

    S_kq = scale Q_k . K_q,    Y_ke = sum_f sum_q chi_f(S_kq) R_fqe

q (B, h, M, d) asks, k (B, h, N, d) is looked at, right R (B, h, F, N, e), or (1, h, F, N, e) shared by all images;
chi are the maps that a basis writes, its own or cheaper ones (`LinearBasis.mixing`), and R goes with them.
Scores and feature maps exist for one block at a time, in scratch that all blocks share, and are computed anew in the
backward pass. A block is several images of one head (or all images of several, or a tile of one): P planes. Inside
it maps lie as (P, F, q, k), rows k last: elementwise steps run over whole planes, and the sums over f and q are one
matrix product. Memory is head-major, (h, B, ..), so that the planes of a block lie together. Tiles are about square:
few rows that look at thousands of keys would make that product narrow and deep, which costs up to twice the time.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..bases import LinearBasis

AT_ONCE = 10 << 15  # scores of a block at most: 8 planes of 197 x 197
MAPS_AT_ONCE = 7 << 18  # numbers in its maps at most: G = 11 took up to a third longer with more of them
ELSEWHERE = 16  # times both where no CPU computes: a GPU wants few, large launches, and 0.2 GB of scratch is little


def mix(q: Tensor, k: Tensor, right: Tensor, scale: float, basis: LinearBasis) -> Tensor:
    """Y (B, h, M, e) for q (B, h, M, d), k (B, h, N, d), right (B or 1, h, F, N, e), all float32 or all float64."""
    q, k = q.transpose(0, 1), k.transpose(0, 1)
    y = right.new_empty(*q.shape[:2], right.shape[-1], q.shape[2])  # (h, B, e, M)
    right = right.permute(1, 0, 4, 2, 3).contiguous()  # (h, B or 1, e, F, N)
    right = right.expand(-1, q.shape[1], -1, -1, -1)
    for part, rows, keys, scratch in _blocks(q, k, right.shape[3]):
        _see(part(q, rows), part(k, keys), scale, basis, scratch)
        of_right = part(right, ..., keys).flatten(2)
        part(y, ..., rows).baddbmm_(of_right, scratch.maps.flatten(1, 2), beta=min(keys.start, 1))
    return y.mT.transpose(0, 1)


def mix_gradients(
    grad: Tensor, q: Tensor, k: Tensor, right: Tensor, scale: float, basis: LinearBasis
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and of what stands beside the maps chi, given that of Y: grad (B, h, M, e).

    `right` stands beside chi in the *derivative* of the units where the basis knows that (`mixing`), else beside chi.

        E_f = grad R_f^T,   dS = sum_f chi_f(S) E_f,   dQ = scale dS K,   dK = scale dS^T Q,   dR_f = chi_f(S)^T grad
    """
    q, k, grad = q.transpose(0, 1), k.transpose(0, 1), grad.transpose(0, 1)
    down = right.permute(2, 1, 0, 3, 4).contiguous().expand(-1, -1, q.shape[1], -1, -1)  # (F, h, B, N, e)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    depth, tokens, across = down.shape[0], *down.shape[3:]
    dright = right.new_zeros(*right.shape[1::-1], across, depth, tokens)  # (h, B or 1, e, F, N)
    down = down.unbind(0)
    for part, rows, keys, scratch in _blocks(q, k, depth):
        of_q, of_k = part(q, rows), part(k, keys)
        of_grad = part(grad, rows).mT.contiguous()  # (P, e, rows)

        def spread(f, part=part, keys=keys, of_grad=of_grad, e_f=scratch.other):
            return torch.bmm(part(down[f], keys), of_grad, out=e_f)

        if basis.mixing() is None:
            ds = _through_maps(of_q, of_k, scale, basis, scratch, spread)
        else:
            ds = _see(of_q, of_k, scale, basis, scratch)
        part.add_to(dright[..., keys], torch.bmm(of_grad, scratch.maps.flatten(1, 2).mT).unflatten(2, (depth, -1)))
        if basis.mixing() is not None:  # the scores themselves are not needed again: the sum stands in their place
            for f, chi in enumerate(scratch.each):
                ds = ds.addcmul_(chi, spread(f)) if f else torch.mul(chi, spread(f), out=ds)
        part(dq, rows).baddbmm_(ds.mT, of_k, alpha=scale, beta=min(keys.start, 1))
        part(dk, keys).baddbmm_(ds, of_q, alpha=scale, beta=min(rows.start, 1))
    return dq.transpose(0, 1), dk.transpose(0, 1), dright.permute(1, 0, 3, 4, 2)


class _Scratch(NamedTuple):
    """Where a block computes; keys before rows in all of it."""

    maps: Tensor  # (P, F, q, k)
    each: tuple[Tensor, ...]  # the same map by map, F times (P, q, k)
    scores: Tensor  # (P, q, k)
    other: Tensor  # (P, q, k)


def _see(q: Tensor, k: Tensor, scale: float, basis: LinearBasis, scratch: _Scratch) -> Tensor:
    """Writes scores and maps of a block into its scratch; returns the scores."""
    s = torch.baddbmm(scratch.scores, k, q.mT, beta=0, alpha=scale, out=scratch.scores)
    basis.write(s, scratch.each)
    return s


class _Part:
    """The planes of a block, P of them, taken from head-major tensors (h, B, ...) as (P, ...)."""

    def __init__(self, heads: slice, images: slice):
        self.heads, self.images = heads, images
        self.several = heads.stop - heads.start
        self.planes = self.several * (images.stop - images.start)

    def __call__(self, x: Tensor, *tile) -> Tensor:
        """With `tile`, what it indexes of the planes: P times x[head, image][tile]."""
        if self.several == 1:  # a step less, of the some dozen that a block has beside its products
            return x[(self.heads.start, self.images, *tile)]
        return x[(self.heads, self.images, *tile)].flatten(0, 1)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """x (P, ...) onto total (h, B, ...), or (h, 1, ...) that all images share."""
        if total.shape[1] == 1:
            total[self.heads, 0] += x.unflatten(0, (self.several, -1)).sum(dim=1)
        else:
            self(total).add_(x)


def _blocks(q: Tensor, k: Tensor, depth: int) -> Iterator[tuple[_Part, slice, slice, _Scratch]]:
    """(planes, rows, keys, scratch) of blocks as large as they may be: tiles first, then images, then heads.

    Tiles come in order, so that what starts at the first key is the first sum for its rows, and the other way round.
    """
    heads, images, rows, keys = *q.shape[:3], k.shape[2]
    times = 1 if q.device.type == "cpu" else ELSEWHERE
    at_once = min(times * AT_ONCE, max(1, times * MAPS_AT_ONCE // max(1, depth)))
    some_rows, some_keys = rows, keys
    if rows * keys > at_once:
        side = math.isqrt(at_once)
        some_rows, some_keys = _even(rows, max(side, at_once // keys)), _even(keys, max(side, at_once // rows))
    planes = max(1, at_once // max(1, keys * rows))
    some_images = _even(images, planes) if images else 1
    some_heads = min(heads, planes // some_images) if some_images == images else 1
    size = some_heads * some_images * some_rows * some_keys
    buffers = [q.new_empty(size * depth), q.new_empty(size), q.new_empty(size)]

    @functools.cache  # most blocks are of one shape
    def scratch(planes: int, m: int, n: int) -> _Scratch:
        shapes = (planes, depth, n, m), (planes, n, m), (planes, n, m)
        maps, scores, other = (x[: math.prod(shape)].view(shape) for x, shape in zip(buffers, shapes, strict=True))
        return _Scratch(maps, maps.unbind(1), scores, other)

    planes = [_Part(h, b) for h, b in itertools.product(_slices(heads, some_heads), _slices(images, some_images))]
    for part, m, n in itertools.product(planes, _slices(rows, some_rows), _slices(keys, some_keys)):
        yield part, m, n, scratch(part.planes, m.stop - m.start, n.stop - n.start)


def _even(size: int, most: int) -> int:
    """The length of equal parts of `size`, none longer than `most`."""
    return math.ceil(size / math.ceil(size / most))


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _through_maps(
    q: Tensor, k: Tensor, scale: float, basis: LinearBasis, scratch: _Scratch, spread: Callable[[int], Tensor]
) -> Tensor:
    """Writes maps as `_see` does and returns dS = sum_f psi_f'(S) E_f, E_f = spread(f): by the maps' own graph."""
    s = scratch.scores
    x = torch.baddbmm(s, k, q.mT, beta=0, alpha=scale, out=s).detach().requires_grad_()
    with _autograd():
        if not x.view_as(x).requires_grad:  # every slope would be 0, without an error
            raise RuntimeError(f"autograd is switched off where {basis!r} needs it for the slopes of its maps.")
        psi = dict(basis.maps(x))
    for f, psi_f in psi.items():
        scratch.each[f].copy_(psi_f.detach())
    sloped = [f for f, psi_f in psi.items() if psi_f.requires_grad]  # a constant map has no slope
    if not sloped:
        return torch.zeros_like(s)
    return torch.autograd.grad([psi[f] for f in sloped], x, [spread(f).clone() for f in sloped])[0]


@contextmanager
def _autograd():
    """Autograd on. `torch.enable_grad` is not enough in an operation of torch.library, which runs below autograd."""
    hidden = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        hidden = hidden.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden), torch.enable_grad():
        yield
