"""Datasets by name, read from small files in each one's own format that the tests write; and how they get there."""

import re
import shutil

import formats
import numpy as np
import pytest
import torch
from formats import write, write_imagenet
from mirrors import refuses, sends, serving
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import Flowers102

import karat_lite as kl
from karat_lite import named_data
from karat_lite.data import Files, Images
from karat_lite.downloads import DownloadError

DOWNLOADED = ("cifar10", "cifar100", "svhn", "stl10", "flowers102")


@pytest.fixture
def written(tmp_path, monkeypatch):
    return lambda name: write(name, tmp_path, monkeypatch)


@pytest.fixture
def load(tmp_path):
    """Load from the test's folder, without a network unless it is asked for."""
    return lambda name, split="train", *args, **options: kl.load_dataset(
        name, split, *args, **{"root": tmp_path, "download": False, **options}
    )


def mixed(n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()


# ---- what is in them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("cifar10", 32), ("cifar100", 32), ("svhn", 32), ("stl10", 96)])
def test_pixels_labels_and_names(written, load, name, size):
    content, names = written(name)
    for split, (images, labels) in content.items():
        data = load(name, split)
        order = mixed(len(images))
        assert type(data) is Images and (data.name, data.split, data.img_size) == (name, split, size)
        assert torch.equal(data.images, torch.from_numpy(images)[order]) and data.images.is_contiguous()
        assert data.labels.tolist() == [labels[i] for i in order] and data.labels.dtype == torch.int64
        assert data.classes == tuple(names)
        assert np.array_equal(np.asarray(data.picture(2)), images[order[2]].transpose(1, 2, 0))
        assert data.picture(2).mode == "RGB"


def test_flowers(written, load):
    content, names = written("flowers102")
    for split, (pictures, labels) in content.items():
        data, order = load("flowers102", split, in_memory=False), mixed(len(pictures))
        assert (len(data), data.img_size) == (len(order), 224) and data[0][0].shape == (3, 224, 224)
        assert data.labels.tolist() == [labels[i] for i in order] and data.labels.dtype == torch.int64
        assert data.classes == tuple(names) and len(names) == 102 and names[0] == "pink primrose"
        for i in range(len(order)):
            assert np.array_equal(data.picture(i), pictures[order[i]])


def test_flowers_without_names_are_numbered(written, load, monkeypatch):
    written("flowers102")
    monkeypatch.delattr(Flowers102, "classes")
    assert load("flowers102").classes == tuple(str(i) for i in range(1, 103))


def test_imagenet(tmp_path, load):
    write_imagenet(tmp_path)
    (tmp_path / "imagenet" / "test").mkdir()  # the pictures of the competition, without labels
    for split in ("train", "test"):
        data = load("imagenet", split)
        assert (data.name, data.classes, len(data), data.img_size) == ("imagenet", ("n01440764", "n01443537"), 6, 224)
        images, labels = data[:]
        assert torch.equal((images.mean(dim=(2, 3)) > 0).int().argmax(dim=1), 2 * labels)  # red, blue
        assert load("imagenet", split, 16).img_size == 16
    assert load("imagenet", "test", in_memory=False).files[0].parts[-3] == "val"
    shutil.rmtree(tmp_path / "imagenet" / "train")
    assert len(load("imagenet", "test")) == 6  # to evaluate, val alone will do


def test_imagenet_says_how_to_arrange_it(tmp_path, load):
    def refused(split, part):
        with pytest.raises(FileNotFoundError) as error:
            load("imagenet", split)
        said = str(error.value)
        assert f"{tmp_path / 'imagenet' / part}/<class>/*.JPEG" in said and "image-net.org" in said
        assert f"torchvision.datasets.ImageNet('{tmp_path / 'imagenet'}', '{part}')" in said

    refused("train", "train")
    write_imagenet(tmp_path, parts=("train",))
    refused("test", "val")
    (tmp_path / "imagenet" / "val").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")
    refused("test", "val")  # as the archive leaves them


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_limit_takes_the_first_of_a_mixed_order(written, load, name):
    written(name)
    few, all_of_them = load(name, "train", 16, 3), load(name, "train", 16)
    assert len(few) == 3 < len(all_of_them)
    assert torch.equal(few.images, all_of_them.images[:3]) and torch.equal(few.labels, all_of_them.labels[:3])


@pytest.mark.parametrize("size", [16, 64])
def test_another_size_shows_the_same_picture(written, load, size):
    written("cifar10")
    own, other = load("cifar10"), load("cifar10", img_size=size)
    assert other.images.shape == (20, 3, size, size) and other.images.dtype == torch.uint8 and other.img_size == size
    again = torch.nn.functional.interpolate(own.images.float(), size=(size, size), mode="bilinear", antialias=True)
    assert (other.images.float() - again).abs().max() <= 1
    assert torch.equal(own.labels, other.labels)


def test_what_may_be_mirrored(tmp_path, written, load):
    for name in DOWNLOADED:
        written(name)
        assert load(name).mirrors is (name != "svhn")
    write_imagenet(tmp_path)
    assert load("imagenet").mirrors and load("imagenet", in_memory=False).mirrors and load("shapes", limit=2).mirrors
    assert load(tmp_path / "imagenet").mirrors and not load("digits").mirrors


# ---- in memory or on disk -------------------------------------------------------------------------------------------


def test_files_are_images_read_later(written, load):
    content, _ = written("flowers102")
    held, on_disk = load("flowers102", img_size=12), load("flowers102", img_size=12, in_memory=False)
    assert (type(held), type(on_disk)) == (Images, Files) and len(held) == len(on_disk) == 5
    for attribute in ("name", "split", "classes", "img_size", "mirrors"):
        assert getattr(held, attribute) == getattr(on_disk, attribute)
    assert torch.equal(held.labels, on_disk.labels)
    for i in (0, -1, [3, 1], slice(1, 4), torch.tensor([2, 2]), slice(None)):
        for one, other in zip(held[i], on_disk[i], strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype
    with pytest.raises(IndexError):
        on_disk[5]
    assert held.picture(1).size == (12, 12) and on_disk.picture(1).size == content["train"][0][mixed(5)[1]].size
    images, labels = next(iter(DataLoader(on_disk, batch_size=5)))
    assert torch.equal(images, held[:][0]) and torch.equal(labels, held.labels)


def test_up_to_a_gibibyte_is_held_in_memory(tmp_path, load, monkeypatch):
    write_imagenet(tmp_path)
    assert kl.data.HELD == 2**30
    monkeypatch.setattr(kl.data, "HELD", 6 * 3 * 10 * 10)
    for source in ("imagenet", tmp_path / "imagenet"):
        assert type(load(source, img_size=10)) is Images
        assert type(load(source, img_size=11)) is Files
        assert type(load(source, img_size=11, limit=4)) is Images  # of what is used
        assert type(load(source, img_size=11, in_memory=True)) is Images
        assert type(load(source, img_size=10, in_memory=False)) is Files


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path, load):
    write_imagenet(tmp_path)
    data = load("imagenet", in_memory=False)
    data.files[2].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"cannot read the image {re.escape(str(data.files[2]))}"):
        data[2]


def test_what_is_no_set_of_files_is_always_held(load):
    for name in ("cifar10", "digits", "shapes"):
        with pytest.raises(ValueError, match=f"{name} is no set of files.*leave in_memory out"):
            load(name, in_memory=False)
    assert len(load("digits", limit=3, in_memory=True)) == 3


# ---- where they come from -------------------------------------------------------------------------------------------


def test_from_a_mirror_to_a_tensor(written, load, tmp_path, monkeypatch):
    content, _ = written("cifar10")
    archive = tmp_path / "cifar10" / "cifar-10-python.tar.gz"
    body = archive.read_bytes()
    shutil.rmtree(archive.parent)
    monkeypatch.setattr("karat_lite.downloads.PAUSE", 0.0)
    with serving(b"", refuses(404)) as gone, serving(body, sends(20_000), sends()) as mirror:
        monkeypatch.setitem(named_data.MIRRORS, "cifar10", (gone.url, mirror.url))
        data = load("cifar10", "test", download=True)
        assert mirror.asked == [None, "bytes=20000-"] and gone.asked == [None]
        assert torch.equal(data.images, torch.from_numpy(content["test"][0])[mixed(4)])
        load("cifar10", "train", download=True)
        assert len(gone.asked) == 1 and len(mirror.asked) == 2  # fetched once
    assert archive.read_bytes() == body  # and kept
    shutil.rmtree(archive.parent / "cifar-10-batches-py")
    assert len(load("cifar10")) == 20  # unpacked anew without a network


@pytest.mark.parametrize("name", DOWNLOADED)
def test_what_is_there_needs_neither_network_nor_archive(name, written, load, tmp_path, monkeypatch):
    written(name)
    load(name, "test", 16)
    for archive in (tmp_path / name).rglob("*gz"):
        archive.unlink()
    monkeypatch.delattr("urllib.request.urlopen")
    assert len(load(name, "test", 16, download=True)) >= 4


@pytest.mark.parametrize("name", DOWNLOADED)
def test_every_address_is_asked_and_the_way_on_is_told(name, load, monkeypatch, tmp_path):
    asked = []

    def nowhere(request, timeout):
        asked.append(request.full_url)
        raise TimeoutError

    monkeypatch.setattr("karat_lite.downloads.PAUSE", 0.0)
    monkeypatch.setattr("urllib.request.urlopen", nowhere)
    with pytest.raises(DownloadError, match='"digits" and "shapes" need none') as error:
        load(name, download=True)
    assert all(url in str(error.value) for url in asked) and str(tmp_path / name) in str(error.value)
    own = {
        "cifar10": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "svhn": "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        "stl10": "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "flowers102": "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/imagelabels.mat",
    }
    assert list(dict.fromkeys(asked)) == [*named_data.MIRRORS.get(name, ()), own[name]]


@pytest.mark.parametrize("name", DOWNLOADED)
def test_each_file_is_fetched_from_its_own_address(name, written, load, tmp_path, monkeypatch):
    """All that is missing is fetched, from addresses that end in the file's name."""
    written(name)
    there = {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / name)
    got = []

    def fetch(urls, path, *, md5):
        assert {url.rpartition("/")[2] for url in urls} == {path.name}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(there[path.name])
        assert formats.md5(there[path.name]) == md5
        got.append(path.name)

    monkeypatch.setattr(named_data, "fetch", fetch)
    for split in ("train", "test"):
        load(name, split, 16, download=True)
    assert set(got) == set(there)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_without_a_download_the_way_to_it_is_told(name, load, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    said = str(error.value)
    assert f"no {name} in {tmp_path / name}" in said and "download=True" in said and "by hand" in said
    assert re.search(r"put [\w.-]+ \(MD5 [0-9a-f]{32}\)", said)


def test_root_is_the_clones_data_folder_or_one_here(tmp_path, monkeypatch):
    def where():
        with pytest.raises(FileNotFoundError) as error:
            kl.load_dataset("svhn", "train", download=False)
        return str(error.value)

    assert kl.data.DATA.parts[-2:] == (kl.data.DATA.parent.name, "data") and (kl.data.DATA / "checkpoints").is_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kl.data, "DATA", tmp_path / "clone")
    (tmp_path / "clone").mkdir()
    assert "no svhn in data/svhn:" in where()
    (tmp_path / "clone" / "README.md").write_text("what stands in data/")
    assert f"no svhn in {tmp_path / 'clone' / 'svhn'}:" in where()


# ---- damage ---------------------------------------------------------------------------------------------------------

UNPACKED = {
    "cifar10": ("cifar-10-batches-py", ["data_batch_4", "test_batch", "batches.meta"]),
    "cifar100": ("cifar-100-python", ["train", "test", "meta"]),
    "stl10": ("stl10_binary", ["train_X.bin", "train_y.bin", "test_X.bin"]),
}


@pytest.mark.parametrize("name, file", [(name, file) for name, (_, files) in UNPACKED.items() for file in files])
def test_a_damaged_or_half_unpacked_folder_is_refused(name, file, written, load, tmp_path):
    written(name)
    load(name)
    victim = tmp_path / name / UNPACKED[name][0] / file
    whole = victim.read_bytes()
    for damage in (lambda: victim.write_bytes(whole[:-1]), victim.unlink):
        damage()
        for download in (False, True):
            with pytest.raises(ValueError) as error:
                load(name, download=download)
            said = str(error.value)
            assert f"{victim.parent} is damaged or half unpacked" in said and "remove this folder and load" in said


def test_stl10_without_its_names_is_refused(written, load, tmp_path):
    written("stl10")
    load("stl10")
    names = tmp_path / "stl10" / "stl10_binary" / "class_names.txt"
    for damage in (lambda: names.write_bytes(names.read_bytes()[:30]), names.unlink):
        damage()
        with pytest.raises(ValueError, match="half unpacked .class_names.txt does not name ten classes"):
            load("stl10")


def test_missing_flowers_are_counted(written, load, tmp_path):
    written("flowers102")
    load("flowers102")
    for i in (9, 6):
        (tmp_path / "flowers102" / "flowers-102" / "jpg" / f"image_{i:05d}.jpg").unlink()
    with pytest.raises(ValueError, match=r"jpg is damaged .*2 of 5 pictures are missing: image_00009.jpg"):
        load("flowers102", in_memory=False)
    assert len(load("flowers102", "test")) == 4


@pytest.mark.parametrize(
    "name, file",
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("svhn", "train_32x32.mat"),
        ("flowers102", "flowers-102/setid.mat"),
        ("flowers102", "flowers-102/102flowers.tgz"),
    ],
)
def test_a_damaged_file_is_refused_without_a_network(name, file, written, load, tmp_path):
    written(name)
    damaged = tmp_path / name / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{re.escape(str(damaged))} is damaged .*download=True"):
        load(name)
    assert [path.name for path in (tmp_path / name).rglob("*") if path.is_dir()] in ([], ["flowers-102"])
