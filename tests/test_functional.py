"""The operation equals its definition: sums written as plain Python loops, in double precision."""

import itertools
import math

import pytest
import torch
from einops import rearrange

from karat_lite import Fourier, KArAtOperator, KArAttention
from karat_lite.functional import attention_scores, karat_attention, project_simplex

B, H, D = 2, 3, 4  # images, heads, channels of a head


def by_definition(q, k, v, coef, weight=None, w_s=None, scale=None):
    """(activated map, output) of Fourier-KArAt, one number after the other: nothing but sums and products of floats.

    phi_pq(x) = w_s sum_m a_m cos(m x) + b_m sin(m x)
    Y_p = sum_q phi_pq(S_kq);  A_n = sum_p W_np Y_p;  O_c = sum_n A_n V_nc
    """
    grid, (images, heads, tokens, channels) = coef.shape[3] // 2, q.shape
    scale = 1 / math.sqrt(channels) if scale is None else scale
    q, k, v, coef = q.tolist(), k.tolist(), v.tolist(), coef.tolist()
    units = len(coef[0])
    weight, w_s = (None if x is None else x.tolist() for x in (weight, w_s))
    maps, out = [], []
    for b, h, row in itertools.product(range(images), range(heads), range(tokens)):
        y = [0.0] * units
        for p, col in itertools.product(range(units), range(tokens)):
            x = scale * sum(q[b][h][row][c] * k[b][h][col][c] for c in range(channels))
            a, phi = coef[h][p][col], 0.0
            for m in range(1, grid + 1):
                phi += a[m - 1] * math.cos(m * x) + a[grid + m - 1] * math.sin(m * x)
            y[p] += phi if w_s is None else w_s[h][p][col] * phi
        if weight is not None:
            y = [sum(weight[h][n][p] * y[p] for p in range(units)) for n in range(tokens)]
        maps.append(y)
        out.append([sum(y[n] * v[b][h][n][c] for n in range(tokens)) for c in range(channels)])
    shape = (images, heads, tokens)
    return torch.tensor(maps).double().view(*shape, tokens), torch.tensor(out).double().view(*shape, channels)


@pytest.fixture(autouse=True)
def double_precision_lists():
    """`torch.tensor(list of floats)` keeps all digits of the loops' results."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def error(found, reference) -> float:
    """max|difference| / max|reference|."""
    assert found.shape == reference.shape
    return ((found - reference).abs().max() / reference.abs().max()).item()


def draw(tokens, rank, grid, seed=0):
    """q, k, v, coef, weight of random numbers; rank=None is full rank. Scores reach about 3 in size."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, tokens, D, generator=generator) for _ in range(3))
    coef = torch.randn(H, rank or tokens, tokens, 2 * grid, generator=generator)
    return q, k, v, coef, None if rank is None else torch.randn(H, tokens, rank, generator=generator)


# Odd and even N, N = 1; r from 1 to N and full rank (None).
SIZES = [(1, 1), (1, None), (7, 1), (7, 5), (7, 7), (7, None), (6, 5), (6, None)]


@pytest.mark.parametrize("tokens, rank", SIZES)
@pytest.mark.parametrize("grid", [1, 3, 11])
@pytest.mark.parametrize("backend", ["reference", "contraction", "recompute", "auto"])
def test_output_equals_the_definition(tokens, rank, grid, backend):
    q, k, v, coef, weight = draw(tokens, rank, grid)
    _, expected = by_definition(q, k, v, coef, weight)
    assert error(karat_attention(q, k, v, Fourier(grid), coef, weight, backend=backend), expected) <= 1e-12


@pytest.mark.parametrize("tokens, rank", SIZES)
@pytest.mark.parametrize("grid", [1, 3, 11])
@pytest.mark.parametrize("edge_scales", [False, True])
def test_operator_equals_the_definition(tokens, rank, grid, edge_scales):
    """Both its doors, `activate` and `attend`, with coefficients and scales that are not their initial values."""
    q, k, v, coef, weight = draw(tokens, rank, grid)
    operator = KArAtOperator(H, tokens, grid=grid, rank=rank, edge_scales=edge_scales)
    w_s = torch.randn(H, rank or tokens, tokens) if edge_scales else None
    w_b = torch.randn(H, rank or tokens, tokens) if edge_scales else None  # multiplies b(x) = 0: the loops know none
    values = {"coef": coef, "weight": weight, "w_s": w_s, "w_b": w_b}
    operator.load_state_dict({name: value for name, value in values.items() if value is not None}, strict=edge_scales)
    maps, out = by_definition(q, k, v, coef, weight, w_s)
    assert error(operator.activate(attention_scores(q, k)), maps) <= 1e-12
    assert error(operator.attend(q, k, v), out) <= 1e-12


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("backend", ["reference", "contraction", "recompute"])
def test_views_of_packed_qkv_and_another_scale(rank, backend):
    """Attention hands over strided views of one projection, and a caller may scale the scores differently."""
    _, _, _, coef, weight = draw(5, rank, 3)
    packed = torch.randn(B, 5, 3 * H * D, generator=torch.Generator().manual_seed(1))
    q, k, v = rearrange(packed, "B N (three h d) -> three B h N d", three=3, h=H).unbind(0)
    assert not q.is_contiguous()
    _, expected = by_definition(q, k, v, coef, weight, scale=0.3)
    assert error(karat_attention(q, k, v, Fourier(3), coef, weight, scale=0.3, backend=backend), expected) <= 1e-12


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("backend", ["reference", "contraction", "recompute"])
def test_gradcheck(rank, backend):
    """Against finite differences, with respect to everything that can learn."""
    q, k, v, coef, weight = draw(3, rank, 2)
    inputs = [x[:1, :2] if x.ndim == 4 and x is not coef else x[:2] for x in (q, k, v, coef, weight) if x is not None]

    def attention(q, k, v, coef, weight=None):
        return karat_attention(q, k, v, Fourier(2), coef, weight, backend=backend)

    assert torch.autograd.gradcheck(attention, [x.clone().requires_grad_() for x in inputs])


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("edge_scales", [False, True])
def test_gradcheck_of_a_layer(rank, edge_scales):
    """From tokens to tokens, with respect to tokens and all parameters; w_b among them, whose gradient is 0."""
    torch.manual_seed(0)
    layer = KArAttention(4, 2, num_tokens=3, grid=2, rank=rank, edge_scales=edge_scales)
    values = dict(layer.named_parameters())

    def attention(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(values, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(attention, (torch.randn(1, 3, 4, requires_grad=True), *values.values()))


@pytest.mark.parametrize("rank", [5, None])
def test_both_backends_have_the_same_gradients(rank):
    gradients = {}
    for backend in ("reference", "contraction"):
        inputs = [None if x is None else x.requires_grad_() for x in draw(7, rank, 3)]
        out = karat_attention(*inputs[:3], Fourier(3), *inputs[3:], backend=backend)
        out.square().sum().backward()
        gradients[backend] = [x.grad for x in inputs if x is not None]
    for contracted, reference in zip(gradients["contraction"], gradients["reference"], strict=True):
        assert error(contracted, reference) <= 1e-12


def test_harmonics_by_angle_addition_are_the_harmonics():
    """32 of them, in single precision, at arguments as large as scores get."""
    x = torch.linspace(-12, 12, 1001, dtype=torch.float32)
    m = torch.arange(1, 33)
    exact = x.double()[:, None] * m
    assert error(Fourier(32).features(x).double(), torch.cat([exact.cos(), exact.sin()], dim=1)) < 5e-6


@pytest.mark.parametrize("rank", [5, None])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_under_autocast_scores_and_basis_stay_in_single_precision(rank, given):
    """A harmonic of a score rounded to bfloat16 would be off in its first digit: scores here reach 20."""
    q, k, v, coef, weight = (None if x is None else x.to(given) for x in draw(7, rank, 3))
    q = 6 * q
    operator = KArAtOperator(H, 7, grid=3, rank=rank).float()
    values = {"coef": coef, "weight": weight}
    operator.load_state_dict({name: value for name, value in values.items() if value is not None})
    exact = [None if x is None else x.double() for x in (coef, weight)]
    maps, out = by_definition(q.double(), k.double(), v.double(), *exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = attention_scores(q, k)
        activated, attended = operator.activate(scores), operator.attend(q, k, v)
    assert scores.dtype == activated.dtype == torch.float32 and attended.dtype == given
    assert scores.abs().max() > 12
    assert error(activated.double(), maps) < 1e-5
    rounding = 1e-5 if given is torch.float32 else 2**-8  # bfloat16 values go in, so the output is rounded once
    assert error(attended.double(), out) < rounding


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("backend", ["reference", "contraction", "recompute"])
def test_an_empty_batch_gives_an_empty_output(rank, backend):
    q, k, v, coef, weight = draw(5, rank, 1)
    out = karat_attention(q[:0], k[:0], v[:0], Fourier(1), coef, weight, backend=backend)
    assert out.shape == (0, H, 5, D)


def test_shapes_that_do_not_fit_are_named():
    q, k, v, coef, weight = draw(5, 3, 2)
    with pytest.raises(ValueError, match=r"q must have shape \(B, h, N, d\), .* got \(3, 5, 4\)"):
        karat_attention(q[0], k, v, Fourier(2), coef, weight)
    with pytest.raises(ValueError, match=r"must share .*\(2, 3, 4, 4\)"):
        karat_attention(q, k[:, :, :4], v, Fourier(2), coef, weight)
    with pytest.raises(
        ValueError, match=r"\(3, 3, 5, 6\) for 5 tokens, 3 heads and Fourier\(grid=3\), got \(3, 3, 5, 4\)"
    ):
        karat_attention(q, k, v, Fourier(3), coef, weight)
    with pytest.raises(ValueError, match=r"full rank because weight is None = \(3, 5, 5, 4\).*got \(3, 3, 5, 4\)"):
        karat_attention(q, k, v, Fourier(2), coef)
    with pytest.raises(ValueError, match=r"weight must be \(h, N, r\) = \(3, 5, 3\), got \(3, 3, 5\)"):
        karat_attention(q, k, v, Fourier(2), coef, weight.transpose(1, 2))
    with pytest.raises(ValueError, match="unknown backend 'contract': did you mean 'contraction'"):
        karat_attention(q, k, v, Fourier(2), coef, weight, backend="contract")


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 3e7, 1e9])
def test_large_rows_are_projected_on_the_simplex_too(size):
    """The projection does not see a number that is added to the whole row; sums of large numbers would."""
    torch.manual_seed(0)
    y = torch.cat([torch.rand(4, 197), torch.tensor([[1.0] + 196 * [0.0]])]) * torch.tensor(size).log10() + size
    exact = project_simplex(y.double() - y.double().amax(dim=-1, keepdim=True))
    x = project_simplex(y)
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.sum(dim=-1), torch.ones(5), rtol=0, atol=1e-5)
    assert torch.equal(project_simplex(torch.tensor([[size * 2, 0.0]])), torch.tensor([[1.0, 0.0]]))
