"""Directions through the space of all weights: those that a training took, and random ones sized like the weights.

theta is all weights of a model, by name; what is shared between blocks (universal mode) is one tensor of it. A
direction is as large as theta. Sources: paper, section 5; Li et al. 2018, arXiv:1712.09913, for both kinds.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import at_least
from ..trajectory import Trajectory


@dataclass(frozen=True)
class Directions:
    """n directions through the space of all weights, from an origin.

    kind: "principal" | "random" | "sharpest"; origin: name -> tensor; along: name -> (n, ...), the same tensor in every
    direction. Principal ones are orthonormal; random ones are as long as the weights, filter by filter. explained: of
    principal directions all T - 1 shares of the squared distances, largest first; else None.
    """

    kind: str
    origin: dict[str, Tensor]
    along: dict[str, Tensor]
    explained: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.along.values())))

    def weights(self, *coordinates: float) -> dict[str, Tensor]:
        """theta + sum_i c_i d_i for the first coordinates; those that are left out are 0."""
        if not 1 <= len(coordinates) <= len(self):
            raise ValueError(f"expected 1 to {len(self)} coordinates, one for each direction, got {len(coordinates)}.")
        moved = {}
        for name, at in self.origin.items():
            parts = zip(coordinates, self.along[name], strict=False)
            moved[name] = at + sum(float(c) * d for c, d in parts)
        return moved

    def coordinates(self, trajectory: Trajectory) -> np.ndarray:
        """Where the T snapshots lie, projected on the span of the directions (least squares): (T, n)."""
        check_fits("trajectory", trajectory.weights, self.origin, leading=1)
        gram, products = 0.0, 0.0
        for name, at in self.origin.items():
            d = self.along[name].cpu().double().flatten(1)  # Apple's devices know no float64
            x = (trajectory.weights[name].cpu().double() - at.cpu().double()).flatten(1)
            gram, products = gram + d @ d.T, products + x @ d.T
        return torch.linalg.lstsq(gram, products.T, driver="gelsd").solution.T.numpy()  # also of dependent directions


def principal_directions(trajectory: Trajectory, count: int = 2) -> Directions:
    """The `count` directions that a training took most: right singular vectors of X, X_t = theta_t - theta_last.

    X is T x P with few rows, so they come from the T x T matrix X X^T = U diag(s^2) U^T: d_i = X^T u_i / s_i; the share
    explained is s_i^2 / sum_j s_j^2. Distances are taken from the last snapshot, not from the mean of all, so that the
    plane goes through the trained model. Signs: the snapshot that is farthest out in a direction lies on its + side.
    Raises `ValueError` for weights that are not finite or too few snapshots that differ.
    """
    at_least("count", count, 1)
    if len(trajectory) < 2:
        raise ValueError(
            f"a trajectory of {len(trajectory)} snapshot has no directions: train with snapshots=20, or take "
            "random_directions, which need a single model."
        )
    check_finite(trajectory.weights)
    apart = {name: x - x[-1] for name, x in trajectory.weights.items()}
    gram = sum(x.double().flatten(1) @ x.double().flatten(1).T for x in apart.values())
    squares, u = torch.linalg.eigh(gram)
    squares, u = squares.flip(0)[:-1].clamp(min=0), u.flip(1)[:, :-1]  # the last row of X is 0: T - 1 directions
    there = int((squares > 1e-12 * squares[0]).sum()) if squares[0] > 0 else 0
    if there < count:
        raise ValueError(
            f"the {len(trajectory)} snapshots span {there} direction{'s' * (there != 1)}, asked for {count}: save more "
            "snapshots of a training that moves, or take random_directions."
        )
    u = u[:, :count] * u[:, :count].gather(0, u[:, :count].abs().argmax(0, keepdim=True)).sign()
    mix = (u / squares[:count].sqrt()).T  # (count, T)
    along = {name: torch.einsum("nt,t...->n...", mix, x.double()).to(x.dtype) for name, x in apart.items()}
    origin = {name: x[-1].clone() for name, x in trajectory.weights.items()}
    return Directions("principal", origin, along, (squares / squares.sum()).numpy())


def random_directions(model: nn.Module | Mapping[str, Tensor], count: int = 2, seed: int = 0) -> Directions:
    """Gaussian directions in which every filter has the norm that it has in the weights ("filter-normalised").

    model: a model, or its weights by name. A tensor draws from a generator of its own, made of seed and name, so twins
    get the same direction wherever they have the same tensor. For filters see `filter_norms`; single numbers (biases,
    norms' gains) stay where they are. Source: Li et al. 2018, section 4.
    """
    origin = weights_of(model)
    check_finite(origin)
    norms, along = filter_norms(origin), {}
    for name, at in origin.items():
        own = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # of a seed 32 bits count
        d = torch.randn(at_least("count", count, 1), *at.shape, generator=own, device="cpu").to(at)
        along[name] = d * norms[name] / torch.stack([_norms(name, each) for each in d]).clamp(min=1e-12)
    return Directions("random", origin, along)


def filter_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> the norm of the filter that each number belongs to, in a shape that broadcasts; 0 for single numbers.

    A filter is all that feeds one output: a row of a linear map (out, in); a kernel of a convolution (out, in, P, P);
    in an operator all coefficients of the units that are summed in Y_p, coef[h, p] of (h, r, N, F), and row n of a
    head's projector, weight[h, n] of (h, N, r); the positions' vector of one token. Biases and gains are none.
    """
    return {name: _norms(name, x) if x.ndim > 1 else torch.zeros_like(x) for name, x in weights.items()}


def _norms(name: str, x: Tensor) -> Tensor:
    if x.ndim < 2:
        return torch.ones_like(x)
    # Leading axes that count filters: coefficients have four axes, as a convolution has.
    own = 2 if x.ndim == 3 or name.split(".")[-1].startswith("coef") else 1
    return torch.linalg.vector_norm(x, dim=tuple(range(own, x.ndim)), keepdim=True)


def weights_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights by name, detached; a tensor that several blocks share, once."""
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    return {name: value.detach().clone() for name, value in named}


class Lengths(NamedTuple):
    """How far a training went, in the Euclidean norm of all weights."""

    steps: np.ndarray  # (T - 1,) from each snapshot to the next
    to_end: np.ndarray  # (T,) from each snapshot to the last
    norms: np.ndarray  # (T,) of the weights themselves


def path_lengths(trajectory: Trajectory) -> Lengths:
    """Lengths of the steps between snapshots, distances to the last one, norms of the weights."""
    parts = [x.double().flatten(1) for x in trajectory.weights.values()]
    norm = lambda change: sum(change(x).square().sum(dim=1) for x in parts).sqrt().numpy()  # noqa: E731
    return Lengths(norm(lambda x: x[1:] - x[:-1]), norm(lambda x: x - x[-1]), norm(lambda x: x))


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` that names the tensors that hold NaN or infinity."""
    if bad := [name for name, x in weights.items() if not x.isfinite().all()]:
        raise ValueError(
            f"{len(bad)} of {len(weights)} tensors hold NaN or infinity, first {bad[0]}: the training diverged, or the "
            "file is damaged. A loss around such weights means nothing."
        )


def check_fits(what: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], leading: int = 0) -> None:
    """Raise `ValueError` unless `given` has the names and, behind `leading` axes, the shapes of `expected`."""
    if odd := sorted(set(given) ^ set(expected)):
        raise ValueError(
            f"these are weights of different models: {odd[0]} is in the {what} or in what it is compared with, not in "
            "both. Make directions from the model that they are used with."
        )
    for name, x in expected.items():
        if given[name].shape[leading:] != x.shape:
            raise ValueError(
                f"these are weights of different models: {name} has shape {tuple(given[name].shape[leading:])} in the "
                f"{what}, expected {tuple(x.shape)}. Make directions from the model that they are used with."
            )
