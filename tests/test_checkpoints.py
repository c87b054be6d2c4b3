"""Checkpoints: what was saved comes back bit for bit, or one sentence says why not; files are whole or absent."""

import json
import pickle

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import karat_lite as kl
from karat_lite import checkpoints
from karat_lite.trajectory import pack_snapshots, save_snapshot


def pico(attention="karat", seed=0, **options):
    torch.manual_seed(seed)
    return kl.create_model("vit_pico", attention, **{**dict(img_size=8, patch_size=2, depth=2, dim=16), **options})


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint, saved."""
    return kl.save_checkpoint(tmp_path / "model.safetensors", pico(), {"data": "digits", "seed": 3})


def same(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(attention="softmax"),
        dict(mode="blockwise"),
        dict(mode="universal", edge_scales=True),
        dict(rank=None, grid=1, init="paper", num_classes=4, in_chans=1),
    ],
)
def test_round_trip_is_bit_equal(options, tmp_path):
    model = pico(**options)
    path = kl.save_checkpoint(tmp_path / "new" / "model.safetensors", model, {"data": "digits", "seed": 3})
    built, card = kl.load_checkpoint(path)
    assert same(built, model) and built.config == model.config == card["config"] and not built.training
    assert card["data"] == "digits" and card["seed"] == 3 and card["versions"]["torch"] == torch.__version__
    given = pico(seed=1, **options)
    assert not same(given, model)
    returned, _ = kl.load_checkpoint(str(path), given)
    assert returned is given and same(given, model)
    images = torch.randn(2, *(model.in_chans, 8, 8))
    assert torch.equal(model.eval()(images), built(images))


def test_the_card_is_inside_the_file_and_beside_it(saved):
    with safe_open(saved, framework="pt") as opened:
        inside = json.loads(opened.metadata()["karat_lite"])
    assert json.loads(saved.with_suffix(".json").read_text()) == inside
    saved.with_suffix(".json").unlink()  # the copy is for people: loading does not need it
    assert kl.load_checkpoint(saved)[1] == inside


def test_a_universal_operator_is_stored_once_and_shared_again(tmp_path):
    for mode, copies in (("universal", 1), ("blockwise", 2)):
        path = kl.save_checkpoint(tmp_path / f"{mode}.safetensors", pico(mode=mode))
        with safe_open(path, framework="pt") as opened:
            assert sum(name.endswith("activation.coef") for name in opened.keys()) == copies  # noqa: SIM118
        first, second = kl.load_checkpoint(path)[0].operators()
        assert (first is second) == (mode == "universal")


# ---- what cannot be loaded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(grid=5), "grid: model 5, checkpoint 3"),
        (dict(attention="softmax"), "attention: model 'softmax', checkpoint 'karat'"),
        (dict(mode="universal"), "mode: model 'universal', checkpoint 'blockwise'"),
        (dict(depth=1), "depth: model 1, checkpoint 2"),
        (dict(edge_scales=True), "edge_scales: model True, checkpoint False"),
    ],
)
def test_another_configuration_is_named(saved, other, said):
    model, untouched = pico(**other), pico(**other)
    with pytest.raises(ValueError, match=f"model.safetensors holds another configuration .*{said}.*without `model`"):
        kl.load_checkpoint(saved, model)
    assert same(model, untouched)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match="model.safetensors is damaged or is no safetensors file .*: train or fetch it"
    ):
        kl.load_checkpoint(saved)


def test_a_pickle_is_refused_and_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    for name, content in (("plain.safetensors", pickle.dumps(Bomb())), ("text.safetensors", b"hello " * 50)):
        (tmp_path / name).write_bytes(content)
    torch.save({"x": Bomb()}, tmp_path / "torch.safetensors")
    for name in ("plain", "text", "torch"):
        with pytest.raises(ValueError, match=f"{name}.safetensors is damaged or is no safetensors file"):
            kl.load_checkpoint(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "executed").exists()


def test_a_file_without_a_card_is_refused(tmp_path):
    path = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(pico().state_dict(), path)
    with pytest.raises(ValueError, match="bare.safetensors has no KArAt-lite card: load bare weights with"):
        kl.load_checkpoint(path)


def test_weights_that_do_not_match_their_card_are_refused(tmp_path):
    path = tmp_path / "odd.safetensors"
    card = json.dumps({"config": pico().config})
    safetensors.torch.save_file(pico(grid=5).state_dict(), path, metadata={"karat_lite": card})
    with pytest.raises(
        ValueError, match="weights in .*odd.safetensors are not those of its card: train or fetch it again"
    ):
        kl.load_checkpoint(path)
    safetensors.torch.save_file(pico().state_dict(), path, metadata={"karat_lite": "no JSON"})
    with pytest.raises(ValueError, match="the card in .*odd.safetensors is damaged"):
        kl.load_checkpoint(path)


def test_paths_and_names_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="no checkpoint at .*nowhere.safetensors: give the path of a .safetensors"
    ):
        kl.load_checkpoint(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        kl.load_checkpoint(tmp_path)  # a folder
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    kl.save_checkpoint(tmp_path / "digits_karat.safetensors", pico(), {"data": "digits"})
    assert kl.available_checkpoints() == ["digits_karat"]
    assert kl.load_checkpoint("digits_karat")[1]["data"] == "digits"
    with pytest.raises(FileNotFoundError, match="unknown checkpoint 'digit_karat': did you mean 'digits_karat'?"):
        kl.load_checkpoint("digit_karat")


def test_only_safetensors_are_written(tmp_path):
    with pytest.raises(ValueError, match="ends in .safetensors, got 'model.pt'"):
        kl.save_checkpoint(tmp_path / "model.pt", pico())
    assert not list(tmp_path.iterdir())


# ---- whole or not at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("former", [True, False])
def test_a_save_that_fails_midway_leaves_what_was_there(tmp_path, monkeypatch, trouble, former):
    path = tmp_path / "model.safetensors"
    if former:
        kl.save_checkpoint(path, pico(), {"seed": 0})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def half(model, filename, metadata=None):
        with open(filename, "wb") as opened:
            opened.write(b"half of it")
        raise trouble

    monkeypatch.setattr(safetensors.torch, "save_model", half)
    with pytest.raises(type(trouble)):
        kl.save_checkpoint(path, pico(seed=1), {"seed": 1})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before  # nor is a .part file left
    assert not former or same(kl.load_checkpoint(path)[0], pico())


def test_a_card_that_json_cannot_say_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        kl.save_checkpoint(tmp_path / "model.safetensors", pico(), {"data": object()})
    assert not list(tmp_path.iterdir())


def test_a_save_leaves_two_files_for_whoever_may_read_here(saved):
    assert sorted(file.name for file in saved.parent.iterdir()) == ["model.json", "model.safetensors"]
    (plain := saved.with_name("plain")).touch()
    assert {file.stat().st_mode for file in saved.parent.iterdir()} == {plain.stat().st_mode}
    plain.unlink()
    saved.chmod(0o640)
    kl.save_checkpoint(saved, kl.load_checkpoint(saved)[0])
    assert saved.stat().st_mode & 0o777 == 0o640, "as it was before"
    saved.chmod(0o440)
    kl.save_checkpoint(saved, kl.load_checkpoint(saved)[0])
    assert saved.stat().st_mode & 0o777 == 0o440, "one that was protected from writing is replaced, as files are"


@pytest.mark.parametrize(
    "text, told",
    [
        ("{}", "names no configuration of a model"),
        ("[]", "names no configuration of a model"),
    ],
)
def test_a_card_of_something_else_is_refused(text, told, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"karat_lite": text})
    with pytest.raises(ValueError, match=told):
        kl.load_checkpoint(tmp_path / "odd.safetensors")


def test_a_trajectory_is_sent_to_its_own_loader(tmp_path):
    model = pico()
    save_snapshot(tmp_path, model, 0)
    pack_snapshots(tmp_path, {0}, {}, model.config)
    with pytest.raises(ValueError, match="holds the weights of many steps: load it with load_trajectory"):
        kl.load_checkpoint(tmp_path / "trajectory.safetensors")


# ---- the committed ones ---------------------------------------------------------------------------------------------


def test_twins_are_committed():
    assert {"digits_karat", "digits_softmax", "shapes_karat", "shapes_softmax"} <= set(kl.available_checkpoints())


@pytest.mark.parametrize("name", [name for name in kl.available_checkpoints() if not name.startswith("cifar10")])
def test_a_committed_checkpoint_has_the_accuracy_on_its_card(name):
    model, card = kl.load_checkpoint(name)
    test_data = kl.load_dataset(card["data"], "test", img_size=card["config"]["img_size"])
    score, metrics = kl.evaluate(model, test_data, "cpu", batch_size=32), card["metrics"]
    assert score["accuracy"] == pytest.approx(metrics["test_accuracy"], abs=1e-6)
    assert score["loss"] == pytest.approx(metrics["test_loss"], rel=1e-4)  # notices a change of the images, too
    assert metrics["epoch"] == card["recipe"]["epochs"], "the training was not finished"
    beside = (checkpoints.CHECKPOINTS / f"{name}.json").read_text()
    assert json.loads(beside) == card and card["seed"] >= 0 and card["command"].startswith("python -m karat_lite.train")


# ---- the command that tests checkpoints anew ------------------------------------------------------------------------


def test_the_check_of_committed_checkpoints(tmp_path, capsys):
    from karat_lite import check

    check.main(["--data", "digits", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "digits_karat " in said and "digits_softmax " in said and "shapes" not in said and "DIFFERENT" not in said
    model, card = kl.load_checkpoint("digits_karat")
    card["metrics"]["test_accuracy"] -= 0.01
    path = str(kl.save_checkpoint(tmp_path / "boasting.safetensors", model, card))
    with pytest.raises(SystemExit, match="1 of 1 checkpoints differ from their cards"):
        check.main(["--data", "digits", "--device", "cpu", path])
    assert "DIFFERENT" in capsys.readouterr().out


def test_check_and_publish_test_as_the_recipe_does(tmp_path, monkeypatch, capsys):
    """Whole pictures, resized and cropped at the centre: another accuracy than on the dataset as it is."""
    from karat_lite import check, publish

    parts = [kl.load_dataset("digits", split, limit=limit) for split, limit in (("train", 640), ("test", None))]
    recipe = kl.Recipe(epochs=2, lr=3e-3, warmup_epochs=1.0, crop_scale=(0.5, 1.0), test_crop=0.7)
    model = pico(depth=1, img_size=16, patch_size=4)
    kl.training.train(model, *parts, recipe, device="cpu", out=tmp_path / "run", progress=False)
    path = tmp_path / "run" / "model.safetensors"
    expected = kl.load_checkpoint(path)[1]["metrics"]["test_accuracy"]
    plain = kl.evaluate(model, kl.load_dataset("digits", "test", img_size=16), "cpu")["accuracy"]
    assert abs(plain - expected) > 0.02, "or the way of testing would not show"
    check.main(["--data", "digits", "--device", "cpu", str(path)])
    assert "DIFFERENT" not in capsys.readouterr().out
    monkeypatch.setattr(publish, "CHECKPOINTS", tmp_path / "kept")
    publish.main([str(tmp_path / "run"), "mine", "--data", "digits", "--device", "cpu"])
    published = kl.load_checkpoint(tmp_path / "kept" / "mine.safetensors")[1]["metrics"]["test_accuracy"]
    assert abs(published - expected) < 0.01


def test_check_says_what_it_cannot_compare(tmp_path, capsys):
    from karat_lite import check

    with pytest.raises(SystemExit, match="1 of 1 checkpoints differ"):
        check.main(["--data", "digits", "--device", "cpu", "shapes_softmax"])
    assert "DIFFERENT (trained on shapes)" in capsys.readouterr().out
    path = str(kl.save_checkpoint(tmp_path / "bare.safetensors", pico(), {}))
    with pytest.raises(ValueError, match="the card of .*bare.safetensors tells no test accuracy"):
        check.main(["--data", "digits", "--device", "cpu", path])
    card = {"recipe": "small", "metrics": {"test_accuracy": 0.5}}
    path = str(kl.save_checkpoint(tmp_path / "named.safetensors", pico(), card))
    with pytest.raises(ValueError, match="recipe is 'small' in place of its settings"):
        check.main(["--data", "digits", "--device", "cpu", path])
    with pytest.raises(SystemExit, match="no card of a committed checkpoint names my-digits: name those to check"):
        check.main(["--data", "my-digits"])


def test_data_of_other_classes_is_refused(tmp_path):
    model = pico(num_classes=4)
    with pytest.raises(ValueError, match="digits has 10 classes and the model 4"):
        kl.evaluate(model, kl.load_dataset("digits", "test", limit=8), "cpu")


# ---- the command that makes a training a committed checkpoint -------------------------------------------------------


def test_a_training_is_published_in_half_precision_with_its_own_accuracy(tmp_path, monkeypatch, capsys):
    from karat_lite import publish

    test_data = kl.load_dataset("digits", "test")
    model, card = kl.load_checkpoint("digits_karat")
    with torch.no_grad():
        model.head.weight.add_(1e-5)  # not a number of half precision
    run, accuracy = tmp_path / "run", card["metrics"]["test_accuracy"]
    kl.save_checkpoint(run / "model.safetensors", model, card)
    save_snapshot(run, model, 0)
    pack_snapshots(run, {0}, card, model.config)
    path = (run / "trajectory.safetensors").read_bytes()
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "kept")
    monkeypatch.setattr(publish, "CHECKPOINTS", tmp_path / "kept")
    monkeypatch.setattr(publish, "TRAJECTORIES", tmp_path / "paths")
    publish.main([str(tmp_path / "run"), "mine", "--data", "digits", "--device", "cpu"])
    assert f"before rounding {accuracy:.2%}" in capsys.readouterr().out
    rounded, card = kl.load_checkpoint("mine")
    assert rounded.head.weight.dtype == torch.float32 and card["precision"] == "float16"
    for name, value in model.named_parameters():
        assert torch.equal(dict(rounded.named_parameters())[name], value.half().float()), name
    score = kl.evaluate(rounded, test_data, "cpu")
    assert card["metrics"]["test_accuracy"] == score["accuracy"] and card["metrics"]["test_loss"] == score["loss"]
    size = (tmp_path / "kept" / "mine.safetensors").stat().st_size
    assert size < 0.55 * (tmp_path / "run" / "model.safetensors").stat().st_size
    assert (tmp_path / "paths" / "mine.safetensors").read_bytes() == path
    with pytest.raises(ValueError, match="has no folder and no ending, got 'a/b'"):
        publish.main([str(run), "a/b", "--data", "digits"])
    (run / "trajectory.safetensors").unlink()
    publish.main([str(run), "mine", "--data", "digits", "--device", "cpu"])
    assert not list((tmp_path / "paths").iterdir()), "the path of another training of this name"


@pytest.mark.parametrize(
    "card, options, told",
    [
        ({}, "--data shapes", "was trained on 'digits', not on shapes: give its own --data"),
        ({"metrics": {}}, "--data digits", "the card of .* tells no test accuracy"),
        ({"metrics": {"test_accuracy": 0.5}}, "--data digits", "on digits, and the card says 50.00%: are these the"),
        ({"seed": 7}, "--data digits", "trajectory.safetensors is of another training than model.safetensors"),
    ],
)
def test_what_is_published_must_be_what_its_card_says(card, options, told, tmp_path, monkeypatch):
    from karat_lite import publish

    model, own = kl.load_checkpoint("digits_karat")
    save_snapshot(tmp_path, model, 0)
    pack_snapshots(tmp_path, {0}, own, model.config)
    kl.save_checkpoint(tmp_path / "model.safetensors", model, {**own, **card})
    monkeypatch.setattr(publish, "CHECKPOINTS", tmp_path / "kept")
    with pytest.raises(ValueError, match=told):
        publish.main([str(tmp_path), "mine", *options.split(), "--device", "cpu"])
    assert not (tmp_path / "kept").exists()
