"""Scores of maps by hand and against loops; masks from shapes and folders; the results command."""

import json
import math

import numpy as np
import pytest
import torch
from formats import small_folder
from PIL import Image

import karat_lite as kl
from karat_lite.analysis import map_quality as mq
from karat_lite.analysis.map_quality import (
    BASELINES,
    coverage,
    deletion_insertion,
    main,
    make_maps,
    on_object,
    run_rows,
    summarise,
)
from karat_lite.analysis.maps import KINDS, class_token_maps
from karat_lite.analysis.masked import Masked, load_masked
from karat_lite.data import normalise

# A 2 x 2 grid of patches of 2 x 2 pixels. The object covers patch 0 whole and patch 1 by half: 6 of 16 pixels.
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()


def scored(*values):
    """The three scores of one map on `MASK`."""
    return [x.item() for x in on_object(torch.tensor([values]), MASK[None], (2, 2))]


def test_scores_by_hand():
    assert coverage(MASK[None], (2, 2)).tolist() == [[1, 0.5, 0, 0]]
    # Strongest: patch 0. Mass: (4 + 2/2) / 10. IoU of {0}: 1 / 1.5; {0, 1}: 1.5 / 2; {0, 1, 2}: 1.5 / 3; all: 1.5 / 4.
    assert scored(4.0, 2.0, 3.0, 1.0) == pytest.approx([1, 5 / 10, max(1 / 1.5, 1 / 2.5, 1.5 / 3, 1.5 / 4)])
    assert scored(4.0, 3.0, 2.0, 1.0) == pytest.approx([1, 5.5 / 10, 1.5 / 2])
    assert scored(1.0, 4.0, 0.0, 0.0) == pytest.approx([0.5, 3 / 5, 1.5 / 2])
    assert scored(0.0, 0.0, 0.0, 1.0) == pytest.approx([0, 0, 1.5 / 4])


def test_ties_and_signs_by_hand():
    assert scored(1.0, 1.0, 1.0, 1.0) == pytest.approx([1.5 / 4] * 3), "an even map scores the object's share"
    assert scored(2.0, 1.0, 2.0, 1.0) == pytest.approx([0.5, 2.5 / 6, max(1 / 2.5, 1.5 / 4)])
    assert scored(1.0, 2.0, -5.0, -5.0) == pytest.approx([0.5, 2 / 3, 1.5 / 2]), "negative mass counts as none"
    assert scored(-1.0, -2.0, -3.0, -3.0) == pytest.approx([1, 1.5 / 4, 1.5 / 2]), "no positive mass: as an even map"


def test_overlap_against_pixels():
    """The best IoU over all thresholds, on pixels, one by one."""
    torch.manual_seed(0)
    maps, masks = torch.randn(20, 16).mul(2).round(), torch.rand(20, 8, 8) < 0.3  # rounded: with ties
    found = on_object(maps, masks, (4, 4))
    for i in range(20):
        big = maps[i].view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
        best = max(((big >= t) & masks[i]).sum() / ((big >= t) | masks[i]).sum() for t in maps[i].unique())
        assert found.iou[i].item() == pytest.approx(best.item())
        assert found.pointing[i].item() == pytest.approx(masks[i][big == big.max()].float().mean().item())
        mass = (big.clamp_min(0) * masks[i]).sum() / big.clamp_min(0).sum()
        assert found.mass[i].item() == pytest.approx(mass.item())


class Watching(torch.nn.Module):
    """In place of a model: class 1 has the logit log(sum of the weights of those patches that are as they were)."""

    img_size, patch_size = 4, 2

    def __init__(self, whole, weights):
        super().__init__()
        self.pos_embed, self.whole, self.weights, self.asked = torch.zeros(1), whole, weights, []

    def forward(self, x):
        there = (x == self.whole[: len(x)]).view(len(x), 3, 2, 2, 2, 2).all(dim=5).all(dim=3).all(dim=1)
        self.asked.append(there.flatten(1))
        odds = (there.flatten(1) * self.weights).sum(dim=1) + 1e-9
        return torch.stack([torch.zeros_like(odds), odds.log()], dim=1)


def test_deletion_and_insertion_by_hand():
    """Odds 8, 4, 2, 1 of the four patches; probability odds / (1 + odds)."""
    x = torch.rand(1, 3, 4, 4) * 2 - 1
    model = Watching(x, torch.tensor([8.0, 4.0, 2.0, 1.0]))
    curves = deletion_insertion(model, x, torch.tensor([[3.0, 1.0, 2.0, 0.0]]), steps=4)
    p = lambda odds: odds / (1 + odds)  # noqa: E731
    assert curves.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    deletion, insertion = [p(15), p(7), p(5), p(1), 0], [0, p(8), p(10), p(14), p(15)]
    assert curves.deletion[0].tolist() == pytest.approx(deletion, abs=1e-6)
    assert curves.insertion[0].tolist() == pytest.approx(insertion, abs=1e-6)
    areas = [sum((a + b) / 8 for a, b in zip(c, c[1:], strict=False)) for c in (deletion, insertion)]
    assert [area.item() for area in curves.areas()] == pytest.approx(areas, abs=1e-6)


def test_patches_go_in_the_order_of_the_map_in_any_number_of_steps():
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    model = Watching(x, torch.tensor([8.0, 4.0, 2.0, 1.0]))
    deletion_insertion(model, x, torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 9.0, 5.0]]), steps=2)
    whole, gone, half, shown = model.asked
    assert whole.all() and not gone.any()
    assert half.tolist() == [[True, True, False, False], [False, True, False, True]], "ties go in reading order"
    assert torch.equal(shown, ~half)


def test_a_patch_is_filled_with_the_mean_colour_or_with_what_is_left_of_it_when_blurred():
    x = torch.zeros(1, 3, 16, 16)
    x[:, 0, :, 8:] = 1
    mean, blurred = mq._filled(x, "mean"), mq._filled(x, "blur")
    assert torch.equal(mean[0, :, 3, 5], torch.tensor([0.5, 0, 0]))
    assert (blurred[0, 0, 8].diff() >= 0).all() and 0 < blurred[0, 0, 8, 6] < 0.5 < blurred[0, 0, 8, 9] < 1
    assert blurred[0, 1].abs().max() == 0
    ramp = torch.arange(16.0) - 7.5  # far from the edges, a Gaussian of sigma 2 on a step
    normal = torch.distributions.Normal(0.0, 2.0).cdf(ramp)
    assert (blurred[0, 0, 8, 5:11] - normal[5:11]).abs().max() < 0.02


def test_curves_of_a_real_model_start_and_end_where_they_must(monkeypatch):
    torch.manual_seed(0)
    model = kl.create_model("vit_pico", img_size=8, patch_size=2, depth=2).eval()
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    maps = torch.rand(3, 16)
    curves = deletion_insertion(model, x, maps, steps=3, fill="blur")
    with torch.no_grad():
        whole, gone = model(x).softmax(-1), model(mq._filled(x, "blur")).softmax(-1)
    target = whole.argmax(dim=1, keepdim=True)
    assert torch.allclose(curves.deletion[:, 0], whole.gather(1, target)[:, 0].double())
    assert torch.allclose(curves.insertion[:, 0], gone.gather(1, target)[:, 0].double())
    assert torch.equal(curves.deletion[:, -1], curves.insertion[:, 0])
    assert torch.equal(curves.insertion[:, -1], curves.deletion[:, 0])
    back = deletion_insertion(model, x, -maps, steps=4, fill="blur")
    assert torch.allclose(back.deletion, deletion_insertion(model, x, maps, 4, "blur").insertion.flip(1), atol=1e-6)
    monkeypatch.setattr(mq, "BATCH", 2)  # the third image's patches go in its own order
    assert torch.allclose(deletion_insertion(model, x, maps, 3, "blur").deletion, curves.deletion, atol=1e-6)


def test_baselines():
    data = load_masked("shapes", 16, 40)
    model = kl.create_model("vit_pico", img_size=16, patch_size=2, depth=2).eval()
    seen = class_token_maps(model, normalise(data.images))
    maps = {name: make_maps(seen, data, name) for name in BASELINES}
    assert all(values.shape == (40, 64) for values in maps.values())
    random = [make_maps(seen, data, "random", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    centre = maps["centre"][0].view(8, 8)
    assert torch.allclose(centre, centre.flip(0)) and torch.allclose(centre, centre.T)
    assert centre[4, 7].item() == pytest.approx(math.exp(-((3.5 / 8) ** 2 + (0.5 / 8) ** 2) / (2 * 0.25**2)))
    luma = torch.from_numpy(np.asarray(data_grey(data.images[3]), dtype=np.float32))
    assert torch.allclose(maps["brightness"][3], luma.view(8, 2, 8, 2).mean(dim=(1, 3)).flatten(), atol=1)
    assert torch.allclose(maps["average"][5], seen.maps[:, -1].mean(dim=(0, 1)))
    ceiling = on_object(maps["mask"], data.masks, (8, 8))
    best = [on_object(values, data.masks, (8, 8)) for values in maps.values()]
    assert all((ceiling.iou >= b.iou - 1e-9).all() and (ceiling.pointing >= b.pointing - 1e-9).all() for b in best)
    peak = torch.nn.functional.one_hot(maps["mask"].argmax(dim=1), 64).float()
    assert on_object(peak, data.masks, (8, 8)).mass.mean() > ceiling.mass.mean() + 0.1, "an outline is no ceiling there"
    y = (torch.arange(8) + 0.5) / 8 - 0.5
    assert (centre.sum(dim=1) @ y**2 / centre.sum()).sqrt().item() == pytest.approx(0.22, abs=0.005), "of the side"
    many = torch.stack(
        [on_object(make_maps(seen, data, "random", seed=s), data.masks, (8, 8)).pointing for s in range(50)]
    )
    assert many.mean().item() == pytest.approx(data.masks.float().mean().item(), abs=0.02), (
        "chance is the object's share"
    )


def data_grey(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")


def test_all_scores_of_one_kind_are_the_means_of_its_parts():
    data = load_masked("shapes", 16, 6)
    torch.manual_seed(0)
    model = kl.create_model("vit_pico", img_size=16, patch_size=4, depth=2).eval()
    found = mq.map_quality(model, data, "regions", layer=0, signs="absolute", steps=3, fill="blur")
    maps = class_token_maps(model, normalise(data.images)).effects[:, 0].abs()
    parts = [*on_object(maps, data.masks, (4, 4))]
    parts += deletion_insertion(model, normalise(data.images), maps, 3, "blur").areas()
    assert list(found.values()) == pytest.approx([part.mean().item() for part in parts])
    assert list(found) == ["pointing", "mass", "iou", "deletion", "insertion"]


# ---- images with masks ----------------------------------------------------------------------------------------------


def folder(path, count=3, size=(20, 16)):
    """PATH/images and PATH/masks with `count` pictures; the object is a block that moves."""
    for part in ("images", "masks"):
        (path / part / "more").mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        mask = np.zeros((size[1], size[0]), dtype=np.uint8)
        mask[:] = 100  # darker than half
        mask[4:10, 4 + i : 12 + i] = 160
        name = f"more/{i}" if i == 0 else f"{i}"
        Image.fromarray(pixels).save(path / "images" / f"{name}.jpg")
        Image.fromarray(mask).save(path / "masks" / f"{name}.png")
    return path


def test_a_folder_with_masks(tmp_path):
    found = load_masked(folder(tmp_path / "mine"), 16)
    assert found.name == "mine" and found.names == ["1", "2", "more/0"] and found.labels is None
    assert found.images.shape == (3, 3, 16, 16) and found.images.dtype == torch.uint8
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:10, 4 + 1 - 2 : 12 + 1 - 2] = True  # two columns are cropped on either side
    assert torch.equal(found.masks[0], expected)
    assert len(load_masked(tmp_path / "mine", 16, limit=2).images) == 2
    shapes = load_masked("shapes", 16, 5)
    images, labels, masks = kl.data.draw_shapes(5, 16, 1)
    assert torch.equal(shapes.images, images) and torch.equal(shapes.masks, masks)
    assert torch.equal(shapes.labels, labels)


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*images: expected PATH/images/ and PATH/masks/"):
        load_masked(tmp_path / "nowhere", 16)
    path = folder(tmp_path / "mine")
    (path / "masks" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 pictures .* have no mask, first 2\.jpg: expected .*2\.png"):
        load_masked(path, 16)
    for bad, words in (
        (np.zeros((16, 20)), "no object"),
        (np.full((16, 20), 255), "nothing but object"),
        (np.full((16, 21), 255), r"\(20, 16\) pixels, its mask .* \(21, 16\)"),
    ):
        Image.fromarray(bad.astype(np.uint8)).save(path / "masks" / "2.png")
        with pytest.raises(ValueError, match=words):
            load_masked(path, 16)
    for file in (path / "images").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(ValueError, match="no pictures in .*images"):
        load_masked(path, 16)


# ---- the results command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two seeds of tiny twins, trained by the command line, then scored by ours: (folder, results)."""
    from karat_lite.train import main as train

    home = tmp_path_factory.mktemp("runs")
    words = "--data shapes --img-size 16 --patch-size 4 --depth 2 --limit 64 --epochs 1 --warmup-epochs 0 --seeds 0 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karat_lite.data.SHAPES_SIZE", {"train": 64, "test": 32})
        train([*words.split(), "--device", "cpu", "--out", str(home / "runs")])
    out = home / "results" / "quality.json"
    main(f"--runs {home / 'runs'} --limit 8 --steps 2 --fill mean blur --results {out}".split())
    return home, json.loads(out.read_text())


def test_the_command_scores_every_run(table):
    home, results = table
    assert results["command"].startswith("python -m karat_lite.analysis.map_quality --runs") and results["machine"]
    assert results["data"]["images"] == 8 and results["data"]["img_size"] == 16 and results["steps"] == 2
    assert [(run["attention"], run["seed"]) for run in results["runs"]] == [
        ("softmax", 0), ("softmax", 1), ("karat", 0), ("karat", 1)
    ]  # fmt: skip
    data = load_masked("shapes", 16, 8)
    assert results["data"]["object_share"] == pytest.approx(data.masks.float().mean().item())
    model, _ = kl.load_checkpoint(home / "runs" / "shapes_karat_seed1" / "model.safetensors")
    rows = results["runs"][3]["rows"]
    assert len(rows) == len(KINDS) * 2 * 2 + len(BASELINES)
    for kind, layer, signs in (("dominant", 1, "absolute"), ("added", 0, "signed"), ("random", 1, "signed")):
        (row,) = [r for r in rows if (r["map"], r["layer"], r["signs"]) == (kind, layer, signs)]
        maps = make_maps(class_token_maps(model, normalise(data.images)), data, kind, layer, signs, seed=1)
        for name, values in on_object(maps, data.masks, (4, 4))._asdict().items():
            assert row[name] == pytest.approx(values.mean().item(), rel=1e-4)
        areas = deletion_insertion(model, normalise(data.images), maps, 2, "blur").areas()
        if layer == 0:
            assert row["deletion_blur"] is None
        else:
            assert row["deletion_blur"] == pytest.approx(areas[0].mean().item(), rel=1e-4)


def test_the_summary_is_mean_and_spread_over_seeds(table):
    _, results = table
    which = dict(attention="karat", map="regions", layer=1, signs="absolute")
    (line,) = [row for row in results["summary"] if which.items() <= row.items()]
    values = []
    for run in results["runs"][2:]:
        values += [r["insertion_mean"] for r in run["rows"] if {**which, **r, "attention": "karat"} == {**r, **which}]
    assert len(values) == line["seeds"] == 2
    assert line["insertion_mean"] == pytest.approx({"mean": np.mean(values), "std": np.std(values, ddof=1)})
    first = [row for row in results["summary"] if row["layer"] == 0]
    assert first and not any("deletion_mean" in row for row in first)
    assert all(row["iou"]["std"] is None for row in summarise(results["runs"][:1])), "one seed has no spread"
    with pytest.raises(ValueError, match="softmax with seed 0 comes twice"):
        summarise(results["runs"][:1] * 2)


def test_where_nothing_is_negative_signs_change_nothing(table):
    _, results = table
    rows = {(row["map"], row["layer"], row["signs"]): row for row in results["runs"][0]["rows"]}
    for kind in ("attention", "dominant", "added", "rollout"):
        signed, absolute = ({**rows[kind, 1, signs], "signs": ""} for signs in ("signed", "absolute"))
        assert signed == absolute, kind
    assert rows["scores", 1, "signed"]["mass"] != rows["scores", 1, "absolute"]["mass"]


SEEN = class_token_maps(kl.create_model("vit_pico", img_size=8, patch_size=2, depth=1), torch.zeros(2, 3, 8, 8))
TINY = kl.create_model("vit_pico", img_size=8, patch_size=2, depth=1)
NO_DATA = Masked("none", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8).bool(), None, ["a", "b"])
BAD = {
    "grid": (lambda: coverage(MASK[None], (3, 3)), r"\(1, 4, 4\).*3 x 3"),
    "patches": (
        lambda: on_object(torch.rand(1, 9), MASK[None], (2, 2)),
        r"4 patches for each of 1 images, got \(1, 9\)",
    ),
    "NaN": (lambda: on_object(torch.full((1, 4), math.nan), MASK[None], (2, 2)), "must be finite"),
    "no object": (lambda: on_object(torch.rand(1, 4), ~MASK[None] & MASK[None], (2, 2)), "no object"),
    "count": (lambda: deletion_insertion(TINY, torch.zeros(2, 3, 8, 8), torch.rand(1, 16)), "each of 2 images"),
    "fill": (
        lambda: deletion_insertion(TINY, torch.zeros(1, 3, 8, 8), torch.rand(1, 16), fill="black"),
        "unknown fill",
    ),
    "steps": (lambda: deletion_insertion(TINY, torch.zeros(1, 3, 8, 8), torch.rand(1, 16), steps=0), "steps must be"),
    "size": (lambda: deletion_insertion(TINY, torch.zeros(1, 3, 9, 9), torch.rand(1, 16)), r"\(B, 3, 8, 8\)"),
    "kind": (lambda: make_maps(SEEN, NO_DATA, "center"), "did you mean 'centre'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_one_layer_and_one_head_goes_through_the_table():
    model = kl.create_model("vit_pico", img_size=16, patch_size=4, depth=1, num_heads=1).eval()
    rows = run_rows(model, load_masked("shapes", 16, 3), steps=1, fills=["mean"])
    assert all(0 <= row[name] <= 1 for row in rows for name in row if name not in ("map", "layer", "signs"))


def test_pictures_without_masks_have_deletion_and_insertion_alone(tmp_path):
    data = load_masked(small_folder(tmp_path / "few"), 32, limit=6)
    assert data.masks is None and (data.name, data.images.shape, len(data.names)) == ("few", (6, 3, 32, 32), 6)
    torch.manual_seed(0)
    model = kl.create_model("vit_pico", img_size=32, patch_size=8, num_classes=2, depth=2).eval()
    scores = mq.map_quality(model, data, "attention", steps=2)
    assert set(scores) == {"deletion", "insertion"}
    rows = run_rows(model, data, 2, ["mean"])
    assert {row["layer"] for row in rows} == {1} and not any(row["map"] == "mask" for row in rows)
    (row,) = (row for row in rows if (row["map"], row["signs"]) == ("attention", "signed"))
    assert {name: row[f"{name}_mean"] for name in scores} == pytest.approx(scores)
    assert set(row) == {"map", "layer", "signs", "deletion_mean", "insertion_mean"}
    with pytest.raises(ValueError, match="few have no masks: take another baseline"):
        mq.map_quality(model, data, "mask")
