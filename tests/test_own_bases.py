"""Bases of a user's own: a subclass is computed as it says, a model's basis has a name, and devices do not mix."""

import numpy as np
import pytest
import torch

import karat_lite as kl
from karat_lite.bases import _REGISTRY, basis_from_key, make_basis


@pytest.fixture
def damped():
    """Fourier's maps times a bell: `maps` alone is defined anew."""

    @kl.register_basis("damped")
    class Damped(kl.Fourier):
        def maps(self, x):
            for f, psi in super().maps(x):
                yield f, psi * torch.exp(-x.square())

    yield Damped
    del _REGISTRY["damped"]


@pytest.mark.parametrize("backend", ["contraction", "recompute", "auto"])
@pytest.mark.parametrize("full", [False, True])
def test_a_subclass_of_fourier_is_computed_by_its_own_maps(damped, backend, full):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).unbind(0)
    coef, weight = torch.randn(2, 5 if full else 3, 5, 6).double(), None if full else torch.randn(2, 5, 3).double()
    args = (q, k, v, make_basis("damped", 3), coef, weight)
    expected = kl.functional.karat_attention(*args, backend="reference")
    torch.testing.assert_close(kl.functional.karat_attention(*args, backend=backend), expected, rtol=1e-10, atol=1e-10)


def test_one_map_more_than_fourier():
    class Constant(kl.Fourier):
        @property
        def num_features(self):
            return super().num_features + 1

        def maps(self, x):
            yield from super().maps(x)
            yield 2 * self.grid, torch.ones_like(x)

    q = torch.randn(1, 1, 5, 4)
    args = (q, q, q, Constant(2), torch.randn(1, 3, 5, 5), torch.randn(1, 5, 3))
    expected = kl.functional.karat_attention(*args, backend="reference")
    torch.testing.assert_close(kl.functional.karat_attention(*args), expected)


def test_a_model_whose_basis_has_no_name_is_refused_before_it_is_trained():
    class Nameless(kl.Fourier):
        pass

    assert Nameless.name == ""  # not its parent's, by which a plain Fourier model would be loaded
    with pytest.raises(ValueError, match="@register_basis"):
        kl.create_model("vit_pico", img_size=8, patch_size=4, rank=2, basis=Nameless(2))
    with pytest.raises(ValueError, match="base=..."):
        kl.create_model("vit_pico", img_size=8, patch_size=4, rank=2, basis=kl.Fourier(2).with_base("silu"))
    with pytest.raises(ValueError, match="has none"):
        basis_from_key(Nameless(2).key)  # torch.compile would make a plain Fourier of it
    kl.KArAttention(8, 2, 5, basis=Nameless(2), rank=2)(torch.randn(1, 5, 8))  # a layer needs no name


@pytest.mark.parametrize("basis", kl.available_bases())
def test_bases_are_drawn_while_another_device_is_the_default(basis):
    with torch.device("meta"):
        layer = kl.KArAttention(8, 2, 5, basis=basis, rank=2)
    assert layer.activation.coef.device.type == "meta"
    torch.manual_seed(0)
    other = kl.KArAttention(8, 2, 5, basis=basis, rank=2)
    layer.to_empty(device="cpu").load_state_dict(other.state_dict())
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer(x), other(x))


def test_shannons_slope_is_right_where_its_formula_cancels():
    x = torch.tensor([1e-4, 5e-4, 5e-3, 0.05, 0.29, 0.31], dtype=torch.float64, requires_grad=True)
    shannon = type(make_basis("shannon"))
    # d/dx sin x / x = -x/3 + ..., window' = -0.23 sin(x/2): at 1e-4 -(1/3 + 0.115) 1e-4, known without cancelling
    assert shannon.psi_and_slope(x.detach())[1][0].item() == pytest.approx(-(1 / 3 + 0.115) * 1e-4, rel=1e-6)
    expected = torch.autograd.grad(shannon.psi(x).sum(), x)[0]
    torch.testing.assert_close(shannon.psi_and_slope(x.detach())[1], expected, rtol=1e-6, atol=1e-11)
    slope = shannon.psi_and_slope(x.detach().float())[1].double()
    torch.testing.assert_close(slope, expected, rtol=2e-5, atol=0)


def test_numbers_of_numpy_are_saved(tmp_path):
    sizes = dict(num_classes=np.int64(3), rank=np.int64(2), depth=np.int64(1), img_size=np.int64(8))
    model = kl.create_model("vit_pico", "hybrid", patch_size=np.int64(4), softmax_heads=np.arange(1), **sizes)
    kl.save_checkpoint(tmp_path / "m.safetensors", model)
    assert kl.load_checkpoint(tmp_path / "m.safetensors")[1]["config"]["rank"] == 2


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(edge_scales="no"), "edge_scales must be True or False, got 'no'"),
        (dict(simplex="no"), "simplex must be True or False, got 'no'"),
        (dict(basis="rbf", basis_options={"reach": float("inf")}), "reach must be > 0, got inf"),
        (dict(basis="rbf", basis_options={"reach": "4"}), "reach must be > 0, got '4'"),
        (dict(basis="rational", basis_options={"degrees": 5}), "degrees must be two numbers"),
        (dict(basis="rational", basis_options={"degrees": [3, 2, 1]}), "degrees must be two numbers"),
        (dict(basis_options="order"), "basis_options must be a dict"),
        (dict(attention="hybrid", softmax_heads=1), r"softmax_heads must be a list of heads, got 1: give \[1\]"),
        (dict(attention="hybrid", softmax_layers=1), r"softmax_layers must be a list of layers, got 1: give \[1\]"),
    ],
)
def test_options_of_a_wrong_kind_are_told(options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        kl.create_model("vit_pico", img_size=8, patch_size=4, **dict(rank=2) | options)


def test_arguments_of_attention_of_a_wrong_kind_are_told():
    q, coef, weight = torch.randn(1, 1, 5, 4), torch.randn(1, 3, 5, 6), torch.randn(1, 5, 3)
    with pytest.raises(TypeError, match="basis must be an object, as .*make_basis.* got 'fourier'"):
        kl.functional.karat_attention(q, q, q, "fourier", coef, weight)
    with pytest.raises(TypeError, match="coef must be a torch.Tensor, got ndarray"):
        kl.functional.karat_attention(q, q, q, kl.Fourier(3), coef.numpy(), weight)


def test_the_twin_of_a_hybrid_differs_in_one_word():
    options = dict(img_size=8, patch_size=4, rank=2, softmax_heads=[0], softmax_layers=[1])
    for attention in ("softmax", "static", "pooled"):
        kl.create_model("vit_pico", attention, **options)
    with pytest.raises(ValueError, match="'hybrid' takes at least one of the two, 'karat' neither"):
        kl.create_model("vit_pico", "karat", **options)


@pytest.mark.parametrize("order", ["w_phi", "phi_w", "phi_phi"])
def test_a_base_activation_adds_nothing_to_the_start_at_scores_of_zero(order):
    """And so what `init` says of the learned part is what a model starts with."""
    torch.manual_seed(0)
    plain = kl.operators.KArAtOperator(2, 17, "bspline", rank=4, order=order, base="zero", edge_scales=True)
    silu = kl.operators.KArAtOperator(2, 17, "bspline", rank=4, order=order, edge_scales=True)
    silu.load_state_dict(plain.state_dict())
    scores, large = torch.zeros(1, 2, 17, 17), torch.randn(1, 2, 17, 17)
    if order != "phi_phi":  # there the first units' sums are the second ones' scores
        torch.testing.assert_close(plain.activate(scores), silu.activate(scores))
    assert silu.activate(large).std() > 2 * plain.activate(large).std()
