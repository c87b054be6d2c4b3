"""Figures of maps and of their quality hold the numbers that they are given, and are whole."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from figures import pixels, texts
from matplotlib.figure import Figure

from karat_lite import maps_plots

CURVES = {
    "softmax": SimpleNamespace(shares=[0, 0.5, 1], deletion=[[1, 0.5, 0], [1, 0.1, 0]], insertion=[0, 0.8, 1]),
    "KArAt": SimpleNamespace(shares=[0, 0.5, 1], deletion=[0.8, 0.4, 0.2], insertion=[0.2, 0.2, 0.8]),
}
IMAGE, OBJECT = torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
OBJECT[2:5, 3:6] = True
FACTS = {"answer": "star (93 %)", "is a": "star", "mass inside the object": "0.41"}


def figures() -> dict[str, Figure]:
    maps = {name: {"scores": torch.randn(16), "size\nadded": torch.rand(16)} for name in ("softmax", "KArAt")}
    return {
        "kinds": maps_plots.kinds_of_map(maps_plots.outlined(IMAGE, OBJECT), maps, (4, 4)),
        "card": maps_plots.map_card(IMAGE, torch.randn(16), (4, 4), "block 3, dominant head (2)", "weight", FACTS),
        "curves": maps_plots.deletion_curves(CURVES),
        "scores": maps_plots.quality_scores(SUMMARY),
        "layers": maps_plots.quality_by_layer(SUMMARY),
    }


@pytest.mark.parametrize("name", ["kinds", "card", "curves", "scores", "layers"])
def test_figures_are_whole_and_opaque(name):
    figure = figures()[name]
    picture = pixels(figure)
    assert (picture[0, 0, :3] == 255).all() and picture.std() > 10
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    assert width <= 9.05


def test_an_outline_runs_around_the_object():
    drawn = maps_plots.outlined(torch.full((3, 8, 8), 0.5), OBJECT, side=64)
    assert drawn.shape == (3, 64, 64)
    inside, outside = drawn[0, 16:40, 24:48], np.delete(drawn[0], np.arange(16, 40), axis=0)
    assert set(np.unique(inside)) == {0.0, 0.5} and set(np.unique(outside)) == {0.5, 1.0}
    assert (inside[0] == 0).all() and inside[12, 12] == 0.5 and (drawn[0, 15, 24:48] == 1).all()
    assert drawn[0, 13, 30] == 0.5, "two pixels wide"
    with pytest.raises(ValueError, match="they must be equal"):
        maps_plots.outlined(IMAGE, OBJECT[:4])


def test_every_kind_of_map_has_a_scale_of_its_own():
    values = torch.zeros(16)
    values[5], values[6] = 1e-6, -0.5e-6
    figure = maps_plots.kinds_of_map(torch.ones(3, 8, 8), {"a": {"small": values, "large": 1e9 * values}}, (4, 4))
    original, small, large = (shown.get_array() for shown in figure.axes[0].images)
    assert np.allclose(small, large) and not np.allclose(small, original)
    red, blue, white = small[3, 3], small[3, 5], small[0, 0]
    assert red[0] > red[2] and blue[2] > blue[0] and np.ptp(white) < 0.05
    side = maps_plots.kinds_of_map(torch.ones(3, 8, 8), {"a": {"small": values}}, np.int64(4)).axes[0].images[1]
    assert np.array_equal(side.get_array(), small), "one number is patches per side"
    assert "share of the map's largest value" in texts(figure) and "small" in texts(figure)


def test_a_card_shows_the_map_with_its_own_scale_and_all_facts():
    values = torch.zeros(4)
    values[1], values[2] = 3.0, -1.5
    figure = maps_plots.map_card(torch.ones(3, 4, 4), values, (2, 2), "mine", "weight", FACTS)
    (_, shown), bar = figure.axes[0].images, figure.axes[1]
    red, blue, white = (shown.get_array()[i] for i in ((0, 3), (3, 0), (0, 0)))
    assert red[0] > red[2] and blue[2] > blue[0] and np.ptp(white) < 0.05
    assert bar.get_ylabel() == "weight" and np.allclose(bar.get_ylim(), (-3, 3))
    assert all(word in texts(figure) for word in [*FACTS, *FACTS.values(), "mine", "image"])
    positive = maps_plots.map_card(torch.ones(3, 4, 4), values.abs(), (2, 2), "mine", "weight", {})
    assert positive.axes[1].get_ylim()[0] == 0, "unsigned maps start at 0"


def test_curves_are_means_and_their_areas_are_said():
    figure = maps_plots.deletion_curves(CURVES)
    left, right = figure.axes
    assert np.allclose(left.lines[0].get_ydata(), [1, 0.3, 0]) and np.allclose(left.lines[0].get_xdata(), [0, 50, 100])
    assert np.allclose(right.lines[1].get_ydata(), [0.2, 0.2, 0.8])
    assert "softmax\n0.400, 0.650" in texts(figure) and "KArAt\n0.450, 0.350" in texts(figure)
    assert "deletion" in left.get_title(loc="left") and "insertion" in right.get_title(loc="left")


def row(attention, kind, layer, signs, **scores):
    found = {"attention": attention, "map": kind, "layer": layer, "signs": signs, "seeds": 3}
    return {**found, **{name: {"mean": mean, "std": std} for name, (mean, std) in scores.items()}}


SUMMARY = [
    row("softmax", "attention", 0, "signed", iou=(0.2, 0.01)),
    row("softmax", "attention", 1, "signed", iou=(0.4, 0.1), deletion_mean=(0.3, 0.02)),
    row("softmax", "attention", 1, "absolute", iou=(0.4, 0.1), deletion_mean=(0.3, 0.02)),
    row("karat", "attention", 0, "signed", iou=(0.25, 0.01)),
    row("karat", "attention", 1, "signed", iou=(0.3, 0.05), deletion_mean=(0.5, 0.01)),
    row("karat", "attention", 1, "absolute", iou=(0.35, 0.05), deletion_mean=(0.45, 0.01)),
    row("karat", "random", 1, "signed", iou=(0.1, 0.0), deletion_mean=(0.6, 0.0)),
]


def test_scores_stand_where_they_are_and_equal_ones_once():
    figure = maps_plots.quality_scores(SUMMARY)
    iou, deletion = figure.axes
    assert [iou.get_xlabel(), deletion.get_xlabel()] == ["best IoU →", "← deletion"]
    marks = [line for line in iou.lines if len(line.get_xdata()) == 1]
    drawn = sorted((line.get_xdata()[0], line.get_markerfacecolor() == "white") for line in marks)
    assert drawn == [(0.1, False), (0.3, False), (0.35, True), (0.4, False)]
    labels = [tick.get_text() for tick in iou.get_yticklabels()]
    assert labels == ["activated, head mean", "random"]
    assert len(maps_plots.quality_scores(SUMMARY, layer=0).axes) == 1
    assert len(maps_plots.quality_scores(SUMMARY, scores=["deletion_mean"]).axes) == 1


def test_layers_are_followed():
    left, right = maps_plots.quality_by_layer(SUMMARY).axes
    assert np.allclose(left.lines[0].get_ydata(), [0.2, 0.4]) and np.allclose(right.lines[0].get_ydata(), [0.25, 0.3])
    assert left.get_title(loc="left") == "softmax" and left.get_ylabel() == "best IoU"
    assert [line.get_ydata()[0] for line in right.lines if line.get_label() == "random"] == [0.1]
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(0.5) and band.min() == pytest.approx(0.19)


def test_one_seed_has_no_bar_and_no_band():
    alone = [{key: {**part, "std": None} if isinstance(part, dict) else part for key, part in row.items()}
             for row in SUMMARY]  # fmt: skip
    figure = maps_plots.quality_scores(alone)
    assert not [line for axes in figure.axes for line in axes.collections], "no bar of an error"
    left, _ = maps_plots.quality_by_layer(alone).axes
    assert np.allclose(left.lines[0].get_ydata(), [0.2, 0.4])
    assert np.ptp(left.collections[0].get_paths()[0].vertices[:, 1]) == pytest.approx(0.2), "a band of no width"


def test_a_legend_names_what_any_panel_draws_as_the_text_does():
    rows = [*SUMMARY, *(row("softmax", "added", layer, "signed", iou=(0.3, 0.0)) for layer in (0, 1))]
    softmax, karat = maps_plots.quality_by_layer(rows).axes
    assert [axes.get_title(loc="left") for axes in (softmax, karat)] == ["softmax", "KArAt"]
    assert [len(axes.lines) for axes in (softmax, karat)] == [2, 2], "a line for each kind that is there, and chance"
    assert [text.get_text() for text in karat.get_legend().get_texts()] == [
        "activated, head mean", "size added", "random"
    ]  # fmt: skip
    assert "KArAt" in texts(maps_plots.quality_scores(SUMMARY))
    many = {f"map {i}": CURVES["softmax"] for i in range(8)}
    lines = maps_plots.deletion_curves(many).axes[0].lines
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == 8


BAD = {
    "titles": (
        lambda: maps_plots.kinds_of_map(IMAGE, {"a": {"x": torch.rand(4)}, "b": {"y": torch.rand(4)}}, (2, 2)),
        "give the same",
    ),
    "values": (lambda: maps_plots.kinds_of_map(IMAGE, {"a": {"x": torch.rand(5)}}, (2, 2)), "do not fill 2 x 2"),
    "grid": (lambda: maps_plots.kinds_of_map(IMAGE, {"a": {"x": torch.rand(4)}}, (2,)), "patches per side"),
    "a card's grid": (lambda: maps_plots.map_card(IMAGE, [1.0] * 4, 2.0, "", "", {}), "patches per side.*got 2.0"),
    "a card's values": (
        lambda: maps_plots.map_card(IMAGE, [1.0] * 5, (2, 2), "", "", {}),
        "5 values do not fill 2 x 2",
    ),
    "points": (
        lambda: maps_plots.deletion_curves({"a": SimpleNamespace(shares=[0, 1], deletion=[1], insertion=[1, 0])}),
        "1 points, its shares 2",
    ),
    "not a summary": (lambda: maps_plots.quality_scores({"summary": []}), "list of rows"),
    "another layer": (lambda: maps_plots.quality_scores(SUMMARY, layer=7), "nothing for layer 7"),
    "score": (lambda: maps_plots.quality_scores(SUMMARY, scores=["iuo"]), "did you mean 'iou'"),
    "one layer": (lambda: maps_plots.quality_by_layer(SUMMARY, "deletion_mean"), "fewer than two layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
