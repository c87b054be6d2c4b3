"""Figures from tables of runs: the numbers drawn are the table's, and what cannot be drawn is refused."""

import numpy as np
import pytest
from figures import texts

from karat_lite.results_plots import accuracy_by_epoch, accuracy_by_setting, signals_by_step


def table(**accuracies):
    """name -> final accuracies of its seeds; two blocks, three logged steps."""

    def run(name, seed, last):
        steps = [
            {"step": step, "attention": [(seed + 1) * step, 4.0], "stream": [1.0, 2.0, 3.0], "grad_norm": last * step}
            for step in (1, 50, 100)
        ]
        return {"attention": name, "seed": seed, "test_accuracy": [last / 4, last / 2, last], "steps": steps}

    return {"runs": [run(name, seed, last) for name, all_ in accuracies.items() for seed, last in enumerate(all_)]}


def test_accuracy_is_the_mean_of_the_seeds_and_the_band_their_range():
    figure = accuracy_by_epoch(table(softmax=[0.4, 0.6], karat=[0.8, 0.9]))
    axes = figure.axes[0]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 2, 3]] * 2
    assert np.allclose(axes.lines[0].get_ydata(), [12.5, 25, 50]) and np.allclose(axes.lines[1].get_ydata()[-1], 85)
    band = axes.collections[0].get_paths()[0].vertices
    assert np.isclose(band[:, 1].min(), 10) and np.isclose(band[:, 1].max(), 60)
    assert "softmax: 50.00 ± 14.14 %" in texts(figure) and "2 seeds" in texts(figure)
    assert figure.get_tightbbox().x1 <= figure.get_size_inches()[0], "nothing is cut off"


def test_chosen_variants_in_the_order_given_and_one_seed_without_a_spread():
    figure = accuracy_by_epoch(table(a=[0.1], b=[0.2], c=[0.3]), ["c", "a"])
    assert [line.get_label() for line in figure.axes[0].lines] == ["c: 30.00 %", "a: 10.00 %"]
    assert "1 seed" in texts(figure) and "seeds" not in texts(figure)


def test_variants_look_different_and_are_called_what_the_text_calls_them():
    many = {f"karat rank {i}": [0.1] for i in range(8)}
    lines = accuracy_by_epoch(table(**many)).axes[0].lines
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == 8
    assert lines[3].get_label() == "KArAt rank 3: 10.00 %"
    assert signals_by_step(table(karat=[0.1]), ["karat"]).axes[0].get_title() == "KArAt"
    lines = accuracy_by_setting({f"model {i}": {1.0: [0.1], 2.0: [0.2]} for i in range(8)}, "rate").axes[0].lines
    lines = [line for line in lines if line.get_label().startswith("model")]
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == 8


def test_a_mean_needs_seeds_of_one_length():
    results = table(softmax=[0.4, 0.6], karat=[0.8, 0.9])
    results["runs"][2]["test_accuracy"].pop()
    with pytest.raises(ValueError, match="the seeds of 'KArAt' have 2 and 3 epochs.*runs of one length"):
        accuracy_by_epoch(results)
    results["runs"][3]["test_accuracy"].pop()
    lengths = [len(line.get_xdata()) for line in accuracy_by_epoch(results).axes[0].lines]
    assert lengths == [3, 2], "variants may differ"
    results["runs"][0]["steps"].pop()
    with pytest.raises(ValueError, match="the seeds of 'softmax' were logged at different steps"):
        signals_by_step(results, ["softmax"])


def test_signals_are_geometric_means_of_the_seeds_a_line_for_each_block():
    figure = signals_by_step(table(a=[0.1, 0.1], b=[0.2, 0.2]), ["b", "a"], ("attention", "grad_norm"), last=50)
    attention, norm = figure.axes[0], figure.axes[2]
    assert len(figure.axes) == 4 and attention.get_title() == "b"
    assert len(attention.lines) == 2 and len(norm.lines) == 1
    assert attention.lines[0].get_xdata().tolist() == [1, 50], "up to the last step asked for"
    assert np.allclose(attention.lines[0].get_ydata(), [2**0.5, 50 * 2**0.5]), (
        "seeds 0 and 1 gave 1 and 2 times the step"
    )
    assert np.allclose(norm.lines[0].get_ydata(), [0.2, 10])
    assert attention.get_ylim() == figure.axes[1].get_ylim(), "one scale a row"
    assert attention.get_ylim()[0] < 2**0.5 and attention.get_ylim()[1] > 50 * 2**0.5
    assert "attention output / values" in texts(figure) and "norm of all gradients" in texts(figure)


def test_variants_can_be_called_something_else_and_long_names_keep_to_their_column():
    accuracies = {"karat rank 12 paper depth 6": [0.1], "softmax depth 6": [0.2]}
    figure = accuracy_by_epoch(table(**accuracies), {"karat rank 12 paper depth 6": "the paper's start"})
    assert [line.get_label() for line in figure.axes[0].lines] == ["the paper's start: 10.00 %"]
    many = {f"karat rank 12 paper depth {depth}": [0.1] for depth in range(7)}
    figure = signals_by_step(table(**many), list(many), ("attention",))
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False)), "titles do not run into each other"
    assert max(box.y1 for box in boxes) <= figure.bbox.y1, "nor out of the figure"


def test_accuracy_over_a_setting_has_every_seed_and_the_best_mean():
    rates = {"softmax": {0.002: [0.5, 0.6], 0.001: [0.6, 0.7]}, "karat": {0.001: [0.4], 0.002: [0.2]}}
    axes = accuracy_by_setting(rates, "learning rate").axes[0]
    line, *seeds = axes.lines[:3]
    assert line.get_xdata().tolist() == [0.001, 0.002] and np.allclose(line.get_ydata(), [65, 55])
    assert [sorted(mark.get_ydata().tolist()) for mark in seeds] == [[60, 70], [50, 60]]
    assert [line.get_label() for line in axes.lines if "best" in line.get_label()] == [
        "softmax: best mean 65.0 % at 0.001", "karat: best mean 40.0 % at 0.001"
    ]  # fmt: skip
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.001", "0.002"]
    twins = [min(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None"]
    assert len(set(twins)) == len(twins) and max(abs(np.log(np.array(twins) / 0.001))) < 1, "side by side, all near"
    rates["paper's start"] = {0.002: [0.3], 0.0005: [0.5]}
    lines = accuracy_by_setting(rates, "learning rate").axes[0].lines
    (line,) = (line for line in lines if "start" in line.get_label())
    assert np.isnan(line.get_ydata()[1]), "no line over a rate that it was not trained with"
    assert [line.get_ydata()[0] for line in lines if line.get_marker() == "_"] == [50, 30], "so its means are marked"
    with pytest.raises(ValueError, match="no place for rate = 0: values must be positive"):
        accuracy_by_setting({"a": {0.0: [0.1]}}, "rate")


BAD_SETTINGS = {
    "NaN": ({0.1: [0.5, float("nan")]}, "accuracies of 'a' at rate = 0.1 holds 1 values that are not finite"),
    "nothing": ({0.1: []}, "accuracies of 'a' at rate = 0.1: expected a non-empty array"),
    "percents": ({0.1: [50.0]}, r"accuracies of 'a' at rate = 0.1 must lie in \[0, 1\], got 50 .. 50.*by 100"),
    "a file's keys": ({"0.1": [0.5]}, r"rate of 'a' must be a number, got '0.1'.*float\(key\)"),
    "NaN for a setting": ({float("nan"): [0.5]}, "rate of 'a' must be a number, got nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_accuracies_over_a_setting_that_cannot_be_drawn_are_named(case):
    by_value, words = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=words):
        accuracy_by_setting({"a": by_value}, "rate")


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="results hold no runs"):
        accuracy_by_epoch({"runs": []})
    with pytest.raises(ValueError, match="variant.*karatt.*karat"):
        accuracy_by_epoch(table(karat=[0.1]), ["karatt"])
    for none in ([], {}):
        with pytest.raises(ValueError, match="no variant is chosen: name some of karat, or give None for all"):
            accuracy_by_epoch(table(karat=[0.1]), none)
    with pytest.raises(ValueError, match="signal.*streem"):
        signals_by_step(table(a=[0.1]), ["a"], ["streem"])
    with pytest.raises(ValueError, match="not logged up to step 0"):
        signals_by_step(table(a=[0.1]), ["a"], ["stream"], last=0)
    without = table(a=[0.1])
    del without["runs"][0]["steps"]
    with pytest.raises(ValueError, match="--log-every STEPS --signal"):
        signals_by_step(without, ["a"])
