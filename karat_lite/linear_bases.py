"""Bases that are linear in their parameters, beside Fourier: splines, polynomials, bumps (paper, section 1)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .bases import LinearBasis, register_basis
from .checks import at_least


def _check_reach(reach: float) -> float:
    if isinstance(reach, str) or not 0 < reach < float("inf"):
        raise ValueError(f"reach must be > 0, got {reach!r}: the basis lives on [-reach, reach].")
    return float(reach)


@register_basis("bspline")
class BSpline(LinearBasis):
    """phi(x) = w (SiLU(x) + sum_m c_m B_m(x)): B-splines of order k on G equal intervals of [-I, I]; F = G + k.

    The knots go on for k intervals to either side, so that inside [-I, I] the splines sum to 1; far outside all are 0
    and only the base activation is left (KAN's own layer; paper, section 1). `order` is k, `reach` is I.
    """

    default_base = "silu"

    def __init__(self, grid: int, order: int = 3, reach: float = 4.0):
        super().__init__(grid)
        self.options |= dict(order=at_least("order", order, 1), reach=_check_reach(reach))

    @property
    def num_features(self) -> int:
        return self.grid + self.options["order"]

    def maps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        # Cox and de Boor on knots -k .. G+k in units of the spacing. Two hats of order d-1 make one of order d.
        k, reach = self.options["order"], self.options["reach"]
        u = (x + reach) * (self.grid / (2 * reach))
        hats = [((u >= j) & (u < j + 1)).to(x.dtype) for j in range(-k, self.grid + k)]
        for d in range(1, k + 1):
            hats = [
                ((u - j) * hats[i] + (j + d + 1 - u) * hats[i + 1]) / d
                for i, j in enumerate(range(-k, self.grid + k - d))
            ]
        yield from enumerate(hats)

    @torch.no_grad()
    def draw(self, coef: Tensor, init: str, num_edges: int) -> None:
        """paper: KAN's own start, near zero: c ~ N(0, 0.1^2), so that SiLU speaks first. variance: as for any basis."""
        super().draw(coef, init, num_edges)
        if init == "paper":
            coef.mul_(0.1)


@register_basis("chebyshev")
class Chebyshev(LinearBasis):
    """phi(x) = sum_{m=0..G} c_m T_m(tanh x), T_m(cos t) = cos(m t): polynomials need a bounded argument; F = G + 1."""

    @property
    def num_features(self) -> int:
        return self.grid + 1

    def maps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        t = torch.tanh(x)
        before, now = torch.ones_like(t), t
        yield 0, before
        for m in range(1, self.grid + 1):
            yield m, now
            before, now = now, 2 * t * now - before


@register_basis("rbf")
class RBF(LinearBasis):
    """phi(x) = sum_{m=1..G} c_m exp(-(x - mu_m)^2 / (2 s^2)): G centres mu_m evenly on [-I, I], s their spacing; F = G.

    One centre alone (G = 1) stands at 0 with s = I. `reach` is I.
    """

    def __init__(self, grid: int, reach: float = 4.0):
        super().__init__(grid)
        self.options |= dict(reach=_check_reach(reach))

    @property
    def num_features(self) -> int:
        return self.grid

    def maps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        reach = self.options["reach"]
        spacing = 2 * reach / (self.grid - 1) if self.grid > 1 else reach
        for m in range(self.grid):
            centre = m * spacing - reach if self.grid > 1 else 0.0
            yield m, torch.exp(-0.5 * ((x - centre) / spacing).square())
