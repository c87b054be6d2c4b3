"""Figures of functions and changed scores draw what they are given, and all of it; bad arrays are named."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from figures import pixels, texts
from matplotlib.collections import LineCollection

import karat_lite as kl
from karat_lite import content_plots, functions_plots
from karat_lite.analysis import functions as fn

X = np.linspace(-2, 2, 21)


def model(**options):
    torch.manual_seed(0)
    return kl.create_model("vit_pico", **{"attention": "karat", "img_size": 8, "patch_size": 2, "depth": 2, "rank": 3,
                                          **options}).eval()  # fmt: skip


def images(n=4):
    return kl.load_dataset("digits", "test", limit=n)[:][0]


def a_unit(**options):
    operator = model(**options).blocks[0].attn.activation
    return fn.unit(operator, X, np.ones(21), 1, 2)


def motion(parts=("functions", "W"), T=4, L=2):
    rows = np.random.default_rng(0).random
    return fn.Motion(np.arange(T) * 10, {p: rows((T, L)) for p in parts}, {p: rows((T - 1, L)) for p in parts}, None)


CHANGES = {"softmax": {"as they are": [0.9, 0.8], "zero": [0.1, 0.2]}, "KArAt": {"as they are": [0.7], "zero": 0.6}}
COURSES = {"softmax": ([0, 5, 10], {"as they are": [0.1, 0.5, 0.9], "zero": [0.1, 0.1, 0.1]})}
HISTORY = {"a": np.outer([1, 2], X), "b": np.outer([0, 3], X)}
SCENES = {
    "wall": lambda: functions_plots.function_wall(fn.learned(model(), images())),
    "wall, one head": lambda: functions_plots.function_wall(fn.learned(model(num_heads=1, depth=1), images())),
    "wall, full rank": lambda: functions_plots.function_wall(fn.learned(model(rank=None), images())),
    "shares": lambda: functions_plots.share_bars({"a": {"one": 0.25, "two": 0.75}, "b": {"one": 1, "two": 0}}),
    "shapes": lambda: functions_plots.principal_shapes(X, fn.principal_shapes(a_unit().curves, count=3), "shapes"),
    "unit": lambda: functions_plots.one_unit(X, a_unit(), np.ones(21), "a title"),
    "unit, W first": lambda: functions_plots.one_unit(X, a_unit(order="phi_w"), np.ones(21), "a title"),
    "motion": lambda: functions_plots.motion_figure(motion()),
    "motion, one part": lambda: functions_plots.motion_figure(motion(["functions"]), [3, 5]),
    "motion, twelve layers": lambda: functions_plots.motion_figure(motion(L=12)),
    "history": lambda: functions_plots.function_history(X, HISTORY, [0, 9]),
    "changes": lambda: content_plots.changes_figure(CHANGES, chance=0.1),
    "courses": lambda: content_plots.courses_figure({**COURSES, "KArAt": COURSES["softmax"]}),
    "places": lambda: content_plots.places_figure({"a": np.array([[1.0, 20], [3, 4]]), "b": np.ones(2)}, "points lost"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
def test_nothing_is_cut_off_and_pyplot_is_left_alone(name):
    import sys

    figure = SCENES[name]()
    assert pixels(figure).std() > 5
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_the_wall_has_a_panel_for_each_head_on_its_own_range():
    learned = fn.learned(model(attention="hybrid", softmax_heads=[1]), images())
    figure = functions_plots.function_wall(learned, shown=5)
    assert [axes.get_title() for axes in figure.axes] == [f"layer {i}, head {j}" for i in (0, 1) for j in (0, 2, 3)]
    for i, axes in enumerate(figure.axes):
        at = learned.x[divmod(i, 3)]
        assert axes.get_xlim() == pytest.approx((at[0], at[-1]))
        lines, outer, inner = axes.collections
        assert isinstance(lines, LineCollection) and len(lines.get_segments()) == 5
        curves = learned.functions[divmod(i, 3)].reshape(-1, 61)
        assert np.allclose(lines.get_segments()[0][:, 1], curves[0])
        for band, ends in ((outer, (0.05, 0.95)), (inner, (0.25, 0.75))):
            reach = band.get_paths()[0].vertices[:, 1]
            truth = np.quantile(curves, ends, axis=0)
            assert (reach.min(), reach.max()) == pytest.approx((truth.min(), truth.max()))


def test_bars_of_shares():
    (axes,) = SCENES["shares"]().axes
    assert [bar.get_width() for bar in axes.patches] == [25, 100, 75, 0]
    assert [bar.get_x() for bar in axes.patches][2:] == [25, 100]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"] and "75" in texts(axes.figure)


def test_a_unit_shows_what_follows_the_score_and_where():
    unit = a_unit()
    figure = functions_plots.one_unit(X, unit, np.ones(21), "a title")
    axes, below, bare = figure.axes
    order = np.argsort(-unit.curves.std(axis=1))[:3]
    for line, q in zip(axes.lines, order, strict=False):
        assert np.allclose(line.get_ydata(), unit.curves[q])
        assert line.get_label() == ("q = class token" if q == 0 else f"q = {q}")
    shown, strips = bare.images[::2], bare.images[1::2]
    for picture, strip, (name, values) in zip(shown, strips, unit.maps.items(), strict=True):
        assert np.allclose(picture.get_array(), values[1:].reshape(4, 4))
        assert name in texts(figure) and f"class token: {values[0]:+.3f}" in texts(figure)
        assert strip.get_array()[0, 0] == strip.norm.vmax == picture.norm.vmax
        assert strip.get_array()[-1, 0] == strip.norm.vmin == picture.norm.vmin
        assert f"{strip.norm.vmax:.2g}" in texts(figure)
    signed = shown[0].norm
    assert signed.vmin == -signed.vmax and "a title" in texts(figure) and below.get_xlabel() == "score $S_{kq}$"
    assert not [axes for axes in SCENES["unit, W first"]().axes if axes.images], "its inputs are no tokens"


def test_motion_and_history_draw_their_lines():
    moved = motion()
    left, right = functions_plots.motion_figure(moved).axes
    for axes, values, steps in ((left, moved.distance, moved.steps), (right, moved.change, moved.steps[1:])):
        drawn = [line.get_ydata() for line in axes.lines]
        assert np.allclose(drawn, np.concatenate([values["functions"].T, values["W"].T]))
        assert all(np.array_equal(line.get_xdata(), steps) for line in axes.lines)
    assert right.get_yscale() == "log" and {line.get_linestyle() for line in left.lines} == {"-", "--"}
    assert "W, layer 1" in texts(left.figure) and "functions, layer 5" in texts(SCENES["motion, one part"]())
    first, second, bar = SCENES["history"]().axes
    assert np.allclose([line.get_ydata() for line in second.lines[:2]], np.outer([0, 3], X))
    assert first.get_title() == "a" and bar.get_ylabel() == "step of training"


def test_every_layer_has_a_look_of_its_own():
    deep = SCENES["motion, twelve layers"]()
    for axes in deep.axes:
        assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 24
        assert axes.lines[0].get_color() == axes.lines[12].get_color(), "a layer has one colour, a part one line"
    deep.draw_without_rendering()
    assert deep.legends[0].get_window_extent().y0 > max(axes.get_window_extent().y1 for axes in deep.axes)
    shapes = SimpleNamespace(shapes=np.ones((8, 21)), shares=np.full(8, 0.125))
    lines = functions_plots.principal_shapes(X, shapes).axes[0].lines[:8]
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == 8


def test_changes_are_told_apart_and_all_of_them_are_named():
    (axes,) = content_plots.changes_figure({f"model {i}": {"zero": 0.1} for i in range(8)}).axes
    marks = {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines}
    assert len({look for name, look in marks.items() if name.startswith("model")}) == 8
    course = {f"change {i}": [0.1, 0.2] for i in range(8)}
    figure = content_plots.courses_figure({"a": ([0, 5], course), "b": ([0, 5], {"change 0": [0.1, 0.2]})})
    looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in figure.axes[0].lines]
    assert len(set(looks)) == 8
    named = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert named == list(course), "also those that the last model lacks"


def test_changes_courses_and_places_draw_what_they_are_given():
    (axes,) = SCENES["changes"]().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["as they are", "zero"]
    means = {
        (round(line.get_xdata()[0], 6), round(line.get_ydata()[0])) for line in axes.lines if len(line.get_xdata()) == 1
    }
    assert means >= {(85, 0), (15, 1), (70, 0), (60, 1)} and "guessing" in texts(axes.figure)
    assert axes.get_xlabel() == "test accuracy (%)"
    first, second = SCENES["courses"]().axes
    assert [line.get_ydata().tolist() for line in first.lines] == [[10, 50, 90], [10, 10, 10]]
    assert first.lines[0].get_xdata().tolist() == [0, 5, 10] and second.get_title(loc="left") == "KArAt"
    one, two, bar = SCENES["places"]().axes
    assert np.array_equal(one.images[0].get_array(), [[1, 20], [3, 4]]) and two.images[0].get_array().shape == (2, 1)
    assert [text.get_text() for text in one.texts] == ["1.0", "20", "3.0", "4.0"] and bar.get_ylabel() == "points lost"
    assert one.images[0].norm.vmax == two.images[0].norm.vmax == 20


BAD = {
    "shares": (lambda: functions_plots.share_bars({"a": {"x": 0.5}}), "add to 1"),
    "other parts": (lambda: functions_plots.share_bars({"a": {"x": 1}, "b": {"y": 1}}), "not finite"),
    "grid": (lambda: functions_plots.principal_shapes(X[:5], fn.principal_shapes(a_unit().curves)), "21 points"),
    "weights": (lambda: functions_plots.one_unit(X, a_unit(), np.ones(5)), "as many points: 21, 5, 21"),
    "history": (lambda: functions_plots.function_history(X, {"a": np.ones((3, 21))}, [0, 9]), r"\(2, 21\).*\(3, 21\)"),
    "percent": (lambda: content_plots.changes_figure({"a": {"zero": [50.0]}}), r"\[0, 1\], got 50 .. 50"),
    "percents": (lambda: content_plots.courses_figure({"a": ([0], {"x": [50.0]})}), r"a, x: accuracies.*by 100"),
    "steps": (lambda: content_plots.courses_figure({"a": ([0, 1], {"zero": [0.5]})}), "1 accuracies for 2 steps"),
    "empty": (lambda: content_plots.places_figure({}), "empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
