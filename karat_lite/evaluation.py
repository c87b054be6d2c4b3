"""How good a model is on labelled images."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import as_tested, in_order
from .data import FILES_SIZE, NAMED, load_dataset
from .processes import Engine, pick_device
from .recipes import Recipe


def load_part(data: str | Path, split: str, recipe: Recipe, img_size: int | None = None, limit: int | None = None):
    """A part of a dataset as `recipe` trains on it: at `img_size`, or, where pictures are cropped one by one, whole."""
    if not recipe.single_pictures:
        return load_dataset(data, split, img_size=img_size, limit=limit)
    files = data in FILES_SIZE or data not in NAMED
    return load_dataset(data, split, limit=limit, in_memory=False if files else None)


def load_tested(data: str | Path, model, card: dict):
    """The test part of a dataset, seen as the training on a checkpoint's `card` tested `model`."""
    recipe = Recipe(**card.get("recipe", {}))
    return as_tested(load_part(data, "test", recipe, model.img_size), recipe, model.img_size)


def evaluate(
    model: nn.Module, data, device: str | torch.device = "auto", batch_size: int = 256, workers: int = 0
) -> dict[str, float]:
    """Mean cross-entropy ("loss") and shares of right answers in one guess ("accuracy") and in five ("top5").

    `data` is what `load_dataset` gives, or that seen through a recipe (`augment.as_tested`). The model is moved to the
    device and left in evaluation mode.
    """
    device = pick_device(device)
    batches = in_order(data, batch_size, device, workers=workers)
    return _shares(_sums(model.to(device), batches), len(data))


def evaluate_together(model: nn.Module, data, engine: Engine, workers: int = 0) -> dict[str, float]:
    """The same, with the images spread over all processes of `engine`."""
    return _shares(engine.total(_sums(model, in_order(data, 256, engine.device, engine.part, workers))), len(data))


@torch.no_grad()
def _sums(model: nn.Module, batches) -> Tensor:
    """Cross-entropies, right in one, right in five, summed over all images; on the CPU, in float64."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for images, labels in batches:
        logits, labels = model(images).float().cpu(), labels.cpu()
        right = logits.topk(min(5, logits.shape[-1])).indices == labels.unsqueeze(-1)  # (n, 5), best guess first
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), right[:, 0].sum(), right.any(dim=-1).sum()])
    return sums


def _shares(sums: Tensor, count: int) -> dict[str, float]:
    return dict(zip(("loss", "accuracy", "top5"), (sums / count).tolist(), strict=True))
