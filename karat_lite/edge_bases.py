"""Bases whose parameters stand inside the non-linearity: rational functions and wavelets.

Here every edge (p, q) has a function of its own shape, phi(x; theta_pq), and no feature map can be shared: a unit costs
one evaluation per score and edge. Operators therefore go unit by unit and keep nothing for the backward pass
(functional.py). Definitions: paper, section 1; what it leaves open is settled beside each formula.

All are safe for |x| up to 1e4 and more, in value and gradient: exponentials vanish before powers grow, and nothing has
a pole.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .bases import (
    BASE_ACTIVATIONS,
    Basis,
    _is_newer,
    refuse_second_base,
    register_basis,
    to_variance,
    typical_scores,
)
from .checks import at_least


class EdgeBasis(Basis):
    """A basis with parameters inside, P per edge. Subclasses set `num_parameters` (P) and define `evaluate`.

    By default the first parameter is a factor w, and the others start as `rest` says; a basis for which that does not
    hold defines `draw` and `scaled` as well.
    """

    rest: tuple[float, ...] = ()  # where the parameters after w start

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if _is_newer(cls, ("evaluate", "psi"), ("pull", "psi_and_slope")):
            cls.pull = EdgeBasis.pull  # a parent's slopes are those of the parent's functions

    @property
    def num_parameters(self) -> int:
        return 1 + len(self.rest)

    @torch.no_grad()
    def draw(self, coef: Tensor, init: str, num_edges: int) -> None:
        """paper: w ~ N(0, 1). variance: w ~ N(0, v), v = 1 / (num_edges E[shape(S)^2]), S ~ N(0, 1)."""
        if self.num_parameters != 1 + len(self.rest):
            raise ValueError(
                f"basis {self.name!r} has num_parameters = {self.num_parameters}, a factor and {len(self.rest)} "
                "numbers in `rest`: say in `rest` where the others start, or define `draw` and `scaled`."
            )
        coef[..., 0].normal_()
        coef[..., 1:] = coef.new_tensor(self.rest)
        if init == "variance":
            x, weight = typical_scores()
            shape = self.evaluate(x, x.new_tensor([1.0, *self.rest]))
            coef[..., 0].mul_(to_variance((weight * shape.square()).sum().item(), num_edges, self))

    def scaled(self, coef: Tensor, factor: Tensor) -> Tensor:
        return torch.cat([coef[..., :1] * factor.unsqueeze(-1), coef[..., 1:]], dim=-1)

    def pull(self, x: Tensor, coef: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of sum grad phi(x; coef) by x and by coef: what an operator's backward pass needs of a basis.

        x (h, q, 1, rows), coef (h, q, p, 1, P), grad (h, 1, p, rows) -> shapes of x and coef. By autograd here; a basis
        that writes its slopes down is several times faster.
        """
        with torch.enable_grad():
            x, coef = x.detach().requires_grad_(), coef.detach().requires_grad_()
            value = self.evaluate(x, coef)
        return torch.autograd.grad(
            value, (x, coef), grad.expand_as(value), allow_unused=True, materialize_grads=True
        )  # a step has no slope

    def with_base(self, base: str) -> "EdgeBasis":
        return _EdgeWithBase(self, base)

    def _check(self) -> None:
        x = torch.linspace(-1, 1, 6, device="cpu").view(2, 3)
        coef = x.new_zeros(4, 1, 1, self.num_parameters)
        given = tuple(self.evaluate(x, coef).shape)
        if given != (4, 2, 3):
            raise ValueError(
                f"basis {self.name!r}: evaluate(x, coef) must broadcast x against coef[..., 0]; for x of shape (2, 3) "
                f"and coef of shape {tuple(coef.shape)} expected (4, 2, 3), it gives {given}."
            )
        if type(self).pull is not EdgeBasis.pull:
            self._check_slopes()

    def _check_slopes(self) -> None:
        same, double = torch.Generator("cpu").manual_seed(0), dict(dtype=torch.float64, device="cpu")
        sizes = (1, 2, 1, 3), (1, 2, 2, 1, self.num_parameters), (1, 1, 2, 3)
        with torch.inference_mode(False):
            x, coef, grad = (torch.randn(size, generator=same, **double) for size in sizes)
            pairs = zip(self.pull(x, coef, grad), EdgeBasis.pull(self, x, coef, grad), strict=True)
        if not all(torch.allclose(mine, its, rtol=1e-5, atol=1e-8) for mine, its in pairs):
            raise ValueError(f"basis {self.name!r}: what `pull` gives are not the slopes of `evaluate`.")


@register_basis("rational")
class Rational(EdgeBasis):
    """phi(x) = (a_0 + a_1 x + ... + a_m x^m) / (1 + |b_1 x + ... + b_n x^n|), safe Pade; P = m + 1 + n: a, then b.

    `degrees` is (m, n), (5, 4) by default. For |x| > 1 both polynomials are evaluated in 1/x: no power overflows.
    """

    def __init__(self, grid: int, degrees: tuple[int, int] = (5, 4)):
        if not isinstance(degrees, Sequence) or len(degrees) != 2:
            raise ValueError(
                f"degrees must be two numbers, of the polynomial above and the one below, got {degrees!r}."
            )
        m, n = degrees
        super().__init__(grid)
        self.options |= dict(degrees=[at_least("degrees' m", m, 0), at_least("degrees' n", n, 1)])  # as JSON says it

    @property
    def num_parameters(self) -> int:
        m, n = self.options["degrees"]
        return m + 1 + n

    def evaluate(self, x: Tensor, coef: Tensor) -> Tensor:
        m, n = self.options["degrees"]
        s, top, bottom = _powers(x, m, n)
        inner = torch.einsum("i...,...i->...", bottom[1:], coef[..., m + 1 :])
        return torch.einsum("i...,...i->...", top, coef[..., : m + 1]) / (bottom[0] + inner.abs()) * s ** (m - n)

    def pull(self, x: Tensor, coef: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """phi = t / (1 + |z|) with polynomials t and z: phi' = (t' - phi sign(z) z') / (1 + |z|); a, b: powers of x."""
        m, n = self.options["degrees"]
        a, b = coef.squeeze(3).split([m + 1, n], dim=-1)  # (h, q, p, ..)
        # Powers over their own power of s, (h, q, i, rows): a sum over i is then a matrix product for all p and rows.
        s, *tables = _powers(x.squeeze(2), m, n, max(m - 1, 0), n - 1)
        top, bottom, less_top, less_bottom = (table.movedim(0, -2) for table in tables)
        inner = b @ bottom[..., 1:, :]  # z / s^n
        sign = inner.sign()
        below = inner.abs_().add_(bottom[..., :1, :])
        ratio = (a @ top).div_(below).mul_(sign)  # phi sign(z) / s^(m - n)
        i, j = (torch.arange(1, degree + 1, dtype=x.dtype, device=x.device) for degree in (m, n))
        slope = (a[..., 1:] * i) @ less_top[..., :m, :] - ((b * j) @ less_bottom).mul_(ratio)
        weight = grad / below
        s = s.unsqueeze(2)
        dx = slope.mul_(weight).sum(dim=2, keepdim=True) * s ** (m - n - 1)
        weight *= s ** (m - n)
        da, db = weight @ top.transpose(-2, -1), ratio.mul_(weight) @ bottom[..., 1:, :].transpose(-2, -1)
        return dx, torch.cat([da, -db], dim=-1).unsqueeze(3)

    @torch.no_grad()
    def draw(self, coef: Tensor, init: str, num_edges: int) -> None:
        """paper: a, b ~ N(0, 1). variance: b ~ N(0, 1) and a ~ N(0, v), v = 1 / (num_edges E[phi^2]) over a, b, S.

        The expectation is a mean over 4,096 fixed draws of a and b.
        """
        coef.normal_()
        if init == "variance":
            m, _ = self.options["degrees"]
            x, weight = typical_scores(101)  # fine enough for these
            same = torch.Generator("cpu").manual_seed(0)
            many = torch.randn(4096, 1, self.num_parameters, generator=same, device="cpu").double()
            mean = (weight * self.evaluate(x, many).square().mean(dim=0)).sum().item()
            coef[..., : m + 1].mul_(to_variance(mean, num_edges, self))

    def scaled(self, coef: Tensor, factor: Tensor) -> Tensor:
        m, _ = self.options["degrees"]
        return torch.cat([coef[..., : m + 1] * factor.unsqueeze(-1), coef[..., m + 1 :]], dim=-1)


def _powers(x: Tensor, *degrees: int) -> list[Tensor]:
    """s = max(|x|, 1), then for each degree x^i / s^degree for i = 0 .. degree on a new first axis: no power overflows.

    They are products of powers of x / s and 1 / s, so of x where it is small and of 1 / x where it is large.
    """
    s = x.abs().clamp(min=1.0)
    u, v, by_x, by_s = [torch.ones_like(x)], [torch.ones_like(x)], x / s, 1 / s
    for _ in range(max(degrees)):
        u.append(u[-1] * by_x)
        v.append(v[-1] * by_s)
    return [s, *(torch.stack([u[i] * v[degree - i] for i in range(degree + 1)]) for degree in degrees)]


class Wavelet(EdgeBasis):
    """phi(x) = w psi((x - tau) / s), s = exp(log_s): P = 3 parameters w, tau, log_s, which start at tau = 0, s = 1.

    The grid size plays no part. Subclasses define the mother function `psi`, and `psi_and_slope` for backward passes.
    """

    rest = (0.0, 0.0)

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        """The mother function at x~ = (x - tau) / s."""
        raise NotImplementedError

    @staticmethod
    def psi_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        """psi(x~) and psi'(x~), which share most of their work."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, coef: Tensor) -> Tensor:
        w, tau, log_s = coef.unbind(-1)
        return w * self.psi((x - tau) * torch.exp(-log_s))

    def pull(self, x: Tensor, coef: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """dphi = psi dw + w psi' dx~,  dx~ = (dx - dtau) / s - x~ dlog_s."""
        w, tau, log_s = coef.unbind(-1)  # (h, q, p, 1) each
        shrink = torch.exp(-log_s)
        x = (x - tau) * shrink
        psi, steep = (y.mul_(grad) for y in self.psi_and_slope(x))
        dw, rise, turn = (y.sum(dim=-1, keepdim=True) for y in (psi, steep, x.mul_(steep)))
        dx = (w * shrink).transpose(-2, -1) @ steep  # the sum over p
        return dx, torch.stack([dw, -w * shrink * rise, -w * turn], dim=-1)


@register_basis("mexican_hat")
class MexicanHat(Wavelet):
    """psi(x) = 2 / (sqrt(3) pi^(1/4)) (x^2 - 1) exp(-x^2/2); integrates to 0."""

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        return 2 / (math.sqrt(3) * math.pi**0.25) * (x.square() - 1) * torch.exp(-0.5 * x.square())

    @staticmethod
    def psi_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        square = x.square()
        bell = 2 / (math.sqrt(3) * math.pi**0.25) * torch.exp(-0.5 * square)
        return (square - 1) * bell, x * (3 - square) * bell


@register_basis("morlet")
class Morlet(Wavelet):
    """psi(x) = cos(5 x) exp(-x^2/2); integrates to 9e-6, not quite 0."""

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        return torch.cos(5 * x) * torch.exp(-0.5 * x.square())

    @staticmethod
    def psi_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        bell, cos, sin = torch.exp(-0.5 * x.square()), torch.cos(5 * x), torch.sin(5 * x)
        return cos * bell, -(5 * sin + x * cos) * bell


@register_basis("dog")
class DOG(Wavelet):
    """psi(x) = -d/dx exp(-x^2/2) = x exp(-x^2/2), the derivative of a Gaussian; integrates to 0."""

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        return x * torch.exp(-0.5 * x.square())

    @staticmethod
    def psi_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        square = x.square()
        bell = torch.exp(-0.5 * square)
        return x * bell, (1 - square) * bell


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

    @staticmethod
    def psi_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.abs()
        a = 1 - torch.relu(1 - size)
        b = torch.relu(2 * _nu(a) - 1)
        sin, window, angle = torch.sin(math.pi * size), size < 1, 0.5 * math.pi * _nu(b)
        cos_angle = torch.cos(angle) * window
        fall = torch.sin(angle) * (_nu_slope(b) * _nu_slope(a))  # d angle / d size = pi nu'(b) nu'(a)
        slope = math.pi * (torch.cos(math.pi * size) * cos_angle - sin * fall * window)
        return sin * cos_angle, slope * x.sign()


def _nu(t: Tensor) -> Tensor:
    square = t * t
    return square * square * (35 - t * (84 - t * (70 - 20 * t)))


def _nu_slope(t: Tensor) -> Tensor:
    return 140 * (t * (1 - t)) ** 3


@register_basis("shannon")
class Shannon(Wavelet):
    """psi(x) = sin(x)/x times a Hamming window 0.54 + 0.46 cos(x/2) on |x| <= 2 pi, else 0; integrates to 3.15."""

    @staticmethod
    def psi(x: Tensor) -> Tensor:
        zero, half = x == 0, 0.5 * x
        cos = torch.cos(half)
        ratio = (2 * torch.sin(half) * cos + zero) / (x + zero)  # sin x / x, and 1 at 0
        return ratio * (0.54 + 0.46 * cos) * (x.abs() <= 2 * math.pi)

    @staticmethod
    def psi_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        zero, half, inside = x == 0, 0.5 * x, x.abs() <= 2 * math.pi
        sin, cos = torch.sin(half), torch.cos(half)
        below = x + zero
        ratio = (2 * sin * cos + zero) / below  # sin x / x
        window = (0.54 + 0.46 * cos) * inside
        # (cos x - sin x / x) / x cancels near 0, where its series is exact: sum_k (-1)^k 2k / (2k + 1)! x^(2k - 1).
        square, near = x * x, torch.zeros_like(x)
        for k in range(5, 0, -1):
            near = near * square + (-1) ** k * 2 * k / math.factorial(2 * k + 1)
        rise = torch.where(x.abs() < 0.3, near * x, (2 * cos * cos - 1 - ratio) / below)
        slope = rise * window - 0.23 * sin * ratio * inside
        return ratio * window, slope


class _EdgeWithBase(EdgeBasis):
    """An edge basis plus a weight times the base activation b(x)."""

    def __init__(self, basis: EdgeBasis, base: str):
        refuse_second_base(basis, base)
        super().__init__(basis.grid)
        self.name, self.options, self.basis, self.base = basis.name, basis.options, basis, base

    @property
    def num_parameters(self) -> int:
        return self.basis.num_parameters + 1

    def evaluate(self, x: Tensor, coef: Tensor) -> Tensor:
        return self.basis.evaluate(x, coef[..., :-1]) + coef[..., -1] * BASE_ACTIVATIONS[self.base](x)
