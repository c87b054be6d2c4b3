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
    blocks = _Blocks(q, k, right.shape[3])
    for q_p, k_p, right_p, y_p in blocks.planes(q, k, right, y):
        for rows, keys, scratch in blocks.tiles(len(q_p)):
            _see(rows(q_p, 1), keys(k_p, 1), scale, basis, scratch)
            of_right = keys(right_p, 3).flatten(2)
            rows(y_p, 2).baddbmm_(of_right, scratch.maps.flatten(1, 2), beta=keys.later)
    return y.mT.transpose(0, 1)


def mix_gradients(
    grad: Tensor, q: Tensor, k: Tensor, right: Tensor, scale: float, basis: LinearBasis
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and of what stands beside the maps chi, given that of Y: grad (B, h, M, e).

    `right` stands beside chi in the *derivative* of the units where the basis knows that (`mixing`), else beside chi.

        E_f = grad R_f^T,   dS = sum_f chi_f(S) E_f,   dQ = scale dS K,   dK = scale dS^T Q,   dR_f = chi_f(S)^T grad
    """
    q, k, grad = q.transpose(0, 1), k.transpose(0, 1), grad.transpose(0, 1)
    raw, right = basis.mixing() is not None, right.permute(1, 0, 2, 3, 4).contiguous()  # (h, B or 1, F, N, e)
    dright = right.new_zeros(*right.shape[:2], right.shape[4], *right.shape[2:4])  # (h, B or 1, e, F, N)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    right = right.expand(-1, q.shape[1], -1, -1, -1)
    blocks = _Blocks(q, k, right.shape[2])
    for q_p, k_p, grad_p, dq_p, dk_p, right_p, dright_p in blocks.planes(q, k, grad, dq, dk, right, dright):
        for rows, keys, scratch in blocks.tiles(len(q_p)):
            of_q, of_k = rows(q_p, 1), keys(k_p, 1)
            of_grad = rows(grad_p, 1).mT.contiguous()  # (P, e, rows)
            of_right = keys(right_p, 2).unbind(1)  # F times (P, keys, e)

            def spread(f, of_right=of_right, of_grad=of_grad, e_f=scratch.other):
                return torch.bmm(of_right[f], of_grad, out=e_f)

            if raw:
                ds = _see(of_q, of_k, scale, basis, scratch)
            else:
                ds = _through_maps(of_q, of_k, scale, basis, scratch, spread)
            found = torch.bmm(of_grad, scratch.maps.flatten(1, 2).mT).unflatten(2, (blocks.depth, -1))
            if len(dright_p) < len(found):  # all images of a head have one
                found = found.unflatten(0, (len(dright_p), -1)).sum(dim=1)
            keys(dright_p, 3).add_(found)
            if raw:  # the scores themselves are not needed again: the sum stands in their place
                for f, chi in enumerate(scratch.each):
                    ds = ds.addcmul_(chi, spread(f)) if f else torch.mul(chi, spread(f), out=ds)
            rows(dq_p, 1).baddbmm_(ds.mT, of_k, alpha=scale, beta=keys.later)
            keys(dk_p, 1).baddbmm_(ds, of_q, alpha=scale, beta=rows.later)
    return dq.transpose(0, 1), dk.transpose(0, 1), dright.permute(1, 0, 3, 4, 2)


class _Scratch(NamedTuple):
    """Where a block computes; keys before rows in all of it."""

    maps: Tensor  # (P, F, q, k)
    each: tuple[Tensor, ...]  # the same map by map, F times (P, q, k)
    scores: Tensor  # (P, q, k)
    other: Tensor  # (P, q, k)


def _see(q: Tensor, k: Tensor, scale: float, basis: LinearBasis, scratch: _Scratch) -> Tensor:
    """Writes scores and maps of a block into its scratch; returns the scores."""
    s = scratch.scores.baddbmm_(k, q.mT, beta=0, alpha=scale)
    basis.write(s, scratch.each)
    return s


class _Tile:
    """Some rows or keys of planes; all of them, mostly, and then there is nothing to cut."""

    def __init__(self, start: int, stop: int, size: int):
        self.start, self.length, self.whole = start, stop - start, (start, stop) == (0, size)
        self.later = int(start > 0)  # whether a sum over tiles has begun before this one: a factor for what is there

    def __call__(self, x: Tensor, axis: int) -> Tensor:
        return x if self.whole else x.narrow(axis, self.start, self.length)


class _Blocks:
    """How head-major tensors (h, B, ...) are cut: tiles only where a plane is too large, then images, then heads."""

    def __init__(self, q: Tensor, k: Tensor, depth: int):
        heads, images, rows, keys = *q.shape[:3], k.shape[2]
        times = 1 if q.device.type == "cpu" else ELSEWHERE
        at_once = min(times * AT_ONCE, max(1, times * MAPS_AT_ONCE // max(1, depth)))
        some_rows, some_keys = rows, keys
        if rows * keys > at_once:
            side = math.isqrt(at_once)
            some_rows, some_keys = _even(rows, max(side, at_once // keys)), _even(keys, max(side, at_once // rows))
        planes = max(1, at_once // max(1, keys * rows))
        self.all_images, self.images = images, _even(images, planes) if images else 1
        self.heads = min(heads, planes // self.images) if self.images == images else 1
        size = self.heads * self.images * some_rows * some_keys
        self.depth, buffers = depth, [q.new_empty(size * depth), q.new_empty(size), q.new_empty(size)]
        # In order: what starts at the first key is the first sum for its rows, and the other way round.
        self.cuts = list(itertools.product(_tiles(rows, some_rows), _tiles(keys, some_keys)))
        # Most blocks are of one shape. A cached method would hold this object, and all its memory, in a circle.
        self.scratch = functools.cache(functools.partial(_scratch, buffers, depth))

    def planes(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """What each block has of each tensor: (P, ...) of (h, B, ...), and (heads, ...) of (h, 1, ...).

        Views of what is new and contiguous, so that they can be written to.
        """
        return zip(*map(self._planes, tensors), strict=True)

    def _planes(self, x: Tensor) -> list[Tensor]:
        if self.heads > 1:
            return [part.flatten(0, 1) for part in x.split(self.heads)]
        parts = -(-self.all_images // self.images)
        if x.shape[1] == self.all_images:
            return [part for head in x.unbind(0) for part in head.split(self.images)[:parts]]
        return [head for head in x.unbind(0) for _ in range(parts)]

    def tiles(self, planes: int) -> Iterator[tuple[_Tile, _Tile, _Scratch]]:
        """(rows, keys, scratch) of each tile of so many planes."""
        for rows, keys in self.cuts:
            yield rows, keys, self.scratch(planes, rows.length, keys.length)


def _scratch(buffers: list[Tensor], depth: int, planes: int, m: int, n: int) -> _Scratch:
    shapes = (planes, depth, n, m), (planes, n, m), (planes, n, m)
    maps, scores, other = (x[: math.prod(shape)].view(shape) for x, shape in zip(buffers, shapes, strict=True))
    return _Scratch(maps, maps.unbind(1), scores, other)


def _even(size: int, most: int) -> int:
    """The length of equal parts of `size`, none longer than `most`."""
    return math.ceil(size / math.ceil(size / most))


def _tiles(size: int, step: int) -> list[_Tile]:
    return [_Tile(start, min(start + step, size), size) for start in range(0, size, max(1, step))]


def _through_maps(
    q: Tensor, k: Tensor, scale: float, basis: LinearBasis, scratch: _Scratch, spread: Callable[[int], Tensor]
) -> Tensor:
    """Writes maps as `_see` does and returns dS = sum_f psi_f'(S) E_f, E_f = spread(f): by the maps' own graph."""
    s = scratch.scores.baddbmm_(k, q.mT, beta=0, alpha=scale)
    x = s.detach().requires_grad_()
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
