"""Kolmogorov-Arnold attention that keeps its inputs and computes everything of the size of the scores again."""

import torch
from einops import einsum
from torch import Tensor

from .bases import LinearBasis, wide
from .kernels import blocked


def recompute(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    basis: LinearBasis,
    coef: Tensor,
    weight: Tensor | None,
    *,
    scale: float,
    fused: bool = False,
) -> Tensor:
    """Arguments and result of `functional.karat_attention`, for a linear basis. Can be differentiated once.

    k may have another number of tokens than q and v (coef then has that of k on its axis q). Without values and weight
    the result is Y (B, h, M, r) itself, the sums of units over keys. `fused` takes the GPU kernels of
    kernels/fourier_triton.py, which are for the Fourier basis, in place of kernels/blocked.py.
    """
    if fused and q.dtype != k.dtype:  # the kernels read both as one type
        q, k = (x.to(torch.promote_types(q.dtype, k.dtype)) for x in (q, k))
    tensors = (q, k, v, coef, weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Recompute.apply(*tensors, scale, basis, fused)[0]
    return _Recompute.forward(*tensors, scale, basis, fused)[0]


class _Recompute(torch.autograd.Function):
    """O = Y (W^T V) with Y = mix(Q, K, c^T), or full rank O = mix(Q, K, c^T V): mix as in kernels/blocked.py.

    Kept for the backward pass: q, k, v, coef, weight and, with a projector, Y (B, h, M, r). With U = W^T V:

        dY = dO U^T,   dU = Y^T dO,   dV = W dU,   dW = sum over images of V dU^T,   dc = dR^T

    and full rank, where R_f = c_f^T V:  dV = sum_f c_f dR_f,  dc_f = sum over images of V dR_f^T. Without values O = Y.
    """

    @staticmethod
    def forward(q, k, v, coef, weight, scale, basis, fused):
        with torch.autocast(q.device.type, enabled=False):
            y = _mix(q, k, _right(v, coef, weight), scale, basis, fused)
            out = y
            if weight is not None:
                y, weight, values = _alike(fused, y, weight, v)
                out = y @ (weight.mT @ values)
        return out.to(q.dtype if v is None else v.dtype), None if weight is None else y

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.basis, ctx.fused = inputs
        y = output[1]
        if y is not None:
            ctx.mark_non_differentiable(y)
        ctx.save_for_backward(*tensors, y)

    @staticmethod
    def backward(ctx, grad, _):
        *inputs, y = ctx.saved_tensors  # read once: activation checkpointing hands them over a single time
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            grads = _gradients(grad, *inputs, y, ctx.scale, ctx.basis, ctx.fused)
        grads = [None if x is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True
            there = [g for g in grads if g is not None]
            marked = iter(_OnlyOnce.apply(len(there), *there, grad, *[x for x in inputs if x is not None]))
            grads = [None if g is None else next(marked) for g in grads]
        return *grads, None, None, None


class _OnlyOnce(torch.autograd.Function):
    """Passes gradients on, and says what to do when they are differentiated in their turn."""

    @staticmethod
    def forward(count, *tensors):
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):  # separate, or torch.func could not pass through
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "backend 'recompute' can be differentiated once, and a gradient of its gradient was asked for: take "
            "backend='contraction' (of an operator: operator.backend = 'contraction')."
        )


def _right(v: Tensor | None, coef: Tensor, weight: Tensor | None) -> Tensor:
    """What the maps are multiplied with: coefficients, shared by all images, or values mixed over tokens."""
    if v is None or weight is not None:
        return wide(coef).permute(0, 3, 2, 1).unsqueeze(0)  # h p q F -> 1 h F q p
    return einsum(wide(coef), wide(v), "h n q F, B h n d -> B h F q d")


def _alike(fused: bool, y: Tensor, *others: Tensor) -> list[Tensor]:
    """All in one type for the products of units and channels.

    float32 at least; beside fused kernels in that of the values, the last: a GPU's tensor cores want half precision,
    and in an H200's profile these products took longer in float32 than the kernels themselves.
    """
    dtype = others[-1].dtype if fused else wide(others[-1]).dtype
    return [x.to(dtype) for x in (y, *others)]


def _mix(q, k, right, scale, basis, fused) -> Tensor:
    if fused:
        from .kernels import fourier_triton  # Triton is not everywhere

        return fourier_triton.mix_forward(q, k, right, scale)
    return blocked.mix(wide(q), wide(k), right, scale, basis)


def _mix_gradients(grad, q, k, right, scale, basis, fused) -> tuple[Tensor, Tensor, Tensor]:
    if fused:
        from .kernels import fourier_triton

        return fourier_triton.mix_backward(grad, q, k, right, scale)
    return blocked.mix_gradients(grad, wide(q), wide(k), right, scale, basis)


def _gradients(grad, q, k, v, coef, weight, y, scale, basis, fused):
    right = _right(v, coef, weight)
    if v is None:
        dq, dk, dright = _mix_gradients(wide(grad), q, k, right, scale, basis, fused)
        return dq, dk, None, dright[0].permute(0, 3, 2, 1), None
    if weight is None:
        dq, dk, dright = _mix_gradients(wide(grad), q, k, right, scale, basis, fused)
        dv = einsum(wide(coef), dright, "h n q F, B h F q d -> B h n d")
        return dq, dk, dv, einsum(wide(v), dright, "B h n d, B h F q d -> h n q F"), None
    grad, y, weight, v = _alike(fused, grad, y, weight, v)
    dy, du = grad @ (weight.mT @ v).mT, y.mT @ grad
    dq, dk, dright = _mix_gradients(dy, q, k, right, scale, basis, fused)
    dweight = einsum(v, du, "B h n d, B h r d -> h n r")
    return dq, dk, weight @ du, dright[0].permute(0, 3, 2, 1), dweight
