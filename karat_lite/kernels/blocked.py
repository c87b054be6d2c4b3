"""The core operation block by block, for any linear basis on any device: what a block needs stays near the processor.

    S_kq = scale Q_k . K_q,    Y_ke = sum_f sum_q psi_f(S_kq) R_fqe

q (B, h, M, d) asks, k (B, h, N, d) is looked at, right R (B, h, F, N, e), or (1, h, F, N, e) shared by all images.
Scores and feature maps exist for one block at a time, in scratch that all blocks share, and are computed anew in the
backward pass. A block is several images of one head (or all images of several, or a tile of one): P planes. Inside
it maps lie as (P, F, q, k), rows k last: elementwise steps run over whole planes, and the sums over f and q are one
matrix product. Memory is head-major, (h, B, ..), so that the planes of a block lie together. Tiles are about square:
few rows that look at thousands of keys would make that product narrow and deep, which costs up to twice the time.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..bases import LinearBasis

AT_ONCE = 10 << 15  # scores of a block at most: 8 planes of 197 x 197
MAPS_AT_ONCE = 7 << 18  # numbers in its maps at most: G = 11 took up to a third longer with more of them
ELSEWHERE = 16  # times both where no CPU computes: a GPU wants few, large launches, and 0.2 GB of scratch is little


def mix(q: Tensor, k: Tensor, right: Tensor, scale: float, basis: LinearBasis) -> Tensor:
    """Y (B, h, M, e) for q (B, h, M, d), k (B, h, N, d), right (B or 1, h, F, N, e), all float32 or all float64."""
    q, k = q.transpose(0, 1) * scale, k.transpose(0, 1)
    y = right.new_zeros(*q.shape[:2], right.shape[-1], q.shape[2])  # (h, B, e, M)
    right, mixing = right.permute(1, 0, 4, 2, 3), basis.mixing()  # (h, B, e, F, N)
    right = right.contiguous() if mixing is None else mixing[0].to(right).mT @ right
    across = right.expand(-1, q.shape[1], -1, -1, -1)
    for part, rows, keys, scratch in _blocks(q, k, right.shape[3]):
        maps, _ = _see(part(q)[:, rows], part(k)[:, keys], basis, scratch)
        part(y)[..., rows].baddbmm_(part(across)[..., keys].flatten(2), maps.flatten(1, 2))
    return y.mT.transpose(0, 1)


def mix_gradients(
    grad: Tensor, q: Tensor, k: Tensor, right: Tensor, scale: float, basis: LinearBasis
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and right, given that of Y: grad (B, h, M, e).

    E_f = grad R_f^T,   dS = sum_f psi_f'(S) E_f,   dQ = scale dS K,   dK = scale dS^T Q,   dR_f = psi_f(S)^T grad
    """
    q, k, grad = q.transpose(0, 1) * scale, k.transpose(0, 1), grad.transpose(0, 1)
    right, mixing = right.permute(1, 0, 3, 4, 2), basis.mixing()  # (h, B, N, e, F)
    if mixing is not None:
        mix, slopes = (matrix.to(right) for matrix in mixing)
        right = right @ slopes  # phi' in the raw maps
    down = right.movedim(-1, 0).contiguous().expand(-1, -1, q.shape[1], -1, -1)  # (F, h, B, N, e)
    dq, dk = q.new_zeros(q.shape), k.new_zeros(k.shape)
    dright = right.new_zeros(*right.shape[:2], right.shape[3], down.shape[0], down.shape[3])  # (h, B, e, F, N)
    for part, rows, keys, scratch in _blocks(q, k, down.shape[0]):
        of_q, of_k = part(q)[:, rows], part(k)[:, keys]
        of_grad = part(grad)[:, rows].mT.contiguous()  # (P, e, rows)

        def spread(f, part=part, keys=keys, of_grad=of_grad, e_f=scratch[2]):
            return torch.bmm(part(down[f])[:, keys], of_grad, out=e_f)

        if mixing is None:
            maps, s = _through_maps(of_q, of_k, basis, scratch, spread)
        else:
            maps, s = _see(of_q, of_k, basis, scratch)
        part.add_to(dright[..., keys], torch.bmm(of_grad, maps.flatten(1, 2).mT).unflatten(2, maps.shape[1:3]))
        if mixing is not None:  # the scores themselves are not needed again: the sum stands in their place
            for f, psi in enumerate(maps.unbind(1)):
                s = s.addcmul_(psi, spread(f)) if f else torch.mul(psi, spread(f), out=s)
        part(dq)[:, rows].baddbmm_(s.mT, of_k)
        part(dk)[:, keys].baddbmm_(s, of_q)  # of_q brings the factor
    dq *= scale
    dright = dright.permute(1, 0, 4, 2, 3)  # (B, h, N, e, F)
    if mixing is not None:
        dright = dright @ mix.mT
    return dq.transpose(0, 1), dk.transpose(0, 1), dright.permute(0, 1, 4, 2, 3)


def _see(q: Tensor, k: Tensor, basis: LinearBasis, scratch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Maps (P, F, q, k) and scores (P, q, k) of a block, q scaled already; transposed, as all in a block."""
    maps, s, _ = scratch
    torch.bmm(k, q.mT, out=s)
    basis.write(s, maps.unbind(1))
    return maps, s


class _Part:
    """The planes of a block, taken from head-major tensors (h, B, ...) as (P, ...)."""

    def __init__(self, heads: slice, images: slice):
        self.heads, self.images = heads, images
        self.planes = (heads.stop - heads.start) * (images.stop - images.start)

    def __call__(self, x: Tensor) -> Tensor:
        return x[self.heads, self.images].flatten(0, 1)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """x (P, ...) onto total (h, B, ...), or (h, 1, ...) that all images share."""
        if total.shape[1] == 1:
            total[self.heads, 0] += x.unflatten(0, (self.heads.stop - self.heads.start, -1)).sum(dim=1)
        else:
            self(total).add_(x)


def _blocks(q: Tensor, k: Tensor, depth: int) -> Iterator[tuple[_Part, slice, slice, list[Tensor]]]:
    """(planes, rows, keys, scratch) of blocks as large as they may be: tiles first, then images, then heads.

    Scratch for a block: maps (P, F, q, k) with F = `depth`, and two planes (P, q, k).
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
    parts = _slices(heads, some_heads), _slices(images, some_images), _slices(rows, some_rows), _slices(keys, some_keys)
    for h, b, m, n in itertools.product(*parts):
        part = _Part(h, b)
        plane = (n.stop - n.start, m.stop - m.start)
        shapes = ((part.planes, depth, *plane), (part.planes, *plane), (part.planes, *plane))
        scratch = [buffer[: math.prod(shape)].view(shape) for buffer, shape in zip(buffers, shapes, strict=True)]
        yield part, m, n, scratch


def _even(size: int, most: int) -> int:
    """The length of equal parts of `size`, none longer than `most`."""
    return math.ceil(size / math.ceil(size / most))


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _through_maps(
    q: Tensor, k: Tensor, basis: LinearBasis, scratch: list[Tensor], spread: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """As `_see`, with dS = sum_f psi_f'(S) E_f, E_f = spread(f), in place of S: by the graph of the maps themselves."""
    maps, s, _ = scratch
    x = torch.bmm(k, q.mT, out=s).detach().requires_grad_()
    with _autograd():
        if not x.view_as(x).requires_grad:  # every slope would be 0, without an error
            raise RuntimeError(f"autograd is switched off where {basis!r} needs it for the slopes of its maps.")
        psi = dict(basis.maps(x))
    for f, psi_f in psi.items():
        maps[:, f].copy_(psi_f.detach())
    sloped = [f for f, psi_f in psi.items() if psi_f.requires_grad]  # a constant map has no slope
    if not sloped:
        return maps, torch.zeros_like(s)
    return maps, torch.autograd.grad([psi[f] for f in sloped], x, [spread(f).clone() for f in sloped])[0]


@contextmanager
def _autograd():
    """Autograd on. `torch.enable_grad` is not enough in an operation of torch.library, which runs below autograd."""
    hidden = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        hidden = hidden.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden), torch.enable_grad():
        yield
