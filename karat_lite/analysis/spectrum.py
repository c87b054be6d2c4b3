"""How many directions attention has: singular values of its matrices before and after the activation, and their ranks.

A matrix A = sum_i s_i u_i v_i^T with s_1 >= ... >= s_N >= 0 has as many directions as it has s_i that count. What
counts is a choice, so there are several measures here. All take singular values s (..., N), largest first, as NumPy
arrays, and answer for each matrix; a matrix of zeros has 0 directions by every measure.

Everything is computed in float64 on the CPU, the model's forward pass included: in float32 the singular values that
are zero by construction come out near 1e-8 of the largest, and float64's tolerance would count them.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..attention import HybridActivation
from ..checks import at_least
from ..not_finite import first_not_finite
from ..operators import KArAtOperator
from ..vit import VisionTransformer

AT_ONCE = 4  # images: their matrices of all layers are held together (ViT-Base at 224 pixels: 0.4 GB)
LARGEST_PIXEL = 10.0  # normalised pixels lie in [-1, 1], with ImageNet's mean and spread within +-3; bytes do not


class Spectra(NamedTuple):
    """Singular values of a model's attention matrices, largest first, float64; "before" and "after" the activation.

    The shared values are those of all images' matrices stacked on each other, (B N) x N: they say how many directions
    serve all images at once, which is what the one projector W of a head has to do.
    """

    before: np.ndarray  # (B, L, h, N), of the scores S = Q K^T / sqrt(d)
    after: np.ndarray  # (B, L, h, N), of the activated maps
    before_shared: np.ndarray  # (L, h, N)
    after_shared: np.ndarray  # (L, h, N)
    before_bound: np.ndarray  # (L, h), ranks that cannot be exceeded by construction: the width d of a head, or N
    after_bound: np.ndarray  # (L, h): r of an operator that ends in W, else N


class Bands(NamedTuple):
    """How s_i is distributed over many matrices, for each index i: four arrays (N,)."""

    mean: np.ndarray  # geometric: exp of the mean of ln s_i
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


@torch.no_grad()
def spectra(model: VisionTransformer, images: Tensor) -> Spectra:
    """Singular values before and after the activation, for every image, layer and head.

    images (B, 3, H, W), normalised as the model was trained; the model is left as it is (a copy in float64 computes).
    Raises `TypeError` for a model that `create_model` did not build or images of whole numbers, `ValueError` for no
    images, another size, pixels that were not normalised, and for weights or scores that are not finite.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"spectra looks into models of create_model and load_checkpoint, got {type(model).__name__}.")
    if len(images) == 0:
        raise ValueError("spectra needs at least one image, got none.")
    if (largest := images.abs().max().item()) > LARGEST_PIXEL:
        raise ValueError(
            f"the largest pixel is {largest:g}: these images were not normalised; karat_lite.data.normalise(images) "
            "brings bytes to [-1, 1]."
        )
    model = copy.deepcopy(model).cpu().double().eval()
    for operator in model.operators():
        operator.backend = "auto"  # a backend that was chosen for a GPU does not run here
    if images.is_floating_point():  # others are refused by the model
        images = images.cpu().double()
    found: dict[str, list] = {"before": [], "after": []}
    stacked: dict[tuple, Tensor] = {}  # (side, layer) -> R (h, N, N) of the stack's QR decomposition so far
    for start in range(0, len(images), AT_ONCE):
        part = images[start : start + AT_ONCE]
        _, records = model(part, return_attention=True)
        for side, field in (("before", "scores"), ("after", "maps")):
            values = []
            for layer, record in enumerate(records):
                matrices = getattr(record, field)  # (b, h, N, N)
                if not matrices.isfinite().all():
                    what = "scores" if side == "before" else "maps"
                    raise ValueError(f"layer {layer} has {what} without a spectrum: {first_not_finite(model, part)}.")
                values.append(torch.linalg.svdvals(matrices))
                rows = rearrange(matrices, "b h k n -> h (b k) n")
                rows = torch.cat([stacked[side, layer], rows], dim=1) if (side, layer) in stacked else rows
                stacked[side, layer] = torch.linalg.qr(rows, mode="r").R  # R^T R = sum of A^T A: the same values
            found[side].append(torch.stack(values, dim=1))
    each = (torch.cat(found[side]).numpy() for side in ("before", "after"))
    depth = len(model.blocks)
    together = (
        torch.linalg.svdvals(torch.stack([stacked[side, layer] for layer in range(depth)])).numpy()
        for side in ("before", "after")
    )
    return Spectra(*each, *together, *rank_bounds(model))


def rank_bounds(model: VisionTransformer) -> tuple[np.ndarray, np.ndarray]:
    """Ranks that scores and activated maps cannot exceed by construction, before and after: two arrays (L, h).

    Scores: the width d of a head. Maps: r where the operator ends in its projector, W Phi^[S], and is not projected on
    the simplex afterwards; else N.
    """
    tokens = model.pos_embed.shape[1]
    before, after = [], []
    for block in model.blocks:
        heads, activation = block.attn.num_heads, block.attn.activation
        before.append([min(tokens, model.pos_embed.shape[2] // heads)] * heads)
        after.append([tokens] * heads)
        learned = range(heads)
        if isinstance(activation, HybridActivation):
            learned, activation = activation.learned_heads, activation.operator
        if isinstance(activation, KArAtOperator) and activation.order == "w_phi" and not activation.simplex:
            for head in learned:
                after[-1][head] = activation.rank or tokens
    return np.array(before), np.array(after)


# ---- measures: singular values (..., N) -> one number for each matrix --------------------------------------------


def effective_rank(s: np.ndarray) -> np.ndarray:
    """exp(-sum_i w_i ln w_i) with w_i = s_i / sum_j s_j: n for n equal values, 1 for a single one.

    Source: O. Roy, M. Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    s = _values(s)
    total = s.sum(axis=-1, keepdims=True)
    weights = np.divide(s, total, out=np.zeros_like(s), where=total > 0)
    logs = np.log(weights, out=np.zeros_like(s), where=weights > 0)
    return np.where(total[..., 0] > 0, np.exp(-(weights * logs).sum(axis=-1)), 0.0)


def stable_rank(s: np.ndarray) -> np.ndarray:
    """sum_i s_i^2 / s_1^2 = (Frobenius norm / spectral norm)^2: hardly asks about small values; at most the rank."""
    s = _values(s)
    largest = s[..., 0]
    return np.divide((s**2).sum(axis=-1), largest**2, out=np.zeros_like(largest), where=largest > 0)


def numerical_rank(s: np.ndarray, dtype=np.float64) -> np.ndarray:
    """How many s_i > N eps s_1, the tolerance of numpy.linalg.matrix_rank: what rounding cannot have made.

    dtype: that in which the matrices were computed (its eps counts, not that of s).
    """
    s = _values(s)
    return (s > _tolerance(s, dtype)).sum(axis=-1)


def energy(s: np.ndarray) -> np.ndarray:
    """Share of sum_i s_i^2 (the squared Frobenius norm) in the first 1, 2, ..., N values: (..., N) -> (..., N).

    By Eckart and Young 1 - energy[..., r - 1] is the squared relative error of the best approximation of rank r.
    """
    s = _values(s)
    sums = (s**2).cumsum(axis=-1)
    return np.divide(sums, sums[..., -1:], out=np.ones_like(s), where=sums[..., -1:] > 0)


def captured(s: np.ndarray, r: int) -> np.ndarray:
    """Share of the energy in the first r values (all N where r is larger)."""
    return energy(s)[..., min(at_least("r", r, 1), np.shape(s)[-1]) - 1]


def values_needed(s: np.ndarray, share: float) -> np.ndarray:
    """How many values, largest first, hold this share of the energy, 0 < share <= 1."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], as 0.95 or 0.99, got {share}.")
    s = _values(s)
    # For share = 1 rounding must not ask for one value more than there is.
    needed = 1 + (energy(s)[..., :-1] < share).sum(axis=-1)
    return np.where(s[..., 0] > 0, needed, 0)


def bands(s: np.ndarray, share: float = 0.9) -> Bands:
    """Per index i over all matrices: the mean in ln, the median, and the ends of the central `share` of the values.

    share = 1 gives least and largest, as in the paper's figure. A value below float64's tolerance N eps s_1 counts as
    that tolerance: below it a logarithm would only show rounding.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], as 0.9 or 1, got {share}.")
    s = _values(s)
    s = np.maximum(s, np.maximum(_tolerance(s, np.float64), np.finfo(np.float64).tiny)).reshape(-1, s.shape[-1])
    logs = np.log(s)
    low, median, high = np.exp(np.quantile(logs, ((1 - share) / 2, 0.5, (1 + share) / 2), axis=0))
    return Bands(np.exp(logs.mean(axis=0)), low, median, high)


def rank_table(found: Spectra, r: int = 12) -> dict[str, dict[str, list[float]]]:
    """All measures, layer by layer: name -> {"before": L numbers, "after": L numbers}, means over images and heads.

    "values for 95 %" and the like are `values_needed`, "energy in r" is `captured`; names that begin with "shared" are
    of all images' matrices stacked on each other.
    """
    measures = {
        "effective rank": effective_rank,
        "stable rank": stable_rank,
        "numerical rank": numerical_rank,
        "values for 95 %": lambda s: values_needed(s, 0.95),
        "values for 99 %": lambda s: values_needed(s, 0.99),
        f"energy in {r}": lambda s: captured(s, r),
    }
    table: dict[str, dict] = {}
    for name, measure in measures.items():
        table[name] = {side: measure(getattr(found, side)).mean(axis=(0, 2)).tolist() for side in ("before", "after")}
    for name, measure in measures.items():
        shared = {side: measure(getattr(found, f"{side}_shared")).mean(axis=1).tolist() for side in ("before", "after")}
        table[f"shared {name}"] = shared
    return table


def _tolerance(s: np.ndarray, dtype) -> np.ndarray:
    return s.shape[-1] * np.finfo(dtype).eps * s[..., :1]


def _values(s) -> np.ndarray:
    """s as float64, checked: finite, not negative, falling."""
    s = np.asarray(s, dtype=np.float64)
    if s.ndim == 0 or s.size == 0:
        raise ValueError(f"singular values must be an array (..., N) that is not empty, got shape {s.shape}.")
    if not np.isfinite(s).all() or s.min() < 0 or (np.diff(s, axis=-1) > 0).any():
        raise ValueError("singular values must be finite, not negative, and the largest first along the last axis.")
    return s
