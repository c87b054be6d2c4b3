"""Every basis against an implementation of its own: plain numbers, `math` and scipy; values, derivatives, integrals."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.interpolate import BSpline

import karat_lite as kl
from karat_lite.bases import BASE_ACTIVATIONS, typical_scores

LINEAR = {  # name -> options
    "fourier": [dict(grid=1), dict(grid=4)],
    "bspline": [dict(grid=3), dict(grid=5, order=1), dict(grid=4, order=5, reach=2.0)],
    "chebyshev": [dict(grid=1), dict(grid=6)],
    "rbf": [dict(grid=1), dict(grid=5, reach=2.5)],
}
EDGE = {
    "rational": [{}, dict(degrees=(2, 3)), dict(degrees=(0, 1)), dict(degrees=(6, 1))],
    "mexican_hat": [{}], "morlet": [{}], "dog": [{}], "meyer": [{}], "shannon": [{}],
}  # fmt: skip
CASES = [(name, options) for name, variants in {**LINEAR, **EDGE}.items() for options in variants]
WAVELETS = [name for name in EDGE if name != "rational"]
# Away from kinks: Meyer at 0, Shannon at +-2 pi. Inside and outside of every support, and on both sides of |x| = 1.
X = [-7.3, -4.01, -2.43, -1.3, -0.97, -0.4, -0.013, 0.021, 0.33, 0.77, 1.02, 1.9, 3.3, 5.7]


# ---- the formulas once more, one number at a time -------------------------------------------------------------------


def nu(t):
    return t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)


def meyer_window(t):
    return 1.0 if t <= 0.5 else math.cos(math.pi / 2 * nu(2 * t - 1)) if t < 1 else 0.0


MOTHERS = {
    "mexican_hat": lambda x: 2 / (math.pi**0.25 * math.sqrt(3)) * (x * x - 1) * math.exp(-x * x / 2),
    "morlet": lambda x: math.cos(5 * x) * math.exp(-x * x / 2),
    "dog": lambda x: x * math.exp(-x * x / 2),
    "meyer": lambda x: math.sin(math.pi * abs(x)) * meyer_window(nu(min(max(abs(x), 0), 1))),
    "shannon": lambda x: (math.sin(x) / x if x else 1.0) * (0.54 + 0.46 * math.cos(x / 2)) * (abs(x) <= 2 * math.pi),
}


def scalar(name, basis, coef):
    """phi as a function of one number, from the definition."""
    c, G = coef.tolist(), basis.grid
    if name == "fourier":
        return lambda x: sum(c[m - 1] * math.cos(m * x) + c[G + m - 1] * math.sin(m * x) for m in range(1, G + 1))
    if name == "chebyshev":
        return lambda x: sum(c[m] * math.cos(m * math.acos(math.tanh(x))) for m in range(G + 1))
    if name == "rbf":
        reach = basis.options["reach"]
        centres, width = (np.linspace(-reach, reach, G), 2 * reach / (G - 1)) if G > 1 else ([0.0], reach)
        return lambda x: sum(a * math.exp(-((x - mu) ** 2) / (2 * width**2)) for a, mu in zip(c, centres, strict=True))
    if name == "bspline":
        k, reach = basis.options["order"], basis.options["reach"]
        knots = -reach + 2 * reach / G * np.arange(-k, G + k + 1)
        hats = [BSpline.basis_element(knots[j : j + k + 2], extrapolate=False) for j in range(G + k)]
        return lambda x: sum(a * np.nan_to_num(hat(x)) for a, hat in zip(c, hats, strict=True))
    if name == "rational":
        m, n = basis.options["degrees"]
        a, b = c[: m + 1], c[m + 1 :]
        return lambda x: sum(v * x**i for i, v in enumerate(a)) / (
            1 + abs(sum(v * x**i for i, v in enumerate(b, start=1)))
        )
    w, tau, log_s = c
    return lambda x: w * MOTHERS[name]((x - tau) / math.exp(log_s))


def made(name, options, seed=0):
    """A basis and one edge's parameters, in double precision."""
    basis = kl.make_basis(name, **options)
    coef = torch.randn(basis.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return basis, coef if name not in WAVELETS else coef * torch.tensor([1.0, 0.1, 0.2]).double()


@pytest.mark.parametrize("name, options", CASES)
def test_values_are_those_of_the_formula(name, options):
    basis, coef = made(name, options)
    phi = scalar(name, basis, coef)
    expected = torch.tensor([float(phi(x)) for x in X], dtype=torch.float64)
    found = basis.evaluate(torch.tensor(X, dtype=torch.float64), coef)
    assert expected.abs().max() > 0.05
    assert (found - expected).abs().max() / expected.abs().max() <= 1e-10


def slope(phi, x):
    """phi'(x) to about 1e-12: central differences, extrapolated twice."""
    d = [(phi(x + h) - phi(x - h)) / (2 * h) for h in (1e-3, 5e-4, 2.5e-4)]
    d = [(4 * b - a) / 3 for a, b in zip(d, d[1:], strict=False)]
    return (16 * d[1] - d[0]) / 15


@pytest.mark.parametrize("name, options", CASES)
def test_derivatives_are_those_of_the_formula(name, options):
    basis, coef = made(name, options)
    phi, x = scalar(name, basis, coef), torch.tensor(X, dtype=torch.float64)
    expected = torch.tensor([float(slope(phi, v)) for v in X], dtype=torch.float64)
    found = basis.derivative(x, coef)
    assert (found - expected).abs().max() / expected.abs().max() <= 1e-10


@pytest.mark.parametrize("name, options", CASES)
def test_gradients_with_respect_to_the_parameters(name, options):
    basis, coef = made(name, options, seed=1)
    x = torch.tensor(X, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: basis.evaluate(x, c), coef.requires_grad_(), atol=1e-7)


@pytest.mark.parametrize("name, integral", [
    ("mexican_hat", 0), ("dog", 0), ("morlet", 9.34e-6), ("meyer", 0.917), ("shannon", 3.15)
])  # fmt: skip
def test_integrals_of_the_wavelets(name, integral):
    psi = kl.make_basis(name).psi
    pieces = [-12, -2 * math.pi, -1, -0.5, 0, 0.5, 1, 2 * math.pi, 12]
    total = sum(
        integrate.quad(lambda x: psi(torch.tensor(x, dtype=torch.float64)).item(), a, b, epsabs=1e-12)[0]
        for a, b in zip(pieces, pieces[1:], strict=False)
    )
    assert total == pytest.approx(integral, rel=2e-3, abs=1e-10)


@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_tiny_scores_are_safe(name, options, dtype):
    """Finite values and gradients for |x| up to 1e4 and at the smallest numbers, for fifty draws of the parameters."""
    basis = kl.make_basis(name, **options)
    sizes = torch.logspace(-30, 4, 200, dtype=dtype)
    x = torch.cat([sizes, -sizes, sizes.new_tensor([0.0, 1.0, -1.0, 2 * math.pi])])[:, None].requires_grad_()
    coef = torch.randn(50, basis.num_parameters, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    value = basis.evaluate(x, coef)
    gradients = torch.autograd.grad(value.sum(), (x, coef))
    assert value.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_rational_has_no_pole():
    """Where the inner polynomial is 0 the denominator is 1; its kink there is the only one."""
    basis = kl.make_basis("rational", degrees=(1, 2))
    coef = torch.tensor([1.0, 0.0, -1.0, 1.0], dtype=torch.float64)  # 1 / (1 + |x^2 - x|): inner zeros at 0 and 1
    value = basis.evaluate(torch.tensor([0.0, 1.0, 1.0 + 1e-12], dtype=torch.float64), coef)
    assert (value - 1).abs().max() < 1e-11


def test_splines_sum_to_one_inside_and_vanish_outside():
    basis = kl.make_basis("bspline", grid=5, order=3, reach=2.0)
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    assert (basis.features(x).sum(dim=-1) - 1).abs().max() < 1e-14
    assert basis.features(torch.tensor([-9.0, 9.0])).abs().max() == 0
    assert basis.num_features == 5 + 3 and basis.default_base == "silu"


# ---- how they start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", CASES)
def test_variance_start_gives_a_sum_of_edges_variance_one(name, options):
    basis, edges = kl.make_basis(name, **options), 16
    coef = torch.empty(40_000, basis.num_parameters, dtype=torch.float64)
    torch.manual_seed(0)
    basis.draw(coef, "variance", edges)
    x, weight = typical_scores(201)
    second_moment = (weight * basis.evaluate(x[:, None], coef).square().mean(dim=1)).sum().item()
    assert edges * second_moment == pytest.approx(1, rel=0.1)  # rational functions have long tails


@pytest.mark.parametrize("name, options", CASES)
def test_paper_start(name, options):
    """N(0, 1) for what the paper says is N(0, 1); wavelets at tau = 0 and s = 1; splines near zero."""
    basis = kl.make_basis(name, **options)
    coef = torch.empty(20_000, basis.num_parameters)
    torch.manual_seed(0)
    basis.draw(coef, "paper", 16)
    if name in WAVELETS:
        assert (coef[:, 1:] == 0).all()
        coef = coef[:, :1]
    assert coef.std(dim=0).sub(0.1 if name == "bspline" else 1.0).abs().max() < 0.03 and coef.mean().abs() < 0.03


# ---- base activations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fourier", "dog"])
@pytest.mark.parametrize("base", [base for base in BASE_ACTIVATIONS if base != "zero"])
def test_a_base_activation_is_one_parameter_more(name, base):
    basis, x = kl.make_basis(name, 2), torch.linspace(-3, 3, 7, dtype=torch.float64)
    coef = torch.randn(basis.num_parameters + 1, dtype=torch.float64)
    b = {"identity": x, "silu": x / (1 + (-x).exp()), "gelu": x * (1 + torch.erf(x / 2**0.5)) / 2}[base]
    expected = basis.evaluate(x, coef[:-1]) + coef[-1] * b
    torch.testing.assert_close(basis.with_base(base).evaluate(x, coef), expected, rtol=1e-12, atol=1e-12)


# ---- a basis of one's own, and bad ones -----------------------------------------------------------------------------


@pytest.fixture
def registry():
    """Names that a test registers are gone after it."""
    from karat_lite import bases

    before = dict(bases._REGISTRY)
    yield
    bases._REGISTRY.clear()
    bases._REGISTRY.update(before)


def sawtooth():
    @kl.register_basis("sawtooth")
    class Sawtooth(kl.LinearBasis):
        num_features = property(lambda self: self.grid)

        def maps(self, x):
            yield from ((m, (m + 1) * x - torch.floor((m + 1) * x)) for m in range(self.grid))

    return Sawtooth


def test_a_basis_in_ten_lines_trains_saves_loads_and_plots(registry, tmp_path):
    sawtooth()
    data = kl.load_dataset("digits", "train", limit=256), kl.load_dataset("digits", "test", limit=100)
    torch.manual_seed(0)
    model = kl.create_model("vit_pico", basis="sawtooth", grid=2, img_size=8, patch_size=2, depth=2)
    history = kl.training.train(
        model, *data, kl.Recipe(epochs=2, warmup_epochs=1.0), device="cpu", out=tmp_path, progress=False
    )
    assert history.column("train_loss")[-1] < history.column("train_loss")[0]
    loaded, card = kl.load_checkpoint(tmp_path / "model.safetensors")
    assert card["config"]["basis"] == "sawtooth" and kl.evaluate(loaded, data[1]) == kl.evaluate(model, data[1])
    x = torch.linspace(-1, 1, 50)
    assert kl.plots.learned_functions(x, [loaded.operators()[0].curve(x, 0, 0, 1)]).axes


def test_a_checkpoint_says_which_basis_is_missing(registry, tmp_path):
    from karat_lite import bases

    sawtooth()
    path = kl.save_checkpoint(
        tmp_path / "m.safetensors",
        kl.create_model("vit_pico", basis="sawtooth", img_size=8, patch_size=2, depth=1),
    )
    bases._REGISTRY.pop("sawtooth")
    with pytest.raises(ValueError, match="uses the basis 'sawtooth', which is not registered here: run the code"):
        kl.load_checkpoint(path)


def test_wrong_shapes_are_named_when_a_basis_is_made(registry):
    @kl.register_basis("flat")
    class Flat(kl.LinearBasis):
        num_features = property(lambda self: 1)

        def maps(self, x):
            yield 0, x.mean(dim=-1)

    @kl.register_basis("short")
    class Short(kl.LinearBasis):
        num_features = property(lambda self: 3)

        def maps(self, x):
            yield from ((f, x) for f in range(2))

    @kl.register_basis("summed")
    class Summed(kl.EdgeBasis):
        def evaluate(self, x, coef):
            return (coef[..., 0] * x).sum(dim=-1)

    with pytest.raises(ValueError, match=r"'flat': each map must have the shape of x; .*\(2, 3\) the map f = 0 has"):
        kl.create_model("vit_pico", basis="flat", img_size=8, patch_size=2)
    with pytest.raises(ValueError, match=r"'short': maps\(x\) must yield .* 0 .. 2 .*, it yields f = \[0, 1\]"):
        kl.make_basis("short")
    with pytest.raises(ValueError, match=r"'summed': evaluate\(x, coef\) must broadcast .*expected \(4, 2, 3\)"):
        kl.make_basis("summed")


@pytest.mark.parametrize("name, options, kind, said", [
    ("bspline", dict(order=0), ValueError, "order must be >= 1, got 0"),
    ("bspline", dict(order=2.5), TypeError, "order must be a whole number"),
    ("bspline", dict(reach=-1.0), ValueError, r"reach must be > 0, got -1.0: the basis lives on \[-reach, reach\]"),
    ("rbf", dict(reach=0.0), ValueError, "reach must be > 0, got 0.0"),
    ("rational", dict(degrees=(5, 0)), ValueError, "degrees' n must be >= 1, got 0"),
    ("fourier", dict(order=3), TypeError, "basis 'fourier' does not take all of order"),
])  # fmt: skip
def test_bad_options_are_named(name, options, kind, said):
    with pytest.raises(kind, match=said):
        kl.make_basis(name, 3, **options)


def test_options_go_with_a_name_not_with_an_object():
    with pytest.raises(TypeError, match=r"Fourier\(grid=2\) is made already: give order"):
        kl.make_basis(kl.Fourier(2), order=3)
    assert repr(kl.make_basis("bspline", 4, order=2)) == "BSpline(grid=4, order=2, reach=4.0)"


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize(
    "name, options",
    [(name, {}) for name in ("dog", "mexican_hat", "morlet", "meyer", "shannon", "rational")]
    + [("rational", dict(degrees=degrees)) for degrees in ((2, 3), (0, 1), (4, 4))],
)
def test_gradients_that_a_basis_writes_down_are_those_of_its_formula(name, options, size):
    """`pull` against autograd through `evaluate`, every parameter, scores of any size."""
    basis, generator = kl.make_basis(name, **options), torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, coef, grad = size * normal(2, 3, 1, 50), normal(2, 3, 4, 1, basis.num_parameters), normal(2, 1, 4, 50)
    for found, wanted in zip(basis.pull(x, coef, grad), kl.EdgeBasis.pull(basis, x, coef, grad), strict=True):
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max() + 1e-14
