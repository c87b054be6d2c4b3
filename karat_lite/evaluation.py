"""How good a model is on labelled images."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import as_tested, in_order
from .data import FILES_SIZE, NAMED, load_dataset, name_of
from .processes import Engine, pick_device
from .recipes import Recipe


def load_part(data: str | Path, split: str, recipe: Recipe, img_size: int | None = None, limit: int | None = None):
    """A part of a dataset as `recipe` trains on it: at `img_size`, or, where pictures are cropped one by one, whole."""
    if not recipe.single_pictures:
        return load_dataset(data, split, img_size=img_size, limit=limit)
    files = data in FILES_SIZE or data not in NAMED
    return load_dataset(data, split, limit=limit, in_memory=False if files else None)


def is_part_of(data: str | Path, card: dict) -> bool:
    """Whether a checkpoint's card names this dataset, or a part of it (cifar10_10k is one of cifar10)."""
    its, name = str(card.get("data")), name_of(data)
    return its == name or its.startswith(f"{name}_") or name.startswith(f"{its}_")


def load_tested(data: str | Path, model, card: dict):
    """The test part of a dataset, seen as the training on a checkpoint's `card` tested `model`."""
    if not isinstance(recipe := card.get("recipe", {}), dict):
        raise ValueError(f"the card's recipe is {recipe!r} in place of its settings: how it was tested is unknown.")
    recipe = Recipe(**recipe)
    return as_tested(load_part(data, "test", recipe, model.img_size), recipe, model.img_size)


def evaluate(
    model: nn.Module, data, device: str | torch.device = "auto", batch_size: int = 256, workers: int = 0
) -> dict[str, float]:
    """Mean cross-entropy ("loss") and shares of right answers in one guess ("accuracy") and in five ("top5").

    `data` is what `load_dataset` gives, or that seen through a recipe (`augment.as_tested`). The model is moved to the
    device and left in evaluation mode. Raises `ValueError` if the data has other classes than the model.
    """
    device = pick_device(device)
    batches = in_order(data, batch_size, device, workers=workers)
    return _shares(_sums(model.to(device), batches, data), len(data))


def evaluate_together(model: nn.Module, data, engine: Engine, workers: int = 0) -> dict[str, float]:
    """The same, with the images spread over all processes of `engine`."""
    batches = in_order(data, 256, engine.device, engine.part, workers)
    return _shares(engine.total(_sums(model, batches, data)), len(data))


@torch.no_grad()
def _sums(model: nn.Module, batches, data) -> Tensor:
    """Cross-entropies, right in one, right in five, summed over all images; on the CPU, in float64."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for images, labels in batches:
        logits, labels = model(images).float().cpu(), labels.cpu()
        if logits.shape[-1] != len(data.classes):
            raise ValueError(f"{data.name} has {len(data.classes)} classes and the model {logits.shape[-1]}.")
        right = logits.topk(min(5, logits.shape[-1])).indices == labels.unsqueeze(-1)  # (n, 5), best guess first
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), right[:, 0].sum(), right.any(dim=-1).sum()])
    return sums


def _shares(sums: Tensor, count: int) -> dict[str, float]:
    return dict(zip(("loss", "accuracy", "top5"), (sums / count).tolist(), strict=True))
