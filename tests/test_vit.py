"""The Vision Transformer: the paper's parameter counts, timm's outputs, shared operators, attention's records."""

import pytest
import timm
import torch
from einops import rearrange

import karat_lite as kl

TINY = dict(img_size=8, patch_size=2, depth=3)  # on vit_pico: N = 17


def pico(attention="karat", seed=0, **options):
    torch.manual_seed(seed)
    return kl.create_model("vit_pico", attention, **{**TINY, **options})


# ---- parameters -----------------------------------------------------------------------------------------------------


def count(name, attention, **options):
    with torch.device("meta"):  # shapes without memory
        model = kl.create_model(name, attention, edge_scales=True, **options)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, grid, classes, softmax, blockwise, universal",
    [
        ("vit_base", 1, 10, "85.81", "87.51", "85.95"),
        ("vit_small", 3, 1000, "22.05", "23.58", "22.18"),
        ("vit_tiny", 3, 10, "5.53", "6.29", "5.59"),
    ],
)
def test_parameter_totals_of_the_paper(name, grid, classes, softmax, blockwise, universal):
    """Millions, to every digit that the paper prints (its table of parameters)."""
    options = dict(grid=grid, num_classes=classes)
    assert f"{count(name, 'softmax', num_classes=classes) / 1e6:.2f}" == softmax
    assert f"{count(name, 'karat', mode='blockwise', **options) / 1e6:.2f}" == blockwise
    assert f"{count(name, 'karat', mode='universal', **options) / 1e6:.2f}" == universal


# ---- the softmax twin is timm's ViT ---------------------------------------------------------------------------------


def timm_model(name, **options):
    """Random weights, every tensor away from its trivial start: biases from 0, norms from 1."""
    torch.manual_seed(0)
    model = timm.create_model(f"{name}_patch16_224", num_classes=10, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim == 1 else 0.02)
    return model


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base"])
def test_softmax_twin_gives_the_logits_of_timm(name):
    theirs, ours = timm_model(name), kl.create_model(name, "softmax").eval()
    assert kl.load_timm_weights(ours, theirs) == []
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, logits = theirs(images), ours(images)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().max() > 0.01  # the images matter
    assert (logits - expected).abs().max() / expected.abs().max() <= 1e-5


def test_karat_model_takes_timm_weights_and_keeps_its_operators():
    theirs, ours = timm_model("vit_tiny"), kl.create_model("vit_tiny", "karat")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    kept = kl.load_timm_weights(ours, theirs)
    after, source = ours.state_dict(), theirs.state_dict()
    assert sorted(kept) == sorted(
        f"blocks.{i}.attn.activation.{name}" for i in range(12) for name in ("coef", "weight")
    )
    for name, value in after.items():
        assert torch.equal(value, before[name] if name in kept else source[name]), name


def test_timm_weights_with_another_number_of_classes_leave_the_head():
    theirs, ours = timm_model("vit_tiny"), kl.create_model("vit_tiny", "softmax", num_classes=3)
    head = ours.head.weight.clone()
    assert kl.load_timm_weights(ours, theirs) == ["head.weight", "head.bias"]
    assert torch.equal(ours.head.weight, head) and torch.equal(ours.norm.weight, theirs.norm.weight)


@pytest.mark.parametrize(
    "ours, theirs, said",
    [
        (dict(depth=11), {}, "parts a plain ViT lacks, such as blocks.11"),
        (dict(depth=13), {}, "first blocks.12.norm1.weight: expected .*found nothing"),
        (dict(img_size=192), {}, r"first pos_embed: expected \(1, 145, 192\), found \(1, 197, 192\)"),
        (dict(dim=96), {}, "Build both with the same size"),
        (
            dict(num_heads=6),
            {},
            "has num_heads = 3, the model 6",
        ),  # the tensors would fit, the function would be another
        ({}, dict(reg_tokens=4), "first pos_embed"),
        ({}, dict(init_values=0.1), "such as blocks.0.ls1.gamma"),
        ({}, dict(class_token=False, global_pool="avg"), "first cls_token"),
    ],
)
def test_timm_models_that_do_not_fit_are_refused_whole(ours, theirs, said):
    model, source = kl.create_model("vit_tiny", "softmax", **ours), timm_model("vit_tiny", **theirs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        kl.load_timm_weights(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- blockwise and universal ----------------------------------------------------------------------------------------


def operators_of(model):
    """Every operator as (place in memory, head): h of them in one module."""
    return {(op.coef.data_ptr(), head) for op in model.operators() for head in range(op.num_heads)}


@pytest.mark.parametrize("options", [{}, dict(edge_scales=True), dict(rank=None)])
def test_universal_blocks_share_what_blockwise_blocks_own(options):
    heads, depth = 4, 3
    assert len(operators_of(pico(mode="blockwise", **options))) == heads * depth
    universal = pico(mode="universal", **options)
    assert len(operators_of(universal)) == heads and len(universal.operators()) == depth
    for name, value in universal.operators()[0].named_parameters():
        assert all(getattr(op, name) is value for op in universal.operators())


@pytest.mark.parametrize("rank", [5, None])
def test_universal_gradient_is_the_sum_over_blocks(rank):
    universal = pico(mode="universal", rank=rank, edge_scales=True).double()
    blockwise = pico(mode="blockwise", rank=rank, edge_scales=True).double()
    blockwise.load_state_dict(universal.state_dict())  # equal operators in every block
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outputs = [model(images) for model in (universal, blockwise)]
    assert torch.equal(*outputs)
    for logits in outputs:
        logits.square().sum().backward()
    for name, shared in universal.operators()[0].named_parameters():
        own = [getattr(op, name).grad for op in blockwise.operators()]
        assert len(own) == 3 and all((grad != 0).any() for grad in own if name != "w_b")
        torch.testing.assert_close(shared.grad, sum(own), rtol=1e-12, atol=1e-12 * shared.grad.abs().max().item())


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
def test_twins_from_one_seed_share_every_other_weight(mode):
    softmax, karat = pico("softmax").state_dict(), pico("karat", mode=mode).state_dict()
    only = {name for name in karat if name not in softmax}
    assert only and all(".attn.activation." in name for name in only)
    assert all(torch.equal(value, karat[name]) for name, value in softmax.items())
    other = pico("softmax", seed=1).state_dict()
    assert not torch.equal(other["blocks.2.mlp.fc2.weight"], softmax["blocks.2.mlp.fc2.weight"])


@pytest.mark.parametrize(
    "options", [{}, dict(mode="universal", grid=2, rank=None, edge_scales=True, init="paper", dim=32)]
)
@pytest.mark.parametrize("attention", ["softmax", "karat"])
def test_config_builds_the_like(attention, options):
    model = pico(attention, **options)
    again = kl.create_model(**model.config)
    assert again.config == model.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


# ---- what attention saw and did -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["softmax", "karat"])
def test_a_layer_records_scores_and_maps_that_explain_its_output(attention):
    torch.manual_seed(0)
    layer = kl.KArAttention(12, 3, 7, rank=4) if attention == "karat" else kl.MultiHeadAttention(12, 3)
    layer, x = layer.double(), torch.randn(2, 7, 12, dtype=torch.float64)
    out, record = layer(x, return_attention=True)
    q, k, v = rearrange(layer.qkv(x), "B N (three h d) -> three B h N d", three=3, h=3)
    assert record.scores.shape == record.maps.shape == (2, 3, 7, 7)
    torch.testing.assert_close(record.scores, q @ k.transpose(2, 3) / 2, rtol=1e-12, atol=1e-12)  # d = 4
    torch.testing.assert_close(record.maps @ v, layer.activation.attend(q, k, v), rtol=1e-12, atol=1e-12)
    by_hand = layer.proj(rearrange(record.maps @ v, "B h N d -> B N (h d)"))
    torch.testing.assert_close(out, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("attention, mode", [("softmax", "blockwise"), ("karat", "blockwise"), ("karat", "universal")])
def test_a_model_records_every_block(attention, mode):
    model, images = pico(attention, mode=mode), torch.randn(2, 3, 8, 8)
    logits, records = model(images, return_attention=True)
    assert torch.equal(logits, model(images)) and len(records) == 3
    for record, block in zip(records, model.blocks, strict=True):
        assert record.scores.shape == record.maps.shape == (2, 4, 17, 17)
        if attention == "softmax":
            torch.testing.assert_close(record.maps.sum(dim=-1), torch.ones(2, 4, 17))
            torch.testing.assert_close(record.maps, record.scores.softmax(dim=-1))
        else:
            assert torch.equal(record.maps, block.attn.activation.activate(record.scores))
            assert (record.maps < 0).any()


def test_tokens_are_the_class_token_then_the_patches_row_by_row():
    """A change of one patch reaches the scores of that token alone in the first block."""
    model = pico("softmax")
    images = torch.zeros(2, 3, 8, 8)
    images[1, :, 2:4, 6:8] = 1  # second row, last column of a 4 x 4 grid: token 1 + 7
    scores = model(images, return_attention=True)[1][0].scores
    changed = (scores[0] != scores[1]).any(dim=0)  # (k, q)
    assert [i for i in range(17) if changed[i, i]] == [8]


def test_an_empty_batch_gives_no_logits():
    for attention in ("softmax", "karat"):
        assert pico(attention)(torch.zeros(0, 3, 8, 8)).shape == (0, 10)


@pytest.mark.parametrize("part, said", [("act_layer", "blocks.0.mlp.act = ReLU"), ("norm_layer", "eps=0.01.* 1e-06")])
def test_timm_models_of_another_function_are_refused(part, said):
    import timm

    options = {part: {"act_layer": "relu", "norm_layer": lambda dim, **_: torch.nn.LayerNorm(dim, eps=1e-2)}[part]}
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=1, **options)
    model = kl.create_model("vit_tiny", "softmax", img_size=32, depth=1)
    with pytest.raises(ValueError, match=said + ".*its outputs would differ"):
        kl.load_timm_weights(model, source)


@pytest.mark.parametrize("attention", ["softmax", "karat"])
def test_gradients_of_single_images_by_vmap(attention):
    """torch.func looks at no numbers: the check for finite images stands aside."""
    torch.manual_seed(0)
    size = dict(img_size=8, patch_size=4, dim=16, depth=1, num_heads=2)
    model = kl.create_model("vit_pico", attention, **size, rank=2).eval()
    for operator in model.operators():
        operator.backend = "contraction"
    weights, images = dict(model.named_parameters()), torch.rand(3, 3, 8, 8)

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)
    for i in range(3):
        alone = torch.autograd.grad(loss(weights, images[i]), list(weights.values()))
        for name, found in zip(weights, alone, strict=True):
            torch.testing.assert_close(each[name][i], found, rtol=1e-4, atol=1e-5)


def test_an_exported_model_takes_any_batch():
    model = kl.create_model("vit_pico", "karat", img_size=8, patch_size=4, dim=16, depth=1, num_heads=2, rank=2).eval()
    program = torch.export.export(model, (torch.rand(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("B")},))
    images = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(images), model(images))
