"""Bases whose parameters stand inside the non-linearity: rational functions and wavelets.

Here every edge (p, q) has a function of its own shape, phi(x; theta_pq), and no feature map can be shared: a unit costs
one evaluation per score and edge. Operators therefore go unit by unit and keep nothing for the backward pass
(functional.py). Definitions: paper, section 1; what it leaves open is settled beside each formula.

All are safe for |x| up to 1e4 and more, in value and gradient: exponentials vanish before powers grow, and nothing has
a pole.
"""

import math

import torch
from torch import Tensor

from .bases import BASE_ACTIVATIONS, Basis, register_basis, typical_scores
from .checks import at_least


class EdgeBasis(Basis):
    """A basis with parameters inside, P per edge. Subclasses set `num_parameters` (P) and define `evaluate`.

    By default the first parameter is a factor w, and the others start as `rest` says; a basis for which that does not
    hold defines `draw` and `scaled` as well.
    """

    rest: tuple[float, ...] = ()  # where the parameters after w start

    @property
    def num_parameters(self) -> int:
        return 1 + len(self.rest)

    @torch.no_grad()
    def draw(self, coef: Tensor, init: str, num_edges: int) -> None:
        """paper: w ~ N(0, 1). variance: w ~ N(0, v), v = 1 / (num_edges E[shape(S)^2]), S ~ N(0, 1)."""
        coef[..., 0].normal_()
        coef[..., 1:] = coef.new_tensor(self.rest)
        if init == "variance":
            x, weight = typical_scores()
            shape = self.evaluate(x, torch.tensor([1.0, *self.rest], dtype=x.dtype))
            coef[..., 0].mul_((num_edges * (weight * shape.square()).sum().item()) ** -0.5)

    def scaled(self, coef: Tensor, factor: Tensor) -> Tensor:
        return torch.cat([coef[..., :1] * factor.unsqueeze(-1), coef[..., 1:]], dim=-1)

    def with_base(self, base: str) -> "EdgeBasis":
        return _EdgeWithBase(self, base)

    def _check(self) -> None:
        x, coef = torch.linspace(-1, 1, 6).view(2, 3), torch.zeros(4, 1, 1, self.num_parameters)
        given = tuple(self.evaluate(x, coef).shape)
        if given != (4, 2, 3):
            raise ValueError(
                f"basis {self.name!r}: evaluate(x, coef) must broadcast x against coef[..., 0]; for x of shape (2, 3) "
                f"and coef of shape {tuple(coef.shape)} expected (4, 2, 3), it gives {given}."
            )


@register_basis("rational")
class Rational(EdgeBasis):
    """phi(x) = (a_0 + a_1 x + ... + a_m x^m) / (1 + |b_1 x + ... + b_n x^n|), safe Pade; P = m + 1 + n: a, then b.

    `degrees` is (m, n), (5, 4) by default. For |x| > 1 both polynomials are evaluated in 1/x: no power overflows.
    """

    def __init__(self, grid: int, degrees: tuple[int, int] = (5, 4)):
        m, n = degrees
        super().__init__(grid)
        self.options = dict(degrees=[at_least("degrees' m", m, 0), at_least("degrees' n", n, 1)])  # as JSON says it

    @property
    def num_parameters(self) -> int:
        m, n = self.options["degrees"]
        return m + 1 + n

    def evaluate(self, x: Tensor, coef: Tensor) -> Tensor:
        m, n = self.options["degrees"]
        # With s = max(|x|, 1), u = x / s and v = 1 / s, both polynomials are s^m and s^n times sums of u^i v^(m - i):
        # powers in x where it is small, in 1/x where it is large. They are the same on every edge, so that a sum over i
        # is a matrix product.
        s = x.abs().clamp(min=1.0)
        u, v = _powers(x / s, max(m, n)), _powers(1 / s, max(m, n))
        top = torch.stack([u[i] * v[m - i] for i in range(m + 1)], dim=-1)
        bottom = torch.stack([u[i] * v[n - i] for i in range(1, n + 1)], dim=-1)
        a, b = coef[..., : m + 1], coef[..., m + 1 :]
        value = torch.einsum("...i,...i->...", top, a) / (v[n] + torch.einsum("...i,...i->...", bottom, b).abs())
        return value * _powers(s if m >= n else 1 / s, abs(m - n))[-1]

    @torch.no_grad()
    def draw(self, coef: Tensor, init: str, num_edges: int) -> None:
        """paper: a, b ~ N(0, 1). variance: b ~ N(0, 1) and a ~ N(0, v), v = 1 / (num_edges E[phi^2]) over a, b, S.

        The expectation is a mean over 4,096 fixed draws of a and b.
        """
        coef.normal_()
        if init == "variance":
            m, _ = self.options["degrees"]
            x, weight = typical_scores()
            many = torch.randn(4096, 1, self.num_parameters, generator=torch.Generator().manual_seed(0)).double()
            mean = (weight * self.evaluate(x, many).square().mean(dim=0)).sum().item()
            coef[..., : m + 1].mul_((num_edges * mean) ** -0.5)

    def scaled(self, coef: Tensor, factor: Tensor) -> Tensor:
        m, _ = self.options["degrees"]
        return torch.cat([coef[..., : m + 1] * factor.unsqueeze(-1), coef[..., m + 1 :]], dim=-1)


def _powers(x: Tensor, highest: int) -> list[Tensor]:
    """1, x, x^2, ..., x^highest."""
    powers = [torch.ones_like(x)]
    for _ in range(highest):
        powers.append(powers[-1] * x)
    return powers


class Wavelet(EdgeBasis):
    """phi(x) = w psi((x - tau) / s), s = exp(log_s): P = 3 parameters w, tau, log_s, which start at tau = 0, s = 1.

    The grid size plays no part. Subclasses define the mother function `psi`.
    """

    rest = (0.0, 0.0)

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        """The mother function at x~ = (x - tau) / s."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, coef: Tensor) -> Tensor:
        w, tau, log_s = coef.unbind(-1)
        return w * self.psi((x - tau) * torch.exp(-log_s))


@register_basis("mexican_hat")
class MexicanHat(Wavelet):
    """psi(x) = 2 / (sqrt(3) pi^(1/4)) (x^2 - 1) exp(-x^2/2); integrates to 0."""

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        return 2 / (math.sqrt(3) * math.pi**0.25) * (x.square() - 1) * torch.exp(-0.5 * x.square())


@register_basis("morlet")
class Morlet(Wavelet):
    """psi(x) = cos(5 x) exp(-x^2/2); integrates to 9e-6, not quite 0."""

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        return torch.cos(5 * x) * torch.exp(-0.5 * x.square())


@register_basis("dog")
class DOG(Wavelet):
    """psi(x) = -d/dx exp(-x^2/2) = x exp(-x^2/2), the derivative of a Gaussian; integrates to 0."""

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        return x * torch.exp(-0.5 * x.square())


@register_basis("meyer")
class Meyer(Wavelet):
    """psi(x) = sin(pi |x|) m(nu(clamp(|x|, 0, 1))); integrates to 0.917: a bump pair, no wavelet in the strict sense.

    nu(t) = t^4 (35 - 84 t + 70 t^2 - 20 t^3) rises from 0 to 1; m(t) = 1 up to 1/2, then cos(pi/2 nu(2t - 1)) down to
    0 at 1. The function has a kink at 0.
    """

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        size = x.abs()
        t = _nu(1 - torch.relu(1 - size))  # clamped at 1; relu is faster than clamp, and here t <= 1
        window = torch.cos(0.5 * math.pi * _nu(torch.relu(2 * t - 1)))  # cos 0 = 1 up to t = 1/2, 0 at t = 1
        return torch.sin(math.pi * size) * window * (size < 1)


def _nu(t: Tensor) -> Tensor:
    square = t * t
    return square * square * (35 - t * (84 - t * (70 - 20 * t)))


@register_basis("shannon")
class Shannon(Wavelet):
    """psi(x) = sin(x)/x times a Hamming window 0.54 + 0.46 cos(x/2) on |x| <= 2 pi, else 0; integrates to 3.15."""

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        zero = x == 0  # sin(x)/x, and 1 there
        window = 0.54 + 0.46 * torch.cos(0.5 * x)
        return (torch.sin(x) + zero) / (x + zero) * window * (x.abs() <= 2 * math.pi)


class _EdgeWithBase(EdgeBasis):
    """An edge basis plus a weight times the base activation b(x)."""

    def __init__(self, basis: EdgeBasis, base: str):
        super().__init__(basis.grid)
        self.name, self.options, self.basis, self.base = basis.name, basis.options, basis, base

    @property
    def num_parameters(self) -> int:
        return self.basis.num_parameters + 1

    def evaluate(self, x: Tensor, coef: Tensor) -> Tensor:
        return self.basis.evaluate(x, coef[..., :-1]) + coef[..., -1] * BASE_ACTIVATIONS[self.base](x)
