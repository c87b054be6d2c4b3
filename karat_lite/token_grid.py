"""Token axes are image grids: take them to another grid by interpolation, as is done with position embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .bases import wide


def resize_tokens(x: Tensor, axis: int, side: int) -> tuple[Tensor, Tensor]:
    """Interpolate one token axis of x from 1 + s^2 entries to 1 + side^2; entry 0, the class token's, stays apart.

    Returns (resized x, factor (1 + side^2,)). The factor is what each entry is multiplied by where sums over the axis
    shall keep their size: 1 for the class token, s^2 / side^2 for patches. Equal size gives back the same numbers.
    Raises `ValueError` where the axis is no square grid with a class token.
    """
    axis %= x.ndim
    n = x.shape[axis] - 1
    s = math.isqrt(max(n, 0))
    if s * s != n or n == 0:
        raise ValueError(f"{n + 1} tokens are no square grid of patches and a class token: they cannot be resized.")
    factor = torch.full((1 + side**2,), n / side**2, dtype=torch.float64)
    factor[0] = 1.0
    if side == s:
        return x, factor
    own, patches = x.movedim(axis, -1).split([1, n], dim=-1)
    # antialias: a smaller grid averages what it drops.
    grid = F.interpolate(wide(patches).reshape(1, -1, s, s), size=(side, side), mode="bicubic", antialias=True)
    patches = grid.reshape(*patches.shape[:-1], side**2).to(x.dtype)
    return torch.cat([own, patches], dim=-1).movedim(-1, axis), factor
