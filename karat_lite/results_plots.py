"""Figures from tables of runs: what `python -m karat_lite.train --results FILE.json` wrote, read by `json.loads`.

A variant is what such a table calls "attention": softmax, karat, or what differs within the call ("karat paper").
Figures write KArAt for karat.
"""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .canvas import INK, WIDTH, as_shares, label_axes, legend, need_mapping, sheet, short, shown, style
from .checks import one_of

SIGNALS = {  # of `analysis.signal.signal_sizes`, and the norm of all gradients
    "scores": "scores",
    "attention": "attention output / values",
    "stream": "residual stream, RMS",
    "apart": "share that tells tokens apart",
    "grad_norm": "norm of all gradients",
}


def accuracy_by_epoch(results: Mapping, variants: Sequence[str] | Mapping[str, str] | None = None) -> Figure:
    """Test accuracy epoch by epoch: for every variant the mean of its seeds as a line, in a band from worst to best.

    variants: which, in which order, or a dict that says what to call each; None takes all. Raises `ValueError` where
    the seeds of a variant were trained for different numbers of epochs.
    """
    runs = _runs_of(results, variants)
    beside = 2.0 + 0.075 * max(map(len, runs))
    figure, (axes,) = sheet(1, 1, (WIDTH - 0.65 - beside, 3.2), margins=(0.65, beside, 0.55, 0.15))
    for i, (name, mine) in enumerate(runs.items()):
        epochs = sorted({len(run["test_accuracy"]) for run in mine})
        if len(epochs) > 1:
            raise ValueError(
                f"the seeds of {name!r} have {' and '.join(map(str, epochs))} epochs, and their mean needs as many of "
                "each: draw a table of runs of one length."
            )
        curves = 100 * np.array([as_shares(f"accuracies of {name!r}", run["test_accuracy"]) for run in mine])
        epoch, last = np.arange(1, 1 + curves.shape[1]), curves[:, -1]
        spread = f" ± {last.std(ddof=1):.2f}" if len(last) > 1 else ""
        look = style(i)
        axes.fill_between(epoch, curves.min(axis=0), curves.max(axis=0), color=look["color"], alpha=0.15, linewidth=0)
        said = f"{name}: {last.mean():.2f}{spread} %"
        axes.plot(epoch, curves.mean(axis=0), linewidth=2, label=said, **look)
    seeds = sorted({len(mine) for mine in runs.values()})
    label_axes(axes, "epoch", f"test accuracy (%), {' or '.join(map(str, seeds))} seed{'s' * (seeds[-1] > 1)}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, frameon=False)
    return figure


def accuracy_by_setting(accuracies: Mapping[str, Mapping[float, Sequence[float]]], across: str) -> Figure:
    """Final accuracy over a setting, such as the learning rate, on a logarithmic axis: a mark for every seed.

    accuracies: model -> value of the setting -> accuracies in [0, 1], one a seed. A line goes through the means, not
    over values that only others were trained with, and each model's best mean is written beside it. Models stand a
    little side by side at a value, or twins would hide each other.
    """
    need_mapping("accuracies", accuracies)
    figure, (axes,) = sheet(1, 1, (5.6, 3.0), margins=(0.65, 0.2, 0.55, 0.35))
    aside = []
    for i, (name, by_value) in enumerate(accuracies.items()):
        need_mapping(f"accuracies of {name!r}", by_value)
        for value in by_value:
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(
                    f"{across} of {name!r} must be a number, got {value!r}: the keys of a JSON file are strings, make "
                    "them numbers by float(key)."
                )
        values = sorted(by_value)
        if values[0] <= 0:
            raise ValueError(f"a logarithmic axis has no place for {across} = {values[0]:g}: values must be positive.")
        seeds = [100 * as_shares(f"accuracies of {name!r} at {across} = {v:g}", by_value[v]) for v in values]
        means = [float(each.mean()) for each in seeds]
        best, look = int(np.argmax(means)), style(i)
        said = f"{name}: best mean {means[best]:.1f} % at {values[best]:g}"
        aside.append((values, seeds, means, said, look))
    marks = sorted({value for by_value in accuracies.values() for value in by_value})
    step = min([high / low for low, high in itertools.pairwise(marks)], default=2.0) ** 0.08
    for i, (values, seeds, means, said, look) in enumerate(aside):
        mean_at = dict(zip(values, means, strict=True))  # a line stops where others were trained and this one was not
        axes.plot(marks, [mean_at.get(mark, np.nan) for mark in marks], linewidth=2, label=said, **look)
        for place, value in enumerate(marks):  # a mean without a neighbour lies on no line
            beside = {*marks[max(0, place - 1) : place], *marks[place + 1 : place + 2]}
            if value in mean_at and not beside & set(values):
                axes.plot(value, mean_at[value], "_", color=look["color"], markersize=16, markeredgewidth=2)
        colour = look["color"]
        for value, each in zip(values, seeds, strict=True):
            at = value * step ** (i - (len(aside) - 1) / 2)
            axes.plot([at] * len(each), each, "os^Dv"[i % 5], color=colour, markeredgecolor="white")
    axes.set_xscale("log")
    axes.set_xticks(marks, [f"{value:g}" for value in marks])
    axes.xaxis.set_minor_locator(NullLocator())
    label_axes(axes, across, "test accuracy (%)")
    legend(axes, loc="best")
    return figure


def signals_by_step(
    results: Mapping,
    variants: Sequence[str] | Mapping[str, str],
    signals: Sequence[str] = ("attention", "grad_norm"),
    last: int = 500,
) -> Figure:
    """How large signals are in the first steps of training, a column for every variant, a row for every signal.

    results: of a call with --log-every STEPS --signal. Of each signal the geometric mean over the seeds: a line for
    each block, the first dark, the last light (the gradients' norm has one line). variants: which, in which order, or a
    dict that says what to call each; signals: of "scores", "attention", "stream", "apart", "grad_norm"; last: the step
    to stop at.
    """
    runs = _runs_of(results, variants)
    for signal in signals:
        one_of("signal", signal, SIGNALS)
    if any("steps" not in run for mine in runs.values() for run in mine):
        raise ValueError("these runs have no steps: train with --log-every STEPS --signal to measure them.")
    side = min(2.6, (WIDTH - 0.9) / len(runs) - 0.15)
    titles = [textwrap.fill(name, max(8, int(11 * side))) for name in runs]  # 11 letters an inch
    above = 0.14 + 0.16 * max(title.count("\n") + 1 for title in titles)
    shape = dict(margins=(0.75, 0.15, 0.55, above), gaps=(0.15, 0.2))
    figure, panels = sheet(len(signals), len(runs), (side, 1.7), **shape)
    for i, signal in enumerate(signals):
        row, logged = panels[i * len(runs) :], [_over_seeds(name, mine, signal, last) for name, mine in runs.items()]
        low, high = min(value.min() for _, value in logged), max(value.max() for _, value in logged)
        for j, (axes, (step, value)) in enumerate(zip(row, logged, strict=False)):
            for block, line in enumerate(value.T):
                shade = block / max(1, value.shape[1] - 1)
                axes.plot(step, line, color=_between(shade), linewidth=1.6)
            axes.set(yscale="log", ylim=(low / 1.2, high * 1.2))
            lowest, first = i == len(signals) - 1, j == 0
            label_axes(axes, "step" if lowest else "", SIGNALS[signal] if first else "")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high < 20 * low else LogLocator(numticks=5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.tick_params(labelleft=first, labelbottom=lowest, which="both")
            if i == 0:
                axes.set_title(titles[j], fontsize=10, color=INK)
    return figure


def _runs_of(results: Mapping, variants: Sequence[str] | Mapping[str, str] | None) -> dict[str, list]:
    """Variant, or what to call it -> its runs."""
    need_mapping("results", results)
    if not results.get("runs"):
        raise ValueError("results hold no runs: give what `python -m karat_lite.train --results` wrote.")
    found: dict[str, list] = {}
    for run in results["runs"]:
        found.setdefault(run["attention"], []).append(run)
    if variants is not None and len(variants) == 0:
        raise ValueError(f"no variant is chosen: name some of {', '.join(found)}, or give None for all.")
    chosen = variants if isinstance(variants, Mapping) else {name: shown(name) for name in variants or found}
    return {title: found[one_of("variant", name, found)] for name, title in chosen.items()}


def _over_seeds(name: str, runs: list, signal: str, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and the geometric mean over the seeds (n, blocks)."""
    steps = [[record["step"] for record in run["steps"] if record["step"] <= last] for run in runs]
    if not any(steps):
        raise ValueError(f"{name!r} was not logged up to step {last}.")
    if any(step != steps[0] for step in steps):
        raise ValueError(f"the seeds of {name!r} were logged at different steps: draw runs of one --log-every.")
    logged = [[np.atleast_1d(record[signal]) for record in run["steps"][: len(steps[0])]] for run in runs]
    values = np.array(logged, dtype=float)  # None, of a step that was left out, becomes NaN
    if (values <= 0).any() or np.isinf(values).any():
        raise ValueError(f"{signal} of {name!r} must be positive and finite to stand on a logarithmic axis.")
    return np.array(steps[0]), np.exp(np.nanmean(np.log(values), axis=0))


def _between(share: float) -> str:
    """From dark to light blue."""
    dark, light = np.array([8, 48, 107]), np.array([158, 202, 225])
    return "#" + "".join(f"{round(x):02x}" for x in dark + share * (light - dark))
