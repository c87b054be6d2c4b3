"""Sizes of signals inside a model: against hooks and formulas, and through a training."""

import json

import pytest
import torch

import karat_lite as kl
from karat_lite.analysis.signal import signal_sizes


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("attention, options", [("softmax", {}), ("karat", {}), ("karat", {"rank": None})])
def test_sizes_against_what_hooks_see(attention, options):
    torch.manual_seed(0)
    model = kl.create_model("vit_pico", attention, img_size=8, patch_size=2, depth=3, **{"rank": 4, **options}).eval()
    images, seen = torch.rand(5, 3, 8, 8) * 2 - 1, {"into": [], "values": [], "out": []}
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, given: seen["into"].append(given[0]))
        block.attn.qkv.register_forward_hook(lambda module, given, out: seen["values"].append(out[..., 128:]))
        block.attn.proj.register_forward_pre_hook(lambda module, given: seen["out"].append(given[0]))
    model.norm.register_forward_pre_hook(lambda module, given: seen["into"].append(given[0]))
    with torch.no_grad():
        model(images)
    ratio = [rms(out) / rms(values) for out, values in zip(seen["out"], seen["values"], strict=True)]
    found = signal_sizes(model, images)
    with torch.no_grad():
        records = model(images, return_attention=True)[1]
    assert found["scores"] == pytest.approx([rms(record.scores) for record in records], rel=1e-5)
    assert found["attention"] == pytest.approx(ratio, rel=1e-5)
    assert found["stream"] == pytest.approx([rms(x) for x in seen["into"][:4]], rel=1e-5)
    apart = [((x - x.mean(1, keepdim=True)).square().sum() / x.square().sum()).item() for x in seen["into"][:4]]
    assert found["apart"] == pytest.approx(apart, rel=1e-4)


def test_the_three_starts_in_a_model():
    """65 tokens, G = 3: the paper gives N sqrt(G/3) = 65 times the values, variance 1, softmax 1/8."""
    images, typical = kl.load_dataset("shapes", "test", limit=8)[:][0], {}
    for init in ("paper", "variance", "softmax"):
        torch.manual_seed(0)
        model = kl.create_model("vit_pico", "karat", img_size=32, patch_size=4, num_classes=10, depth=8, init=init)
        typical[init] = torch.tensor(signal_sizes(model, images)["attention"]).log().mean().exp().item()
    assert typical["paper"] / typical["variance"] == pytest.approx(65, rel=0.4)
    assert typical["variance"] == pytest.approx(1, rel=0.5)
    assert typical["softmax"] / typical["variance"] == pytest.approx(65**-0.5, rel=0.4)


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.zeros(2, 3, 16, 16), r"images of shape \(B, 3, 8, 8\), got \(2, 3, 16, 16\)"),
        (torch.full((2, 3, 8, 8), float("nan")), "NaN or infinity in 2 of 2 images"),
        (torch.zeros(0, 3, 8, 8), "at least 1 image"),
    ],
)
def test_images_that_do_not_fit_are_named(images, words):
    with pytest.raises(ValueError, match=words):
        signal_sizes(kl.create_model("vit_pico", "karat", img_size=8, patch_size=2, depth=1, rank=4), images)


def test_the_command_line_measures_signals_through_a_training(tmp_path):
    from karat_lite.train import main

    table = tmp_path / "table.json"
    options = "--data digits --limit 128 --epochs 2 --attention karat --depth 2 3 --init variance softmax --device cpu"
    main([*options.split(), "--log-every", "4", "--signal", "--results", str(table)])
    runs = {run["attention"]: run for run in json.loads(table.read_text())["runs"]}
    assert list(runs) == [f"karat {init} depth {d}" for d in (2, 3) for init in ("variance", "softmax")]
    for name, run in runs.items():
        depth = int(name[-1])
        assert [record["step"] for record in run["steps"]] == [1, 4, 8]
        for record in run["steps"]:
            sizes = [len(record[key]) for key in ("scores", "attention", "stream", "apart")]
            assert sizes == [depth, depth, depth + 1, depth + 1] and record["grad_norm"] > 0
        assert run["config"]["depth"] == depth and run["config"]["init"] == name.split()[1]
    first = {name: run["steps"][0]["attention"][0] for name, run in runs.items()}
    assert first["karat variance depth 2"] > 2 * first["karat softmax depth 2"]
    with pytest.raises(ValueError, match="--signal measures at logged steps: add --log-every STEPS"):
        main([*options.split(), "--signal"])


def test_a_model_without_numbers_and_one_without_scores():
    model = kl.create_model("vit_pico", "karat", img_size=8, patch_size=2, depth=2, rank=4)
    images = torch.zeros(2, 3, 8, 8)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
        model.blocks[0].attn.qkv.bias.zero_()
    assert signal_sizes(model, images)["attention"][0] == 0  # of values that are all 0
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite: .*blocks.1"):
        signal_sizes(model, images)
