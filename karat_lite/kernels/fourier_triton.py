"""Fourier-KArAt's core as fused GPU kernels (Triton): scores live in registers, tile by tile, and nowhere else.

    S_kq   = scale * sum_c Q_kc K_qc                       q (B, h, M, d), k (B, h, N, d)
    Out_ke = sum_f sum_q psi_f(S_kq) R_fqe                 right (B or 1, h, F, N, e) -> out (B, h, M, e)

with psi_f = cos(m x), m = 1..G, then sin(m x), m = 1..G; F = 2G. One sum serves both operators: modular takes
R_fqp = c_pqf, one for all images, e = r; full rank takes R_f = c_f^T V, one per image, e = d. Backward, given dOut:

    E_f    = dOut R_f^T                                    (M, N)
    dS     = sum_m m [cos(m S) E_(sin m) - sin(m S) E_(cos m)]     (the kernels are given m R_f)
    dQ     = scale dS K,   dK = scale dS^T Q,   dR_f = psi_f(S)^T dOut     (summed over the images that share R)

Arrangement. Each program owns a block of rows of its result and loops over everything that is summed. No two programs
write the same number, so there are no atomics, and two calls agree bit by bit.

    kernel                    owns                   loops over              evaluates the scores
    mix                       rows of Out            q                       once per block of 64 e
    score_gradient            rows of dQ             q                       once
                              rows of dK             k                       once
    right_gradient            rows of dR_f, 6 f      images of a group, k    once per 3 harmonics and block of e
    key_and_right_gradient    rows of dK and dR_f    images of a group, k    once

The last takes the place of the two before it where its accumulators fit in registers: G <= 3, e <= 16, d <= 64, one R
for all images.

Scores are evaluated anew in every kernel: d products and a sine cost less than moving M N numbers. The accumulators of
dR must stay in registers, so three harmonics go at a time; the paper's G = 3 is one launch. Where images share R, the
sum runs over the images of a group first, then over groups: one ordinary sum of a buffer of groups * h * F * N * e * 4
bytes. The number of groups follows from the shapes alone (about PROGRAMS programs in all), so results do too.
ViT-Tiny, 128 images, r = 12, G = 3: 64 groups, 10.9 MB.

Types. float32 inputs are multiplied in float32 throughout ("ieee"). float16 and bfloat16 go through tensor cores with
float32 accumulators: Q K^T and psi R in the inputs' type. Products that hold a gradient need the range of float32,
because dS grows like G^2 times dOut and R and would leave float16's: bfloat16 has it, for float16 they are in TF32.
Scores and harmonics are float32 always; beside half precision cos and sin are the GPU's approximations, whose error of
1e-6 is a thousandth of what rounding the inputs costs. On an H200 both together halved the time of the backward pass.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fourier_programs import INTERPRETED, key_and_right_gradient, mix, right_gradient, score_gradient

MAX_CHANNELS = 128  # d: blocks of queries, keys and their gradients must fit in registers
MAX_GRID = 16  # G: tested up to 11, the paper's largest; the right gradient's code grows with it
PROGRAMS = 1024  # aim of the right gradient's grid: about eight for each of a large GPU's 132 multiprocessors
HARMONICS = 3  # accumulated at a time by the right gradient, which names its accumulators: 3 cosines, 3 sines
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# ---- what the caller sees -------------------------------------------------------------------------------------------


def supported(q: Tensor, right: Tensor) -> str | None:
    """None where the kernels can take these tensors, else the reason why not, in one sentence."""
    for x in (q, right):
        if x.dtype not in TYPES:
            return f"the Triton kernels take float32, float16 and bfloat16, got {x.dtype}: use another backend there."
    if q.device.type != "cuda" and not INTERPRETED:
        return (
            f"the Triton kernels need a GPU, got tensors on {q.device}. To try them without one, set "
            "TRITON_INTERPRET=1 before Python starts (slow, for tests)."
        )
    # On older ones Triton has no tensor cores for half precision: products are scalar, and their tiles overflow.
    if q.device.type == "cuda" and q.dtype != torch.float32 and (found := _capability(q.device.index)) < (8, 0):
        return (
            f"the Triton kernels take {q.dtype} on GPUs of compute capability 8.0 or newer, got {found[0]}.{found[1]} "
            "(a T4 has 7.5): use float32 or another backend there."
        )
    if q.shape[-1] > MAX_CHANNELS:
        return f"the Triton kernels take at most {MAX_CHANNELS} channels per head, got {q.shape[-1]}: use more heads."
    if right.shape[-3] > 2 * MAX_GRID:
        return f"the Triton kernels take G up to {MAX_GRID}, got {right.shape[-3] // 2}: use another backend there."
    return None


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    """Of a GPU; PyTorch remembers it. A constant to torch.compile."""
    return torch.cuda.get_device_capability(index)


@torch.library.custom_op("karat_lite::fourier_mix", mutates_args=(), device_types=("cpu", "cuda"))
def mix_forward(q: Tensor, k: Tensor, right: Tensor, scale: float) -> Tensor:
    """Out_ke = sum_f sum_q psi_f(S_kq) R_fqe, S = scale Q K^T.

    Args:
        q: (B, h, M, d), float32, float16 or bfloat16. It may be a strided view, of a packed projection say; so may k.
        k: (B, h, N, d) in the type of q.
        right: (B, h, F, N, e), or (1, h, F, N, e) shared by all images; rounded to the type of q.
        scale: factor of the scores.

    Returns (B, h, M, e) in float32. Autograd does not pass through: its backward pass is `mix_backward`.
    Raises `ValueError` for shapes that do not fit and for whatever `supported` names.
    """
    _check(q, k, right)
    out = q.new_empty((*q.shape[:3], right.shape[-1]), dtype=torch.float32)
    if out.numel() == 0 or right.numel() == 0:
        return out.zero_()
    right, plan = right.to(q.dtype).contiguous(), _plans(q, right)["mix"]
    grid = (_programs(q, plan), triton.cdiv(right.shape[-1], plan["BLOCK_E"]))
    with _on(q):
        mix[grid](q, k, right, out, scale, *q.shape[1:3], k.shape[2], *q.stride(), *k.stride(), _step(right), **plan)
    return out


@mix_forward.register_fake
def _(q, k, right, scale):
    return q.new_empty((*q.shape[:3], right.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("karat_lite::fourier_mix_backward", mutates_args=(), device_types=("cpu", "cuda"))
def mix_backward(grad: Tensor, q: Tensor, k: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dR) for grad = dOut (B, h, M, e); the other arguments as in `mix_forward`.

    dQ and dK have the shapes and the type of q and k, contiguous; dR the shape of right, float32. For a shared right a
    buffer of groups * h * F * N * e * 4 bytes holds partial sums (see the module).
    """
    _check(q, k, right)
    (images, heads, rows, _), columns, (maps, _, e) = q.shape, k.shape[2], right.shape[2:]
    if grad.shape != (*q.shape[:3], e):
        raise ValueError(f"grad must be (B, h, M, e) = {(*q.shape[:3], e)}, as the output is, got {tuple(grad.shape)}.")
    grad_q, grad_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    if grad.numel() == 0 or right.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), right.new_zeros(right.shape, dtype=torch.float32)
    shared, plan = right.shape[0] == 1, _plans(q, right)
    grad, right, step = grad.contiguous(), _times_m(right, q.dtype), _step(right)
    strides = *q.stride(), *k.stride()
    with _on(q):
        for own, other, result, name in ((q, k, grad_q, "queries"), (k, q, grad_k, "keys")):
            if name in plan:
                score_gradient[(_programs(own, plan[name]),)](
                    grad, own, other, right, result, scale, heads, own.shape[2], other.shape[2],
                    *own.stride(), *other.stride(), step, **plan[name],
                )  # fmt: skip

        its = plan["right"] if "right" in plan else plan["keys and right"]
        blocks = triton.cdiv(columns, its["BLOCK_OWN"]) * heads
        blocks_e = triton.cdiv(e, its["BLOCK_E"])
        share = -(-images // max(1, PROGRAMS // (blocks * blocks_e))) if shared else 1  # images of a group
        groups = -(-images // share)
        partial = q.new_empty((groups, heads, maps, columns, e), dtype=torch.float32)
        if "right" in plan:
            for first in range(0, maps // 2, HARMONICS):
                right_gradient[(blocks * groups, blocks_e)](
                    grad, q, k, partial, scale, images, share, heads, rows, columns, *strides,
                    FIRST=first, COUNT=min(HARMONICS, maps // 2 - first), **its,
                )  # fmt: skip
        else:
            key_and_right_gradient[(blocks * groups,)](
                grad, q, k, right, grad_k, partial, scale, images, share, heads, rows, columns, *strides, **its,
            )  # fmt: skip
    return grad_q, grad_k, partial.sum(dim=0, keepdim=True) if shared and groups > 1 else partial


@mix_backward.register_fake
def _(grad, q, k, right, scale):
    grad_q, grad_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    return grad_q, grad_k, right.new_empty(right.shape, dtype=torch.float32)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, right: Tensor) -> None:
    if not (q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and q.dtype == k.dtype):
        raise ValueError(
            f"q (B, h, M, d) and k (B, h, N, d) must share B, h, d and type: "
            f"got {tuple(q.shape)} {q.dtype}, {tuple(k.shape)} {k.dtype}."
        )
    b, h, n = q.shape[0], q.shape[1], k.shape[2]
    fits = right.ndim == 5 and right.shape[0] in (1, b) and (right.shape[1], right.shape[3]) == (h, n)
    if not fits or right.shape[2] % 2:
        raise ValueError(
            f"right must be (B or 1, h, 2G, N, e), that is ({b} or 1, {h}, 2G, {n}, e), got {tuple(right.shape)}."
        )
    if (reason := supported(q, right)) is not None:
        raise ValueError(reason)


def _plans(q: Tensor, right: Tensor) -> dict[str, dict]:
    """Constants of each kernel that is launched, by shapes and types alone. Registers decide: a thread has 255 at most.

    A block owned by a program meets blocks of 32 on the other side: four tiles of harmonics, one or two of gradients
    and the accumulators are alive at once. N = 197 fills blocks of 32 to 88 %, blocks of 64 to 77 %. Tensor cores
    want 64 rows for a group of four warps, two groups beyond d = 64 (eight warps with 64 rows would compute scores
    twice); float32 products without them hold their operands in registers too: 32. e goes in blocks of at most 64; dR,
    six accumulators, takes 32 of them or, in float32, eight warps. tests/kernels_for_gpu.py compiles what comes of it:
    within 99 KB of shared memory up to sm_89, 227 KB on sm_90, and next to nothing is spilled.
    """
    d, grid, e = q.shape[-1], right.shape[-3] // 2, right.shape[-1]
    single, wide = q.dtype == torch.float32, d > 64
    block_e = min(64, max(16, triton.next_power_of_2(e)))
    unroll = 1 < grid and (grid * block_e <= 64 or (grid <= 3 and not single and not wide))
    plan = dict(
        D=d,
        E=e,
        G=grid,
        BLOCK_OWN=32 if single else 128 if wide else 64,
        BLOCK_OTHER=32,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        BLOCK_E=block_e,
        TYPE=tl.float32 if INTERPRETED else TYPES[q.dtype],  # bfloat16 arithmetic is wrong in the interpreter
        GRAD=tl.bfloat16 if q.dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
        FAST=not (single or INTERPRETED),
        PRECISION="ieee" if single or INTERPRETED else "tf32",
        UNROLL=unroll,
        num_warps=8 if wide else 4,
        num_stages=2 if unroll and block_e > 16 else 3,  # a stage of an unrolled loop holds R of all harmonics
    )
    queries = keys = plan
    if wide or plan["GRAD"] == tl.float32:  # e is summed over: its blocks may be small
        queries = keys = {**plan, "BLOCK_E": 16, "UNROLL": 1 < grid <= 3, "num_stages": 2 if wide else 3}
    else:  # on an H200 128 rows took a tenth less time than 64; four warps would spill
        queries = {**plan, "BLOCK_OWN": 128, "num_warps": 8}
    made = {"mix": plan, "queries": {**queries, "KEYS": False}}
    if right.shape[0] == 1 and grid <= HARMONICS and block_e == 16 and not wide:
        return {**made, "keys and right": plan}
    sums = {"num_warps": 8} if single and block_e > 16 else {"BLOCK_E": min(block_e, 32), "num_stages": 3}
    return {**made, "keys": {**keys, "KEYS": True}, "right": {**plan, **sums}}


def _times_m(right: Tensor, dtype: torch.dtype) -> Tensor:
    """m R_f, contiguous and of this type: all that dS needs of R."""
    halves = right.unflatten(2, (2, -1))  # cosines, sines
    m = torch.arange(1, halves.shape[3] + 1, device=right.device).view(-1, 1, 1)
    return torch.mul(halves, m, out=right.new_empty(halves.shape, dtype=dtype))


def _programs(own: Tensor, plan: dict) -> int:
    """Programs that own the rows of (B, h, rows, d), laid along one axis of the grid: the others end at 65,535."""
    return own.shape[0] * own.shape[1] * triton.cdiv(own.shape[2], plan["BLOCK_OWN"])


def _step(right: Tensor) -> int:
    """From one image's R to the next, in numbers; 0 where all share one."""
    return 0 if right.shape[0] == 1 else right[0].numel()


def _on(q: Tensor):
    """Triton launches on the current device: make it that of q."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()
