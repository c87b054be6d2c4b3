"""Families of learnable one-dimensional functions: the shapes that a KArAt unit phi_pq may take.

A *linear* basis is a list of fixed feature maps psi_1 .. psi_F, the same on every edge (p, q) of an operator. A unit is
their weighted sum, phi_pq(x) = sum_f c_pqf psi_f(x), so the maps are evaluated once per score and only the coefficients
c_pqf differ from edge to edge. Everything that makes KArAt affordable follows from that (see functional.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import at_least, one_of

_REGISTRY: dict[str, type["LinearBasis"]] = {}


def register_basis(name: str):
    """Class decorator: make a `LinearBasis` available by `name` wherever a basis is asked for.

    Raises `TypeError` if the class is not a `LinearBasis`, `ValueError` if another class already has the name.
    """

    def decorate(cls):
        if not (isinstance(cls, type) and issubclass(cls, LinearBasis)):
            raise TypeError(f"basis {name!r} must be a subclass of LinearBasis, got {cls!r}.")
        known = _REGISTRY.get(name)
        # A notebook cell that is run twice defines its class anew: same name and place, so replacing it is meant.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a basis named {name!r} exists already ({known.__qualname__}): choose another name.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def available_bases() -> list[str]:
    """Names of the registered bases, sorted."""
    return sorted(_REGISTRY)


def make_basis(basis: "str | LinearBasis", grid: int = 3) -> "LinearBasis":
    """Return the basis called `basis` with grid size G = `grid`; a basis object is returned as it is."""
    if isinstance(basis, LinearBasis):
        return basis
    return _REGISTRY[one_of("basis", basis, available_bases())](grid)


class LinearBasis:
    """A basis that is linear in its parameters. Subclasses set `num_features` (F) and define `maps`."""

    name: str = ""

    def __init__(self, grid: int):
        self.grid = at_least("grid", grid, 1)

    @property
    def num_features(self) -> int:
        """F, the number of feature maps and so of coefficients per edge."""
        raise NotImplementedError

    def maps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (f, psi_f(x)) for every f in 0 .. F-1, in whatever order is cheapest; each map has the shape of x."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """All maps side by side, in coefficient order: x (...) -> psi (..., F)."""
        maps = dict(self.maps(x))
        return torch.stack([maps[f] for f in range(self.num_features)], dim=-1)

    def coefficient_std(self, num_edges: int) -> float:
        """Standard deviation of the coefficients with which a sum over `num_edges` edges starts at variance 1."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(grid={self.grid})"


@register_basis("fourier")
class Fourier(LinearBasis):
    """phi(x) = sum_{m=1..G} a_m cos(m x) + b_m sin(m x) (paper, section 1); F = 2G, ordered cos 1..G, then sin 1..G.

    There is no constant term: cos and sin of the first G harmonics are the whole family.
    """

    @property
    def num_features(self) -> int:
        return 2 * self.grid

    def maps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        # One cosine and one sine per score whatever G is; the harmonics follow by angle addition, which stays accurate
        # (error 1.6e-6 at m = 32 in float32) where the Chebyshev three-term recurrence drifts (3.5e-5).
        cos_1, sin_1 = torch.cos(x), torch.sin(x)
        cos_m, sin_m = cos_1, sin_1
        for m in range(1, self.grid + 1):
            if m > 1:
                cos_m, sin_m = cos_m * cos_1 - sin_m * sin_1, sin_m * cos_1 + cos_m * sin_1
            yield m - 1, cos_m
            yield self.grid + m - 1, sin_m

    def coefficient_std(self, num_edges: int) -> float:
        # cos^2 + sin^2 = 1: one unit with Var(a) = Var(b) = v has variance v G at every x, and the edges add up.
        return (num_edges * self.grid) ** -0.5
