"""Datasets by name or by folder: images as tensors, always offline.

    digits    1,797 real handwritten digits of 8 x 8 pixels (scikit-learn); a fixed fifth of them is the test part
    shapes    coloured shapes on textured grounds, drawn from a seed at any resolution, with object masks
    a folder  PATH/train/<class>/*.png and PATH/test/<class>/*.png (or PATH/val), any format that Pillow reads

Every dataset yields pairs (image, label): image (3, H, W) float32 in [-1, 1], label a whole number.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import at_least, one_of
from .shapes import SHAPE_CLASSES, draw_shapes

NAMED = ("digits", "shapes")
SPLITS = ("train", "test")
SHAPES_SIZE = {"train": 8_000, "test": 2_000}  # images drawn unless `limit` asks for another number
SHAPES_SEED = {"train": 0, "test": 1}


def load_dataset(
    name_or_path: str | Path, split: str, img_size: int | None = None, limit: int | None = None
) -> "Images":
    """Load the part `split` ("train" | "test") of a dataset named "digits" or "shapes", or of an image folder.

    Args:
        img_size: side in pixels; by default 8 for digits, 32 for shapes, the first image's shorter side for a folder.
            Digits are resized, shapes are drawn anew, folder images are resized and cropped at the centre.
        limit: use this many images only, a fixed choice in mixed class order; for shapes, the number to draw.

    Raises `ValueError` for an unknown name or split, an empty or one-class folder, an unreadable image (named);
    `FileNotFoundError` for a folder or part that is not there.
    """
    one_of("split", split, SPLITS)
    if img_size is not None:
        at_least("img_size", img_size, 1)
    if limit is not None:
        at_least("limit", limit, 1)
    if name_or_path == "digits":
        return _digits(split, img_size, limit)
    if name_or_path == "shapes":
        images, labels, masks = draw_shapes(limit or SHAPES_SIZE[split], img_size or 32, SHAPES_SEED[split])
        return Images("shapes", split, images, labels, SHAPE_CLASSES, masks)
    path = Path(name_or_path)
    if not path.is_dir():
        if isinstance(name_or_path, str) and path.name == name_or_path:  # a bare word: more likely a misspelt name
            one_of("dataset (and no folder here)", name_or_path, NAMED)
        raise FileNotFoundError(
            f"no image folder at {path}: expected a folder with train/<class>/ and test/<class>/ in it."
        )
    return _folder(path, split, img_size, limit)


def normalise(images: Tensor) -> Tensor:
    """uint8 in 0 .. 255 -> float32 in [-1, 1], what the models are trained on."""
    return images.float() / 127.5 - 1.0


def to_unit(images: Tensor) -> Tensor:
    """float in [-1, 1] -> float in [0, 1], what figures show."""
    return (images + 1.0) / 2.0


class Images(Dataset):
    """A labelled dataset held in memory as bytes.

    images (n, 3, H, W) uint8, labels (n,) int64, classes: their names, masks (n, H, W) bool where the object is known.
    """

    def __init__(self, name: str, split: str, images: Tensor, labels: Tensor, classes, masks: Tensor | None = None):
        self.name, self.split, self.classes = name, split, tuple(classes)
        self.images, self.labels, self.masks = images, labels, masks

    @property
    def img_size(self) -> int:
        return self.images.shape[-1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i) -> tuple[Tensor, Tensor]:
        """One index gives a pair; a list or slice of indices gives a batch: (n, 3, H, W) and (n,)."""
        return normalise(self.images[i]), self.labels[i]


def _digits(split: str, img_size: int | None, limit: int | None) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    # The split is part of the dataset, not of the experiment: the same fifth is held out whatever the training's seed.
    parts = train_test_split(bunch.images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=0)
    pixels, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    grey = torch.from_numpy(pixels)[:limit, None] * (255 / 16)  # 17 grey levels, 0 .. 16
    if img_size not in (None, 8):
        grey = torch.nn.functional.interpolate(grey, size=(img_size, img_size), mode="bilinear")
    images = grey.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return Images("digits", split, images, torch.from_numpy(labels)[:limit].long(), map(str, range(10)))


def _folder(path: Path, split: str, img_size: int | None, limit: int | None) -> Images:
    """Decode an image folder once and keep its bytes: 3 H W a picture, so 10,000 images of 32 x 32 take 31 MB."""
    from tqdm import tqdm

    files, classes = _list_folder(path / "train" if split == "train" else _test_part(path))
    if split == "test":
        trained = _list_folder(path / "train")[1]
        if trained != classes:
            odd = sorted(set(trained) ^ set(classes))
            raise ValueError(f"train and test of {path} have different classes: {odd} stand in one part only.")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:limit].tolist()
    img_size = img_size or min(_read_image(files[0][0]).shape[1:])
    chosen = [files[i] for i in order]
    bar = tqdm(chosen, desc=f"reading {path.name}/{split}", unit="img", leave=False, disable=len(chosen) < 2_000)
    images = torch.stack([_read_image(file, img_size) for file, _ in bar])
    return Images(path.name, split, images, torch.tensor([label for _, label in chosen]), classes)


def _test_part(path: Path) -> Path:
    return path / "test" if (path / "test").is_dir() or not (path / "val").is_dir() else path / "val"


def _list_folder(part: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """Every image file with its label, and the class names in order."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not part.is_dir():
        raise FileNotFoundError(
            f"no folder {part}: an image folder has train/<class>/ and test/<class>/ (or val/<class>/)."
        )
    found = {}
    # Names with a dot in front (.ipynb_checkpoints, ._copy.jpg) are other programs' notes.
    for folder in sorted(p for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = (f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS and not f.name.startswith("."))
        found[folder.name] = sorted(files)
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        where = f"{part / empty[0]}" if empty else f"{part}"
        raise ValueError(f"no images in {where}: expected files ending in {', '.join(IMG_EXTENSIONS)}.")
    if len(found) == 1:
        raise ValueError(
            f"{part} holds one class only ({next(iter(found))!r}): a classifier needs at least two folders."
        )
    classes = list(found)
    return [(file, label) for label, name in enumerate(classes) for file in found[name]], classes


def _read_image(file: Path, img_size: int | None = None) -> Tensor:
    """One file as (3, H, W) uint8; with `img_size` resized to that shorter side and cropped to a square."""
    from PIL import Image
    from torchvision.transforms import functional as T

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises any of these for a damaged file
        raise ValueError(
            f"cannot read the image {file} ({error}): remove it or put a whole one in its place."
        ) from error
    if img_size is not None and image.size != (img_size, img_size):
        image = T.center_crop(T.resize(image, img_size, antialias=True), img_size)
    return T.pil_to_tensor(image)
