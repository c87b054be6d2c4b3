"""How weights are distributed, kind by kind, over a training: moments, quantiles, tails, histograms on common edges.

All read a `Trajectory`, whose snapshots are rounded to half precision (11 bits: relative steps of 1/2048).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import at_least, one_of
from ..trajectory import Trajectory

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
# What the tail of a normal distribution holds beyond 3 and 4 standard deviations, on both sides together.
NORMAL_BEYOND = {3: 2.6998e-3, 4: 6.3342e-5}


class WeightStatistics(NamedTuple):
    """Of n weights at T snapshots; arrays (T,), quantiles (T, Q)."""

    count: int
    mean: np.ndarray
    std: np.ndarray  # dividing by n
    kurtosis: np.ndarray  # excess: E (w - mean)^4 / std^4 - 3, 0 for a normal distribution; NaN where all are equal
    quantiles: np.ndarray  # at QUANTILES, interpolated linearly
    beyond3: np.ndarray  # share of weights more than 3 standard deviations from the mean
    beyond4: np.ndarray  # more than 4
    moved: np.ndarray  # |w_t - w_0| / |w_last|: how far from the start, as a share of the length at the end


class Histograms(NamedTuple):
    """Densities of T snapshots on the same edges."""

    edges: np.ndarray  # (bins + 1,)
    density: np.ndarray  # (T, bins): share of weights in a bin / its width
    outside: np.ndarray  # (T,): share of weights that lie beyond the edges, on either side


def weight_kinds(trajectory: Trajectory) -> dict[str, list[int]]:
    """The kinds of parameters of this model, in reading order: name -> the layers that have them ([] for none).

        embedding, positions                the patches' convolution; positions and class token
        queries, keys, values               the thirds of every block's qkv matrix
        attention projection, mlp, head     the other matrices
        a1 .. aG, b1 .. bG                  Fourier coefficients, harmonic by harmonic; of other bases c1 .. cF
        W                                   projectors
        mixing                              the matrices of a static or pooled mixer
        edge scales                         w_b and w_s
        norms, biases                       factors of the norms; everything that is added, norms' biases included

    The second operator of Phi2[Phi1[A]] has kinds of its own, "a1 (Phi2)". What blocks share (universal mode) belongs
    to the first of them: to layer 0, or in a hybrid to the first layer that is not softmax. Every number of the model
    is in exactly one kind.
    """
    found: dict[str, set] = {}
    for kind, layer, _ in _pieces(trajectory):
        found.setdefault(kind, set()).update([] if layer is None else [layer])
    return {kind: sorted(found[kind]) for kind in sorted(found, key=_reading_order)}


def weight_values(trajectory: Trajectory, kind: str, layer: int | None = None) -> np.ndarray:
    """All weights of a kind at all snapshots, (T, n) float64; of one layer, or of the whole model (None).

    Raises `ValueError` for a kind or layer that the model does not have, for a trajectory of one snapshot, and for
    weights that are not finite.
    """
    kinds = weight_kinds(trajectory)
    if len(trajectory) < 2:
        raise ValueError(
            f"a history of weights needs at least two snapshots, this trajectory has {len(trajectory)}: "
            "train with --snapshots 20."
        )
    layers = kinds[one_of("kind of weights of this model", kind, kinds)]
    if layer is not None and layer not in layers:
        there = f"layers {', '.join(map(str, layers))}" if layers else "no layers: leave `layer` out"
        raise ValueError(f"layer {layer} is not there: the kind {kind!r} has {there}.")
    parts = [
        values.reshape(len(trajectory), -1)
        for its_kind, its_layer, values in _pieces(trajectory)
        if its_kind == kind and layer in (None, its_layer)
    ]
    values = torch.cat(parts, dim=1).double().numpy()
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        raise ValueError(
            f"the weights {kind!r} are not finite from snapshot {bad[0]} on (step {trajectory.steps[bad[0]]}): "
            "that training diverged; look at the snapshots before, or train with a smaller learning rate."
        )
    return values


def weight_statistics(values: np.ndarray) -> WeightStatistics:
    """Moments, quantiles and tails at every snapshot: values (T, n) of `weight_values`."""
    values = _checked(values)
    mean, std = values.mean(axis=1), values.std(axis=1)
    apart = values - mean[:, None]
    differ = std > 1e-12 * np.abs(values).max(axis=1)  # else all are equal, up to the rounding of their mean
    fourth = (apart**4).mean(axis=1)
    kurtosis = np.divide(fourth, std**4, out=np.full_like(std, np.nan), where=differ) - 3
    beyond = [(np.abs(apart) > sigmas * std[:, None]).mean(axis=1) for sigmas in NORMAL_BEYOND]
    length = np.linalg.norm(values[-1])
    moved = np.linalg.norm(values - values[0], axis=1)
    moved = moved / length if length > 0 else moved
    quantiles = np.quantile(values, QUANTILES, axis=1).T
    return WeightStatistics(values.shape[1], mean, std, kurtosis, quantiles, *beyond, moved)


def weight_histograms(values: np.ndarray, bins: int = 80, cover: float = 0.999) -> Histograms:
    """Histograms of all snapshots on common edges: values (T, n) of `weight_values`.

    The edges hold the central share `cover` of the weights of every snapshot (1: all of them): a few far weights would
    leave the picture empty. `outside` says how many they are.
    """
    values = _checked(values)
    if not 0 < cover <= 1:
        raise ValueError(f"cover must lie in (0, 1], as 0.999 or 1, got {cover}.")
    low, high = np.quantile(values, ((1 - cover) / 2, (1 + cover) / 2), axis=1)
    low, high = low.min(), high.max()
    if low == high:  # all weights, at all times
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, at_least("bins", bins, 1) + 1)
    counts = np.stack([np.histogram(snapshot, edges)[0] for snapshot in values])
    shares = counts / values.shape[1]
    return Histograms(edges, shares / np.diff(edges), 1 - shares.sum(axis=1))


def tail_table(trajectory: Trajectory) -> dict[str, dict]:
    """Kind -> count, and standard deviation, kurtosis, beyond4 and moved at the first, middle and last snapshot.

    For tables and files: plain numbers, None for what is not defined.
    """
    middle = len(trajectory) // 2
    table = {}
    for kind in weight_kinds(trajectory):
        found = weight_statistics(weight_values(trajectory, kind))
        table[kind] = {"count": found.count}
        for name in ("std", "kurtosis", "beyond4", "moved"):
            three = getattr(found, name)[[0, middle, -1]]
            table[kind][name] = [None if np.isnan(value) else float(value) for value in three]
    return table


def _pieces(trajectory: Trajectory):
    """(kind, layer or None, weights (T, ...)) of everything in a trajectory."""
    fourier = trajectory.card.get("config", {}).get("basis", "fourier") == "fourier"
    for name, values in trajectory.weights.items():
        words = name.split(".")
        layer = int(words[1]) if words[0] == "blocks" else None
        for kind, part in _kinds_of(name, words, values, fourier):
            yield kind, layer, part


def _kinds_of(name: str, words: list[str], values: Tensor, fourier: bool):
    """The kinds that one named parameter holds: (kind, its part of the values)."""
    last, module = words[-1], words[-2] if len(words) > 1 else ""
    if last.startswith("coef"):
        count, stage = values.shape[-1], " (Phi2)" if last == "coef2" else ""
        half = count // 2
        names = [f"{letter}{m}" for letter in "ab" for m in range(1, half + 1)]
        names = names if fourier else [f"c{f}" for f in range(1, count + 1)]
        return [(f"{kind}{stage}", values[..., f]) for f, kind in enumerate(names)]
    if "activation" in words:
        return [({"weight": "W", "mix": "mixing"}.get(last, "edge scales"), values)]
    if name in ("cls_token", "pos_embed"):
        return [("positions", values)]
    if last == "bias":
        return [("biases", values)]
    if module == "qkv":
        return list(zip(("queries", "keys", "values"), values.chunk(3, dim=1), strict=True))
    if module.startswith("norm"):
        return [("norms", values)]
    if words[0] in ("patch_embed", "head"):
        return [("embedding" if words[0] == "patch_embed" else "head", values)]
    return [("attention projection" if module == "proj" else "mlp", values)]


_BEFORE = ("embedding", "positions", "queries", "keys", "values", "attention projection", "mlp", "head")
_AFTER = ("W", "mixing", "edge scales", "norms", "biases")


def _reading_order(kind: str) -> tuple:
    """The body's matrices, the operators' coefficients (stage by stage, letter by letter), and what is small."""
    if kind in _BEFORE:
        return (0, _BEFORE.index(kind))
    if kind in _AFTER:
        return (2, _AFTER.index(kind))
    return (1, kind.endswith("(Phi2)"), kind[0], int(kind.split()[0][1:]))


def _checked(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"expected weights of every snapshot, (T, n) as weight_values gives, got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of these weights are not finite.")
    return values
