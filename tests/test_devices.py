"""Analyses of a model on another device: images stay where they are, float64 is the CPU's, and numbers are the same."""

import numpy as np
import pytest
import torch
from pretend_device import MPS, PretendDevice
from small_models import batch, path, tiny

from karat_lite.analysis.content import ablate, map_shares, mean_scores
from karat_lite.analysis.directions import principal_directions, random_directions
from karat_lite.analysis.functions import scores_seen
from karat_lite.analysis.hessian import hessian_product, hessian_spectrum
from karat_lite.analysis.landscape import batch_loss, loss_grid, loss_profile, path_losses, rise
from karat_lite.analysis.map_quality import deletion_insertion, on_object
from karat_lite.analysis.maps import class_token_maps

IMAGES, LABELS = batch()
RANDOM, PATH = random_directions(tiny("softmax")), path(tiny("softmax"))
CALLS = {
    "batch_loss": lambda model: batch_loss(model, IMAGES, LABELS),
    "loss_grid": lambda model: loss_grid(model, RANDOM, IMAGES, LABELS, [0, 1], [0], progress=False).loss,
    "loss_profile": lambda model: loss_profile(model, RANDOM, IMAGES, LABELS, [-1, 1]),
    "path_losses": lambda model: path_losses(model, principal_directions(PATH), PATH, IMAGES, LABELS).own,
    "rise": lambda model: rise(model, IMAGES, LABELS, count=2).each,
    "hessian_product": lambda model: hessian_product(model, IMAGES, LABELS)[0](ones(model)).cpu(),
    "hessian_spectrum": lambda model: hessian_spectrum(model, IMAGES, LABELS, 2, progress=False).values,
    "ablate": lambda model: [line.loss for line in ablate(model, IMAGES, LABELS, batch_size=4)],
    "mean_scores": lambda model: mean_scores(model, IMAGES)[0].cpu(),
    "map_shares": lambda model: map_shares(model, IMAGES),
    "scores_seen": lambda model: scores_seen(model, IMAGES).shares,
    "class_token_maps": lambda model: class_token_maps(model, IMAGES, LABELS).pushes,
    "deletion_insertion": lambda model: deletion_insertion(model, IMAGES, IMAGES[:, 0, ::2, ::2].flatten(1)).deletion,
}


def ones(model):
    own = list(model.parameters())
    return torch.ones(sum(x.numel() for x in own)).to(own[0].device)


@pytest.mark.parametrize("name", CALLS)
def test_a_model_elsewhere_gives_the_same_numbers(name):
    here = CALLS[name](tiny("softmax"))
    with PretendDevice() as far:
        there = CALLS[name](far.move(tiny("softmax")))
    assert np.allclose(here, there, atol=1e-6)


def test_labels_images_and_maps_may_be_there_too():
    """Scores in float64 are taken on the CPU, wherever maps and masks come from."""
    maps, masks = torch.rand(3, 4), torch.rand(3, 4, 4) < 0.5
    here = on_object(maps, masks, (2, 2)).iou, batch_loss(tiny("softmax"), IMAGES, LABELS)
    with PretendDevice() as far:
        there = on_object(maps.to(MPS), masks.to(MPS), (2, 2)).iou
        loss = batch_loss(far.move(tiny("softmax")), IMAGES.to(MPS), LABELS.to(MPS))
    assert torch.equal(here[0], there) and here[1] == pytest.approx(loss, abs=1e-6)


def test_the_device_that_is_not_here_is_strict():
    with PretendDevice() as far:
        model, images = far.move(tiny("softmax")), IMAGES.to(MPS)
        assert (
            model.pos_embed.device == MPS and model(images).device == MPS and model(images).cpu().device.type == "cpu"
        )
        with pytest.raises(RuntimeError, match="same device"):
            model(IMAGES)
        with pytest.raises(TypeError, match="float64"):
            images.double()
        assert images.cpu().double().dtype == torch.float64
