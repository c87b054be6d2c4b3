"""The learnable operator that stands where softmax stood: coefficients, projector, scales, and how they start."""

import torch
from torch import Tensor, nn

from . import functional
from .bases import BASE_ACTIVATIONS, Basis, LinearBasis, make_basis, wide
from .checks import a_flag, at_least, one_of
from .functional import apply_operator, mix_values, project_simplex
from .recompute import recompute
from .token_grid import resize_tokens

INITS = ("variance", "paper", "softmax")
ORDERS = ("w_phi", "phi_w", "phi_phi")


class KArAtOperator(nn.Module):
    """h learnable activations of attention, one per head (paper, section 1).

        full rank   Phi[A_k]              Phi  (N x N units)                          rank=None
        w_phi       W Phi^[A_k]           Phi^ (r x N units), then W (N x r)          rank=r, the paper's choice
        phi_w       Phi^[W A_k]           W (r x N), then Phi^ (N x r units)          rank=r, order="phi_w"
        phi_phi     Phi2^[Phi1^[A_k]]     Phi1^ (r x N units), Phi2^ (N x r units)    rank=r, order="phi_phi"

    A unit is phi(x) = b(x) + sum_f c_f psi_f(x), or b(x) + phi(x; theta) for a basis with parameters inside; with
    `edge_scales` phi(x) = w_b b(x) + w_s sum_f c_f psi_f(x), as in KAN's own layer. Base activations b: "zero" |
    "identity" | "silu" | "gelu"; None takes the basis's own (SiLU for B-splines, zero for all others). With b = 0 the
    base weight w_b multiplies nothing: it is counted and has gradient 0. `simplex` projects every activated row on the
    probability simplex.

    Parameters, for every head: `coef` (out, in, F) of the units, `weight` of W, `w_b` and `w_s` (out, in); phi_phi has
    `coef2`, `w_b2`, `w_s2` instead of a W. F is `basis.num_parameters`. The paper's operator has r N (F + 1) parameters
    a head, with scales r N (F + 3).

    Initial values, `init`:
        "paper"     the basis's own (Fourier: c ~ N(0, 1)); W uniform on +-1/sqrt(columns), that is r for W Phi^ (the
                    paper does not say how W starts: our assumption).
        "variance"  (default) the output starts with the variance of the values. For Fourier, cos^2 + sin^2 = 1 gives a
                    unit the variance G Var(c) at any score; Y sums N units, A sums r of them, O sums N values. So
                    Var(c) = 1/(N G) makes Var(Y) = 1, and Var(W) = 1/(r N) makes Var(O) = Var(V). Full rank: Var(c) =
                    1/(N^2 G). Phi W: Var(W) = 1/N keeps the scores' size, Var(c) = 1/(r N G). Phi Phi: as its parts.
        "softmax"   as "variance", with the output's variance divided by N: what softmax starts with, whose first maps
                    average N values with nearly equal weights.
    All three speak of the learned part. A base activation starts with weight 1 whatever `init` says, as in KAN, and
    adds what it gives: little while scores are small, more than the learned part once they are of size 1, and in the
    orders other than w_phi much from the start. Rational functions have heavy tails: their variance comes out up to
    three times as large, in phi_phi, where tails meet tails, ten to some hundred times.

    `backend` (an attribute, "auto") is that of `functional.karat_attention`; set it at any time. It governs w_phi and
    full rank; phi_w has "recompute" and "triton" beside one other way, phi_phi and `simplex` are computed one way.

    One operator serves one token count N: its units belong to token positions; `resized` makes one for another grid.
    """

    def __init__(
        self,
        num_heads: int,
        num_tokens: int,
        basis: str | Basis = "fourier",
        grid: int = 3,
        rank: int | None = 12,
        init: str = "variance",
        edge_scales: bool = False,
        *,
        order: str = "w_phi",
        base: str | None = None,
        simplex: bool = False,
        basis_options: dict | None = None,
    ):
        super().__init__()
        self.backend = "auto"
        self.num_heads = at_least("num_heads", num_heads, 1)
        self.num_tokens = at_least("num_tokens", num_tokens, 1)
        if not isinstance(basis_options, dict | None):
            raise TypeError(f"basis_options must be a dict of the basis's own options, got {basis_options!r}.")
        self.basis = make_basis(basis, grid, **(basis_options or {}))
        self.init, self.order = one_of("init", init, INITS), one_of("order", order, ORDERS)
        self.base = one_of("base activation", self.basis.default_base if base is None else base, BASE_ACTIVATIONS)
        self.edge_scales, self.simplex = a_flag("edge_scales", edge_scales), a_flag("simplex", simplex)
        rank = None if rank is None else at_least("rank", rank, 1)
        if rank is not None and rank > num_tokens:
            raise ValueError(
                f"rank = {rank} is larger than the {num_tokens} tokens of this grid: take rank <= {num_tokens}, "
                "or rank=None for the full-rank operator (to resize: an image with more patches)."
            )
        if rank is None and order != "w_phi":
            raise ValueError(f"order = {order!r} needs a rank: the full-rank operator (rank=None) is one Phi alone.")
        self.rank = rank
        n, r = num_tokens, num_tokens if rank is None else rank
        # Plain parameters, no nn.Linear: initialisers that walk over a model would reset every Linear they meet.
        self._add_units("", *((n, r) if order == "phi_w" else (r, n)))
        if order == "phi_phi":
            self._add_units("2", n, r)
        shape = (num_heads, r, n) if order == "phi_w" else (num_heads, n, r)
        self.weight = nn.Parameter(torch.empty(shape)) if rank is not None and order != "phi_phi" else None
        self.reset_parameters()

    def _add_units(self, stage: str, units: int, inputs: int) -> None:
        shape = (self.num_heads, units, inputs)
        self.register_parameter(f"coef{stage}", nn.Parameter(torch.empty(*shape, self.basis.num_parameters)))
        for name in (f"w_b{stage}", f"w_s{stage}"):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if self.edge_scales else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew by the scheme `init` (see the class)."""
        n, r = self.num_tokens, self.rank
        # How many edges stand between one score and one output: that sum, and the one over N values, set the variance.
        edges = n * n if r is None else n * r if self.order == "phi_w" else n
        scheme = "paper" if self.init == "paper" else "variance"
        self.basis.draw(self.coef, scheme, edges)
        if self.order == "phi_phi":
            self.basis.draw(self.coef2, scheme, n * r)
        if self.weight is not None and self.init == "paper":
            bound = self.weight.shape[-1] ** -0.5
            self.weight.uniform_(-bound, bound)
        elif self.weight is not None:
            self.weight.normal_(std=(n if self.order == "phi_w" else r * n) ** -0.5)
        if self.init == "softmax":
            self._shrink_output(n**-0.5)
        for name, scale in self.named_parameters():
            if name.startswith(("w_b", "w_s")):
                scale.fill_(1.0)

    def _shrink_output(self, factor: float) -> None:
        """Multiply the last stage's parameters, in which the output is linear."""
        if self.weight is not None and self.order == "w_phi":
            self.weight.mul_(factor)
            return
        coef = self.coef2 if self.order == "phi_phi" else self.coef
        coef.copy_(self.basis.scaled(coef, coef.new_full(coef.shape[:-1], factor)))

    def units(self, stage: str = "") -> tuple[Basis, Tensor]:
        """The functions of Phi ("") or Phi2 ("2") with base activation and scales merged in: a basis, and its coef.

        The coefficients are given in float32 or better, as the basis is computed.
        """
        coef, w_b, w_s = (getattr(self, f"{name}{stage}") for name in ("coef", "w_b", "w_s"))
        coef, w_b, w_s = wide(coef), None if w_b is None else wide(w_b), None if w_s is None else wide(w_s)
        basis = self.basis
        if w_s is not None:
            coef = basis.scaled(coef, w_s)
            if self.base == "zero":
                # w_b adds zero, but stays in the graph, because DDP refuses parameters that get no gradient.
                return basis, coef + 0.0 * w_b.unsqueeze(-1)
        if self.base != "zero":
            w_b = coef.new_ones(coef.shape[:-1]) if w_b is None else w_b
            basis, coef = basis.with_base(self.base), torch.cat([coef, w_b.unsqueeze(-1)], dim=-1)
        return basis, coef

    def activate(self, scores: Tensor) -> Tensor:
        """The activated map, for looking: scores (B, h, N, N) -> (B, h, N, N). Rows are signed, their sums free.

        With `simplex` each row is positive or zero, and its sum 1.
        """
        self._check_tokens(scores)
        if scores.shape[3] != self.num_tokens:
            raise ValueError(f"scores must be (B, h, N, N), N = {self.num_tokens} here, got {tuple(scores.shape)}.")
        with torch.autocast(device_type=scores.device.type, enabled=False):
            x, stage = wide(scores), ""
            if self.order == "phi_w":
                x = x @ wide(self.weight).transpose(-2, -1)
            elif self.order == "phi_phi":
                x, stage = apply_operator(x, *self.units()), "2"
            basis, coef = self.units(stage)
            weight = self.weight if self.order == "w_phi" else None
            activated = functional.activate(x, basis, coef, weight)
            return project_simplex(activated) if self.simplex else activated

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention output, for speed: q, k, v (B, h, N, d) -> (B, h, N, d).

        The activated map is not formed, but under `simplex`, which needs whole rows.
        """
        self._check_tokens(q)
        if self.order == "w_phi" and not self.simplex:  # all else is checked there
            return functional.karat_attention(q, k, v, *self.units(), self.weight, backend=self.backend)
        functional.check_tokens(q, k, v)
        functional.check_kinds(q=q, k=k, v=v, coef=self.coef)
        one_of("backend", self.backend, (*functional.BACKENDS, "auto"))
        if self.order == "phi_w" and not self.simplex:
            basis, coef = self.units()
            backend = functional.choose_backend(self.backend, basis, q, coef)
            if backend in ("recompute", "triton"):
                # W S_k = (W K) Q_k / sqrt(d): scores against r mixed keys, then full rank on those.
                with torch.autocast(device_type=q.device.type, enabled=False):
                    mixed = wide(self.weight) @ wide(k)
                fused = backend == "triton"
                return recompute(wide(q), mixed, v, basis, coef, None, scale=q.shape[-1] ** -0.5, fused=fused)
        scores = functional.attention_scores(q, k)
        with torch.autocast(device_type=q.device.type, enabled=False):
            if self.simplex:
                return (self.activate(scores) @ wide(v)).to(v.dtype)
            if self.order == "phi_w":
                x, (basis, coef) = scores @ wide(self.weight).transpose(-2, -1), self.units()
            else:
                x, (basis, coef) = apply_operator(scores, *self.units()), self.units("2")
            return mix_values(x, basis, coef, wide(v)).to(v.dtype)

    def sums(self, q: Tensor, k: Tensor) -> Tensor:
        """Y_kp = sum_q phi_pq(S_kq), units summed and nothing mixed yet: q, k (B, h, N, d) -> (B, h, N, r).

        By the recompute backend, whatever `backend` says; so for a linear basis, and for orders that begin with units.
        """
        self._check_tokens(q)
        if self.order == "phi_w" or not isinstance(self.basis, LinearBasis):
            raise ValueError(f"sums of units come from a linear basis before any mixing, got {self}.")
        return recompute(q, k, None, *self.units(), None, scale=q.shape[-1] ** -0.5)

    @torch.no_grad()
    def curve(self, x: Tensor, head: int, p: int, q: int, stage: str = "") -> Tensor:
        """The learned function phi_pq of one head at the points x (n,) -> (n,); stage "2" is Phi2 of phi_phi."""
        one_of("stage", stage, ("", "2") if self.order == "phi_phi" else ("",))
        basis, coef = self.units(stage)
        h, units, inputs, _ = coef.shape
        for name, index, size in (("head", head, h), ("p", p, units), ("q", q, inputs)):
            if not 0 <= index < size:
                raise ValueError(f"{name} = {index} is out of range: this operator has {name} from 0 to {size - 1}.")
        return basis.evaluate(x.to(coef), coef[head, p, q])

    @torch.no_grad()
    def resized(self, side: int) -> "KArAtOperator":
        """This operator for a class token and side x side patches, by interpolation; the same numbers at equal size.

        All token axes are summed over, so patch entries are multiplied by old / new patch counts on each of them: the
        sums keep their size. `backend` and what is frozen stay as they are. Raises `ValueError` where the present grid
        is not square with a class token, the new one has fewer tokens than `rank`, and for base activations without
        `edge_scales`, whose weight 1 cannot shrink; `TypeError` for a subclass, which must say what it is made of.
        """
        if type(self) is not KArAtOperator:
            raise TypeError(f"resized makes a KArAtOperator, and this is a {type(self).__name__}: define its own.")
        with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
            new = KArAtOperator(
                self.num_heads, at_least("side", side, 1) ** 2 + 1, self.basis, rank=self.rank, init=self.init,
                edge_scales=self.edge_scales, order=self.order, base=self.base, simplex=self.simplex,
            ).to(self.coef)  # fmt: skip
        new.backend = self.backend
        if new.num_tokens != self.num_tokens and self.base != "zero" and not self.edge_scales:
            raise ValueError(f"an operator with base activation {self.base!r} is resized only with edge_scales=True.")
        for name, value in self.named_parameters():
            factor = value.new_ones(())
            for axis in self._token_axes(name):
                value, change = resize_tokens(value, axis, side)
                factor = factor * change.to(value).view([-1 if i == axis else 1 for i in range(3)])
            if not name.startswith("coef"):
                value = value * factor
            elif not self.edge_scales:  # else w_b and w_s carry the factor of their units
                value = self.basis.scaled(value, factor.expand(value.shape[:-1]))
            getattr(new, name).copy_(value).requires_grad_(self.get_parameter(name).requires_grad)
        return new

    def _token_axes(self, name: str) -> tuple[int, ...]:
        """Which axes of a parameter are tokens: keys q of Phi, outputs n of W or the last Phi; full rank has both."""
        if self.rank is None:
            return (1, 2)
        outputs = name.endswith("2") or (name == "weight") != (self.order == "phi_w")
        return (1,) if outputs else (2,)

    def _check_tokens(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.num_heads or x.shape[2] != self.num_tokens:
            raise ValueError(
                f"this operator was built for {self.num_heads} heads and {self.num_tokens} tokens, got shape "
                f"{tuple(x.shape)} (expected (B, {self.num_heads}, {self.num_tokens}, ...)). "
                "Build the model with the img_size and patch_size of your images, or resize it (karat_lite.resize)."
            )

    def extra_repr(self) -> str:
        rank = "full" if self.rank is None else self.rank
        said = [f"heads={self.num_heads}, tokens={self.num_tokens}, basis={self.basis!r}, rank={rank}"]
        said += [f"order={self.order!r}"] * (self.order != "w_phi") + [f"base={self.base!r}"] * (self.base != "zero")
        said += ["simplex"] * self.simplex + ["edge scales"] * self.edge_scales
        return ", ".join([*said, f"init={self.init!r}"])
