"""Trained models in a folder: what counts as a run, and what the three tables make of those that they are given."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import tiny

import karat_lite as kl
from karat_lite.analysis import content_table, landscape_table, map_quality, spectrum_table
from karat_lite.analysis.masked import load_masked
from karat_lite.analysis.runs import find_runs

SMALL = dict(img_size=8, num_classes=10)


def put(home, data="digits", variant="karat", seed=0, name=None, epoch=1, without=(), **options):
    """A run as karat_lite.train leaves it, without its training."""
    card = {"data": data, "seed": seed, "metrics": {"epoch": epoch, "test_accuracy": 0.5}}
    card["img_size"] = options.get("img_size", 8)
    card = {key: value for key, value in card.items() if key not in without}
    card["recipe"] = {"epochs": 1, "label_smoothing": 0.1}
    model = tiny("softmax" if variant == "softmax" else "karat", seed, **{**SMALL, **options})
    kl.save_checkpoint(home / (name or f"{data}_{variant}_seed{seed}") / "model.safetensors", model, card)
    return home


def test_runs_by_dataset_variant_and_seed(tmp_path):
    for seed in (10, 2):
        put(tmp_path, "a_b", "karat_fourier", seed)
    put(tmp_path, "a", "softmax", 0, epoch=0)  # of another dataset: not looked at
    found = find_runs(tmp_path, "a_b")
    assert [(run.data, run.variant, run.seed) for run in found] == [
        ("a_b", "karat_fourier", 2),
        ("a_b", "karat_fourier", 10),
    ]
    assert found[0].folder == tmp_path / "a_b_karat_fourier_seed2" and found[0].card["metrics"]["test_accuracy"] == 0.5
    assert torch.equal(found[0].model().head.weight, tiny("karat", 2, **SMALL).head.weight)
    with pytest.raises(
        ValueError, match="no run in .* was trained on c: there are a_b_karat_fourier_seed10, .*a_softmax"
    ):
        find_runs(tmp_path, "c")
    for given in (dict(), dict(data="c", elsewhere=True)):
        with pytest.raises(ValueError, match=r"several datasets \(a_b, a\), a table those of one: name it by --data"):
            find_runs(tmp_path, **given)
    with pytest.raises(ValueError, match="a_softmax_seed0 is not finished: epoch 0 of 1. Train on with --resume"):
        find_runs(tmp_path, "a")
    shutil.rmtree(tmp_path / "a_softmax_seed0")
    assert find_runs(tmp_path) == find_runs(tmp_path, "c", elsewhere=True) == found
    put(tmp_path, "a_b", "karat_fourier", 3, img_size=12)
    with pytest.raises(ValueError, match="fourier_seed3 has images of 12 pixels, .*seed10 of 8: one table holds"):
        find_runs(tmp_path)


COMMANDS = {"map_quality": map_quality, "content_table": content_table, "landscape_table": landscape_table}
BAD = {
    "nothing": (lambda home: None, FileNotFoundError, "no run in .*expected .*/DATA_VARIANT_seedK/model.safetensors"),
    "half trained": (lambda home: put(home, seed=1, epoch=0), ValueError, "seed1 is not finished: epoch 0 of 1"),
    "a copy": (lambda home: put(home, name="digits_karat_seed0_copy"), ValueError,
               "seed0_copy holds a run on digits with seed 0: expected .* digits_VARIANT_seed0. Rename it"),
    "another seed": (lambda home: put(home, name="digits_karat_seed1"), ValueError, "seed1 holds .* with seed 0"),
    "no variant": (lambda home: put(home, name="digits_seed0"), ValueError, "expected a folder called digits_VARIANT"),
    "no training": (lambda home: put(home, without=("data", "metrics")), ValueError,
                    "its card lacks data, metrics.epoch, metrics.test_accuracy. Move it"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_run_is_told(case, command, tmp_path):
    fill, kind, words = BAD[case]
    fill(tmp_path / "runs")
    data = [] if case == "no training" else ["--data", "digits"]
    with pytest.raises(kind, match=words):
        COMMANDS[command].main(["--runs", str(tmp_path / "runs"), *data, "--results", str(tmp_path / "x.json")])


@pytest.mark.parametrize("command", [landscape_table, spectrum_table])
def test_runs_on_an_image_folder_ask_for_its_path(command, tmp_path):
    put(tmp_path / "runs", "photos")
    words = f"--runs {tmp_path / 'runs'} --results {tmp_path / 'x.json'}".split()
    with pytest.raises(ValueError, match="trained on an image folder called photos: give its path by --data"):
        command.main(words)
    with pytest.raises(FileNotFoundError, match="no image folder at .*photos: expected a folder with train/<class>/"):
        command.main([*words, "--data", str(tmp_path / "photos")])


# ---- variants are lines of their own --------------------------------------------------------------------------------


def pictures(path):
    """PATH/images and PATH/masks with two pictures of 8 pixels, the object in a corner."""
    for part in ("images", "masks"):
        (path / part).mkdir(parents=True)
    for i in range(2):
        pixels, mask = np.random.default_rng(i).integers(0, 256, (8, 8, 3)), np.zeros((8, 8))
        mask[:3, : 4 + i] = 255
        Image.fromarray(pixels.astype(np.uint8)).save(path / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(path / "masks" / f"{i}.png")
    return path


def test_the_quality_of_maps_is_averaged_within_a_variant(tmp_path):
    for variant in ("softmax", "karat_fourier", "karat_dog"):
        put(tmp_path / "runs", variant=variant)
    put(tmp_path / "runs", variant="karat_dog", seed=1)
    words = f"--runs {tmp_path / 'runs'} --data {pictures(tmp_path / 'mine')} --steps 1 --results {tmp_path / 'x.json'}"
    map_quality.main(words.split())
    results = json.loads((tmp_path / "x.json").read_text())
    assert [(run["attention"], run["seed"]) for run in results["runs"]] == [
        ("softmax", 0), ("karat_dog", 0), ("karat_dog", 1), ("karat_fourier", 0)]  # fmt: skip
    lines = {line["attention"]: line for line in results["summary"] if line["map"] == "random"}
    assert {name: line["seeds"] for name, line in lines.items()} == {"softmax": 1, "karat_dog": 2, "karat_fourier": 1}
    assert lines["karat_dog"]["iou"]["std"] >= 0 and lines["softmax"]["iou"]["std"] is None
    with pytest.raises(ValueError, match="no run in .* was trained on shapes: there are digits_karat_dog_seed0"):
        map_quality.main([*words.split(), "--data", "shapes"])
    put(tmp_path / "runs", "shapes")
    with pytest.raises(ValueError, match=r"several datasets \(digits, shapes\)"):
        map_quality.main(words.split())


def test_two_pictures_of_one_name_are_told(tmp_path):
    path = pictures(tmp_path / "mine")
    for part in ("masks", "images"):
        shutil.copy(path / part / "1.png", path / part / "1.jpg")
        with pytest.raises(ValueError, match=rf"{part}.1.jpg and 1.png differ in their ending alone"):
            load_masked(path, 8)


# ---- the table of landscapes ----------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """A call that fills tmp_path/table.json, given more options, and what it holds after the first: (call, results)."""
    put(tmp_path / "runs", variant="karat_universal")
    few = "--images 6 --count 1 --iterations 3 --directions 1 --device cpu --no-progress"

    def call(*more, runs="runs"):
        words = f"--runs {tmp_path / runs} --results {tmp_path / 'table.json'} {few}"
        landscape_table.main([*words.split(), *more])
        return json.loads((tmp_path / "table.json").read_text())

    return call, call()


def test_eigenvalues_that_have_not_converged_are_counted(table, tmp_path, capsys):
    call, found = table
    assert list(found["summary"]) == ["karat_universal"] and found["runs"][0]["converged"] is False
    assert found["summary"]["karat_universal"]["largest"] | {"mean": 0} == {"mean": 0, "std": None, "unconverged": 1}
    put(tmp_path / "runs", variant="karat_universal", seed=1)
    capsys.readouterr()
    found = call()
    said = capsys.readouterr().out
    assert found["summary"]["karat_universal"]["largest"]["unconverged"] == 2 and found["runs"][1]["seed"] == 1
    assert "digits_karat_universal_seed0: already in the results" in said and "(not converged), largest_plain" in said
    assert "karat_universal: largest had not converged in 2 of 2 seeds: try more --iterations" in said
    assert "unconverged" not in found["summary"]["karat_universal"]["rise"]
    committed = kl.checkpoints.CHECKPOINTS.parent / "results" / "shapes_landscape.json"
    before = json.loads(committed.read_text())
    assert landscape_table.summary(before["runs"]) == before["summary"], "as it was where all have converged"


def test_a_table_goes_on_with_its_own_settings_alone(table, tmp_path):
    call, found = table
    for more, words in (
        (["--iterations", "4"], "iterations = 3, now 4"),
        (["--data", "digits"], "data = None, now digits"),
    ):
        with pytest.raises(ValueError, match=f"table.json was measured with {words}"):
            call(*more)
    put(tmp_path / "others", "shapes", "karat_universal")
    with pytest.raises(
        ValueError, match="measured with dataset = digits, now shapes: give the same settings, or another"
    ):
        call(runs="others")
    assert json.loads((tmp_path / "table.json").read_text()) == found


@pytest.mark.parametrize("text", ["", "[]", '{"runs": []}', '{"command": "x", "runs": [{"attention": "karat"}]}', None])
def test_another_file_in_the_tables_place_is_named(text, table, tmp_path):
    call, _ = table
    other = kl.checkpoints.CHECKPOINTS.parent / "results" / "digits_twins.json"
    (tmp_path / "table.json").write_text(other.read_text() if text is None else text)
    with pytest.raises(ValueError, match="table.json is no table of landscapes, or damaged .*: give another file"):
        call()
