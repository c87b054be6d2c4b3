"""Bad input gets one clear sentence: what was given, what is expected, what to do."""

import pytest
import torch
from pictures import write_folder

import karat_lite as kl
from karat_lite.training import pick_device, train

SMALL = dict(img_size=8, patch_size=2, depth=1, dim=16)  # 17 tokens


def pico(**options):
    return kl.create_model("vit_pico", **{**SMALL, **options})


def digits(**options):
    return [kl.load_dataset("digits", split, limit=8, **options) for split in ("train", "test")]


def images(value):
    batch = torch.zeros(3, 3, 8, 8)
    batch[1, 0, 2, 2] = value
    return batch


# What is done, the error's type, and the words that its message must hold.
CASES = {
    # names, with the close match
    "basis": (lambda: pico(basis="fourrier"), ValueError, ["basis 'fourrier'", "did you mean 'fourier'?"]),
    "model": (lambda: kl.create_model("vit_tinny"), ValueError, ["model 'vit_tinny'", "'vit_tiny'?", "'vit_base'"]),
    "attention": (lambda: pico(attention="sofmax"), ValueError, ["attention 'sofmax'", "did you mean 'softmax'?"]),
    "mode": (lambda: pico(mode="blockwize"), ValueError, ["mode 'blockwize'", "'blockwise'?", "'universal'"]),
    "init": (lambda: pico(init="varianse"), ValueError, ["init 'varianse'", "did you mean 'variance'?", "'paper'"]),
    "option": (lambda: pico(deph=2), ValueError, ["model option 'deph'", "did you mean 'depth'?"]),
    "dataset": (
        lambda: kl.load_dataset("digit", "test"),
        ValueError,
        ["'digit'", "did you mean 'digits'?", "'shapes'"],
    ),
    "hyphen": (lambda: kl.load_dataset("cifar-10", "test"), ValueError, ["'cifar-10'", "did you mean 'cifar10'?"]),
    "no dataset": (lambda: kl.load_dataset("xyz", "test"), ValueError, ["'xyz'", "'digits', 'shapes'", "folder"]),
    "split": (lambda: kl.load_dataset("digits", "tests"), ValueError, ["split 'tests'", "did you mean 'test'?"]),
    "nothing like it": (lambda: pico(basis="xyz"), ValueError, ["basis 'xyz': Choose one of 'bspline', 'chebyshev'"]),
    # sizes
    "grid 0": (lambda: pico(grid=0), ValueError, ["grid must be >= 1, got 0"]),
    "grid 2.5": (lambda: pico(grid=2.5), TypeError, ["grid must be a whole number >= 1, got 2.5 of type float"]),
    "rank 0": (lambda: pico(rank=0), ValueError, ["rank must be >= 1, got 0"]),
    "rank > N": (lambda: pico(rank=18), ValueError, ["rank = 18", "17 tokens", "take rank <= 17, or rank=None"]),
    "rank '12'": (lambda: pico(rank="12"), TypeError, ["rank must be a whole number >= 1, got '12' of type str"]),
    "dim and heads": (lambda: pico(num_heads=3), ValueError, ["dim = 16", "num_heads = 3", "take dim = 15 or 18"]),
    "heads 0": (lambda: pico(num_heads=0), ValueError, ["num_heads must be >= 1, got 0"]),
    "layer": (
        lambda: kl.KArAttention(10, 4, 9, rank=5),
        ValueError,
        ["dim = 10", "num_heads = 4", "take dim = 8 or 12"],
    ),
    "patches": (lambda: pico(patch_size=3), ValueError, ["img_size = 8", "patch_size = 3", "take img_size = 6 or 9"]),
    "patch > image": (lambda: pico(patch_size=16), ValueError, ["img_size = 8", "patch_size = 16", "img_size = 16"]),
    "depth 0": (lambda: pico(depth=0), ValueError, ["depth must be >= 1, got 0"]),
    "classes 0": (lambda: pico(num_classes=0), ValueError, ["num_classes must be >= 1, got 0"]),
    "image size 0": (
        lambda: kl.load_dataset("digits", "test", img_size=0),
        ValueError,
        ["img_size must be >= 1, got 0"],
    ),
    "limit 0": (lambda: kl.load_dataset("digits", "test", limit=0), ValueError, ["limit must be >= 1, got 0"]),
    # tensors
    "tokens": (
        lambda: kl.KArAttention(16, 4, 17)(torch.zeros(2, 26, 16)),
        ValueError,
        ["built for 4 heads and 17 tokens", "(2, 4, 26, 4)", "img_size and patch_size"],
    ),
    "scores": (
        lambda: kl.KArAtOperator(4, 17).activate(torch.zeros(2, 4, 26, 26)),
        ValueError,
        ["17 tokens", "(2, 4, 26, 26)"],
    ),
    "image size": (lambda: pico()(torch.zeros(2, 3, 16, 16)), ValueError, ["(B, 3, 8, 8)", "(2, 3, 16, 16)", "resize"]),
    "channels": (lambda: pico()(torch.zeros(2, 1, 8, 8)), ValueError, ["(B, 3, 8, 8)", "got (2, 1, 8, 8)"]),
    "one image": (lambda: pico()(torch.zeros(3, 8, 8)), ValueError, ["(B, 3, 8, 8)", "got (3, 8, 8)"]),
    "NaN": (lambda: pico()(images(torch.nan)), ValueError, ["must be finite", "1 of 3 images (first: 1)"]),
    "infinity": (lambda: pico()(images(-torch.inf)), ValueError, ["must be finite", "1 of 3 images (first: 1)"]),
    "bytes": (lambda: pico()(images(1).byte()), TypeError, ["floating point", "torch.uint8", "normalise"]),
    # training
    "device": (lambda: pick_device("cuda:99"), ValueError, ["'cuda:99'", "not on this machine", "'cpu'"]),
    "train's device": (lambda: train(pico(), *digits(), kl.Recipe(), device="cuda:99"), ValueError, ["'cuda:99'"]),
    "classes": (
        lambda: train(pico(num_classes=4), *digits(), kl.Recipe()),
        ValueError,
        ["digits has 10 classes and the model 4", "num_classes=10"],
    ),
    "size of data": (
        lambda: train(pico(), digits()[0], digits(img_size=16)[1], kl.Recipe()),
        ValueError,
        ["test images of digits have 16 pixels", "the model takes 8", "img_size=8"],
    ),
    "epochs 0": (lambda: train(pico(), *digits(), kl.Recipe(epochs=0)), ValueError, ["epochs must be >= 1, got 0"]),
    "batch 0": (lambda: train(pico(), *digits(), kl.Recipe(batch_size=0)), ValueError, ["batch_size must be >= 1"]),
}


def sentence(error, words):
    """The message holds every word and is one readable sentence or two, not a page."""
    said = str(error.value)
    assert [word for word in words if word not in said] == [], said
    assert "\n" not in said and len(said) < 400, said


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(case):
    do, kind, words = CASES[case]
    with pytest.raises(kind) as error:
        do()
    sentence(error, words)


def test_finite_images_whose_sum_overflows_are_welcome():
    assert pico()(torch.full((2, 3, 8, 8), 3e38)).shape == (2, 10)


# ---- image folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures", count=2)


def refused(root, split, kind, *words):
    with pytest.raises(kind) as error:
        kl.load_dataset(root, split)
    sentence(error, words)


def test_a_folder_that_is_not_there(tmp_path):
    for given in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        refused(given, "train", FileNotFoundError, "nowhere", "train/<class>/ and test/<class>/")


def test_a_folder_without_its_parts(tmp_path):
    (tmp_path / "cats").mkdir()
    refused(tmp_path, "train", FileNotFoundError, f"no folder {tmp_path / 'train'}", "train/<class>/")
    refused(tmp_path, "test", FileNotFoundError, f"no folder {tmp_path / 'test'}", "val/<class>/")


def test_an_empty_folder(tmp_path):
    (tmp_path / "train").mkdir()
    refused(tmp_path, "train", ValueError, f"no images in {tmp_path / 'train'}", ".png")


def test_a_class_without_images(folder):
    (folder / "train" / "grey").mkdir()
    (folder / "train" / "grey" / "notes.txt").write_text("nothing to see")
    refused(folder, "train", ValueError, f"no images in {folder / 'train' / 'grey'}", ".png")


def test_one_class(tmp_path):
    root = write_folder(tmp_path, classes=("red",))
    refused(root, "train", ValueError, "one class only ('red')", "at least two folders")


def test_parts_with_different_classes(folder):
    (folder / "test" / "red").rename(folder / "test" / "rot")
    refused(folder, "test", ValueError, "different classes", "['red', 'rot']")


@pytest.mark.parametrize("damage", [lambda whole: whole[:60], lambda whole: b"no picture", lambda whole: b""])
def test_a_broken_image_is_named(folder, damage):
    broken = folder / "train" / "green" / "1.png"
    broken.write_bytes(damage(broken.read_bytes()))
    refused(folder, "train", ValueError, f"cannot read the image {broken}", "put a whole one in its place")
