"""The command that measures ranks and weights over seeds, on tiny models that it finds as training leaves them."""

import json
import shutil

import numpy as np
import pytest

import karat_lite as kl
from karat_lite.analysis import spectrum_table
from karat_lite.analysis.spectrum import rank_table, spectra
from karat_lite.analysis.weights import tail_table
from karat_lite.train import main as train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = "--data digits --limit 64 --epochs 1 --depth 2 --rank 4 --snapshots 3 --seeds 0 1 --device cpu"
    train([*options.split(), "--out", str(folder)])
    return folder


def test_the_command_writes_means_and_spreads_over_seeds(runs, tmp_path, capsys):
    table = tmp_path / "new" / "table.json"
    spectrum_table.main(["--runs", str(runs), "--results", str(table), "--images", "5", "--rank", "3"])
    found = json.loads(table.read_text())
    assert "NaN" not in table.read_text() and "seeds [0, 1]: effective rank after" in capsys.readouterr().out
    assert found["command"].startswith("python -m karat_lite.analysis.spectrum_table --runs ") and found["machine"]
    assert found["data"] == {"name": "digits", "images": 5, "img_size": 8} and found["rank"] == 3
    assert [(run["model"], run["seed"]) for run in found["runs"]] == [
        (m, s) for m in ("karat", "softmax") for s in (0, 1)
    ]
    images = kl.load_dataset("digits", "test", limit=5)[:5][0]
    for name in ("karat", "softmax"):
        tables, tails = [], []
        for seed in (0, 1):
            folder = runs / f"digits_{name}_seed{seed}"
            model, card = kl.load_checkpoint(folder / "model.safetensors")
            tables.append(rank_table(spectra(model, images), 3))
            tails.append(tail_table(kl.load_trajectory(folder / "trajectory.safetensors")))
            (run,) = [run for run in found["runs"] if run["run"] == folder.name]
            assert run["accuracy"] == pytest.approx(card["metrics"]["test_accuracy"], rel=1e-4)
            assert run["ranks"]["stable rank"]["after"] == pytest.approx(tables[-1]["stable rank"]["after"], rel=1e-4)
        for measure in tables[0]:
            for side in ("before", "after"):
                values = np.array([each[measure][side] for each in tables])
                got = found["ranks"][name][measure][side]
                assert got["mean"] == pytest.approx(values.mean(axis=0).tolist(), rel=1e-4)
                assert got["std"] == pytest.approx(values.std(axis=0, ddof=1).tolist(), rel=1e-3, abs=1e-9)
        got, values = found["weights"][name]["queries"], np.array([each["queries"]["kurtosis"] for each in tails])
        assert got["kurtosis"]["mean"] == pytest.approx(values.mean(axis=0).tolist(), rel=1e-4)
        assert got["count"] == 2 * 64 * 64
        assert found["weights"][name]["norms"]["kurtosis"]["mean"][0] is None
    assert "W" in found["weights"]["karat"] and "W" not in found["weights"]["softmax"]


def test_one_seed_without_a_trajectory(runs, tmp_path):
    folder = tmp_path / "digits_karat_seed1"
    shutil.copytree(runs / folder.name, folder, ignore=shutil.ignore_patterns("trajectory*"))
    found = spectrum_table.seeds_table(tmp_path, images=2)
    assert found["weights"] == {} and found["runs"][0]["weights"] is None and found["runs"][0]["model"] == "karat"
    assert found["ranks"]["karat"]["numerical rank"]["after"] == {"mean": [4.0, 4.0], "std": None}


def test_folders_that_make_no_table_are_named(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run in"):
        spectrum_table.seeds_table(tmp_path)
    model, card = kl.load_checkpoint(runs / "digits_karat_seed0" / "model.safetensors")
    half = {**card, "metrics": {**card["metrics"], "epoch": 1}, "recipe": {**card["recipe"], "epochs": 2}}
    kl.save_checkpoint(tmp_path / "digits_karat_seed0" / "model.safetensors", model, half)
    with pytest.raises(ValueError, match="digits_karat_seed0 is not finished: epoch 1 of 2"):
        spectrum_table.seeds_table(tmp_path)
    kl.save_checkpoint(tmp_path / "digits_karat_seed0" / "model.safetensors", model, card)
    kl.save_checkpoint(tmp_path / "shapes_karat_seed0" / "model.safetensors", model, {**card, "data": "shapes"})
    with pytest.raises(ValueError, match="several datasets .digits, shapes., a table those of one: name it by --data"):
        spectrum_table.seeds_table(tmp_path)
    assert len(spectrum_table.seeds_table(tmp_path, images=2, data="digits")["runs"]) == 1
    larger = {**card, "img_size": 16, "seed": 1}
    kl.save_checkpoint(tmp_path / "digits_karat_seed1" / "model.safetensors", model, larger)
    with pytest.raises(ValueError, match="digits_karat_seed1 has images of 16 pixels, digits_karat_seed0 of 8"):
        spectrum_table.seeds_table(tmp_path, images=2, data="digits")
