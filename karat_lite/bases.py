"""Families of learnable one-dimensional functions: the shapes that a KArAt unit phi_pq may take.

A *linear* basis is a list of fixed feature maps psi_1 .. psi_F, the same on every edge (p, q) of an operator. A unit is
their weighted sum, phi_pq(x) = sum_f c_pqf psi_f(x), so the maps are evaluated once per score and only the coefficients
c_pqf differ from edge to edge. Everything that makes KArAt affordable follows from that (see functional.py). The
families themselves: fourier.py, linear_bases.py, and, with parameters inside the non-linearity, edge_bases.py.
"""

import ast
import functools
import inspect
from collections.abc import Iterator, Sequence

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
            value = self.evaluate(x, coef.detach().clone()).sum()
            if not value.requires_grad:  # steps, or a constant
                return torch.zeros_like(x)
            return torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)[0]

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
            # Hooks of its own: who counts meanwhile what is kept does not count what is only looked at.
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
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


def typical_scores(points: int = 4001) -> tuple[Tensor, Tensor]:
    """Points and weights (n,) of the trapezoid rule: sums over them are means over scores S ~ N(0, 1).

    Exact to rounding for smooth functions, and fine enough for a bump of width 0.01, which a rule of Gauss with as many
    points as it has digits would step over.
    """
    x = torch.linspace(-8, 8, points, dtype=torch.float64, device="cpu")
    weight = torch.exp(-0.5 * x.square())
    return x, weight / weight.sum()


def to_variance(mean_square: float, num_edges: int, basis: "Basis") -> float:
    """The factor that brings a sum of `num_edges` units of this mean square to variance 1."""
    if not 0 < mean_square < float("inf"):
        raise ValueError(
            f"{basis!r} has mean square {mean_square:g} at scores of N(0, 1), which no factor brings to a variance: "
            "take init='paper', or another reach."
        )
    return (num_edges * mean_square) ** -0.5


def _is_newer(cls: type, functions: tuple[str, ...], short_cuts: tuple[str, ...]) -> bool:
    """Whether a class gets one of `functions` from a class that comes before those of its `short_cuts`."""

    def first(names):
        there = (i for i, parent in enumerate(cls.__mro__) if any(name in vars(parent) for name in names))
        return next(there, len(cls.__mro__))

    return first(functions) < first(short_cuts)


class LinearBasis(Basis):
    """A basis that is linear in its parameters. Subclasses set `num_features` (F) and define `maps`; that is all."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for short_cut in ("write", "mixing"):  # a parent's are those of the parent's maps
            if _is_newer(cls, ("maps", "num_features"), (short_cut,)):
                setattr(cls, short_cut, getattr(LinearBasis, short_cut))

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
            coef.mul_(to_variance((weight * self.features(x).square().sum(dim=-1)).sum().item(), num_edges, self))

    def _check(self) -> None:
        x = torch.linspace(-1, 1, 6, device="cpu").view(2, 3)
        maps, given = {}, {}
        for f, psi in self.maps(x):
            maps[f], given[f] = psi, psi.clone()
        if sorted(maps) != list(range(self.num_features)):
            raise ValueError(
                f"basis {self.name!r}: maps(x) must yield (f, psi_f) once for each f in 0 .. {self.num_features - 1} "
                f"(num_features = {self.num_features}), it yields f = {sorted(maps)}."
            )
        if changed := [f for f in maps if not torch.equal(maps[f], given[f])]:
            raise ValueError(
                f"basis {self.name!r}: the map f = {changed[0]} is changed in place after it was yielded: make each "
                "map a tensor of its own (t = t * x in place of t *= x)."
            )
        if kinds := [psi.dtype for psi in maps.values() if not psi.is_floating_point()]:
            raise ValueError(f"basis {self.name!r}: maps must be numbers like x, got {kinds[0]}: take psi.to(x.dtype).")
        odd = {f: tuple(psi.shape) for f, psi in maps.items() if psi.shape != x.shape}
        if odd:
            raise ValueError(
                f"basis {self.name!r}: each map must have the shape of x; for x of shape {tuple(x.shape)} "
                f"the map f = {min(odd)} has {odd[min(odd)]}."
            )
        raw, mixing = x.new_empty(self.num_features, *x.shape), self.mixing()
        self.write(x, list(raw))
        found = raw if mixing is None else torch.einsum("fg,g...->f...", mixing[0].to(x), raw)
        if not torch.allclose(found.movedim(0, -1), self.features(x), rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"basis {self.name!r}: what `write` and `mixing` make are not the maps that `maps` yields."
            )
        if mixing is not None:
            slopes = torch.stack([self.derivative(x, row) for row in torch.eye(self.num_features, device="cpu")])
            if not torch.allclose(torch.einsum("fg,g...->f...", mixing[1].to(x), raw), slopes, rtol=1e-3, atol=1e-4):
                raise ValueError(f"basis {self.name!r}: the second matrix of `mixing` does not give the maps' slopes.")


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
