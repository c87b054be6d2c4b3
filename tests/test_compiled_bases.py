"""torch.compile carries a basis as text: what is made again from it must be the same basis, or be refused."""

import copy
from fractions import Fraction

import pytest
import torch

import karat_lite as kl
from karat_lite import bases
from karat_lite.functional import karat_attention


class Wave(kl.LinearBasis):
    """It has an option, and does not take it down itself."""

    num_features = 1

    def __init__(self, grid, speed=1.0):
        super().__init__(grid)
        self.speed = speed

    def maps(self, x):
        yield 0, torch.cos(float(self.speed) * x)


@pytest.fixture
def wave(monkeypatch):
    monkeypatch.setattr(bases, "_REGISTRY", dict(bases._REGISTRY))
    return kl.register_basis("wave")(type("Wave", (Wave,), {}))


def attend(basis, *, compiled: bool):
    q, k, v = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    coef, weight = torch.ones(2, 3, 5, 1), torch.ones(2, 5, 3)
    torch._dynamo.reset()  # it keeps eight versions of one function, and each class here makes one
    attention = torch.compile(karat_attention, fullgraph=True, backend="aot_eager") if compiled else karat_attention
    return attention(q, k, v, basis, coef, weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda wave: kl.make_basis("wave", 1, speed=3.0),
        lambda wave: wave(1, 3.0),
        lambda wave: wave(speed=3.0, grid=1),
        lambda wave: copy.deepcopy(wave(1, speed=3.0)),
        lambda wave: bases.basis_from_key(wave(1, speed=3.0).key),
    ],
    ids=["by name", "by position", "by keyword", "copied", "made again"],
)
def test_options_are_kept(wave, make):
    basis = make(wave)
    assert basis.options == {"speed": 3.0} and repr(basis) == "Wave(grid=1, speed=3.0)"
    assert torch.equal(attend(basis, compiled=True), attend(basis, compiled=False))
    assert not torch.allclose(attend(basis, compiled=True), attend(wave(1), compiled=False))


def test_a_cell_that_is_run_again_defines_what_is_computed(wave):
    """Made once for each key, a basis is still not older than its class."""
    slow = attend(wave(1), compiled=True)

    class Steeper(Wave):
        def maps(self, x):
            yield 0, torch.cos(5 * x)

    Steeper.__module__, Steeper.__qualname__ = wave.__module__, wave.__qualname__
    again = kl.register_basis("wave")(Steeper)
    found = attend(again(1), compiled=True)
    assert torch.equal(found, attend(again(1), compiled=False)) and not torch.allclose(found, slow)


def test_a_base_activation_comes_along(wave):
    basis = wave(1, speed=3.0).with_base("silu")
    again = bases.basis_from_key(basis.key)
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(again.features(x), basis.features(x)) and again.num_features == 2


def test_what_cannot_be_made_again_is_refused(wave):
    with pytest.raises(ValueError, match="from its name, and this one has none: register_basis it"):
        attend(Wave(1), compiled=True)
    with pytest.raises(ValueError, match="must be plain numbers, text, lists or dicts, got .*Fraction"):
        attend(wave(1, speed=Fraction(3)), compiled=True)
    assert attend(Wave(1), compiled=False).isfinite().all()
