"""Families of learnable one-dimensional functions: the shapes that a KArAt unit phi_pq may take.

A *linear* basis is a list of fixed feature maps psi_1 .. psi_F, the same on every edge (p, q) of an operator. A unit is
their weighted sum, phi_pq(x) = sum_f c_pqf psi_f(x), so the maps are evaluated once per score and only the coefficients
c_pqf differ from edge to edge. Everything that makes KArAt affordable follows from that (see functional.py). Bases
whose parameters stand inside the non-linearity have a file of their own: edge_bases.py.
"""

import ast
import functools
import inspect
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import at_least, one_of

# b(x) of a unit b(x) + sum_f c_f psi_f(x) (paper, section 1).
BASE_ACTIVATIONS = {"zero": torch.zeros_like, "identity": lambda x: x, "silu": F.silu, "gelu": F.gelu}

_REGISTRY: dict[str, type["Basis"]] = {}


def register_basis(name: str):
    """Class decorator: make a `LinearBasis` or `EdgeBasis` available by `name` wherever a basis is asked for.

    Raises `TypeError` if the class is neither, `ValueError` if another class already has the name.
    """

    if not isinstance(name, str):
        raise TypeError(f'@register_basis("name") takes the name of the basis, got {name!r}: put it in brackets.')

    def decorate(cls):
        if not (isinstance(cls, type) and issubclass(cls, Basis)):
            raise TypeError(f"basis {name!r} must be a subclass of LinearBasis or EdgeBasis, got {cls!r}.")
        known = _REGISTRY.get(name)
        # A notebook cell that is run twice defines its class anew: same name and place, so replacing it is meant.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a basis named {name!r} exists already ({known.__qualname__}): choose another name.")
        cls.name = name
        _REGISTRY[name] = cls
        basis_from_key.cache_clear()  # it may hold a basis of the class that had the name before
        return cls

    return decorate


def available_bases() -> list[str]:
    """Names of the registered bases, sorted."""
    return sorted(_REGISTRY)


def make_basis(basis: "str | Basis", grid: int = 3, **options) -> "Basis":
    """Return the basis called `basis` with grid size G = `grid` and its own options; an object is returned as it is.

    Raises `ValueError` for an unknown name, `TypeError` for an option that the basis does not take.
    """
    if isinstance(basis, Basis):
        if options:
            raise TypeError(f"{basis!r} is made already: give {', '.join(options)} where it is made, or its name here.")
        basis.check_once()
        return basis
    cls = _REGISTRY[one_of("basis", basis, available_bases())]
    try:
        made = cls(grid, **options)
    except TypeError as error:
        if options and "unexpected keyword" in str(error):
            raise TypeError(f"basis {basis!r} does not take all of {', '.join(options)}: {error}.") from None
        raise
    made.check_once()
    return made


@functools.cache  # it takes a millisecond, and compiled code asks in every pass of every layer
def basis_from_key(key: str) -> "Basis":
    """The basis that a `Basis.key` names: torch.compile keeps a basis as text."""
    try:
        name, grid, options, base = ast.literal_eval(key)
    except (ValueError, SyntaxError):
        raise ValueError(
            f"torch.compile makes a basis again from its name and options, which must be plain numbers, text, lists or "
            f"dicts, got {key}: give plain ones, or do not compile."
        ) from None
    if not name:
        raise ValueError("torch.compile makes a basis again from its name, and this one has none: register_basis it.")
    basis = make_basis(name, grid, **options)
    return basis if base is None else basis.with_base(base)


def wide(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Basis:
    """What both kinds of basis have in common: a name, a grid size, a number of parameters per edge, a start.

    `options` holds the arguments beside the grid; `make_basis(name, grid, **options)` builds the like. They are taken
    down when an object is made, so that a subclass need not; it may replace them by what it made of them.
    """

    name: str = ""
    default_base: str = "zero"  # the base activation b(x) that an operator takes unless told otherwise
    _checked = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.name = ""  # `register_basis` gives it: a subclass is not what its parent's name makes
        cls._good = set()  # keys that `check_once` has found right

    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        given, names = signature.bind_partial(made, *args, **kwargs).arguments, list(signature.parameters)
        made.options = {}
        for name, value in given.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                made.options |= value
            elif name != names[0] and name != ("grid" if "grid" in names else names[1]):
                made.options[name] = value
        return made

    def __init__(self, grid: int):
        self.grid = at_least("grid", grid, 1)

    @property
    def key(self) -> str:
        """Name, grid, options and base activation as text: `basis_from_key` makes the like of a registered basis."""
        options = ", ".join([f"{name!r}: {value!r}" for name, value in self.options.items()])
        return f"({self.name!r}, {self.grid}, {{{options}}}, {getattr(self, 'base', None)!r})"

    @property
    def num_parameters(self) -> int:
        """Learnable numbers per edge, the last axis of an operator's `coef`."""
        raise NotImplementedError

    def draw(self, coef: Tensor, init: str, num_edges: int) -> None:
        """Fill coef (..., num_parameters) by the scheme "paper", or "variance": `num_edges` units sum to variance 1."""
        raise NotImplementedError

    def scaled(self, coef: Tensor, factor: Tensor) -> Tensor:
        """The parameters of factor * phi: coef (..., num_parameters), factor (...)."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, coef: Tensor) -> Tensor:
        """phi(x) edge by edge: x (...), coef (..., num_parameters), broadcast against each other -> (...)."""
        raise NotImplementedError

    def derivative(self, x: Tensor, coef: Tensor) -> Tensor:
        """phi'(x), shapes as in `evaluate`; a number, not a graph: nothing can be differentiated through it."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().expand(torch.broadcast_shapes(x.shape, coef.shape[:-1])).clone().requires_grad_()
            # Each value depends on its own x alone, so the gradient of their sum is phi'.
            return torch.autograd.grad(self.evaluate(x, coef.detach().clone()).sum(), x)[0]

    def with_base(self, base: str) -> "Basis":
        """The same basis with one parameter more per edge, last: the weight of the base activation b(x)."""
        raise NotImplementedError

    def check_once(self) -> None:
        """Raise `ValueError` where the class contradicts itself (its maps or its shapes).

        Looked at once for each object, and of a class with a name once for each grid and options.
        """
        if self._checked:
            return
        alike = type(self)._good
        if not (self.name and self.key in alike):
            self._check()
            alike.add(self.key)
        self._checked = True

    def _check(self) -> None:
        """What `check_once` looks at; nothing here."""

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}(grid={self.grid}{options})"


def refuse_second_base(basis: Basis, base: str) -> None:
    """`ValueError` for a basis that has a base activation."""
    if hasattr(basis, "base"):
        raise ValueError(f"{basis!r} has the base activation {basis.base!r}: {base!r} cannot be a second one.")


def typical_scores() -> tuple[Tensor, Tensor]:
    """Points and weights (n,) of Gauss and Hermite: sums over them are means over scores S ~ N(0, 1)."""
    x, weight = np.polynomial.hermite_e.hermegauss(64)
    return torch.from_numpy(x), torch.from_numpy(weight / weight.sum())


class LinearBasis(Basis):
    """A basis that is linear in its parameters. Subclasses set `num_features` (F) and define `maps`; that is all."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if ("maps" in own or "num_features" in own) and not ("write" in own and "mixing" in own):
            # A parent's short cuts write the parent's maps.
            cls.write, cls.mixing = own.get("write", LinearBasis.write), own.get("mixing", LinearBasis.mixing)

    @property
    def num_features(self) -> int:
        """F, the number of feature maps and so of coefficients per edge."""
        raise NotImplementedError

    def maps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (f, psi_f(x)) for every f in 0 .. F-1, in whatever order is cheapest; each map has the shape of x."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        return self.num_features

    def features(self, x: Tensor) -> Tensor:
        """All maps side by side, in coefficient order: x (...) -> psi (..., F)."""
        maps = dict(self.maps(x))
        return torch.stack([maps[f] for f in range(self.num_features)], dim=-1)

    def write(self, x: Tensor, out: Sequence[Tensor]) -> None:
        """Raw maps chi_g(x) into out[g], each of the shape of x, without a graph: psi itself, or what is cheaper."""
        for f, psi in self.maps(x):
            out[f].copy_(psi)

    def mixing(self) -> tuple[Tensor, Tensor] | None:
        """(M, D), each (F, F): psi_f = sum_g M_fg chi_g and psi_f' = sum_g D_fg chi_g; None: chi = psi, D unknown."""
        return None

    def evaluate(self, x: Tensor, coef: Tensor) -> Tensor:
        return (self.features(x) * coef).sum(dim=-1)

    def scaled(self, coef: Tensor, factor: Tensor) -> Tensor:
        return coef * factor.unsqueeze(-1)

    def with_base(self, base: str) -> "LinearBasis":
        return _LinearWithBase(self, base)

    @torch.no_grad()
    def draw(self, coef: Tensor, init: str, num_edges: int) -> None:
        """paper: c ~ N(0, 1). variance: c ~ N(0, v), v = 1 / (num_edges E[sum_f psi_f(S)^2]), S ~ N(0, 1).

        For Fourier cos^2 + sin^2 = 1 makes that sum G at every score, not only on average.
        """
        coef.normal_()
        if init == "variance":
            x, weight = typical_scores()
            coef.mul_((num_edges * (weight * self.features(x).square().sum(dim=-1)).sum().item()) ** -0.5)

    def _check(self) -> None:
        x = torch.linspace(-1, 1, 6, device="cpu").view(2, 3)
        maps = dict(self.maps(x))
        if sorted(maps) != list(range(self.num_features)):
            raise ValueError(
                f"basis {self.name!r}: maps(x) must yield (f, psi_f) once for each f in 0 .. {self.num_features - 1} "
                f"(num_features = {self.num_features}), it yields f = {sorted(maps)}."
            )
        odd = {f: tuple(psi.shape) for f, psi in maps.items() if psi.shape != x.shape}
        if odd:
            raise ValueError(
                f"basis {self.name!r}: each map must have the shape of x; for x of shape {tuple(x.shape)} "
                f"the map f = {min(odd)} has {odd[min(odd)]}."
            )
        if self.mixing() is not None:
            raw = x.new_empty(self.num_features, *x.shape)
            self.write(x, list(raw))
            found = torch.einsum("fg,g...->...f", self.mixing()[0].to(x), raw)
            if not torch.allclose(found, self.features(x), rtol=1e-4, atol=1e-5):
                raise ValueError(
                    f"basis {self.name!r}: what `write` and `mixing` make are not the maps that `maps` yields."
                )


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
        self.options = dict(order=at_least("order", order, 1), reach=_check_reach(reach))

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
        self.options = dict(reach=_check_reach(reach))

    @property
    def num_features(self) -> int:
        return self.grid

    def maps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        reach = self.options["reach"]
        spacing = 2 * reach / (self.grid - 1) if self.grid > 1 else reach
        for m in range(self.grid):
            centre = m * spacing - reach if self.grid > 1 else 0.0
            yield m, torch.exp(-0.5 * ((x - centre) / spacing).square())


class _LinearWithBase(LinearBasis):
    """The maps of a linear basis and one more, the base activation b(x)."""

    def __init__(self, basis: LinearBasis, base: str):
        refuse_second_base(basis, base)
        super().__init__(basis.grid)
        self.name, self.options, self.basis, self.base = basis.name, basis.options, basis, base

    @property
    def num_features(self) -> int:
        return self.basis.num_features + 1

    def maps(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield from self.basis.maps(x)
        yield self.basis.num_features, BASE_ACTIVATIONS[self.base](x)
