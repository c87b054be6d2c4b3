"""Datasets: the same images every time, parts kept apart, values in the models' range; and one's own folders."""

import hashlib
import itertools
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from pictures import COLOURS, write_folder
from PIL import Image
from sklearn.datasets import load_digits

import karat_lite as kl
from karat_lite.data import normalise, read_image, to_unit
from karat_lite.evaluation import is_part_of


def rows(images) -> Counter:
    return Counter(image.numpy().tobytes() for image in images)


# ---- digits ---------------------------------------------------------------------------------------------------------


def test_digits_split_is_fixed_disjoint_and_stratified():
    train, test = kl.load_dataset("digits", "train"), kl.load_dataset("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    source = load_digits()
    whole = (torch.from_numpy(source.images) * 255 / 16).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    assert rows(train.images) + rows(test.images) == rows(whole.contiguous())  # every image once, in one part
    for label, total in Counter(source.target.tolist()).items():
        assert abs((test.labels == label).sum().item() - total / 5) < 1
    # The committed checkpoints were trained on one part and are scored on the other: it may never move.
    assert hashlib.sha256(test.labels.numpy().tobytes()).hexdigest()[:12] == "4493b2052e7b"
    assert hashlib.sha256(test.images.numpy().tobytes()).hexdigest()[:12] == "39be39936ac9"


def test_digits_are_tensors_in_range_with_labels():
    data = kl.load_dataset("digits", "train")
    image, label = data[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32
    assert data.img_size == 8 and data.classes == tuple("0123456789")
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])  # grey
    everything, labels = data[:]
    assert everything.min() == -1 and everything.max() == 1
    assert label == labels[0] and label.dtype == torch.int64


def test_digits_at_another_size():
    small, large = kl.load_dataset("digits", "test"), kl.load_dataset("digits", "test", img_size=16)
    assert large[0][0].shape == (3, 16, 16) and large.img_size == 16
    assert torch.equal(small.labels, large.labels)
    again = torch.nn.functional.avg_pool2d(large[:][0], 2)
    assert (again - small[:][0]).abs().mean() < 0.15  # blurred a little, the same pictures


@pytest.mark.parametrize("name, split", [("digits", "train"), ("digits", "test"), ("shapes", "train")])
def test_a_limit_takes_the_first_of_a_mixed_order(name, split):
    few, more = (kl.load_dataset(name, split, limit=limit) for limit in (60, 90))
    assert (len(few), len(more)) == (60, 90)
    assert torch.equal(few.images, more.images[:60]) and torch.equal(few.labels, more.labels[:60])
    assert len(set(few.labels.tolist())) == len(few.classes)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_shapes_parts_are_drawn_from_different_seeds():
    train, test = (kl.load_dataset("shapes", split, limit=100) for split in ("train", "test"))
    assert not rows(train.images) & rows(test.images)
    assert train.images.shape == (100, 3, 32, 32) and train.masks.shape == (100, 32, 32)
    assert len(train.classes) >= 8 and train.classes == test.classes


def test_shapes_at_another_size_are_the_same_scenes():
    small, large = (kl.load_dataset("shapes", "test", img_size=size, limit=50) for size in (32, 64))
    assert torch.equal(small.labels, large.labels) and large[0][0].shape == (3, 64, 64)
    pooled = torch.nn.functional.avg_pool2d(large.masks[:, None].float(), 2)[:, 0]
    assert (pooled - small.masks.float()).abs().mean() < 0.03


# ---- image folders --------------------------------------------------------------------------------------------------


def test_a_folder_of_images(tmp_path):
    root = write_folder(tmp_path / "colours", size=(12, 9))
    train, test = (kl.load_dataset(root, split) for split in ("train", "test"))
    assert train.name == "colours" and train.classes == test.classes == tuple(COLOURS)
    assert len(train) == len(test) == 12 and train.img_size == 9  # the shorter side
    for images, labels in (train[:], test[:]):
        assert images.dtype == torch.float32 and -1 <= images.min() < images.max() <= 1
        assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4 != labels.tolist()
        strongest = images.mean(dim=(2, 3)).argmax(dim=1)  # of red, green, blue
        assert torch.equal(strongest, 2 - labels)  # blue, green, red
    assert kl.load_dataset(str(root), "test", img_size=5)[0][0].shape == (3, 5, 5)
    few = kl.load_dataset(root, "train", limit=5)
    assert torch.equal(few.images, train.images[:5]) and torch.equal(few.labels, train.labels[:5])


def test_a_folder_image_is_cropped_at_its_centre(tmp_path):
    """Twice as wide as high: the middle half stays, its left and right quarters go."""
    for name in ("a", "b"):
        picture = Image.new("RGB", (32, 16), (255, 0, 0))
        picture.paste((0, 0, 255), (8, 0, 24, 16))
        (tmp_path / "train" / name).mkdir(parents=True)
        picture.save(tmp_path / "train" / name / "0.png")
    images = kl.load_dataset(tmp_path, "train", img_size=16).images
    assert torch.equal(images, torch.tensor([0, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 16, 16))


def test_grey_and_transparent_images_become_rgb_and_other_files_are_passed_over(tmp_path):
    root = write_folder(tmp_path, count=1)
    Image.new("L", (8, 8), 200).save(root / "train" / "red" / "grey.jpg", quality=100)
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(root / "train" / "red" / "deeper.PNG")
    (root / "train" / "red" / "deep").mkdir()
    (root / "train" / "red" / "deeper.PNG").rename(root / "train" / "red" / "deep" / "deeper.PNG")
    (root / "train" / "red" / "notes.txt").write_text("not an image")
    (root / "train" / "red" / "._0.png").write_text("another program's note")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    data = kl.load_dataset(root, "train")
    assert data.classes == tuple(COLOURS) and data.images.shape == (5, 3, 8, 8)
    assert {(200, 200, 200), (1, 2, 3)} <= {tuple(image[:, 0, 0].tolist()) for image in data.images}


def test_val_stands_in_for_test(tmp_path):
    root = write_folder(tmp_path, parts=("train", "val"))
    held_out = kl.load_dataset(root, "test")
    assert len(held_out) == 12
    write_folder(tmp_path, parts=("test",), count=2)
    assert len(kl.load_dataset(root, "test")) == 6  # test goes before val


# ---- range ----------------------------------------------------------------------------------------------------------


def test_to_unit_undoes_normalise():
    levels = torch.arange(256, dtype=torch.uint8)
    values = normalise(levels)
    assert values[0] == -1 and values[-1] == 1
    torch.testing.assert_close(to_unit(values), levels / 255)


def test_grey_pictures_of_sixteen_bits_keep_their_shades(tmp_path):
    """As microscopes and scanners write them; Pillow's own conversion cuts them off at 255."""
    root = write_folder(tmp_path / "grey")
    shades = torch.linspace(0, 65535, 64).round().numpy().astype("uint16").reshape(8, 8)
    file = root / "test" / "red" / "0.png"
    Image.fromarray(shades).save(file)
    data = kl.load_dataset(root, "test")
    expected = torch.from_numpy((shades // 256).astype("uint8"))
    assert any(torch.equal(image, expected.expand(3, 8, 8)) for image in data.images)
    Image.fromarray(shades.astype("float32")).save(root / "test" / "red" / "1.tiff")
    with pytest.raises(ValueError, match="cannot read the image .*1.tiff .*mode F: save it with 8 or 16 bits"):
        kl.load_dataset(root, "test")


def test_pictures_are_upright_and_what_is_transparent_is_white(tmp_path):
    """A phone's picture lies on its side with a note; an icon is black on nothing."""
    picture = Image.new("RGB", (16, 8), "black")
    picture.paste("red", (0, 0, 8, 8))
    note = Image.Exif()
    note[0x0112] = 6  # to be turned by 90 degrees: what is left comes to the top
    odd = struct.pack("<HHHII HHI4s I", 2, 0x0112, 3, 1, 6, 0x011A, 2, 4, b"abc", 0)  # its resolution is no number
    picture.save(tmp_path / "phone.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + odd)
    assert read_image(tmp_path / "phone.jpg").size == (8, 16)
    Image.fromarray(np.zeros((8, 16), dtype=np.uint16)).save(tmp_path / "grey.png", exif=note)
    assert read_image(tmp_path / "grey.png").size == (8, 16)
    picture.save(tmp_path / "phone.png", exif=note)
    upright = read_image(tmp_path / "phone.png")
    assert upright.size == (8, 16)
    assert upright.getpixel((4, 2)) == (255, 0, 0) and upright.getpixel((4, 12)) == (0, 0, 0)
    icon = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    icon.putpixel((1, 1), (0, 0, 0, 255))
    icon.save(tmp_path / "icon.png")
    icon.quantize(4).save(tmp_path / "icon.gif", transparency=icon.quantize(4).getpixel((0, 0)))
    for name in ("icon.png", "icon.gif"):
        seen = read_image(tmp_path / name)
        assert seen.mode == "RGB" and seen.getpixel((0, 0)) == (255, 255, 255) and seen.getpixel((1, 1)) == (0, 0, 0)


def test_every_kind_of_picture_counts_and_nothing_else(tmp_path):
    for part, one in itertools.product(("train", "test"), ("a", "b")):
        folder = tmp_path / part / one
        folder.mkdir(parents=True)
        for ending in ("png", "gif", "jfif", "webp"):
            Image.new("RGB", (8, 8)).save(folder / f"x.{ending}")
        (folder / "trip.jpg").mkdir()
        (folder / "notes.txt").write_text("no picture")
        (folder / "features.h5").write_text("none either, though Pillow has a name for it")
    assert len(kl.load_dataset(tmp_path, "train")) == 8


def test_a_folder_has_a_name_however_it_is_written(tmp_path, monkeypatch):
    write_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert kl.load_dataset(".", "train").name == "mine"
    monkeypatch.chdir(tmp_path / "mine" / "train")
    assert kl.load_dataset("..", "train").name == "mine"
    assert is_part_of("..", {"data": "mine"}) and is_part_of("..", {"data": "mine_few"})
    assert not is_part_of("my_photos", {"data": "my_flowers"})


def test_a_picture_too_large_to_be_one_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="cannot read the image .*huge.png .*remove it or put a whole one"):
        read_image(tmp_path / "huge.png")
