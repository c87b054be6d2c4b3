"""The loss on lines and planes through the space of all weights.

    L(alpha, beta) = loss(theta + alpha d_1 + beta d_2)

with theta all weights of a model and d_1, d_2 directions as large as they are (directions.py). Loss: mean cross-entropy
on a fixed set of images. Sources: paper, section 5; Li et al. 2018, arXiv:1712.09913.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..checkpoints import first_line, write_whole
from ..trajectory import Trajectory
from .directions import Directions, check_finite, check_fits, random_directions
from .inputs import steady, whole_numbers

SAVE_EVERY = 2.0  # seconds between writes of an unfinished grid
LARGEST = 10.0  # no normalised image holds a larger number


def batch_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    *,
    smoothing: float = 0.0,
    chunk: int = 64,
) -> float:
    """Mean cross-entropy in nats of `model` on these images, with its own or other weights, `chunk` images at a time.

    images (n, 3, H, W) in [-1, 1] and labels (n,) as `data[:n]` gives them, on any device: they go to the model's.
    smoothing: of the labels. The model stays as it is. Raises `ValueError` for images or labels that do not fit it.
    """
    own = dict(model.named_parameters())
    weights = own if weights is None else weights
    check_fits("weights", weights, own)
    check_finite(weights)
    images, labels = check_batch(model, images, labels)
    weights = {name: x.to(own[name]) for name, x in weights.items()}
    return _loss(model, weights, images, labels, smoothing, chunk)


@torch.no_grad()
def _loss(model, weights, images, labels, smoothing, chunk) -> float:
    total = 0.0
    for some, answers in zip(images.split(chunk), labels.cpu().split(chunk), strict=True):
        # tie_weights=True would leave moved weights in a module that blocks share (pytorch/pytorch#164759). A shared
        # module has one place for each tensor, so there is nothing to tie.
        # Sums are taken in float64 on the CPU: Apple's devices know no float64.
        logits = functional_call(model, weights, (some,), tie_weights=False).cpu().double()
        total += F.cross_entropy(logits, answers, reduction="sum", label_smoothing=smoothing).item()
    return total / len(images)


class Landscape(NamedTuple):
    """The loss over a plane: loss[i, j] at (alphas[j], betas[i])."""

    alphas: np.ndarray  # (A,) along the first direction
    betas: np.ndarray  # (B,) along the second
    loss: np.ndarray  # (B, A)


def loss_grid(
    model: nn.Module,
    directions: Directions,
    images: Tensor,
    labels: Tensor,
    alphas,
    betas,
    *,
    file: str | Path | None = None,
    smoothing: float = 0.0,
    chunk: int = 64,
    progress: bool = True,
) -> Landscape:
    """The loss at every theta + alpha d_1 + beta d_2, with a progress bar.

    model: any whose weights have the directions' names and shapes; its own values play no part. file: written every few
    seconds and at an interruption, whole each time; a later call with the same arguments goes on where it ends, and one
    that is complete is read. It carries digests of weights, directions, images, labels and grid: `ValueError` where one
    is another. The rest as in `batch_loss`.
    """
    if len(directions) < 2:
        raise ValueError(f"a grid needs two directions, got {len(directions)}: loss_profile draws lines.")
    alphas, betas = _axis("alphas", alphas), _axis("betas", betas)
    images, labels = check_batch(model, images, labels)
    directions = _ready(model, directions)
    card = _card(model, directions, images, labels, alphas, betas, smoothing)
    loss = torch.full((len(betas), len(alphas)), torch.nan, dtype=torch.float64)
    done = torch.zeros_like(loss, dtype=torch.bool)
    file = None if file is None else Path(file)
    if file is not None and file.is_file():
        loss, done = _read_grid(file, card)
    todo = (~done).nonzero().tolist()
    from tqdm.auto import tqdm

    bar = tqdm(total=done.numel(), initial=done.numel() - len(todo), desc="loss", unit="point", disable=not progress)
    saved = time.monotonic()
    try:
        for i, j in todo:
            weights = directions.weights(alphas[j], betas[i])
            loss[i, j], done[i, j] = _loss(model, weights, images, labels, smoothing, chunk), True
            bar.update()
            if file is not None and time.monotonic() - saved > SAVE_EVERY:
                _write_grid(file, card, loss, done)
                saved = time.monotonic()
    finally:
        bar.close()
        if file is not None and todo:
            _write_grid(file, card, loss, done)
    return Landscape(alphas, betas, loss.numpy())


def loss_profile(
    model: nn.Module, directions: Directions, images: Tensor, labels: Tensor, alphas, *, smoothing=0.0, chunk: int = 64
) -> np.ndarray:
    """The loss along each direction alone, theta + alpha d_i: (n, A). Arguments as in `loss_grid`."""
    alphas = _axis("alphas", alphas)
    images, labels = check_batch(model, images, labels)
    directions = _ready(model, directions)
    measure = lambda at: _loss(model, directions.weights(*at), images, labels, smoothing, chunk)  # noqa: E731
    return np.array([[measure(alpha * unit) for alpha in alphas] for unit in np.eye(len(directions))])


class PathLosses(NamedTuple):
    """A training's path beside its shadow on the span of some directions."""

    coordinates: np.ndarray  # (T, n)
    projected: np.ndarray  # (T,) loss at theta + sum_i c_ti d_i: what lies on the surface
    own: np.ndarray  # (T,) loss of the snapshot itself


def path_losses(
    model: nn.Module,
    directions: Directions,
    trajectory: Trajectory,
    images: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    chunk: int = 64,
) -> PathLosses:
    """Coordinates of all snapshots, the loss of each projected one and of each as it was."""
    images, labels = check_batch(model, images, labels)
    coordinates, directions = directions.coordinates(trajectory), _ready(model, directions)
    like = dict(model.named_parameters())
    measure = lambda weights: _loss(model, weights, images, labels, smoothing, chunk)  # noqa: E731
    projected = [measure(directions.weights(*at)) for at in coordinates]
    own = [measure({k: x[t].to(like[k]) for k, x in trajectory.weights.items()}) for t in range(len(trajectory))]
    return PathLosses(coordinates, np.array(projected), np.array(own))


class Rise(NamedTuple):
    """How much the loss rises around a model, at a distance that is a share of every filter's norm."""

    radius: float
    mean: float  # over directions and both signs
    each: np.ndarray  # (n, 2): along -d_i and +d_i


def rise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: float = 0.1,
    count: int = 10,
    *,
    seed: int = 0,
    smoothing: float = 0.0,
    chunk: int = 64,
) -> Rise:
    """Mean of loss(theta +- radius d) - loss(theta) over `count` filter-normalised random directions d."""
    if not radius > 0:
        raise ValueError(f"radius must be positive, a share of every filter's norm such as 0.1, got {radius!r}.")
    start = batch_loss(model, images, labels, smoothing=smoothing, chunk=chunk)
    directions = random_directions(model, count, seed)
    ends = loss_profile(model, directions, images, labels, [-radius, radius], smoothing=smoothing, chunk=chunk)
    return Rise(radius, float(ends.mean() - start), ends - start)


def grid_around(coordinates, points: int = 15, margin: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Axes (alphas, betas) of a square grid around a path's first two coordinates (T, 2) and the origin.

    Both axes are equally long, so that a square figure shows angles as they are. margin: what is added on each side, as
    a share of the larger of the path's two ranges.
    """
    coordinates = np.asarray(coordinates, dtype=float)
    if coordinates.ndim != 2 or coordinates.shape[1] < 2:
        raise ValueError(f"a plane needs two coordinates of each snapshot, (T, 2) or more, got {coordinates.shape}.")
    at = np.vstack([coordinates[:, :2], [[0.0, 0.0]]])
    low, high = at.min(axis=0), at.max(axis=0)
    half = (0.5 + margin) * ((high - low).max() or 1.0)
    return tuple(np.linspace(middle - half, middle + half, points) for middle in (low + high) / 2)


# ---- what is checked -------------------------------------------------------------------------------------------------


def check_batch(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels (int64) on the model's device.

    Raises `ValueError` for those that the model was not made for, or that are not brought into its range.
    """
    steady(model)
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"expected at least one image and a label for each, got images {tuple(images.shape)} and labels "
            f"{tuple(labels.shape)}: `images, labels = data[:256]`."
        )
    if images.is_floating_point() and images.abs().max() > LARGEST:
        raise ValueError(
            f"images reach {images.abs().max():.3g}, models take about [-1, 1]: karat_lite.data.normalise(images) "
            "brings bytes there."
        )
    device = next(model.parameters()).device
    images, given, labels = images.to(device), labels.dtype, labels.to(device)
    whole, labels = whole_numbers(labels), labels.long()
    with torch.no_grad():
        classes = model(images[:1]).shape[-1]  # raises for another size
    if not whole or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must be whole numbers from 0 to {classes - 1}, the classes of this model: got {given} from "
            f"{labels.min().item()} to {labels.max().item()}."
        )
    return images, labels


def _axis(what: str, values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"{what} must be a line of finite numbers, got shape {values.shape}.")
    return values


def _ready(model: nn.Module, directions: Directions) -> Directions:
    """The directions, checked, on the device and in the type of the model's weights."""
    own = dict(model.named_parameters())
    if half := [name for name, x in own.items() if x.dtype in (torch.float16, torch.bfloat16)]:
        raise ValueError(
            f"{half[0]} is {own[half[0]].dtype}, in which a small step from a weight is lost to rounding: take "
            "model.float() for losses along directions."
        )
    check_fits("model", own, directions.origin)
    check_finite(directions.origin)
    check_finite(directions.along)
    origin = {name: x.to(own[name]) for name, x in directions.origin.items()}
    return replace(directions, origin=origin, along={name: x.to(own[name]) for name, x in directions.along.items()})


# ---- grids on disk ---------------------------------------------------------------------------------------------------


def _card(model, directions: Directions, images, labels, alphas, betas, smoothing) -> dict:
    """What a grid belongs to, in words and digests."""
    return {
        "model": digest(str(getattr(model, "config", type(model).__name__)).encode()),
        "weights": digest(*directions.origin.values()),
        "directions": digest(*(x[:2] for x in directions.along.values())),
        "images": digest(images),
        "labels": digest(labels),
        "grid": digest(torch.tensor(alphas), torch.tensor(betas)),
        "smoothing": smoothing,
    }


def digest(*parts: Tensor | bytes) -> str:
    """Sixteen hexadecimal digits of SHA-256 over tensors (their numbers and shapes) or bytes."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(str((part.dtype, tuple(part.shape))).encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(part)
    return found.hexdigest()[:16]


def _write_grid(file: Path, card: dict, loss: Tensor, done: Tensor) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    said = {"karat_lite": json.dumps(card)}
    write_whole(file, lambda temporary: save_file({"loss": loss, "done": done}, temporary, metadata=said))


def _read_grid(file: Path, card: dict) -> tuple[Tensor, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            before = json.loads((opened.metadata() or {}).get("karat_lite", "{}"))
            loss, done = (opened.get_tensor(name) for name in ("loss", "done"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged or holds no grid ({first_line(error)}): remove it.") from error
    if other := [part for part in card if before.get(part) != card[part]]:
        raise ValueError(
            f"{file} holds a grid of another {' and another '.join(other)}: give the arguments that it was made with, "
            "another file, or remove it."
        )
    return loss, done
