"""Draws of the changes that shuffle: by seed, and for each layer its own."""

import torch
from small_models import batch, tiny

from karat_lite.analysis.content import ablate, changed
from karat_lite.analysis.map_quality import run_rows
from karat_lite.analysis.masked import Masked

IMAGES, LABELS = batch()


def test_layers_shuffle_apart_and_seeds_differ():
    model = tiny("softmax", depth=2)
    with torch.no_grad():
        for block in model.blocks:  # scores that matter
            block.attn.qkv.weight.mul_(8)
    one, again, other = (ablate(model, IMAGES, LABELS, ["keys shuffled"], seed=seed)[0].loss for seed in (0, 0, 1))
    assert one == again and one != other
    layers = [block.attn.activation for block in changed(model, "keys shuffled", seed=0).blocks]
    scores = torch.randn(2, model.blocks[0].attn.num_heads, 5, 5)
    assert not torch.equal(*(layer.activate(scores) for layer in layers))


def test_maps_of_any_scale_keep_their_signs_apart():
    """Maps a million times smaller beside values a million times larger: the same model, the same table."""
    small, plain = tiny("karat"), tiny("karat")
    with torch.no_grad():
        for block in small.blocks:
            block.attn.activation.weight.mul_(1e-7)
            rows = slice(2 * block.attn.proj.in_features, None)
            block.attn.qkv.weight[rows].mul_(1e7)
            block.attn.qkv.bias[rows].mul_(1e7)
    pictures = ((IMAGES[:3] + 1) * 127.5).byte()
    masks = torch.zeros(3, *pictures.shape[2:], dtype=torch.bool)
    masks[:, :4, :4] = True
    data = Masked("some", pictures, masks, None, None)
    for mine, its in zip(*(run_rows(model, data, 2, ["mean"]) for model in (small, plain)), strict=True):
        assert abs(mine["mass"] - its["mass"]) < 1e-3, mine
