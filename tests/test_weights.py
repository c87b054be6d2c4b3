"""Distributions of weights over a training: against NumPy and SciPy, and a partition that leaves nothing out."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

import karat_lite as kl
from karat_lite.analysis import weights
from karat_lite.analysis.weights import weight_histograms, weight_kinds, weight_statistics, weight_values

BODY = ["embedding", "positions", "queries", "keys", "values", "attention projection", "mlp", "head"]
FOURIER = ["a1", "a2", "a3", "b1", "b2", "b3"]
MODELS = {
    "softmax": (dict(attention="softmax"), []),
    "karat": (dict(rank=4), [*FOURIER, "W"]),
    "full rank": (dict(rank=None, grid=1), ["a1", "b1"]),
    "edge scales": (dict(rank=4, edge_scales=True), [*FOURIER, "W", "edge scales"]),
    "two operators": (dict(rank=4, order="phi_phi"), [*FOURIER, *(f"{kind} (Phi2)" for kind in FOURIER)]),
    "hybrid heads": (dict(attention="hybrid", softmax_heads=[0], rank=4), [*FOURIER, "W"]),
    "universal": (dict(mode="universal", rank=4), [*FOURIER, "W"]),
    "twelve harmonics": (dict(rank=4, grid=12), [*(f"{c}{m}" for c in "ab" for m in range(1, 13)), "W"]),
    "wavelet": (dict(basis="dog", rank=4), ["c1", "c2", "c3", "W"]),
    "static": (dict(attention="static"), ["mixing"]),
    "pooled": (dict(attention="pooled"), ["mixing"]),
    "one layer, one head": (dict(depth=1, num_heads=1, dim=16, rank=4), [*FOURIER, "W"]),
}


def path_of(options, snapshots=5):
    """A trajectory as training writes it, of random steps with heavier and heavier tails."""
    torch.manual_seed(0)
    model = kl.create_model("vit_pico", img_size=8, patch_size=2, **{"depth": 2, **options})
    found = {name: [value.detach().clone()] for name, value in model.named_parameters()}
    for t in range(1, snapshots):
        for steps in found.values():
            steps.append(steps[-1] + 0.01 * torch.randn_like(steps[-1]) ** (2 * t + 1))
    card = {"config": model.config, "steps": [100 * t for t in range(snapshots)]}
    return model, kl.Trajectory({name: torch.stack(steps).half().float() for name, steps in found.items()}, card)


@pytest.mark.parametrize("name", MODELS)
def test_every_number_is_of_exactly_one_kind(name):
    options, expected = MODELS[name]
    model, path = path_of(options)
    kinds = weight_kinds(path)
    assert list(kinds) == [*BODY, *expected, "norms", "biases"]
    found = np.concatenate([weight_values(path, kind) for kind in kinds], axis=1)
    whole = np.concatenate([values.reshape(len(path), -1).numpy() for values in path.weights.values()], axis=1)
    assert found.shape[1] == sum(p.numel() for p in model.parameters())
    assert np.array_equal(np.sort(found, axis=1), np.sort(whole, axis=1))
    layers = list(range(len(model.blocks)))
    assert kinds["queries"] == layers and kinds["head"] == []
    assert all(kinds[kind] == ([0] if name == "universal" else layers) for kind in expected)
    parts = [weight_values(path, "mlp", layer) for layer in layers]
    assert np.array_equal(np.concatenate(parts, axis=1), weight_values(path, "mlp"))


def test_what_blocks_share_belongs_to_the_first_that_has_it():
    shared = dict(attention="hybrid", mode="universal", rank=4, depth=3)
    for softmax, first in (([0], 1), ([1], 0), ([0, 1], 2)):
        kinds = weight_kinds(path_of({**shared, "softmax_layers": softmax})[1])
        assert kinds["W"] == kinds["a1"] == [first] and kinds["queries"] == [0, 1, 2]


def test_kinds_hold_what_they_say():
    model, path = path_of(dict(attention="static"))
    mix = model.blocks[1].attn.activation.mix.detach().half().flatten().double()
    assert np.array_equal(weight_values(path, "mixing", 1)[0], mix)
    model, path = path_of(dict(rank=4))
    first = model.blocks[1].attn
    third = lambda i: first.qkv.weight.detach().half()[64 * i : 64 * (i + 1)].flatten()  # noqa: E731
    for i, kind in enumerate(("queries", "keys", "values")):
        assert np.array_equal(weight_values(path, kind, 1)[0], third(i).double())
    coef = first.activation.coef.detach().half()
    for f, kind in enumerate(FOURIER):  # the package's order: cos 1..G, then sin 1..G
        assert np.array_equal(weight_values(path, kind, 1)[0], coef[..., f].flatten().double())
    assert np.array_equal(weight_values(path, "W", 1)[0], first.activation.weight.detach().half().flatten().double())
    assert np.array_equal(weight_values(path, "norms")[0], np.ones(5 * 64))
    assert weight_values(path, "biases").shape[1] == 64 * (1 + 1) + 10 + 2 * (192 + 64 + 256 + 64 + 2 * 64)
    assert weight_values(path, "positions").shape[1] == 18 * 64


@pytest.mark.parametrize("kind", ["queries", "b2", "W", "head"])
def test_statistics_are_numpy_s_and_scipy_s(kind):
    _, path = path_of(dict(rank=4))
    values = weight_values(path, kind)
    found = weight_statistics(values)
    assert found.count == values.shape[1] and found.quantiles.shape == (5, len(weights.QUANTILES))
    for t in (0, 2, 4):
        x = values[t]
        assert found.mean[t] == pytest.approx(np.mean(x)) and found.std[t] == pytest.approx(np.std(x))
        assert np.allclose(found.quantiles[t], [np.quantile(x, q) for q in weights.QUANTILES], rtol=1e-12)
        assert found.kurtosis[t] == pytest.approx(scipy.stats.kurtosis(x), rel=1e-9, abs=1e-12)
        z = np.abs(scipy.stats.zscore(x))
        assert found.beyond3[t] == np.mean(z > 3) and found.beyond4[t] == np.mean(z > 4)
        away = np.sqrt(np.sum((x - values[0]) ** 2) / np.sum(values[-1] ** 2))
        assert found.moved[t] == pytest.approx(away)
    assert found.kurtosis[4] > found.kurtosis[2] > found.kurtosis[0], "the tails of this path grow"


def test_tails_of_a_normal_distribution():
    found = weight_statistics(np.random.default_rng(0).normal(size=(2, 400_000)))
    assert np.allclose(found.kurtosis, 0, atol=0.03)
    for sigmas, got in ((3, found.beyond3), (4, found.beyond4)):
        assert weights.NORMAL_BEYOND[sigmas] == pytest.approx(2 * scipy.stats.norm.sf(sigmas), rel=1e-4)
        assert np.allclose(got, weights.NORMAL_BEYOND[sigmas], rtol=0.35)


def test_weights_that_are_all_equal_have_no_tails():
    found = weight_statistics(np.array([[0.1] * 7, [0.0] * 7, [1.0, 2, 3, 4, 5, 6, 7]]))
    assert np.isnan(found.kurtosis[:2]).all() and found.kurtosis[2] == pytest.approx(-1.25)
    assert found.beyond3.tolist() == found.beyond4.tolist() == [0, 0, 0]
    assert weight_statistics(np.zeros((2, 3))).moved.tolist() == [0, 0]


def test_histograms_share_edges_and_lose_nothing():
    _, path = path_of(dict(rank=4))
    values = weight_values(path, "a1")
    found = weight_histograms(values, bins=40, cover=0.99)
    assert found.edges.shape == (41,) and found.density.shape == (5, 40)
    for t in (0, 2, 4):
        counts, _ = np.histogram(values[t], bins=found.edges)
        assert np.allclose(found.density[t], counts / values.shape[1] / np.diff(found.edges))
        outside = np.mean((values[t] < found.edges[0]) | (values[t] > found.edges[-1]))
        assert found.outside[t] == pytest.approx(outside) and outside <= 0.01 + 2 / values.shape[1]
    assert np.allclose((found.density * np.diff(found.edges)).sum(axis=1) + found.outside, 1)
    everything = weight_histograms(values, cover=1)
    assert np.allclose(everything.outside, 0) and everything.edges[[0, -1]].tolist() == [values.min(), values.max()]
    assert weight_histograms(np.ones((2, 3))).edges[[0, -1]].tolist() == [0.5, 1.5]


def test_the_table_is_of_first_middle_and_last_snapshot():
    _, path = path_of(dict(rank=4))
    table = weights.tail_table(path)
    assert list(table) == list(weight_kinds(path))
    found = weight_statistics(weight_values(path, "b1"))
    for name in ("std", "kurtosis", "beyond4", "moved"):
        assert table["b1"][name] == pytest.approx(getattr(found, name)[[0, 2, 4]].tolist())
    assert table["norms"]["kurtosis"][0] is None and table["norms"]["kurtosis"][1] is not None


def with_nan():
    _, path = path_of(dict(rank=4))
    path.weights["blocks.1.attn.activation.coef"][3, 0, 0, 0, 5] = float("nan")
    return path


def one_snapshot():
    _, path = path_of({})
    first = {name: values[:1] for name, values in path.weights.items()}
    return dataclasses.replace(path, weights=first, card={**path.card, "steps": [0]})


BAD = {
    "a kind of others": (lambda: weight_values(path_of(dict(attention="softmax"))[1], "W"), "'W'.*'embedding', "),
    "a misspelt kind": (lambda: weight_values(path_of({})[1], "quries"), "did you mean 'queries'"),
    "a layer too many": (lambda: weight_values(path_of({})[1], "mlp", 2), "layer 2 is not there.*layers 0, 1"),
    "a layer of the head": (lambda: weight_values(path_of({})[1], "head", 0), "has no layers: leave `layer` out"),
    "one snapshot": (lambda: weight_values(one_snapshot(), "mlp"), "at least two snapshots.*has 1"),
    "NaN": (lambda: weight_values(with_nan(), "b3"), "'b3' are not finite from snapshot 3 on .step 300"),
    "one axis": (lambda: weight_statistics(np.zeros(3)), r"\(T, n\)"),
    "NaN in an array": (lambda: weight_histograms(np.full((2, 2), np.nan)), "4 of these weights are not finite"),
    "cover": (lambda: weight_histograms(np.zeros((2, 2)), cover=99), "cover must lie in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
    assert np.isfinite(weight_values(with_nan(), "b2")).all(), "only what is asked for must be finite"
