"""The fused kernels equal the formulas in double precision: on a GPU if there is one, else in Triton's interpreter."""

import sys
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from torch._subclasses import FakeTensorMode

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

import triton.language as tl

from karat_lite import KArAtOperator, make_basis
from karat_lite.functional import choose_backend, karat_attention
from karat_lite.kernels import fourier_programs, fourier_triton
from karat_lite.kernels.fourier_triton import mix_backward, mix_forward, supported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def by_formula(q, k, right, scale):
    """Out_ke = sum_f sum_q psi_f(S_kq) R_fqe with every psi_f written out, in the type of its arguments."""
    scores, grid = scale * torch.einsum("bhmd, bhnd -> bhmn", q, k), right.shape[2] // 2
    psi = [torch.cos(m * scores) for m in range(1, grid + 1)] + [torch.sin(m * scores) for m in range(1, grid + 1)]
    return torch.einsum("bhfmn, bhfne -> bhme", torch.stack(psi, dim=2), right.expand(q.shape[0], *right.shape[1:]))


def draw(images=2, heads=1, rows=5, columns=7, channels=16, e=12, grid=3, shared=True, dtype=torch.float32):
    """q, k, right, scale, dOut. Scores are about N(0, 1). NaN lies behind each in memory: what reads too far shows."""
    g = torch.Generator().manual_seed(rows + 31 * columns)
    q, k = (torch.randn(images, heads, n, channels, generator=g).to(dtype) for n in (rows, columns))
    right = torch.randn(1 if shared else images, heads, 2 * grid, columns, e, generator=g)
    grad = torch.randn(images, heads, rows, e, generator=g)
    q, k, right, grad = (
        torch.cat([x, x.new_full((1, *x.shape[1:]), float("nan"))]).to(DEVICE)[:-1] for x in (q, k, right, grad)
    )
    return q, k, right, channels**-0.5, grad


def errors(q, k, right, scale, grad) -> dict[str, float]:
    """max|difference| / max|reference| of the output and of each gradient."""
    found = [mix_forward(q, k, right, scale), *mix_backward(grad, q, k, right, scale)]
    wide = [x.double().requires_grad_() for x in (q, k, right)]
    out = by_formula(*wide, scale)
    reference = [out.detach(), *torch.autograd.grad(out, wide, grad.double())]
    assert [x.dtype for x in found] == [torch.float32, q.dtype, k.dtype, torch.float32]
    assert [x.shape for x in found] == [x.shape for x in reference]
    pairs = zip(["out", "q", "k", "right"], found, reference, strict=True)
    return {name: ((x - ref).abs().max() / ref.abs().max()).item() for name, x, ref in pairs}


CASES = {
    "modular": dict(heads=2, rows=37, columns=37),
    "modular, one unit, G = 1": dict(rows=9, columns=9, e=1, grid=1),
    "one token": dict(rows=1, columns=1, e=1),
    "full rank": dict(heads=2, rows=37, columns=37, channels=24, e=24, shared=False),
    "one image": dict(images=1, shared=False),
    "few rows, many columns": dict(rows=3, columns=70, channels=24, e=20, shared=False),
    "many rows, few columns": dict(rows=70, columns=3, channels=64),
    "G = 4": dict(grid=4, rows=4),
    "G = 11": dict(grid=11, channels=24),
    "G = 11, full rank": dict(images=1, grid=11, channels=80, e=80, shared=False),
    "two blocks of e, shared": dict(e=70),
    "24 units": dict(heads=2, rows=37, columns=37, e=24),
    "G = 2, 48 units": dict(grid=2, e=48),
    "few channels": dict(channels=3),
    "wide heads": dict(channels=128, e=17),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case):
    found = errors(*draw(**case))
    assert all(x <= TOLERANCE[torch.float32] for x in found.values()), found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["modular", "few rows, many columns", "many rows, few columns", "G = 11, full rank"])
def test_half_precision(case, dtype):
    found = errors(*draw(dtype=dtype, **CASES[case]))
    assert all(x <= TOLERANCE[dtype] for x in found.values()), found


def test_gradients_beyond_the_range_of_half_precision():
    """dS reaches 5e5, beyond float16's 65,504; dQ and dK, for large Q and K and a small scale, stay below 2e4."""
    q, k, right, scale, grad = draw(rows=37, columns=37, dtype=torch.float16)
    found = errors(64 * q, 64 * k, right, scale / 64**2, 1e4 * grad)
    assert all(x <= TOLERANCE[torch.float16] for x in found.values()), found


@pytest.mark.parametrize("programs, groups", [(1, 1), (2, 2), (3, 3), (1024, 5)])
@pytest.mark.parametrize("grid, name, launches", [(3, "key_and_right_gradient", 1), (4, "right_gradient", 2)])
def test_a_shared_right_is_summed_over_groups_of_images(monkeypatch, programs, groups, grid, name, launches):
    """Five images in groups of 5, of 3 and 2, of 2, 2 and 1, of one each; up to three harmonics together with dK."""
    arguments, made = draw(images=5, grid=grid), []
    monkeypatch.setattr(fourier_triton, "PROGRAMS", programs)
    launch = getattr(fourier_triton, name)

    class Launch:
        def __getitem__(self, grid):
            made.append(grid[0])
            return launch[grid]

    monkeypatch.setattr(fourier_triton, name, Launch())
    found = errors(*arguments)
    assert made == [groups] * launches
    assert all(x <= TOLERANCE[torch.float32] for x in found.values()), found


@pytest.mark.parametrize("fast, tolerance", [(False, 5e-7), (True, 1e-6)])
def test_sine_and_cosine_keep_their_accuracy_far_out(monkeypatch, fast, tolerance):
    """One key of one channel: the scores are the queries themselves, and R picks cos and sin.

    `fast` stands beside half precision, whose inputs would hide its errors: float32 inputs show them.
    """
    q = torch.cat([torch.linspace(-2e4, 2e4, 1001), torch.linspace(-4, 4, 1001)]).view(1, 1, -1, 1).to(DEVICE)
    k, right = torch.ones(1, 1, 1, 1, device=DEVICE), torch.eye(2, device=DEVICE).view(1, 1, 2, 1, 2)
    plan = {"mix": fourier_triton._plans(q, right)["mix"] | dict(FAST=fast)}
    monkeypatch.setattr(fourier_triton, "_plans", lambda q, right: plan)
    if DEVICE == "cpu":  # the interpreter has no GPU's sine: what it tests is how x is brought near 0
        near = SimpleNamespace(fast_cosf=lambda x: tl.cos(x), fast_sinf=lambda x: tl.sin(x))
        monkeypatch.setattr(fourier_programs, "libdevice", near)
    out = mix_forward(q, k, right, 1.0)
    x = q.double()
    assert (out - torch.cat([x.cos(), x.sin()], dim=-1)).abs().max() <= tolerance


def test_views_of_a_packed_projection_give_the_same_bits():
    images, tokens, heads, channels = 2, 11, 2, 16
    _, _, right, scale, grad = draw(images, heads, tokens, tokens, channels)
    packed = torch.randn(images, tokens, 3, heads, channels, device=DEVICE)
    q, k, _ = packed.permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
    coef = right[0].permute(0, 3, 2, 1).contiguous()  # (h, r, N, F) as an operator holds it
    strided, straight = (q, k, coef.permute(0, 3, 2, 1)[None]), (q.contiguous(), k.contiguous(), right)
    assert not any(x.is_contiguous() for x in strided)
    expanded = torch.ones((), device=DEVICE).expand_as(grad)  # what the gradient of a sum looks like: strides 0
    assert torch.equal(mix_forward(*strided, scale), mix_forward(*straight, scale))
    twins = zip(
        mix_backward(expanded, *strided, scale), mix_backward(torch.ones_like(grad), *straight, scale), strict=True
    )
    assert all(torch.equal(x, y) and x.is_contiguous() for x, y in twins)


def test_two_calls_agree_bit_by_bit():
    q, k, right, scale, grad = draw(images=3, heads=2, rows=37, columns=37)
    first, second = ([mix_forward(q, k, right, scale), *mix_backward(grad, q, k, right, scale)] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("shared", [True, False])
def test_empty_batch(shared):
    q, k, right, scale, grad = draw(images=0, shared=shared)
    assert mix_forward(q, k, right, scale).shape == grad.shape
    grad_q, grad_k, grad_right = mix_backward(grad, q, k, right, scale)
    assert (grad_q.shape, grad_k.shape, grad_right.shape) == (q.shape, k.shape, right.shape)
    assert not grad_right.any()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, message",
    [
        (dict(dtype=torch.float64), "take float32, float16 and bfloat16, got torch.float64"),
        (dict(channels=136), "at most 128 channels per head, got 136"),
        (dict(grid=17), "take G up to 16, got 17"),
    ],
)
def test_refusals_give_the_reason(case, message):
    q, k, right, scale, grad = draw(**case)
    assert message in supported(q, right)
    with pytest.raises(ValueError, match=message):
        mix_forward(q, k, right, scale)
    with pytest.raises(ValueError, match=message):
        mix_backward(grad, q, k, right, scale)


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch):
    q, _, right, _, _ = draw()
    monkeypatch.setattr(fourier_triton, "INTERPRETED", False)
    assert "need a GPU, got tensors on cpu" in supported(q.cpu(), right.cpu())
    assert supported(q.to("meta"), right.to("meta")) is not None
    if DEVICE == "cuda":
        assert supported(q, right) is None


def test_half_precision_is_refused_on_old_gpus(monkeypatch):
    """As on a T4: "auto" takes another backend there and says why. No GPU is needed for tensors without numbers."""
    monkeypatch.setattr(fourier_triton, "INTERPRETED", False)
    monkeypatch.setattr(fourier_triton, "_capability", lambda index: (7, 5))
    basis = make_basis("fourier", 3)
    with FakeTensorMode():
        q, coef = torch.empty(1, 1, 5, 16, device="cuda"), torch.empty(1, 12, 5, 6, device="cuda")
        assert choose_backend("auto", basis, q, coef) == "triton"
        for half in (q.half(), q.bfloat16()):
            message = rf"{half.dtype} on GPUs of compute capability 8.0 or newer, got 7.5 \(a T4 has 7.5\)"
            with pytest.warns(UserWarning, match=f"'auto' takes 'recompute', not 'triton'.*{message}"):
                assert choose_backend("auto", basis, half, coef) == "recompute"
            with pytest.raises(ValueError, match=message):
                choose_backend("triton", basis, half, coef)
        monkeypatch.setattr(fourier_triton, "_capability", lambda index: (8, 0))
        assert choose_backend("auto", basis, q.half(), coef) == "triton"


def test_shapes_that_do_not_fit_are_named():
    q, k, right, scale, grad = draw()
    for wrong in (k[:1], k[..., :8], k.half(), k[0]):
        with pytest.raises(ValueError, match="must share B, h, d and type"):
            mix_forward(q, wrong, right, scale)
    for wrong in (right[:, :, :5], right[..., :6, :], right.repeat(3, 1, 1, 1, 1), right[0]):
        with pytest.raises(ValueError, match=r"right must be \(B or 1, h, 2G, N, e\), that is \(2 or 1, 1, 2G, 7, e\)"):
            mix_forward(q, k, wrong, scale)
    with pytest.raises(ValueError, match="grad must be"):
        mix_backward(grad[..., :4], q, k, right, scale)


# ---- PyTorch's own checks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_operators_keep_what_they_promise_to_pytorch(shared):
    """Schema, fake tensors, and tracing with dynamic shapes."""
    q, k, right, scale, grad = draw(rows=7, columns=7, grid=1, e=3, shared=shared, dtype=torch.float16)
    packed = torch.stack([q, k], dim=3)  # strided views, as from a packed projection
    q, k = packed.unbind(dim=3)
    torch.library.opcheck(mix_forward, (q, k, right, scale))
    torch.library.opcheck(mix_backward, (grad, q, k, right, scale))


def test_compiled_as_one_graph():
    def layer(q, k, right, v):
        return mix_forward(2 * q, k, right, 0.25).relu() @ v

    q, k, right, _, _ = draw()
    v = torch.randn(right.shape[-1], 3, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, right, v), layer(q, k, right, v))


# ---- as a backend ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 12, None])
def test_as_a_backend_it_equals_the_reference(rank):
    """Values and gradients of q, k, v, coef, weight, from views of a packed projection."""
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 19, 3 * 2 * 16, generator=g).to(DEVICE)
    leaves = [packed, torch.randn(2, rank or 19, 19, 6, generator=g).to(DEVICE)]
    leaves += [] if rank is None else [torch.randn(2, 19, rank, generator=g).to(DEVICE)]
    results = []
    for backend, wide in (("triton", torch.float32), ("reference", torch.float64)):
        packed, *operator = (x.to(wide).requires_grad_() for x in leaves)
        q, k, v = rearrange(packed, "B N (three h d) -> three B h N d", three=3, h=2).unbind(0)
        out = karat_attention(q, k, v, make_basis("fourier", 3), *operator, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), [packed, *operator])])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_as_a_backend_in_half_precision(dtype):
    """Operators' parameters are float32, as under autocast; everything that is kept for the backward pass is not."""
    g = torch.Generator().manual_seed(1)
    leaves = [*torch.randn(3, 2, 2, 19, 16, generator=g), torch.randn(2, 12, 19, 6, generator=g) * 0.1]
    leaves.append(torch.randn(2, 19, 12, generator=g) * 0.1)
    results, kept = [], []
    for backend, kinds in (("triton", [dtype] * 3 + [torch.float32] * 2), ("reference", [torch.float64] * 5)):
        rounded = [x.to(dtype) for x in leaves[:3]] + leaves[3:]
        inputs = [x.to(DEVICE, kind).requires_grad_() for x, kind in zip(rounded, kinds, strict=True)]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            out = karat_attention(*inputs[:3], make_basis("fourier", 3), *inputs[3:], backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
        if backend == "triton":
            assert {x.dtype for x in kept if x.shape[1] == 2} == {dtype}  # q, k, v and Y
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max()


def test_queries_and_keys_of_two_types():
    """As where one of them was under autocast: read as the wider of the two."""
    g = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 1, 1, 9, 16, generator=g).to(DEVICE)
    q = q.bfloat16().requires_grad_()
    coef, basis = torch.randn(1, 9, 9, 6, generator=g).to(DEVICE), make_basis("fourier", 3)
    results = []
    for backend in ("triton", "reference"):
        out = karat_attention(q, k, v, basis, coef, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), [q])])
    (found, slope), (wanted, its) = results
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert slope.dtype == torch.bfloat16 and (slope - its).abs().max() <= 2e-2 * its.abs().max()


def test_phi_w_runs_on_it_too():
    torch.manual_seed(0)
    operator = KArAtOperator(2, 9, rank=4, order="phi_w").to(DEVICE)
    q, k, v = torch.randn(3, 2, 2, 9, 16).to(DEVICE)
    operator.backend = "triton"
    found = operator.attend(q, k, v)
    operator.backend = "contraction"
    wanted = operator.attend(q, k, v)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "basis, kind, message",
    [
        ("rbf", torch.float32, "backend 'triton' is not available: its kernels compute the Fourier basis"),
        ("fourier", torch.float64, "take float32, float16 and bfloat16, got torch.float64"),
    ],
)
def test_a_backend_that_is_not_available(basis, kind, message):
    basis = make_basis(basis, 3)
    q, k, v = torch.randn(3, 1, 1, 5, 16, dtype=kind).to(DEVICE)
    coef = torch.randn(1, 5, 5, basis.num_parameters, dtype=kind).to(DEVICE)
    with pytest.raises(ValueError, match=message):
        karat_attention(q, k, v, basis, coef, backend="triton")
