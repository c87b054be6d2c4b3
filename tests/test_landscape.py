"""Losses over planes of weights against plain loops, directions against numpy's SVD; what is given wrong is told."""

import numpy as np
import pytest
import torch
from small_models import KINDS, TINY, batch, flat, path, plain_loss, put, tiny

import karat_lite as kl
from karat_lite.analysis.directions import path_lengths, principal_directions, random_directions, weights_of
from karat_lite.analysis.hessian import hessian_spectrum, top_eigenvalues
from karat_lite.analysis.landscape import batch_loss, grid_around, loss_grid, loss_profile, path_losses, rise

# ---- directions ------------------------------------------------------------------------------------------------------


def test_principal_directions_against_numpys_svd():
    model = tiny()
    trajectory = path(model)
    found = principal_directions(trajectory, 3)
    x = np.stack([flat({k: v[t] - v[-1] for k, v in trajectory.weights.items()}) for t in range(6)])
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    assert np.allclose(found.explained, (s**2 / (s**2).sum())[:5], atol=1e-6)
    assert found.explained.sum() == pytest.approx(1)
    mine = np.stack([flat({k: v[i] for k, v in found.along.items()}) for i in range(3)])
    assert np.allclose(mine @ mine.T, np.eye(3), atol=1e-5)
    assert np.allclose(np.abs((mine * vt[:3]).sum(axis=1)), 1, atol=1e-5)
    at = found.coordinates(trajectory)
    assert np.allclose(at, x @ mine.T, atol=1e-4) and np.allclose(at[-1], 0, atol=1e-5)
    assert (at[np.abs(at).argmax(axis=0), range(3)] > 0).all(), "the farthest snapshot lies on the + side"


def test_coordinates_in_directions_that_are_not_orthogonal():
    model = tiny()
    trajectory, directions = path(model), random_directions(model, 2, seed=3)
    x = np.stack([flat({k: v[t] - v[-1] for k, v in trajectory.weights.items()}) for t in range(6)])
    d = np.stack([flat({k: v[i] for k, v in directions.along.items()}) for i in range(2)])
    truth = np.linalg.lstsq(d.T, x.T, rcond=None)[0].T
    assert np.allclose(directions.coordinates(trajectory), truth, atol=1e-5)


def test_random_directions_have_every_filters_norm():
    model = tiny("phi_w")
    directions, at = random_directions(model, 3, seed=5), weights_of(model)
    coef, weight = (f"blocks.0.attn.activation.{name}" for name in ("coef", "weight"))
    for i in range(3):
        d = {name: x[i] for name, x in directions.along.items()}
        for name, axes in {coef: (2, 3), weight: 2, "head.weight": 1, "patch_embed.proj.weight": (1, 2, 3),
                           "pos_embed": 2, "blocks.0.attn.activation.w_s": 2}.items():  # fmt: skip
            assert torch.allclose(torch.linalg.vector_norm(d[name], dim=axes),
                                  torch.linalg.vector_norm(at[name], dim=axes), rtol=1e-4), name  # fmt: skip
        assert not d["head.bias"].any() and not d["norm.weight"].any()
    first, second = directions.along["head.weight"][:2]
    assert (first - second).abs().max() > 0.1, "every direction is drawn anew"


def test_twins_get_the_same_direction_where_they_have_the_same_tensor():
    torch.manual_seed(0)
    softmax = kl.create_model("vit_pico", **{**TINY, "attention": "softmax"})
    torch.manual_seed(0)
    karat = kl.create_model("vit_pico", **{**TINY, "attention": "karat"})
    one, other = (random_directions(model, 1, seed=7).along for model in (softmax, karat))
    assert set(other) > set(one) and all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["pos_embed"], random_directions(softmax, 1, seed=8).along["pos_embed"])


def test_path_lengths():
    trajectory = path(tiny())
    x = np.stack([flat({k: v[t] for k, v in trajectory.weights.items()}) for t in range(6)])
    found = path_lengths(trajectory)
    assert np.allclose(found.steps, np.linalg.norm(np.diff(x, axis=0), axis=1), rtol=1e-5)
    assert np.allclose(found.to_end, np.linalg.norm(x - x[-1], axis=1), rtol=1e-5, atol=1e-6)
    assert np.allclose(found.norms, np.linalg.norm(x, axis=1), rtol=1e-5)


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_is_the_loss_of_the_moved_model(kind):
    model, (images, labels) = tiny(kind), batch()
    before = weights_of(model)
    directions = random_directions(model)
    grid = loss_grid(model, directions, images, labels, [-0.5, 0, 0.25], [0, 1], smoothing=0.1, chunk=3, progress=False)
    assert grid.loss.shape == (2, 3) and np.ptp(grid.loss) > 1e-3
    assert grid.loss[0, 1] == pytest.approx(plain_loss(model, images, labels, 0.1), abs=1e-6)
    twin = kl.create_model(**model.config).eval()
    for i, beta in enumerate((0, 1)):
        for j, alpha in enumerate((-0.5, 0, 0.25)):
            d = directions.along
            put(twin, {name: x + alpha * d[name][0] + beta * d[name][1] for name, x in before.items()})
            assert grid.loss[i, j] == pytest.approx(plain_loss(twin, images, labels, 0.1), abs=1e-6)
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters()), "the model stays as it is"


def test_the_surface_at_a_snapshots_coordinates_is_the_loss_of_the_projected_snapshot():
    model, (images, labels) = tiny(), batch()
    trajectory = path(model)
    directions = principal_directions(trajectory, 2)
    x = np.stack([flat({k: v[t] - v[-1] for k, v in trajectory.weights.items()}) for t in range(6)])
    basis = np.linalg.svd(x, full_matrices=False)[2][:2]
    found = path_losses(model, directions, trajectory, images, labels)
    for t in range(6):
        at, (alpha, beta) = x[t] @ basis.T @ basis, found.coordinates[t]
        sizes = [v.numel() for v in weights_of(model).values()]
        pieces = torch.tensor(at).float().split(sizes)
        moved = {k: v + p.view_as(v) for (k, v), p in zip(weights_of(model).items(), pieces, strict=True)}
        truth = plain_loss(put(kl.create_model(**model.config).eval(), moved), images, labels)
        assert found.projected[t] == pytest.approx(truth, abs=1e-5)
        on_grid = loss_grid(model, directions, images, labels, [alpha], [beta], progress=False)
        assert on_grid.loss.item() == pytest.approx(truth, abs=1e-5)
        assert found.own[t] == pytest.approx(plain_loss(trajectory.model(t), images, labels), abs=1e-6)
    assert found.own[-1] == pytest.approx(found.projected[-1], abs=1e-6)
    assert abs(found.own[0] - found.projected[0]) > 1e-4, "the plane does not hold the path"


def test_profiles_and_rises():
    model, (images, labels) = tiny("universal"), batch()
    directions = random_directions(model, 3, seed=4)
    lines = loss_profile(model, directions, images, labels, [-0.3, 0, 0.3])
    assert lines.shape == (3, 3) and np.allclose(lines[:, 1], plain_loss(model, images, labels), atol=1e-6)
    grid = loss_grid(model, directions, images, labels, [0.3], [0], progress=False)
    assert lines[0, 2] == pytest.approx(grid.loss.item(), abs=1e-6)
    found = rise(model, images, labels, 0.3, 3, seed=4)
    assert np.allclose(found.each, lines[:, [0, 2]] - lines[:, [1]], atol=1e-6)
    assert found.mean == pytest.approx(found.each.mean()) and found.radius == 0.3


def test_looking_at_a_snapshot_draws_no_random_number():
    trajectory, state = path(tiny()), torch.random.get_rng_state()
    trajectory.model(2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_grid_around_a_path_holds_path_and_origin():
    alphas, betas = grid_around([[4.0, 1.0, 9.0], [2.0, -1.0, 0.0]], points=5, margin=0.25)
    assert len(alphas) == len(betas) == 5
    assert (alphas[0], alphas[-1], betas[0], betas[-1]) == (-1, 5, -3, 3)
    assert grid_around([[0, 0]])[0][-1] > 0, "a path that stands still"


# ---- resuming --------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_an_unfinished_grid_goes_on(tmp_path, monkeypatch):
    model, (images, labels) = tiny(), batch()
    axes = [-1, 0, 1], [0, 0.5]
    args = (model, random_directions(model), images, labels, *axes)
    whole = loss_grid(*args, progress=False)
    from karat_lite.analysis import landscape

    real, calls = landscape._loss, []

    def stops(*given):
        if len(calls) == 4:
            raise Interrupted
        calls.append(1)
        return real(*given)

    file = tmp_path / "new" / "grid.safetensors"
    monkeypatch.setattr(landscape, "_loss", stops)
    with pytest.raises(Interrupted):
        loss_grid(*args, file=file, progress=False)
    assert file.is_file() and [f.name for f in file.parent.iterdir()] == [file.name]
    calls.clear()
    found = loss_grid(*args, file=file, progress=False)
    assert len(calls) == 2, "four of six points were there"
    assert np.array_equal(found.loss, whole.loss)
    calls.clear()
    assert np.array_equal(loss_grid(*args, file=file, progress=False).loss, whole.loss) and not calls

    others = {
        "weights": (0, tiny(seed=9)), "directions": (1, random_directions(model, seed=2)), "images": (2, -images),
        "labels": (3, labels.flip(0)), "grid": (4, [-1, 0, 2]),
    }  # fmt: skip
    for part, (place, other) in others.items():
        given = list(args)
        given[place] = other
        if part == "weights":
            given[1] = random_directions(other)
        with pytest.raises(ValueError, match=f"another .*{part}"):
            loss_grid(*given, file=file, progress=False)
    with pytest.raises(ValueError, match="another smoothing"):
        loss_grid(*args, file=file, smoothing=0.1, progress=False)
    file.write_bytes(b"no grid")
    with pytest.raises(ValueError, match="damaged or holds no grid"):
        loss_grid(*args, file=file, progress=False)


# ---- large models, bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["softmax", "karat"])
def test_vit_tiny_at_224(attention):
    torch.manual_seed(0)
    model = kl.create_model("vit_tiny", attention=attention)
    images, labels = batch(1, 224, 10)
    grid = loss_grid(model, random_directions(model), images, labels, [0], [0], progress=False)
    assert grid.loss.item() == pytest.approx(plain_loss(model.eval(), images, labels), abs=1e-6)
    found = hessian_spectrum(model, images, labels, 1, iterations=1, progress=False)
    assert found.values.shape == (1,) and not found.converged


def broken(model, name="head.weight"):
    dict(model.named_parameters())[name].data[0] = float("nan")
    return model


def bad_path(change):
    trajectory = path(tiny())
    change(trajectory.weights)
    return trajectory


IMAGES, LABELS = batch()
RANDOM = random_directions(tiny())
BAD = {
    "one snapshot": (lambda: principal_directions(path(tiny(), 1)), "1 snapshot has no directions.*random_directions"),
    "two snapshots": (lambda: principal_directions(path(tiny(), 2)), "2 snapshots span 1 direction, asked for 2"),
    "no training": (lambda: principal_directions(path(tiny(), 3, scale=0)), "span 0 directions"),
    "NaN in a path": (
        lambda: principal_directions(bad_path(lambda w: w["head.bias"].fill_(torch.nan))), "1 of .* first head.bias"),
    "NaN weights": (lambda: random_directions(broken(tiny())), "NaN or infinity, first head.weight"),
    "NaN model": (lambda: batch_loss(broken(tiny()), IMAGES, LABELS), "NaN or infinity"),
    "NaN Hessian": (lambda: hessian_spectrum(broken(tiny()), IMAGES, LABELS), "NaN or infinity"),
    "another model": (
        lambda: loss_grid(tiny("softmax"), RANDOM, IMAGES, LABELS, [0], [0]), "different models.*activation"),
    "another shape": (
        lambda: loss_grid(tiny(rank=3), RANDOM, IMAGES, LABELS, [0], [0]), "different models.*shape"),
    "another path": (lambda: RANDOM.coordinates(path(tiny("softmax"))), "different models"),
    "other weights": (lambda: batch_loss(tiny(), IMAGES, LABELS, weights_of(tiny("softmax"))), "different models"),
    "one direction": (
        lambda: loss_grid(tiny(), random_directions(tiny(), 1), IMAGES, LABELS, [0], [0]), "two directions, got 1"),
    "three coordinates": (lambda: RANDOM.weights(1, 2, 3), "1 to 2 coordinates.*got 3"),
    "another size": (lambda: batch_loss(tiny(), *batch(size=8)), r"images of shape \(B, 3, 4, 4\)"),
    "another range": (lambda: batch_loss(tiny(), 255 * IMAGES.abs(), LABELS), "reach 2.*normalise"),
    "labels of others": (lambda: batch_loss(tiny(), *batch(classes=5)), "0 to 2.*from 0 to 4"),
    "floats as labels": (lambda: batch_loss(tiny(), IMAGES, LABELS.float()), "whole numbers"),
    "too few labels": (lambda: batch_loss(tiny(), IMAGES, LABELS[:3]), "a label for each"),
    "no images": (lambda: batch_loss(tiny(), IMAGES[:0], LABELS[:0]), "at least one image"),
    "no grid": (lambda: loss_grid(tiny(), RANDOM, IMAGES, LABELS, [[0]], [0]), "alphas must be a line"),
    "no radius": (lambda: rise(tiny(), IMAGES, LABELS, -1), "radius must be positive"),
    "too many eigenvalues": (lambda: top_eigenvalues(lambda v: v, 3, 4), "asked for 4 eigenvalues of 3"),
    "an overflow": (lambda: top_eigenvalues(lambda v: v / 0, 3, 1, progress=False), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name):
    call, said = BAD[name]
    with pytest.raises(ValueError, match=said):
        call()
