"""Singular values and ranks of attention matrices: against NumPy on full matrices and against cases done by hand."""

import math

import numpy as np
import pytest
import torch

import karat_lite as kl
from karat_lite.analysis import spectrum
from karat_lite.analysis.spectrum import spectra

MODELS = {
    "softmax": dict(attention="softmax"),
    "karat": dict(rank=4),
    "full rank": dict(rank=None),
    "order phi_w": dict(rank=4, order="phi_w"),
    "order phi_phi": dict(rank=4, order="phi_phi"),
    "simplex": dict(rank=4, simplex=True),
    "hybrid heads": dict(attention="hybrid", softmax_heads=[1], rank=4),
    "hybrid layers": dict(attention="hybrid", softmax_layers=[0], rank=4),
    "universal": dict(mode="universal", rank=4),
    "bspline": dict(basis="bspline", rank=4),
    "wavelet": dict(basis="dog", rank=4),
    "one layer, one head": dict(depth=1, num_heads=1, dim=16, rank=4),
}


def make(name, **more):
    torch.manual_seed(0)
    return kl.create_model("vit_pico", img_size=8, patch_size=2, **{"depth": 2, **MODELS[name], **more}).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", MODELS)
def test_singular_values_are_numpy_s_of_the_full_matrices(name, images):
    model = make(name)
    found = spectra(model, images)
    with torch.no_grad():
        _, records = make(name).double()(images.double(), return_attention=True)
    layers, heads = len(model.blocks), model.blocks[0].attn.num_heads
    assert found.before.shape == found.after.shape == (6, layers, heads, 17)
    for layer, record in enumerate(records):
        for mine, shared, theirs in (
            (found.before, found.before_shared, record.scores.numpy()),
            (found.after, found.after_shared, record.maps.numpy()),
        ):
            for head in range(heads):
                for b in range(6):
                    want = np.linalg.svd(theirs[b, head], compute_uv=False)
                    assert np.allclose(mine[b, layer, head], want, rtol=1e-9, atol=1e-13 * want[0])
                want = np.linalg.svd(np.concatenate(list(theirs[:, head])), compute_uv=False)
                assert np.allclose(shared[layer, head], want, rtol=1e-9, atol=1e-12 * want[0])
    assert next(model.parameters()).dtype == torch.float32, "the model that was given stays as it is"


@pytest.mark.parametrize("name", MODELS)
def test_no_rank_exceeds_its_bound(name, images):
    found = spectra(make(name), images)
    assert (spectrum.numerical_rank(found.before) <= found.before_bound).all()
    assert (spectrum.numerical_rank(found.after) <= found.after_bound).all()
    assert (spectrum.numerical_rank(found.after_shared) <= found.after_bound).all(), "W serves all images"


def test_bounds_are_met_where_they_bind(images):
    """Generic weights: the scores have the full rank d_h = 16 of 17, a modular map r, all others N."""
    bound = lambda name: spectra(make(name), images).after_bound.tolist()  # noqa: E731
    found = spectra(make("karat"), images)
    assert (spectrum.numerical_rank(found.after) == 4).all() and (found.after_bound == 4).all()
    assert (spectrum.numerical_rank(found.before) == 16).all() and (found.before_bound == 16).all()
    assert bound("hybrid heads") == [[4, 17, 4, 4]] * 2
    assert bound("hybrid layers") == [[17] * 4, [4] * 4]
    for name in ("softmax", "full rank", "order phi_w", "order phi_phi", "simplex"):
        assert bound(name) == [[17] * 4] * 2, name
    assert (spectrum.numerical_rank(spectra(make("simplex"), images).after) > 4).any(), "the simplex breaks the bound"


def test_float32_would_have_hidden_the_bound(images):
    with torch.no_grad():
        _, records = make("karat")(images, return_attention=True)
    s = np.linalg.svd(records[0].maps.double().numpy(), compute_uv=False)
    assert (spectrum.numerical_rank(s) > 4).all(), "rounding of float32 counts as rank for float64's tolerance"
    assert (spectrum.numerical_rank(s, np.float32) == 4).all()


def test_a_vit_tiny_at_224_with_random_weights():
    torch.manual_seed(0)
    found = spectra(kl.create_model("vit_tiny"), torch.randn(1, 3, 224, 224))
    assert found.after.shape == (1, 12, 3, 197)
    assert (spectrum.numerical_rank(found.after) <= 12).all()


def test_a_backend_for_a_gpu_does_not_matter(images):
    model = make("karat")
    before = spectra(model, images)
    for operator in model.operators():
        operator.backend = "triton"
    assert np.array_equal(spectra(model, images).after, before.after)
    assert model.operators()[0].backend == "triton"


# ---- measures -----------------------------------------------------------------------------------------------------

S = np.array([[2.0, 2, 2, 2], [3, 0, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0]])  # equal, one, two, none


def test_ranks_of_cases_done_by_hand():
    two = math.exp(2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3))
    assert np.allclose(spectrum.effective_rank(S), [4, 1, two, 0])
    assert np.allclose(spectrum.stable_rank(S), [4, 1, 5 / 4, 0])
    assert spectrum.numerical_rank(S).tolist() == [4, 1, 2, 0]
    assert np.allclose(spectrum.energy(S), [[0.25, 0.5, 0.75, 1], [1, 1, 1, 1], [0.8, 1, 1, 1], [1, 1, 1, 1]])
    assert np.allclose(spectrum.captured(S, 1), [0.25, 1, 0.8, 1])
    assert np.allclose(spectrum.captured(S, 12), 1), "more values than there are: all of them"
    assert spectrum.values_needed(S, 0.79).tolist() == [4, 1, 1, 0]
    assert spectrum.values_needed(S, 0.81).tolist() == [4, 1, 2, 0]
    assert spectrum.values_needed(S, 0.5).tolist() == [2, 1, 1, 0]
    assert spectrum.values_needed(np.full(9, 0.1), 1).tolist() == 9
    for measure in (spectrum.effective_rank, spectrum.stable_rank, spectrum.numerical_rank):
        assert np.allclose(measure(7 * S), measure(S)), "size does not count"
        assert np.shape(measure(S[0])) == (), "one matrix: one number"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_numerical_rank_is_that_of_numpy(dtype):
    """Matrices of rank 5 whose rounding must not count, and one whose smallest value lies just above the tolerance."""
    random = np.random.default_rng(0)
    for _ in range(20):
        A = (random.normal(size=(30, 5)) @ random.normal(size=(5, 30))).astype(dtype)
        s = np.linalg.svd(A, compute_uv=False)
        assert spectrum.numerical_rank(s, dtype) == np.linalg.matrix_rank(A) == 5
    tolerance = 3 * np.finfo(dtype).eps
    assert spectrum.numerical_rank(np.array([1, 1.01 * tolerance, 0.99 * tolerance]), dtype) == 2


def test_captured_energy_is_the_error_of_the_best_approximation():
    random = np.random.default_rng(0)
    A = random.normal(size=(9, 9)) @ np.diag(0.5 ** np.arange(9))
    U, s, Vt = np.linalg.svd(A)
    for r in (1, 3, 8):
        rest = A - U[:, :r] @ np.diag(s[:r]) @ Vt[:r]
        assert 1 - spectrum.captured(s, r) == pytest.approx(np.sum(rest**2) / np.sum(A**2), rel=1e-8, abs=1e-15)
    assert spectrum.values_needed(s, spectrum.captured(s, 3) - 1e-9) == 3


def test_bands_pool_all_matrices_in_logarithms():
    random = np.random.default_rng(0)
    s = -np.sort(-np.exp(random.normal(size=(3, 4, 5, 6))), axis=-1)
    flat = s.reshape(60, 6)
    found = spectrum.bands(s, share=0.5)
    assert np.allclose(found.mean, np.prod(flat ** (1 / 60), axis=0))
    assert np.allclose(found.median, np.exp(np.median(np.log(flat), axis=0)))
    assert np.allclose(found.low, np.exp(np.quantile(np.log(flat), 0.25, axis=0)))
    assert np.allclose(found.high, np.exp(np.quantile(np.log(flat), 0.75, axis=0)))
    ends = spectrum.bands(s, share=1)
    assert np.allclose(ends.low, flat.min(axis=0)) and np.allclose(ends.high, flat.max(axis=0))
    floor = spectrum.bands(np.array([[2.0, 1e-40, 0.0]]))
    assert np.allclose(floor.mean[1:], 3 * np.finfo(float).eps * 2), "what rounding makes counts as its tolerance"
    assert np.isfinite(np.log(spectrum.bands(np.zeros((2, 3))).mean)).all()


def test_the_table_holds_means_over_images_and_heads(images):
    found = spectra(make("hybrid heads"), images)
    table = spectrum.rank_table(found, r=3)
    want = [spectrum.effective_rank(found.after[:, layer]).mean() for layer in range(2)]
    assert table["effective rank"]["after"] == pytest.approx(want)
    want = [spectrum.captured(found.before[:, layer], 3).mean() for layer in range(2)]
    assert table["energy in 3"]["before"] == pytest.approx(want)
    want = [spectrum.values_needed(found.after_shared[layer], 0.99).mean() for layer in range(2)]
    assert table["shared values for 99 %"]["after"] == pytest.approx(want)
    assert table["values for 95 %"]["before"] != table["values for 99 %"]["before"]
    names = ["effective rank", "stable rank", "numerical rank", "values for 95 %", "values for 99 %", "energy in 3"]
    assert list(table) == [*names, *(f"shared {name}" for name in names)]


# ---- bad input ------------------------------------------------------------------------------------------------------


def spoiled(name="karat"):
    model = make(name)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[3, 3] = float("nan")
    return model


GOOD = torch.zeros(2, 3, 8, 8)
BAD = {
    "another kind of model": (lambda: spectra(torch.nn.Linear(2, 2), GOOD), TypeError, "got Linear"),
    "no images": (lambda: spectra(make("karat"), GOOD[:0]), ValueError, "at least one image"),
    "another size": (lambda: spectra(make("karat"), torch.zeros(2, 3, 9, 9)), ValueError, r"takes images of shape .*8"),
    "one image without a batch": (lambda: spectra(make("karat"), GOOD[0]), ValueError, "takes images of shape"),
    "bytes": (lambda: spectra(make("karat"), GOOD.byte()), TypeError, "normalise"),
    "bytes as floats": (lambda: spectra(make("karat"), GOOD + 255), ValueError, "largest pixel is 255"),
    "images with NaN": (lambda: spectra(make("karat"), GOOD / 0), ValueError, "must be finite"),
    "weights with NaN": (lambda: spectra(spoiled(), GOOD), ValueError, "layer 1 has scores.*blocks.1.attn.qkv.weight"),
    "negative": (lambda: spectrum.effective_rank([1, -1]), ValueError, "not negative"),
    "rising": (lambda: spectrum.numerical_rank([1, 2]), ValueError, "largest first"),
    "NaN": (lambda: spectrum.energy([1, math.nan]), ValueError, "finite"),
    "nothing": (lambda: spectrum.stable_rank([]), ValueError, "not empty"),
    "share of all": (lambda: spectrum.values_needed([1.0], 95), ValueError, "share must lie in"),
    "share of a band": (lambda: spectrum.bands([1.0], 0), ValueError, "share must lie in"),
    "no directions": (lambda: spectrum.captured([1.0], 0), ValueError, "r must be >= 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        call()
