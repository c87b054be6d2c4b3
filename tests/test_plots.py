"""Figures hold the numbers that they are given, in every style and whole; arrays that cannot be drawn are named."""

import json
import math
import sys
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
import pytest
import torch
from figures import COSTS, POINTS, SCENES, history, pixels, scene, seen, texts
from matplotlib.colors import to_hex

from karat_lite import canvas, plots

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", SCENES)
def test_figures_are_the_same_opaque_picture_in_a_dark_style(name):
    plain = pixels(scene(name))
    with matplotlib.style.context("dark_background"):
        dark = pixels(scene(name))
    assert np.array_equal(plain, dark)
    assert plain.shape[2] == 3 or (plain[..., 3] == 255).all()
    assert (plain[0, 0, :3] == 255).all() and plain.std() > 10


@pytest.mark.parametrize("name", SCENES)
def test_figures_leave_pyplot_alone(name):
    """A figure that pyplot knows would be shown twice, and two threads would draw into each other's."""
    before = dict(matplotlib.rcParams)
    scene(name)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("name", SCENES)
def test_nothing_is_cut_off(name):
    """All words lie inside the sheet: places are fixed in inches, so this is ours to see to."""
    figure = scene(name)
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01


def test_training_curves_draw_what_was_written_down():
    figure = plots.training_curves({"softmax": history(0.5, 0.9, 0.91), "KArAt": history(0.6, 0.8, 0.95).records})
    loss, accuracy = figure.axes
    assert [list(line.get_ydata()) for line in loss.lines[:2]] == [[2, 1, 2 / 3], [2.5, 1.25, 2.5 / 3]]
    assert [list(line.get_xdata()) for line in accuracy.lines] == [[1, 2, 3]] * 2
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[50, 90, 91], [60, 80, 95]]
    assert "%" in accuracy.get_ylabel() and loss.get_xlabel() == "epoch"
    styles = {(line.get_color(), line.get_linestyle()) for line in accuracy.lines}
    assert len(styles) == 2 and len({style[0] for style in styles}) == len({style[1] for style in styles}) == 2
    assert "softmax: 91.0 % at the end" in texts(figure)


def test_thirty_six_lines_look_different():
    looks = [canvas.style(i) for i in range(36)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 36
    assert [look["color"] for look in looks[:6]] == list(canvas.COLOURS)
    assert [look["linestyle"] for look in looks[:6]] == list(canvas.LINES)
    loss, accuracy = plots.training_curves({f"model {i}": history(0.5, 0.9) for i in range(8)}).axes
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in accuracy.lines}) == 8
    many = plots.learned_functions(X, [X] * 8, [f"curve {i}" for i in range(8)]).axes[0].get_legend().get_lines()
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in many}) == 8


def test_readers_see_the_name_of_the_text():
    runs = [{"attention": name, "accuracy": 0.9} for name in ("softmax", "karat", "karat rank 4")]
    (axes,) = plots.twins_accuracy({"runs": runs}).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["softmax", "KArAt", "KArAt rank 4"]
    (axes,) = plots.twins_accuracy({"karat": [0.9]}).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["karat"], "what the caller says stays"


def test_twins_accuracy_draws_every_seed_and_the_mean():
    runs = [{"attention": a, "accuracy": v} for a, v in (("softmax", 0.95), ("karat", 0.9), ("softmax", 0.97))]
    (axes,) = plots.twins_accuracy({"runs": runs, "command": "..."}).axes
    mean, dots, one, _ = axes.lines
    assert (
        np.allclose(mean.get_xdata(), 96)
        and np.allclose(dots.get_xdata(), [95, 97])
        and np.allclose(one.get_xdata(), 90)
    )
    assert "96.00 ± 1.41 % (2 seeds)" in texts(axes.figure) and "90.00 % (1 seed)" in texts(axes.figure)


def test_committed_results_can_be_drawn():
    results = sorted((ROOT / "data" / "results").glob("*_twins.json"))
    assert results
    for path in results:
        record = json.loads(path.read_text())
        (axes,) = plots.twins_accuracy(record).axes
        drawn = sorted(value for line in axes.lines[1::2] for value in line.get_xdata())
        assert np.allclose(drawn, sorted(100 * run["accuracy"] for run in record["runs"]))


def test_images_are_shown_as_they_are():
    images, _, _ = seen()
    figure = plots.images(images[:5], ["seven"] * 5, columns=3)
    (axes,) = figure.axes
    for shown, image in zip(axes.images, images[:5], strict=True):
        assert np.allclose(shown.get_array(), image.permute(1, 2, 0), atol=1e-6)
        assert shown.get_interpolation() == "nearest"
    assert [text.get_text() for text in axes.texts] == ["seven"] * 5
    corners = [shown.get_extent()[::3] for shown in axes.images]  # left and top: three in the upper row, two below
    assert (
        len({left for left, _ in corners}) == 3
        and [top == corners[0][1] for _, top in corners] == [True] * 3 + [False] * 2
    )
    whole = (images[0] * 255).round().to(torch.uint8)
    assert np.allclose(plots.images([whole]).axes[0].images[0].get_array(), whole.permute(1, 2, 0) / 255)


def test_matrices_share_a_scale_within_a_title_and_are_white_at_zero_when_signed():
    signed, rows = torch.randn(3, 5, 5), torch.rand(3, 5, 5)
    figure = plots.matrices({"signed": signed, "rows": rows})
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 6
    for axes, values in zip(shown, [*signed, *rows], strict=True):
        assert np.array_equal(axes.images[0].get_array(), values.double())
    left, right = shown[0].images[0], shown[3].images[0]
    assert left.norm is shown[2].images[0].norm and left.norm is not right.norm
    assert left.norm.vmin == -left.norm.vmax == -signed.abs().max()
    assert np.allclose(left.cmap(left.norm(0.0))[:3], 1, atol=0.05)
    assert right.norm.vmin == 0 and right.get_cmap().name == canvas.POSITIVE
    assert plots.matrices({"rows": rows[0]}, signed=True).axes[0].images[0].get_cmap().name == canvas.SIGNED
    assert "query token k" in texts(figure) and "key token q" in texts(figure)


def test_costs_are_compared_with_the_first_row():
    figure = plots.costs(COSTS)
    assert [axes.get_xlabel() for axes in figure.axes] == list(COSTS["broadcast"])
    for axes, quantity in zip(figure.axes, COSTS["broadcast"], strict=True):
        drawn = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
        assert drawn == [row[quantity] for row in COSTS.values()] and axes.get_xscale() == "log"
    assert "1,043 (149x)" in texts(figure) and "3.6 (0.49x)" in texts(figure) and "7.4 |" in texts(figure)
    ratios = plots.costs({"a": {"x": 1.0}, "b": {"x": 2.5}})
    assert "2.5" in texts(ratios) and "(2.5x)" not in texts(ratios), "times 1 need not be said"


def test_one_epoch_is_a_whole_number():
    figure = plots.training_curves({"softmax": history(0.5)})
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_roofline_draws_the_limits_and_names_every_point():
    (axes,) = plots.roofline(POINTS, 180e9, 30e9).axes
    roof, *dots = axes.lines
    assert roof.get_xdata()[1] == 6 and np.allclose(roof.get_ydata()[1:], 180)
    assert np.allclose(roof.get_ydata()[0] / roof.get_xdata()[0], 30)
    drawn = {(dot.get_xdata()[0], dot.get_ydata()[0] * 1e9) for dot in dots}
    assert np.allclose(sorted(drawn), sorted(POINTS.values()))
    pixels(axes.figure)  # names are placed when they are drawn
    names = [text for text in axes.texts if text.get_text() in POINTS]
    boxes = sorted((matplotlib.text.Text.get_window_extent(name) for name in names), key=lambda box: box.y0)
    assert len(boxes) == len(POINTS)
    assert all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:], strict=False)), "names lie over each other"


def test_attention_lies_over_the_patches_that_it_belongs_to():
    """One patch of one head attended to: that patch takes the strongest colour, and the other pictures stay even."""
    image, rows = torch.zeros(3, 8, 8), torch.zeros(2, 16)
    rows[1, 6] = 1.0  # of a 4 x 4 grid: second row, third column; two pixels a patch
    figure = plots.attention_over_image(image, rows, 4)
    original, first, second = (shown.get_array() for shown in figure.axes[0].images)
    assert not original.any()
    assert np.ptp(first, axis=(0, 1)).max() == 0
    there = np.abs(second - first).sum(axis=2) > 0.1
    expected = np.zeros((8, 8), dtype=bool)
    expected[2:4, 4:6] = True
    assert np.array_equal(there, expected)
    for grid in (np.int64(4), [4, 4], np.array([4, 4]), (np.int32(4), 4)):
        same = plots.attention_over_image(image, rows, grid).axes[0].images[2].get_array()
        assert np.array_equal(same, second)


def test_attention_keeps_the_sign():
    image, rows = torch.ones(3, 4, 4), torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    laid = plots.attention_over_image(image, rows, (2, 2)).axes[0].images[1].get_array()
    red, blue, white = laid[0, 0], laid[0, 3], laid[3, 3]
    assert red[0] > red[2] and blue[2] > blue[0] and np.ptp(white) < 0.05
    images, records, _ = seen()
    models = {name: record[0].maps[0, :, 0, 1:] for name, record in records.items()}
    figure = plots.attention_over_image(images[0], models, 4)
    assert len(figure.axes[0].images) == 10 and "softmax" in texts(figure) and "head 3" in texts(figure)


def test_each_line_of_attention_says_what_its_colours_measure():
    rows = {"scores": torch.randn(1, 4), "softmax": torch.rand(1, 4)}
    measures = {"scores": "score of a patch", "softmax": "share"}
    bars = plots.attention_over_image(IMAGE, rows, 2, label=measures).axes[1:]
    assert [bar.get_ylabel() for bar in bars] == list(measures.values())
    both = plots.attention_over_image(IMAGE, rows, 2, label="share").axes[1:]
    assert [bar.get_ylabel() for bar in both] == ["share"] * 2


def test_learned_functions_highlight_what_has_a_label():
    _, records, operators = seen()
    x = torch.linspace(-math.pi, math.pi, 101)
    curves = [operators[0].curve(x, 1, 2, q) for q in range(4)]
    scores = records["karat"][0].scores
    figure = plots.learned_functions(x, curves, ["chosen", "", "", "other"], "block 0", scores=scores)
    axes, below = figure.axes
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 101]
    for line, curve in zip(drawn, curves, strict=True):
        assert np.allclose(line.get_ydata(), curve)
    widths = [line.get_linewidth() for line in drawn]
    assert min(widths[0], widths[3]) > 2 * max(widths[1:3])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chosen", "other"]
    figure.draw_without_rendering()
    ticks = [tick.label1.get_text() for tick in below.xaxis.get_major_ticks() if abs(tick.get_loc()) < 3.2]
    assert ticks == ["−π", "−π/2", "0", "π/2", "π"] and below.get_xlabel() == "score $S_{kq}$"
    heights, edges = below.patches[0].get_data()[:2]
    assert np.allclose(heights, 100 * np.histogram(scores, bins=edges)[0] / scores.numel())
    used = [patch for patch in axes.patches if to_hex(patch.get_facecolor()) == "#ffffff"][0]
    assert np.allclose([used.get_x(), used.get_x() + used.get_width()], np.quantile(scores, [0.005, 0.995]), atol=1e-5)
    assert len(plots.learned_functions(x, curves).axes) == 1
    assert plots.learned_functions(x, curves, symbol=r"\exp").axes[0].get_ylabel() == r"$\exp$(score)"


def test_ticks_are_multiples_of_pi():
    said = [canvas.multiple_of_pi(n * math.pi / 2, None) for n in range(-4, 5)]
    assert said == ["−2π", "−3π/2", "−π", "−π/2", "0", "π/2", "π", "3π/2", "2π"]


X, IMAGE = torch.linspace(-1, 1, 5), torch.rand(3, 8, 8)
BAD = {
    "no names": (lambda: plots.training_curves([history(0.5)]), TypeError, "dict with a name"),
    "empty dict": (lambda: plots.matrices({}), ValueError, "empty"),
    "no epochs": (lambda: plots.training_curves({"a": history()}), ValueError, "at least one record"),
    "another record": (lambda: plots.training_curves({"a": [{"epoch": 1}]}), ValueError, "test_accuracy"),
    "percent": (lambda: plots.twins_accuracy({"a": [95.0]}), ValueError, r"\[0, 1\]"),
    "channels last": (lambda: plots.images([torch.rand(8, 8, 3)]), ValueError, r"\(3, H, W\).*\(8, 8, 3\)"),
    "normalised": (lambda: plots.images(torch.rand(2, 3, 8, 8) - 1), ValueError, "to_unit"),
    "one image": (lambda: plots.images(torch.rand(3, 8, 8)), ValueError, r"3 axes.*\(8, 8\)"),
    "titles": (lambda: plots.images(torch.rand(2, 3, 8, 8), ["a"]), ValueError, "2 images and 1 titles"),
    "no images": (lambda: plots.images([]), ValueError, "0 images"),
    "columns": (lambda: plots.images(torch.rand(2, 3, 8, 8), columns=0), ValueError, "columns"),
    "not square": (lambda: plots.matrices({"S": torch.rand(4, 5)}), ValueError, r"'S'.*\(4, 5\)"),
    "batch": (lambda: plots.matrices({"S": torch.rand(1, 2, 4, 4)}), ValueError, "2 or 3 axes"),
    "not finite": (lambda: plots.matrices({"S": torch.full((3, 3), math.nan)}), ValueError, "9 values that are not"),
    "own entry": (lambda: plots.attention_over_image(IMAGE, torch.rand(4, 17), 4), ValueError, r"\[\.\.\., 1:\]"),
    "grid": (lambda: plots.attention_over_image(IMAGE, torch.rand(4, 9), 4), ValueError, "4 x 4"),
    "no grid": (lambda: plots.attention_over_image(IMAGE, torch.rand(4), "2"), ValueError, r"patches per side.*'2'"),
    "half a grid": (lambda: plots.attention_over_image(IMAGE, torch.rand(4), 2.5), ValueError, "got 2.5"),
    "three sides": (lambda: plots.attention_over_image(IMAGE, torch.rand(4), (2, 2, 1)), ValueError, "(down, across)"),
    "head titles": (lambda: plots.attention_over_image(IMAGE, torch.rand(4, 4), 2, ["a"]), ValueError, "4 heads"),
    "labels of bars": (
        lambda: plots.attention_over_image(IMAGE, {"a": torch.rand(4), "b": torch.rand(4)}, 2, label={"a": "score"}),
        ValueError,
        "rows also b",
    ),
    "points": (lambda: plots.learned_functions(X, [X[:3]]), ValueError, "5 points of x"),
    "labels": (lambda: plots.learned_functions(X, [X, X], ["a"]), ValueError, "1 labels"),
    "a cost of nothing": (lambda: plots.costs({"a": {"x": 1.0}, "b": {"x": 0.0}}), ValueError, "no place for 0"),
    "a cost that is missing": (lambda: plots.costs({"a": {"x": 1.0}, "b": {}}), ValueError, "rows holds 1 values"),
    "a point without speed": (lambda: plots.roofline({"a": (1, 0)}, 1, 1), ValueError, "no place for 0"),
    "falling": (lambda: plots.learned_functions(-X, [X]), ValueError, "rising"),
    "words": (lambda: plots.learned_functions(X, ["curve"]), ValueError, "array of numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_named(case):
    call, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        call()
