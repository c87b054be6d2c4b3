"""Tensors that do not fit an operator are named before they are broadcast, whatever its order."""

import pytest
import torch

import karat_lite as kl
from karat_lite.functional import karat_attention, project_simplex

N = 5


def operator(order="w_phi", basis="fourier", **options):
    return kl.KArAtOperator(2, N, basis, rank=3, order=order, **options)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (2, 2, N, 4)), dtype=dtype)


KINDS = {
    "w_phi": {},
    "phi_w": dict(order="phi_w"),
    "phi_w of wavelets": dict(order="phi_w", basis="dog"),
    "phi_phi": dict(order="phi_phi"),
    "simplex": dict(simplex=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_keys_are_those_of_the_queries(kind):
    made, q = operator(**KINDS[kind]), draw()
    for k, v in ((q, q[:, :, :1]), (q, q[:, :1]), (q, q[:1]), (q[:, :, :1], q)):
        with pytest.raises(ValueError, match=r"q, k and v must share \(B, h, N\)"):
            made.attend(q, k, v)
    with pytest.raises(ValueError, match="one type .*q torch.float64"):
        made.attend(*(draw(dtype=torch.float64) for _ in "qkv"))
    with pytest.raises(ValueError, match="scores must be .*N = 5 here"):
        made.activate(draw(2, 2, N, 1))
    assert made.attend(q, q, q).shape == q.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_backend_is_told(kind):
    made, q = operator(**KINDS[kind]), draw()
    made.backend = "recompte"
    with pytest.raises(ValueError, match="'recompte': did you mean 'recompute'"):
        made.attend(q, q, q)


@pytest.mark.parametrize("backend", ["reference", "contraction", "recompute"])
def test_axes_without_entries(backend):
    for shape in ((2, 2, 0, 4), (2, 0, N, 4), (2, 2, N, 0)):
        x, (_, h, n, _) = draw(*shape), shape
        with pytest.raises(ValueError, match="h, N and d at least 1, got"):
            karat_attention(x, x, x, kl.Fourier(1), draw(h, n, n, 2), backend=backend)
    with pytest.raises(TypeError, match="scale must be a number, got a tensor: multiply q"):
        x = draw()
        karat_attention(x, x, x, kl.Fourier(1), draw(2, N, N, 2), scale=torch.ones(()), backend=backend)


def test_sums_and_curves_that_are_not_there():
    q = draw()
    for made in (operator("phi_w"), operator(basis="dog")):
        with pytest.raises(ValueError, match="sums of units come from a linear basis before any mixing"):
            made.sums(q, q)
    with pytest.raises(ValueError, match="stage '2'"):
        operator().curve(torch.zeros(3), 0, 0, 0, stage="2")


def test_half_precision_is_projected_in_float32():
    y = torch.randn(64, 197, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(project_simplex(y), project_simplex(y.float()).bfloat16())


def test_compiled_code_keeps_rows_that_are_no_numbers():
    y = torch.randn(3, 6)
    y[1, 2] = float("nan")
    found = torch.compile(project_simplex, backend="eager")(y)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], project_simplex(y[[0, 2]]))
