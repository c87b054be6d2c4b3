"""Figures of spectra, ranks and weights: they hold the numbers that they are given, and refuse what does not fit."""

import functools
import sys

import matplotlib
import matplotlib.style
import numpy as np
import pytest
from figures import pixels, texts

from karat_lite import spectrum_plots as plots
from karat_lite.analysis.spectrum import bands, effective_rank
from karat_lite.analysis.weights import weight_histograms, weight_statistics

STEPS = [0, 100, 200, 300, 400]
NAN = float("nan")


@functools.cache
def spectrum(*shape) -> np.ndarray:
    s = np.exp(-np.arange(shape[-1]) * np.random.default_rng(0).uniform(0.3, 0.6, (*shape[:-1], 1)))
    return 5 * s


@functools.cache
def values(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, size=(5, 3000)) * np.linspace(0.1, 0.3, 5)[:, None]


def dashboard(snapshot=3, **changed):
    found = dict(before=spectrum(5, 6, 17), after=spectrum(5, 6, 17) ** 2, limits={"d = 16": 16, "r = 4": 4})
    found |= dict(weights=(weight_statistics(values()), weight_histograms(values())))
    return plots.head_through_training("model, layer 0", STEPS, snapshot, kind="W", **{**found, **changed})


def ranks(*shape):
    return {
        "softmax": {"before": spectrum(*shape), "after": 2 * spectrum(*shape)},
        "KArAt": {"after": spectrum(*shape)},
    }


SCENES = {
    "singular_values": lambda: plots.singular_values(
        {"before": {"softmax": spectrum(6, 17), "KArAt": spectrum(3, 17)}, "after": {"KArAt": spectrum(2, 3, 17)}},
        {"after": {"r = 4": 4, "d = 6": 6}},
    ),
    "ranks_by_layer": lambda: plots.ranks_by_layer({"effective rank": ranks(3, 4), "99 %": ranks(3, 4)}, {"r": 7}),
    "ranks in one panel": lambda: plots.ranks_by_layer({"effective rank": {"Fourier-KArAt": ranks(3, 4)["softmax"]}}),
    "ridges": lambda: plots.ridges({f"kind {i}": weight_histograms(values(i)) for i in range(5)}, STEPS, columns=3),
    "tails": lambda: plots.tails({f"kind {i}": values(i)[[0, 2, 4]] for i in range(3)}, columns=2),
    "over_training": lambda: plots.over_training(
        STEPS, {"excess kurtosis": {"W": [NAN, 1, 2, 3, 4], "b1": [0, 1, 1, 1, 1]}, "moved": {"W": [0, 1, 1, 1, 1]}}
    ),
    "head_through_training": dashboard,
    "head without weights": lambda: dashboard(weights="There are no weights of this kind."),
}


@pytest.mark.parametrize("name", SCENES)
def test_figures_are_whole_opaque_and_leave_pyplot_alone(name):
    before = dict(matplotlib.rcParams)
    figure = SCENES[name]()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    assert width <= 9.3, "a figure of full width"
    plain = pixels(figure)
    with matplotlib.style.context("dark_background"):
        assert np.array_equal(plain, pixels(SCENES[name]()))
    assert plain.std() > 10 and (plain[0, 0, :3] == 255).all()
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    for axes in figure.axes:
        if axes.axison:
            assert axes.get_xlabel() and axes.get_yscale() in ("log", "linear")


def test_singular_values_draw_bands_of_each_line():
    left, right = SCENES["singular_values"]().axes
    for line, s in zip(left.lines, (spectrum(6, 17), spectrum(3, 17)), strict=True):
        want = bands(s / s[..., :1])
        assert np.allclose(line.get_ydata(), want.mean) and list(line.get_xdata()) == list(range(1, 18))
    band = left.collections[0].get_paths()[0].vertices
    want = bands(spectrum(6, 17) / spectrum(6, 17)[:, :1])
    assert {round(v, 9) for v in want.high} <= {round(v, 9) for v in band[:, 1]}
    assert left.lines[1].get_color() == right.lines[0].get_color(), "a name has one colour in all panels"
    assert left.lines[0].get_linestyle() != left.lines[1].get_linestyle()
    assert [line.get_xdata()[0] for line in right.lines[1:]] == [6.5, 4.5], "behind the last index that may be used"
    assert left.get_yscale() == "log" and left.get_ylabel() == "sᵢ / s₁" and "r = 4" in texts(right.figure)
    assert "10⁻²" in [right.yaxis.get_major_formatter()(value, None) for value in (1e-2, 1.0)]
    (only,) = plots.singular_values({"a": {"x": spectrum(6, 17)}}, relative=False, share=1).axes
    assert np.allclose(only.lines[0].get_ydata(), bands(spectrum(6, 17)).mean) and only.get_ylabel() == "sᵢ"
    high = only.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(high.max(), spectrum(6, 17).max()), "share = 1: to the largest"


def test_ranks_are_means_with_their_spread():
    figure = SCENES["ranks_by_layer"]()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["effective rank", "99 %"]
    containers = figure.axes[0].containers
    assert [c.get_label() for c in containers] == ["softmax, before", "softmax, after", "KArAt, after"]
    for container, factor in zip(containers, (1, 2, 1), strict=True):
        line, _, (bars,) = container
        assert np.allclose(line.get_ydata(), factor * spectrum(3, 4).mean(axis=0))
        spread = [(high - low) / 2 for (_, low), (_, high) in bars.get_segments()]
        assert np.allclose(spread, factor * spectrum(3, 4).std(axis=0, ddof=1))
    before, after, other = (container[0] for container in containers)
    assert before.get_color() == after.get_color() != other.get_color()
    assert before.get_linestyle() != after.get_linestyle()
    assert 7 in figure.axes[1].lines[-1].get_ydata() and "softmax, before" in texts(figure)
    plots.ranks_by_layer({"one seed": {"softmax": {"after": [1.0, 2.0]}}})


def test_ridges_stand_on_their_snapshot():
    figure = SCENES["ridges"]()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [*(f"kind {i}" for i in range(5)), ""]
    found, axes = weight_histograms(values(1)), figure.axes[1]
    ridges = {round(min(line.get_ydata())): line.get_ydata() for line in axes.lines}
    for t in range(5):
        want = found.density[t] / found.density.max()
        assert np.allclose((ridges[t] - t) / max(ridges[0]), want, atol=1e-12)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0", "100", "200", "300", "400"]


def test_tails_are_standardised_and_compared_with_the_normal_density():
    axes = SCENES["tails"]().axes[0]
    normal, first, _, last = axes.lines
    assert np.allclose(normal.get_ydata(), np.exp(-(normal.get_xdata() ** 2) / 2) / np.sqrt(2 * np.pi))
    z = (values()[4] - values()[4].mean()) / values()[4].std()
    counts, edges = np.histogram(z, np.linspace(-8, 8, 65))
    assert np.allclose(np.nan_to_num(last.get_ydata()), counts / len(z) / 0.25)
    assert axes.get_yscale() == "log" and (first.get_label(), last.get_label()) == ("first", "last")
    equal = np.stack([np.ones(50), values()[1, :50], values()[2, :50]])
    assert len(plots.tails({"norms": equal}).axes[0].lines) == 3, "equal weights have no shape to draw"


def test_lines_over_training():
    left, right = SCENES["over_training"]().axes
    assert np.array_equal(left.lines[0].get_ydata(), [NAN, 1, 2, 3, 4], equal_nan=True)
    assert list(left.lines[0].get_xdata()) == STEPS and left.get_ylabel() == "excess kurtosis"
    assert left.lines[0].get_color() == right.lines[0].get_color() != left.lines[1].get_color()
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["W", "b1"]
    many = plots.over_training(STEPS, {"x": {f"line {i}": range(5) for i in range(14)}}).axes[0].lines
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in many}) == 14, "no two lines look alike"


def legend_of(figure) -> list[str]:
    """Names in the one legend that a figure has, on the figure or on one of its axes."""
    (found,) = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for text in found.get_texts()]


def test_a_legend_names_what_any_panel_draws():
    s, constant = spectrum(6, 17), np.stack([np.ones(3000), *values(1)[:2]])
    figure = plots.singular_values({"layer 0": {"softmax": s, "karat": s}, "layer 1": {"softmax": s}})
    assert legend_of(figure) == ["softmax", "karat"]
    figure = plots.ranks_by_layer({"layer 0": {"softmax": {"after": [1.0]}}, "layer 1": {"karat": {"before": [2.0]}}})
    assert legend_of(figure) == ["softmax, after", "karat, before"]
    figure = plots.tails({"norms": constant, "queries": values(2)[:3]})
    assert legend_of(figure) == ["normal", "first", "middle", "last"], "in their order, though norms lack the first"
    figure = plots.over_training(STEPS, {"a": {"W": range(5)}, "b": {"b1": range(5), "W": range(5)}})
    assert legend_of(figure) == ["W", "b1"]


def test_no_two_lines_look_alike():
    def looks(lines):
        return len({(line.get_color(), str(line._unscaled_dash_pattern), line.get_marker()) for line in lines})

    many = plots.singular_values({"x": {f"model {i}": spectrum(6, 17) for i in range(8)}}).axes[0].lines
    assert looks(many) == len(many) == 8
    many = plots.ranks_by_layer({"x": {f"model {i}": {"before": [1.0], "after": [2.0]} for i in range(8)}}).axes[0]
    assert looks([container[0] for container in many.containers]) == 16
    many = plots.tails({"x": np.random.default_rng(0).normal(size=(8, 99))}, [f"step {i}" for i in range(8)]).axes[0]
    assert looks(many.lines) == 9, "and the normal density"


def test_the_dashboard_shows_the_snapshot_that_is_asked_for():
    figure = dashboard(snapshot=3)
    scaled, ranks, density, kurtosis = figure.axes
    s = spectrum(5, 6, 17)
    lines = {line.get_label(): line for line in scaled.lines}
    assert np.allclose(lines["before"].get_ydata(), bands(s[3] / s[3, :, :1]).mean)
    assert np.allclose(lines["after"].get_ydata(), bands((s[3] / s[3, :, :1]) ** 2).mean)
    assert np.allclose(scaled.lines[0].get_ydata(), bands(s[0] / s[0, :, :1]).mean), "thin: where training began"
    assert np.allclose(ranks.lines[0].get_ydata(), effective_rank(s).mean(axis=1))
    assert ranks.lines[1].get_xdata()[0] == 300 == kurtosis.lines[2].get_xdata()[0]
    found, shown = weight_histograms(values()), density.patches
    assert np.allclose(shown[0].get_data().values, found.density[3])
    assert np.allclose(shown[1].get_data().values, found.density[0])
    assert np.allclose(kurtosis.lines[1].get_ydata(), weight_statistics(values()).kurtosis)
    assert "step 300" in texts(figure) and "W: std" in texts(figure)
    assert not np.array_equal(pixels(figure), pixels(dashboard(snapshot=0)))
    without = SCENES["head without weights"]()
    assert "There are no weights of this kind." in texts(without) and not without.axes[3].axison
    still = np.ones((5, 40))
    dashboard(weights=(weight_statistics(still), weight_histograms(still)))  # norms at the start: no kurtosis


BAD = {
    "nothing": (lambda: plots.singular_values({}), "panels is empty"),
    "an empty panel": (lambda: plots.singular_values({"a": {}}), "panel 'a' is empty"),
    "a matrix of zeros": (lambda: plots.singular_values({"a": {"x": np.zeros((2, 3))}}), "no s_1 to divide by"),
    "NaN": (lambda: plots.singular_values({"a": {"x": [1, NAN]}}), "1 values that are not finite"),
    "a side": (lambda: plots.ranks_by_layer({"a": {"softmax": {"behind": [1]}}}), "the side 'behind'"),
    "steps": (lambda: plots.ridges({"a": weight_histograms(values())}, STEPS[:2]), "5 snapshots, but there are 2"),
    "names": (lambda: plots.tails({"a": values()}), "hold 5 snapshots, but there are 3 names"),
    "a line": (lambda: plots.over_training(STEPS, {"a": {"x": [1, 2]}}), r"shape \(2,\), but there are 5 steps"),
    "snapshot": (lambda: dashboard(snapshot=5), "snapshots 0 to 4"),
    "snapshots": (lambda: dashboard(before=spectrum(4, 6, 17)), r"\[4, 5\] snapshots, but 5 steps"),
    "columns": (lambda: plots.tails({"a": values()[:3]}, columns=0), "columns must be >= 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_named(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
