"""Content or static mixing: what is left of a model when its attention scores are changed, without training it anew.

The scores S (B, h, N, N) of a layer are replaced and go through its own activation, whatever that is; the changed maps
then mix the layer's own values.

    as they are          S
    zero                 0: softmax averages all tokens, a KArAt operator mixes them by its constants
    mean over queries    in every image and head all rows are the mean row: where to look stays, who asks goes
    mean over images     one matrix for all images, the mean over calibration images of the unchanged model
    another image's      those of the next image of the batch: real scores that know nothing of this image
    keys shuffled        columns in another order, drawn for every image and head, the same for all rows
    queries shuffled     rows likewise

A model that lives on content needs its scores; a static mixer keeps its accuracy under every change.
content_table.py makes the table over seeds.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bases import wide
from ..checks import at_least, one_of
from ..functional import attention_scores
from ..trajectory import Trajectory
from ..vit import VisionTransformer
from .inputs import checked, device_of, must_be_finite, parts, steady

BATCH = 50  # images at a time: on a CPU maps of more leave the cache, and take up to three times as long
PLACES = ("all", "layers", "heads")


class ChangedScores(nn.Module):
    """An activation that is given other scores: the two methods of attention's seam around another activation.

    Args:
        activation: module with `activate`; it is used, not copied.
        change: one of `CHANGES`.
        heads: which heads see changed scores; None: all.
        mean: (h, N, N), the calibrated scores of "mean over images".
        seed: of shuffles. They follow from it and from an image's place in its batch: `attend` and `activate` agree.
    """

    def __init__(
        self, activation: nn.Module, change: str, heads: Sequence[int] | None = None, mean: Tensor | None = None, seed=0
    ):
        super().__init__()
        self.activation, self.heads, self.seed = activation, None if heads is None else list(heads), seed
        self.change = one_of("change of scores", change, CHANGES)
        if change == "mean over images" and mean is None:
            raise ValueError("'mean over images' needs calibrated scores: give means=mean_scores(model, images).")
        self.register_buffer("mean", mean, persistent=False)

    def activate(self, scores: Tensor) -> Tensor:
        """scores (B, h, N, N), changed, then activated: (B, h, N, N)."""
        changed = CHANGES[self.change](self, scores)
        if self.heads is not None:
            scores = scores.clone()
            scores[:, self.heads] = changed[:, self.heads]
            changed = scores
        return self.activation.activate(changed)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, h, N, d) -> (B, h, N, d), by way of the activated map."""
        return (self.activate(attention_scores(q, k)) @ wide(v)).to(v.dtype)

    def _mean(self, scores: Tensor) -> Tensor:
        if self.mean.shape != scores.shape[1:]:
            raise ValueError(f"calibrated scores {tuple(self.mean.shape)} do not fit scores {tuple(scores.shape)}.")
        return self.mean.to(scores).expand_as(scores)

    def _another(self, scores: Tensor) -> Tensor:
        if len(scores) < 2:
            raise ValueError('"another image\'s" scores need a batch of at least 2 images, got 1.')
        return scores.roll(-1, dims=0)

    def _shuffled(self, scores: Tensor, axis: int) -> Tensor:
        draw = torch.rand(scores.shape[:3], generator=torch.Generator().manual_seed(self.seed), device="cpu")
        order = draw.argsort(dim=-1).to(scores.device).unsqueeze(2 if axis == 3 else 3)  # (B, h, 1, N) or (B, h, N, 1)
        return scores.gather(axis, order.expand_as(scores))


CHANGES: dict[str, Callable[[ChangedScores, Tensor], Tensor]] = {
    "as they are": lambda self, scores: scores,
    "zero": lambda self, scores: torch.zeros_like(scores),
    "mean over queries": lambda self, scores: scores.mean(dim=2, keepdim=True).expand_as(scores),
    "mean over images": ChangedScores._mean,
    "another image's": ChangedScores._another,
    "keys shuffled": lambda self, scores: self._shuffled(scores, 3),
    "queries shuffled": lambda self, scores: self._shuffled(scores, 2),
}


def changed(
    model: VisionTransformer,
    change: str,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    means: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> VisionTransformer:
    """A copy of the model, in evaluation mode, in which these layers and heads (None: all) see changed scores.

    means: for "mean over images", what `mean_scores` gives. `ValueError` for what is not there.
    """
    model = copy.deepcopy(model).eval()
    for layer in _indices("layer", layers, len(model.blocks)):
        attention = model.blocks[layer].attn
        own = None if heads is None else _indices("head", heads, attention.num_heads)
        mean = None if means is None else means[layer]
        attention.activation = ChangedScores(attention.activation, change, own, mean, 1000 * seed + layer)
    return model


@torch.no_grad()
def mean_scores(model: VisionTransformer, images: Tensor, batch_size: int = BATCH) -> list[Tensor]:
    """The mean of the scores over images, layer by layer: L tensors (h, N, N), on the model's device."""
    checked(model, images)
    steady(model)
    sums: list = [0.0] * len(model.blocks)
    for batch in parts(images, batch_size):
        batch = batch.to(device_of(model))
        logits, records = model(batch, return_attention=True)
        must_be_finite(model, batch, logits)
        sums = [total + record.scores.sum(dim=0) for total, record in zip(sums, records, strict=True)]
    return [total / len(images) for total in sums]


class Judged(NamedTuple):
    """What a model under a change does on labelled images. layer, head: None for all of them."""

    change: str
    layer: int | None
    head: int | None
    accuracy: float
    loss: float  # mean cross-entropy, nats


def ablate(
    model: VisionTransformer,
    images: Tensor,
    labels: Tensor,
    changes: Sequence[str] = tuple(CHANGES),
    where: str = "all",
    *,
    calibration: Tensor | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    progress: bool = False,
) -> list[Judged]:
    """Accuracy and loss under every change, in all layers at once, in one layer at a time, or in one head at a time.

    Args:
        images (n, 3, H, W) in [-1, 1], n >= 2, and labels (n,).
        changes: of `CHANGES`. "as they are" changes nothing and is judged once, whatever `where` says.
        where: "all" | "layers" | "heads".
        calibration: images whose mean scores "mean over images" takes; those that are judged if None.
        batch_size: images at a time, at most (one more where an image would be left alone); "another image's" takes 2.
        progress: show a bar.

    Raises `ValueError` for images or labels that do not fit, unknown names, or a model whose outputs are not finite.
    """
    from tqdm import tqdm

    checked(model, images, labels, least=2)
    least = 2 if "another image's" in changes else 1  # the other image is one of the same batch
    if at_least("batch_size", batch_size, 1) < least:
        raise ValueError(
            f'"another image\'s" scores come from the same batch, got batch_size = {batch_size}: take at least 2, or '
            "leave this change out."
        )
    one_of("place", where, PLACES)
    cases = []
    for change in changes:
        one_of("change of scores", change, CHANGES)
        places = {
            "all": [(None, None)],
            "layers": [(layer, None) for layer in range(len(model.blocks))],
            "heads": [(i, head) for i, block in enumerate(model.blocks) for head in range(block.attn.num_heads)],
        }[where if change != "as they are" else "all"]
        cases += [(change, *place) for place in places]
    means = None
    if "mean over images" in changes:
        means = mean_scores(model, images if calibration is None else calibration, batch_size)
    found = []
    for change, layer, head in tqdm(cases, file=sys.stdout, disable=not progress, ncols=80, leave=False):
        place = dict(layers=None if layer is None else [layer], heads=None if head is None else [head])
        other = changed(model, change, means=means, seed=seed, **place)
        found.append(Judged(change, layer, head, *_judge(other, labels, parts(images, batch_size, least))))
    return found


@torch.no_grad()
def _judge(model: VisionTransformer, labels: Tensor, batches: Iterable[Tensor]) -> tuple[float, float]:
    """(accuracy, mean cross-entropy)."""
    logits = []
    for batch in batches:
        batch = batch.to(device_of(model))
        logits.append(must_be_finite(model, batch, model(batch)).cpu().double())
    logits, labels = torch.cat(logits), labels.cpu().long()
    right = (logits.argmax(dim=-1) == labels).double().mean().item()
    return right, F.cross_entropy(logits, labels).item()


class Course(NamedTuple):
    """Changes of scores through a training: steps (T,); accuracy and loss, change -> (T,)."""

    steps: np.ndarray
    accuracy: dict[str, np.ndarray]
    loss: dict[str, np.ndarray]


def through_training(
    trajectory: Trajectory,
    images: Tensor,
    labels: Tensor,
    changes: Sequence[str] = tuple(CHANGES),
    at: Sequence[int] | None = None,
    *,
    calibration: Tensor | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
) -> Course:
    """`ablate` in all layers at once at the snapshots `at` (indices, rising; all if None); the rest as there.

    Raises `ValueError` for a trajectory of a single snapshot.
    """
    if len(trajectory) < 2:
        raise ValueError("a course needs a trajectory of at least 2 snapshots, got 1: train with snapshots=20.")
    at = list(range(len(trajectory)) if at is None else at)
    options = dict(calibration=calibration, seed=seed, batch_size=batch_size)
    rows = [ablate(trajectory.model(t), images, labels, changes, **options) for t in at]
    accuracy = {change: np.array([row[i].accuracy for row in rows]) for i, change in enumerate(changes)}
    loss = {change: np.array([row[i].loss for row in rows]) for i, change in enumerate(changes)}
    return Course(np.array(trajectory.steps)[at], accuracy, loss)


@torch.no_grad()
def map_shares(model: VisionTransformer, images: Tensor, batch_size: int = BATCH) -> np.ndarray:
    """What activated maps A_kn are made of, as shares of their power over images b: (L, h, 3), each row sums to 1.

    one row     m_n = mean over b and k      all queries of all images alike (all that softmax has where S = 0)
    position    mean over b of A_kn, less m  rows of their own for the queries, the same for all images
    content     the rest                     what differs from image to image

    Shares of these images: a mean over n of them keeps 1/n of what differs between them, so that "content" is (n - 1)/n
    of what ever more images would give. Compare shares that come from equally many.

    Of a head whose maps are all 0 there is nothing to share out: 0, 0, 0.
    """
    checked(model, images, least=2)
    steady(model)
    total, squares = [0.0] * len(model.blocks), [0.0] * len(model.blocks)
    for batch in parts(images, batch_size):
        batch = batch.to(device_of(model))
        logits, records = model(batch, return_attention=True)
        must_be_finite(model, batch, logits)
        for i, record in enumerate(records):
            maps = record.maps.cpu().double()  # Apple's devices know no float64
            total[i], squares[i] = total[i] + maps.sum(dim=0), squares[i] + maps.square().sum(dim=(0, 2, 3))
    shares = []
    for sums, power in zip(total, squares, strict=True):
        mean, power = sums / len(images), power / len(images)  # (h, N, N), (h,)
        row = mean.mean(dim=1).square().sum(dim=-1) * mean.shape[1]
        fixed = mean.square().sum(dim=(1, 2))
        whole = torch.where(power > 0, power, torch.ones_like(power))
        shares.append(torch.stack([row, fixed - row, power - fixed], dim=-1) / whole.unsqueeze(-1))
    return torch.stack(shares).numpy()


def _indices(what: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    """Checked indices, each once; all of them for None."""
    chosen = list(range(count) if chosen is None else chosen)
    for index in chosen:
        if at_least(f"{what} index", index, 0) >= count:
            raise ValueError(f"{what} {index} is not there: this model has {what}s 0 .. {count - 1}.")
    return list(dict.fromkeys(chosen))
