"""What a resized model keeps beside its numbers: type, backends, what is frozen, and the caller's random state."""

import pytest
import torch

import karat_lite as kl


def _model(**options):
    return kl.create_model("vit_pico", img_size=16, patch_size=4, rank=4, depth=2, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_resized_as_float32(dtype):
    model = _model().to(dtype)
    new = kl.resize(model, 24)
    assert {p.dtype for p in new.parameters()} == {dtype}
    expected = kl.resize(model.float(), 24)
    for mine, its in zip(new.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.float(), its, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
def test_backends_frozen_weights_and_random_state_stay(mode):
    model = _model(mode=mode)
    for operator in model.operators():
        operator.backend = "contraction"
    model.requires_grad_(False).head.requires_grad_(True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    new = kl.resize(model, 24)
    assert torch.equal(torch.get_rng_state(), before)
    assert {operator.backend for operator in new.operators()} == {"contraction"}
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    operator = model.operators()[0].resized(6)
    assert operator.backend == "contraction" and not any(p.requires_grad for p in operator.parameters())


def test_a_grid_too_small_for_the_units_is_told_to_who_resizes():
    with pytest.raises(ValueError, match="to resize: an image with more patches"):
        kl.resize(_model(), 4)
