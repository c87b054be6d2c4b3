"""What analyses ask of a model's images, in one place: each failure says what was given, expected, and what to do."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import at_least
from ..not_finite import first_not_finite
from ..vit import VisionTransformer


def checked(model: VisionTransformer, images: Tensor, labels: Tensor | None = None, least: int = 1) -> None:
    """Raise `ValueError` unless images (n, 3, H, W) fit the model in size and range, n >= least, and labels fit them.

    Labels: (n,) whole numbers of any type, one class of the model each; losses want `labels.long()`.
    """
    model.check_images(images)
    if len(images) < least:
        raise ValueError(f"expected at least {least} image{'s' * (least > 1)}, got {len(images)}.")
    low, high = images.min().item(), images.max().item()
    if low < -1.001 or high > 1.001:
        raise ValueError(
            f"images lie in [-1, 1], as load_dataset gives them, got {low:.3g} .. {high:.3g}: "
            "karat_lite.data.normalise brings bytes there."
        )
    if labels is not None:
        classes = model.head.out_features
        if tuple(labels.shape) != (len(images),) or not whole_numbers(labels):
            raise ValueError(f"labels must be {len(images)} whole numbers, one for each image, got {labels}.")
        labels = labels.long()
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels lie in 0 .. {classes - 1}, got {labels.min()} .. {labels.max()}.")


def steady(model: torch.nn.Module) -> None:
    """Raise `ValueError` for a model that drops numbers at random just now: every look would find another one."""
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"{name} drops numbers at random while the model trains: call model.eval() before.")


def slopes_wanted() -> None:
    """Raise `ValueError` inside `torch.inference_mode`, where nothing can be differentiated, not even on request."""
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients are taken here, and torch.inference_mode() allows none: take torch.no_grad().")


def whole_numbers(values: Tensor) -> bool:
    """Whether a tensor's type is one of whole numbers; True and False are none."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def parts(images: Tensor, most: int, least: int = 1) -> Iterator[Tensor]:
    """Images in batches of nearly equal size, at most `most` and at least `least` each (or all, where they are fewer).

    Where both cannot be had (5 images by twos), batches are larger than `most`: none is left without a partner.
    """
    count = -(-len(images) // at_least("batch_size", most, least))
    return iter(images.tensor_split(max(1, min(count, len(images) // least))))


def must_be_finite(model: VisionTransformer, images: Tensor, output: Tensor) -> Tensor:
    """`output` of the model for these images; `ValueError` that names what is not finite first."""
    if not output.isfinite().all():
        raise ValueError(f"this model gives numbers that are not finite: {first_not_finite(model, images)}.")
    return output


def device_of(model: VisionTransformer) -> torch.device:
    """Where the model computes."""
    return model.pos_embed.device
