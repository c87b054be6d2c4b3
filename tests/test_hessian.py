"""Curvature against dense Hessians by differences of gradients, second differences of losses, known matrices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import KINDS, batch, flat, tiny

from karat_lite.analysis.directions import filter_norms, weights_of
from karat_lite.analysis.hessian import hessian_product, hessian_spectrum, sharpest_directions, top_eigenvalues
from karat_lite.analysis.landscape import batch_loss, loss_profile, rise


def dense_hessian(model, images, labels, smoothing=0.0) -> np.ndarray:
    """Central differences of first gradients, one weight at a time (with the package's own, recomputing backward)."""
    parameters, columns, eps = list(model.parameters()), [], 1e-5

    def gradient():
        loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        return flat(dict(enumerate(torch.autograd.grad(loss, parameters, materialize_grads=True))))

    for p in parameters:
        numbers = p.data.view(-1)
        for i in range(len(numbers)):
            kept = numbers[i].item()
            numbers[i] = kept + eps
            plus = gradient()
            numbers[i] = kept - eps
            columns.append((plus - gradient()) / (2 * eps))
            numbers[i] = kept
    return np.array(columns)


@pytest.mark.parametrize("kind", ["softmax", "karat"])
def test_eigenvalues_against_a_dense_hessian(kind):
    model, (images, labels) = tiny(kind).double(), batch(6)
    images = images.double()
    dense = dense_hessian(model, images, labels, 0.1)
    dense = (dense + dense.T) / 2
    values, vectors = np.linalg.eigh(dense)
    options = dict(smoothing=0.1, chunk=4, tolerance=1e-8, iterations=200, progress=False)
    found = hessian_spectrum(model, images, labels, 4, **options)
    assert np.allclose(found.values, values[::-1][:4], rtol=1e-5, atol=1e-6)
    assert found.converged and found.residuals.max() <= 1e-8 * found.values[0]
    assert abs(found.vectors[0].numpy() @ vectors[:, -1]) == pytest.approx(1, abs=1e-5)
    product, size = hessian_product(model, images, labels, smoothing=0.1, chunk=4)
    for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert (product(vector) - value * vector).norm().item() == pytest.approx(residual, abs=1e-8)
    assert size == len(dense) and found.lowest == pytest.approx(values[0], rel=0.05)
    norms = np.concatenate([
        np.broadcast_to(norm, x.shape).ravel() for norm, x in zip(
            filter_norms(weights_of(model)).values(), weights_of(model).values(), strict=True)
    ])  # fmt: skip
    relative = hessian_spectrum(model, images, labels, 2, relative=True, **options)
    truth = np.linalg.eigvalsh(norms[:, None] * dense * norms)
    assert np.allclose(relative.values, truth[::-1][:2], rtol=1e-4)
    assert all(block.attn.activation.backend == "auto" for block in model.blocks if kind == "karat")


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_symmetric_and_second_differences_for_every_kind(kind):
    model, (images, labels) = tiny(kind).double(), batch()
    images = images.double()
    product, size = hessian_product(model, images, labels, chunk=4)
    u, v = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (u @ product(v)).item() == pytest.approx((v @ product(u)).item(), rel=1e-6)
    assert torch.allclose(product(u + 2 * v), product(u) + 2 * product(v), atol=1e-9)
    v, at, eps = v / v.norm(), weights_of(model), 1e-3
    pieces = v.split([x.numel() for x in at.values()])
    moved = lambda c: {k: x + c * p.view_as(x) for (k, x), p in zip(at.items(), pieces, strict=True)}  # noqa: E731
    ends = [batch_loss(model, images, labels, moved(c)) for c in (-eps, 0, eps)]
    second = (ends[0] - 2 * ends[1] + ends[2]) / eps**2
    assert (v @ product(v)).item() == pytest.approx(second, rel=1e-2, abs=1e-5)


def test_a_rescaling_that_changes_nothing_changes_raw_curvature_only():
    """coef times c and W over c: the same function, the same loss in relative steps, another Hessian."""
    model, (images, labels) = tiny().double(), batch()
    images, other = images.double(), tiny().double()
    with torch.no_grad():
        operator = other.operators()[0]
        operator.coef.mul_(8)
        operator.weight.div_(8)
    assert torch.allclose(model(images), other(images), atol=1e-12)
    tops = {}
    for relative in (False, True):
        options = dict(relative=relative, progress=False, tolerance=1e-6, iterations=100)
        tops[relative] = [hessian_spectrum(m, images, labels, 1, **options).values[0] for m in (model, other)]
    assert tops[True][0] == pytest.approx(tops[True][1], rel=1e-6)
    assert abs(tops[False][1] / tops[False][0] - 1) > 0.2
    assert rise(model, images, labels).mean == pytest.approx(rise(other, images, labels).mean, rel=1e-6)


def test_lanczos_on_known_matrices():
    values = torch.tensor([5.0, 4.9, 3.0, 1.0, 0.5, -2.0, -7.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    matrix = basis @ values.diag() @ basis.T
    like = torch.empty(0, dtype=torch.float64)
    found = top_eigenvalues(lambda v: matrix @ v, 7, 3, tolerance=1e-10, like=like, progress=False)
    assert np.allclose(found.values, [5, 4.9, 3]) and found.lowest == pytest.approx(-7) and found.converged
    assert np.allclose((found.vectors @ basis).abs()[range(3), range(3)], 1, atol=1e-6)
    short = top_eigenvalues(lambda v: matrix @ v, 7, 1, tolerance=1e-10, iterations=3, like=like, progress=False)
    assert not short.converged and short.iterations == 3 and short.residuals[0] > 1e-3
    ones = torch.ones(7, 7, dtype=torch.float64) / 7  # rank 1: two directions and nothing is left
    found = top_eigenvalues(lambda v: ones @ v, 7, 1, tolerance=1e-10, like=like, progress=False)
    assert found.values[0] == pytest.approx(1) and found.iterations <= 3 and found.converged
    late = torch.ones(10_000)
    late[7] = 2  # hardly there in a random start: the first product finds 1.0001, to a residual of 0.01
    found = top_eigenvalues(lambda v: late * v, 10_000, 1, progress=False)
    assert found.values[0] == pytest.approx(2, abs=1e-3) and found.converged
    assert not top_eigenvalues(lambda v: late * v, 10_000, 1, iterations=1, progress=False).converged
    with pytest.raises(ValueError, match="nothing is left: H has 2 different eigenvalues .*asked for 3"):
        top_eigenvalues(lambda v: ones @ v, 7, 3, like=like, progress=False)


def test_a_product_where_nothing_records():
    model, (images, labels) = tiny().double(), batch()
    wanted = hessian_spectrum(model, images.double(), labels, 1, progress=False).values
    with torch.no_grad():
        assert np.array_equal(hessian_spectrum(model, images.double(), labels, 1, progress=False).values, wanted)


def test_the_sharpest_direction_is_one():
    model, (images, labels) = tiny().double(), batch()
    images = images.double()
    for relative in (True, False):
        options = dict(relative=relative, tolerance=1e-6, iterations=100, progress=False)
        spectrum = hessian_spectrum(model, images, labels, 2, **options)
        directions = sharpest_directions(model, spectrum)
        low, middle, high = loss_profile(model, directions, images, labels, [-1e-3, 0, 1e-3])[0]
        assert (low - 2 * middle + high) / 1e-6 == pytest.approx(spectrum.values[0], rel=1e-2)
    with pytest.raises(ValueError, match="a spectrum|this spectrum is of a model with"):
        sharpest_directions(tiny("softmax"), spectrum)
