"""Changed scores: against attention written as loops, the model's own logits, and hand-computed shares of maps."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formats import small_folder
from torch import nn

import karat_lite as kl
from karat_lite.analysis import content
from karat_lite.analysis.content import CHANGES, ChangedScores
from karat_lite.trajectory import Trajectory

KINDS = {
    "softmax": dict(attention="softmax"),
    "karat": dict(attention="karat", rank=4),
    "universal": dict(attention="karat", rank=4, mode="universal"),
    "full rank": dict(attention="karat", rank=None),
    "W first": dict(attention="karat", rank=4, order="phi_w"),
    "two operators": dict(attention="karat", rank=4, order="phi_phi"),
    "edge basis": dict(attention="karat", rank=2, basis="dog"),
    "simplex": dict(attention="karat", rank=4, simplex=True),
    "hybrid heads": dict(attention="hybrid", rank=4, softmax_heads=[0, 2]),
    "hybrid layers": dict(attention="hybrid", rank=4, softmax_layers=[1]),
    "one head, one layer": dict(attention="karat", rank=4, num_heads=1, depth=1),
    "static": dict(attention="static"),
    "pooled": dict(attention="pooled"),
}


def made(kind="karat", **options):
    torch.manual_seed(0)
    return kl.create_model("vit_pico", img_size=8, patch_size=2, **{"depth": 2, **KINDS[kind], **options}).eval()


def some(n=6):
    data = kl.load_dataset("digits", "test", limit=n)
    return data[:]


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_scores_give_the_models_own_logits(kind):
    model, (images, labels) = made(kind), some()
    with torch.no_grad():
        own, (again, records) = model(images), content.changed(model, "as they are")(images, return_attention=True)
        _, truth = model(images, return_attention=True)
    assert (own - again).abs().max() <= 1e-5 * own.abs().max()
    assert all(torch.allclose(a.maps, b.maps, atol=1e-6) for a, b in zip(records, truth, strict=True))
    whole = content.ablate(model, images, labels, batch_size=3)
    assert [line.change for line in whole] == list(CHANGES)
    assert whole[0].accuracy == (own.argmax(1) == labels).double().mean()
    assert whole[0].loss == pytest.approx(F.cross_entropy(own, labels).item(), rel=1e-4)
    if kind in ("static", "pooled"):
        assert len({line.loss for line in whole}) == 1, "a static mixer looks at no score"


def by_hand(change, scores, seed):
    """The changes in plain loops over NumPy arrays (B, h, N, N); the draws are those of the module."""
    b, h, n, _ = scores.shape
    order = torch.rand(b, h, n, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1).numpy()
    new = np.zeros_like(scores)
    for i in range(b):
        for j in range(h):
            for k in range(n):
                for q in range(n):
                    new[i, j, k, q] = {
                        "as they are": lambda i=i, j=j, k=k, q=q: scores[i, j, k, q],
                        "zero": lambda: 0.0,
                        "mean over queries": lambda i=i, j=j, q=q: sum(scores[i, j, :, q]) / n,
                        "mean over images": lambda j=j, k=k, q=q: sum(scores[:, j, k, q]) / b,
                        "another image's": lambda i=i, j=j, k=k, q=q: scores[(i + 1) % b, j, k, q],
                        "keys shuffled": lambda i=i, j=j, k=k, q=q: scores[i, j, k, order[i, j, q]],
                        "queries shuffled": lambda i=i, j=j, k=k, q=q: scores[i, j, order[i, j, k], q],
                    }[change]()
    return new


class Softmax(nn.Module):
    def activate(self, scores):
        return torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_against_loops(change):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 3, 2, 5, 4, dtype=torch.float64)
    scores = np.einsum("bhkd,bhqd->bhkq", q, k) / 2
    truth = by_hand(change, scores, seed=7)
    wrapped = ChangedScores(Softmax(), change, mean=torch.from_numpy(scores.mean(axis=0)), seed=7)
    maps = np.exp(truth) / np.exp(truth).sum(-1, keepdims=True)
    assert np.allclose(wrapped.activate(torch.from_numpy(scores)), maps, atol=1e-12)
    assert np.allclose(wrapped.attend(q, k, v), maps @ v.numpy(), atol=1e-12)
    one = ChangedScores(Softmax(), change, [1], torch.from_numpy(scores.mean(axis=0)), seed=7)
    kept = np.exp(scores[:, 0]) / np.exp(scores[:, 0]).sum(-1, keepdims=True)
    found = one.activate(torch.from_numpy(scores)).numpy()
    assert np.allclose(found[:, 0], kept) and np.allclose(found[:, 1], maps[:, 1])


def test_one_layer_and_one_head_change_there_alone():
    """Layer 1 of 2: layer 0 sees what it saw; in layer 1 all heads but the chosen one keep their maps."""
    model, (images, _) = made("hybrid heads"), some()
    other = content.changed(model, "zero", layers=[1], heads=[2])
    with torch.no_grad():
        (_, before), (_, after) = model(images, return_attention=True), other(images, return_attention=True)
    assert torch.allclose(before[0].maps, after[0].maps, atol=1e-6)
    kept = [head for head in range(4) if torch.allclose(before[1].maps[:, head], after[1].maps[:, head], atol=1e-6)]
    assert kept == [0, 1, 3]
    assert torch.allclose(after[1].maps[:, 2], torch.full((6, 17, 17), 1 / 17)), "head 2 is softmax: an even mean"
    assert not any(isinstance(module, ChangedScores) for module in model.modules()), "the model itself stays"
    twice = content.changed(model, "keys shuffled", layers=[1, 1]).blocks[1].attn.activation
    assert not isinstance(twice.activation, ChangedScores), "named twice, changed once"


def test_places_of_ablations():
    model, (images, labels) = made("universal"), some()
    changes = ["as they are", "zero"]
    layers = content.ablate(model, images, labels, changes, "layers")
    assert [(line.change, line.layer, line.head) for line in layers] == [
        ("as they are", None, None),
        ("zero", 0, None),
        ("zero", 1, None),
    ]
    heads = content.ablate(model, images, labels, changes, "heads")
    assert [(line.layer, line.head) for line in heads[1:]] == [(i, j) for i in range(2) for j in range(4)]
    operators = content.changed(model, "zero").blocks
    assert operators[0].attn.activation.activation is operators[1].attn.activation.activation, "still universal"


def test_the_mean_over_images_is_that_of_the_calibration():
    model, (images, labels) = made(), some(20)
    means = content.mean_scores(model, images[:7], batch_size=3)
    with torch.no_grad():
        _, records = model(images[:7], return_attention=True)
    for mean, record in zip(means, records, strict=True):
        assert torch.allclose(mean, record.scores.mean(dim=0), atol=1e-6)
    change = ["mean over images"]
    (own,), (theirs,) = (content.ablate(model, images, labels, change, calibration=c) for c in (None, images[:7]))
    assert own.loss != theirs.loss
    by_hand = content.changed(model, change[0], means=means)
    with torch.no_grad():
        assert theirs.loss == pytest.approx(F.cross_entropy(by_hand(images), labels).item(), rel=1e-5)


def test_shares_of_maps_in_cases_worked_out_by_hand():
    model, (images, _) = made("static"), some()
    with torch.no_grad():
        model.blocks[0].attn.activation.mix[:] = torch.eye(17)
        model.blocks[1].attn.activation.mix[:] = torch.arange(17.0)
    shares = content.map_shares(model, images, batch_size=4)
    assert shares.shape == (2, 4, 3)
    assert np.allclose(shares[0], [1 / 17, 16 / 17, 0]), "the identity: its mean row has 17 (1/17)^2 of 17 / 17"
    assert np.allclose(shares[1], [1, 0, 0]), "one row for all"
    model = made("softmax")
    with torch.no_grad():
        _, records = model(images, return_attention=True)
    for found, record in zip(content.map_shares(model, images, batch_size=4), records, strict=True):
        maps = record.maps.double().numpy()
        mean, row = maps.mean(axis=0, keepdims=True), maps.mean(axis=(0, 2), keepdims=True)
        parts = [np.broadcast_to(row, maps.shape), mean - row + 0 * maps, maps - mean]
        power = (maps**2).sum(axis=(0, 2, 3))
        assert np.allclose(found, np.stack([(part**2).sum(axis=(0, 2, 3)) / power for part in parts], -1), atol=1e-6)
    model = made("static")
    with torch.no_grad():
        model.blocks[0].attn.activation.mix[1] = 0
    assert (content.map_shares(model, images)[0, 1] == 0).all(), "nothing to share out, and no NaN"


# ---- the static mixer -----------------------------------------------------------------------------------------------


def test_a_pooled_mixer_is_an_operator_whose_scores_are_zero():
    operator = kl.KArAtOperator(2, 5, rank=3)
    q, v = torch.zeros(4, 2, 5, 3), torch.randn(4, 2, 5, 3)
    mixer = kl.StaticMixer(2, 5, shared=True)
    assert mixer.mix.shape == (2, 1, 5) and kl.StaticMixer(2, 5).mix.shape == (2, 5, 5)
    with torch.no_grad():
        maps = operator.activate(torch.zeros(1, 2, 5, 5))
        assert torch.allclose(maps, maps[:, :, :1].expand_as(maps)), "no score, no difference between queries"
        mixer.mix.copy_(maps[0, :, :1])
        assert torch.allclose(mixer.attend(q, q, v), operator.attend(q, q, v), atol=1e-5)
        assert torch.allclose(mixer.activate(q @ q.mT), maps.expand(4, -1, -1, -1))


@pytest.mark.parametrize("kind", ["static", "pooled"])
def test_a_mixer_in_a_model(kind, tmp_path):
    """Its outputs come from position alone; every parameter has a gradient, that of queries and keys is 0; it saves."""
    model, (images, labels) = made(kind, depth=1).double(), some()
    images = images.double()
    attention = model.blocks[0].attn
    x = torch.randn(6, 17, 64, dtype=torch.float64)
    v = attention.qkv(x)[..., 128:].view(6, 17, 4, 16)
    mix = attention.activation.mix.expand(4, 17, 17)
    truth = torch.einsum("hkn,bnhd->bkhd", mix, v).reshape(6, 17, 64)
    assert torch.allclose(attention(x), attention.proj(truth), atol=1e-12)
    F.cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None for p in model.parameters()), "DDP refuses a parameter without one"
    grad = attention.qkv.weight.grad
    assert (grad[:128] == 0).all() and (grad[128:] != 0).any()
    assert (attention.activation.mix.grad[:, 0] != 0).all(), "the class token's row decides"
    model = model.float()
    kl.save_checkpoint(tmp_path / "m.safetensors", model)
    again, _ = kl.load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(again(images.float()), model(images.float()))
    assert again.operators() == [] and again.config["attention"] == kind
    for size, call in ((12, lambda: kl.resize(model, 12)), (8, lambda: attention.activation.attend(x, x, x))):
        with pytest.raises(ValueError, match="bound to its tokens" if size == 12 else "4 heads and 17 tokens"):
            call()


# ---- through training, over seeds -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of three kinds on a few digits, by the command line; snapshots of each."""
    from karat_lite.train import main

    folder = tmp_path_factory.mktemp("runs")
    words = "--data digits --limit 64 --epochs 1 --attention softmax karat static pooled --seeds 0 1 --rank 4 --depth 2"
    main([*words.split(), "--snapshots", "3", "--device", "cpu", "--out", str(folder)])
    return folder


def test_through_training_judges_every_snapshot(runs):
    images, labels = some(40)
    trajectory = kl.load_trajectory(runs / "digits_karat_seed0" / "trajectory.safetensors")
    course = content.through_training(trajectory, images, labels, ["as they are", "zero"], at=[0, 2])
    assert course.steps.tolist() == [0, 2]
    for i, t in enumerate((0, 2)):
        with torch.no_grad():
            right = (trajectory.model(t)(images).argmax(1) == labels).double().mean().item()
        assert course.accuracy["as they are"][i] == pytest.approx(right)
        zero = content.ablate(trajectory.model(t), images, labels, ["zero"])[0]
        assert (course.accuracy["zero"][i], course.loss["zero"][i]) == (zero.accuracy, zero.loss)
    with pytest.raises(TypeError, match="unexpected keyword argument 'where'"):  # its rows would be places, not changes
        content.through_training(trajectory, images, labels, where="layers")


def test_the_table_over_seeds(runs, tmp_path):
    from karat_lite.analysis.content_table import main

    path = tmp_path / "results" / "content.json"
    main(["--runs", str(runs), "--data", "digits", "--limit", "50", "--calibrate", "16", "--results", str(path)])
    results = json.loads(path.read_text())
    assert results["command"].startswith("python -m karat_lite.analysis.content_table --runs")
    assert results["data"] == {"name": "digits", "test": 50, "calibration": 16, "img_size": 8}
    assert list(results["table"]) == ["karat", "pooled", "softmax", "static"]
    images, labels = kl.load_dataset("digits", "test", limit=50)[:]
    calibration = kl.load_dataset("digits", "train")[:16][0]
    for name, lines in results["table"].items():
        assert lines["seeds"] == [0, 1] and list(lines["changes"]) == list(CHANGES)
        models = [kl.load_checkpoint(runs / f"digits_{name}_seed{seed}" / "model.safetensors")[0] for seed in (0, 1)]
        lists = [content.ablate(model, images, labels, calibration=calibration) for model in models]
        for i, change in enumerate(CHANGES):
            values = np.array([judged[i].accuracy for judged in lists])
            found = lines["changes"][change]["accuracy"]
            assert found["mean"] == pytest.approx(values.mean(), abs=1e-5)
            assert found["std"] == pytest.approx(np.sqrt(((values - values.mean()) ** 2).sum()), abs=1e-5), "n - 1 = 1"
        single = content.ablate(models[0], images, labels, ["zero"], "layers")
        assert len(lines["layers"]["zero"]["mean"]) == len(single) == 2
        assert np.allclose(np.sum(lines["map shares"]["mean"], axis=-1), 1, atol=1e-4)
        course = results["training"][name]
        assert course["seed"] == 0 and course["steps"] == [0, 1, 2] and len(course["accuracy"]["zero"]) == 3
        assert course["accuracy"]["as they are"][-1] == pytest.approx(lists[0][0].accuracy, abs=0.03), "half precision"
    with pytest.raises(ValueError, match="no run in .* was trained on shapes: there are digits_karat_seed0"):
        main(["--runs", str(runs), "--results", str(path)])
    with pytest.raises(ValueError, match="--calibrate must be >= 2, got -5"):
        main(["--runs", str(runs), "--data", "digits", "--calibrate", "-5", "--results", str(path)])


# ---- any model, bad input -------------------------------------------------------------------------------------------


def test_a_tiny_model_at_224_pixels():
    torch.manual_seed(0)
    model = kl.create_model("vit_tiny", attention="karat")
    images, labels = torch.rand(2, 3, 224, 224) * 2 - 1, torch.tensor([0, 1])
    found = content.ablate(model, images, labels, ["as they are", "mean over images", "another image's"])
    with torch.no_grad():
        assert found[0].loss == pytest.approx(F.cross_entropy(model.eval()(images), labels).item(), rel=1e-4)
    assert content.map_shares(model, images).shape == (12, 3, 3)


def judge(images=None, labels=None, model=None, **options):
    mine, its = some()
    return content.ablate(model or made(), mine if images is None else images, its if labels is None else labels,
                          **options)  # fmt: skip


def broken():
    model = made()
    with torch.no_grad():
        model.blocks[1].attn.activation.coef[0, 0, 0, 0] = float("nan")
    return model


def one_snapshot():
    model = made()
    weights = {name: p.detach()[None] for name, p in model.named_parameters()}
    return Trajectory(weights, {"config": model.config, "steps": [0]})


BAD = {
    "another size": (lambda: judge(torch.zeros(6, 3, 16, 16)), r"\(B, 3, 8, 8\), got \(6, 3, 16, 16\)"),
    "another range": (lambda: judge(torch.full((6, 3, 8, 8), 255.0)), r"\[-1, 1\].*got 255 .. 255"),
    "not finite images": (lambda: judge(torch.full((6, 3, 8, 8), float("nan"))), "finite"),
    "one image": (lambda: judge(*[x[:1] for x in some()]), "at least 2 images, got 1"),
    "labels": (lambda: judge(labels=torch.zeros(5, dtype=torch.long)), "labels must be 6 whole numbers"),
    "classes": (lambda: judge(labels=torch.full((6,), 10)), "labels lie in 0 .. 9, got 10"),
    "change": (lambda: judge(changes=["zeros"]), "did you mean 'zero'"),
    "where": (lambda: judge(where="layer"), "did you mean 'layers'"),
    "layer": (lambda: content.changed(made(), "zero", layers=[2]), r"layer 2 is not there.*0 .. 1"),
    "head": (lambda: content.changed(made(), "zero", heads=[4]), r"head 4 is not there.*0 .. 3"),
    "no means": (lambda: content.changed(made(), "mean over images"), "give means=mean_scores"),
    "weights": (lambda: judge(model=broken()), "blocks.1.attn.activation.coef are no longer finite"),
    "weights, shares": (lambda: content.map_shares(broken(), some()[0]), "coef are no longer finite"),
    "one snapshot": (lambda: content.through_training(one_snapshot(), *some()), "at least 2 snapshots, got 1"),
    "other means": (lambda: content.changed(made(), "mean over images", means=[torch.zeros(4, 5, 5)] * 2)(some()[0]),
                    r"\(4, 5, 5\) do not fit"),
    "alone": (lambda: content.changed(made(), "another image's")(some(1)[0]), "batch of at least 2 images"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_the_table_of_a_folder_of_pictures(tmp_path, capsys):
    """The runs have the folder's name; its pictures are read from where it lies. One seed has no spread."""
    from karat_lite.analysis.content_table import main as tabulate
    from karat_lite.train import main

    data = small_folder(tmp_path / "deep" / "few")
    main(f"--data {data} --epochs 1 --batch-size 4 --depth 1 --device cpu --out {tmp_path / 'runs'}".split())
    words = f"--runs {tmp_path / 'runs'} --data {data} --calibrate 4 --results {tmp_path / 'table.json'}"
    tabulate(words.split())
    results = json.loads((tmp_path / "table.json").read_text())
    assert results["data"] == {"name": "few", "test": 8, "calibration": 4, "img_size": 32}
    assert list(results["table"]) == ["karat", "softmax"] and results["training"] == {}
    lines = results["table"]["karat"]
    assert (
        lines["changes"]["zero"]["loss"]["std"] is lines["layers"]["zero"]["std"] is lines["map shares"]["std"] is None
    )
    assert re.search(r"karat    zero +\d+\.\d\d%\n", capsys.readouterr().out), "no +- behind it"
