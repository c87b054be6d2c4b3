"""Orders of operator and projector, base activations, projection, hybrids, bases with parameters inside, other grids:
each against loops over single numbers, in double precision."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

import karat_lite as kl
from karat_lite.functional import attention_scores, project_simplex

B, H, N, R, D = 2, 2, 5, 3, 4
BASES = ["fourier", "bspline", "chebyshev", "rbf", "rational", "mexican_hat", "morlet", "dog", "meyer", "shannon"]
KINDS = [("w_phi", R), ("phi_w", R), ("phi_phi", R), ("w_phi", None)]
BASE = {
    "zero": lambda x: 0.0,
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
}


def operator(basis="fourier", order="w_phi", rank=R, tokens=N, seed=0, **options):
    """In double precision, with scales away from 1, wavelets from tau = 0 and s = 1."""
    torch.manual_seed(seed)
    made = kl.KArAtOperator(H, tokens, basis, 2, rank, order=order, **options).double()
    for name, parameter in made.named_parameters():
        if name.startswith("w_"):
            torch.nn.init.normal_(parameter)
        elif basis not in ("fourier", "bspline", "chebyshev", "rbf", "rational") and name.startswith("coef"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def qkv(tokens=N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, B, H, tokens, D, dtype=torch.float64, generator=generator).unbind(0)


def unit(op, stage, head, p, q, x):
    """w_b b(x) + w_s phi(x) for one number; phi of one edge is tested against its formula in test_bases.py."""
    w_b, w_s = (getattr(op, name + stage) for name in ("w_b", "w_s"))
    coef = getattr(op, "coef" + stage)[head, p, q]
    phi = op.basis.evaluate(torch.tensor(x, dtype=torch.float64), coef).item()
    scale = 1.0 if w_s is None else w_s[head, p, q].item()
    return scale * phi + (1.0 if w_b is None else w_b[head, p, q].item()) * BASE[op.base](x)


@torch.no_grad()
def by_definition(op, scores):
    """The activated map of every row, by loops."""
    out = torch.empty_like(scores)
    for i, head, k in itertools.product(range(B), range(H), range(scores.shape[2])):
        row = scores[i, head, k].tolist()

        def phi(values, stage="", head=head):
            units = getattr(op, "coef" + stage).shape[1]
            return [sum(unit(op, stage, head, p, q, x) for q, x in enumerate(values)) for p in range(units)]

        def project(values, head=head):
            return [sum(w * v for w, v in zip(line, values, strict=True)) for line in op.weight[head].tolist()]

        if op.order == "phi_w":
            row = phi(project(row))
        elif op.order == "phi_phi":
            row = phi(phi(row), "2")
        else:
            row = phi(row) if op.rank is None else project(phi(row))
        out[i, head, k] = torch.tensor(row, dtype=torch.float64)
    return out


def error(found, reference) -> float:
    assert found.shape == reference.shape
    return ((found - reference).abs().max() / reference.abs().max()).item()


def agree(op):
    q, k, v = qkv()
    expected = by_definition(op, attention_scores(q, k))
    assert error(op.activate(attention_scores(q, k)), expected) <= 1e-12
    assert error(op.attend(q, k, v), expected @ v) <= 1e-12


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("order, rank", KINDS)
def test_orders_equal_their_definition(basis, order, rank):
    agree(operator(basis, order, rank))


@pytest.mark.parametrize("basis", ["fourier", "dog"])
@pytest.mark.parametrize("base", list(BASE))
@pytest.mark.parametrize("order, rank", KINDS)
@pytest.mark.parametrize("edge_scales", [False, True])
def test_base_activations_and_scales_equal_their_definition(basis, base, order, rank, edge_scales):
    agree(operator(basis, order, rank, base=base, edge_scales=edge_scales))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rank", [R, None])
def test_reference_and_contraction_agree_with_gradients(basis, rank):
    op, results = operator(basis, rank=rank), {}
    for backend in ("reference", "contraction"):
        tensors = [x.clone().requires_grad_() for x in (*qkv(), op.coef.detach())]
        weight = None if rank is None else op.weight.detach().clone().requires_grad_()
        out = kl.functional.karat_attention(*tensors[:3], op.basis, tensors[3], weight, backend=backend)
        out.square().sum().backward()
        results[backend] = [out, *(t.grad for t in [*tensors, weight] if t is not None)]
    for found, reference in zip(results["contraction"], results["reference"], strict=True):
        assert error(found, reference) <= 1e-12


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("order, rank", KINDS)
def test_gradcheck(basis, order, rank):
    """With respect to tokens and all parameters of the operator; random scores keep away from the kinks."""
    op = operator(basis, order, rank and 2, tokens=3, edge_scales=True, base="silu")
    layer = kl.MultiHeadAttention(2 * D, H, op).double()
    values = {name: value.detach() for name, value in layer.named_parameters()}
    learned = {name: value for name, value in values.items() if name.startswith("activation.")}
    x = torch.randn(1, 3, 2 * D, dtype=torch.float64)

    def attend(x, *tensors):
        return torch.func.functional_call(layer, values | dict(zip(learned, tensors, strict=True)), (x,))

    inputs = [tensor.requires_grad_() for tensor in (x, *learned.values())]
    assert torch.autograd.gradcheck(attend, inputs, atol=1e-6)


@pytest.mark.parametrize("order, rank", KINDS)
@pytest.mark.parametrize("basis", ["fourier", "chebyshev", "dog"])
@pytest.mark.parametrize("init, expected", [("variance", 1), ("softmax", 1 / 17)])
def test_a_start_gives_the_output_its_size(order, rank, basis, init, expected):
    """Variance of the output over that of 17 values at the start, over many heads; scores of size 1."""
    torch.manual_seed(0)
    heads, n, d = 1500, 17, 8
    op = kl.KArAtOperator(heads, n, basis, 3, rank and 4, init=init, order=order)
    q, k, v = torch.randn(3, 1, heads, n, d)
    with torch.no_grad():
        ratio = (op.attend(q, k, v).square().mean() / v.square().mean()).item()
    assert ratio == pytest.approx(expected, rel=0.25)


# ---- the simplex ----------------------------------------------------------------------------------------------------


def test_projection_fulfils_its_optimality_conditions():
    """x >= 0, sum x = 1, and one lambda with x_i = y_i - lambda on the support, y_i <= lambda off it: 1,000 rows."""
    torch.manual_seed(0)
    scale = torch.logspace(-3, 3, 1000, dtype=torch.float64)[:, None]
    y = scale * torch.randn(1000, 17, dtype=torch.float64)
    x = project_simplex(y)
    tolerance = 1e-12 * scale.clamp(min=1)[:, 0]
    assert (x >= 0).all() and ((x.sum(dim=1) - 1).abs() <= tolerance).all()
    on = x > 0
    shift = torch.where(on, y - x, torch.nan)
    low, high = shift.nan_to_num(math.inf).amin(1), shift.nan_to_num(-math.inf).amax(1)
    assert ((high - low).abs() <= tolerance).all()
    assert (torch.where(on, -math.inf, y).amax(1) <= low + tolerance).all()
    assert on.sum(dim=1).unique().numel() > 3  # supports of many sizes


def test_projection_of_what_lies_there_already_and_of_ties():
    inside = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert (project_simplex(inside) - inside).abs().max() < 1e-15
    assert torch.equal(project_simplex(torch.full((4,), 7.0)), torch.full((4,), 0.25))
    assert torch.equal(project_simplex(torch.tensor([-3.0])), torch.ones(1))
    assert project_simplex(torch.randn(2, 3, 6).bfloat16()).dtype == torch.bfloat16


def test_gradient_of_the_projection():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(project_simplex, torch.randn(20, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("order, rank", KINDS)
def test_a_projected_operator(order, rank):
    op, (q, k, v) = operator(order=order, rank=rank, simplex=True), qkv()
    free = operator(order=order, rank=rank)
    maps = op.activate(attention_scores(q, k))
    assert torch.equal(maps, project_simplex(free.activate(attention_scores(q, k))))
    assert (maps >= 0).all() and (maps.sum(-1) - 1).abs().max() < 1e-12
    assert error(op.attend(q, k, v), maps @ v) <= 1e-12


@pytest.mark.parametrize("order, rank", KINDS)
@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("half", ["autocast", "parameters"])
def test_scores_and_basis_stay_in_single_precision(order, rank, simplex, half):
    """Under autocast, and in a model whose parameters are bfloat16: as exact as float32 is from the same numbers."""
    op = operator(order=order, rank=rank, simplex=simplex, edge_scales=True, base="silu").float()
    inputs = [x.float() for x in qkv()]
    if half == "parameters":
        op, inputs = op.bfloat16(), [x.bfloat16() for x in inputs]
    exact = operator(order=order, rank=rank, simplex=simplex, edge_scales=True, base="silu")
    exact.load_state_dict(op.state_dict())
    q, k, v = (x.double() for x in inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half == "autocast"):
        maps, out = op.activate(attention_scores(*inputs[:2])), op.attend(*inputs)
    assert maps.dtype == torch.float32 and out.dtype == inputs[2].dtype
    assert error(maps.double(), exact.activate(attention_scores(q, k))) < 1e-4
    assert error(out.double(), exact.attend(q, k, v)) < (1e-4 if half == "autocast" else 2**-8)


# ---- hybrids --------------------------------------------------------------------------------------------------------

PICO = dict(img_size=8, patch_size=2, depth=3)


def pico(attention, **options):
    torch.manual_seed(0)
    return kl.create_model("vit_pico", attention, **PICO, **options)


@pytest.mark.parametrize("options", [dict(softmax_heads=range(4)), dict(softmax_layers=range(3))])
def test_a_hybrid_of_softmax_alone_is_the_softmax_model(options):
    images = torch.randn(2, 3, 8, 8)
    hybrid, softmax = pico("hybrid", **options), pico("softmax")
    assert torch.equal(hybrid(images), softmax(images)) and hybrid.operators() == []


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
@pytest.mark.parametrize("heads", [[0], [3], [1, 2], [2, 0, 3]])
def test_each_head_of_a_hybrid_does_what_it_should(heads, mode):
    model = pico("hybrid", softmax_heads=heads, mode=mode, rank=4).double()
    _, records = model(torch.randn(2, 3, 8, 8, dtype=torch.float64), return_attention=True)
    learned = [head for head in range(4) if head not in heads]
    for record, op in zip(records, model.operators(), strict=True):
        assert op.num_heads == len(learned)
        torch.testing.assert_close(record.maps[:, heads], record.scores[:, heads].softmax(-1), rtol=1e-12, atol=0)
        torch.testing.assert_close(record.maps[:, learned], op.activate(record.scores[:, learned]), rtol=0, atol=0)
    assert len({id(op) for op in model.operators()}) == (1 if mode == "universal" else 3)
    block = model.blocks[1].attn
    q, k, v = torch.randn(3, 2, 4, 17, 16, dtype=torch.float64)
    maps = block.activation.activate(attention_scores(q, k))
    torch.testing.assert_close(block.activation.attend(q, k, v), maps @ v, rtol=1e-10, atol=1e-10)


def test_layers_of_softmax_stay_softmax_and_twins_share_the_rest():
    model = pico("hybrid", softmax_layers=[0, 2])
    kinds = [type(block.attn.activation).__name__ for block in model.blocks]
    assert kinds == ["SoftmaxActivation", "KArAtOperator", "SoftmaxActivation"] and len(model.operators()) == 1
    softmax = pico("softmax").state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in softmax.items())


@pytest.mark.parametrize(
    "attention, options",
    [
        ("hybrid", dict(softmax_heads=[1], order="phi_phi", base="gelu", mode="universal", rank=3)),
        ("hybrid", dict(softmax_layers=[1], basis="rational", basis_options=dict(degrees=(3, 2)))),
        ("karat", dict(basis="bspline", basis_options=dict(order=2), order="phi_w", edge_scales=True, simplex=True)),
        ("karat", dict(basis="bspline", base="zero")),
    ],
)
def test_a_checkpoint_keeps_every_option(attention, options, tmp_path):
    model, images = pico(attention, **options), torch.randn(2, 3, 8, 8)
    path = kl.save_checkpoint(tmp_path / "model.safetensors", model)
    loaded, card = kl.load_checkpoint(path)
    assert torch.equal(loaded(images), model(images)) and loaded.config == model.config
    given, _ = kl.load_checkpoint(path, pico(attention, **options))  # its configuration equals the card's
    assert torch.equal(given(images), model(images))


@pytest.mark.parametrize("options, said", [
    (dict(attention="hybrid"), "'hybrid' takes at least one of the two"),
    (dict(attention="karat", softmax_heads=[0]), "'karat' neither"),
    (dict(attention="hybrid", softmax_heads=[4]), r"softmax head 4 is not one of 0 .. 3"),
    (dict(attention="hybrid", softmax_heads=[1, 1]), r"softmax head 1 .* given twice: got \[1, 1\]"),
    (dict(attention="hybrid", softmax_heads=[-1]), "head index must be >= 0, got -1"),
    (dict(attention="hybrid", softmax_layers=[3]), "softmax layer 3 is not there: this model has layers 0 .. 2"),
    (dict(order="phi_v"), "unknown order 'phi_v': did you mean 'phi_w'"),
    (dict(rank=None, order="phi_w"), "order = 'phi_w' needs a rank"),
    (dict(base="sillu"), "unknown base activation 'sillu': did you mean 'silu'"),
])  # fmt: skip
def test_bad_arrangements_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        pico(**{"attention": "karat", **options})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_cannot_be_projected_are_named(bad):
    y = torch.randn(4, 6)
    y[1, 2] = bad
    with pytest.raises(ValueError, match="finite rows: 1 of 4 hold NaN or infinity"):
        project_simplex(y)
    with pytest.raises(ValueError, match=r"at least one entry, got shape \(3, 0\)"):
        project_simplex(torch.zeros(3, 0))
    with pytest.raises(TypeError, match=r"numbers with a fraction, got torch.int64: give y.float\(\)"):
        project_simplex(torch.tensor([1, 1]))


# ---- another grid of tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order, rank", KINDS)
@pytest.mark.parametrize("basis", ["fourier", "rational"])
@pytest.mark.parametrize("edge_scales", [False, True])
def test_resizing_to_the_same_grid_changes_no_number(order, rank, basis, edge_scales):
    op = operator(basis, order, rank, tokens=17, edge_scales=edge_scales)
    same = op.resized(4)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in op.state_dict().items())


@pytest.mark.parametrize("order, rank", [*KINDS, ("w_phi", 17), ("phi_w", 17), ("phi_phi", 17)])
@pytest.mark.parametrize("edge_scales", [False, True])
def test_sums_keep_their_size_on_another_grid(order, rank, edge_scales):
    """Functions, scores and values that do not vary from patch to patch: the outputs are the same on every grid."""
    op = operator(order=order, rank=rank, tokens=17, edge_scales=edge_scales)
    for name, value in op.named_parameters():
        for axis in op._token_axes(name):
            patches = value.data.narrow(axis, 1, 16)
            patches.copy_(patches.mean(dim=axis, keepdim=True).expand_as(patches))
    row = torch.randn(2, B, H, 2, D, dtype=torch.float64)

    def even(n):
        q, v = (torch.cat([x[:, :, :1], x[:, :, 1:].expand(-1, -1, n, -1)], dim=2) for x in row)
        return q, q, v

    before, after = op.attend(*even(16)), op.resized(6).attend(*even(36))
    assert error(after[:, :, :2], before[:, :, :2]) < 1e-12


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
def test_a_model_from_14x14_to_24x24_tokens(mode):
    torch.manual_seed(0)
    model = kl.create_model("vit_pico", mode=mode, img_size=224, patch_size=16, depth=2)
    larger = kl.resize(model, 384)
    assert larger(torch.randn(1, 3, 384, 384)).shape == (1, 10) and larger.operators()[0].num_tokens == 577
    assert (larger.operators()[0] is larger.operators()[1]) == (mode == "universal")
    same, images = kl.resize(model, 224), torch.randn(1, 3, 224, 224)
    assert same is not model and torch.equal(same(images), model(images))


def test_what_cannot_be_resized_is_named():
    with pytest.raises(ValueError, match="12 tokens are no square grid of patches and a class token"):
        kl.KArAtOperator(2, 12, rank=3).resized(4)
    with pytest.raises(ValueError, match="base activation 'silu' is resized only with edge_scales=True"):
        kl.KArAtOperator(2, 17, "bspline", rank=3).resized(5)
    with pytest.raises(ValueError, match="img_size = 225 is not divisible by patch_size = 16"):
        kl.resize(kl.create_model("vit_pico", img_size=64, patch_size=16), 225)


# ---- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch, karat_lite as kl
model = kl.create_model("vit_tiny", basis=sys.argv[1])
model(torch.randn(4, 3, 224, 224)).square().mean().backward()
assert all(p.grad is not None for p in model.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.parametrize("basis", ["rational", "dog", "meyer"])
def test_bases_with_parameters_inside_fit_in_six_gigabytes(basis):
    """ViT-Tiny at 224 pixels, rank 12, four images, forward and backward: peak resident memory of the process."""
    run = subprocess.run([sys.executable, "-c", PEAK, basis], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 6.0


@pytest.mark.parametrize("name", ["dog", "rational"])
def test_an_edge_basis_can_be_differentiated_twice(name):
    torch.manual_seed(0)
    operator = kl.KArAtOperator(1, 3, name, rank=2).double()
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(operator.attend, (q, k, v))
    for x in (q, k):  # frozen scores: the operator's own gradient can still be differentiated
        x.requires_grad_(False)
    out = operator.attend(q, k, v).square().sum()
    (slope,) = torch.autograd.grad(out, operator.coef, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), operator.coef)[0].abs().max() > 0


@pytest.mark.parametrize("name", ["dog", "rational"])
def test_a_backward_pass_inside_autocast_is_not_rounded(name):
    """The operator alone: PyTorch itself rounds the products around it when its backward pass runs inside autocast."""
    torch.manual_seed(0)
    basis, scores = kl.make_basis(name), torch.randn(2, 1, 17, 17, requires_grad=True)
    coef = torch.randn(1, 4, 17, basis.num_parameters, requires_grad=True)
    gradients = []
    for inside in (False, True):
        out = kl.functional.apply_operator(scores, basis, coef).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(out, (scores, coef)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
