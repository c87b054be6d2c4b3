"""Input that ordinary figures do not see: narrow ranges, many or long names, several sizes, nothing that moves."""

from types import SimpleNamespace

import numpy as np
import pytest
from mpl_toolkits.mplot3d import Axes3D

from karat_lite import canvas, content_plots, functions_plots, landscape_plots, plots, results_plots, spectrum_plots
from karat_lite.analysis.landscape import Landscape, PathLosses

RANDOM = np.random.default_rng(0)


def cut_off(figure) -> bool:
    """Whether anything that is drawn leaves the sheet."""
    figure.draw_without_rendering()
    box, whole = figure.get_tightbbox(), figure.bbox_inches
    return box.x0 < -0.01 or box.y0 < -0.01 or box.x1 > whole.x1 + 0.01 or box.y1 > whole.y1 + 0.01


@pytest.mark.parametrize("low, high", [(1.1, 1.9), (2.2, 2.9), (0.52, 0.58), (5.2, 5.8), (0.105, 0.19), (0.01, 30)])
def test_a_loss_axis_has_numbers_however_narrow(low, high):
    ticks = landscape_plots._round_losses(low, high)
    assert len(ticks) >= 2 and ticks.min() >= low and ticks.max() <= high


def flat(low=0.52, high=0.58, n=5):
    axis = np.linspace(-1, 1, n)
    return Landscape(axis, axis, low + (high - low) * np.add.outer(axis**2, axis**2) / 2)


def test_surfaces_end_at_their_bounds_and_a_path_at_its_star(monkeypatch):
    path = PathLosses(np.array([[0.8, 0.0], [0.5, 0.5]]), np.array([0.57, 0.55]), np.array([0.5, 0.5]))
    drawn, plot = [], Axes3D.plot_surface
    monkeypatch.setattr(Axes3D, "plot_surface", lambda *args, **look: drawn.append(args[3]) or plot(*args, **look))
    landscape_plots.surface({"m": flat(0.1, 8.1)}, bounds=(0.2, 1))
    assert drawn[0].min() >= np.log10(0.2) - 1e-9 and drawn[0].max() <= 1e-9
    figure = landscape_plots.contours({"m": flat()}, {"m": path})
    (star,) = (line for line in figure.axes[0].lines if line.get_marker() == "*")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.5, 0.5)


def test_lines_of_a_history_have_the_colours_of_their_bar():
    figure = functions_plots.function_history(np.arange(3.0), {"a": RANDOM.random((3, 3))}, [0, 10, 40])
    lines, bar = figure.axes[0].lines, figure.axes[1]
    painted = bar.collections[-1] if bar.collections else bar.images[0]
    assert np.allclose(lines[2].get_color(), painted.cmap(painted.norm(40)))
    assert np.allclose(lines[1].get_color(), painted.cmap(painted.norm(10)))


@pytest.mark.parametrize("size", [0.0, 5e-5])
def test_operators_that_hardly_move_are_drawn(size):
    still = {"phi": np.full((3, 2), size)}
    motion = SimpleNamespace(steps=np.array([0, 10, 20, 30]), distance={"phi": np.zeros((4, 2))}, change=still)
    figure = functions_plots.motion_figure(motion)
    low, high = figure.axes[1].get_ylim()
    assert all(low <= y <= high for line in figure.axes[1].lines[:2] for y in line.get_ydata())


def test_sharpness_names_models_as_other_figures_do():
    runs = [{"model": model, "seed": 0, "rise": 0.1} for model in ("softmax", "karat")]
    figure = landscape_plots.sharpness({"runs": runs, "measures": {"rise": "rise"}})
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["softmax", "KArAt"]


def test_matrices_of_several_sizes_have_numbers_of_their_own():
    figure = plots.matrices({"a": RANDOM.random((3, 5, 5)), "b": RANDOM.random((3, 17, 17))})
    assert all(len(axes.get_xticks()) > 1 for axes in figure.axes if axes.images and axes.get_title())
    with pytest.raises(ValueError, match="8 matrices side by side leave 0.0 inches for each: draw fewer"):
        plots.matrices({f"m{i}": np.eye(3) for i in range(8)})


def test_accuracies_end_at_a_hundred_percent():
    axes = plots.twins_accuracy({"a": [0.99], "b": [0.5]}).axes[0]
    assert axes.get_xlim()[1] <= 100.5
    with pytest.raises(ValueError, match="runs of these results is empty"):
        plots.twins_accuracy({"command": "python", "runs": []})
    with pytest.raises(ValueError, match=r"chance must lie in \[0, 1\], got 10"):
        content_plots.changes_figure({"a": {"zero": [0.5]}}, chance=10)


def test_a_scale_ends_where_its_values_do():
    assert canvas.colour_scale(-5 * np.tri(5), False).norm.vmax == 0
    assert canvas.colour_scale(np.zeros(3), False).norm.vmax == 1


@pytest.mark.parametrize("title", ["", "layer 0, head 1: functions"])
@pytest.mark.parametrize("scores", [None, RANDOM.normal(size=50)])
@pytest.mark.parametrize("labels", [["p = 0"], ["p = 3, q = class token"] * 5, [f"curve {i}" for i in range(8)]])
def test_every_name_of_a_function_is_on_the_sheet(labels, scores, title):
    curves = RANDOM.random((len(labels), 20))
    figure = plots.learned_functions(np.linspace(-3, 3, 20), curves, labels, title, scores)
    assert not cut_off(figure)
    box, above = figure.axes[0].get_legend().get_window_extent(), figure.axes[0].title
    for text in (above, figure.axes[0]._left_title):
        assert not text.get_text() or not box.overlaps(text.get_window_extent())


def test_costs_that_are_nearly_equal_keep_their_ticks_apart():
    figure = plots.costs({name: {"ms": value} for name, value in (("a", 0.18), ("b", 0.31), ("c", 0.36))})
    figure.draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_xticklabels() if tick.get_text()]
    low, high = figure.axes[0].get_xlim()
    there = [box for box, at in zip(boxes, figure.axes[0].get_xticks(), strict=False) if low <= at <= high]
    assert len(there) >= 2 and not any(a.overlaps(b) for a, b in zip(there, there[1:], strict=False))


def test_the_name_of_a_limit_stays_in_its_panel():
    figure, (axes,) = canvas.sheet(1, 1, (2, 2), margins=(0.5, 0.1, 0.5, 0.3))
    axes.set_xlim(0, 66)
    spectrum_plots._limits(axes, {"head dimension": 64, "units": 4})
    assert not cut_off(figure)


def test_small_shares_keep_a_digit_and_no_zero_has_a_sign():
    figure = content_plots.places_figure({"a": np.array([[-0.0004, 0.031], [0.02, -0.04]])})
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["-0.040", "0.000", "0.020", "0.031"]


def test_a_step_that_was_left_out_has_no_norm():
    steps = [{"step": 1, "grad_norm": None}, {"step": 2, "grad_norm": 2.0}]
    runs = [{"attention": "a", "seed": seed, "steps": [dict(step) for step in steps]} for seed in (0, 1)]
    runs[1]["steps"][0]["grad_norm"] = 4.0
    axes = results_plots.signals_by_step({"runs": runs}, ["a"], ("grad_norm",)).axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([4, 2])
    runs[0]["steps"][1]["grad_norm"] = float("inf")
    with pytest.raises(ValueError, match="grad_norm of 'a' must be positive and finite"):
        results_plots.signals_by_step({"runs": runs}, ["a"], ("grad_norm",))
