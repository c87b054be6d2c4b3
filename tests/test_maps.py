"""Class-token maps: against hooks, loops and hand-computed cases, on every kind of model; bad input is named."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import karat_lite as kl
from karat_lite.analysis import maps
from karat_lite.analysis.maps import KINDS, class_token_maps, picture, rollout

MODELS = {
    "softmax": dict(attention="softmax"),
    "karat": dict(),
    "universal": dict(mode="universal"),
    "full rank": dict(rank=None),
    "hybrid heads": dict(attention="hybrid", softmax_heads=[1]),
    "hybrid layers": dict(attention="hybrid", softmax_layers=[0]),
    "phi_phi": dict(order="phi_phi"),
    "edge basis": dict(basis="dog", order="phi_w"),
    "simplex": dict(simplex=True),
    "one layer, one head": dict(depth=1, num_heads=1),
}


def made(name="karat", **more):
    torch.manual_seed(0)
    options = {"depth": 2, "rank": 4, **MODELS[name], **more}
    model = kl.create_model("vit_pico", img_size=8, patch_size=2, **options).double().eval()
    with torch.no_grad():  # an untrained head and norm hide mistakes in their weights
        model.head.weight.normal_()
        model.head.bias.normal_()
        model.norm.weight.normal_()
        model.norm.bias.normal_()
    return model


def images(count=3, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def watched(model, x):
    """What hooks see: inputs of qkv and proj, outputs of the MLPs, tokens at the final norm."""
    seen = {"qkv": [], "mlp": [], "into": []}
    hooks = [model.norm.register_forward_hook(lambda m, given, out: seen.update(last=given[0]))]
    for block in model.blocks:
        hooks.append(block.attn.qkv.register_forward_hook(lambda m, given, out: seen["qkv"].append(out)))
        hooks.append(block.mlp.register_forward_hook(lambda m, given, out: seen["mlp"].append(out)))
        hooks.append(block.register_forward_pre_hook(lambda m, given: seen["into"].append(given[0])))
    logits, records = model(x, return_attention=True)
    for hook in hooks:
        hook.remove()
    return logits, records, seen


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_maps_sizes_and_pushes_against_loops(name):
    model, x = made(name), images(2)
    logits, records, hooked = watched(model, x)
    found = class_token_maps(model, x, batch_size=1)
    h, dim = model.blocks[0].attn.num_heads, 64
    d = dim // h
    assert torch.allclose(found.logits, logits) and found.grid == (4, 4)
    for b in range(2):
        c = found.target[b]
        assert c == logits[b].argmax()
        last = hooked["last"][b, 0]
        std = ((last - last.mean()).square().mean() + 1e-6).sqrt()

        def pushed(u, std=std, c=c):  # what a vector adds to logit_c - mean logit by way of the frozen norm
            each = model.head.weight @ ((u - u.mean()) / std * model.norm.weight)
            return each[c] - each.mean()

        biases = model.head.weight @ model.norm.bias + model.head.bias
        rest = biases[c] - biases.mean() + pushed(hooked["into"][0][b, 0])
        for layer, block in enumerate(model.blocks):
            v = hooked["qkv"][layer][b, :, 2 * dim :]
            row = records[layer].maps[b, :, 0]
            assert torch.allclose(found.scores[b, layer], records[layer].scores[b, :, 0, 1:])
            assert torch.allclose(found.maps[b, layer], row[:, 1:]) and torch.allclose(found.own[b, layer], row[:, 0])
            w_o = block.attn.proj.weight
            u = torch.stack([
                torch.stack([row[i, q] * w_o[:, i * d : (i + 1) * d] @ v[q, i * d : (i + 1) * d] for q in range(17)])
                for i in range(h)
            ])  # fmt: skip
            assert torch.allclose(found.head_sizes[b, layer], u.sum(dim=1).norm(dim=-1))
            assert torch.allclose(found.added[b, layer], u.sum(dim=0)[1:].norm(dim=-1))
            expected = torch.stack([pushed(u[:, q].sum(dim=0)) for q in range(1, 17)])
            assert torch.allclose(found.pushes[b, layer], expected)
            rest += pushed(u[:, 0].sum(dim=0) + block.attn.proj.bias + hooked["mlp"][layer][b, 0])
        above = logits[b, c] - logits[b].mean()
        assert torch.allclose(found.rest[b], rest), "embedding, MLPs, biases and the class token's own values"
        assert torch.allclose(found.pushes[b].sum() + rest, above), "the parts make the whole"


def test_a_push_is_the_slope_of_the_logit_along_the_patchs_values():
    """Scaling what a patch adds in the last layer, the MLP and the norm's statistics held."""
    model, x = made(), images(1)
    found = class_token_maps(model, x, target=torch.tensor([4]))
    logits, records, hooked = watched(model, x)
    block, last = model.blocks[-1], hooked["last"][:, 0].detach()
    v = hooked["qkv"][-1][..., 128:].detach().view(1, 17, 4, 16)
    std, mean = (last.var(unbiased=False) + 1e-6).sqrt(), last.mean()

    def answer(amount):  # (16,): how much more of each patch
        added = torch.einsum("hq,qhd,Dhd->qD", records[-1].maps[0, :, 0, 1:].detach(), v[0, 1:],
                             block.attn.proj.weight.detach().view(64, 4, 16))  # fmt: skip
        change = amount @ added
        y = (last + change - mean - change.mean()) / std * model.norm.weight + model.norm.bias
        each = model.head(y)[0]
        return each[4] - each.mean()

    slope = torch.autograd.functional.jacobian(answer, torch.zeros(16, dtype=torch.float64))
    assert torch.allclose(found.pushes[0, -1], slope) and found.target.tolist() == [4]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_effects_are_the_slope_of_the_whole_model(name):
    """A little less of one patch's u behind attention, everything after it computed anew: central differences."""
    model, x, step = made(name), images(2), 1e-4
    found = class_token_maps(model, x)
    h, d = model.blocks[0].attn.num_heads, 64 // model.blocks[0].attn.num_heads
    _, records, hooked = watched(model, x)
    for layer, block in enumerate(model.blocks):
        v = hooked["qkv"][layer][..., 128:].view(2, 17, h, d)
        w_o = block.attn.proj.weight.view(64, h, d)
        for q in (1, 9):
            u = torch.einsum("bh,bhd,Dhd->bD", records[layer].maps[:, :, 0, q], v[:, q], w_o)
            margins = []
            for sign in (1, -1):
                shift = torch.zeros(2, 17, 64).double()
                shift[:, 0] = sign * step * u
                hook = block.attn.register_forward_hook(lambda m, given, out, shift=shift: out + shift)
                logits = model(x)
                hook.remove()
                margins.append(logits[range(2), found.target] - logits.mean(dim=1))
            slope = (margins[0] - margins[1]) / (2 * step)
            assert torch.allclose(found.effects[:, layer, q - 1], slope, rtol=1e-4, atol=1e-6)
    assert not model.blocks[0].attn._forward_hooks, "nothing is left behind in the model"


def test_one_model_in_another_gauge():
    """(c A, V / c) is the same model, for c < 0 too: raw rows change; what is made of u, and rollout, do not."""
    model, x = made(), images()
    before = class_token_maps(model, x)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.activation.weight[1] *= -3  # head 1's A
            block.attn.qkv.weight[2 * 64 + 16 : 2 * 64 + 32] /= -3  # and its values
            block.attn.qkv.bias[2 * 64 + 16 : 2 * 64 + 32] /= -3
    after = class_token_maps(model, x)
    assert torch.allclose(after.maps[:, :, 1], -3 * before.maps[:, :, 1])
    for same in ("logits", "head_sizes", "added", "pushes", "rest", "effects", "rollout"):
        assert torch.allclose(getattr(after, same), getattr(before, same)), same
    assert torch.equal(after.dominant, before.dominant)
    assert not torch.allclose(after.kind("attention"), before.kind("attention"))
    assert not torch.allclose(after.signed_rollout, before.signed_rollout, rtol=0.01)


def test_scores_may_change_their_sign():
    """-S with the sines' coefficients negated: the same model, and the opposite picture of scores."""
    model, x = made(), images()
    before = class_token_maps(model, x)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64] *= -1
            block.attn.qkv.bias[:64] *= -1
            block.attn.activation.coef[..., 3:] *= -1
    after = class_token_maps(model, x)
    assert torch.allclose(after.logits, before.logits) and torch.allclose(after.scores, -before.scores)


def test_kinds_are_picked_from_the_arrays():
    found = class_token_maps(made(), images())
    assert torch.equal(found.dominant, found.head_sizes.argmax(dim=2))
    picked = torch.stack([found.maps[b, 0, found.dominant[b, 0]] for b in range(3)])
    expected = {
        "scores": (found.scores[:, 0].mean(dim=1), found.scores[:, 0].abs().mean(dim=1)),
        "attention": (found.maps[:, 0].mean(dim=1), found.maps[:, 0].abs().mean(dim=1)),
        "dominant": (picked, picked.abs()),
        "added": (found.added[:, 0], found.added[:, 0]),
        "rollout": (found.signed_rollout[:, 0], found.rollout[:, 0]),
        "direct": (found.pushes[:, 0], found.pushes[:, 0].abs()),
        "regions": (found.effects[:, 0], found.effects[:, 0].abs()),
    }
    assert set(expected) == set(KINDS)
    for kind, pair in expected.items():
        for signs, values in zip(("signed", "absolute"), pair, strict=True):
            assert torch.equal(found.kind(kind, 0, signs), values)
            assert torch.equal(found.kind(kind, -2, signs), values)
    grids = found.on_grid(found.maps)
    assert grids.shape == (3, 2, 4, 4, 4) and torch.equal(grids[..., 1, 2], found.maps[..., 6])


def test_rollout_by_hand():
    """Two layers of two tokens and one head; (I + A) / 2 chained, the later layer on the left."""
    one, two = torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    rows = rollout([one[None, None], two[None, None]])
    # (I + one)/2 = [[.75, .25], [0, 1]]; (I + two)/2 = [[.6, .4], [.5, .5]]; row 0 of the product: [.45, .15 + .4]
    assert torch.allclose(rows, torch.tensor([[[0.75, 0.25], [0.45, 0.55]]]))
    assert torch.allclose(rollout([one[None, None], two[None, None]], "signed"), rows)


def test_signed_rollout_by_hand():
    one, two = torch.tensor([[0.0, -2.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    absolute, signed = (rollout([one[None, None], two[None, None]], signs)[0] for signs in ("absolute", "signed"))
    # |A| by rows: [[0, 1], [0, 0]] (an empty row stays empty) and [[0, 1], [0, 1]]
    assert torch.allclose(absolute, torch.tensor([[0.5, 0.5], [0.25, 0.5]]))
    # signed: (I + one)/2 = [[.5, -1], [0, .5]]; (I + two)/2 = [[.5, .5], [0, 2.5]]; row 0 [.25, -.25], largest 1.25
    assert torch.allclose(signed, torch.tensor([[0.5, -1.0], [0.2, -0.2]]))


def test_rollout_of_a_softmax_model_is_the_usual_one():
    model, x = made("softmax"), images()
    _, records, _ = watched(model, x)
    through = torch.eye(17, dtype=torch.float64).expand(3, -1, -1)
    for record in records:
        step = (record.maps.mean(dim=1) + torch.eye(17)) / 2
        through = step / step.sum(dim=-1, keepdim=True) @ through
    found = class_token_maps(model, x)
    assert torch.allclose(found.rollout[:, -1], through[:, 0, 1:])
    assert torch.allclose(found.signed_rollout, found.rollout)
    assert torch.allclose(rollout([record.maps for record in records])[:, -1], through[:, 0])
    assert torch.allclose(found.maps.sum(dim=-1) + found.own, torch.ones(()).double())


def test_each_head_weighs_the_same_in_absolute_rollout():
    heads = torch.stack([torch.eye(3), 100 * torch.ones(3, 3)])[None]
    assert torch.allclose(rollout([heads])[0, 0], torch.tensor([1 + (1 + 1 / 3) / 2, 1 / 6, 1 / 6]) / 2)


@pytest.mark.parametrize("attention", ["softmax", "karat"])
def test_any_model_at_224(attention):
    torch.manual_seed(0)
    model = kl.create_model("vit_tiny", attention, depth=3)
    shown = picture(np.random.default_rng(0).random((300, 260, 3)), model)
    found = class_token_maps(model, shown.images)
    assert found.maps.shape == (1, 3, 3, 196) and found.grid == (14, 14)
    assert found.maps.dtype == torch.float32 and found.pushes.isfinite().all()


# ---- pictures of one's own ------------------------------------------------------------------------------------------


def test_a_picture_by_every_way_is_the_same(tmp_path):
    model = kl.create_model("vit_pico", img_size=8, patch_size=2)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    ways = {
        "path": tmp_path / "mine.png",
        "words": str(tmp_path / "mine.png"),
        "PIL": Image.open(tmp_path / "mine.png"),
        "array": pixels,
        "floats": pixels / 255,
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "tensor of floats": torch.from_numpy(pixels).permute(2, 0, 1) / 255,
    }
    for way, source in ways.items():
        got = picture(source, model)
        assert torch.equal(got.shown, torch.from_numpy(pixels).permute(2, 0, 1)), way
        assert torch.allclose(got.images, got.shown[None] / 127.5 - 1), way


def test_a_wide_picture_is_cropped_at_the_centre():
    model = kl.create_model("vit_pico", img_size=8, patch_size=2)
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 200
    assert (picture(wide, model).shown[:, :, 1:-1] == 200).all()
    assert picture(Image.new("L", (30, 20), 9), model).shown.unique().tolist() == [9]


MODEL = kl.create_model("vit_pico", img_size=8, patch_size=2, depth=2)
BAD = {
    "image size": (lambda: class_token_maps(MODEL, torch.zeros(1, 3, 9, 9)), r"\(B, 3, 8, 8\), got \(1, 3, 9, 9\)"),
    "one image": (lambda: class_token_maps(MODEL, torch.zeros(3, 8, 8)), r"takes images of shape .* got \(3, 8, 8\)"),
    "no image": (lambda: class_token_maps(MODEL, torch.zeros(0, 3, 8, 8)), "at least 1 image"),
    "bytes": (lambda: class_token_maps(MODEL, torch.full((1, 3, 8, 8), 200.0)), r"images lie in \[-1, 1\]"),
    "not finite": (lambda: class_token_maps(MODEL, torch.full((1, 3, 8, 8), math.nan)), "must be finite"),
    "class": (lambda: class_token_maps(MODEL, torch.zeros(1, 3, 8, 8), torch.tensor([10])), "from 0 to 9.*10"),
    "classes": (lambda: class_token_maps(MODEL, torch.zeros(1, 3, 8, 8), torch.tensor([1, 2])), "each of the 1 images"),
    "layer": (lambda: class_token_maps(MODEL, torch.zeros(1, 3, 8, 8)).kind("added", 2), "layers 0 to 1"),
    "kind": (lambda: class_token_maps(MODEL, torch.zeros(1, 3, 8, 8)).kind("roll"), "did you mean 'rollout'"),
    "signs": (lambda: class_token_maps(MODEL, torch.zeros(1, 3, 8, 8)).kind("added", 0, "abs"), "unknown signs"),
    "no layers": (lambda: rollout([]), "at least one"),
    "one map": (lambda: rollout([torch.zeros(4, 5, 5)]), r"\(B, h, N, N\).*\(4, 5, 5\)"),
    "rollout's signs": (lambda: rollout([], "both"), "unknown signs"),
    "channels last": (lambda: picture(torch.zeros(8, 8, 3), MODEL), r"channels first, got shape \(8, 8, 3\)"),
    "channels first": (lambda: picture(np.zeros((3, 8, 8)), MODEL), r"channels last, got shape \(3, 8, 8\)"),
    "range": (lambda: picture(np.full((8, 8, 3), 200.0), MODEL), r"\[0, 1\], got 200 .. 200: divide"),
    "normalised": (lambda: picture(torch.full((3, 8, 8), -1.0), MODEL), "to_unit"),
    "NaN": (lambda: picture(np.full((8, 8, 3), math.nan), MODEL), r"lie in \[0, 1\]"),
    "integers": (lambda: picture(np.zeros((8, 8, 3), dtype=np.int64), MODEL), "uint8.*int64"),
    "a list": (lambda: picture([[0.0]], MODEL), "got list"),
    "channels": (lambda: picture(np.zeros((8, 8, 3)), kl.create_model("vit_pico", in_chans=1)), "takes 1 channels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_bad_files_are_named(tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        picture(tmp_path / "nothing.png", MODEL)
    with pytest.raises(ValueError, match="cannot read the image .*words.png"):
        picture(tmp_path / "words.png", MODEL)


def test_weights_that_are_not_finite_are_named():
    model = kl.create_model("vit_pico", img_size=8, patch_size=2, depth=2)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"the weights blocks\.1\.attn\.qkv\.weight are no longer finite"):
        class_token_maps(model, torch.zeros(1, 3, 8, 8))


def test_large_models_look_at_fewer_images_at_a_time(monkeypatch):
    model, x = made(), images(5)
    whole = class_token_maps(model, x)
    counts, look = [], maps._look
    monkeypatch.setattr(
        maps, "_look", lambda model, some, target: counts.append(len(some)) or look(model, some, target)
    )
    monkeypatch.setattr(maps, "AT_ONCE", 2 * 17 * 2 * 64)
    assert torch.allclose(class_token_maps(model, x).pushes, whole.pushes) and counts == [2, 2, 1]
