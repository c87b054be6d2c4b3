"""Kolmogorov-Arnold attention as an operation on tensors: no state, no parameters of its own.

Letters (the paper's): B images, h heads, N tokens, d channels of one head, r operator units, F feature maps of a basis.
k is a row of the scores (the token that asks), q a column (the token it looks at), p a unit of the operator.

    S_kq   = Q_k . K_q / sqrt(d)                         scores,            (B, h, N, N)
    Y_kp   = sum_q phi_pq(S_kq)                          the operator Phi^, (B, h, N, r)
    A_kn   = sum_p W_np Y_kp    (full rank: A = Y)       activated map,     (B, h, N, N)
    O_k    = sum_n A_kn V_n                              output,            (B, h, N, d)

with phi_pq(x) = sum_f c_pqf psi_f(x). Source: paper, section 1 (full-rank and modular KArAt, Fourier-KArAt).
"""

import warnings

import torch
from einops import einsum, rearrange
from torch import Tensor

from .bases import Basis, LinearBasis, wide
from .checks import one_of
from .fourier import Fourier
from .recompute import recompute

BACKENDS = ("reference", "contraction", "recompute", "triton")
AT_ONCE = 1 << 17  # numbers that an edge basis evaluates at a time: planes that stay in the processor's cache


def attention_scores(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """S = Q K^T * scale, in float32 or better: q, k (B, h, N, d) -> (B, h, N, N). `scale` defaults to 1 / sqrt(d).

    The product is taken in float32 also under autocast: a basis sees the score itself, not its rank among others, and
    cos(3 x) of a score rounded to bfloat16 is off by up to 0.09 near x = 12.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(device_type=q.device.type, enabled=False):
        # Heads outermost in memory (the shape says B h): all rows of one head then lie together for its operator.
        q, k = wide(q).transpose(0, 1) * scale, wide(k).transpose(0, 1)
        return (q @ k.transpose(-2, -1)).transpose(0, 1)


def apply_operator(x: Tensor, basis: Basis, coef: Tensor) -> Tensor:
    """Y_kp = sum_q phi_pq(x_kq): x (B, h, k, q), coef (h, p, q, F) -> Y (B, h, k, p).

    Linear basis: a contraction over q and f. The maps psi_f are evaluated once per score, and no array of p copies of x
    ever exists. Edge basis: as many columns q at a time as make `AT_ONCE` numbers, at least one, and nothing of them is
    kept for the backward pass: for scores of any size that matters no such array exists there either. Nothing is
    rounded under autocast.
    """
    with torch.autocast(device_type=x.device.type, enabled=False):
        return _apply_operator(x, basis, coef)


def _apply_operator(x: Tensor, basis: Basis, coef: Tensor) -> Tensor:
    if not isinstance(basis, LinearBasis):
        columns, theta = rearrange(x, "B h k q -> h q 1 (B k)"), rearrange(coef, "h p q P -> h q p 1 P")
        some = max(1, AT_ONCE // max(1, columns[:, 0].numel() * coef.shape[1]))
        parts = zip(columns.split(some, dim=1), theta.split(some, dim=1), strict=True)
        y = sum(_EdgeUnits.apply(x_q, theta_q, basis) for x_q, theta_q in parts)
        return rearrange(y, "h p (B k) -> B h k p", k=x.shape[2])
    rows = rearrange(x, "B h k q -> h (B k) q")  # a head's operator is the same for every row of every image
    y = coef.new_zeros(())
    for f, psi in basis.maps(rows):
        y = torch.baddbmm(y, psi, coef[..., f].transpose(-2, -1))  # y + (h, B k, q) (h, q, p)
    return rearrange(y, "h (B k) p -> B h k p", k=x.shape[2])  # k, not B: a batch may be empty


class _EdgeUnits(torch.autograd.Function):
    """sum_q phi(x_q; theta_pq): x (h, q, 1, rows), theta (h, q, p, 1, P) -> (h, p, rows); keeps x and theta alone."""

    @staticmethod
    def forward(x, theta, basis):
        return basis.evaluate(x, theta).sum(dim=1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, theta, ctx.basis = inputs
        ctx.save_for_backward(x, theta)

    @staticmethod
    def backward(ctx, grad):
        x, theta = ctx.saved_tensors
        # Called inside autocast, a backward pass would round what the forward pass computed in float32.
        with torch.autocast(grad.device.type, enabled=False):
            if not torch.is_grad_enabled():
                return *ctx.basis.pull(x, theta, grad.unsqueeze(1)), None
            # create_graph=True: the gradient shall be differentiated too
            y, wanted = ctx.basis.evaluate(x, theta).sum(dim=1), [t for t in (x, theta) if t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in (x, theta)), None


def mix_values(x: Tensor, basis: Basis, coef: Tensor, v: Tensor) -> Tensor:
    """O_k = sum_n A_kn V_n with A_kn = sum_q phi_nq(x_kq): x (B, h, k, q), coef (h, n, q, F), v (B, h, n, d).

    Linear basis: O = sum_f psi_f(x) U_f with U_f = c_f^T V, values mixed over tokens: A is never formed. Edge basis:
    A V. Nothing is rounded under autocast.
    """
    with torch.autocast(device_type=x.device.type, enabled=False):
        if not isinstance(basis, LinearBasis):
            return apply_operator(x, basis, coef) @ v
        out = v.new_zeros(())
        for f, psi in basis.maps(x):
            out = out + psi @ (coef[..., f].transpose(-2, -1) @ v)
        return out


def activate(scores: Tensor, basis: Basis, coef: Tensor, weight: Tensor | None = None) -> Tensor:
    """The activated map A = Y W^T (full rank: A = Y): scores (B, h, N, N) -> (B, h, N, N). For looking, not speed."""
    with torch.autocast(device_type=scores.device.type, enabled=False):
        y = apply_operator(wide(scores), basis, wide(coef))
        return y if weight is None else y @ wide(weight).transpose(-2, -1)


def karat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    basis: Basis,
    coef: Tensor,
    weight: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Kolmogorov-Arnold attention: O_k = sum_n [W Phi^(S_k)]_n V_n, or with `weight=None` sum_n [Phi(S_k)]_n V_n.

    Args:
        q, k, v: (B, h, N, d) each.
        basis: the family of functions; for a linear basis the feature maps psi_f, shared by all edges.
        coef: (h, r, N, F), the coefficients c_pqf; for Fourier F = 2G, cos 1..G then sin 1..G. For an edge basis the
            last axis holds its P parameters.
        weight: (h, N, r), the projector W; None for the full-rank operator, whose r is N.
        scale: factor of the scores, 1 / sqrt(d) by default.
        backend:
            "reference"    the definition in einops; forms every intermediate.
            "contraction"  the same numbers without the activated map, readable; keeps scores and maps for the backward
                           pass. Any basis; can be differentiated twice.
            "recompute"    keeps q, k, v, coef, weight and Y alone, computes the rest again, block by block. Any linear
                           basis, any device; differentiable once (torch.func.grad of Fourier without base
                           activation, too; for other bases and transforms of torch.func take "contraction").
            "triton"       the same, for the Fourier basis on a GPU, in fused kernels: scores never reach its memory.
            "auto"         (default) "triton" on a GPU where it can serve, else "recompute" for a linear basis, else
                           "contraction".

    Returns (B, h, N, d) in the type of v. Scores and basis are computed in float32 or better.
    Raises `ValueError` for an unknown backend, a backend that cannot take the basis, shapes that do not fit, or tensors
    on several devices. Source: paper, section 1.
    """
    one_of("backend", backend, (*BACKENDS, "auto"))
    _check_shapes(q, k, v, basis, coef, weight)
    check_kinds(q=q, k=k, v=v, coef=coef, weight=weight)
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor: multiply q by a factor that is learned.")
    backend = choose_backend(backend, basis, q, coef)
    if backend in ("recompute", "triton"):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return recompute(q, k, v, basis, coef, weight, scale=scale, fused=backend == "triton")
    compute = _reference if backend == "reference" else _contraction
    scores = attention_scores(q, k, scale=scale)
    with torch.autocast(device_type=q.device.type, enabled=False):
        out = compute(scores, wide(v), basis, wide(coef), None if weight is None else wide(weight))
    return out.to(v.dtype)


def choose_backend(backend: str, basis: Basis, q: Tensor, coef: Tensor) -> str:
    """The backend that computes, for a name that may be "auto"; `ValueError` where it cannot take the arguments.

    On a GPU "auto" warns where the Triton kernels cannot serve, once for each reason.
    """
    one_of("backend", backend, (*BACKENDS, "auto"))
    linear = isinstance(basis, LinearBasis)
    if backend == "recompute" and not linear:
        raise ValueError(
            f"backend 'recompute' takes bases that are linear in their parameters, got {basis!r}: take 'contraction' "
            "or 'auto'. (Edge bases are computed again in the backward pass there too.)"
        )
    if backend == "triton" and (reason := _no_triton(basis, q, coef)):
        raise ValueError(f"backend 'triton' is not available: {reason}")
    if backend != "auto":
        return backend
    if not linear:
        return "contraction"
    if q.device.type != "cuda":
        return "recompute"
    reason = _no_triton(basis, q, coef)
    if reason and not torch.compiler.is_compiling():
        warnings.warn(f"backend 'auto' takes 'recompute', not 'triton': {reason}", stacklevel=3)
    return "recompute" if reason else "triton"


def _no_triton(basis: Basis, q: Tensor, coef: Tensor) -> str | None:
    """Why the fused kernels cannot serve; None where they can."""
    if type(basis) is not Fourier:
        return f"its kernels compute the Fourier basis without a base activation, got {basis!r}."
    try:
        from .kernels import fourier_triton
    except ImportError as error:
        return f"{error}. PyTorch for NVIDIA GPUs on Linux brings Triton along; it does not exist elsewhere."
    return fourier_triton.supported(q, wide(coef).permute(0, 3, 2, 1))


def _reference(scores: Tensor, v: Tensor, basis: Basis, coef: Tensor, weight: Tensor | None) -> Tensor:
    """The specification: units, operator, projector, values, one line each, every axis named."""
    if isinstance(basis, LinearBasis):
        psi = basis.features(scores)  # (B, h, k, q, F)
        units = einsum(psi, coef, "B h k q F, h p q F -> B h k p q")  # phi_pq(S_kq)
    else:
        units = basis.evaluate(rearrange(scores, "B h k q -> B h k 1 q"), rearrange(coef, "h p q P -> h 1 p q P"))
    y = units.sum(dim=-1)  # (B, h, k, p)
    activated = y if weight is None else einsum(weight, y, "h n p, B h k p -> B h k n")
    return einsum(activated, v, "B h k n, B h n d -> B h k d")


def _contraction(scores: Tensor, v: Tensor, basis: Basis, coef: Tensor, weight: Tensor | None) -> Tensor:
    """The same by associativity: the N x N activated map is never formed."""
    if weight is None:
        return mix_values(scores, basis, coef, v)
    # (Y W^T) V = Y (W^T V): r mixed values per head instead of N activated columns, O(N r d) instead of O(N^2 d).
    return apply_operator(scores, basis, coef) @ (weight.transpose(-2, -1) @ v)


class _ProjectSimplex(torch.autograd.Function):
    """Sort and threshold; backward: on its support the projection is a shift, off it a constant."""

    @staticmethod
    def forward(y):
        # The projection is the same for rows moved up or down; with the largest entry at 0 sums stay small and exact.
        y = y - y.amax(dim=-1, keepdim=True)
        ordered, _ = y.sort(dim=-1, descending=True)
        count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
        surplus = ordered.cumsum(dim=-1) - 1
        rho = (ordered * count > surplus).sum(dim=-1, keepdim=True)  # >= 1: 0 > 0 - 1
        # rho = 0 in rows that hold NaN, which compiled code does not refuse: they stay NaN.
        return (y - surplus.gather(-1, (rho - 1).clamp(min=0)) / rho).clamp(min=0)

    @staticmethod
    def setup_context(ctx, inputs, x):
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        support = (x > 0).to(grad.dtype)
        grad = grad * support
        return grad - support * (grad.sum(dim=-1, keepdim=True) / support.sum(dim=-1, keepdim=True))


def project_simplex(y: Tensor) -> Tensor:
    """Euclidean projection of each row on the probability simplex {x >= 0, sum x = 1}: y (..., n) -> (..., n).

        x = max(y - lambda, 0),  lambda = (sum of the rho largest entries - 1) / rho,
        rho = max{i : y_(i) - (sum_{j<=i} y_(j) - 1) / i > 0},  y_(1) >= y_(2) >= ... (Condat 2016; paper, section 1).

    float16 and bfloat16 are projected in float32 and returned in their type. Raises `ValueError` for rows that are not
    finite, or have no entry, `TypeError` for integers.
    """
    if not y.is_floating_point():
        raise TypeError(f"project_simplex needs numbers with a fraction, got {y.dtype}: give y.float().")
    if y.ndim == 0 or y.shape[-1] == 0:
        raise ValueError(f"project_simplex needs rows with at least one entry, got shape {tuple(y.shape)}.")
    if not torch.compiler.is_compiling() and not y.sum().isfinite() and not y.isfinite().all():
        rows = (~y.isfinite()).any(dim=-1)
        raise ValueError(
            f"project_simplex needs finite rows: {int(rows.sum())} of {rows.numel()} hold NaN or infinity. "
            "Where scores are masked, project the entries that are left."
        )
    return _ProjectSimplex.apply(wide(y)).to(y.dtype)


def _check_shapes(q, k, v, basis, coef, weight) -> None:
    if not isinstance(basis, Basis):
        raise TypeError(
            f"basis must be an object, as karat_lite.bases.make_basis('fourier', grid=3) makes, got {basis!r}."
        )
    if not torch.compiler.is_compiling():
        basis.check_once()
    for name, x in dict(coef=coef, weight=weight).items():
        if not isinstance(x, Tensor) and not (name == "weight" and x is None):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    check_tokens(q, k, v)
    h, n, r = q.shape[1], q.shape[2], coef.shape[1] if coef.ndim == 4 else "r"
    expected = (h, r if weight is not None else n, n, basis.num_parameters)
    if tuple(coef.shape) != expected:
        last = "F" if isinstance(basis, LinearBasis) else "P"
        kind = f"(h, r, N, {last})" if weight is not None else f"(h, N, N, {last}), full rank because weight is None"
        raise ValueError(
            f"coef must be {kind} = {expected} for {n} tokens, {h} heads and {basis!r}, got {tuple(coef.shape)}. "
            "An operator is bound to its token count: build it with the N of your images."
        )
    if weight is not None and tuple(weight.shape) != (h, n, r):
        raise ValueError(f"weight must be (h, N, r) = {(h, n, r)}, got {tuple(weight.shape)}.")


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless q, k and v are (B, h, N, d) for the same images, heads and tokens."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(f"{name} must have shape (B, h, N, d), h, N and d at least 1, got {tuple(x.shape)}.")
    if not (q.shape == k.shape and q.shape[:3] == v.shape[:3]):
        raise ValueError(f"q, k and v must share (B, h, N): got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}.")


def check_kinds(**tensors: Tensor | None) -> None:
    """One device; one type, once float16 and bfloat16 have become float32."""
    there = {name: x for name, x in tensors.items() if x is not None}
    for what in ("device", "type"):
        kinds = {name: x.device if what == "device" else wide(x[:0]).dtype for name, x in there.items()}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise ValueError(
                f"all tensors must be on one device and of one type (half precision counts as float32), got {found}."
            )
