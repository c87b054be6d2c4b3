"""The learnable operator: how it starts, what it counts, what it shows."""

import pytest
import torch

from karat_lite import Fourier, KArAtOperator, LinearBasis, available_bases, make_basis, register_basis
from karat_lite.functional import apply_operator, attention_scores

N, D = 17, 8
HEADS = 2_000  # every head is a draw of its own: a variance is measured to 2 % (one standard error), asked for to 8 %


def start(rank, init, grid=3):
    """An operator at its start, with Var(Y) and Var(O) / Var(V) over its heads, at scores of size about 1."""
    torch.manual_seed(0)
    operator = KArAtOperator(HEADS, N, grid=grid, rank=rank, init=init)
    q, k, v = (torch.randn(1, HEADS, N, D) for _ in range(3))
    with torch.no_grad():
        y = apply_operator(attention_scores(q, k), operator.basis, operator.coef)
        out = operator.attend(q, k, v)
    return operator, y.square().mean().item(), (out.square().mean() / v.square().mean()).item()


@pytest.mark.parametrize("rank", [1, 4, N])
@pytest.mark.parametrize("grid", [1, 5])
def test_variance_init_keeps_the_size_of_the_values(rank, grid):
    """Var(Y) = 1 after the units, Var(O) = Var(V) after the values, whatever rank and grid."""
    _, var_y, ratio = start(rank, "variance", grid)
    assert var_y == pytest.approx(1, rel=0.08)
    assert ratio == pytest.approx(1, rel=0.2 if rank == 1 else 0.1)  # r = 1: one product of normals, with long tails


def test_variance_init_of_the_full_rank_operator():
    """Here Y is the map itself: Var(Y) = 1/N, so that the sum over N values has theirs."""
    _, var_y, ratio = start(None, "variance")
    assert var_y == pytest.approx(1 / N, rel=0.08)
    assert ratio == pytest.approx(1, rel=0.08)


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("grid", [1, 3])
def test_paper_init(rank, grid):
    """a, b ~ N(0, 1) and W uniform on +-1/sqrt(r): Var(Y) is then N G."""
    operator, var_y, _ = start(rank, "paper", grid)
    assert operator.coef.mean().item() == pytest.approx(0, abs=0.01)
    assert operator.coef.std().item() == pytest.approx(1, rel=0.01)
    assert operator.coef.abs().max() > 4  # normal, not uniform
    assert var_y == pytest.approx(N * grid, rel=0.08)
    if rank is not None:
        bound = rank**-0.5
        assert 0.999 * bound < operator.weight.abs().max() <= bound
        assert operator.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


@pytest.mark.parametrize("init", ["variance", "paper"])
def test_edge_scales_start_at_one_and_change_nothing_then(init):
    torch.manual_seed(0)
    plain = KArAtOperator(2, 5, rank=3, init=init)
    torch.manual_seed(0)
    scaled = KArAtOperator(2, 5, rank=3, init=init, edge_scales=True)
    scores = torch.randn(1, 2, 5, 5)
    assert (scaled.w_b == 1).all() and (scaled.w_s == 1).all()
    assert torch.equal(plain.activate(scores), scaled.activate(scores))


def test_edge_scales_both_get_a_gradient():
    """w_b multiplies b(x) = 0: its gradient is 0, not None: distributed training refuses parameters that have none."""
    operator = KArAtOperator(2, 5, rank=3, edge_scales=True)
    operator.attend(*(torch.randn(1, 2, 5, 4) for _ in range(3))).sum().backward()
    assert operator.w_b.grad is not None and (operator.w_b.grad == 0).all()
    assert (operator.w_s.grad != 0).all()


@pytest.mark.parametrize("tokens, rank, grid", [(9, 4, 3), (9, None, 2), (1, 1, 1), (50, 12, 11)])
def test_number_of_parameters(tokens, rank, grid):
    """A head has r N (2G + 1) parameters, r N (2G + 3) with scales; full rank has no W: N^2 2G."""

    def count(**options):
        operator = KArAtOperator(3, tokens, grid=grid, rank=rank, **options)
        return sum(parameter.numel() for parameter in operator.parameters())

    edges, projector = (tokens**2, 0) if rank is None else (rank * tokens, 1)
    assert count() == 3 * edges * (2 * grid + projector)
    assert count(edge_scales=True) == 3 * edges * (2 * grid + projector + 2)


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("edge_scales", [False, True])
def test_curve_is_the_function_that_activation_applies(rank, edge_scales):
    """With all scores of one row at 0 but one, moving that one moves Y by phi_pq(x) - phi_pq(0)."""
    operator = KArAtOperator(2, 5, rank=rank, edge_scales=edge_scales).double()
    if edge_scales:
        torch.nn.init.normal_(operator.w_s)
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    head, p, q = 1, 2, 4
    scores = torch.zeros(len(x) + 1, 2, 5, 5, dtype=torch.float64)
    scores[1:, head, 0, q] = x
    y = apply_operator(scores, *operator.units())[:, head, 0, p]
    curve = operator.curve(torch.cat([x.new_zeros(1), x]), head, p, q)
    torch.testing.assert_close(curve[1:] - curve[0], y[1:] - y[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="q = 5 is out of range: .*from 0 to 4"):
        operator.curve(x, head, p, 5)
    with pytest.raises(ValueError, match="head = -1 is out of range"):
        operator.curve(x, -1, p, q)


def test_a_basis_of_ones_own():
    """Registered in a few lines, found by name, usable in an operator; a cell may run twice, a name is taken once."""

    def define():
        @register_basis("test_powers")
        class Powers(LinearBasis):
            num_features = property(lambda self: self.grid)

            def maps(self, x):
                yield from ((i, x ** (i + 1)) for i in range(self.grid))

        return Powers

    from karat_lite import bases

    try:
        define()
        powers = define()
        assert "test_powers" in available_bases() and isinstance(make_basis("test_powers", 2), powers)
        operator = KArAtOperator(1, 4, "test_powers", grid=2, rank=None).double()
        scores = torch.randn(1, 1, 4, 4, dtype=torch.float64)
        c = operator.coef[0]  # (p, q, F)
        expected = scores[0, 0] @ c[..., 0].T + scores[0, 0] ** 2 @ c[..., 1].T
        torch.testing.assert_close(operator.activate(scores)[0, 0], expected)
        with pytest.raises(ValueError, match="'fourier' exists already"):
            register_basis("fourier")(type("Other", (LinearBasis,), {}))
        with pytest.raises(TypeError, match="must be a subclass of LinearBasis or EdgeBasis"):
            register_basis("nothing")(dict)
    finally:
        bases._REGISTRY.pop("test_powers", None)
    assert "test_powers" not in available_bases()


def test_a_basis_object_keeps_its_own_grid():
    assert make_basis(Fourier(5), grid=2).grid == 5
    assert KArAtOperator(1, 4, basis=Fourier(5), rank=2).coef.shape == (1, 2, 4, 10)
