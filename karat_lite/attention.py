"""Multi-head self-attention in which softmax is a part that can be taken out.

The seam: an *activation* is a module with two methods, `activate(scores)`, which returns the map for people to look at,
and `attend(q, k, v)`, which returns the output as fast as it can. Everything else in attention stays as it was.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import few_units
from .bases import Basis
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


class HybridActivation(nn.Module):
    """Softmax on some heads, a KArAt operator on the others (paper, section 3, hybrid heads).

    Args:
        num_heads: h.
        softmax_heads: which heads keep softmax; at least one, and not all.
        operator: a `KArAtOperator` for the other h - len(softmax_heads) heads, in order.
    """

    def __init__(self, num_heads: int, softmax_heads: Sequence[int], operator: KArAtOperator):
        super().__init__()
        softmax = check_heads(num_heads, softmax_heads)
        learned = [head for head in range(num_heads) if head not in softmax]
        if len(learned) != operator.num_heads or not softmax:
            raise ValueError(
                f"with softmax on {len(softmax)} of {num_heads} heads (at least one, not all) the operator needs "
                f"{len(learned)}, it has {operator.num_heads}."
            )
        self.softmax, self.operator = SoftmaxActivation(), operator
        self.softmax_heads, self.learned_heads = softmax, learned
        # Where each head stands in the two parts laid end to end.
        self.place = [[*softmax, *learned].index(head) for head in range(num_heads)]

    def activate(self, scores: Tensor) -> Tensor:
        """scores (B, h, N, N) -> (B, h, N, N)."""
        parts = [activation.activate(scores[:, heads]) for activation, heads in self._parts()]
        return torch.cat(parts, dim=1)[:, self.place]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, h, N, d) -> (B, h, N, d)."""
        parts = [activation.attend(*(x[:, heads] for x in (q, k, v))) for activation, heads in self._parts()]
        return torch.cat(parts, dim=1)[:, self.place]

    def _parts(self):
        return (self.softmax, self.softmax_heads), (self.operator, self.learned_heads)


class StaticMixer(nn.Module):
    """Attention that never looks: each head mixes tokens by a matrix of its own, learned and the same for every image.

        A_kn = M_kn    each query k has a row of its own: any mixing by position alone             shared=False
        A_kn = m_n     all queries share one row: what a KArAt operator is where all scores are 0  shared=True

    The yardstick for what an operator learns from scores (`analysis.content`). It has h N^2 numbers, or h N, drawn
    with variance 1 / N: the output starts with the variance of the values. Queries and keys are computed and not used:
    their 2 dim (dim + 1) parameters a layer get the gradient 0 (not None: DDP refuses unused parameters).
    """

    def __init__(self, num_heads: int, num_tokens: int, shared: bool = False):
        super().__init__()
        self.num_heads, self.num_tokens = at_least("num_heads", num_heads, 1), at_least("num_tokens", num_tokens, 1)
        self.mix = nn.Parameter(torch.randn(num_heads, 1 if shared else num_tokens, num_tokens) * num_tokens**-0.5)

    def activate(self, scores: Tensor) -> Tensor:
        """The matrices of all heads, whatever the scores (B, h, N, N): (B, h, N, N)."""
        self._check_tokens(scores)
        return self.mix.expand(scores.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """v (B, h, N, d) -> (B, h, N, d); q and k play no part."""
        self._check_tokens(v)
        return (self.mix @ v).expand(v.shape)

    def _check_tokens(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1:3] != (self.num_heads, self.num_tokens):
            raise ValueError(
                f"this mixer was built for {self.num_heads} heads and {self.num_tokens} tokens, got shape "
                f"{tuple(x.shape)}. Build the model with the img_size and patch_size of your images."
            )


def check_heads(num_heads: int, heads: Sequence[int]) -> list[int]:
    """The given head indices, sorted; `ValueError` for one that is not there or given twice, or no list."""
    if not isinstance(heads, Iterable):
        raise ValueError(f"softmax_heads must be a list of heads, got {heads!r}: give [{heads!r}].")
    heads = [at_least("head index", head, 0) for head in heads]
    for head in heads:
        if head >= num_heads or heads.count(head) > 1:
            raise ValueError(f"softmax head {head} is not one of 0 .. {num_heads - 1}, or given twice: got {heads}.")
    return sorted(heads)


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
        if not return_attention and few_units.pays(x, self):
            return few_units.attend_tokens(x, self)
        q, k, v = rearrange(self.qkv(x), "B N (three h d) -> three B h N d", three=3, h=self.num_heads).unbind(0)
        out = self.activation.attend(q, k, v)
        out = self.proj(rearrange(out, "B h N d -> B N (h d)"))
        if not return_attention:
            return out
        scores = attention_scores(q, k)
        return out, AttentionRecord(scores, self.activation.activate(scores))


class KArAttention(MultiHeadAttention):
    """Multi-head attention with a Kolmogorov-Arnold operator in place of softmax: (B, N, dim) -> (B, N, dim).

    Args as for `MultiHeadAttention` and `KArAtOperator` (order, base, simplex, basis_options by name); rank=None is the
    full-rank operator. Source: paper, section 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        basis: str | Basis = "fourier",
        grid: int = 3,
        rank: int | None = 12,
        init: str = "variance",
        edge_scales: bool = False,
        **options,
    ):
        args = (num_heads, num_tokens, basis, grid, rank, init, edge_scales)
        super().__init__(dim, num_heads, KArAtOperator(*args, **options))
