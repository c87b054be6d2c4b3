"""The learnable operator that stands where softmax stood: coefficients, projector, scales, and how they start."""

import torch
from torch import Tensor, nn

from . import functional
from .bases import LinearBasis, make_basis
from .checks import at_least, one_of

INITS = ("variance", "paper")


class KArAtOperator(nn.Module):
    """h learnable activations of attention, one per head (paper, section 1).

        modular     sigma^(A_k) = W Phi^[A_k]     Phi^ (r x N units), W (N x r)        rank=r
        full rank   sigma~(A_k) = Phi[A_k]        Phi  (N x N units)                   rank=None

    Parameters, for every head: coef (r, N, F), weight (N, r); with `edge_scales` also w_b and w_s (r, N), as in KAN's
    own layer phi(x) = w_b b(x) + w_s sum_f c_f psi_f(x). With the paper's choice b = 0 the base weight w_b multiplies
    nothing: it is counted and has gradient 0. An operator has r N (F + 1) parameters a head, with scales r N (F + 3).

    Initial values, `init`:
        "paper"     c ~ N(0, 1); W uniform on +-1/sqrt(r) (the paper does not say how W starts: our assumption).
        "variance"  (default) the output starts with the variance of the values. For Fourier, cos^2 + sin^2 = 1 gives a
                    unit the variance G Var(c) at any score; Y sums N units, A sums r of them, O sums N values. So
                    Var(c) = 1/(N G) makes Var(Y) = 1, and Var(W) = 1/(r N) makes Var(O) = Var(V); in full rank
                    Var(c) = 1/(N^2 G).

    One operator serves one token count N: its units belong to token positions.
    """

    def __init__(
        self,
        num_heads: int,
        num_tokens: int,
        basis: str | LinearBasis = "fourier",
        grid: int = 3,
        rank: int | None = 12,
        init: str = "variance",
        edge_scales: bool = False,
    ):
        super().__init__()
        self.num_heads = at_least("num_heads", num_heads, 1)
        self.num_tokens = at_least("num_tokens", num_tokens, 1)
        self.basis = make_basis(basis, grid)
        self.init = one_of("init", init, INITS)
        if rank is not None and at_least("rank", rank, 1) > num_tokens:
            raise ValueError(
                f"rank = {rank} is larger than the {num_tokens} tokens: take rank <= {num_tokens}, "
                "or rank=None for the full-rank operator."
            )
        self.rank = rank
        units = num_tokens if rank is None else rank
        # Plain parameters, no nn.Linear: initialisers that walk over a model would reset every Linear they meet.
        self.coef = nn.Parameter(torch.empty(num_heads, units, num_tokens, self.basis.num_features))
        self.weight = None if rank is None else nn.Parameter(torch.empty(num_heads, num_tokens, rank))
        self.w_b = nn.Parameter(torch.empty(num_heads, units, num_tokens)) if edge_scales else None
        self.w_s = nn.Parameter(torch.empty(num_heads, units, num_tokens)) if edge_scales else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew by the scheme `init` (see the class)."""
        n, r = self.num_tokens, self.rank
        if self.init == "paper":
            self.coef.normal_()
            if self.weight is not None:
                self.weight.uniform_(-(r**-0.5), r**-0.5)
        elif self.weight is not None:
            self.coef.normal_(std=self.basis.coefficient_std(num_edges=n))
            self.weight.normal_(std=(r * n) ** -0.5)
        else:  # full rank: N edges into each activated entry, and N of those into each output
            self.coef.normal_(std=self.basis.coefficient_std(num_edges=n * n))
        if self.w_s is not None:
            self.w_s.fill_(1.0)
            self.w_b.fill_(1.0)

    def coefficients(self) -> Tensor:
        """c (h, r, N, F) with the basis weights w_s multiplied in."""
        if self.w_s is None:
            return self.coef
        # b = 0: w_b adds zero, but stays in the graph, because DDP refuses parameters that get no gradient.
        return self.coef * self.w_s.unsqueeze(-1) + 0.0 * self.w_b.unsqueeze(-1)

    def activate(self, scores: Tensor) -> Tensor:
        """The activated map, for looking: scores (B, h, N, N) -> (B, h, N, N). Rows are signed, their sums free."""
        self._check_tokens(scores)
        return functional.activate(scores, self.basis, self.coefficients(), self.weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention output, for speed: q, k, v (B, h, N, d) -> (B, h, N, d), without forming the activated map."""
        self._check_tokens(q)
        return functional.karat_attention(q, k, v, self.basis, self.coefficients(), self.weight)

    @torch.no_grad()
    def curve(self, x: Tensor, head: int, p: int, q: int) -> Tensor:
        """The learned function phi_pq of one head at the points x (n,) -> (n,)."""
        h, units, tokens, _ = self.coef.shape
        for name, index, size in (("head", head, h), ("p", p, units), ("q", q, tokens)):
            if not 0 <= index < size:
                raise ValueError(f"{name} = {index} is out of range: this operator has {name} from 0 to {size - 1}.")
        return self.basis.features(x.to(self.coef)) @ self.coefficients()[head, p, q]

    def _check_tokens(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.num_heads or x.shape[2] != self.num_tokens:
            raise ValueError(
                f"this operator was built for {self.num_heads} heads and {self.num_tokens} tokens, got shape "
                f"{tuple(x.shape)} (expected (B, {self.num_heads}, {self.num_tokens}, ...)). "
                "Build the model with the img_size and patch_size of your images."
            )

    def extra_repr(self) -> str:
        rank = "full" if self.rank is None else self.rank
        return (
            f"heads={self.num_heads}, tokens={self.num_tokens}, basis={self.basis!r}, rank={rank}, init={self.init!r}"
        )
