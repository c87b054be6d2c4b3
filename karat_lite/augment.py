"""From stored pictures to batches, the same whoever asks: every random choice follows from (seed, epoch, step).

Two ways. Small images are kept as bytes and augmented a batch at a time where the model computes (mirror, shift).
Larger pictures are cropped, coloured and resized one by one by timm, in worker processes; there each picture's choices
follow from (seed, epoch, its index). So neither an interruption nor the number of workers changes a training.
"""

import contextlib
import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .recipes import Recipe

ORDER, BATCH, PICTURE, MIX = range(4)  # what a random choice is for: each has its own stream


def batches(
    data, recipe: Recipe, img_size: int, *, seed: int, epoch: int, device: torch.device, start=0, part=(0, 1), workers=0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch from number `start` on: images (n, 3, img_size, img_size) in [-1, 1] and labels (n,).

    Their order is a permutation drawn for the epoch; the last images that fill no batch are left out, so that every
    step sees as many. part = (i, of): the i-th of `of` equal slices of every batch, for `of` processes.
    """
    order = torch.randperm(len(data), generator=_generator(ORDER, seed, epoch), device="cpu")
    size, (i, of) = recipe.batch_size, part
    share = size // of
    steps = range(start, len(data) // size)
    slices = [order[step * size + i * share : step * size + (i + 1) * share].tolist() for step in steps]
    if recipe.single_pictures:
        data = Pictures(
            data, img_size, timm_transform(recipe, img_size, training=True, mirrors=data.mirrors), key=(seed, epoch)
        )
    for step, (images, labels) in zip(steps, _read(data, slices, workers, device), strict=True):
        if not recipe.single_pictures:
            generator = _generator(BATCH, seed, epoch, step)
            images = mirror_and_shift(images, recipe.flip * data.mirrors, recipe.shift, generator, part)
        yield images, labels


def in_order(data, batch_size: int, device: torch.device, part=(0, 1), workers: int = 0):
    """All of `data` once, in order, for a test; part as in `batches`, but every image belongs to one process."""
    indices = list(range(part[0], len(data), part[1]))
    slices = [indices[at : at + batch_size] for at in range(0, len(indices), batch_size)]
    return _read(data, slices, workers, device)


def _read(data, slices: list[list[int]], workers: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """data[slice] for each slice, on `device`, in order; read ahead where there are workers."""
    # batch_size=None: the dataset is asked for whole batches. A generator of its own: DataLoader would draw a number
    # from the global one.
    loader = DataLoader(
        data, sampler=slices, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )  # fmt: skip
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def mirror_and_shift(images: Tensor, flip: float, shift: int, generator: torch.Generator, part=(0, 1)) -> Tensor:
    """Mirror each image with probability `flip`; pad by `shift` pixels of middle grey and crop at random.

    images (n, C, side, side), on any device. The numbers are drawn on the CPU and for all of the batch, also when these
    images are only the part (i, of) of it: devices and processes see the same pictures.
    """
    n, channels, side, _ = images.shape
    mine, device = slice(part[0] * n, (part[0] + 1) * n), images.device
    if flip:
        drawn = torch.rand(n * part[1], generator=generator, device="cpu")
        mirrored = (drawn[mine] < flip).to(device, non_blocking=True)
        images = torch.where(mirrored.view(n, 1, 1, 1), images.flip(-1), images)
    if shift:
        drawn = torch.randint(2 * shift + 1, (2, n * part[1]), generator=generator, device="cpu")
        corner = drawn[:, mine].to(device, non_blocking=True)
        row, column = corner.unsqueeze(-1) + torch.arange(side, device=device)  # (n, side) each
        index = [torch.arange(n, device=device).view(n, 1, 1, 1), torch.arange(channels, device=device).view(-1, 1, 1)]
        images = F.pad(images, [shift] * 4)[*index, row.view(n, 1, side, 1), column.view(n, 1, 1, side)]
    return images


def mix(images: Tensor, labels: Tensor, recipe: Recipe, classes: int, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of a batch with itself, by timm: images, and targets (n, classes) with smoothing in them.

    `key` are whole numbers from which the random choices follow. The given images are overwritten.
    """
    both = _timm().Mixup(
        recipe.mixup, recipe.cutmix, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )  # fmt: skip
    with seeded(MIX, *key):  # timm draws from NumPy's global generator
        return both(images, labels)


def timm_transform(recipe: Recipe, img_size: int, training: bool, mirrors: bool = True):
    """timm's transform from a PIL picture to (3, img_size, img_size) in [-1, 1], with the recipe's settings.

    mirrors: whether a picture may be mirrored at all (`data.mirrors`). Raises `ValueError` for an `auto_augment` that
    timm refuses; parts of one that it does not know it may pass over.
    """
    # timm's own means and deviations are ImageNet's; ours make [-1, 1] of every picture.
    options = dict(input_size=img_size, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    if training:
        options |= dict(
            is_training=True, scale=recipe.crop_scale, ratio=recipe.crop_ratio, hflip=recipe.flip * mirrors,
            color_jitter=recipe.color_jitter, auto_augment=recipe.auto_augment,
        )  # fmt: skip
    else:
        options |= dict(crop_pct=recipe.test_crop)
    try:
        transform = _timm().create_transform(**options)
    except (AssertionError, ValueError, KeyError) as error:  # timm asserts what it expects of the text
        raise ValueError(f"timm cannot read auto_augment = {recipe.auto_augment!r}: {error or 'unknown'}.") from error
    for step in transform.transforms:
        for op in [*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))]:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    return transform


def _posterize(picture, bits: int, **_):
    """Keep `bits` bits of each colour. At full strength timm asks for none: black, until Pillow refused it."""
    from PIL import Image, ImageOps

    return ImageOps.posterize(picture, bits) if bits else Image.new(picture.mode, picture.size)


def as_tested(data, recipe: Recipe, img_size: int):
    """`data` as the recipe tests it: pictures resized and cropped by timm, or for bytes `data` itself."""
    return (
        Pictures(data, img_size, timm_transform(recipe, img_size, training=False)) if recipe.single_pictures else data
    )


class Pictures(Dataset):
    """A dataset of pictures seen through a transform, PIL picture -> (3, img_size, img_size).

    With `key` the random choices for picture i follow from key and i.
    """

    def __init__(self, data, img_size: int, transform, key: tuple[int, ...] | None = None):
        self.data, self.img_size, self.transform, self.key = data, img_size, transform, key
        self.name, self.split, self.classes, self.labels = data.name, data.split, data.classes, data.labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.stack([self._see(i) for i in indices]), self.labels[indices]

    def _see(self, i: int) -> Tensor:
        picture = self.data.picture(i)
        if self.key is None:
            return self.transform(picture)
        with seeded(PICTURE, *self.key, i):
            return self.transform(picture)


@contextlib.contextmanager
def seeded(*key: int):
    """Python's, NumPy's and PyTorch's global random numbers follow from `key` inside, and are as before afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed = _seed(*key)
    random.seed(seed), np.random.seed(seed % 2**32), torch.random.default_generator.manual_seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0]), np.random.set_state(before[1]), torch.set_rng_state(before[2])  # noqa: NPY002


def _seed(*key: int) -> int:
    """One number of 63 bits from several, well mixed: neighbouring seeds, epochs and steps share nothing."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*key))


def _timm():
    try:
        import timm.data
    except ImportError as error:
        raise ImportError(
            "this recipe needs timm, for crops, colours and mixup: pip install timm (or the extra [zoo])."
        ) from error
    return timm.data
