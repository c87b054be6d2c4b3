"""One training step of every recipe on every dataset, each in its own format on disk."""

import dataclasses

import formats
import pytest
import torch
from pictures import write_folder

import karat_lite as kl
from karat_lite.data import DOWNLOADED
from karat_lite.training import train

SOURCES = ["digits", "shapes", *DOWNLOADED, "imagenet", "folder"]


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    """A dataset's name or path, and the folder where it lies."""
    root, name = tmp_path_factory.mktemp(request.param), request.param
    with pytest.MonkeyPatch.context() as patch:
        if name in DOWNLOADED:
            formats.write(name, root, patch)
        elif name == "imagenet":
            formats.write_imagenet(root)
        elif name == "folder":
            name = write_folder(root / "colours", count=3)
        yield name, root


@pytest.mark.parametrize("recipe", kl.RECIPES)
def test_one_step_of_every_recipe_on_every_dataset(source, recipe):
    (name, root), recipe = source, dataclasses.replace(kl.RECIPES[recipe], epochs=1, batch_size=4)
    limit = {"limit": 6} if name in ("digits", "shapes") else {}
    bytes_only = name in kl.data.NAMED and name not in kl.data.FILES_SIZE
    files = False if recipe.single_pictures and not bytes_only else None
    size = None if recipe.single_pictures else 32  # single pictures are cropped from the whole
    parts = [kl.load_dataset(name, split, size, root=root, in_memory=files, **limit) for split in ("train", "test")]
    torch.manual_seed(0)
    model = kl.create_model(
        "vit_pico", "karat", img_size=32, patch_size=8, dim=16, depth=1, rank=4, num_classes=len(parts[0].classes)
    )
    before = model.head.weight.detach().clone()
    (record,) = train(model, *parts, recipe, device="cpu", progress=False).records
    assert 0 < record["train_loss"] < 10 and record["grad_norm"] > 0 and not torch.equal(before, model.head.weight)
    assert ("average_accuracy" in record) == (recipe.ema is not None)
