"""Multi-head self-attention in which softmax is a part that can be taken out.

The seam: an *activation* is a module with two methods, `activate(scores)`, which returns the map for people to look at,
and `attend(q, k, v)`, which returns the output as fast as it can. Everything else in attention stays as it was.
"""

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .bases import LinearBasis
from .checks import at_least, divides
from .functional import attention_scores
from .operators import KArAtOperator


class AttentionRecord(NamedTuple):
    """What one attention layer saw and did: both (B, h, N, N)."""

    scores: Tensor  # S = Q K^T / sqrt(d), before the activation
    maps: Tensor  # the activated map: softmax rows, or KArAt's signed rows


class SoftmaxActivation(nn.Module):
    """sigma(A_k)_l = exp(A_kl) / sum_n exp(A_kn): the fixed choice that every Vision Transformer makes."""

    def activate(self, scores: Tensor) -> Tensor:
        """scores (B, h, N, N) -> rows that are positive and sum to 1."""
        return scores.softmax(dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, h, N, d) -> (B, h, N, d) by the library's fused softmax attention."""
        return F.scaled_dot_product_attention(q, k, v)


class MultiHeadAttention(nn.Module):
    """(B, N, dim) -> (B, N, dim): O = [sigma(A^1) V^1, ..., sigma(A^h) V^h] W_O with a replaceable sigma.

    Args:
        dim: channels; must be divisible by num_heads.
        num_heads: h.
        activation: module with `activate` and `attend`; shared between layers in universal mode. Softmax by default.
    """

    def __init__(self, dim: int, num_heads: int, activation: nn.Module | None = None):
        super().__init__()
        self.num_heads = at_least("num_heads", num_heads, 1)
        divides("num_heads", num_heads, "dim", at_least("dim", dim, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.activation = SoftmaxActivation() if activation is None else activation
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, return_attention: bool = False):
        """x (B, N, dim) -> (B, N, dim); with `return_attention` a pair of that and an `AttentionRecord`."""
        q, k, v = rearrange(self.qkv(x), "B N (three h d) -> three B h N d", three=3, h=self.num_heads).unbind(0)
        out = self.activation.attend(q, k, v)
        out = self.proj(rearrange(out, "B h N d -> B N (h d)"))
        if not return_attention:
            return out
        scores = attention_scores(q, k)
        return out, AttentionRecord(scores, self.activation.activate(scores))


class KArAttention(MultiHeadAttention):
    """Multi-head attention with a Kolmogorov-Arnold operator in place of softmax: (B, N, dim) -> (B, N, dim).

    Args as for `MultiHeadAttention` and `KArAtOperator`; rank=None is the full-rank operator. Source: paper, section 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        basis: str | LinearBasis = "fourier",
        grid: int = 3,
        rank: int | None = 12,
        init: str = "variance",
        edge_scales: bool = False,
    ):
        super().__init__(dim, num_heads, KArAtOperator(num_heads, num_tokens, basis, grid, rank, init, edge_scales))
