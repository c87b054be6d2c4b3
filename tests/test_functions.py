"""Learned functions on grids, where scores fall, how alike functions are and how they move: against plain NumPy."""

import math

import numpy as np
import pytest
import torch

import karat_lite as kl
from karat_lite.analysis import functions as fn
from karat_lite.trajectory import Trajectory

X = torch.linspace(-4, 4, 33)


def made(attention="karat", **options):
    torch.manual_seed(0)
    return kl.create_model("vit_pico", attention, img_size=8, patch_size=2, **{"depth": 2, "rank": 3, **options}).eval()


def images(n=5):
    return kl.load_dataset("digits", "test", limit=n)[:][0]


KINDS = {
    "fourier": {},
    "scales and base": dict(basis="bspline", edge_scales=True),
    "edge basis": dict(basis="morlet"),
    "edge basis with base": dict(basis="dog", base="silu"),
    "full rank": dict(rank=None),
    "W first": dict(order="phi_w"),
    "two operators": dict(order="phi_phi"),
    "one head, one layer": dict(num_heads=1, depth=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_curves_are_the_operators_own(kind):
    """Against `KArAtOperator.curve`, one function at a time; the constants are values at 0."""
    for place in fn.places(made(**KINDS[kind])):
        operator = place.operator
        for stage in ("", "2") if operator.order == "phi_phi" else ("",):
            found, at_0 = fn.curves(operator, X, stage), fn.constants(operator, stage)
            h, units, inputs, n = found.shape
            assert (h, n) == (operator.num_heads, 33) and at_0.shape == (h, units, inputs)
            for j, p, q in [(0, 0, 0), (h - 1, units - 1, inputs - 1), (0, units // 2, inputs // 3)]:
                truth = operator.curve(X, j, p, q, stage).numpy()
                assert np.allclose(found[j, p, q], truth, atol=1e-5)
                assert at_0[j, p, q] == pytest.approx(truth[16], abs=1e-5), "X[16] is 0"
            assert np.array_equal(fn.curves(operator, X, stage, head=h - 1), found[h - 1])


def test_fourier_curves_against_the_formula():
    operator = kl.KArAtOperator(2, 3, grid=2, rank=2).double()
    a, b = operator.coef.detach().numpy()[..., :2], operator.coef.detach().numpy()[..., 2:]
    x = np.array([0.3, -1.2])
    truth = sum(a[..., [m - 1]] * np.cos(m * x) + b[..., [m - 1]] * np.sin(m * x) for m in (1, 2))
    assert np.allclose(fn.curves(operator, x), truth, atol=1e-12)
    assert np.allclose(fn.constants(operator), a.sum(-1), atol=1e-12)


def test_places_name_the_models_own_heads():
    hybrid = made("hybrid", softmax_heads=[1], softmax_layers=[0], depth=3)
    assert [(place.layer, place.heads) for place in fn.places(hybrid)] == [(1, [0, 2, 3]), (2, [0, 2, 3])]
    assert all(place.operator.num_heads == 3 for place in fn.places(hybrid))
    universal = fn.places(made(mode="universal"))
    assert universal[0].operator is universal[1].operator and [place.layer for place in universal] == [0, 1]


@pytest.mark.parametrize("bins", [1, 1366, 2049, fn.BINS])
def test_quantiles_are_as_fine_as_it_says(bins):
    model = made(depth=1)
    found = fn.scores_seen(model, images(), bins=bins)
    with torch.no_grad():
        scores = model(images(), return_attention=True)[1][0].scores.transpose(0, 1).flatten(1).double().numpy()
    truth = np.quantile(scores, (0.005, 0.995), axis=1, method="inverted_cdf")
    assert found.shares.shape == (1, 4, bins) and np.allclose(found.shares.sum(-1), 1)
    assert np.abs(np.stack([found.low[0], found.high[0]]) - truth).max() <= (scores.max() - scores.min()) / 2048


@pytest.mark.parametrize("attention", ["softmax", "karat", "hybrid"])
def test_scores_seen_against_numpy(attention):
    model = made(attention, **({"softmax_heads": [0]} if attention == "hybrid" else {}))
    found = fn.scores_seen(model, images(), bins=40, batch_size=2)
    with torch.no_grad():
        _, records = model(images(), return_attention=True)
    everything = torch.cat([record.scores.flatten() for record in records])
    assert found.edges[[0, -1]] == pytest.approx([everything.min().item(), everything.max().item()])
    assert found.shares.shape == (2, 4, 40) and np.allclose(found.shares.sum(-1), 1)
    for layer, record in enumerate(records):
        for head in range(4):
            scores = record.scores[:, head].double().numpy().ravel()
            counts, _ = np.histogram(scores, bins=found.edges)
            assert np.abs(found.shares[layer, head] - counts / scores.size).max() <= 2 / scores.size, "one at an edge"
            below, above = (scores < found.low[layer, head]).mean(), (scores > found.high[layer, head]).mean()
            assert below == pytest.approx(0.005, abs=0.002) and above == pytest.approx(0.005, abs=0.002)
            assert found.mean[layer, head] == pytest.approx(scores.mean(), abs=1e-6)
            assert found.std[layer, head] == pytest.approx(scores.std(), rel=1e-5)


def test_units_behind_w_are_asked_what_w_has_mixed():
    model = made("hybrid", softmax_heads=[1], order="phi_w", depth=1)
    found = fn.scores_seen(model, images())
    with torch.no_grad():
        scores = model(images(), return_attention=True)[1][0].scores.double()
    weight = model.blocks[0].attn.activation.operator.weight.detach().double()
    assert found.std[0, 1] == pytest.approx(scores[:, 1].std(correction=0).item(), rel=1e-5), "softmax sees scores"
    for head, own in ((0, 0), (2, 1), (3, 2)):
        mixed = torch.einsum("bkq,pq->bkp", scores[:, head], weight[own])
        assert found.std[0, head] == pytest.approx(mixed.std(correction=0).item(), rel=1e-5)


def test_weights_of_a_grid_are_its_share_of_scores():
    shares = np.zeros((1, 1, 4))
    shares[0, 0] = [0.1, 0.2, 0.3, 0.4]
    flat = np.zeros((1, 1))
    scores = fn.Scores(np.array([0.0, 1, 2, 3, 4]), shares, flat, flat, flat, flat)
    x = [0.4, 1.7, 3.4]  # the middles between them: 1.05 and 2.55
    assert np.allclose(scores.weights(x, 0, 0), [0.1 + 0.05 * 0.2, 0.95 * 0.2 + 0.55 * 0.3, 0.45 * 0.3 + 0.4])
    grid = np.linspace(-20, 20, 4001)
    found = fn.scores_seen(made(), images())
    weights = found.weights(grid, 1, 2)
    assert weights.sum() == pytest.approx(1) and weights @ grid == pytest.approx(found.mean[1, 2], abs=0.01)


def test_scores_that_are_all_alike():
    model = made("softmax", depth=1)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
    found = fn.scores_seen(model, images())
    assert found.shares[0, 0, 0] == 1 and (found.mean == 0).all() and (found.std == 0).all()


def test_powers_by_degree_in_cases_worked_out_by_hand():
    x = np.array([1.0, 2.0, 3.0])
    functions = [[2, 2, 2], [1, 2, 3], [1, -2, 1], [0, 0, 0]]
    truth = [[4, 0, 0, 0], [4, 2 / 3, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    assert np.allclose(fn.powers_by_degree(functions, x), truth)
    assert np.allclose(fn.powers_by_degree(functions, x, degree=0), [[4, 0], [4, 2 / 3], [0, 2], [0, 0]])
    assert np.allclose(fn.powers_by_degree([1.0, 5.0, 3.0], x, [1, 0, 1]), [4, 1, 0, 0]), "never asked at 2"
    assert np.allclose(fn.powers_by_degree([1.0, 3.0], [0.0, 1.0]), [4, 1, 0, 0]), "two points have no parabola"
    assert np.allclose(fn.powers_by_degree([3.0], [1.0]), [9, 0, 0, 0])
    grid, weights = np.linspace(-0.5, 3, 50), np.random.default_rng(0).random(50)
    many = np.random.default_rng(1).standard_normal((2, 3, 50))
    found = fn.powers_by_degree(many, grid, weights)
    assert np.allclose(found.sum(-1), (many**2 * weights).sum(-1) / weights.sum())
    line = np.polyfit(grid, many[1, 2], 1, w=np.sqrt(weights))
    left = ((many[1, 2] - np.polyval(line, grid)) ** 2 * weights).sum() / weights.sum()
    assert found[1, 2, 2:].sum() == pytest.approx(left)


@pytest.mark.parametrize("kind", ["fourier", "full rank", "W first", "two operators", "one head, one layer"])
def test_learned_collects_every_head_on_its_own_range(kind):
    model = made(**KINDS[kind])
    found, scores = fn.learned(model, images(), points=11), fn.scores_seen(model, images(), bins=fn.BINS)
    assert found.layers == list(range(len(model.blocks))) and found.heads == list(range(len(found.x[0])))
    assert np.allclose(found.x[..., 0], scores.low) and np.allclose(found.x[..., -1], scores.high)
    assert np.allclose(found.weights.sum(-1), 1)
    for layer, j in ((0, 0), (-1, -1)):
        operator = fn.places(model)[layer].operator
        assert np.array_equal(found.functions[layer, j], fn.curves(operator, found.x[layer, j])[j])


def test_learned_of_a_hybrid_takes_its_own_heads_scores():
    model = made("hybrid", softmax_heads=[0, 1], softmax_layers=[0])
    found, scores = fn.learned(model, images()), fn.scores_seen(model, images(), bins=fn.BINS)
    assert (found.layers, found.heads) == ([1], [2, 3])
    assert np.allclose(found.x[0, 0, 0], scores.low[1, 2])


def test_a_unit_against_its_parameters():
    operator = made().blocks[1].attn.activation
    weights = np.arange(33.0)
    found = fn.unit(operator, X, weights, head=2, p=1)
    functions = np.stack([operator.curve(X, 2, 1, q).numpy() for q in range(17)])
    assert np.allclose(found.curves, functions, atol=1e-5)
    share = weights / weights.sum()
    mean = (functions * share).sum(-1)
    assert list(found.maps) == ["adds at any score", "follows the score", "writes to"]
    assert np.allclose(found.maps["adds at any score"], mean, atol=1e-5)
    assert np.allclose(found.maps["follows the score"] ** 2, (functions**2 * share).sum(-1) - mean**2, atol=1e-5)
    assert np.array_equal(found.maps["writes to"], operator.weight[2, :, 1].detach())
    full, first = (made(**KINDS[kind]).blocks[0].attn.activation for kind in ("full rank", "W first"))
    assert list(fn.unit(full, X, None, 0, 16).maps) == ["adds at any score", "follows the score"]
    assert fn.unit(first, X, None, 0, 16).maps == {} and fn.unit(first, X, None, 0, 16).curves.shape == (3, 33)
    with pytest.raises(ValueError, match="unit 3 is not there.*0 to 2"):
        fn.unit(operator, X, None, 0, 3)


def test_power_shares_find_the_level_at_which_functions_differ():
    """A sum of one term for each level, each with its power; products of +-1 are orthogonal."""
    L, h, r, N, n = 2, 4, 2, 6, 8
    sign = lambda size, *shape: np.where(np.arange(size) % 2, 1.0, -1.0).reshape(shape)  # noqa: E731
    common = np.linspace(1, 2, n)
    parts = [1.0, 2 * sign(L, L, 1, 1, 1, 1), 3 * sign(h, 1, h, 1, 1, 1), 4 * sign(r, r, 1, 1), 5 * sign(N, N, 1)]
    functions = sum(part * common for part in parts) + np.zeros((L, h, r, N, n))
    found = fn.power_shares(functions)
    assert list(found) == list(fn.POWERS)
    assert np.allclose(list(found.values()), np.array([1, 4, 9, 16, 25]) / 55)
    noise = np.random.default_rng(0).standard_normal((L, h, r, N, n))
    weights = np.arange(n) / 28
    assert sum(fn.power_shares(noise, weights).values()) == pytest.approx(1)
    assert fn.power_shares(noise, weights) == pytest.approx(fn.power_shares(noise, 3 * weights))
    mean = (noise.mean(axis=(0, 1, 2, 3)) ** 2 @ weights) / (noise**2 @ weights).mean()
    assert fn.power_shares(noise, weights)["all alike"] == pytest.approx(mean)


def test_principal_shapes_against_an_svd():
    operator = made().blocks[0].attn.activation
    functions = fn.curves(operator, X).astype(float)
    found = fn.principal_shapes(functions, count=6)
    rows = functions.reshape(-1, 33)
    _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    assert np.allclose(found.shares, values[:6] ** 2 / (rows**2).sum(), atol=1e-8)
    assert found.shares.sum() == pytest.approx(1, abs=1e-6), "six maps, six shapes"
    shapes = found.shapes / math.sqrt(33)  # even weights 1/33
    assert np.allclose(shapes @ shapes.T, np.eye(6), atol=1e-8) and (found.shapes.mean(-1) >= -1e-9).all()
    assert np.allclose(np.abs((shapes * vectors[:6]).sum(-1)), 1, atol=1e-6)
    assert np.allclose(found.parts @ found.shapes, functions, atol=1e-5)
    weights = np.arange(33) % 3  # every third point is never asked
    heavy = fn.principal_shapes(functions, weights, count=2)
    assert np.allclose((heavy.shapes * weights / weights.sum()) @ heavy.shapes.T, np.eye(2), atol=1e-6)
    assert (heavy.shapes[:, weights == 0] == 0).all() and np.isfinite(heavy.shapes).all()


# ---- through training -----------------------------------------------------------------------------------------------


def trajectory(T=3, **options):
    """T snapshots: the parameters of a model times 1, 2, 3, ..."""
    model = made(**options)
    weights = {name: torch.stack([(t + 1.0) * p.detach() for t in range(T)]) for name, p in model.named_parameters()}
    return Trajectory(weights, {"config": model.config, "steps": list(range(0, 10 * T, 10))})


@pytest.mark.parametrize("kind", ["fourier", "full rank", "two operators", "W first"])
def test_motion_of_a_training_that_is_known(kind):
    """Functions are linear in coefficients: twice the weights, distance 1; three times, 2, and half of that again."""
    found = fn.motion(trajectory(**KINDS[kind]), X, keep=[0, -1])
    parts = {"full rank": ["functions"], "two operators": ["functions", "functions of Phi2"]}
    assert list(found.distance) == list(found.change) == parts.get(kind, ["functions", "W"])
    assert found.steps.tolist() == [0, 10, 20]
    for part in found.distance:
        assert np.allclose(found.distance[part], [[0, 0], [1, 1], [2, 2]], atol=1e-5)
        assert np.allclose(found.change[part], [[1, 1], [0.5, 0.5]], atol=1e-5)
    model = trajectory(**KINDS[kind]).model(2)
    assert np.array_equal(found.functions[1], np.stack([fn.curves(place.operator, X) for place in fn.places(model)]))
    assert np.allclose(found.functions[1], 3 * found.functions[0], atol=1e-5)


def test_motion_tells_layers_apart():
    path = trajectory()
    path.weights["blocks.1.attn.activation.coef"][:] = path.weights["blocks.1.attn.activation.coef"][:1]
    found = fn.motion(path, X)
    assert (found.distance["functions"][:, 1] == 0).all() and (found.distance["functions"][1:, 0] > 0.9).all()
    assert found.functions.shape == (0, 2, 4, 3, 17, 33)


# ---- any model, bad input -------------------------------------------------------------------------------------------


def test_a_tiny_model_at_224_pixels():
    torch.manual_seed(0)
    model = kl.create_model("vit_tiny")
    everything = np.stack([fn.curves(place.operator, X) for place in fn.places(model)])
    assert everything.shape == (12, 3, 12, 197, 33)
    assert fn.scores_seen(model, torch.rand(1, 3, 224, 224) * 2 - 1).shares.shape == (12, 3, 120)
    assert sum(fn.power_shares(everything).values()) == pytest.approx(1)


def broken():
    model = made()
    with torch.no_grad():
        model.blocks[0].attn.activation.coef[0, 0, 0, 0] = float("nan")
    return model


OPERATOR = kl.KArAtOperator(2, 5, rank=3)
BAD = {
    "softmax": (lambda: fn.places(made("softmax")), "attention 'softmax' has no learned functions"),
    "static": (lambda: fn.places(made("static")), "attention 'static' has no learned functions"),
    "softmax in training": (lambda: fn.motion(trajectory(attention="softmax"), X), "has no learned functions"),
    "x": (lambda: fn.curves(OPERATOR, torch.zeros(2, 2)), r"row of finite scores.*\(2, 2\)"),
    "x not finite": (lambda: fn.curves(OPERATOR, [0.0, math.inf]), "row of finite scores"),
    "head": (lambda: fn.curves(OPERATOR, X, head=2), "heads 0 to 1"),
    "stage": (lambda: fn.curves(OPERATOR, X, "2"), "order 'phi_phi' alone"),
    "weights": (lambda: fn.curves(broken().blocks[0].attn.activation, X), "functions are not finite"),
    "weights, scores": (lambda: fn.scores_seen(broken(), images()), "coef are no longer finite"),
    "another size": (lambda: fn.scores_seen(made(), torch.zeros(2, 3, 9, 9)), r"\(B, 3, 8, 8\), got \(2, 3, 9, 9\)"),
    "another range": (lambda: fn.scores_seen(made(), images() * 9), r"\[-1, 1\]"),
    "no images": (lambda: fn.scores_seen(made(), images()[:0]), "at least 1 image, got 0"),
    "no bins": (lambda: fn.scores_seen(made(), images(), bins=0), "bins must be >= 1, got 0"),
    "many bins": (lambda: fn.scores_seen(made(), images(), bins=5000), "bins must be at most 4096, got 5000"),
    "one snapshot": (lambda: fn.motion(trajectory(1), X), "at least 2 snapshots, got 1"),
    "snapshot": (lambda: fn.motion(trajectory(), X, keep=[3]), "snapshot 3 is not there.*0 to 2"),
    "axes": (lambda: fn.power_shares(np.zeros((2, 3))), r"functions \(L, h, r, N, n\).*\(2, 3\)"),
    "grid weights": (lambda: fn.powers_by_degree(np.zeros((2, 3)), [0, 1, 2], [1, 2]), "3 numbers >= 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_points_of_a_histogram_rise():
    with pytest.raises(ValueError, match="points must rise"):
        fn.scores_seen(made(), images()).weights([3.0, 1.0, 2.0], 0, 0)
