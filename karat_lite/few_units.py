"""A layer whose operator has fewer units than a head has channels: neither values nor heads' outputs are ever formed.

The output of attention is linear in the values, and those are linear in the tokens X (B, N, dim). With one head's
V = X W_V + 1 b_V^T, its activated map Y W^T and its share W_O of the output projection, only the brackets move:

    Y (W^T V) W_O  =  Y [ (W^T X) W_V + (W^T 1) b_V^T ] W_O

On the right tokens are first mixed down from N to r, and two large products, N dim d each for every head, become
r dim d; what is left are 2 N r dim. With r = 12 that is 11 % of ViT-Tiny's multiplications less, and V (B, N, dim)
and O (B, N, dim) need not be kept for the backward pass. Same numbers, same gradients, to rounding.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .bases import LinearBasis
from .operators import KArAtOperator


def pays(x: Tensor, layer: nn.Module) -> bool:
    """Whether `attend_tokens` computes this `MultiHeadAttention`, and sooner than products in their usual order.

    Yes for at most d / 2 units a head in w_phi, the recompute backend, float32 or float64 on a CPU. Not under autocast,
    where Y would be rounded to half precision, and not on a GPU, where nobody has measured it. The projections must be
    plain `nn.Linear` with a bias and without hooks of their own, and the operator's `attend` its own: who replaces or
    watches them (adapters, pruning, a probe) wants to see them run.
    """
    operator = layer.activation
    if not isinstance(operator, KArAtOperator) or operator.weight is None or operator.order != "w_phi":
        return False
    if type(operator).attend is not KArAtOperator.attend or "attend" in vars(operator):
        return False
    if operator.num_heads != layer.num_heads:  # the operator will say so
        return False
    if operator.simplex or operator.backend not in ("auto", "recompute") or not isinstance(operator.basis, LinearBasis):
        return False
    if 2 * operator.rank * operator.num_heads > x.shape[-1] or x.dtype not in (torch.float32, torch.float64):
        return False
    if not operator.coef.dtype == operator.weight.dtype == x.dtype:
        return False
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return all(_plain(m) and m.weight.dtype == x.dtype for m in (layer.qkv, layer.proj))


def _plain(m: nn.Module) -> bool:
    hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
    replaced = "forward" in vars(m) or any(hooks)
    return type(m) is nn.Linear and m.bias is not None and not replaced


def attend_tokens(x: Tensor, layer: nn.Module) -> Tensor:
    """x (B, N, dim) -> (B, N, dim), projections included: what `MultiHeadAttention` computes, without V and O."""
    qkv, proj, operator = layer.qkv, layer.proj, layer.activation
    dim, h, r = x.shape[-1], operator.num_heads, operator.rank
    qk_weight, v_weight = qkv.weight.split([2 * dim, dim])
    qk_bias, v_bias = qkv.bias.split([2 * dim, dim])
    q, k = rearrange(F.linear(x, qk_weight, qk_bias), "B N (two h d) -> two B h N d", two=2, h=h).unbind(0)
    y = operator.sums(q, k)
    w = operator.weight
    # One matrix for every image by `expand`: a matmul of two and three axes would copy all tokens, and keep the copy.
    mixed = torch.bmm(rearrange(w, "h N r -> (h r) N").expand(x.shape[0], -1, -1), x)
    mixed = rearrange(mixed, "B (h r) dim -> h (B r) dim", h=h)  # W^T X
    bias = rearrange(w.sum(dim=1), "h r -> h 1 r 1") * rearrange(v_bias, "(h d) -> h 1 1 d", h=h)  # (W^T 1) b_V^T
    u = rearrange(mixed @ rearrange(v_weight, "(h d) dim -> h dim d", h=h), "h (B r) d -> h B r d", r=r) + bias
    projected = rearrange(u, "h B r d -> h (B r) d") @ rearrange(proj.weight, "dim (h d) -> h d dim", h=h)
    right = rearrange(projected, "h (B r) dim -> B (h r) dim", r=r)
    return torch.baddbmm(proj.bias, rearrange(y, "B h N r -> B N (h r)"), right)
