"""The layer that never forms its values: the usual layer's numbers and gradients, and when it steps aside."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import karat_lite as kl
from karat_lite import few_units
from karat_lite.analysis import cost
from karat_lite.attention import KArAttention, MultiHeadAttention, SoftmaxActivation


def layer(rank=8, dim=64, heads=2, tokens=17, **options):
    torch.manual_seed(0)
    made = KArAttention(dim, heads, tokens, rank=rank, **options).double()
    nn.init.normal_(made.qkv.bias)  # zero at the start: a bias that is lost would not be seen
    nn.init.normal_(made.proj.bias)
    return made


def taken(made, x) -> bool:
    return few_units.pays(x, made)


def tokens(images=3, n=17, dim=64):
    return torch.randn(images, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def value_and_gradients(made, x):
    x = x.clone().requires_grad_()
    out = made(x)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *made.parameters()])]


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"rank": 1}, {"rank": 16}, {"basis": "bspline", "edge_scales": True}, {"grid": 11, "base": "silu"}]
)
def test_equals_the_layer_in_its_usual_order(images, options):
    made, x = layer(**options), tokens(images)
    assert taken(made, x)
    found = value_and_gradients(made, x)
    made.activation.backend = "reference"
    assert not taken(made, x)
    for mine, wanted in zip(found, value_and_gradients(made, x), strict=True):
        assert mine.shape == wanted.shape
        assert (mine - wanted).abs().max() <= 1e-10 * wanted.abs().max() + 1e-12


def test_float32_is_as_good_as_the_usual_order():
    made, x = layer(), tokens()
    made.activation.backend = "reference"
    wanted = value_and_gradients(made, x)
    made.activation.backend = "auto"
    for mine, its in zip(value_and_gradients(made.float(), x.float()), wanted, strict=True):
        assert (mine - its).abs().max() <= 1e-5 * its.abs().max()


def test_no_images():
    made = layer()
    assert made(tokens(0)).shape == (0, 17, 64)


def hooked():
    made = layer()
    made.qkv.register_forward_hook(lambda module, given, out: None)
    return made


def replaced():
    made = layer()
    made.proj = nn.Sequential(made.proj)
    return made


def pruned():
    made = layer()
    prune.random_unstructured(made.qkv, "weight", 0.5)
    return made


def other_backend():
    made = layer()
    made.activation.backend = "contraction"
    return made


def softmax():
    made = layer()
    made.activation = SoftmaxActivation()
    return made


class Doubled(kl.KArAtOperator):
    def attend(self, q, k, v):
        return 2 * super().attend(q, k, v)


def derived():
    return MultiHeadAttention(64, 2, Doubled(2, 17, rank=8)).double()


def patched():
    made = layer()
    made.activation.attend = lambda q, k, v: 2 * type(made.activation).attend(made.activation, q, k, v)
    return made


def without_bias(name):
    made = layer()
    made.get_submodule(name).register_parameter("bias", None)
    return made


def watched(how):
    made = layer()
    getattr(made.qkv, how)(lambda *given: None)
    return made


def another_forward():
    made = layer()
    usual = made.proj.forward
    made.proj.forward = lambda x: 2 * usual(x)
    return made


ASIDE = {
    "more than d / 2 units": lambda: layer(rank=17),
    "full rank": lambda: layer(rank=None),
    "another order": lambda: layer(order="phi_w"),
    "rows on the simplex": lambda: layer(simplex=True),
    "parameters inside the functions": lambda: layer(basis="rational"),
    "another backend": other_backend,
    "softmax": softmax,
    "a projection that is watched": hooked,
    "a projection that is no nn.Linear": replaced,
    "a projection that is pruned": pruned,
    "queries without a bias": lambda: without_bias("qkv"),
    "an output without a bias": lambda: without_bias("proj"),
    "a projection whose gradient is watched": lambda: watched("register_full_backward_hook"),
    "a projection whose gradient is watched before": lambda: watched("register_full_backward_pre_hook"),
    "a projection that computes in another way": another_forward,
    "an operator that attends in its own way": derived,
    "an operator whose attend was replaced": patched,
}


@pytest.mark.parametrize("why", ASIDE)
def test_steps_aside(why):
    made, x = ASIDE[why](), tokens()
    assert not taken(made, x)
    assert made(x).isfinite().all()


@pytest.mark.parametrize("make", [derived, patched])
def test_an_attend_of_its_own_is_what_the_layer_computes(make):
    made, x = make(), tokens()
    plain = MultiHeadAttention(64, 2, kl.KArAtOperator(2, 17, rank=8)).double()
    plain.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert ((made(x) - made.proj.bias) - 2 * (plain(x) - plain.proj.bias)).abs().max() <= 1e-10


def test_an_operator_for_other_heads_is_refused_as_before():
    with pytest.raises(ValueError, match="built for 4 heads and 17 tokens"):
        MultiHeadAttention(64, 2, kl.KArAtOperator(4, 17, rank=8))(tokens().float())


def test_steps_aside_under_autocast_and_for_half_precision():
    made, x = layer().float(), tokens().float()
    assert taken(made, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken(made, x) and made(x).dtype == torch.bfloat16
    assert not taken(made.bfloat16(), x.bfloat16())
    made = layer().float()
    made.activation.half()  # coefficients may be half as wide as the rest
    assert not taken(made, x) and made(x).isfinite().all()


def test_a_hook_still_sees_the_projections():
    seen = []
    made = layer()
    made.proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    made(tokens())
    assert seen == [(3, 17, 64)]


def test_values_and_outputs_are_not_kept_and_products_are_fewer():
    options = dict(img_size=224, patch_size=16, num_classes=10, depth=1)
    model, usual = (kl.create_model("vit_tiny", **options) for _ in range(2))
    # A hook that does nothing: the same backend, the usual order.
    usual.blocks[0].attn.qkv.register_forward_hook(lambda module, given, out: None)
    x = torch.randn(2, 3, 224, 224)
    kept = [cost.kept_bytes(lambda m=m: m(x), m.parameters()) for m in (model, usual)]
    flops = [cost.count(lambda m=m: m(x)).flops for m in (model, usual)]
    one = 4 * 2 * 197 * 192  # bytes of a (B, N, dim)
    assert kept[1] - kept[0] > 1.4 * one  # V and O, less (B, h r, dim) three times
    dim, r, n, d = 192, 12, 197, 64
    saved = 2 * n * dim * dim + 2 * n * r * dim - 2 * n * 3 * r * dim - 2 * 3 * r * dim * d
    assert flops[1] - flops[0] == 2 * 2 * saved


def test_wrong_number_of_tokens_is_refused_as_before():
    with pytest.raises(ValueError, match="built for 2 heads and 17 tokens"):
        layer()(tokens(n=18))


def test_compiles_without_a_break():
    made = layer()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for mine, its in zip(value_and_gradients(compiled, tokens()), value_and_gradients(made, tokens()), strict=True):
        assert (mine - its).abs().max() <= 1e-10 * its.abs().max() + 1e-12
