"""`python -m karat_lite.train`: tables of runs, their names, what is resumed, what is told before anything starts."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import karat_lite as kl
from karat_lite import train as train_module
from karat_lite.checks import run_command
from karat_lite.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent



def command_line(*arguments):
    """`python -m karat_lite.train ...` without the seconds that a new process takes."""
    train_module.main([*map(str, arguments)])


def test_the_command_line_trains_twins_and_writes_its_results(tmp_path, capsys):
    results = tmp_path / "new" / "twins.json"
    options = "--data digits --attention softmax karat --seeds 0 1 --epochs 1 --limit 128 --batch-size 32 --lr 0.001"
    command_line(*options.split(), "--results", results, "--out", tmp_path / "runs")
    said, written = capsys.readouterr().out, json.loads(results.read_text())
    assert "softmax  test accuracy" in said and f"written: {results}" in said
    assert written["command"].startswith(f"python -m karat_lite.train {options}")
    assert written["data"] == {"name": "digits", "train": 128, "test": 360, "img_size": 8}
    assert (
        written["recipe"]["epochs"] == 1 and written["recipe"]["batch_size"] == 32 and written["recipe"]["lr"] == 1e-3
    )
    assert [(run["attention"], run["seed"]) for run in written["runs"]] == [
        ("softmax", 0), ("karat", 0), ("softmax", 1), ("karat", 1)
    ]  # fmt: skip
    for attention, line in written["summary"].items():
        accuracy = [run["accuracy"] for run in written["runs"] if run["attention"] == attention]
        assert line["seeds"] == 2 and line["mean"] == pytest.approx(sum(accuracy) / 2)
    starts = {}
    for run in written["runs"]:
        out = tmp_path / "runs" / f"digits_{run['attention']}_seed{run['seed']}"
        model, card = kl.load_checkpoint(out / "model.safetensors")
        assert model.config == run["config"] and card["command"] == written["command"] and card["seed"] == run["seed"]
        assert card["metrics"]["test_accuracy"] == run["accuracy"]
        assert sum(parameter.numel() for parameter in model.parameters()) == run["parameters"]
        starts[run["attention"], run["seed"]] = model.head.weight
    # Four small steps leave the initial weights recognisable: equal in twins, others with another seed.
    apart = {pair: (starts["karat", 0] - starts[pair]).abs().mean() for pair in starts}
    assert apart["softmax", 0] < 0.005 < 0.01 < apart["karat", 1]


def test_larger_batches_take_the_rates_with_them(tmp_path):
    table = tmp_path / "table.json"
    options = "--data digits --attention softmax --limit 128 --epochs 1 --ema 0.9 --lr 0.001 --scale-batch 64".split()
    command_line(*options, "--results", table)
    recipe = json.loads(table.read_text())["recipe"]
    assert (recipe["batch_size"], recipe["lr"], recipe["ema"]) == pytest.approx((64, 0.002, 0.81))
    with pytest.raises(ValueError, match="--scale-batch keeps rates in proportion, --batch-size as they are: give one"):
        command_line(*options, "--batch-size", 32)


def test_the_summary_of_seeds():
    """Mean, and standard deviation with n - 1."""
    summaries = train_module._summaries
    runs = [{"attention": "karat", "accuracy": value} for value in (0.5, 0.7, 0.9)]
    runs += [{"attention": "softmax", "accuracy": 0.1}]
    assert summaries(runs)["karat"] == pytest.approx({"mean": 0.7, "std": 0.2, "seeds": 3})
    assert summaries(runs)["softmax"] == pytest.approx({"mean": 0.1, "std": None, "seeds": 1})


def test_the_command_line_trains_variants_and_resumes_their_table(tmp_path, capsys):
    """Each basis with each order, softmax once; a table that was interrupted goes on where it stood."""
    results = tmp_path / "variants.json"
    options = "--data digits --epochs 1 --limit 64 --rank 4 --basis fourier dog --order w_phi full".split()
    options += ["--results", results, "--resume"]
    command_line(*options)
    written = json.loads(results.read_text())
    names = ["softmax", *(f"karat {basis} {order}" for basis in ("fourier", "dog") for order in ("w_phi", "full"))]
    assert [run["attention"] for run in written["runs"]] == names == list(written["summary"])
    assert [run["config"].get("rank") for run in written["runs"]] == [None, 4, None, 4, None]
    assert [run["config"].get("basis") for run in written["runs"]] == [None, "fourier", "fourier", "dog", "dog"]
    lost = written["runs"].pop(2)
    results.write_text(json.dumps(written))
    capsys.readouterr()
    command_line(*options)
    assert capsys.readouterr().out.count("already in the results") == 4
    again = json.loads(results.read_text())["runs"]
    assert again[:4] == written["runs"] and again[4]["accuracy"] == lost["accuracy"]
    with pytest.raises(ValueError, match="holds runs of another command .*: give the same one, or another file"):
        command_line(*options, "--lr", "0.1")


def test_the_command_line_resumes_from_its_folder_alone(tmp_path, capsys):
    """As `make train` does: finished runs are not trained again, and need no table."""
    options = f"--data digits --epochs 1 --limit 64 --attention karat --out {tmp_path} --resume".split()
    command_line(*options)
    state = tmp_path / "digits_karat_seed0" / "resume.pt"
    stamp, first = state.stat().st_mtime_ns, capsys.readouterr().out.splitlines()[-1]
    command_line(*options)
    assert state.stat().st_mtime_ns == stamp and capsys.readouterr().out.splitlines()[-1] == first
    with pytest.raises(ValueError, match="--resume needs --out FOLDER or --results FILE"):
        command_line("--data", "digits", "--resume")


def test_the_command_line_tests_at_another_size(tmp_path):
    results = tmp_path / "resized.json"
    options = "--data digits --img-size 16 --patch-size 4 --epochs 2 --limit 400 --resize-to"
    command_line(*options.split(), "16", "--results", results)
    for run in json.loads(results.read_text())["runs"]:
        assert run["resized"] == {"img_size": 16, "accuracy": run["accuracy"]}
    results.unlink()
    command_line(*options.split(), "24", "--results", results)
    for run in json.loads(results.read_text())["runs"]:
        assert run["resized"]["img_size"] == 24 and 0.1 < run["resized"]["accuracy"] <= 1
    with pytest.raises(ValueError, match="img_size = 25 is not divisible by patch_size = 4"):
        command_line(*options.split(), "25")


def test_the_command_line_trains_hybrids(tmp_path):
    results = tmp_path / "hybrid.json"
    options = "--data digits --epochs 1 --limit 64 --attention hybrid --softmax-heads 0 2 --softmax-layers 1".split()
    command_line(*options, "--base", "silu", "--simplex", "--results", results)
    (run,) = json.loads(results.read_text())["runs"]
    expected = dict(attention="hybrid", softmax_heads=[0, 2], softmax_layers=[1], base="silu", simplex=True)
    assert expected.items() <= run["config"].items()
    with pytest.raises(ValueError, match="are for hybrids: add --attention hybrid, or leave them out"):
        command_line("--data", "digits", "--softmax-heads", "0")


def test_the_command_line_explains_itself(capsys):
    with pytest.raises(SystemExit) as end:
        command_line("--help")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "python -m karat_lite.train" in said and "--rank" in said
    with pytest.raises(SystemExit) as end:
        command_line("--data", "digits", "--attention", "sofmax")
    assert end.value.code != 0 and "'sofmax' (choose from" in capsys.readouterr().err


QUICK = "--data digits --epochs 1 --limit 64 --attention karat".split()


def test_a_table_goes_on_with_more_seeds_and_without_the_word(tmp_path):
    """--resume itself, seeds, folders and workers may change; what is trained may not, and no run is lost."""
    results = tmp_path / "table.json"
    command_line(*QUICK, "--results", results)
    (first,) = json.loads(results.read_text())["runs"]
    with pytest.raises(ValueError, match="is there already: add --resume to go on with it, or give another file"):
        command_line(*QUICK, "--results", results)
    command_line(*QUICK, "--seeds", "0", "1", "--out", tmp_path / "runs", "--results", results, "--resume")
    both = json.loads(results.read_text())
    assert both["runs"][0] == first and [run["seed"] for run in both["runs"]] == [0, 1]
    assert both["summary"]["karat"]["seeds"] == 2
    with pytest.raises(ValueError, match="holds runs of seeds 0: name them in --seeds, too"):
        command_line(*QUICK, "--seeds", "1", "--results", results, "--resume")
    for text in ("{", "[]", '{"runs": []}'):
        results.write_text(text)
        with pytest.raises(ValueError, match="is no table of runs, or damaged .*: give another file"):
            command_line(*QUICK, "--results", results, "--resume")
        assert results.read_text() == text


def test_full_rank_is_one_variant_however_many_ranks(tmp_path):
    results = tmp_path / "table.json"
    command_line(*QUICK, "--order", "full", "w_phi", "--rank", "2", "4", "--results", results)
    runs = json.loads(results.read_text())["runs"]
    assert {run["attention"]: run["config"]["rank"] for run in runs} == {
        "karat full": None, "karat w_phi rank 2": 2, "karat w_phi rank 4": 4
    }  # fmt: skip


def test_none_switches_a_setting_of_a_recipe_off(tmp_path):
    """The paper's average of weights, and its crops with all that needs them."""
    plain = "--crop-scale none --auto-augment none --color-jitter 0 --test-crop 1 --crop-ratio 0.75 1.3333333333333333"
    results = tmp_path / "table.json"
    command_line(*QUICK, *f"--recipe paper --ema none {plain}".split(), "--results", results)
    recipe = json.loads(results.read_text())["recipe"]
    assert recipe["ema"] is None and recipe["crop_scale"] is None and recipe["auto_augment"] is None
    assert recipe["mixup"] == RECIPES["paper"].mixup


TOLD_EARLY = {
    "--seeds 0 0": "--seeds names 0 twice",
    "--seeds -1": "a seed must be >= 0, got -1",
    "--workers -1": "--workers must be >= 0, got -1",
    "--img-size 0": "--img-size must be >= 1, got 0",
    "--patch-size 0": "--patch-size must be >= 1, got 0",
    "--log-every -1": "--log-every must be >= 0, got -1",
    "--save-minutes -1": "save_minutes must be >= 0 .*, got -1",
    "--attention softmax --rank 4 --init paper": "--rank, --init: for attention that learns .*, got softmax",
    "--attention karat --basis dog rational --grid 7": "--grid 7: none of the bases dog, rational has a grid",
    "--precision float16 --device cpu": "float16 is for GPUs, .*: take bfloat16 or float32",
    "--recipe paper --auto-augment nonsense": "timm cannot read auto_augment = 'nonsense'",
    "--ema 0": r"recipe's ema must be in \(0, 1\), or None, got 0.0",
    "--device tpu": "unknown device .*'tpu'",
}


def test_a_training_that_is_there_is_not_begun_anew(tmp_path):
    """The folder's name does not say every option: another command would take its place."""
    command_line(*QUICK, "--attention", "karat", "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "digits_karat_seed0").iterdir()}
    with pytest.raises(ValueError, match="digits_karat_seed0 holds a training: add --resume to go on, or give another"):
        command_line(*QUICK, "--attention", "softmax", "karat", "--rank", "4", "--out", tmp_path)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "digits_karat_seed0").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["digits_karat_seed0"]


@pytest.mark.parametrize("options", TOLD_EARLY)
def test_mistakes_are_told_before_a_folder_is_made(options, tmp_path):
    with pytest.raises(ValueError, match=TOLD_EARLY[options]):
        command_line(*QUICK, *options.split(), "--out", tmp_path / "runs")
    assert not list(tmp_path.iterdir())


def test_two_calls_on_one_table_keep_each_others_runs(tmp_path, monkeypatch):
    table, other = tmp_path / "table.json", tmp_path / "other.json"
    options = "--data digits --attention softmax --limit 64 --epochs 1 --resume".split()
    command_line(*options, "--seeds", 5, "--results", other)
    trained = train_module.train

    def beside(*args, **kwargs):  # meanwhile another call writes its run
        table.write_text(other.read_text())
        return trained(*args, **kwargs)

    monkeypatch.setattr(train_module, "train", beside)
    command_line(*options, "--seeds", 0, "--results", table)
    written = json.loads(table.read_text())
    assert sorted(run["seed"] for run in written["runs"]) == [0, 5] and written["summary"]["softmax"]["seeds"] == 2


def test_a_table_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*folder: a folder, or in a read-only one. Give another --results"):
        command_line(*QUICK, "--results", tmp_path / "folder")
    with pytest.raises(OSError, match="cannot make the folder of .*table.json .*: give another --results"):
        command_line(*QUICK, "--results", tmp_path / "file" / "table.json")


def test_a_pair_is_two_numbers_or_none_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line(*QUICK, "--crop-scale", "none", "1")
    assert "--crop-scale takes two numbers, or `none` alone" in capsys.readouterr().err


def test_one_seed_has_no_spread(capsys):
    command_line(*QUICK)
    said = [line for line in capsys.readouterr().out.splitlines() if "test accuracy" in line]
    assert said[-1].endswith("% with one seed") and "+-" not in said[-1]


def run_it(*arguments, **environment):
    command = [sys.executable, "-m", "karat_lite.train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def test_a_mistake_is_one_line_for_who_types_it():
    done = run_it("--data", "digit")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("ValueError: ") and "did you mean 'digits'?" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_log_file_is_not_flooded_and_the_bar_can_be_left_out(tmp_path):
    """The environment is read when tqdm is imported: that one needs a process of its own."""
    options = "--data digits --epochs 3 --limit 320 --attention softmax".split()

    def said(*more):
        with open(tmp_path / "log", "w+") as log, contextlib.redirect_stdout(log):
            command_line(*options, *more)
        return (tmp_path / "log").read_text()

    assert 3 <= said().count("img/s") <= 8, "an update for each epoch, not two a second"
    assert "img/s" not in said("--no-progress")
    assert "img/s" not in run_it(*options, TQDM_DISABLE="1").stdout


def test_a_rank_that_no_operator_has():
    with pytest.raises(ValueError, match="--rank 5 7: a full-rank operator has none: leave it out"):
        train_module.main(["--data", "digits", "--order", "full", "--rank", "5", "7"])


def test_a_library_that_is_not_there_is_told_in_a_line():
    def lacks():
        raise ImportError("this recipe needs timm: pip install timm")

    with pytest.raises(SystemExit, match="ImportError: this recipe needs timm"):
        run_command(lacks)
