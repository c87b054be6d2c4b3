"""What analyses take: batches in which no image is alone, labels of any whole type, models of any precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import batch, path, tiny

import karat_lite as kl
from karat_lite.analysis.content import ablate, mean_scores
from karat_lite.analysis.directions import filter_norms, principal_directions
from karat_lite.analysis.functions import scores_seen
from karat_lite.analysis.hessian import hessian_spectrum
from karat_lite.analysis.inputs import parts
from karat_lite.analysis.landscape import batch_loss, grid_around, path_losses, rise
from karat_lite.analysis.maps import class_token_maps
from karat_lite.analysis.signal import signal_sizes
from karat_lite.augment import mirror_and_shift

IMAGES, LABELS = batch()


def sizes(n, most, least=1):
    return [len(part) for part in parts(torch.arange(n), most, least)]


def test_batches_are_even_and_where_it_matters_none_is_alone():
    assert (
        sizes(10, 4) == [4, 3, 3] and sizes(51, 50) == [26, 25] and sizes(5, 1) == [1] * 5 and sizes(5, 2) == [2, 2, 1]
    )
    assert (
        sizes(5, 2, least=2) == [3, 2] and sizes(3, 2, 2) == [3] and sizes(1, 2, 2) == [1] and sizes(6, 2, 2) == [2] * 3
    )
    for n in range(2, 40):
        for most in range(2, 9):
            assert sum(sizes(n, most, 2)) == n and min(sizes(n, most, 2)) >= 2 and max(sizes(n, most, 2)) <= most + 1
    with pytest.raises(ValueError, match="batch_size must be >= 2, got 1"):
        sizes(5, 1, 2)


def test_every_image_finds_another():
    model = tiny("softmax")
    assert len(ablate(model, IMAGES[:3], LABELS[:3], batch_size=2)) == 7
    with pytest.raises(ValueError, match="come from the same batch, got batch_size = 1: take at least 2"):
        ablate(model, IMAGES, LABELS, batch_size=1)
    (alone,), (together,) = (ablate(model, IMAGES, LABELS, ["zero"], batch_size=size) for size in (1, 10))
    assert alone.loss == pytest.approx(together.loss, abs=1e-6)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_labels_of_any_whole_type(kind):
    model, labels = tiny("softmax"), LABELS.to(kind)
    assert batch_loss(model, IMAGES, labels) == batch_loss(model, IMAGES, LABELS)
    assert ablate(model, IMAGES, labels, ["zero"]) == ablate(model, IMAGES, LABELS, ["zero"])
    assert np.array_equal(*(hessian_spectrum(model, IMAGES, y, 1, progress=False).values for y in (labels, LABELS)))
    assert torch.equal(*(class_token_maps(model, IMAGES, y).pushes for y in (labels, LABELS)))


@pytest.mark.parametrize("call", [batch_loss, ablate, class_token_maps])
def test_truth_values_are_no_labels(call):
    with pytest.raises(ValueError, match="whole numbers|must hold a class"):
        call(tiny("softmax"), IMAGES, LABELS > 0)


def test_a_double_model_is_judged_in_double():
    model, images, steps = tiny("softmax").double(), IMAGES.double(), path(tiny("softmax"))
    found = path_losses(model, principal_directions(steps), steps, images, LABELS)
    (line,) = ablate(model, images, LABELS, ["as they are"])
    with torch.no_grad():
        assert line.loss == pytest.approx(F.cross_entropy(model(images), LABELS).item(), rel=1e-12)
        first = steps.model(0).double()(images)
    assert found.own[0] == pytest.approx(F.cross_entropy(first, LABELS).item(), rel=1e-12)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_looked_at_and_has_no_landscape(kind):
    model = tiny("karat")
    wanted = class_token_maps(model, IMAGES)
    with pytest.raises(TypeError, match=f"computes in {kind}, got images in torch.float32: take images.to"):
        class_token_maps(model.to(kind), IMAGES)
    found = class_token_maps(model, IMAGES.to(kind))
    assert (found.maps - wanted.maps).norm() < 0.05 * wanted.maps.norm() and found.pushes.dtype == torch.float32
    with pytest.raises(ValueError, match="a small step from a weight is lost to rounding: take model.float()"):
        rise(model, IMAGES.to(kind), LABELS)


def test_coordinates_on_directions_that_depend_and_planes_that_are_none():
    taken = path(tiny())
    one = principal_directions(taken, 1)
    twice = replace(one, along={name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in one.along.items()})
    assert np.allclose(twice.coordinates(taken).sum(axis=1), one.coordinates(taken)[:, 0], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"a plane needs two coordinates of each snapshot, .* got \(2, 1\)"):
        grid_around([[1.0], [2.0]])


def test_filters_of_an_operator_are_those_of_its_model():
    """One for each (head, unit), wherever the operator stands."""
    coef = torch.randn(4, 3, 5, 6)
    for name in ("coef", "activation.coef", "blocks.0.attn.activation.operator.coef2"):
        assert filter_norms({name: coef})[name].shape == (4, 3, 1, 1)
    assert filter_norms({"patch_embed.proj.weight": coef})["patch_embed.proj.weight"].shape == (4, 1, 1, 1)


def test_a_model_that_drops_at_random_is_not_looked_at():
    model = tiny("softmax", depth=1).train()
    model.blocks[0].mlp.act = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Dropout(0.5))
    images, labels = batch(4)
    looks = {
        "curvature": lambda: hessian_spectrum(model, images, labels, 1),
        "loss": lambda: batch_loss(model, images, labels),
        "maps": lambda: class_token_maps(model, images),
        "scores": lambda: scores_seen(model, images),
        "means": lambda: mean_scores(model, images),
        "signal": lambda: signal_sizes(model, images),
    }
    for look in looks.values():
        with pytest.raises(ValueError, match=r"blocks.0.mlp.act.1 drops numbers at random .* call model.eval\(\)"):
            look()
    model.eval()
    for look in looks.values():
        look()


def test_another_default_device_changes_nothing_on_this_one():
    """`torch.set_default_device("cuda")` is for a reader's own tensors; meta, which holds no number, stands for it."""
    model, (images, labels) = tiny(), batch(4)
    looks = {
        "choice": lambda: kl.load_dataset("digits", "train", limit=8).images,
        "augmented": lambda: mirror_and_shift(images, 0.5, 1, torch.Generator().manual_seed(0)),
        "shuffled": lambda: ablate(model, images, labels, changes=["queries shuffled"])[0].accuracy,
        "curvature": lambda: hessian_spectrum(model, images, labels, 1, iterations=4, progress=False).values,
        "steps": lambda: rise(model, images, labels, count=2).mean,
        "maps": lambda: class_token_maps(model, images).rollout,
    }
    before = {name: look() for name, look in looks.items()}
    with torch.device("meta"):
        after = {name: look() for name, look in looks.items()}
    for name, value in before.items():
        assert np.array_equal(np.asarray(value), np.asarray(after[name])), name


def test_what_takes_gradients_says_where_none_are_to_be_had():
    model, (images, labels) = tiny("softmax", depth=1).eval(), batch(4)
    looks = [lambda: class_token_maps(model, images), lambda: hessian_spectrum(model, images, labels, 1)]
    for look in looks:
        with torch.inference_mode(), pytest.raises(ValueError, match=r"allows none: take torch.no_grad"):
            look()
        with torch.no_grad():
            look()
