"""Figures of changed scores, from the records of analysis/content.py and the file of content_table.py (see canvas)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .canvas import (
    COLOURS,
    INK,
    WIDTH,
    as_array,
    as_shares,
    colour_bar,
    colour_scale,
    drawn_in,
    label_axes,
    legend,
    need_mapping,
    sheet,
    show_pixels,
    style,
)

MARKS = "osD^vP"


def changes_figure(models: Mapping[str, Mapping[str, Sequence[float]]], chance: float | None = None) -> Figure:
    """Accuracy under every change of scores: a row a change, a colour and mark a model, a small dot a seed.

    models: model -> change -> accuracies in [0, 1], one for each seed (or a number); chance: accuracy of guessing.
    """
    need_mapping("models", models)
    names = list(dict.fromkeys(change for lines in models.values() for change in lines))
    left = 0.2 + 0.085 * max(map(len, names))
    figure, (axes,) = sheet(1, 1, (5.6, 0.46 * len(names)), margins=(left, 0.2, 0.55, 0.4))
    if chance is not None:
        as_shares("chance", [chance])
        axes.axvline(100 * chance, color="#8a8a8a", linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate("guessing", (100 * chance, -0.5), (3, -3), textcoords="offset points", fontsize=8,
                      color="#6a6a6a", va="top")  # fmt: skip
    apart = np.linspace(-0.27, 0.27, len(models)) if len(models) > 1 else [0.0]
    for i, (model, lines) in enumerate(models.items()):
        colour, mark = COLOURS[i % len(COLOURS)], MARKS[(i + i // len(COLOURS)) % len(MARKS)]  # as `style`
        for change, values in lines.items():
            values = as_shares(f"accuracies of {model!r}", np.atleast_1d(values))
            at = names.index(change) + apart[i]
            label = model if change == next(iter(lines)) else None
            axes.plot([100 * values.min(), 100 * values.max()], [at, at], color=colour, linewidth=1.2, alpha=0.7)
            axes.plot(100 * values, np.full(len(values), at), ".", color=colour, markersize=4, alpha=0.6)
            axes.plot(100 * values.mean(), at, mark, color=colour, markersize=7, markeredgecolor="white", label=label)
    for between in range(1, len(names)):
        axes.axhline(between - 0.5, color="#e4e4e4", linewidth=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 101))
    axes.tick_params(axis="y", length=0)
    label_axes(axes, "test accuracy (%)", "")
    axes.grid(visible=False, axis="y")
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(models), frameon=False, borderaxespad=0.2)
    return figure


def courses_figure(courses: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[float]]]]) -> Figure:
    """Accuracy under changes of scores through a training, a panel a model: model -> (steps, change -> accuracies)."""
    need_mapping("courses", courses)
    names = list(dict.fromkeys(change for _, lines in courses.values() for change in lines))
    panel = (min(3.4, (WIDTH - 2.7) / len(courses)), 2.5)
    figure, panels = sheet(1, len(courses), panel, margins=(0.65, 1.85, 0.55, 0.35), gaps=(0.2, 0))
    for axes, (model, (steps, lines)) in zip(panels, courses.items(), strict=True):
        for change, values in lines.items():
            i = names.index(change)
            values = as_shares(f"{model}, {change}: accuracies", values)
            if len(values) != len(steps):
                raise ValueError(f"{model}, {change}: {len(values)} accuracies for {len(steps)} steps.")
            look = dict(color=INK, linewidth=2.4) if i == 0 else dict(linewidth=1.6, **style(i - 1))
            axes.plot(steps, 100 * values, label=change, **look)
        axes.set_title(model, fontsize=10, color=INK, loc="left")
        axes.set_ylim(0, 101)
        label_axes(axes, "step of training", "test accuracy (%)" if axes is panels[0] else "")
        axes.tick_params(labelleft=axes is panels[0])
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, prune="upper"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    legend(panels[-1], loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, title="scores",
           title_fontsize=9, alignment="left", **drawn_in(panels, names))  # fmt: skip
    return figure


def places_figure(models: Mapping[str, np.ndarray], label: str = "accuracy (%)") -> Figure:
    """A number for each layer and head, a picture a model, on one scale: model -> (L, h), or (L,) for whole layers."""
    need_mapping("models", models)
    grids = {}
    for model, values in models.items():
        values = as_array(model, values, (1, 2))
        grids[model] = values[:, None] if values.ndim == 1 else values
    rows, columns = (max(grid.shape[i] for grid in grids.values()) for i in (0, 1))
    panel = (max(0.9, min(2.6, 0.6 * columns, (WIDTH - 1.6) / len(grids) - 0.35)), 0.36 * rows)
    figure, panels = sheet(1, len(grids), panel, margins=(0.6, 0.85, 0.5, 0.35), gaps=(0.35, 0))
    every = np.concatenate([grid.ravel() for grid in grids.values()])
    colours, largest = colour_scale(every, None), np.abs(every).max()
    for axes, (model, grid) in zip(panels, grids.items(), strict=True):
        show_pixels(axes, grid, cmap=colours.cmap, norm=colours.norm)
        for (layer, head), value in np.ndenumerate(grid):
            dark = np.dot(colours.cmap(colours.norm(value))[:3], (0.299, 0.587, 0.114)) < 0.5
            look = dict(ha="center", va="center", fontsize=8, color="white" if dark else INK)
            digits = 0 if abs(value) >= 9.95 else 1 if largest >= 0.95 else 3
            axes.text(head, layer, f"{round(value, digits) + 0.0:.{digits}f}", **look)
        axes.set_title(model, fontsize=10, color=INK)
        axes.set_xticks(range(grid.shape[1]) if grid.shape[1] > 1 else [])
        axes.set_yticks(range(grid.shape[0]))
        label_axes(axes, "head" if grid.shape[1] > 1 else "all heads", "layer" if axes is panels[0] else "")
    colour_bar(figure, colours, panels[-1].get_position().bounds, label)
    return figure
