"""Kolmogorov-Arnold attention that keeps its inputs and computes everything of the size of the scores again."""

from contextlib import nullcontext

import torch
from einops import einsum
from torch import Tensor

from .bases import LinearBasis, basis_from_key, wide
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
    if torch.compiler.is_compiling():
        return _attend_op(*tensors, scale, basis.key, fused)[0]
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return _attend(*tensors, scale, basis, fused)[0]
    if _in_torch_func():
        return _InTorchFunc.apply(*tensors, scale, basis, fused)[0]
    return _Recompute.apply(*tensors, scale, basis, fused)


# Whether a transform of torch.func is at work; True where torch does not tell, which costs time and nothing else.
_in_torch_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class _Recompute(torch.autograd.Function):
    """O = Y (W^T V) with Y = mix(Q, K, c^T), or full rank O = mix(Q, K, c^T V): mix as in kernels/blocked.py.

    Kept for the backward pass: q, k, v, coef, weight and, with a projector, Y (B, h, M, r). With U = W^T V:

        dY = dO U^T,   dU = Y^T dO,   dV = W dU,   dW = sum over images of V dU^T,   dc = dR^T

    and full rank, where R_f = c_f^T V:  dV = sum_f c_f dR_f,  dc_f = sum over images of V dR_f^T. Without values O = Y.
    """

    @staticmethod
    def forward(ctx, *inputs):
        out, y = _attend(*inputs)
        _keep(ctx, inputs, y)
        return out

    @staticmethod
    def backward(ctx, grad, _=None):
        *tensors, y = ctx.saved_tensors  # read once: activation checkpointing hands them over a single time
        return _once(grad, tensors, _gradients(grad, *tensors, y, *ctx.rest, wanted=ctx.needs_input_grad[:5]))


class _InTorchFunc(_Recompute):
    """The same with Y among the outputs, as torch.func wants it; `apply` of such a class takes 0.1 to 0.2 ms more."""

    @staticmethod
    def forward(*inputs):
        return _attend(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        _keep(ctx, inputs, output[1])


def _keep(ctx, inputs, y: Tensor | None) -> None:
    *tensors, scale, basis, fused = inputs
    ctx.save_for_backward(*tensors, y)
    ctx.rest = scale, basis, fused


def _once(grad: Tensor, tensors: list[Tensor | None], grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What a backward pass returns: gradients of all inputs, which cannot be differentiated in their turn."""
    if torch.is_grad_enabled():  # create_graph=True
        there = [g for g in grads if g is not None]
        marked = iter(_OnlyOnce.apply(len(there), *there, grad, *[x for x in tensors if x is not None]))
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


def _attend(q, k, v, coef, weight, scale, basis, fused) -> tuple[Tensor, Tensor | None]:
    """Output and, with a projector, Y."""
    with _no_autocast(q):
        y = _mix(q, k, v, coef, weight, scale, basis, fused)
        out = y
        if weight is not None:
            y, weight, values = _alike(fused, y.contiguous(), weight, v)  # or every product with Y would copy it
            out = y @ (weight.mT @ values)
    return out.to(q.dtype if v is None else v.dtype), None if weight is None else y


def _gradients(grad, q, k, v, coef, weight, *rest, wanted=(True,) * 5) -> list[Tensor | None]:
    """Those of q, k, v, coef and weight; None for what is not there, or not wanted and not computed beside others."""
    tensors = (q, k, v, coef, weight)
    with torch.no_grad(), _no_autocast(grad):
        grads = _wide_gradients(grad, *tensors, *rest, wanted)
        return [None if x is None or g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]


def _no_autocast(x: Tensor):
    """No autocast inside; entering it takes longer than to ask whether it is on."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


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
    return [x.to(_dtype_of_units(fused, others[-1])) for x in (y, *others)]


def _dtype_of_units(fused: bool, v: Tensor) -> torch.dtype:
    return v.dtype if fused else torch.promote_types(v.dtype, torch.float32)


def _beside_maps(coef: Tensor, basis: LinearBasis, fused: bool, slopes: bool = False) -> Tensor:
    """c M, what stands beside the maps that `basis.write` gives, or c D for those of phi' (`basis.mixing`).

    Coefficients are multiplied, not c^T V, of which there are as many as values: there it took as long as the rest of a
    full-rank layer.
    """
    mixing = None if fused else basis.mixing()
    return coef if mixing is None else coef @ mixing[slopes].to(coef)


def _mix(q, k, v, coef, weight, scale, basis, fused) -> Tensor:
    right = _right(v, _beside_maps(wide(coef), basis, fused), weight)
    if fused:
        from .kernels import fourier_triton  # Triton is not everywhere

        return fourier_triton.mix_forward(q, k, right, scale)
    return blocked.mix(wide(q), wide(k), right, scale, basis)


def _mix_gradients(grad, q, k, right, scale, basis, fused) -> tuple[Tensor, Tensor, Tensor]:
    if fused:
        from .kernels import fourier_triton

        return fourier_triton.mix_backward(grad, q, k, right, scale)
    return blocked.mix_gradients(grad, wide(q), wide(k), right, scale, basis)


def _wide_gradients(grad, q, k, v, coef, weight, y, scale, basis, fused, wanted):
    coef = wide(coef)
    modular, dv, dweight = weight is not None, None, None
    if modular:
        grad, y, weight, v = _alike(fused, grad, y, weight, v)
        grad, v = grad.contiguous(), v.contiguous()
        du = y.mT @ grad
        # Products image by image, then their sum: one product over images and channels would copy V once more.
        dv, dweight = weight @ du, (v @ du.mT).sum(dim=0, dtype=torch.promote_types(v.dtype, torch.float32))
        if not (wanted[0] or wanted[1] or wanted[3]):  # what learns stands behind Y: no score is needed
            return None, None, dv, None, dweight
        grad = grad @ (weight.mT @ v).mT  # that of Y
    right = _right(v, _beside_maps(coef, basis, fused, slopes=True), weight)
    dq, dk, dright = _mix_gradients(grad if fused and modular else wide(grad), q, k, right, scale, basis, fused)
    if v is None or modular:
        dcoef = dright[0].permute(0, 3, 2, 1)
    else:
        dv = einsum(_beside_maps(coef, basis, fused), dright, "h n q F, B h F q d -> B h n d")
        dcoef = einsum(wide(v), dright, "B h n d, B h F q d -> h n q F")
    mixing = None if fused else basis.mixing()
    return dq, dk, dv, dcoef if mixing is None else dcoef @ mixing[0].to(dcoef).mT, dweight


# ---- for torch.compile ----------------------------------------------------------------------------------------------
# Each pass is one operation, with all its products inside: of what it sees, torch.compile keeps whatever the backward
# pass would compute again (R, W^T V, copies of V, the scores of every block). A basis travels as text.


@torch.library.custom_op("karat_lite::attend", mutates_args=())
def _attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    coef: Tensor,
    weight: Tensor | None,
    scale: float,
    basis: str,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    out, y = _attend(q, k, v, coef, weight, scale, None if fused else basis_from_key(basis), fused)
    return out.contiguous(), out.new_empty(0) if y is None else y


@_attend_op.register_fake
def _(q, k, v, coef, weight, scale, basis, fused):
    shape, units = q.shape[:3], coef.shape[1]
    if v is None:
        return q.new_empty(*shape, units), q.new_empty(0)
    y = v.new_empty(0) if weight is None else v.new_empty(*shape, units, dtype=_dtype_of_units(fused, v))
    return v.new_empty(*shape, v.shape[-1]), y


@torch.library.custom_op("karat_lite::attend_gradients", mutates_args=())
def _gradients_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    coef: Tensor,
    weight: Tensor | None,
    y: Tensor,
    scale: float,
    basis: str,
    fused: bool,
) -> list[Tensor]:
    grads = _gradients(grad, q, k, v, coef, weight, y, scale, None if fused else basis_from_key(basis), fused)
    return [g.contiguous() for g in grads if g is not None]


@_gradients_op.register_fake
def _(grad, q, k, v, coef, weight, y, scale, basis, fused):
    return [x.new_empty(x.shape) for x in (q, k, v, coef, weight) if x is not None]


def _backward_of_op(ctx, grad, _):
    *tensors, y = ctx.saved_tensors
    found = iter(_gradients_op(grad, *tensors, y, *ctx.rest))
    return _once(grad, tensors, [None if x is None else next(found) for x in tensors])


_attend_op.register_autograd(_backward_of_op, setup_context=_InTorchFunc.setup_context)
