"""How curved the loss is: the largest eigenvalues of its Hessian, from products with vectors alone.

    H_ij = d^2 loss / d theta_i d theta_j,      H v = d/d theta (d loss / d theta . v)

P weights make P^2 entries, which nobody can store; a product H v costs about as much as four evaluations of the loss.
`top_eigenvalues` (Lanczos 1950) is power iteration that forgets nothing: after m products it looks for the best
combinations of v, H v, H^2 v, ..., H^(m - 1) v, not at the last of them alone.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import at_least
from ..operators import KArAtOperator
from .directions import Directions, check_finite, filter_norms, weights_of
from .inputs import slopes_wanted
from .landscape import check_batch

BACKEND = "contraction"  # what can be differentiated twice; "recompute" and the fused kernels cannot
SPARE = 3  # products beyond the eigenvalues that are asked for, before any of them is believed


class Spectrum(NamedTuple):
    """The upper end of a symmetric matrix's spectrum, and its lowest end in one number."""

    values: np.ndarray  # (count,) eigenvalues, largest first
    residuals: np.ndarray  # (count,) |H u - lambda u| for unit vectors u
    vectors: Tensor  # (count, P) the unit vectors
    lowest: float  # the smallest Ritz value: the lowest eigenvalue is not above it
    iterations: int  # products H v that were made
    converged: bool  # see `top_eigenvalues`
    relative: bool = False  # of D H D, see `hessian_product`: then D u, not u, is a direction of the weights


def hessian_product(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    relative: bool = False,
    smoothing: float = 0.0,
    chunk: int = 32,
) -> tuple[Callable[[Tensor], Tensor], int]:
    """(v (P,) -> H v (P,), P): the Hessian of the mean cross-entropy on these images, over all weights.

    The order of the P numbers is that of `model.named_parameters()`. relative: D H D instead, D = diag(norm of the
    filter that a number belongs to, `filter_norms`): curvature where steps are counted as shares of weights, which
    does not change when a layer is multiplied by c and the next one divided by it. A copy of the model is
    differentiated, with attention in a form that has second derivatives. Raises `ValueError` for weights that are not
    finite, for images or labels that do not fit, and inside `torch.inference_mode`.
    """
    slopes_wanted()
    check_finite(weights_of(model))
    images, labels = check_batch(model, images, labels)
    model = copy.deepcopy(model).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, KArAtOperator):
            module.backend = BACKEND
    named = dict(model.named_parameters())
    parameters = list(named.values())
    norms = filter_norms(weights_of(model))
    scale = _flat([norms[name].expand_as(p) for name, p in named.items()]) if relative else None

    def product(v: Tensor) -> Tensor:
        v = v if scale is None else scale * v
        pieces = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
        total = torch.zeros_like(v)
        # The fused kernels of softmax attention have no second derivative either; the formula has.
        with sdpa_kernel(SDPBackend.MATH):
            for some, answers in zip(images.split(chunk), labels.split(chunk), strict=True):
                with torch.enable_grad():
                    loss = F.cross_entropy(model(some), answers, reduction="sum", label_smoothing=smoothing)
                    slopes = torch.autograd.grad(
                        loss / len(images), parameters, create_graph=True, materialize_grads=True
                    )
                    slope = sum((g * x).sum() for g, x in zip(slopes, pieces, strict=True) if g.requires_grad)
                total += _flat(torch.autograd.grad(slope, parameters, materialize_grads=True))
        return total if scale is None else scale * total

    return product, sum(p.numel() for p in parameters)


def top_eigenvalues(
    product: Callable[[Tensor], Tensor],
    size: int,
    count: int = 3,
    *,
    iterations: int = 60,
    tolerance: float = 1e-2,
    seed: int = 0,
    like: Tensor | None = None,
    progress: bool = True,
) -> Spectrum:
    """The `count` largest eigenvalues of a symmetric matrix that is given as v -> H v, by Lanczos iteration.

        beta_m q_(m+1) = H q_m - alpha_m q_m - beta_(m-1) q_(m-1),      Q^T H Q = tridiagonal(alpha, beta)

    Each new vector is made orthogonal to all before it, twice (without that, rounding brings found eigenvalues back).
    The residual of a pair is beta_m |s_m|, s its eigenvector in the tridiagonal matrix. It stops when it has
    converged, or after `iterations` products.

    converged: nothing is left of the space that the start reaches (an eigenvalue that a matrix has several times is in
        it once); or, after at least count + `SPARE` products, all residuals are <= tolerance |lambda_1|, and the last
        product has moved no value by more than that. A small residual says that an eigenvalue is near, not that it is
        the largest: where the start has little of the sharpest direction in it, it is not seen in the first products.
    like: a tensor whose type and device the vectors take.

    Raises `ValueError` for products that are not finite.
    """
    count, iterations = at_least("count", count, 1), at_least("iterations", iterations, 1)
    if count > size or not 0 < tolerance < 1:
        raise ValueError(f"asked for {count} eigenvalues of {size}, to a tolerance of {tolerance}: expected at most "
                         f"{size}, and a tolerance between 0 and 1.")  # fmt: skip
    like = torch.empty(0) if like is None else like
    q = torch.randn(size, generator=torch.Generator().manual_seed(seed), device="cpu").to(like)
    found, alphas, betas, values = [q / q.norm()], [], [], np.empty(0)
    from tqdm.auto import tqdm

    with tqdm(total=min(iterations, size), desc="Hessian", unit="product", disable=not progress, leave=False) as bar:
        while True:
            new = product(found[-1])
            if not new.isfinite().all():
                raise ValueError("H v is not finite: the loss overflows at these weights.")
            alphas.append(float(new @ found[-1]))
            basis = torch.stack(found)
            for _ in range(2):
                new = new - basis.T @ (basis @ new)
            betas.append(float(new.norm()))
            before = values[:count]
            values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
            values, vectors = values[::-1], vectors[:, ::-1]
            residuals = betas[-1] * np.abs(vectors[-1, :count])
            bar.update()
            bar.set_postfix_str(f"largest {values[0]:.4g}")
            largest = max(np.abs(values).max(), np.finfo(float).tiny)
            exhausted = len(alphas) == size or betas[-1] <= 1e-7 * largest  # an invariant subspace
            enough = len(alphas) >= count + SPARE and bool(
                (np.maximum(residuals, np.abs(values[:count] - before)) <= tolerance * abs(values[0])).all()
            )
            if enough or exhausted or len(alphas) >= iterations:
                break
            found.append(new / betas[-1])
    if len(alphas) < count and exhausted:
        raise ValueError(
            f"after {len(alphas)} products nothing is left: H has {len(alphas)} different eigenvalues (each is found "
            f"once, however often H has it), asked for {count}: ask for fewer."
        )
    if len(alphas) < count:
        raise ValueError(
            f"after {len(alphas)} products only {len(alphas)} eigenvalues are known, asked for {count}: give more "
            "iterations, or ask for fewer."
        )
    mix = torch.tensor(vectors[:, :count].T.copy(), dtype=like.dtype, device=like.device)
    return Spectrum(values[:count].copy(), residuals, mix @ basis, float(values[-1]), len(alphas), enough or exhausted)


def hessian_spectrum(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    count: int = 3,
    *,
    relative: bool = False,
    smoothing: float = 0.0,
    chunk: int = 32,
    **options,
) -> Spectrum:
    """The largest eigenvalues of the loss's Hessian: `hessian_product`, then `top_eigenvalues`; see both."""
    product, size = hessian_product(model, images, labels, relative=relative, smoothing=smoothing, chunk=chunk)
    like = next(model.parameters()).detach().new_empty(0)
    return top_eigenvalues(product, size, count, like=like, **options)._replace(relative=relative)


def sharpest_directions(model: nn.Module, spectrum: Spectrum) -> Directions:
    """The eigenvectors of a model's Hessian as `Directions`: where the loss curves most, by the eigenvalue along each.

    u of length 1, or for a relative spectrum D u: a step of 1 counted in shares of the weights.
    """
    origin = weights_of(model)
    if spectrum.vectors.shape[1] != sum(x.numel() for x in origin.values()):
        raise ValueError(
            f"this spectrum is of a model with {spectrum.vectors.shape[1]} weights, this one has "
            f"{sum(x.numel() for x in origin.values())}."
        )
    pieces = spectrum.vectors.split([x.numel() for x in origin.values()], dim=1)
    along = {name: piece.view(-1, *x.shape) for (name, x), piece in zip(origin.items(), pieces, strict=True)}
    if spectrum.relative:
        along = {name: norm * along[name] for name, norm in filter_norms(origin).items()}
    return Directions("sharpest", origin, along)


def _flat(tensors) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])
