"""The `recompute` backend: the definition's numbers and gradients, kept memory, and the company it must work in."""

import contextlib
import gc
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import karat_lite as kl
from karat_lite.functional import choose_backend, karat_attention
from karat_lite.kernels import blocked

LINEAR = ["bspline", "chebyshev", "fourier", "rbf"]
# (B, h, N, d, r): odd and even, one token, one unit, full rank (None), more heads than images.
SIZES = [(2, 3, 7, 4, 5), (2, 3, 7, 4, None), (1, 1, 1, 1, 1), (1, 2, 1, 3, None), (3, 2, 6, 4, 1), (1, 4, 30, 4, 6)]


def error(found, reference) -> float:
    """max|difference| / max|reference|."""
    assert found.shape == reference.shape and found.dtype == reference.dtype
    return ((found - reference).abs().max() / reference.abs().max()).item()


def draw(images, heads, tokens, width, rank, basis, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    qkv = [normal(images, heads, tokens, width) for _ in range(3)]
    coef = normal(heads, rank or tokens, tokens, basis.num_parameters)
    return [*qkv, coef] if rank is None else [*qkv, coef, normal(heads, tokens, rank)]


def value_and_gradients(tensors, basis, backend):
    out = karat_attention(*tensors[:3], basis, *tensors[3:], backend=backend)
    # A gradient that differs from entry to entry: a sum would hide a transposition.
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", [1, 2, 3, 11])
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("at_once", [5, 100, 1 << 20])  # blocks of some rows, of some planes, of everything
def test_equals_the_reference(name, grid, size, at_once, monkeypatch):
    monkeypatch.setattr(blocked, "AT_ONCE", at_once)
    basis = kl.make_basis(name, grid)
    tensors = draw(*size, basis)
    expected = value_and_gradients(tensors, basis, "reference")
    for found, wanted in zip(value_and_gradients(tensors, basis, "recompute"), expected, strict=True):
        assert error(found, wanted) <= 1e-10 or (found - wanted).abs().max() <= 1e-12  # B-spline at one token: zeros


@pytest.mark.parametrize("depth", [1, 4, 22, 200])
def test_blocks_hold_every_score_once_and_keep_their_scratch_small(depth, monkeypatch):
    monkeypatch.setattr(blocked, "AT_ONCE", 1000)
    monkeypatch.setattr(blocked, "MAPS_AT_ONCE", 4000)
    q, k, times = torch.empty(3, 5, 17, 2), torch.empty(3, 5, 13, 2), torch.zeros(3, 5, 17, 13)
    blocks = blocked._Blocks(q, k, depth)
    for of_q, here in blocks.planes(q, times):
        for rows, keys, scratch in blocks.tiles(len(of_q)):
            keys(rows(here, 1), 2).add_(1)
            assert scratch.maps.shape == (len(of_q), depth, *scratch.scores.shape[1:]) and scratch.maps.numel() <= 4000
            assert scratch.scores.numel() <= 1000
    assert (times == 1).all()


def test_blocks_are_larger_where_no_cpu_computes():
    """Each is some dozen launches on a GPU. 32 images of ViT-Tiny: 16 blocks of 6 planes on a CPU, one elsewhere."""
    planes = {device: torch.empty(32, 3, 197, 2, device=device) for device in ("cpu", "meta")}
    sizes = {name: [len(part) for (part,) in blocked._Blocks(x, x, 6).planes(x)] for name, x in planes.items()}
    assert sizes["cpu"] == 16 * [6] and sizes["meta"] == [96]


@pytest.mark.parametrize("grid", [1, 3, 11])
@pytest.mark.parametrize("rank", [1, 12, None])
def test_float32_is_as_good_as_the_definition(grid, rank):
    basis = kl.make_basis("fourier", grid)
    tensors = draw(2, 2, 65, 16, rank, basis)
    single = [x.detach().float().requires_grad_() for x in tensors]
    expected = value_and_gradients(tensors, basis, "reference")
    for found, wanted in zip(value_and_gradients(single, basis, "recompute"), expected, strict=True):
        assert error(found.double(), wanted) <= 1e-5


@pytest.mark.parametrize("grid", range(1, 13))
def test_raw_maps_and_their_mixing(grid):
    """Every psi and psi' of Fourier from the raw maps, for every G: which harmonics are finished depends on it."""
    basis, x = kl.make_basis("fourier", grid), torch.linspace(-9, 9, 101, dtype=torch.float64)
    raw = torch.empty(2 * grid, len(x), dtype=torch.float64)
    basis.write(x, raw)
    mix, slopes = basis.mixing()
    m = torch.arange(1, grid + 1, dtype=torch.float64).unsqueeze(-1)
    assert torch.allclose(mix @ raw, torch.cat([torch.cos(m * x), torch.sin(m * x)]), atol=1e-12)
    assert torch.allclose(slopes @ raw, torch.cat([-m * torch.sin(m * x), m * torch.cos(m * x)]), atol=1e-11)


@pytest.mark.parametrize("order", ["w_phi", "phi_w"])
@pytest.mark.parametrize("base", ["zero", "silu"])
@pytest.mark.parametrize("edge_scales", [False, True])
def test_operators_give_the_same_numbers_with_each_backend(order, base, edge_scales):
    torch.manual_seed(0)
    operator = kl.KArAtOperator(2, 7, rank=3, order=order, base=base, edge_scales=edge_scales).double()
    q, k, v = (torch.randn(2, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    results = []
    for operator.backend in ("contraction", "recompute"):
        out = operator.attend(q, k, v)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(operator.parameters()))])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() <= 1e-12 * max(1, wanted.abs().max())


def test_an_empty_batch():
    basis = kl.make_basis("fourier", 2)
    q, k, v, coef, weight = draw(2, 2, 5, 4, 3, basis)
    out = karat_attention(q[:0], k[:0], v[:0], basis, coef, weight, backend="recompute")
    out.sum().backward()
    assert out.shape == (0, 2, 5, 4) and coef.grad.abs().max() == weight.grad.abs().max() == 0


def kept_bytes(module, x) -> int:
    """Bytes of the tensors that the forward pass saves for the backward pass; shared storage once, no parameters."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    assert out.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


class EagerSoftmax(nn.Module):
    def attend(self, q, k, v):
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


@pytest.mark.parametrize("size", ["vit_tiny", "vit_small", "vit_base"])
def test_memory_kept_for_the_backward_pass(size):
    """At 224 pixels, 32 images: <= 1.02 of fused softmax attention, < 0.9 of eager, full rank <= 1.1 of fused.

    What every further image keeps is the same, so one and two images tell of 32.
    """

    def with_32_images(model):
        one, two = (kept_bytes(model, torch.zeros(count, 3, 224, 224)) for count in (1, 2))
        return one + 31 * (two - one)

    softmax = kl.create_model(size, attention="softmax")
    fused = with_32_images(softmax)
    for block in softmax.blocks:
        block.attn.activation = EagerSoftmax()
    karat, full = (with_32_images(kl.create_model(size, grid=3, rank=rank)) for rank in (12, None))
    usual = kl.create_model(size, grid=3, rank=12)
    for block in usual.blocks:  # seen by a hook, layers form their values, as on a GPU
        block.attn.qkv.register_forward_hook(lambda module, given, out: None)
    assert max(karat, with_32_images(usual)) <= 1.02 * fused and full <= 1.10 * fused
    assert karat < 0.90 * with_32_images(softmax)


def test_the_sixty_gigabyte_case():
    """ViT-Tiny at 224, full rank, G = 10, one image, forward and backward: peak of the process <= 1.2 GB."""
    program = (
        "import torch, karat_lite as kl\n"
        "model = kl.create_model('vit_tiny', rank=None, grid=10)\n"
        "model(torch.randn(1, 3, 224, 224)).sum().backward()\n"
        # Not getrusage: Linux counts a child's peak there from the fork on, with what its parent held.
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * 1024 <= 1.2e9


@pytest.mark.parametrize("rank", [3, 5, None])  # few units; more than d / 2; full
def test_torch_compile_takes_it_whole(rank):
    """No graph break, the same numbers, and nothing more is kept."""
    torch.manual_seed(0)
    model, x = kl.KArAttention(16, 2, 65, rank=rank), torch.randn(2, 65, 16)
    expected = [model(x), *torch.autograd.grad(model(x).square().sum(), list(model.parameters()))]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    found = [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]
    assert all(error(a, b) <= 1e-5 for a, b in zip(found, expected, strict=True))
    assert kept_bytes(compiled, x) <= 1.02 * kept_bytes(model, x)


@pytest.mark.parametrize("rank", [4, 5, None])
def test_works_inside_activation_checkpointing(rank):
    torch.manual_seed(0)
    model, x = kl.KArAttention(16, 2, 9, rank=rank), torch.randn(2, 9, 16, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


def test_scores_stay_in_float32_under_autocast():
    """Nothing but the projections around it is rounded: exactly the numbers of float32 on rounded q, k, v."""
    torch.manual_seed(0)
    operator = kl.KArAtOperator(2, 33, rank=5)
    q, k, v = (3 * torch.randn(2, 2, 33, 16).bfloat16() for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = operator.attend(q, k, v)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    found = [p.grad.clone() for p in operator.parameters()]
    operator.zero_grad()
    expected = operator.attend(q.float(), k.float(), v.float())
    expected.bfloat16().float().sum().backward()
    assert torch.equal(out, expected.bfloat16())
    assert all(torch.equal(a, p.grad) for a, p in zip(found, operator.parameters(), strict=True))


@pytest.mark.parametrize("rank", [4, 5, None])
@pytest.mark.parametrize("basis", ["fourier", "dog"])
def test_torch_func_takes_the_gradient(basis, rank):
    torch.manual_seed(0)
    layer, x = kl.KArAttention(16, 2, 9, basis=basis, rank=rank).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    weights = dict(layer.named_parameters())
    found = torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).square().sum())(weights)
    expected = torch.autograd.grad(layer(x).square().sum(), list(weights.values()))
    assert all(error(a, b) <= 1e-10 for a, b in zip(found.values(), expected, strict=True))


def test_a_second_derivative_is_refused_with_advice():
    basis = kl.make_basis("fourier", 2)
    tensors = draw(1, 1, 4, 3, 2, basis)
    out = karat_attention(*tensors[:3], basis, *tensors[3:], backend="recompute")
    (slope,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)  # alone this is no offence
    with pytest.raises(RuntimeError, match="can be differentiated once.*backend='contraction'"):
        torch.autograd.grad(slope.sum(), tensors[0])
    out = karat_attention(*tensors[:3], basis, *tensors[3:], backend="contraction")
    (slope,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    assert torch.autograd.grad(slope.sum(), tensors[0])[0].abs().max() > 0


@pytest.mark.parametrize("learns", range(5))
def test_gradients_only_where_asked(learns, monkeypatch):
    """Of q, k, v, coef, weight one alone: its gradient is what it was, and no block is seen where V or W learn."""
    basis, calls, compute = kl.make_basis("fourier", 2), [], blocked.mix_gradients
    monkeypatch.setattr(blocked, "mix_gradients", lambda *args: calls.append(1) or compute(*args))
    tensors = draw(1, 2, 4, 3, 2, basis)
    wanted = value_and_gradients(tensors, basis, "reference")[1 + learns]
    single = [x.detach().requires_grad_(i == learns) for i, x in enumerate(tensors)]
    out = karat_attention(*single[:3], basis, *single[3:], backend="recompute")
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights).sum().backward()
    assert error(single[learns].grad, wanted) <= 1e-10 and len(calls) == (learns in (0, 1, 3))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(basis=kl.make_basis("dog")), "'recompute' takes bases that are linear in their parameters"),
        (dict(coef=torch.float64), "one type .*coef torch.float64"),
        (dict(v=torch.device("meta")), "one device .*v meta"),
    ],
)
def test_what_it_cannot_take(change, message):
    basis = change.get("basis", kl.make_basis("fourier", 2))
    names = ("q", "k", "v", "coef", "weight")
    tensors = dict(zip(names, draw(1, 2, 4, 3, 2, basis, torch.float32), strict=True))
    tensors |= {name: tensors[name].to(kind) for name, kind in change.items() if name != "basis"}
    with pytest.raises(ValueError, match=message):
        q, k, v, coef, weight = (tensors[name] for name in names)
        karat_attention(q, k, v, basis, coef, weight, backend="recompute")


def test_a_basis_from_a_notebook_cell():
    """Registered bases come through `recompute`, compiled or not, without knowing of it."""
    with contextlib.suppress(ValueError):

        @kl.register_basis("two_powers")
        class TwoPowers(kl.LinearBasis):
            num_features = 3

            def maps(self, x):
                yield 0, torch.ones_like(x)  # a map without a slope
                yield 1, x / 4
                yield 2, (x / 4) ** 2

    basis = kl.make_basis("two_powers")
    tensors = draw(2, 2, 5, 4, 3, basis)
    expected = value_and_gradients(tensors, basis, "reference")
    assert all(
        error(a, b) <= 1e-10 for a, b in zip(value_and_gradients(tensors, basis, "recompute"), expected, strict=True)
    )
    compiled = torch.compile(karat_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*tensors[:3], basis, *tensors[3:])
    assert error(out, expected[0]) <= 1e-10


def two_layers():
    """One with few units, one with more than d / 2."""
    torch.manual_seed(0)
    return nn.Sequential(*[kl.KArAttention(16, 2, 9, rank=rank, edge_scales=True) for rank in (4, 5)])


def _one_process(rank: int, address: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(two_layers())
    x = torch.randn(4, 9, 16)[2 * rank : 2 * rank + 2]
    for _ in range(2):  # the second pass is where DDP refuses parameters that got no gradient in the first
        model.zero_grad()
        model(x).square().mean().backward()
    results[rank] = [p.grad.numpy() for p in model.parameters()]
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_one_process, (f"file://{tmp_path / 'meeting'}", results), nprocs=2)
        found = [[torch.from_numpy(grad) for grad in results[rank]] for rank in (0, 1)]
    model = two_layers()
    model(torch.randn(4, 9, 16)).square().mean().backward()
    for p, first, second in zip(model.parameters(), *found, strict=True):
        assert torch.equal(first, second) and torch.allclose(first, p.grad, atol=1e-7, rtol=1e-4)


def test_auto_falls_back_on_a_gpu_and_says_so_once():
    """Where the fused kernels cannot serve; on a CPU nothing is said, because nothing was to be expected."""
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64, shape=(1, 1, 5, 16))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            basis = kl.make_basis("rbf")
            assert choose_backend("auto", basis, on_a_gpu, torch.zeros(1, 2, 5, 3)) == "recompute"
            assert choose_backend("auto", basis, torch.zeros(1, 1, 5, 16), torch.zeros(1, 2, 5, 3)) == "recompute"
    assert len(said) == 1 and "takes 'recompute', not 'triton': its kernels compute the Fourier" in str(said[0].message)
    assert choose_backend("auto", kl.make_basis("dog"), on_a_gpu, torch.zeros(1, 2, 5, 3)) == "contraction"


@pytest.mark.parametrize("name", ["fourier", "rbf"])
def test_nothing_stays_behind(name):
    """Scratch is free as soon as a pass is over, not when Python next looks for circles: layers would add up."""
    basis = kl.make_basis(name, 2)
    tensors = draw(2, 3, 7, 4, 5, basis)

    def alive():
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    def once():
        value_and_gradients(tensors, basis, "recompute")
        with torch.no_grad():
            karat_attention(*tensors[:3], basis, *tensors[3:], backend="recompute")

    once()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        once()
        assert alive() == before
    finally:
        gc.enable()
