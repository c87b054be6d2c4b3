"""Models that were changed after `create_model` built them: no file and no other size loses the change in silence."""

import pytest
import torch
from torch import nn

import karat_lite as kl
from karat_lite.checkpoints import load_checkpoint, save_checkpoint
from karat_lite.vit import resize

SMALL = dict(img_size=8, patch_size=4, num_classes=3, dim=16, depth=2, num_heads=2)


def made(attention="karat", **options):
    return kl.create_model("vit_pico", attention, rank=2, **SMALL, **options)


def with_head(head):
    model = made()
    model.head = head
    return model


def with_operator():
    model = made("softmax")
    model.blocks[0].attn.activation = kl.KArAtOperator(2, 5, rank=2)
    return model


CHANGED = {
    "another head": (lambda: with_head(nn.Linear(16, 7)), r"head.weight is \(7, 16\), its configuration says \(3, 16"),
    "no head": (lambda: with_head(nn.Identity()), "head.weight is not there"),
    "two heads": (lambda: with_head(nn.Sequential(nn.Linear(16, 3))), "head.weight is not there"),
    "an operator for softmax": (with_operator, "activation.coef is .* says nothing of it"),
}


@pytest.mark.parametrize("why", CHANGED)
def test_a_changed_model_is_neither_saved_nor_resized(why, tmp_path):
    make, message = CHANGED[why]
    for use in (lambda model: save_checkpoint(tmp_path / "m.safetensors", model), lambda model: resize(model, 12)):
        with pytest.raises(ValueError, match=message):
            use(make())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"mode": "universal"}, {"basis": "rational"}, {"attention": "static"}])
def test_a_compiled_model_is_saved_as_itself(options, tmp_path):
    model = made(**options)
    path = save_checkpoint(tmp_path / "m.safetensors", torch.compile(model, backend="eager"))
    again = load_checkpoint(path)[0].state_dict()
    assert all(torch.equal(again[name], x) for name, x in model.state_dict().items())


def test_neither_draws_from_the_random_state(tmp_path):
    model = made()
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    path = save_checkpoint(tmp_path / "m.safetensors", model)
    load_checkpoint(path)
    assert torch.equal(torch.rand(2), wanted)


def test_an_operator_of_another_class_is_not_resized():
    class Doubled(kl.KArAtOperator):
        def attend(self, q, k, v):
            return 2 * super().attend(q, k, v)

    with pytest.raises(TypeError, match="makes a KArAtOperator, and this is a Doubled"):
        Doubled(2, 17, rank=4).resized(3)


def test_options_that_are_tuples_are_lists_as_in_a_card(tmp_path):
    model = made(basis="rational", basis_options={"degrees": (3, 2)})
    again, card = load_checkpoint(save_checkpoint(tmp_path / "m.safetensors", model), model)
    assert again is model and card["config"]["basis_options"] == {"degrees": [3, 2]} == model.config["basis_options"]
