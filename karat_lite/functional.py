"""Kolmogorov-Arnold attention as an operation on tensors: no state, no parameters of its own.

Letters (the paper's): B images, h heads, N tokens, d channels of one head, r operator units, F feature maps of a basis.
k is a row of the scores (the token that asks), q a column (the token it looks at), p a unit of the operator.

    S_kq   = Q_k . K_q / sqrt(d)                         scores,            (B, h, N, N)
    Y_kp   = sum_q phi_pq(S_kq)                          the operator Phi^, (B, h, N, r)
    A_kn   = sum_p W_np Y_kp    (full rank: A = Y)       activated map,     (B, h, N, N)
    O_k    = sum_n A_kn V_n                              output,            (B, h, N, d)

with phi_pq(x) = sum_f c_pqf psi_f(x). Source: paper, section 1 (full-rank and modular KArAt, Fourier-KArAt).
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from .bases import LinearBasis
from .checks import one_of

BACKENDS = ("reference", "contraction")


def attention_scores(q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """S = Q K^T * scale, in float32 or better: q, k (B, h, N, d) -> (B, h, N, N). `scale` defaults to 1 / sqrt(d).

    The product is taken in float32 also under autocast: a basis sees the score itself, not its rank among others, and
    cos(3 x) of a score rounded to bfloat16 is off by 0.2 at x = 12.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(device_type=q.device.type, enabled=False):
        # Heads outermost in memory (the shape says B h): all rows of one head then lie together for its operator.
        q, k = _wide(q).transpose(0, 1) * scale, _wide(k).transpose(0, 1)
        return (q @ k.transpose(-2, -1)).transpose(0, 1)


def apply_operator(scores: Tensor, basis: LinearBasis, coef: Tensor) -> Tensor:
    """Y_kp = sum_q phi_pq(S_kq): scores (B, h, N, N), coef (h, r, N, F) -> Y (B, h, N, r).

    A contraction over q and f: the maps psi_f are evaluated once per score, and no array of r copies of S ever exists.
    """
    rows = rearrange(scores, "B h k q -> h (B k) q")  # a head's operator is the same for every row of every image
    y = coef.new_zeros(())
    for f, psi in basis.maps(rows):
        y = torch.baddbmm(y, psi, coef[..., f].transpose(-2, -1))  # y + (h, B k, q) (h, q, r)
    return rearrange(y, "h (B k) p -> B h k p", k=scores.shape[2])  # k, not B: a batch may be empty


def activate(scores: Tensor, basis: LinearBasis, coef: Tensor, weight: Tensor | None = None) -> Tensor:
    """The activated map A = Y W^T (full rank: A = Y): scores (B, h, N, N) -> (B, h, N, N). For looking, not speed."""
    with torch.autocast(device_type=scores.device.type, enabled=False):
        y = apply_operator(_wide(scores), basis, _wide(coef))
        return y if weight is None else y @ _wide(weight).transpose(-2, -1)


def karat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    basis: LinearBasis,
    coef: Tensor,
    weight: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Kolmogorov-Arnold attention: O_k = sum_n [W Phi^(S_k)]_n V_n, or with `weight=None` sum_n [Phi(S_k)]_n V_n.

    Args:
        q, k, v: (B, h, N, d) each.
        basis: the feature maps psi_f, shared by all edges.
        coef: (h, r, N, F), the coefficients c_pqf; for Fourier F = 2G, cos 1..G then sin 1..G.
        weight: (h, N, r), the projector W; None for the full-rank operator, whose r is N.
        scale: factor of the scores, 1 / sqrt(d) by default.
        backend: "reference" writes the definition down in einops and forms every intermediate; "contraction" gives the
            same numbers without the activated map; "auto" is "contraction".

    Returns (B, h, N, d) in the type of v. Scores and basis are computed in float32 or better.
    Raises `ValueError` for an unknown backend or shapes that do not fit. Source: paper, section 1.
    """
    backend = one_of("backend", backend, (*BACKENDS, "auto"))
    _check_shapes(q, k, v, basis, coef, weight)
    compute = _reference if backend == "reference" else _contraction
    scores = attention_scores(q, k, scale=scale)
    with torch.autocast(device_type=q.device.type, enabled=False):
        out = compute(scores, _wide(v), basis, _wide(coef), None if weight is None else _wide(weight))
    return out.to(v.dtype)


def _reference(scores: Tensor, v: Tensor, basis: LinearBasis, coef: Tensor, weight: Tensor | None) -> Tensor:
    """The specification: units, operator, projector, values, one line each, every axis named."""
    psi = basis.features(scores)  # (B, h, k, q, F)
    units = einsum(psi, coef, "B h k q F, h p q F -> B h k p q")  # phi_pq(S_kq)
    y = units.sum(dim=-1)  # (B, h, k, p)
    activated = y if weight is None else einsum(weight, y, "h n p, B h k p -> B h k n")
    return einsum(activated, v, "B h k n, B h n d -> B h k d")


def _contraction(scores: Tensor, v: Tensor, basis: LinearBasis, coef: Tensor, weight: Tensor | None) -> Tensor:
    """The same by associativity: the N x N activated map is never formed."""
    if weight is not None:
        # (Y W^T) V = Y (W^T V): r mixed values per head instead of N activated columns, O(N r d) instead of O(N^2 d).
        return apply_operator(scores, basis, coef) @ (weight.transpose(-2, -1) @ v)
    # Full rank: O = sum_f psi_f(S) U_f with U_f = c_f^T V, values mixed over tokens. Softmax's cost, F times.
    out = torch.zeros_like(v)
    for f, psi in basis.maps(scores):
        out = out + psi @ (coef[..., f].transpose(-2, -1) @ v)
    return out


def _wide(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_shapes(q, k, v, basis, coef, weight) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape (B, h, N, d), got {tuple(x.shape)}.")
    if not (q.shape == k.shape and q.shape[:3] == v.shape[:3]):
        raise ValueError(f"q, k and v must share (B, h, N): got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}.")
    h, n, r = q.shape[1], q.shape[2], coef.shape[1] if coef.ndim == 4 else "r"
    expected = (h, r if weight is not None else n, n, basis.num_features)
    if tuple(coef.shape) != expected:
        kind = "(h, r, N, F)" if weight is not None else "(h, N, N, F), full rank because weight is None"
        raise ValueError(
            f"coef must be {kind} = {expected} for {n} tokens, {h} heads and {basis!r}, got {tuple(coef.shape)}. "
            "An operator is bound to its token count: build it with the N of your images."
        )
    if weight is not None and tuple(weight.shape) != (h, n, r):
        raise ValueError(f"weight must be (h, N, r) = {(h, n, r)}, got {tuple(weight.shape)}.")
