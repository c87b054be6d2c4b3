"""Models that were changed after `create_model` built them: no file and no other size loses the change in silence."""

import functools

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


class Uniform(nn.Module):
    """An activation without a tensor."""

    def activate(self, scores):
        return torch.full_like(scores, 1 / scores.shape[-1])

    def attend(self, q, k, v):
        return v.mean(dim=2, keepdim=True).expand_as(v)


def with_part(attention="karat", **parts):
    """Other parts in the first block, by their paths."""
    model = made(attention)
    for path, part in parts.items():
        *way, last = path.split("__")
        setattr(model.blocks[0].get_submodule(".".join(way)), last, part)
    return model


def with_one_operator():
    model = made()
    model.blocks[1].attn.activation = model.blocks[0].attn.activation
    return model


CHANGED = {
    "an activation of one's own": (
        lambda: with_part("softmax", attn__activation=Uniform()),
        r"activation is Uniform\(\), its configuration says SoftmaxActivation",
    ),
    "another nonlinearity": (lambda: with_part(mlp__act=nn.ReLU()), r"mlp.act is ReLU\(\), .* says GELU"),
    "another epsilon": (lambda: with_part(norm1__eps=1e-2), r"norm1 is LayerNorm\(\(16,\), eps=0.01"),
    "rows on the simplex": (lambda: with_part(attn__activation__simplex=True), "activation is .*simplex"),
    "blocks that share": (with_one_operator, "blocks.1.attn.activation.coef is that of blocks.0.attn.activation.coef"),
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


def test_a_training_that_keeps_files_tells_it_at_once(tmp_path):
    data = kl.load_dataset("digits", "train", limit=32), kl.load_dataset("digits", "test", limit=8)
    model = kl.create_model("vit_pico", "softmax", **{**SMALL, "num_classes": 10})
    model.blocks[0].attn.activation = Uniform()
    train = functools.partial(kl.training.train, model, *data, kl.Recipe(epochs=1), device="cpu", progress=False)
    with pytest.raises(ValueError, match="not as create_model built it"):
        train(out=tmp_path)
    assert not list(tmp_path.iterdir())
    train()  # without files there is nothing to get wrong


def test_dropout_may_be_added(tmp_path):
    model = with_part(mlp__act=nn.Sequential(nn.GELU(), nn.Dropout(0.5))).eval()
    images = torch.rand(2, 3, 8, 8)
    again, _ = load_checkpoint(save_checkpoint(tmp_path / "m.safetensors", model))
    assert torch.equal(again(images), model(images)) and torch.equal(resize(model, 8)(images), model(images))


def test_what_stands_in_files_is_the_model_below_a_compiled_one(tmp_path):
    model, images = made(), torch.rand(2, 3, 8, 8)
    compiled = torch.compile(made(), backend="eager")
    again, _ = load_checkpoint(save_checkpoint(tmp_path / "m.safetensors", model), model=compiled)
    assert again is compiled and torch.equal(compiled(images), model.eval()(images))
    data = kl.load_dataset("digits", "train", limit=32), kl.load_dataset("digits", "test", limit=8)
    model = kl.create_model("vit_pico", **{**SMALL, "num_classes": 10}, rank=2)
    options = dict(device="cpu", progress=False, out=tmp_path / "run", snapshots=2)
    kl.training.train(torch.compile(model, backend="eager"), *data, kl.Recipe(epochs=1), **options)
    last = kl.load_trajectory(tmp_path / "run/trajectory.safetensors").model(1)
    assert torch.allclose(last.head.weight, model.head.weight, atol=1e-3)
    kl.training.train(model, *data, kl.Recipe(epochs=1), **options, resume=True)  # the state is the plain model's, too


def test_a_checkpoint_is_in_single_precision_whatever_the_default(tmp_path):
    path = save_checkpoint(tmp_path / "m.safetensors", made())
    torch.set_default_dtype(torch.float64)
    try:
        assert load_checkpoint(path)[0].head.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


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
