"""Figures of spectra, ranks and weights through a training, from the arrays of analysis/spectrum.py and weights.py."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .analysis.spectrum import Bands, bands, effective_rank
from .analysis.weights import Histograms, WeightStatistics
from .canvas import (
    COLOURS,
    FAINT,
    INK,
    LINES,
    WIDTH,
    as_array,
    drawn_in,
    in_order,
    label_axes,
    legend,
    need_mapping,
    sheet,
    style,
)
from .checks import at_least

SIDES = ("before", "after")  # the activation
MARKS = "osD^v"


def singular_values(
    panels: Mapping[str, Mapping],
    limits: Mapping[str, Mapping[str, int]] | None = None,
    relative: bool = True,
    share=0.9,
) -> Figure:
    """Singular values over their index, side by side: title -> line's name -> s (..., N).

    A line is the geometric mean over all matrices of that name, its band the central `share` of them (1: least to
    largest). relative: every matrix is divided by its s_1 first. limits: title -> label -> an index to mark, such as
    the rank that cannot be exceeded. Values below rounding are drawn at float64's tolerance.
    """
    need_mapping("panels", panels)
    found: dict[str, dict[str, Bands]] = {}
    for title, lines in panels.items():
        need_mapping(f"panel {title!r}", lines)
        found[title] = {}
        for name, s in lines.items():
            s = as_array(f"singular values of {name!r}", s, None)
            if s.ndim == 0 or (relative and s[..., 0].min() <= 0):
                raise ValueError(f"singular values of {name!r}: a matrix of zeros has no s_1 to divide by.")
            found[title][name] = bands(s / s[..., :1] if relative else s, share)
    figure, axes = sheet(
        1, len(panels), (_across(len(panels), 0.75), 2.45), margins=(0.75, 0.1, 0.55, 0.35), gaps=(0.75, 0)
    )
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    for panel, (title, lines) in zip(axes, found.items(), strict=True):
        for name, band in lines.items():
            _band(panel, band, names.index(name), name)
        top = max(band.high.max() for band in lines.values())
        panel.set(
            yscale="log", ylim=(1e-5 * top, 2 * top), xlim=(0, max(len(band.mean) for band in lines.values()) + 1)
        )
        _limits(panel, (limits or {}).get(title, {}))
        panel.set_title(title, fontsize=10, color=INK, loc="left")
        _index_axes(panel, relative if panel is axes[0] else None)
    legend(axes[-1], loc="upper right", **drawn_in(axes))
    return figure


def ranks_by_layer(panels: Mapping[str, Mapping[str, Mapping]], limits: Mapping[str, float] | None = None) -> Figure:
    """Measures over the layers: title of a panel -> model -> "before" or "after" -> values (n, L) of n seeds or images.

    A point is the mean of the n, its bar their standard deviation (n - 1). limits: label -> a height to mark in all
    panels.
    """
    need_mapping("panels", panels)
    figure, axes = sheet(1, len(panels), (_across(len(panels), 0.6), 2.4), margins=(0.6, 0.1, 0.55, 0.8), gaps=(0.6, 0))
    models = list(dict.fromkeys(model for lines in panels.values() for model in lines))
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        need_mapping(f"panel {title!r}", lines)
        for model, sides in lines.items():
            if unknown := [side for side in sides if side not in SIDES]:
                raise ValueError(
                    f"{model!r} has the side {unknown[0]!r}: expected 'before' and 'after' the activation."
                )
            for side, values in sides.items():
                values = np.atleast_2d(as_array(f"{title}, {model}, {side}", values, (1, 2)))
                spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
                again, i = divmod(models.index(model), len(COLOURS))  # dashes tell sides, so marks tell these apart
                colour, before = COLOURS[i], side == "before"
                look = dict(linestyle=LINES[1 if before else 0], marker=MARKS[again % len(MARKS)])
                look |= dict(markersize=5.5, capsize=2.5)
                look |= dict(color=colour, markerfacecolor="white" if before else colour)
                panel.errorbar(range(values.shape[1]), values.mean(axis=0), spread, label=f"{model}, {side}", **look)
        for label, height in (limits or {}).items():
            panel.axhline(height, color="#777777", linewidth=1)
            panel.annotate(label, (1, height), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                           textcoords="offset points", fontsize=8.5, ha="right", color=INK)  # fmt: skip
        panel.set_ylim(bottom=0, top=1.06 * panel.get_ylim()[1])
        panel.margins(x=0.1)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(title, fontsize=10, color=INK, loc="left")
        label_axes(panel, "layer", "")
    # In two lines where one would not fit.
    look = dict(
        loc="upper center",
        ncols=4 if len(panels) > 1 else 2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=3.2,
    )
    figure.legend(**drawn_in(axes), **look)
    return figure


def ridges(panels: Mapping[str, Histograms], steps: Sequence[int], columns: int = 4) -> Figure:
    """How distributions of weights move: a ridge for each snapshot, the first at the bottom; kind -> `Histograms`.

    A ridge's height is the density over the largest of its panel: a distribution that spreads gets lower.
    """
    need_mapping("panels", panels)
    for kind, found in panels.items():
        if len(found.density) != len(steps):
            raise ValueError(f"{kind!r} has {len(found.density)} snapshots, but there are {len(steps)} steps.")
    columns = min(at_least("columns", columns, 1), len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = sheet(rows, columns, ((WIDTH - 0.75 - 0.12 * columns) / max(columns, 4), 2.3),
                         margins=(0.65, 0.1, 0.55, 0.3), gaps=(0.12, 0.65))  # fmt: skip
    times, tallest = len(steps), max(1.6, len(steps) / 4)  # ridges overlap where there are many
    for i, panel in enumerate(axes):
        if i >= len(panels):
            panel.set_axis_off()
            continue
        kind, found = list(panels.items())[i]
        middles = (found.edges[:-1] + found.edges[1:]) / 2
        heights = found.density / found.density.max() * tallest
        for t in reversed(range(times)):
            colour = in_order(t, times)
            panel.fill_between(middles, t, t + heights[t], color=colour, linewidth=0, zorder=2 * (times - t))
            panel.plot(middles, t + heights[t], color="white", linewidth=0.7, zorder=2 * (times - t) + 1)
        panel.set_title(kind, fontsize=10, color=INK, loc="left")
        panel.set(xlim=(found.edges[0], found.edges[-1]), ylim=(-0.5, times - 1 + 1.03 * tallest))
        ticks = np.unique(np.linspace(0, times - 1, min(times, 8)).round().astype(int))
        panel.set_yticks(ticks, [f"{steps[t]:,}" for t in ticks] if i % columns == 0 else [""] * len(ticks))
        panel.xaxis.set_major_locator(MaxNLocator(3))
        label_axes(panel, "weight", "step" if i % columns == 0 else "")
    return figure


def tails(
    panels: Mapping[str, np.ndarray], names: Sequence[str] = ("first", "middle", "last"), columns: int = 4
) -> Figure:
    """Densities of standardised weights on a logarithmic axis, beside the normal one: kind -> values (len(names), n).

    What is standardised, (w - mean) / std, differs in shape alone: a tail that lies above the grey line is heavier than
    a normal distribution's.
    """
    need_mapping("panels", panels)
    columns = min(at_least("columns", columns, 1), len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = sheet(rows, columns, ((WIDTH - 0.8 - 0.12 * columns) / max(columns, 4), 1.9),
                         margins=(0.7, 0.1, 0.55, 0.6), gaps=(0.12, 0.65))  # fmt: skip
    edges = np.linspace(-8, 8, 65)
    middles = (edges[:-1] + edges[1:]) / 2
    for i, panel in enumerate(axes):
        if i >= len(panels):
            panel.set_axis_off()
            continue
        kind, values = list(panels.items())[i]
        values = as_array(f"weights {kind!r}", values, 2)
        if len(values) != len(names):
            raise ValueError(f"weights {kind!r} hold {len(values)} snapshots, but there are {len(names)} names.")
        panel.plot(
            middles, np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi), color="#9a9a9a", linewidth=2.5, label="normal"
        )
        for t, (name, snapshot) in enumerate(zip(names, values, strict=True)):
            if snapshot.std() <= 1e-12 * np.abs(snapshot).max():
                continue  # all equal: no shape to compare
            z = (snapshot - snapshot.mean()) / snapshot.std()
            density = np.histogram(z, edges)[0] / (len(z) * np.diff(edges))
            panel.plot(middles, np.where(density > 0, density, np.nan), label=name, linewidth=1.6, **style(t))
        panel.set(yscale="log", ylim=(1e-5, 1), xlim=(-8, 8))
        panel.set_title(kind, fontsize=10, color=INK, loc="left")
        _log_axis(panel)
        panel.tick_params(labelleft=i % columns == 0)
        label_axes(panel, "standard deviations", "density" if i % columns == 0 else "")
    look = dict(ncols=4, frameon=False, fontsize=9, labelcolor=INK, handlelength=3.2)
    figure.legend(**drawn_in(axes, ["normal", *names]), loc="upper center", **look)
    return figure


def over_training(steps: Sequence[int], panels: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Lines over the steps of a training, panels side by side: label of the vertical axis -> name -> (T,).

    Gaps stay where a value is NaN (a kurtosis of equal weights).
    """
    need_mapping("panels", panels)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    beside = 0.75 + 0.075 * max(map(len, names))
    width = (WIDTH - 0.6 - beside - 0.7 * (len(panels) - 1)) / len(panels)
    figure, axes = sheet(1, len(panels), (width, 2.45), margins=(0.65, beside, 0.55, 0.12), gaps=(0.7, 0))
    for panel, (label, lines) in zip(axes, panels.items(), strict=True):
        need_mapping(f"panel {label!r}", lines)
        for name, values in lines.items():
            values = np.asarray(values, dtype=float)
            if values.shape != (len(steps),):
                raise ValueError(f"{name!r} has shape {values.shape}, but there are {len(steps)} steps.")
            panel.plot(steps, values, label=name, linewidth=1.8, **style(names.index(name)))
        label_axes(panel, "step", label)
        _step_axis(panel)
    look = dict(frameon=False, fontsize=9, labelcolor=INK, handlelength=3.2)
    axes[-1].legend(**drawn_in(axes), loc="center left", bbox_to_anchor=(1.01, 0.5), **look)
    return figure


def head_through_training(
    title: str,
    steps: Sequence[int],
    snapshot: int,
    before,
    after,
    limits: Mapping[str, int],
    kind: str,
    weights: tuple[WeightStatistics, Histograms] | str,
) -> Figure:
    """One head and one kind of weights at a snapshot, beside their way through the training: for explorers.

    Args:
        snapshot: 0 .. T - 1.
        before, after: singular values of this head, (T, B, N).
        limits: label -> index to mark among the singular values.
        weights: statistics and histograms of `kind`; or a sentence that says why there are none.
    """
    T = len(steps)
    if not 0 <= snapshot < T:
        raise ValueError(f"snapshot {snapshot} is not there: there are snapshots 0 to {T - 1}.")
    sides = {side: as_array(side, s, 3) for side, s in zip(SIDES, (before, after), strict=True)}
    if any(len(s) != T for s in sides.values()):
        raise ValueError(f"singular values of {[len(s) for s in sides.values()]} snapshots, but {T} steps.")
    figure, ((values, ranks), (density, kurtosis)) = _two_by_two()
    for i, line, (side, s) in zip((2, 3), (1, 0), sides.items(), strict=True):  # as in ranks_by_layer: dashed, solid
        scaled = s / np.maximum(s[..., :1], np.finfo(float).tiny)
        values.plot(range(1, s.shape[-1] + 1), bands(scaled[0]).mean, color=COLOURS[i], linewidth=0.9, alpha=0.55)
        _band(values, bands(scaled[snapshot]), i, side, line)
        each = effective_rank(s)  # (T, B)
        low, high = np.quantile(each, (0.05, 0.95), axis=1)
        ranks.fill_between(steps, low, high, color=COLOURS[i], alpha=0.2, linewidth=0)
        ranks.plot(steps, each.mean(axis=1), color=COLOURS[i], linestyle=LINES[line], linewidth=1.8, label=side)
        ranks.plot(steps[snapshot], each[snapshot].mean(), "o", color=COLOURS[i], markersize=7, markeredgecolor="white")
    values.set(yscale="log", ylim=(1e-5, 2), xlim=(0, sides["before"].shape[-1] + 1))
    _limits(values, limits)
    _index_axes(values, relative=True)
    legend(values, loc="upper right")
    values.set_title(f"{title}, step {steps[snapshot]:,}", fontsize=10, color=INK, loc="left")
    ranks.set_ylim(bottom=0)
    label_axes(ranks, "step", "effective rank")
    if isinstance(weights, str):
        for panel in (density, kurtosis):
            panel.set_axis_off()
        _mark_step(ranks, steps[snapshot])
        density.text(0, 0.5, weights, fontsize=10, color=INK, transform=density.transAxes, wrap=True)
        return figure
    statistics, histograms = weights
    density.stairs(histograms.density[snapshot], histograms.edges, fill=True, color=COLOURS[0], alpha=0.6, label="now")
    density.stairs(histograms.density[0], histograms.edges, color=INK, linewidth=1.2, label="at the start")
    least = 0.5 / (statistics.count * np.diff(histograms.edges)[0])  # half a weight in a bin
    density.set(yscale="log", ylim=(least, 8 * histograms.density.max()))  # above, a line for the legend
    _log_axis(density)
    density.xaxis.set_major_locator(MaxNLocator(5))  # such numbers are wide
    said = f"std {statistics.std[snapshot]:.3g}, beyond 4 std {100 * statistics.beyond4[snapshot]:.2g} %"
    density.set_title(f"{kind}: {said}", fontsize=10, color=INK, loc="left")
    legend(density, loc="upper right", ncols=2)
    label_axes(density, "weight", "density")
    kurtosis.axhline(0, color=INK, linewidth=0.8)
    kurtosis.plot(steps, statistics.kurtosis, color=COLOURS[0], linewidth=1.8)
    kurtosis.plot(
        steps[snapshot], statistics.kurtosis[snapshot], "o", color=COLOURS[0], markersize=7, markeredgecolor="white"
    )
    label_axes(kurtosis, "step", "excess kurtosis")
    for panel in (ranks, kurtosis):
        _mark_step(panel, steps[snapshot])
    return figure


def _two_by_two():
    figure, axes = sheet(2, 2, ((WIDTH - 2.2) / 2, 1.75), margins=(0.75, 0.1, 0.55, 0.3), gaps=(0.75, 0.8))
    return figure, (axes[:2], axes[2:])


def _across(count: int, gap: float) -> float:
    """Inches of each of `count` panels in a full-width figure."""
    return (min(WIDTH, 4.2 * count + 0.5) - 0.85 - gap * (count - 1)) / count


def _band(panel, band: Bands, i: int, name: str, line: int | None = None) -> None:
    look = style(i) | ({} if line is None else dict(linestyle=LINES[line]))
    index = np.arange(1, len(band.mean) + 1)
    panel.fill_between(index, band.low, band.high, color=look["color"], alpha=0.2, linewidth=0)
    panel.plot(index, band.mean, linewidth=2, label=name, **look)


def _limits(panel, limits: Mapping[str, int]) -> None:
    """Lines behind these indices; each label one line of text higher than the one before."""
    for i, (label, index) in enumerate(sorted(limits.items(), key=lambda item: -item[1])):
        _limit(panel, index, label, 4 + 12 * i)


def _limit(panel, index: int, label: str, height: float) -> None:
    panel.axvline(index + 0.5, color="#777777", linewidth=1)
    look = dict(textcoords="offset points", fontsize=8.5, color=INK)
    look["bbox"] = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.5)
    low, high = panel.get_xlim()
    side = 1 if index + 0.5 < low + 0.7 * (high - low) else -1  # else the label would leave the panel
    look |= dict(xytext=(3 * side, height), ha="left" if side > 0 else "right")
    panel.annotate(label, (index + 0.5, 0.45), xycoords=("data", "axes fraction"), **look)


def _index_axes(panel, relative: bool | None) -> None:
    """Name the axes of singular values; None: the panel to the left has named the upright one."""
    label_axes(panel, "index i", {True: "sᵢ / s₁", False: "sᵢ", None: ""}[relative])
    _log_axis(panel)
    ticks = [1, *range(10, round(panel.get_xlim()[1]), 10 if panel.get_xlim()[1] < 100 else 50)]
    panel.xaxis.set_major_locator(FixedLocator(ticks))


def _log_axis(panel) -> None:
    """Powers of ten in plain text: TeX takes longer to read than all else to draw."""
    panel.yaxis.set_major_locator(LogLocator(numticks=7))
    panel.yaxis.set_minor_locator(NullLocator())
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    power = lambda value, _: f"10{f'{np.log10(value):.0f}'.translate(superscript)}"  # noqa: E731
    panel.yaxis.set_major_formatter(FuncFormatter(power))


def _mark_step(panel, step: int) -> None:
    panel.axvline(step, color=FAINT, linewidth=1.2, zorder=1)
    _step_axis(panel)


def _step_axis(panel) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
