"""Training: it learns, it repeats, it keeps what it has when something goes wrong; and the command line does it all."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pictures import write_folder

import karat_lite as kl
from karat_lite.history import History
from karat_lite.not_finite import first_not_finite
from karat_lite.processes import pick_device

ROOT = Path(__file__).resolve().parent.parent
QUICK = kl.Recipe(epochs=4, batch_size=32, lr=2e-3, warmup_epochs=1.0)
STEPS = 8  # of an epoch: 256 images
COLUMNS = ["epoch", "lr", "train_loss", "grad_norm", "test_loss", "test_accuracy", "test_top5"]
COLUMNS += ["images_per_second", "seconds", "peak_memory"]
FILES = ["history.jsonl", "model.json", "model.safetensors", "resume.pt"]


@pytest.fixture(scope="module")
def digits():
    return kl.load_dataset("digits", "train", limit=32 * STEPS), kl.load_dataset("digits", "test", limit=100)


def pico(attention="karat", seed=0, **options):
    torch.manual_seed(seed)
    options = {**dict(img_size=8, patch_size=2, depth=1, dim=16, num_heads=2, rank=4), **options}
    return kl.create_model("vit_pico", attention, **options)


def train(model, data, recipe=QUICK, **options):
    return kl.training.train(model, *data, recipe, **{**dict(device="cpu", progress=False), **options})


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["softmax", "karat"])
def test_a_training_learns_and_writes_its_history(attention, digits, tmp_path):
    model = pico(attention, dim=32)
    history = train(
        model, digits, dataclasses.replace(QUICK, epochs=10, lr=1e-2), out=tmp_path, card={"note": "a test"}
    )
    assert history.column("epoch") == list(range(1, 11)) and [list(r) for r in history.records] == [COLUMNS] * 10
    loss, accuracy = history.column("train_loss"), history.column("test_accuracy")
    assert loss[-1] < loss[0] - 0.5 and history.column("test_loss")[-1] < history.column("test_loss")[0] - 0.3
    assert accuracy[-1] > 0.3 and min(history.column("seconds")) > 0
    assert not model.training
    assert History.load(tmp_path / "history.jsonl") == history
    reloaded, card = kl.load_checkpoint(tmp_path / "model.safetensors")
    assert card["metrics"] == history.records[-1] and card["note"] == "a test" and card["seed"] == 0
    assert card["data"] == "digits" and card["recipe"]["epochs"] == 10
    score = kl.evaluate(reloaded, digits[1], "cpu")
    assert (score["loss"], score["accuracy"]) == (history.column("test_loss")[-1], accuracy[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_a_damaged_history_is_named(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(ValueError, match="history.jsonl is no history of a training, or damaged"):
        History.load(tmp_path / "history.jsonl")


def test_an_unknown_history_column_is_named(digits):
    history = train(pico(), digits, dataclasses.replace(QUICK, epochs=1))
    with pytest.raises(ValueError, match="unknown history column 'test_acuracy': did you mean 'test_accuracy'"):
        history.column("test_acuracy")


def test_evaluate_against_sums_by_hand(digits):
    model, data = pico().eval(), digits[1]
    with torch.no_grad():
        log_p = model(data[:][0]).log_softmax(dim=1)
    score = kl.evaluate(model, data, "cpu", batch_size=33)  # the last batch is smaller
    assert score["loss"] == pytest.approx(-log_p[torch.arange(100), data.labels].mean().item(), rel=1e-5)
    assert score["accuracy"] == (log_p.argmax(dim=1) == data.labels).double().mean().item()
    five = (log_p.argsort(dim=1, descending=True)[:, :5] == data.labels[:, None]).any(dim=1)
    assert score["top5"] == five.double().mean().item() > score["accuracy"]


def test_the_same_seed_gives_the_same_weights_bit_for_bit(digits):
    def weights(initial, seed):
        model = pico(seed=initial)
        torch.rand(7)  # a training draws nothing from the global generator
        train(model, digits, dataclasses.replace(QUICK, epochs=2), seed=seed)
        return torch.cat([value.flatten() for value in model.state_dict().values()])

    first = weights(0, 0)
    assert torch.equal(first, weights(0, 0))
    assert not torch.equal(first, weights(0, 1)), "the order of batches does not depend on the seed"
    assert not torch.equal(first, weights(1, 0)), "initial weights do not depend on torch's seed"


# ---- the schedule and the device -----------------------------------------------------------------------------------


def test_a_training_follows_the_schedule(digits):
    """The history names the rate at the end of each epoch: the peak after warm-up, the half, the end of the cosine."""
    history = train(pico(), digits, dataclasses.replace(QUICK, epochs=3, lr=1e-3, min_lr=1e-4))
    assert history.column("lr") == pytest.approx([1e-3, 5.5e-4, 1e-4], rel=1e-9)


def test_auto_takes_a_device_that_is_there():
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    assert torch.zeros(1, device=pick_device("auto")).item() == 0


# ---- when something goes wrong --------------------------------------------------------------------------------------


def in_epoch(model, epoch, do):
    """Let `do(logits)` replace the model's logits in the middle of a training epoch and ever after."""
    calls = 0

    def hook(module, inputs, logits):
        nonlocal calls
        calls += module.training
        return do(logits) if module.training and calls > (epoch - 1) * STEPS + 2 else None

    model.register_forward_hook(hook)


def assert_whole(out, epochs, data):
    """`out` holds the state after `epochs` epochs, and nothing half-written."""
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert History.load(out / "history.jsonl").column("epoch") == list(range(1, epochs + 1))
    model, card = kl.load_checkpoint(out / "model.safetensors")
    assert card["metrics"]["epoch"] == epochs
    assert kl.evaluate(model, data, "cpu")["accuracy"] == card["metrics"]["test_accuracy"]


def test_an_interruption_leaves_the_last_epoch(digits, tmp_path):
    def interrupt(logits):
        raise KeyboardInterrupt

    model = pico()
    in_epoch(model, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, digits, out=tmp_path)
    assert_whole(tmp_path, 2, digits[1])


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_epoch(factor, digits, tmp_path):
    model = pico()
    in_epoch(model, 3, lambda logits: logits * factor)
    told = r"training loss is no longer finite at step 19, in epoch 3; .* holds epoch 2. Lower .* rate \(0.002\)"
    with pytest.raises(FloatingPointError, match=told):
        train(model, digits, out=tmp_path)
    assert_whole(tmp_path, 2, digits[1])


def test_weights_that_a_gradient_has_spoilt_are_never_saved(digits, tmp_path):
    """The loss of that step is still finite; resume.pt keeps the step before it, from which a mended run goes on."""
    model, steps = pico(), []

    def spoil(grad):
        steps.append(None)
        return grad / 0 if len(steps) == 5 else grad

    hook = model.head.weight.register_hook(spoil)
    with pytest.raises(FloatingPointError, match="at step 5, .* no longer finite"):
        train(model, digits, out=tmp_path, save_minutes=0)
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["done"] == 4 and all(value.isfinite().all() for value in state["model"].values())
    hook.remove()
    train(pico(), digits, out=tmp_path, resume=True)


def test_weights_broken_by_the_last_step_of_an_epoch_are_not_saved(digits, tmp_path):
    """The training loss was still finite then: only the test tells."""
    one_step = kl.Recipe(epochs=2, batch_size=256, lr=1e30, warmup_epochs=0.0)
    told = "test loss .* at step 1, in epoch 1; the first output .* is that of blocks.0"
    with pytest.raises(FloatingPointError, match=told):
        train(pico(), digits, one_step, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_first_culprit_is_named():
    model, images = pico(depth=2), torch.zeros(2, 3, 8, 8)
    assert first_not_finite(model, images) == "all weights and the outputs of all modules are finite"
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.fill_(3e38)
        model.blocks[1].mlp.fc1.bias.fill_(3e38)
    assert first_not_finite(model, images) == "the first output that is not finite is that of blocks.1.mlp.fc1"
    assert first_not_finite(model, images / 0) == "the images are not finite"
    with torch.no_grad():
        model.blocks[0].attn.activation.coef[0, 0, 0, 0] = math.nan
    assert first_not_finite(model, images) == "the weights blocks.0.attn.activation.coef are no longer finite"
    assert not model.blocks[1].mlp.fc1._forward_hooks, "nothing is left on the model"


def test_a_folder_that_cannot_be_made_is_told_before_training(digits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="cannot make the folder .*file.runs.*: give another one"):
        train(pico(), digits, out=tmp_path / "file" / "runs")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # who runs the tests may be allowed everything
    with pytest.raises(OSError, match="is read-only: give another one, or make it writable"):
        train(pico(), digits, out=tmp_path / "runs")


def test_a_full_disk_is_told_and_the_last_epoch_kept(tmp_path):
    """A limit on the size of files stands for the full disk: in the third epoch resume.pt may grow no more."""
    script = """
import resource, signal, sys
import torch
import karat_lite as kl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
data = kl.load_dataset("digits", "train", limit=64), kl.load_dataset("digits", "test", limit=50)
torch.manual_seed(0)
model = kl.create_model("vit_pico", "karat", img_size=8, patch_size=2, depth=1, dim=16, num_heads=2, rank=4)
def fill(history):
    if len(history.records) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
kl.training.train(model, *data, kl.Recipe(epochs=4), device="cpu", out=sys.argv[1], progress=False, on_epoch=fill)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("OSError: could not write") and "resume.pt" in said
    assert "what it held before is unharmed. Free some space, or choose a folder that can be written." in said
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["epoch"] == 2
    assert_whole(tmp_path, 2, kl.load_dataset("digits", "test", limit=50))


def test_ctrl_c_leaves_a_whole_checkpoint(tmp_path):
    """A real signal to a real process."""
    command = "--data digits --attention karat --epochs 500 --limit 512 --patch-size 2 --device cpu --out".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "karat_lite.train", *command, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal, wherever the tests run
    )
    out = tmp_path / "digits_karat_seed0"
    try:
        deadline = time.monotonic() + 90
        while not ((out / "history.jsonl").is_file() and len(History.load(out / "history.jsonl").records) >= 2):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0 and "Interrupt" in said
    assert sorted(path.name for path in out.iterdir()) == FILES
    model, card = kl.load_checkpoint(out / "model.safetensors")
    # The two files are written one after the other: a signal may fall between them.
    assert card["metrics"]["epoch"] - History.load(out / "history.jsonl").column("epoch")[-1] in (0, 1)
    test_data = kl.load_dataset("digits", "test")
    assert kl.evaluate(model, test_data, "cpu")["accuracy"] == card["metrics"]["test_accuracy"]


# ---- images from files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["softmax", "karat"])
def test_twins_learn_from_a_folder_of_images(attention, tmp_path):
    root = write_folder(tmp_path / "colours", count=20)
    data = kl.load_dataset(root, "train"), kl.load_dataset(root, "test")
    model = pico(attention, num_classes=3)
    history = train(model, data, kl.Recipe(epochs=6, batch_size=15, lr=1e-2, warmup_epochs=1.0), out=tmp_path / "out")
    assert history.column("test_accuracy")[-1] >= 0.9
    assert_whole(tmp_path / "out", 6, data[1])
    assert kl.load_checkpoint(tmp_path / "out" / "model.safetensors")[1]["data"] == "colours"


def test_files_of_another_training_do_not_stay_beside_a_new_one(digits, tmp_path):
    train(pico(), digits, dataclasses.replace(QUICK, ema=0.9), out=tmp_path, snapshots=2)
    assert {"average.safetensors", "average.json", "trajectory.safetensors"} < {p.name for p in tmp_path.iterdir()}
    train(pico(), digits, dataclasses.replace(QUICK, epochs=1), out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize(
    "changes, error, told",
    [
        (dict(recipe="small"), TypeError, r"recipe must be a Recipe, as make_recipe\('small'\) gives, got 'small'"),
        (dict(data="digits"), TypeError, "train and test data must be what load_dataset gives, got 'digits'"),
        (dict(seed=-1), ValueError, "seed must be >= 0, got -1"),
        (dict(log_every=0.5), TypeError, "log_every must be a whole number >= 0, got 0.5"),
        (dict(save_minutes=-1), ValueError, r"save_minutes must be >= 0 \(0 saves after every step\), got -1"),
        (dict(card={"path": Path("a")}), TypeError, "not JSON serializable"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(changes, error, told, digits, tmp_path):
    options = {**dict(recipe=QUICK, data=digits), **changes}
    data = options.pop("data")
    with pytest.raises(error, match=told):
        train(pico(), (data, data) if isinstance(data, str) else data, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_card_that_json_cannot_hold_is_told_before_the_first_step(digits, tmp_path):
    with pytest.raises(TypeError, match="the card must hold what JSON can say, got .*PosixPath"):
        train(pico(), digits, out=tmp_path, card={"where": tmp_path})
    assert not list(tmp_path.iterdir())


def test_names_of_the_historys_own_are_not_measured_again(digits, tmp_path):
    options = dict(log_every=1, device="cpu", progress=False)
    with pytest.raises(ValueError, match="measure returns epoch, loss, names of the history's own: take others"):
        train(pico(), digits, QUICK, measure=lambda model: {"epoch": 1, "loss": -5.0, "mine": 2}, **options)
    with pytest.raises(TypeError, match="measure must return a dict that JSON can say, got 5"):
        train(pico(), digits, QUICK, measure=lambda model: 5, **options)
    (tmp_path / "history.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2.0}\n{"epoch": 1, "test_loss": 1.0}\n')
    history = kl.History.load(tmp_path / "history.jsonl")  # an older file
    assert len(history.records) == len(history.steps) == 1
    (tmp_path / "history.jsonl").write_text("5\n")
    with pytest.raises(ValueError, match="is no history of a training, or damaged .a line holds 5"):
        kl.History.load(tmp_path / "history.jsonl")


def test_a_trajectory_that_lacks_a_snapshot_is_told(digits, tmp_path):
    stop = RuntimeError("stop")

    def interrupt(history):
        raise stop

    options = dict(device="cpu", progress=False, out=tmp_path, snapshots=3)
    with pytest.raises(RuntimeError, match="stop"):
        train(pico(), digits, QUICK, on_epoch=interrupt, **options)
    first, *_ = sorted((tmp_path / "snapshots").iterdir())
    first.unlink()
    (tmp_path / "snapshots" / "._00000000.safetensors").touch()  # another program's note
    with pytest.warns(UserWarning, match="has no trajectory: its snapshots lack step 0. What is there stays"):
        train(pico(), digits, QUICK, resume=True, **options)
    assert len(list((tmp_path / "snapshots").glob("0*.safetensors"))) == 2
    assert not (tmp_path / "trajectory.safetensors").exists()
