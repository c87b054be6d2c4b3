"""Another grid of tokens keeps each patch's place: fields that are neither constant nor symmetric, and Pillow's answer.

A mean over patches, a grid that is transposed or one that is mirrored would pass where a field is the same everywhere.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import karat_lite as kl
from karat_lite.token_grid import resize_tokens


def pillow(x: torch.Tensor, axis: int, side: int) -> torch.Tensor:
    """What `resize_tokens` shall give, by another hand: bicubic, over the pixels that a smaller grid drops."""
    x = x.detach().movedim(axis, -1)
    own, patches = x[..., :1], x[..., 1:]
    s = round(patches.shape[-1] ** 0.5)
    grids = [Image.fromarray(row.reshape(s, s)) for row in patches.reshape(-1, s * s).float().numpy()]
    grids = [np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)).ravel() for grid in grids]
    patches = torch.from_numpy(np.stack(grids)).reshape(*patches.shape[:-1], side * side)
    return torch.cat([own.float(), patches], dim=-1).movedim(-1, axis)


def ramp(side: int) -> torch.Tensor:
    """2 row + 5 column at the middles of side x side patches, places in units of the image; the class token has 100."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.cat([torch.tensor([100.0]).double(), (2 * at[:, None] + 5 * at).flatten()])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("s, side, edge", [(5, 8, 3), (8, 12, 3), (12, 6, 2)])
def test_a_ramp_stays_a_ramp(axis, s, side, edge):
    """Inside, where the interpolation sees no edge; and each of the other entries is resized by itself."""
    others = torch.tensor([1.0, -3.0, 0.5, 7.0], dtype=torch.float64).reshape(2, 1, 2)
    x = (others * ramp(s).reshape(1, -1, 1)).movedim(1, axis)
    found, factor = resize_tokens(x, axis, side)
    expected = others * ramp(side).reshape(1, -1, 1)
    assert found.movedim(axis, 1).shape == expected.shape
    own, patches = found.movedim(axis, 1).split([1, side**2], dim=1)
    assert torch.equal(own, expected[:, :1]), "the class token's entry stays"
    inside = (slice(None), slice(edge, side - edge), slice(edge, side - edge))
    patches, expected = (y.reshape(2, side, side, 2)[inside] for y in (patches, expected[:, 1:]))
    assert expected.numel() and torch.allclose(patches, expected, rtol=0, atol=1e-9)
    assert factor.tolist() == [1.0] + [s**2 / side**2] * side**2


@pytest.mark.parametrize("side", [2, 3, 6, 7])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_field_is_resized_as_pillow_does(axis, side):
    torch.manual_seed(0)
    x = torch.randn(2, 17, 3).movedim(1, axis)
    found, _ = resize_tokens(x, axis, side)
    assert torch.allclose(found, pillow(x, axis, side), atol=1e-5)


# Which axes are tokens: keys q of the functions, outputs of W or of the last functions; full rank has both.
TOKENS = {
    ("w_phi", 3): {"coef": (2,), "weight": (1,)},
    ("phi_w", 3): {"weight": (2,), "coef": (1,)},
    ("phi_phi", 3): {"coef": (2,), "coef2": (1,)},
    ("w_phi", None): {"coef": (1, 2)},
}


def resized_by_pillow(value: torch.Tensor, axes, side: int) -> torch.Tensor:
    """Interpolated along these axes; patches times old / new count on each, so that sums keep their size."""
    for axis in axes:
        old = value.shape[axis] - 1
        value = pillow(value, axis, side)
        value.narrow(axis, 1, side**2).mul_(old / side**2)
    return value


@pytest.mark.parametrize("side", [3, 6])
@pytest.mark.parametrize("order, rank", TOKENS)
def test_an_operator_is_resized_patch_by_patch(order, rank, side):
    torch.manual_seed(0)
    old = kl.KArAtOperator(2, 17, rank=rank, order=order)
    new = old.resized(side)
    assert {name for name, _ in new.named_parameters()} == set(TOKENS[order, rank])
    for name, axes in TOKENS[order, rank].items():
        expected = resized_by_pillow(getattr(old, name), axes, side)
        assert torch.allclose(getattr(new, name), expected, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
def test_a_model_is_resized_patch_by_patch(mode):
    torch.manual_seed(0)
    old = kl.create_model("vit_pico", mode=mode, img_size=16, patch_size=4, depth=2, rank=3)
    new = kl.resize(old, 24)
    assert torch.allclose(new.pos_embed, pillow(old.pos_embed, 1, 6), atol=1e-5)
    for mine, its in zip(new.operators(), old.operators(), strict=True):
        assert torch.allclose(mine.coef, resized_by_pillow(its.coef, (2,), 6), rtol=1e-4, atol=1e-6)
        assert torch.allclose(mine.weight, resized_by_pillow(its.weight, (1,), 6), rtol=1e-4, atol=1e-6)
