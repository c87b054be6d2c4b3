"""The learned functions phi_pq of KArAt operators: on a grid of scores, where they are asked, how alike, how they move.

Letters as in functional.py: L layers with an operator, h of its heads, p a unit, q a key, r units, n points of a grid.
Everything comes back as NumPy arrays; functions_plots.py draws them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..attention import HybridActivation
from ..bases import LinearBasis
from ..checks import at_least
from ..operators import KArAtOperator
from ..trajectory import Trajectory
from ..vit import VisionTransformer
from .inputs import checked, device_of, must_be_finite, parts, steady

BINS = 4096  # of the histograms from which quantiles of scores are read
POWERS = ("all alike", "layers", "heads", "units", "keys")


class Place(NamedTuple):
    """Where an operator stands: its layer, and the model's heads that it serves, in the operator's own order."""

    layer: int
    heads: list[int]
    operator: KArAtOperator


def places(model: VisionTransformer) -> list[Place]:
    """The operators of a model, layer by layer; in universal mode the same object at every place.

    Raises `ValueError` for a model without one.
    """
    found = []
    for layer, block in enumerate(model.blocks):
        activation = block.attn.activation
        if isinstance(activation, HybridActivation):
            found.append(Place(layer, activation.learned_heads, activation.operator))
        elif isinstance(activation, KArAtOperator):
            found.append(Place(layer, list(range(block.attn.num_heads)), activation))
    if not found:
        kind = model.config.get("attention", type(model.blocks[0].attn.activation).__name__)
        raise ValueError(
            f"a model with attention {kind!r} has no learned functions: give one with attention='karat' or 'hybrid'."
        )
    return found


@torch.no_grad()
def curves(operator: KArAtOperator, x, stage: str = "", head: int | None = None) -> np.ndarray:
    """All functions of an operator at the scores x (n,), base activation and scales in them.

    Returns (h, units, inputs, n): phi_pq for (r, N) units and keys, (N, N) at full rank; (N, r) for order "phi_w" and
    for stage "2" of "phi_phi", Phi2. With `head` that head alone: (units, inputs, n). Raises `ValueError` for x that is
    not a row of finite numbers, a head or stage that is not there, or coefficients that are not finite.
    """
    x = torch.as_tensor(x)
    if x.ndim != 1 or len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"x must be a row of finite scores, such as torch.linspace(-3, 3, 121), got {tuple(x.shape)}.")
    if stage not in ("", "2") or (stage == "2" and operator.order != "phi_phi"):
        raise ValueError(f"stage {stage!r} is not there: '' is Phi, and '2' is Phi2 of order 'phi_phi' alone.")
    basis, coef = operator.units(stage)
    if head is not None:
        if not 0 <= head < len(coef):
            raise ValueError(f"head = {head} is out of range: this operator has heads 0 to {len(coef) - 1}.")
        coef = coef[head]
    x = x.to(coef)
    if isinstance(basis, LinearBasis):
        values = coef @ basis.features(x).T
    else:
        values = basis.evaluate(x, coef.unsqueeze(-2))
    if not values.isfinite().all():
        raise ValueError("this operator's functions are not finite: its coefficients, or the scores, are no numbers.")
    return values.cpu().numpy()


def constants(operator: KArAtOperator, stage: str = "") -> np.ndarray:
    """phi_pq(0), what a unit adds where the score is 0: (h, units, inputs). It mixes by position alone."""
    return curves(operator, [0.0], stage)[..., 0]


class Scores(NamedTuple):
    """Where scores fall, for every layer and head of a model (softmax heads too)."""

    edges: np.ndarray  # (bins + 1,), the same for all
    shares: np.ndarray  # (L, h, bins), each histogram sums to 1
    low: np.ndarray  # (L, h), 0.5 % of the scores lie below
    high: np.ndarray  # (L, h), 0.5 % of the scores lie above
    mean: np.ndarray  # (L, h)
    std: np.ndarray  # (L, h), over images, queries and keys

    def weights(self, x, layer: int, head: int) -> np.ndarray:
        """The histogram of a head as weights (n,) of rising points x, sum 1: a mean over x is then one over its scores.

        Each point takes what lies between it and the middles to its neighbours, of a bin its part.
        """
        x = np.asarray(x, dtype=float)
        if x.ndim != 1 or (np.diff(x) < 0).any():
            raise ValueError(f"points must rise, as np.linspace(-3, 3, 121) does, got {x}.")
        cells = np.r_[-np.inf, (x[1:] + x[:-1]) / 2, np.inf]
        return np.diff(np.interp(cells, self.edges, np.r_[0.0, np.cumsum(self.shares[layer, head])]))


@torch.no_grad()
def scores_seen(model: VisionTransformer, images: Tensor, bins: int = 120, batch_size: int = 50) -> Scores:
    """The scores S_kq of all pairs of tokens of these images (n, 3, H, W), in any model: what activations are asked.

    Units of order "phi_w" see scores that W has mixed, so for their heads it is those. The histograms reach from the
    smallest to the largest of all, in 1 to 4096 bins; quantiles are right to 1/2048 of that (1/4080 with 120 bins), or
    to the next score where there are few. Raises `ValueError` for images that do not fit, another number of bins, or a
    model whose scores are not finite.
    """
    if at_least("bins", bins, 1) > BINS:
        raise ValueError(f"bins must be at most {BINS}, got {bins}.")
    checked(model, images)
    steady(model)
    shape = len(model.blocks), model.blocks[0].attn.num_heads

    def each():
        for batch in parts(images, batch_size):
            batch = batch.to(device_of(model))
            logits, records = model(batch, return_attention=True)
            must_be_finite(model, batch, logits)
            for layer, record in enumerate(records):
                for head in range(shape[1]):
                    yield (layer, head), _asked(model, layer, head, record.scores).cpu().double().flatten()

    low, high = np.inf, -np.inf
    total, squares, count = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for at, scores in each():
        low, high = min(low, scores.min().item()), max(high, scores.max().item())
        total[at] += scores.sum().item()
        squares[at] += scores.square().sum().item()
        count[at] += len(scores)
    high = high if high > low else low + 1.0  # all scores alike
    fine = np.zeros((*shape, BINS // bins * bins))
    for at, scores in each():
        fine[at] += torch.histc(scores, fine.shape[-1], low, high).numpy() / count[at]
    edges = np.linspace(low, high, fine.shape[-1] + 1)
    reached = np.concatenate([np.zeros((*shape, 1)), fine.cumsum(axis=-1)], axis=-1)
    ends = np.array([[np.interp((0.005, 0.995), at, edges) for at in layer] for layer in reached])
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    shares = fine.reshape(*shape, bins, -1).sum(axis=-1)
    return Scores(edges[:: fine.shape[-1] // bins], shares, ends[..., 0], ends[..., 1], mean, std)


def _asked(model: VisionTransformer, layer: int, head: int, scores: Tensor) -> Tensor:
    """Scores (B, h, N, N) of a layer -> what this head's functions are asked, (B, N, N), or for "phi_w" (B, N, r)."""
    activation = model.blocks[layer].attn.activation
    operator, heads = activation, list(range(scores.shape[1]))
    if isinstance(activation, HybridActivation):
        operator, heads = activation.operator, activation.learned_heads
    if isinstance(operator, KArAtOperator) and operator.order == "phi_w" and head in heads:
        return scores[:, head] @ operator.weight[heads.index(head)].to(scores).T
    return scores[:, head]


class Learned(NamedTuple):
    """All functions of a model, each head on the range that its scores have: L layers with an operator, h heads there.

    x (L, h, n): from the lowest to the highest score, 0.5 % left out at either end; functions (L, h, units, inputs, n);
    weights (L, h, n): the share of the head's scores that is nearest to each x; layers (L), heads (h): their numbers.
    """

    x: np.ndarray
    functions: np.ndarray
    weights: np.ndarray
    layers: list[int]
    heads: list[int]


def learned(model: VisionTransformer, images: Tensor, points: int = 61) -> Learned:
    """The functions of a KArAt model or a hybrid, where these images ask them. Raises `ValueError` as its parts do."""
    found = places(model)
    scores = scores_seen(model, images, bins=BINS)
    heads = found[0].heads
    x = np.array([[np.linspace(scores.low[layer, j], scores.high[layer, j], points) for j in heads]
                  for layer, *_ in found])  # fmt: skip
    functions = np.stack([
        np.stack([curves(place.operator, of_head, head=j) for j, of_head in enumerate(of_layer)])
        for place, of_layer in zip(found, x, strict=True)
    ])  # fmt: skip
    weights = np.array([[scores.weights(of_head, place.layer, j) for j, of_head in zip(heads, of_layer, strict=True)]
                        for place, of_layer in zip(found, x, strict=True)])  # fmt: skip
    return Learned(x, functions, weights, [place.layer for place in found], heads)


def powers_by_degree(functions, x, weights=None, degree: int = 2) -> np.ndarray:
    """What functions (..., n) are on the points x (n,): their power as a constant, a line, a parabola .. and the rest.

    Returns (..., degree + 2): mean squares over the points with these weights (n,) (even if None) of the projections
    on polynomials that are orthogonal under them, in rising degree, then of what is left. They sum to mean phi^2:
    divide by that for shares, of one function or, summed before, of many. A function whose first share is 1 does not
    look at its score.
    """
    functions, x = np.asarray(functions, dtype=float), np.asarray(x, dtype=float)
    root = np.sqrt(_even(weights, functions.shape[-1]))
    middle, reach = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2 or 1.0
    powers = ((x - middle) / reach)[:, None] ** np.arange(degree + 1)
    polynomials, triangle = np.linalg.qr(powers * root[:, None])
    size = np.abs(np.diag(triangle))
    polynomials[:, size < 1e-9 * size.max()] = 0.0  # fewer points with weight than degrees
    polynomials = np.pad(polynomials, ((0, 0), (0, degree + 1 - polynomials.shape[1])))  # or fewer points than that
    parts = (functions * root) @ polynomials
    total = (functions * root) ** 2 @ np.ones(len(x))
    rest = np.maximum(total - (parts**2).sum(axis=-1), 0)
    return np.concatenate([parts**2, rest[..., None]], axis=-1)


class Unit(NamedTuple):
    """One unit of an operator. maps: name -> (N,) numbers, one for each token; empty where the axes are no tokens."""

    curves: np.ndarray  # (inputs, n)
    maps: dict[str, np.ndarray]


def unit(operator: KArAtOperator, x, weights, head: int, p: int) -> Unit:
    """Unit p of a head at the scores x (n,) that have these weights (n,): its functions, where it reads and writes.

    Maps, for orders in which inputs are tokens (all but "phi_w"): "adds at any score", the mean of phi_pq over the
    scores; "follows the score", its standard deviation over them; and with a projector W "writes to", W_np.
    """
    functions = curves(operator, x, head=head)
    if not 0 <= p < len(functions):
        raise ValueError(f"unit {p} is not there: this operator has units 0 to {len(functions) - 1}.")
    mine, weights, maps = functions[p].astype(float), _even(weights, functions.shape[-1]), {}
    if operator.order != "phi_w":
        mean = mine @ weights
        maps = {"adds at any score": mean, "follows the score": np.sqrt((mine - mean[:, None]) ** 2 @ weights)}
        if operator.weight is not None:
            maps["writes to"] = operator.weight[head, :, p].detach().cpu().numpy()
    return Unit(mine, maps)


def power_shares(functions, weights=None) -> dict[str, float]:
    """How alike functions are: functions (L, h, r, N, n) -> shares of their power, summing to 1.

        all alike   the mean of all functions
        layers      what a layer's mean adds to that, heads: a head's to its layer's, units: a unit's to its head's
        keys        what is left: the functions of one unit differ from key to key

    Nested means are orthogonal, so that powers (means of squares over functions and scores) add up. The k-th number of
    every function is set against the k-th of all others: functions on one x for all are compared at equal scores; those
    of `learned`, each head on its own range, at equal places within their ranges, from the lowest score to the highest.
    """
    mean = np.asarray(functions, dtype=float)
    if mean.ndim != 5:
        raise ValueError(f"expected functions (L, h, r, N, n): np.stack of curves over layers, got {mean.shape}.")
    weights = _even(weights, mean.shape[-1])
    powers = []
    for _ in range(4):
        coarser = mean.mean(axis=-2)
        powers.append((mean**2 @ weights).mean() - (coarser**2 @ weights).mean())
        mean = coarser
    powers.append((mean**2 @ weights).mean())
    total = sum(powers) or 1.0
    return dict(zip(POWERS, (float(power / total) for power in reversed(powers)), strict=True))


class Shapes(NamedTuple):
    """The few functions that all functions are nearly made of."""

    shapes: np.ndarray  # (k, n): orthonormal under the weights, the one with most power first
    shares: np.ndarray  # (k,): of the power of all functions
    parts: np.ndarray  # (..., k): how much of each is in every function


def principal_shapes(functions, weights=None, count: int = 4) -> Shapes:
    """Singular vectors of functions (..., n), means not taken away; k = min(count, n). Each has its mean >= 0.

    A basis of F maps spans F shapes at most: the shares of k = F add to 1.
    """
    functions = np.asarray(functions, dtype=float)
    weights = _even(weights, functions.shape[-1])
    root = np.sqrt(weights)
    rows = functions.reshape(-1, len(weights)) * root
    power, vectors = np.linalg.eigh(rows.T @ rows)  # n x n, however many functions there are
    power, vectors = power[::-1].clip(0)[:count], vectors[:, ::-1][:, :count]
    # Where the weight is 0 no shape is determined: it is 0 there.
    shapes = np.divide(vectors.T, root, out=np.zeros_like(vectors.T), where=root > 0)
    shapes *= np.where(shapes @ weights < 0, -1.0, 1.0)[:, None]
    total = (rows**2).sum() or 1.0
    return Shapes(shapes, power / total, functions @ (shapes * weights).T)


class Motion(NamedTuple):
    """How operators move through a training of T snapshots; sizes are root mean squares over a layer's operator.

    Each dictionary: part -> array. Parts: "functions" (Phi on the grid), "W" where there is one, "functions of Phi2".
    """

    steps: np.ndarray  # (T,)
    distance: dict[str, np.ndarray]  # (T, L): |now - start| / |start|
    change: dict[str, np.ndarray]  # (T - 1, L): |now - snapshot before| / |snapshot before|
    functions: np.ndarray  # (len(keep), L, h, units, inputs, n): Phi at the snapshots that were to be kept


def motion(trajectory: Trajectory, x, keep: Sequence[int] = ()) -> Motion:
    """Distances of functions, on the grid x (n,), and of W from the start and from one snapshot to the next.

    Weights were rounded to half precision: relative changes below 5e-4 are rounding. keep: snapshots whose functions
    are returned (they are the large part). Raises `ValueError` for one snapshot, or a model without operators.
    """
    if len(trajectory) < 2:
        raise ValueError("a motion needs a trajectory of at least 2 snapshots, got 1: train with snapshots=20.")
    keep = [t % len(trajectory) if -len(trajectory) <= t < len(trajectory) else t for t in keep]
    start, before, kept = None, None, {}
    distance: dict[str, list] = {}
    change: dict[str, list] = {}
    for t in range(len(trajectory)):
        layers = [_parts(place.operator, x) for place in places(trajectory.model(t))]
        now = {part: [layer[part] for layer in layers] for part in layers[0]}
        start = start or now
        for part, values in now.items():
            distance.setdefault(part, []).append(_relative(values, start[part]))
            if before is not None:
                change.setdefault(part, []).append(_relative(values, before[part]))
        if t in keep:
            kept[t] = np.stack(now["functions"])
        before = now
    if missing := [t for t in keep if t not in kept]:
        raise ValueError(f"snapshot {missing[0]} is not there: this trajectory holds 0 to {len(trajectory) - 1}.")
    functions = np.stack([kept[t] for t in keep]) if keep else np.zeros((0, len(layers), *layers[0]["functions"].shape))
    stacked = [{part: np.array(rows) for part, rows in each.items()} for each in (distance, change)]
    return Motion(np.array(trajectory.steps), *stacked, functions)


def _parts(operator: KArAtOperator, x) -> dict[str, np.ndarray]:
    """What moves in an operator, by name."""
    found = {"functions": curves(operator, x)}
    if operator.weight is not None:
        found["W"] = operator.weight.detach().cpu().numpy()
    if operator.order == "phi_phi":
        found["functions of Phi2"] = curves(operator, x, "2")
    return found


def _relative(now: list[np.ndarray], then: list[np.ndarray]) -> list[float]:
    """|now - then| / |then|, layer by layer."""
    return [float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)) for a, b in zip(now, then, strict=True)]


def _even(weights, n: int) -> np.ndarray:
    """Weights (n,) with sum 1; even ones for None."""
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if weights.shape != (n,) or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"weights must be {n} numbers >= 0, one for each point and not all 0, got {weights.shape}.")
    return weights / weights.sum()
