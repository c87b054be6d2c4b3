"""The shapes dataset: what is promised about its pictures, labels and masks."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from karat_lite import shapes
from karat_lite.shapes import OUTLINES, SHAPE_CLASSES, draw_shapes


@pytest.fixture(scope="module")
def drawn():
    return draw_shapes(3_000, 32, seed=0)


def test_types_and_sizes(drawn):
    images, labels, masks = drawn
    assert images.dtype == torch.uint8 and images.shape == (3_000, 3, 32, 32)
    assert labels.dtype == torch.int64 and labels.shape == (3_000,)
    assert masks.dtype == torch.bool and masks.shape == (3_000, 32, 32)
    assert len(SHAPE_CLASSES) == len(set(SHAPE_CLASSES)) >= 8
    counts = labels.bincount(minlength=len(SHAPE_CLASSES))
    assert len(counts) == len(SHAPE_CLASSES) and counts.min() > 0.8 * counts.float().mean()


def test_the_same_bytes_on_every_machine():
    """A fingerprint of pictures, labels and masks. Whoever changes the drawing retrains what was trained on it."""
    digest = hashlib.sha256()
    for part in draw_shapes(200, 50, seed=0):
        digest.update(part.numpy().tobytes())
    assert digest.hexdigest()[:16] == "24f375b40a55e1d7"


def test_seeds_and_prefixes(drawn, monkeypatch):
    for part, whole in zip(draw_shapes(70, 32, seed=0), drawn, strict=True):
        assert torch.equal(part, whole[:70])
    assert not torch.equal(draw_shapes(70, 32, seed=1)[0], drawn[0][:70])
    monkeypatch.setattr(shapes, "PIXELS_AT_ONCE", 1)  # one picture at a time
    assert torch.equal(draw_shapes(70, 32, seed=0)[0], drawn[0][:70])


def test_one_scene_at_every_resolution(drawn):
    """Drawn at 96 pixels and averaged over 3 x 3, a scene is the one drawn at 32, but for what lies within a pixel."""
    images, labels, masks = draw_shapes(100, 96, seed=0)
    assert torch.equal(labels, drawn[1][:100])
    shrunk = torch.nn.functional.avg_pool2d(images.float(), 3)
    assert (shrunk - drawn[0][:100]).abs().mean() < 2
    assert torch.equal(masks[:, 1::3, 1::3], drawn[2][:100])  # the pixel centres coincide


def test_masks_are_the_objects(drawn):
    images, labels, masks = drawn
    area = masks.float().mean(dim=(1, 2))
    assert 0.08 <= area.min() and area.max() <= 0.35
    # Every paper is lighter than every ground, so the object shows in lightness, even above its surroundings' clutter.
    light = images.float().mean(dim=1)
    inside = (light * masks).sum(dim=(1, 2)) / masks.sum(dim=(1, 2))
    outside = (light * ~masks).sum(dim=(1, 2)) / (~masks).sum(dim=(1, 2))
    assert (inside - outside).min() > 40
    # Nothing lies over the object: a pixel from its edge its paper has one colour, but for a faint grain.
    border = torch.nn.functional.pad((~masks).float()[:, None], (1, 1, 1, 1), value=1.0)
    core = torch.nn.functional.max_pool2d(border, 3, stride=1)[:, 0] == 0
    red = images[:, 0].float()
    high = red.masked_fill(~core, 0).amax(dim=(1, 2))
    low = red.masked_fill(~core, 255).amin(dim=(1, 2))
    assert (low / high).min() > 0.85


def test_only_the_outline_tells_the_classes_apart(drawn):
    images, labels, masks = drawn
    classes = len(SHAPE_CLASSES)
    area = masks.float().mean(dim=(1, 2))
    means = torch.stack([area[labels == c].mean() for c in range(classes)])
    assert (means / means.mean() - 1).abs().max() < 0.05  # also: the areas stated in OUTLINES are right
    colour = images.float().mean(dim=(2, 3)).numpy() / 255
    model = LogisticRegression(max_iter=100).fit(colour[:2000], labels[:2000])
    assert model.score(colour[2000:], labels[2000:]) < 1 / classes + 0.05


def test_a_linear_model_stays_far_below_half(drawn):
    """Pixels halved to 16 x 16, where a linear model does best: full size only gives it more to memorise."""
    small = torch.nn.functional.avg_pool2d(drawn[0].float() / 127.5 - 1, 2).flatten(1).numpy()
    labels = drawn[1]
    model = LogisticRegression(C=0.003, max_iter=60, tol=1e-2).fit(small[:2000], labels[:2000])
    assert 0.15 < model.score(small[2000:], labels[2000:]) < 0.40


def test_objects_are_spread_over_the_picture(drawn):
    masks = drawn[2]
    at_centre = masks[:, 16, 16].float().mean()
    assert at_centre < 0.65  # what always pointing at the centre would score
    grid = (torch.arange(32) + 0.5) / 32
    weight = masks.float() / masks.sum(dim=(1, 2), keepdim=True)
    for axis in (1, 2):
        centre = (weight.sum(dim=3 - axis) * grid).sum(dim=1)
        assert centre.min() < 0.25 and centre.max() > 0.75 and centre.std() > 0.1


@pytest.mark.parametrize("name", SHAPE_CLASSES)
def test_outlines(name):
    """Area and radius as stated; a distance: no slope above 1, and a slope of 1 just outside the boundary."""
    outline = OUTLINES[name]
    grid = np.linspace(-2, 2, 401, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    distance = outline.distance(x, y)
    assert (distance < 0).mean() * 16 == pytest.approx(outline.area, rel=0.015)
    assert np.hypot(x, y)[distance < 0].max() == pytest.approx(outline.radius, abs=0.03)
    steps = np.gradient(distance, 0.01)
    assert np.abs(steps).max() < 1.001
    assert np.median(np.hypot(*steps)[(distance > 0.02) & (distance < 0.1)]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"n": 0}, ValueError, "n must be >= 1, got 0"),
        ({"n": 2.5}, TypeError, "n must be a whole number"),
        ({"n": 1, "img_size": 7}, ValueError, "img_size must be >= 8, got 7"),
        ({"n": 1, "seed": -1}, ValueError, "seed must be >= 0, got -1"),
    ],
)
def test_bad_input(arguments, error, says):
    with pytest.raises(error, match=says):
        draw_shapes(**arguments)
