"""Datasets by name or by folder: images as tensors.

    digits      1,797 real handwritten digits of 8 x 8 pixels (scikit-learn); a fixed fifth of them is the test part
    shapes      coloured shapes on textured grounds, drawn from a seed at any resolution, with object masks
    cifar10, cifar100, svhn, stl10, flowers102    downloaded when first loaded, see named_data.py
    imagenet    ROOT/imagenet/train/<class>/ and ROOT/imagenet/val/<class>/, to be put there by hand
    a folder    PATH/train/<class>/*.png and PATH/test/<class>/*.png (or PATH/val), the formats of `PICTURES`,
                turned as its EXIF note says, what is transparent laid on white

Every dataset yields pairs (image, label): image (3, H, W) float32 in [-1, 1], label a whole number.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .checks import at_least, one_of
from .shapes import SHAPE_CLASSES, draw_shapes

DOWNLOADED = ("cifar10", "cifar100", "svhn", "stl10", "flowers102")
NAMED = ("digits", "shapes", *DOWNLOADED, "imagenet")
SPLITS = ("train", "test")
SHAPES_SIZE = {"train": 8_000, "test": 2_000}  # images drawn unless `limit` asks for another number
SHAPES_SEED = {"train": 0, "test": 1}
FILES_SIZE = {"flowers102": 224, "imagenet": 224}  # pixels, where the pictures themselves have many sizes
ONE_WAY = ("digits", "svhn")  # mirrored, a digit is another digit or none
PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
HELD = 1 << 30  # bytes of pictures that are decoded once and kept, unless `in_memory` says otherwise
DATA = Path(__file__).resolve().parent.parent / "data"


def load_dataset(
    name_or_path: str | Path,
    split: str,
    img_size: int | None = None,
    limit: int | None = None,
    *,
    root: str | Path | None = None,
    download: bool = True,
    in_memory: bool | None = None,
) -> "Images | Files":
    """Load the part `split` ("train" | "test") of a dataset in `NAMED`, or of an image folder.

    Args:
        img_size: side in pixels; by default 8 for digits, 32 for shapes, CIFAR and SVHN, 96 for STL-10, 224 for
            Flowers-102 and ImageNet, the first image's shorter side for a folder. Shapes are drawn anew, pictures from
            files resized and cropped at the centre, all others resized.
        limit: use this many images only, a fixed choice in mixed class order; for shapes, the number to draw.
        root: the folder of downloads, with a folder for each dataset; by default data/ of the clone that this package
            runs from, or ./data where the package is installed without one.
        download: fetch what is not in `root` yet. What is there needs no network.
        in_memory: keep decoded pictures (`Images`) or read them from their files when asked (`Files`), for datasets
            that consist of files: Flowers-102, ImageNet, a folder. By default in memory up to 1 GiB.

    Raises `ValueError` for an unknown name or split, an empty or one-class folder, an unreadable image (named), a
    damaged download; `FileNotFoundError` for a folder or part that is not there; `DownloadError` (an `OSError`) if no
    mirror gives the files.
    """
    one_of("split", split, SPLITS)
    if img_size is not None:
        at_least("img_size", img_size, 1)
    if limit is not None:
        at_least("limit", limit, 1)
    if in_memory is False and name_or_path in NAMED and name_or_path not in FILES_SIZE:
        raise ValueError(f"{name_or_path} is no set of files: it is always held in memory, leave in_memory out.")
    if name_or_path == "digits":
        return _digits(split, img_size, limit)
    if name_or_path == "shapes":
        images, labels, masks = draw_shapes(limit or SHAPES_SIZE[split], img_size or 32, SHAPES_SEED[split])
        return Images("shapes", split, images, labels, SHAPE_CLASSES, masks)
    root = Path(root) if root is not None else DATA if (DATA / "README.md").is_file() else Path("data")
    if name_or_path in DOWNLOADED:
        from .named_data import read_named

        pictures, labels, classes = read_named(name_or_path, split, root, download)
        if isinstance(pictures, Tensor):
            return _from_bytes(name_or_path, split, pictures, labels, classes, img_size, limit)
        img_size = img_size or FILES_SIZE[name_or_path]
        return _from_files(name_or_path, split, pictures, labels, classes, img_size, limit, in_memory)
    if name_or_path == "imagenet":
        path, part = root / "imagenet", root / "imagenet" / ("train" if split == "train" else "val")
        if not part.is_dir() or not _class_folders(part):
            raise FileNotFoundError(
                f"no ImageNet in {part}: it needs an account at image-net.org and cannot be downloaded from here. "
                f"Put its pictures at {part}/<class>/*.JPEG; torchvision.datasets.ImageNet({str(path)!r}, "
                f"{part.name!r}) does so from the three archives of ILSVRC2012."
            )
        return _folder(path, split, part, img_size or FILES_SIZE["imagenet"], limit, in_memory)
    path = Path(name_or_path)
    if not path.is_dir():
        if isinstance(name_or_path, str) and path.name == name_or_path:  # a bare word: more likely a misspelt name
            one_of("dataset (and no folder here)", name_or_path, NAMED)
        raise FileNotFoundError(
            f"no image folder at {path}: expected a folder with train/<class>/ and test/<class>/ in it."
        )
    return _folder(path, split, path / "train" if split == "train" else _test_part(path), img_size, limit, in_memory)


def normalise(images: Tensor) -> Tensor:
    """uint8 in 0 .. 255 -> float32 in [-1, 1], what the models are trained on."""
    return images.float() / 127.5 - 1.0


def to_unit(images: Tensor) -> Tensor:
    """float in [-1, 1] -> float in [0, 1], what figures show."""
    return (images + 1.0) / 2.0


class Images(Dataset):
    """A labelled dataset held in memory as bytes.

    images (n, 3, H, W) uint8, labels (n,) int64, classes: their names, masks (n, H, W) bool where the object is known,
    mirrors: whether an image seen in a mirror still belongs to its class.
    """

    def __init__(
        self, name: str, split: str, images: Tensor, labels: Tensor, classes, masks: Tensor | None = None, mirrors=True
    ):
        self.name, self.split, self.classes, self.mirrors = name, split, tuple(classes), mirrors
        self.images, self.labels, self.masks = images, labels, masks

    @property
    def img_size(self) -> int:
        return self.images.shape[-1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i) -> tuple[Tensor, Tensor]:
        """One index gives a pair; a list or slice of indices gives a batch: (n, 3, H, W) and (n,)."""
        return normalise(self.images[i]), self.labels[i]

    def picture(self, i: int):
        """Image i as a `PIL.Image` in RGB."""
        from PIL import Image

        return Image.fromarray(self.images[i].permute(1, 2, 0).numpy())


class Files(Dataset):
    """A labelled dataset whose pictures stay in their files until they are asked for: more than memory holds.

    files: n paths, img_size: the side that pictures are resized and cropped to; the rest as in `Images`.
    """

    def __init__(
        self, name: str, split: str, files: Sequence[Path], labels: Tensor, classes, img_size: int, mirrors=True
    ):
        self.name, self.split, self.classes, self.mirrors = name, split, tuple(classes), mirrors
        self.files, self.labels, self.img_size = files, labels, img_size
        # Resolves indices, lists and slices as a tensor of images does.
        self.numbers = torch.arange(len(files), device="cpu")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i) -> tuple[Tensor, Tensor]:
        """As in `Images`: a pair or a batch. Raises `ValueError` that names a file which cannot be read."""
        chosen = self.numbers[i]
        images = [to_square(self.picture(one), self.img_size) for one in chosen.reshape(-1).tolist()]
        return normalise(torch.stack(images).view(*chosen.shape, *images[0].shape)), self.labels[i]

    def picture(self, i: int):
        """Picture i, whole, as a `PIL.Image` in RGB."""
        return read_image(self.files[i])


def _digits(split: str, img_size: int | None, limit: int | None) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    # The split is part of the dataset, not of the experiment: the same fifth is held out whatever the training's seed.
    parts = train_test_split(bunch.images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=0)
    pixels, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    grey = torch.from_numpy(pixels)[:limit, None] * (255 / 16)  # 17 grey levels, 0 .. 16
    if img_size not in (None, 8):
        grey = F.interpolate(grey, size=(img_size, img_size), mode="bilinear")
    images = grey.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(labels)[:limit].long()
    return Images("digits", split, images, labels, map(str, range(10)), mirrors=False)


def _from_bytes(
    name: str, split: str, images: Tensor, labels: Tensor, classes, img_size: int | None, limit: int | None
) -> Images:
    """Pictures that come as one tensor (n, 3, H, H) uint8, in mixed order and at the size wanted."""
    order = _mixed(len(images), limit)
    images = images[order].contiguous()
    if img_size not in (None, images.shape[-1]):
        images = F.interpolate(images, size=(img_size, img_size), mode="bilinear", antialias=True)
    return Images(name, split, images, labels[order], classes, mirrors=name not in ONE_WAY)


def _from_files(
    name: str,
    split: str,
    files: list[Path],
    labels: Tensor,
    classes,
    img_size: int | None,
    limit: int | None,
    in_memory: bool | None,
) -> Images | Files:
    """Pictures that are files, in mixed order: decoded once to 3 H W bytes each, or left where they are."""
    from tqdm import tqdm

    order = _mixed(len(files), limit)
    img_size = img_size or min(read_image(files[0]).size)
    files, labels = [files[i] for i in order.tolist()], labels[order]
    if in_memory is None:
        in_memory = len(files) * 3 * img_size**2 <= HELD
    if not in_memory:
        return Files(name, split, files, labels, classes, img_size)
    bar = tqdm(files, desc=f"reading {name}/{split}", unit="img", leave=False, disable=len(files) < 2_000)
    images = torch.stack([to_square(read_image(file), img_size) for file in bar])
    return Images(name, split, images, labels, classes)


def _mixed(n: int, limit: int | None) -> Tensor:
    """The same order of n images every time, classes mixed: its beginning is a fair sample of any size."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")[:limit]


def _folder(path: Path, split: str, part: Path, img_size: int | None, limit: int | None, in_memory: bool | None):
    """The pictures of path/part/<class>/."""
    files, labels, classes = _list_folder(part)
    if split == "test" and (path / "train").is_dir():
        trained = [folder.name for folder in _class_folders(path / "train")]
        if trained != classes:
            odd = sorted(set(trained) ^ set(classes))
            raise ValueError(f"train and test of {path} have different classes: {odd} stand in one part only.")
    return _from_files(name_of(path), split, files, labels, classes, img_size, limit, in_memory)


def name_of(data: str | Path) -> str:
    """What a dataset is called on cards and in tables: its name, or its folder's, which "." has, too."""
    return Path(os.path.abspath(data)).name


def _test_part(path: Path) -> Path:
    return path / "test" if (path / "test").is_dir() or not (path / "val").is_dir() else path / "val"


def _class_folders(part: Path) -> list[Path]:
    if not part.is_dir():
        raise FileNotFoundError(
            f"no folder {part}: an image folder has train/<class>/ and test/<class>/ (or val/<class>/)."
        )
    # Names with a dot in front (.ipynb_checkpoints, ._copy.jpg) are other programs' notes.
    return sorted(p for p in part.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_folder(part: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Every image file, its label, and the class names in order."""
    found = {}
    for folder in _class_folders(part):
        files = (f for f in folder.rglob("*") if f.suffix.lower() in PICTURES and not f.name.startswith("."))
        found[folder.name] = sorted(f for f in files if f.is_file())
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        where = f"{part / empty[0]}" if empty else f"{part}"
        raise ValueError(f"no images in {where}: expected files ending in {', '.join(PICTURES)}.")
    if len(found) == 1:
        raise ValueError(
            f"{part} holds one class only ({next(iter(found))!r}): a classifier needs at least two folders."
        )
    labels = [label for label, files in enumerate(found.values()) for _ in files]
    return [file for files in found.values() for file in files], torch.tensor(labels), list(found)


def read_image(file: Path):
    """One file as a `PIL.Image` in RGB, upright, on white. `ValueError` names a file that is no picture."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            if opened.mode in ("I", "F"):
                raise ValueError(f"its numbers have no known range, mode {opened.mode}: save it with 8 or 16 bits")
            turn = _turn(opened)
            if opened.mode.startswith("I;16"):  # 16 bits of grey, which Pillow would cut off at 255
                opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
            if opened.has_transparency_data:
                opened = opened.convert("RGBA")
                opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
            picture = opened.convert("RGB")
            return picture if turn is None else picture.transpose(turn)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # of a damaged file, too
        raise ValueError(
            f"cannot read the image {file} ({error}): remove it or put a whole one in its place."
        ) from error


def _turn(opened):
    """How a picture is turned or mirrored to stand upright, by its EXIF note; None where that says nothing."""
    from PIL.Image import Transpose as T

    try:
        orientation = opened.getexif().get(0x0112)
    except Exception:  # noqa: BLE001 - a damaged note is no reason to refuse the picture
        return None
    turns = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)
    return dict(enumerate(turns, start=2)).get(orientation)


def to_square(image, img_size: int) -> Tensor:
    """A picture resized to that shorter side and cropped to a square: (3, img_size, img_size) uint8."""
    from torchvision.transforms import functional as T

    if image.size != (img_size, img_size):
        image = T.center_crop(T.resize(image, img_size, antialias=True), img_size)
    return T.pil_to_tensor(image)
