"""Images whose object is known: `shapes`, or a folder of pictures with a folder of masks beside it; or is not."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import at_least
from ..data import load_dataset, read_image, to_square


class Masked(NamedTuple):
    """images (n, 3, H, W) uint8, masks (n, H, W) bool, true on the object, or None where nobody drew them.

    labels (n,) or None; names of the images.
    """

    name: str
    images: Tensor
    masks: Tensor | None
    labels: Tensor | None
    names: list[str]


def load_masked(name_or_path: str | Path, img_size: int, limit: int | None = None) -> Masked:
    """`shapes` (its test part), or the pictures of a folder that has a mask for each.

        PATH/images/cat.jpg  PATH/images/more/dog.png ...     any format that Pillow reads
        PATH/masks/cat.png   PATH/masks/more/dog.png  ...     the same names (endings may differ) and sizes

    The object is where a mask is brighter than half. Pictures and masks are resized to `img_size` and cropped at the
    centre alike. A folder for training, with test/<class>/, has no masks: its test part comes without. limit: the first
    so many, in the order of their names (of a folder for training, a fixed choice).

    Raises `FileNotFoundError` for a folder that is not there and for pictures without a mask (the first is named);
    `ValueError` for a folder without pictures, two files whose names differ in the ending alone, a mask of another size
    than its picture, and one that holds no object, or nothing else, after the crop.
    """
    if limit is not None:
        at_least("limit", limit, 1)
    if name_or_path == "shapes":
        data = load_dataset("shapes", "test", img_size, limit)
        return Masked("shapes", data.images, data.masks, data.labels, [f"shapes test {i}" for i in range(len(data))])
    path = Path(name_or_path)
    if (path / "test").is_dir() and not (path / "images").is_dir():
        data = load_dataset(path, "test", img_size, limit, in_memory=True)
        return Masked(path.name, data.images, None, data.labels, [f"{path.name} test {i}" for i in range(len(data))])
    pictures, masks = _files(path / "images"), _files(path / "masks")
    if not pictures:
        raise ValueError(f"no pictures in {path / 'images'}: expected files such as cat.jpg, and masks/cat.png.")
    if missing := sorted(set(pictures) - set(masks)):
        raise FileNotFoundError(
            f"{len(missing)} of {len(pictures)} pictures in {path / 'images'} have no mask, first "
            f"{pictures[missing[0]].name}: expected {path / 'masks' / missing[0]}.png, white on the object."
        )
    names = sorted(pictures)[:limit]
    pairs = [_pair(pictures[name], masks[name], img_size) for name in names]
    images, objects = (torch.stack(part) for part in zip(*pairs, strict=True))
    return Masked(path.name, images, objects, None, names)


def _files(folder: Path) -> dict[str, Path]:
    """Name without its ending, relative to the folder -> image file."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected PATH/images/ and PATH/masks/ with files of equal names.")
    files = (f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS and not f.name.startswith("."))
    found: dict[str, Path] = {}
    for file in sorted(files):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(
                f"{found[name]} and {file.name} differ in their ending alone, and a picture and its mask are one name: "
                "rename or remove one."
            )
        found[name] = file
    return found


def _pair(picture: Path, mask: Path, img_size: int) -> tuple[Tensor, Tensor]:
    """One picture, (3, S, S) uint8, and its mask, (S, S) bool."""
    image, over = read_image(picture), read_image(mask)
    if image.size != over.size:
        raise ValueError(f"{picture} has {image.size} pixels, its mask {mask} {over.size}: they must be equal.")
    inside = to_square(over, img_size).float().mean(dim=0) > 127.5
    if inside.all() or not inside.any():
        what = "nothing but object" if inside.all() else "no object"
        raise ValueError(
            f"{mask} shows {what} (pixels brighter than half) in the central square: a mask is white on "
            "the object and black elsewhere; remove pictures whose object lies outside."
        )
    return to_square(image, img_size), inside
