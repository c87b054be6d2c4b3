"""What a class derived from a basis, or an object without a name, computes: what it says, or a clear refusal."""

import pytest
import torch

import karat_lite as kl
from karat_lite.bases import _REGISTRY, LinearBasis, basis_from_key, make_basis
from karat_lite.edge_bases import DOG, EdgeBasis, MexicanHat, Wavelet
from karat_lite.functional import apply_operator, karat_attention


class Tanh(DOG):
    psi = staticmethod(torch.tanh)


class Three(DOG):
    def evaluate(self, x, coef):
        return 3 * super().evaluate(x, coef)


class TanhMixin:
    psi = staticmethod(torch.tanh)


class Mixed(TanhMixin, MexicanHat):
    """Its function comes from beside its parent."""


class Step(EdgeBasis):
    rest = (0.5,)

    def evaluate(self, x, coef):
        return coef[..., 0] * (x > coef[..., 1])


class Bump(Wavelet):
    @staticmethod
    def psi(x):
        return torch.exp(-x.square())


class Shifted(LinearBasis):
    """Raw maps that are not its maps."""

    num_features = 1

    def maps(self, x):
        yield 0, x

    def write(self, x, out):
        out[0].copy_(x + 1)

    def mixing(self):
        return torch.ones(1, 1), torch.zeros(1, 1)


class Short(LinearBasis):
    """One map less than it says."""

    num_features = 3

    def maps(self, x):
        yield from ((0, x), (1, x * x))


class Late(LinearBasis):
    """An option, and a grid that need not be given."""

    num_features = 1

    def __init__(self, grid=3, speed=1.0):
        super().__init__(grid)
        self.speed = speed

    def maps(self, x):
        yield 0, torch.sin(self.speed * x)


class Loose(Late):
    def __init__(self, grid, **options):
        super().__init__(grid, **options)


@pytest.mark.parametrize("cls", [Tanh, Three, Bump, Mixed, Step])
def test_slopes_are_those_of_the_class_and_not_of_its_parent(cls):
    torch.manual_seed(0)
    basis = cls(3)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    coef = torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    found = torch.autograd.grad((apply_operator(x, basis, coef) * weights).sum(), (x, coef))
    units = basis.evaluate(x.unsqueeze(3), coef[:, None].unsqueeze(0))  # (B, h, k, p, q)
    wanted = torch.autograd.grad((units.sum(dim=-1) * weights).sum(), (x, coef), materialize_grads=True)
    for mine, its in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)
    assert MexicanHat.pull is Wavelet.pull, "a class with slopes of its own keeps the quick way"


@pytest.mark.parametrize("cls, message", [(Shifted, "what `write` and `mixing` make"), (Short, "once for each f in 0")])
def test_an_object_is_looked_at_like_a_name(cls, message):
    q, basis = torch.randn(1, 1, 5, 4), cls(1)
    coef = torch.randn(1, 3, 5, basis.num_features)
    uses = lambda: make_basis(cls(1)), lambda: karat_attention(q, q, q, cls(1), coef, torch.randn(1, 5, 3))  # noqa: E731
    try:
        kl.register_basis("odd")(cls)
        for use in (*uses, lambda: make_basis("odd", 1), lambda: make_basis("odd", 1)):  # a refusal is not forgotten
            with pytest.raises(ValueError, match=message):
                use()
    finally:
        del _REGISTRY["odd"]


GIVEN = {
    "by name alone": (Late, lambda: Late(speed=2.0)),
    "by name": (Late, lambda: Late(3, speed=2.0)),
    "by place": (Late, lambda: Late(3, 2.0)),
    "as what else is given": (Loose, lambda: Loose(3, speed=2.0)),
}


@pytest.mark.parametrize("how", GIVEN)
def test_options_are_kept_however_they_are_given(how, tmp_path):
    cls, make = GIVEN[how]
    kl.register_basis("late")(cls)
    try:
        basis = make()
        assert basis.options == {"speed": 2.0} and basis_from_key(basis.key).speed == 2.0
        model = kl.create_model("vit_pico", basis=basis, img_size=8, patch_size=4, rank=2, depth=1)
        again, _ = kl.load_checkpoint(kl.save_checkpoint(tmp_path / "m.safetensors", model))
        assert again.operators()[0].basis.speed == 2.0
    finally:
        del _REGISTRY["late"]


def test_options_that_no_card_can_say_are_refused_before_a_training():
    kl.register_basis("late")(Late)
    try:
        with pytest.raises(TypeError, match="a model's card is JSON, which cannot say the options"):
            kl.create_model(
                "vit_pico", basis=Late(speed=torch.tensor(2.0)), img_size=8, patch_size=4, rank=2, depth=1
            )
    finally:
        del _REGISTRY["late"]


@pytest.mark.parametrize("name", ["fourier", "dog"])
def test_one_base_activation_is_enough(name):
    with pytest.raises(ValueError, match="has the base activation 'silu': 'gelu' cannot be a second one"):
        make_basis(name).with_base("silu").with_base("gelu")


def test_a_name_in_brackets():
    with pytest.raises(TypeError, match="takes the name of the basis, got <class .*put it in brackets"):
        kl.register_basis(Late)


def test_a_slope_while_nothing_records():
    x, coef = torch.linspace(-2, 2, 9), torch.randn(3)
    wanted = make_basis("dog").derivative(x, coef)
    with torch.inference_mode():
        found = make_basis("dog").derivative(torch.linspace(-2, 2, 9), coef)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["fourier", "dog"])
def test_autocast_rounds_no_function(name):
    basis, x = make_basis(name), torch.randn(1, 2, 5, 5)
    coef, v = torch.randn(2, 5, 5, basis.num_parameters), torch.randn(1, 2, 5, 4)
    for use in (lambda: apply_operator(x, basis, coef), lambda: kl.functional.mix_values(x, basis, coef, v)):
        wanted = use()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(use(), wanted)


class Powers(LinearBasis):
    """1, x, x^2 in one tensor that goes on changing."""

    num_features = 3

    def maps(self, x):
        t = torch.ones_like(x)
        for f in range(3):
            yield f, t
            t *= x


class Truths(LinearBasis):
    num_features = 1

    def maps(self, x):
        yield 0, x > 0


class Slopeless(LinearBasis):
    """Right maps, and slopes that are not theirs."""

    num_features = 1

    def maps(self, x):
        yield 0, x

    def write(self, x, out):
        out[0].copy_(x)

    def mixing(self):
        return torch.ones(1, 1), torch.ones(1, 1)


class Unbalanced(DOG):
    psi_and_slope = staticmethod(lambda x: (DOG.psi(x), x))


class Uncounted(EdgeBasis):
    num_parameters = 3

    def evaluate(self, x, coef):
        return coef.sum(dim=-1) * x


REFUSED = {
    Powers: "the map f = 0 is changed in place after it was yielded: make each map a tensor of its own",
    Truths: "maps must be numbers like x, got torch.bool",
    Slopeless: "the second matrix of `mixing` does not give the maps' slopes",
    Unbalanced: "what `pull` gives are not the slopes of `evaluate`",
    Uncounted: "num_parameters = 3, a factor and 0 numbers in `rest`: say in `rest` where the others start",
}


@pytest.mark.parametrize("cls", REFUSED)
def test_a_class_that_contradicts_itself_is_refused(cls):
    with pytest.raises(ValueError, match=REFUSED[cls]):
        kl.KArAtOperator(1, 5, cls(2), rank=2)


def test_options_of_a_subclass_stand_beside_its_parents():
    class Moved(kl.linear_bases.RBF):
        def __init__(self, grid, reach=4.0, shift=0.0):
            super().__init__(grid, reach)
            self.shift = shift

    assert Moved(3, shift=2.0).options == {"shift": 2.0, "reach": 4.0}


def test_a_function_without_slope_has_the_slope_zero():
    class Stairs(LinearBasis):
        num_features = 1

        def maps(self, x):
            yield 0, (x > 0).to(x.dtype)

    x = torch.linspace(-1, 1, 5)
    assert torch.equal(Stairs(1).derivative(x, torch.ones(1)), torch.zeros(5))
    assert torch.equal(Step(1).derivative(x, torch.tensor([1.0, 0.5])), torch.zeros(5))


@pytest.mark.parametrize("basis, grid, reach", [("rbf", 1, 0.05), ("rbf", 3, 0.05), ("bspline", 3, 0.05)])
def test_narrow_functions_start_at_variance_one_too(basis, grid, reach):
    torch.manual_seed(0)
    op = kl.KArAtOperator(4, 17, basis, grid, rank=4, basis_options={"reach": reach}, base="zero")
    scores, v = torch.randn(400, 4, 17, 17), torch.randn(400, 4, 17, 8)
    assert 0.3 < (op.activate(scores) @ v).var().item() < 3


def test_a_function_that_is_zero_everywhere_has_no_variance():
    class Nothing(LinearBasis):
        num_features = 1

        def maps(self, x):
            yield 0, 0 * x

    with pytest.raises(ValueError, match="mean square 0 at scores of N.* which no factor brings to a variance"):
        kl.KArAtOperator(2, 5, Nothing(1), rank=2)
