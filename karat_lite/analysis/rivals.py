"""Ways of computing attention that a benchmark puts side by side, as a layer on tensors and inside a whole model.

    softmax      softmax(Q K^T / sqrt(d)) V in three operations; scores and map are formed and kept
    sdpa         the same by the library's fused `scaled_dot_product_attention`
    broadcast    KArAt by its definition, functional's backend "reference": a number for every unit and score
    features     KArAt, all F feature maps of all scores in one array, then one contraction
    contraction, recompute, ...    KArAt by functional's other backends: a new one joins by itself

Letters as in functional.py; r = N stands for the full-rank operator, which has no projector.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ..attention import SoftmaxActivation
from ..bases import LinearBasis, make_basis, wide
from ..functional import BACKENDS, attention_scores, karat_attention
from ..optimiser import make_optimizer
from ..recipes import Recipe
from ..vit import create_model


class Case(NamedTuple):
    """What is computed: a layer's shape, or a model's, whose layers have it. The operator is Fourier's."""

    B: int  # images
    h: int  # heads
    N: int  # tokens
    d: int  # channels of a head
    G: int | None = 3  # harmonics; None for softmax
    r: int | None = 12  # units of the operator, N: full rank; None for softmax
    dtype: str = "float32"  # of q, k and v; in a model that of autocast
    model: str | None = None  # None: one layer's operation on q, k and v
    compiled: bool = False


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, one operation after the other: (B, h, N, d) three times -> (B, h, N, d)."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


def feature_form(q: Tensor, k: Tensor, v: Tensor, basis: LinearBasis, coef: Tensor, weight: Tensor | None) -> Tensor:
    """KArAt with all its feature maps side by side, (B, h, N, N, F), contracted at once; as `karat_attention`."""
    scores = attention_scores(q, k)
    with torch.autocast(q.device.type, enabled=False):
        y = einsum(basis.features(scores), wide(coef), "B h k q F, h p q F -> B h k p")
        return (y @ (wide(v) if weight is None else wide(weight).mT @ wide(v))).to(v.dtype)


class EagerSoftmax(SoftmaxActivation):
    """Softmax attention as it stood in every model before fused kernels."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, h, N, d) -> (B, h, N, d)."""
        return softmax_attention(q, k, v)


class Rival:
    """One of those compared. `case` says what it computes; subclasses have `forward`, `learn` and `given`."""

    given: tuple[Tensor, ...] = ()  # tensors that are there anyway: parameters

    def __init__(self, case: Case):
        self.case = case

    def infer(self) -> None:
        """The forward pass alone, without a graph."""
        with torch.no_grad():
            self.forward()


class Layer(Rival):
    """The attention operation on q, k, v (B, h, N, d), strided as a model's packed projection leaves them.

    name: see the module. Gradients are those of q, k, v and of the operator's parameters.
    """

    def __init__(self, name: str, case: Case, device: torch.device):
        softmax = name in ("softmax", "sdpa")
        super().__init__(case._replace(G=None, r=None) if softmax else case)
        dtype, random = getattr(torch, case.dtype), torch.Generator().manual_seed(0)
        packed = torch.randn(case.B, case.N, 3 * case.h * case.d, generator=random).to(device, dtype)
        packed = rearrange(packed, "B N (three h d) -> three B h N d", three=3, h=case.h)
        self.inputs = [x.detach().requires_grad_() for x in packed]
        if softmax:
            self.compute = {"softmax": softmax_attention, "sdpa": F.scaled_dot_product_attention}[name]
        else:
            basis = make_basis("fourier", case.G)
            shapes = [(case.h, case.r, case.N, basis.num_parameters), (case.h, case.N, case.r)]
            sizes = [(case.N * case.G) ** -0.5, (case.N * case.r) ** -0.5]  # as the operator's "variance" draws them
            some = list(zip(shapes, sizes, strict=True))[: 1 if case.r == case.N else 2]
            self.inputs += [(torch.randn(s, generator=random) * std).to(device).requires_grad_() for s, std in some]
            self.compute = self._operator(name, basis)
            self.given = tuple(self.inputs[3:])
        self.grad = torch.randn(case.B, case.h, case.N, case.d, generator=random).to(device, dtype)

    @staticmethod
    def _operator(name: str, basis: LinearBasis) -> Callable[..., Tensor]:
        def compute(q, k, v, coef, weight=None):
            if name == "features":
                return feature_form(q, k, v, basis, coef, weight)
            backend = "reference" if name == "broadcast" else name
            return karat_attention(q, k, v, basis, coef, weight, backend=backend)

        return compute

    def forward(self) -> Tensor:
        return self.compute(*self.inputs)

    def learn(self) -> None:
        """Forward and backward pass."""
        torch.autograd.grad(self.forward(), self.inputs, self.grad)


class Model(Rival):
    """A Vision Transformer of 1,000 classes on random images; under autocast where `case.dtype` is not float32.

    name: "softmax", "sdpa" or a backend. With `case.compiled` every block goes through torch.compile by `compiler`:
    blocks are alike, so one compilation serves them all.
    """

    def __init__(self, name: str, case: Case, device: torch.device, img_size: int, compiler: str = "inductor"):
        softmax = name in ("softmax", "sdpa")
        options = dict(attention="softmax") if softmax else dict(grid=case.G, rank=None if case.r == case.N else case.r)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(case.model, img_size=img_size, patch_size=16, num_classes=1000, **options).to(device)
        for operator in model.operators():
            operator.backend = name
        for block in model.blocks:
            if name == "softmax":
                block.attn.activation = EagerSoftmax()
            if case.compiled:
                block.compile(backend=compiler)
        super().__init__(case._replace(G=None, r=None) if softmax else case)
        self.model, self.given = model, tuple(model.parameters())
        self.optimizer = make_optimizer(model, Recipe(lr=1e-5))
        random = torch.Generator().manual_seed(0)
        self.images = torch.randn(case.B, 3, img_size, img_size, generator=random).to(device)
        self.labels = torch.randint(1000, (case.B,), generator=random).to(device)

    def forward(self) -> Tensor:
        dtype = getattr(torch, self.case.dtype)
        with torch.autocast(self.images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(self.images)

    def gradients(self) -> None:
        """Forward and backward pass, of the cross-entropy."""
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.forward().float(), self.labels).backward()

    def learn(self) -> None:
        """A training step: forward and backward pass, AdamW."""
        self.gradients()
        self.optimizer.step()


def karat_kinds(device: torch.device) -> list[str]:
    """functional's backends that compute on this device, but the definition; the youngest, and fastest, first."""
    found = []
    for name in reversed(BACKENDS):
        # On a CPU Triton runs, if at all, in an interpreter: good for tests, no time worth measuring.
        if name == "reference" or (name == "triton" and device.type == "cpu"):
            continue
        try:
            Layer(name, Case(1, 1, 3, 16, G=1, r=2), device).learn()
        except (ImportError, RuntimeError, ValueError) as error:
            print(f"backend {name!r} is not available here: {error}")
            continue
        found.append(name)
    return found


def workspace(name: str, case: Case) -> int:
    """Bytes, about, that one layer of this kind needs at once, to see before it fails whether it fits.

    That is 4 B h N^2, one array of scores in float32, times how many of them live in forward and backward pass; 0 for
    what works block by block.
    """
    arrays = {
        "softmax": 3,
        "contraction": 4 * (case.G or 0),
        "features": 6 * (case.G or 0),
        "broadcast": 3 * (case.r or 0),
    }
    return 4 * case.B * case.h * case.N**2 * arrays.get(name, 0)
