"""A training that is killed goes on to the same bits; what it leaves is whole; what does not fit is refused."""

import dataclasses
import json
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import karat_lite as kl
from karat_lite.history import History
from karat_lite.training import train
from karat_lite.trajectory import load_trajectory, snapshot_steps

# All that could go wrong at once: shifted images, mixed batches, averaged weights.
RECIPE = kl.Recipe(epochs=8, batch_size=16, warmup_epochs=1.0, shift=1, mixup=0.2, cutmix=0.5, ema=0.9)
STEPS = 8 * 160 // 16
TIMES = ("seconds", "images_per_second", "peak_memory")


def make(mode="universal", **options):
    torch.manual_seed(0)
    options = {**dict(img_size=8, patch_size=2, depth=2, dim=16, num_heads=2, rank=4, mode=mode), **options}
    return kl.create_model("vit_pico", "karat", **options)


def digits():
    return kl.load_dataset("digits", "train", limit=160), kl.load_dataset("digits", "test", limit=50)


def training(out, recipe=RECIPE, model=None, data=None, **options):
    options = {**dict(seed=3, device="cpu", save_minutes=0.0, progress=False, resume=True, snapshots=5), **options}
    return train(model or make(), *(data or digits()), recipe, out=out, **options)


def weights(out, name="model"):
    model, _ = kl.load_checkpoint(Path(out) / f"{name}.safetensors")
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def untimed(history):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in history.records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same training without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    training(out, log_every=7)
    torch.set_num_threads(threads)
    return out


# ---- killed ---------------------------------------------------------------------------------------------------------


def in_child(out):
    torch.set_num_threads(1)
    training(out, log_every=7)


def check_whole(out):
    """Whatever stands in the folder under its own name can be read."""
    for path in out.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".jsonl":
            History.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.parent.name == "snapshots":
            from safetensors.torch import load_file

            load_file(path)
        else:
            assert path.suffix == ".safetensors"
            kl.load_checkpoint(path)


def test_killed_ten_times_a_training_ends_at_the_same_bits(whole, tmp_path):
    """SIGKILL at a random moment, in or between epochs; then with resume to the end."""
    start = multiprocessing.get_context("forkserver")  # children start from a process that has imported all of it
    start.set_forkserver_preload(["karat_lite.training", "timm.data", "accelerate", "sklearn.datasets"])
    moment, progress = random.Random(0), []
    for _ in range(10):
        child = start.Process(target=in_child, args=(tmp_path,))
        child.start()
        _wait_for_steps(tmp_path, child, done=progress[-1] + 1 if progress else 1)
        time.sleep(moment.uniform(0.0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -9
        check_whole(tmp_path)
        progress.append(_steps(tmp_path))
    assert progress[0] >= 1 and progress == sorted(progress) and progress[-1] < STEPS, progress
    assert any(steps % 10 for steps in progress), "some were killed within an epoch"
    child = start.Process(target=in_child, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert torch.equal(weights(whole), weights(tmp_path)) and torch.equal(
        weights(whole, "average"), weights(tmp_path, "average")
    )
    a, b = (History.load(folder / "history.jsonl") for folder in (whole, tmp_path))
    assert untimed(a) == untimed(b) and a.steps == b.steps and len(a.steps) == 1 + STEPS // 7
    a, b = (load_trajectory(folder / "trajectory.safetensors") for folder in (whole, tmp_path))
    assert a.steps == b.steps == [0, 20, 40, 60, 80]
    assert all(torch.equal(value, b.weights[name]) for name, value in a.weights.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in whole.iterdir())


def _steps(out) -> int:
    if not (out / "resume.pt").is_file():
        return 0
    state = torch.load(out / "resume.pt", weights_only=True)
    return state["epoch"] * 10 + state["done"]


def _wait_for_steps(out, child, done):
    deadline = time.monotonic() + 120
    while _steps(out) < done:
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


# ---- gone on with ---------------------------------------------------------------------------------------------------


def test_a_finished_training_is_not_trained_again(whole):
    state, stamp = weights(whole), (whole / "resume.pt").stat().st_mtime_ns
    model = make()
    history = training(whole, model=model, log_every=7)
    assert len(history.records) == RECIPE.epochs and (whole / "resume.pt").stat().st_mtime_ns == stamp
    assert torch.equal(torch.cat([value.flatten() for value in model.state_dict().values()]), state)


def test_what_an_interruption_left_unwritten_is_written_at_once(whole, tmp_path):
    """Killed between resume.pt and the files that are made from it."""
    (tmp_path / "resume.pt").write_bytes((whole / "resume.pt").read_bytes())
    training(tmp_path, log_every=7)
    for name in ("model", "average"):
        assert torch.equal(weights(tmp_path, name), weights(whole, name))
    assert (tmp_path / "history.jsonl").read_text() == (whole / "history.jsonl").read_text()


def test_within_an_epoch_the_files_stay_those_of_the_last_whole_one(whole, tmp_path):
    """Killed within an epoch, gone on, killed at the next step: the card still describes the weights beside it."""

    class Stop(Exception):
        pass

    def stop_at(step):
        def measure(model):
            steps.append(0)
            if len(steps) == step:
                raise Stop
            return {"size": np.mean([1.0, 2.0])}

        steps = []
        with pytest.raises(Stop):
            training(tmp_path, snapshots=0, log_every=1, measure=measure)

    stop_at(14)
    before = weights(tmp_path), weights(tmp_path, "average")
    stop_at(2)
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert (state["epoch"], state["done"]) == (1, 4) and state["steps"][0]["size"] == 1.5
    assert torch.equal(before[0], weights(tmp_path)) and torch.equal(before[1], weights(tmp_path, "average"))
    model, card = kl.load_checkpoint(tmp_path / "model.safetensors")
    assert kl.evaluate(model, digits()[1], "cpu")["loss"] == pytest.approx(card["metrics"]["test_loss"], rel=1e-5)


def test_what_json_cannot_say_is_told_at_the_first_step(tmp_path):
    with pytest.raises(TypeError, match="measure must return a dict that JSON can say, got {'x': tensor"):
        training(tmp_path, snapshots=0, log_every=1, measure=lambda model: {"x": torch.tensor(1.0)})


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    (tmp_path / ".model.safetensors.99999.part").write_bytes(b"half")
    training(tmp_path, dataclasses.replace(RECIPE, epochs=1), snapshots=0)
    assert not list(tmp_path.glob(".*"))


def test_without_resume_a_training_starts_anew(whole, tmp_path):
    for name in ("resume.pt", "trajectory.safetensors"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    stale = []
    options = dict(resume=False, on_epoch=lambda history: stale.append((tmp_path / "trajectory.safetensors").exists()))
    history = training(tmp_path, dataclasses.replace(RECIPE, epochs=1), snapshots=2, **options)
    assert len(history.records) == 1 and stale == [False], "another training's path stood beside this one"


def test_dropout_goes_on_with_the_same_random_numbers(tmp_path):
    """Global random numbers, which our own models never draw, are part of the state."""

    def with_dropout():
        model = make()
        model.blocks[0].mlp.act = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Dropout(0.5))
        torch.manual_seed(5)
        return model

    class Stop(Exception):
        pass

    def stop(history):
        if len(history.records) == 2:
            raise Stop

    training(tmp_path / "a", model=with_dropout())
    with pytest.raises(Stop):
        training(tmp_path / "b", model=with_dropout(), on_epoch=stop)
    torch.manual_seed(99)
    training(tmp_path / "b", model=with_dropout())
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


# ---- snapshots ------------------------------------------------------------------------------------------------------


def test_snapshots_are_the_weights_from_first_to_last(whole):
    path = load_trajectory(whole / "trajectory.safetensors")
    assert path.steps == sorted(snapshot_steps(5, STEPS)) and path.card["seed"] == 3
    first, (last, _) = make(), kl.load_checkpoint(whole / "model.safetensors")
    assert set(path.weights) == {name for name, _ in first.named_parameters()}, "a shared operator stands there once"
    for model, at in ((first, 0), (last, -1)):
        shot = dict(path.model(at).named_parameters())
        for name, value in model.named_parameters():
            assert torch.equal(path.weights[name][at], value.half().float()), name
            assert torch.equal(shot[name], value.half().float()), name
    with pytest.raises(ValueError, match="snapshot 5 is not there: this trajectory holds snapshots 0 to 4"):
        path.model(5)
    assert snapshot_steps(20, 1000) >= {0, 1000} and len(snapshot_steps(20, 1000)) == 20


def test_what_is_no_trajectory_is_refused(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match="no trajectory at .*: .*snapshots=20 and out=FOLDER"):
        load_trajectory(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is no trajectory: its card names no steps"):
        load_trajectory(whole / "model.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((whole / "trajectory.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged or is no safetensors file"):
        load_trajectory(tmp_path / "torn.safetensors")


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PK\x03\x04" + b"x" * 500])
def test_a_damaged_state_is_refused_and_the_rest_kept(whole, tmp_path, damage):
    for name in ("resume.pt", "model.safetensors"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    (tmp_path / "resume.pt").write_bytes(damage((tmp_path / "resume.pt").read_bytes()))
    with pytest.raises(ValueError, match=r"resume.pt is damaged .* Remove the file to start again; .*model.safe"):
        training(tmp_path, log_every=7)
    assert torch.equal(weights(tmp_path), weights(whole))


def test_a_state_that_would_run_code_is_refused(tmp_path):
    """resume.pt is read without pickle's powers."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"about": Evil()}, tmp_path / "resume.pt")
    with pytest.raises(ValueError, match="resume.pt is damaged"):
        training(tmp_path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(seed=4), "seed: there 3, now 4"),
        (dict(recipe=dataclasses.replace(RECIPE, epochs=9)), "recipe's epochs: there 8, now 9"),
        (dict(recipe=dataclasses.replace(RECIPE, ema=None)), "recipe's ema: there 0.9, now None"),
        (dict(mode="blockwise"), "model's mode: there 'universal', now 'blockwise'"),
        (dict(limit=150), "training images: there 160, now 150"),
        (dict(snapshots=3), r"snapshots: there \[0, 20, 40, 60, 80\], now \[0, 40, 80\]"),
    ],
)
def test_another_training_is_not_gone_on_with(whole, change, told):
    change = dict(change)
    model = make(change.pop("mode", "universal"))
    data = kl.load_dataset("digits", "train", limit=change.pop("limit", 160)), digits()[1]
    recipe = change.pop("recipe", RECIPE)
    with pytest.raises(ValueError, match=f"belongs to another training .*{told}"):
        training(whole, recipe, model, data, **change)


def test_what_needs_a_folder_says_so(tmp_path):
    for option in (dict(resume=True), dict(snapshots=5, resume=False)):
        with pytest.raises(ValueError, match="snapshots and resume need out=FOLDER"):
            training(None, **{**dict(snapshots=0), **option})
    with pytest.raises(ValueError, match="a trajectory has at least 2 snapshots"):
        training(tmp_path, snapshots=1)
