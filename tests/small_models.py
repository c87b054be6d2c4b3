"""Models of a few hundred weights, a batch for them, a path that ends in one: what tests of landscapes stand on."""

import numpy as np
import torch
import torch.nn.functional as F

import karat_lite as kl
from karat_lite.analysis.directions import weights_of

TINY = dict(img_size=4, patch_size=2, num_classes=3, dim=4, depth=1, num_heads=1, rank=2, grid=1)
KINDS = {
    "softmax": dict(attention="softmax"),
    "karat": dict(attention="karat"),
    "universal": dict(attention="karat", mode="universal", depth=2),
    "full rank": dict(attention="karat", rank=None),
    "phi_w": dict(attention="karat", order="phi_w", base="silu", edge_scales=True),
    "phi_phi": dict(attention="karat", order="phi_phi"),
    "hybrid heads": dict(attention="hybrid", num_heads=2, softmax_heads=[1]),
    "hybrid layers": dict(attention="hybrid", depth=2, softmax_layers=[0], simplex=True),
    "edge basis": dict(attention="karat", basis="mexican_hat"),
}


def tiny(kind="karat", seed=0, **options):
    """A model, pushed away from its start, where biases are 0 and heads all alike."""
    torch.manual_seed(seed)
    model = kl.create_model("vit_pico", **{**TINY, **KINDS[kind], **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(n=10, size=4, classes=3):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, size, size, generator=generator) * 2 - 1, torch.arange(n) % classes


def path(model, snapshots=6, scale=0.1):
    """A random walk that ends at the model."""
    torch.manual_seed(2)
    weights = {}
    for name, value in weights_of(model).items():
        steps = (
            scale
            * torch.randn(snapshots - 1, *value.shape)
            * torch.linspace(1, 0.2, snapshots - 1).view(-1, *[1] * value.ndim)
        )
        weights[name] = torch.cat([steps.flip(0).cumsum(0).flip(0) + value, value[None]])
    return kl.Trajectory(weights, {"steps": list(range(snapshots)), "config": model.config})


def plain_loss(model, images, labels, smoothing=0.0):
    with torch.no_grad():
        return F.cross_entropy(model(images).double(), labels, label_smoothing=smoothing).item()


def put(model, weights):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def flat(weights) -> np.ndarray:
    return np.concatenate([np.asarray(x, dtype=float).ravel() for x in weights.values()])
