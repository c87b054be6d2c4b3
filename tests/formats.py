"""Small files in the formats of other people's datasets, as their authors publish them.

Each writer puts them into the folder `home` and their digests into torchvision's class (by `patch`, pytest's
monkeypatch). It returns {split: (pictures, labels)} in the order of the files, and the class names.
"""

import hashlib
import io
import pickle
import tarfile

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN, Flowers102

RANDOM = np.random.default_rng(0)
CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL_NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def small_folder(path, size=32, each=4):
    """An image folder: path/{train,test}/{cat,dog}/0.png ..., `each` pictures a class; returns its path."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (path / split / name).mkdir(parents=True)
            for i in range(each):
                Image.fromarray(pixels(1, size)[0].transpose(1, 2, 0)).save(path / split / name / f"{i}.png")
    return path


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def pixels(n, size):
    return RANDOM.integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def packed(folder: str, files: dict[str, bytes]) -> bytes:
    """A .tar.gz of folder/<name> for all these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_cifar(kind, home, patch):
    key, parts = ("labels", {"train": 5, "test": 1}) if kind is CIFAR10 else ("fine_labels", {"train": 1, "test": 1})
    files, content = {}, {}
    for split, count in parts.items():
        batches = [(pixels(4, 32), RANDOM.integers(0, 10, 4).tolist()) for _ in range(count)]
        names = [name for name, _ in (kind.train_list if split == "train" else kind.test_list)]
        for name, (images, labels) in zip(names, batches, strict=True):
            entry = {"data": images.reshape(4, 3072), key: labels, "filenames": ["x.png"] * 4, "coarse_labels": [0] * 4}
            files[name] = pickle.dumps(entry, protocol=2)
        patch.setattr(kind, f"{split}_list", [[name, md5(files[name])] for name in names])
        content[split] = np.concatenate([images for images, _ in batches]), sum((labels for _, labels in batches), [])
    names = CIFAR_NAMES if kind is CIFAR10 else [f"class {i}" for i in range(100)]
    files[kind.meta["filename"]] = meta = pickle.dumps({kind.meta["key"]: names}, protocol=2)
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    archive = packed(kind.base_folder, files)
    (home / kind.filename).write_bytes(archive)
    patch.setattr(kind, "tgz_md5", md5(archive))
    return content, names


def write_svhn(home, patch):
    content, listed = {}, {}
    for split, n in (("train", 7), ("test", 5)):
        images, digits = pixels(n, 32), np.arange(n) * 3 % 10
        buffer = io.BytesIO()
        # images last, channels before them; the digit 0 is called 10
        savemat(buffer, {"X": images.transpose(2, 3, 1, 0), "y": np.where(digits == 0, 10, digits)[:, None]})
        url, file, _ = SVHN.split_list[split]
        (home / file).write_bytes(buffer.getvalue())
        listed[split] = [url, file, md5(buffer.getvalue())]
        content[split] = images, digits.tolist()
    patch.setattr(SVHN, "split_list", listed)
    return content, list("0123456789")


def write_stl10(home, patch):
    content, files = {}, {"class_names.txt": "\n".join(STL_NAMES).encode(), "unlabeled_X.bin": b"not looked at"}
    for split, n in (("train", 6), ("test", 4)):
        images, labels = pixels(n, 96), RANDOM.integers(0, 10, n)
        files[f"{split}_X.bin"] = images.transpose(0, 1, 3, 2).tobytes()  # column by column
        files[f"{split}_y.bin"] = (labels + 1).astype(np.uint8).tobytes()
        known = [[f"{split}_{what}.bin", md5(files[f"{split}_{what}.bin"])] for what in "Xy"]
        patch.setattr(STL10, f"{split}_list", known + [["unlabeled_X.bin", "0" * 32]] * (split == "train"))
        content[split] = images, labels.tolist()
    archive = packed(STL10.base_folder, files)
    (home / STL10.filename).write_bytes(archive)
    patch.setattr(STL10, "tgz_md5", md5(archive))
    return content, STL_NAMES


def write_flowers(home, patch):
    """Nine pictures of 20 x 16 pixels and more: 3 to train, 2 to validate, 4 to test; content: the decoded pictures."""
    base = home / "flowers-102"
    base.mkdir()
    files, decoded, labels = {}, {}, RANDOM.integers(1, 103, 9)
    for i in range(1, 10):
        buffer = io.BytesIO()
        Image.fromarray(RANDOM.integers(0, 256, (16, 20 + i, 3), dtype=np.uint8)).save(buffer, "JPEG")
        files[f"image_{i:05d}.jpg"] = buffer.getvalue()
        decoded[i] = Image.open(buffer).convert("RGB")
    ids = {"trnid": [9, 2, 4], "valid": [1, 6], "tstid": [3, 5, 7, 8]}
    known = {"image": ("102flowers.tgz", packed("jpg", files))}
    for what, file, table in (("label", "imagelabels.mat", {"labels": labels[None]}), ("setid", "setid.mat", ids)):
        buffer = io.BytesIO()
        savemat(buffer, table)
        known[what] = file, buffer.getvalue()
    for file, content in known.values():
        (base / file).write_bytes(content)
    patch.setattr(Flowers102, "_file_dict", {what: (file, md5(content)) for what, (file, content) in known.items()})
    parts = {"train": ids["trnid"] + ids["valid"], "test": ids["tstid"]}
    return {
        split: ([decoded[i] for i in chosen], [labels[i - 1] - 1 for i in chosen]) for split, chosen in parts.items()
    }, list(Flowers102.classes)


def write(name, root, patch):
    """root/<name>/ as the authors' files, archives not unpacked; {split: (pictures, labels)} and the class names."""
    home = root / name
    home.mkdir()
    if name.startswith("cifar"):
        return write_cifar(CIFAR10 if name == "cifar10" else CIFAR100, home, patch)
    return {"svhn": write_svhn, "stl10": write_stl10, "flowers102": write_flowers}[name](home, patch)


def write_imagenet(root, parts=("train", "val")):
    for part in parts:
        for name, colour in (("n01440764", "red"), ("n01443537", "blue")):
            (root / "imagenet" / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20 + i, 30), colour).save(root / "imagenet" / part / name / f"{name}_{i}.JPEG")
