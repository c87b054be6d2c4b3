"""Batches: which images, in which order, how changed; the same with workers, from the middle, and in parts."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from pictures import write_folder
from PIL import Image

import karat_lite as kl
from karat_lite.augment import as_tested, batches, in_order, mirror_and_shift, mix, seeded, timm_transform
from karat_lite.recipes import make_recipe

CPU = torch.device("cpu")
SINGLE = make_recipe("paper", batch_size=8)
PLAIN = kl.Recipe(batch_size=8)
PHOTOS = kl.Recipe(batch_size=8, flip=0.5, shift=2)


@pytest.fixture(scope="module")
def shapes():
    return kl.load_dataset("shapes", "train", limit=30)


def epoch(data, recipe, epoch=0, seed=0, **options):
    return list(batches(data, recipe, 32, seed=seed, epoch=epoch, device=CPU, **options))


def same(a, b) -> bool:
    flat_a, flat_b = ([tensor for batch in each for tensor in batch] for each in (a, b))
    return len(a) == len(b) and all(map(torch.equal, flat_a, flat_b))


# ---- which images, in which order -----------------------------------------------------------------------------------


def test_an_epoch_shows_whole_batches_each_image_once(shapes):
    found = epoch(shapes, PLAIN)
    assert [len(labels) for _, labels in found] == [8, 8, 8], "six images are left for another epoch"
    pictures = {image.numpy().tobytes() for images, _ in found for image in images}
    there = {image.numpy().tobytes() for image in shapes[:][0]}
    assert len(pictures) == 24 and pictures <= there
    by_image = {image.numpy().tobytes(): label for image, label in zip(*shapes[:], strict=True)}
    for images, labels in found:
        assert [by_image[image.numpy().tobytes()] for image in images] == labels.tolist()


@pytest.mark.parametrize("recipe", [PLAIN, PHOTOS, SINGLE], ids=["plain", "photos", "single"])
def test_seed_and_epoch_decide_everything(shapes, recipe):
    torch.manual_seed(random.randrange(1000))
    first = epoch(shapes, recipe)
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    assert same(first, epoch(shapes, recipe))
    assert not same(first, epoch(shapes, recipe, epoch=1)) and not same(first, epoch(shapes, recipe, seed=1))


@pytest.mark.parametrize("recipe", [PLAIN, PHOTOS, SINGLE], ids=["plain", "photos", "single"])
def test_an_epoch_goes_on_from_the_middle(shapes, recipe):
    assert same(epoch(shapes, recipe)[2:], epoch(shapes, recipe, start=2))


@pytest.mark.parametrize("recipe", [PHOTOS, SINGLE], ids=["photos", "single"])
def test_workers_change_nothing(shapes, recipe):
    assert same(epoch(shapes, recipe), epoch(shapes, recipe, workers=2))


@pytest.mark.parametrize("recipe", [PLAIN, PHOTOS, SINGLE], ids=["plain", "photos", "single"])
def test_two_processes_see_the_halves_of_each_batch(shapes, recipe):
    halves = [epoch(shapes, recipe, part=(i, 2)) for i in (0, 1)]
    joined = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*halves, strict=True)]
    assert same(joined, epoch(shapes, recipe))


def test_a_test_shows_every_image_once_in_order(shapes):
    found = list(in_order(shapes, 8, CPU))
    assert [len(labels) for _, labels in found] == [8, 8, 8, 6]
    assert torch.equal(torch.cat([images for images, _ in found]), shapes[:][0])
    parts = [torch.cat([labels for _, labels in in_order(shapes, 8, CPU, part=(i, 4))]) for i in range(4)]
    assert sum(map(len, parts)) == 30 and torch.equal(parts[1], shapes.labels[1::4])


def test_global_random_numbers_are_left_alone(shapes):
    def drawn():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    def seeds():
        torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002

    seeds()
    expected = drawn()
    for recipe in (PLAIN, PHOTOS, SINGLE):
        seeds()
        images, labels = epoch(shapes, recipe)[0]
        mix(images, labels, SINGLE, len(shapes.classes), (0, 0, 0))
        assert drawn() == expected
    with seeded(1, 2):
        inside = drawn()
    with seeded(1, 2):
        assert drawn() == inside
    with seeded(2, 1):
        assert drawn() != inside


# ---- how they are changed -------------------------------------------------------------------------------------------


def test_mirror_and_shift_against_slices_by_hand():
    images = torch.rand(64, 3, 8, 8) + 0.1  # nowhere 0, the colour of the border
    out = mirror_and_shift(images, 0.5, 2, torch.Generator().manual_seed(0))
    corners, mirrored = set(), 0
    for image, changed in zip(images, out, strict=True):
        found = [
            (flip, row, column)
            for flip in (False, True)
            for row in range(5)
            for column in range(5)
            if torch.equal(_by_hand(image, flip, row, column), changed)
        ]
        assert len(found) == 1, "each image is mirrored or not, and shifted by up to two pixels, as a whole"
        corners.add(found[0][1:]), (mirrored := mirrored + found[0][0])
    assert 20 <= mirrored <= 44 and len(corners) >= 20
    assert torch.equal(mirror_and_shift(images, 0.0, 0, torch.Generator()), images)


def _by_hand(image, flip, row, column):
    padded = torch.zeros(3, 12, 12)
    padded[:, 2:10, 2:10] = image.flip(-1) if flip else image
    return padded[:, row : row + 8, column : column + 8]


def test_digits_are_never_mirrored(shapes):
    digits = kl.load_dataset("digits", "train", limit=16)
    always = kl.Recipe(batch_size=8, flip=1.0)
    plain = [list(batches(digits, r, 8, seed=0, epoch=0, device=CPU)) for r in (PLAIN, always)]
    assert same(*plain)
    mirrored, as_they_are = epoch(shapes, always), epoch(shapes, PLAIN)
    assert torch.equal(mirrored[0][0], as_they_are[0][0].flip(-1))
    whole = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), color_jitter=0.0, auto_augment=None)
    for data, turned in ((digits, False), (shapes, True)):
        size = data.img_size
        plain, always = (make_recipe("paper", batch_size=8, flip=flip, **whole) for flip in (0.0, 1.0))
        seen, other = (next(batches(data, r, size, seed=0, epoch=0, device=CPU))[0] for r in (plain, always))
        assert torch.equal(other, seen.flip(-1) if turned else seen), data.name


def test_single_pictures_are_cropped_to_the_model(tmp_path):
    """Pictures of any size, seen at 48 pixels: training crops differ from epoch to epoch, tests do not."""
    data = kl.load_dataset(write_folder(tmp_path / "colours", count=6), "train")
    seen = [list(batches(data, SINGLE, 48, seed=0, epoch=e, device=CPU)) for e in (0, 1)]
    images, _ = seen[0][0]
    assert images.shape == (8, 3, 48, 48) and images.min() >= -1 and images.max() <= 1 and not same(*seen)
    view = as_tested(data, SINGLE, 48)
    assert view.img_size == 48 and len(view) == len(data) and view.classes == data.classes
    (a, labels), *_ = in_order(view, 8, CPU)
    (b, _), *_ = in_order(view, 8, CPU)
    assert torch.equal(a, b) and torch.equal(labels, data.labels[:8])
    assert as_tested(data, PLAIN, 48) is data


def test_test_pictures_against_resize_and_crop_by_hand():
    """48 pixels of 53 at a crop ratio of 0.9."""
    data = kl.load_dataset("shapes", "test", limit=2, img_size=80)
    (seen, _), *_ = in_order(as_tested(data, SINGLE, 48), 2, CPU)
    picture = Image.fromarray(data.images[0].permute(1, 2, 0).numpy()).resize((53, 53), Image.Resampling.BICUBIC)
    left = round((53 - 48) / 2)
    by_hand = np.asarray(picture.crop((left, left, left + 48, left + 48)), dtype=np.float32) / 127.5 - 1
    assert np.abs(seen[0].permute(1, 2, 0).numpy() - by_hand).max() < 1e-5


@pytest.mark.parametrize("policy", ["v0", "original-mstd0.5", "augmix-m5"])
def test_other_policies_of_timm_work_too(policy, shapes):
    _, _, colours, *_ = timm_transform(dataclasses.replace(SINGLE, auto_augment=policy), 32, training=True).transforms
    ops = colours.ops if hasattr(colours, "ops") else [op for pair in colours.policy for op in pair]
    for op in ops:
        op.prob = 1.0
        with seeded(0):
            assert op(shapes.picture(0)).size == (32, 32), op.name


def test_every_change_of_colour_works_at_full_strength(shapes):
    """timm's own posterize asks for 0 bits there, which Pillow 12 and later refuse."""
    _, _, colours, *_ = timm_transform(SINGLE, 32, training=True).transforms
    names = {op.name: op for op in colours.ops}
    assert "PosterizeIncreasing" in names
    for op in colours.ops:
        op.prob = 1.0
        with seeded(0):
            assert op(shapes.picture(0)).size == (32, 32), op.name
    assert np.asarray(names["PosterizeIncreasing"](shapes.picture(0))).max() == 0


def test_without_timm_a_recipe_that_needs_it_says_so(shapes, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ImportError, match=r"this recipe needs timm, .*: pip install timm"):
        epoch(shapes, SINGLE)
    assert len(epoch(shapes, PHOTOS)) == 3
