"""Figures of learned functions, from the records of analysis/functions.py: no pyplot, nothing global (see canvas)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .canvas import (
    COLOURS,
    FAINT,
    INK,
    LINES,
    WIDTH,
    as_array,
    colour_bar,
    colour_scale,
    in_order,
    label_axes,
    layout,
    legend,
    need_mapping,
    sheet,
    show_pixels,
    style,
)
from .checks import at_least

THIN = 4  # functions of a unit that are drawn as thin lines
STILL = 1e-4  # relative changes below this are drawn there: what did not move has no logarithm
ROUNDING = 5e-4  # relative: what half precision leaves of a snapshot's numbers


def function_wall(learned, shown: int = 3) -> Figure:
    """All functions of a model, a row for each layer and a panel for each head, over the scores that the head sees.

    learned: `analysis.functions.learned`. Bands hold 50 % and 90 % of a head's functions at each score, thin lines are
    `shown` of them, cut off where they leave the panel: it holds all of them unless the bands would be less than two
    fifths of it. Each panel has a score axis of its own; the vertical one is the same for all.
    """
    x, functions = as_array("x", learned.x, 3), as_array("functions", learned.functions, 5)
    layers, heads = functions.shape[:2]
    wide = min(1.75, (WIDTH - 0.95 - 0.3 * (heads - 1)) / heads)
    figure, panels = sheet(layers, heads, (wide, 0.85), margins=(0.7, 0.25, 0.5, 0.3), gaps=(0.3, 0.45))
    lines = functions.reshape(layers, heads, -1, functions.shape[-1])
    bands = np.quantile(lines, (0.05, 0.25, 0.75, 0.95), axis=2)  # (4, L, h, n)
    some = np.linspace(0, lines.shape[2] - 1, min(at_least("shown", shown, 1), lines.shape[2])).round().astype(int)
    widest, farthest = np.abs(bands[[0, 3]]).max(), np.abs(lines[:, :, some]).max()
    reach = max(1.6 * widest, min(1.05 * farthest, 2.5 * widest)) or 1.0
    for i, axes in enumerate(panels):
        layer, head = divmod(i, heads)
        at, of_head = x[layer, head], bands[:, layer, head]
        drawn = [np.column_stack([at, line]) for line in lines[layer, head, some]]
        axes.add_collection(LineCollection(drawn, colors=FAINT, linewidths=0.5, zorder=1))
        axes.fill_between(at, of_head[0], of_head[3], color=COLOURS[0], alpha=0.22, linewidth=0, zorder=2)
        axes.fill_between(at, of_head[1], of_head[2], color=COLOURS[0], alpha=0.4, linewidth=0, zorder=2)
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.set(xlim=(at[0], at[-1]), ylim=(-reach, reach))
        axes.set_title(f"layer {learned.layers[layer]}, head {learned.heads[head]}", fontsize=9, color=INK, pad=3)
        last, first = layer == layers - 1, head == 0
        label_axes(axes, "score" if last else "", r"$\phi_{pq}$" if first else "")
        axes.tick_params(labelsize=8, labelleft=first, pad=2)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    return figure


def share_bars(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Shares that add to 1, a bar a row, a colour a part: row -> part -> share; all rows have the same parts.

    Raises `ValueError` for shares below 0, or a row that does not add to 1.
    """
    need_mapping("rows", rows)
    parts = list(next(iter(rows.values())))
    values = as_array("rows", [[row.get(part, np.nan) for part in parts] for row in rows.values()], 2)
    if values.min() < -1e-6 or np.abs(values.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError(f"shares must be >= 0 and add to 1 in every row, got sums {values.sum(axis=1).round(3)}.")
    left = 0.2 + 0.08 * max(map(len, rows))
    figure, (axes,) = sheet(1, 1, (5.6 - left / 2, 0.25 * len(rows)), margins=(left, 0.2, 0.5, 0.4))
    colours = ["#c4c4c4", *COLOURS]
    start = np.zeros(len(values))
    for i, part in enumerate(parts):
        colour = colours[i % len(colours)]
        axes.barh(range(len(values)), 100 * values[:, i], 0.75, left=start, color=colour, label=part, edgecolor="white")
        for j, share in enumerate(values[:, i]):
            if share >= 0.06:
                look = dict(ha="center", va="center", fontsize=7.5, color="white" if colour == COLOURS[0] else INK)
                axes.text(start[j] + 50 * share, j, f"{100 * share:.0f}", **look)
        start = start + 100 * values[:, i]
    axes.set_yticks(range(len(values)), list(rows))
    axes.set(xlim=(0, 100), ylim=(len(values) - 0.4, -0.6))
    label_axes(axes, "share of power (%)", "")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(parts), frameon=False, borderaxespad=0.2)
    return figure


def principal_shapes(x, shapes, title: str = "") -> Figure:
    """The few functions of which all are made: `analysis.functions.principal_shapes`, on its grid x (n,)."""
    x, lines = as_array("x", x, 1), as_array("shapes", shapes.shapes, 2)
    if lines.shape[1] != len(x):
        raise ValueError(f"shapes hold {lines.shape[1]} points and x {len(x)}: give the grid that they were made on.")
    figure, (axes,) = sheet(1, 1, (3.9, 1.9), margins=(0.75, 2.2, 0.55, 0.35))
    for i, (line, share) in enumerate(zip(lines, shapes.shares, strict=True)):
        axes.plot(x, line, linewidth=2, label=f"shape {i + 1}: {100 * share:.1f} %", **style(i))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlim(x[0], x[-1])
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    label_axes(axes, "score $S_{kq}$", "shape (mean square 1)")
    legend(axes, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, title="share of power",
           title_fontsize=9, alignment="left")  # fmt: skip
    return figure


def one_unit(x, unit, weights, title: str = "") -> Figure:
    """One unit p: its functions of all keys, the head's scores below them, and maps over the patches beside them.

    Args:
        x (n,): scores; unit: `analysis.functions.unit` on them; weights (n,): where the head's scores fall.
        title: stands above.

    The three functions that follow the score most stand out, by key; bands hold 50 % and 90 % of all at each score, and
    some are thin lines. A map shows patches as they lie in the image; the class token's own number stands below. Maps
    whose tokens are no square grid with a class token are left out.
    """
    x, weights, lines = as_array("x", x, 1), as_array("weights", weights, 1), as_array("curves", unit.curves, 2)
    if not len(x) == len(weights) == lines.shape[1]:
        raise ValueError(f"x, weights and curves must have as many points: {len(x)}, {len(weights)}, {lines.shape[1]}.")
    maps = {name: as_array(name, values, 1) for name, values in unit.maps.items()}
    maps = {name: values for name, values in maps.items() if math.isqrt(len(values) - 1) ** 2 == len(values) - 1 > 0}
    left, side, gap = 2.6, 1.2, 0.75
    figure, _ = layout(1, 1, (left + 3 * (side + gap), 2.3), margins=(0.65, 0.3, 0.55, 0.65), gaps=(0, 0))
    width, height = figure.get_size_inches()
    place = lambda at, up, wide, high: (at / width, up / height, wide / width, high / height)  # noqa: E731
    axes = figure.add_axes(place(0.65, 1.25, left, 1.6), facecolor="white")
    below = figure.add_axes(place(0.65, 0.55, left, 0.55), facecolor="white", sharex=axes)
    for part in (axes, below):
        part.spines[:].set_color(INK)
        part.tick_params(colors=INK, labelsize=8)
    outer = np.quantile(lines, (0.05, 0.25, 0.75, 0.95), axis=0)
    axes.fill_between(x, outer[0], outer[3], color=COLOURS[0], alpha=0.12, linewidth=0)
    axes.fill_between(x, outer[1], outer[2], color=COLOURS[0], alpha=0.22, linewidth=0)
    some = np.linspace(0, len(lines) - 1, min(THIN, len(lines))).round().astype(int)
    thin = [np.column_stack([x, line]) for line in lines[some]]
    axes.add_collection(LineCollection(thin, colors=FAINT, linewidths=0.6))
    mean = lines @ weights / weights.sum()
    follows = ((lines - mean[:, None]) ** 2) @ weights
    for i, q in enumerate(np.argsort(-follows, kind="stable")[:3]):
        name = "class token" if q == 0 and maps else f"{q}"
        axes.plot(x, lines[q], color=COLOURS[i], linestyle=LINES[i], linewidth=2, label=f"q = {name}")
    axes.axhline(0, color=INK, linewidth=0.7)
    axes.set_xlim(x[0], x[-1])
    reach = 1.05 * np.abs(lines).max() or 1.0
    axes.set_ylim(-reach, reach)
    axes.tick_params(labelbottom=False)
    label_axes(axes, "", r"$\phi_{pq}$(score)")
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.1)
    below.fill_between(x, 100 * weights / weights.sum(), step="mid", color="#7a7a7a", linewidth=0)
    below.set_ylim(bottom=0)
    below.yaxis.set_major_locator(MaxNLocator(2))
    label_axes(below, "score $S_{kq}$", "scores (%)")
    # All maps hang in one bare axes, with strips for colour bars: axes are what takes long to draw.
    bare = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), autoscale_on=False)
    bare.set_axis_off()
    for i, (name, values) in enumerate(maps.items()):
        at, up = 0.65 + left + 0.3 + i * (side + gap), 1.4
        grid = math.isqrt(len(values) - 1)
        colours = colour_scale(values, None if name == "follows the score" else True)
        show = dict(cmap=colours.cmap, norm=colours.norm)
        show_pixels(bare, values[1:].reshape(grid, grid), extent=(at, at + side, up, up + side), **show)
        low, high = colours.norm.vmin, colours.norm.vmax
        strip, edge = np.linspace(high, low, 64)[:, None], at + side + 0.1
        show_pixels(bare, strip, extent=(edge, edge + 0.12, up, up + side), **show)
        for value in (low, (low + high) / 2, high):
            level = up + side * (value - low) / (high - low)
            bare.text(edge + 0.16, level, f"{value:.2g}", fontsize=8, color=INK, va="center")
        bare.text(at + side / 2, up + side + 0.07, name, fontsize=9, color=INK, ha="center", va="bottom")
        said = f"class token: {values[0]:+.3f}"
        bare.text(at + side / 2, up - 0.07, said, fontsize=8, color=INK, ha="center", va="top")
    bare.set(xlim=(0, width), ylim=(0, height))
    figure.text(0.1 / width, 1 - 0.12 / height, title, fontsize=10, color=INK, va="top")
    return figure


def motion_figure(motion, layers: Sequence[int] | None = None) -> Figure:
    """How far operators have moved from the start, and how much from one snapshot to the next, layer by layer.

    motion: `analysis.functions.motion`. Functions are whole lines, other parts (W) broken ones; the first layer is
    dark, the last light. layers: their numbers.
    """
    steps = as_array("steps", motion.steps, 1)
    first = next(iter(motion.distance.values()))
    layers = list(range(first.shape[1])) if layers is None else list(layers)
    columns = min(4, len(layers))  # of the legend, which stands above the panels
    rows = -(-len(motion.distance) * len(layers) // columns)
    above = max(0.55, 0.2 + 0.16 * rows)
    figure, panels = sheet(1, 2, (3.0, 1.9), margins=(0.7, 0.15, 0.55, above), gaps=(0.85, 0))
    for axes, values, at in zip(panels, (motion.distance, motion.change), (steps, steps[1:]), strict=True):
        for i, (part, lines) in enumerate(values.items()):
            lines = as_array(part, lines, 2)
            for j, line in enumerate(lines.T):
                look = dict(color=in_order(j, len(layers)), linestyle=LINES[i % len(LINES)], linewidth=1.8)
                name = f"{part}, layer {layers[j]}" if axes is panels[0] else None
                axes.plot(at, line if axes is panels[0] else np.maximum(line, STILL), label=name, **look)
    label_axes(panels[0], "step of training", "distance from the start / start")
    label_axes(panels[1], "step of training", "change since the last snapshot")
    panels[0].set_ylim(bottom=0)
    panels[1].set_yscale("log")
    panels[1].set_ylim(max(STILL, panels[1].get_ylim()[0]), max(3 * ROUNDING, panels[1].get_ylim()[1]))
    panels[1].axhspan(1e-9, ROUNDING, color="#ececec", zorder=0)
    panels[1].annotate("rounding of snapshots", (steps[1], ROUNDING), (2, 2), textcoords="offset points",
                       va="bottom", fontsize=8, color=INK)  # fmt: skip
    panels[1].tick_params(which="both", colors=INK)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    handles, names = panels[0].get_legend_handles_labels()
    look = dict(fontsize=7.5, labelcolor=INK, frameon=False, handlelength=2.6, columnspacing=1.2)
    order = [i * columns + j for j in range(columns) for i in range(rows)]  # row by row
    order = [i for i in order if i < len(names)]
    figure.legend([handles[i] for i in order], [names[i] for i in order], loc="upper center", ncols=columns, **look)
    return figure


def function_history(x, histories: Mapping[str, np.ndarray], steps: Sequence[int]) -> Figure:
    """Functions at several snapshots, dark to light: name -> (T, n) on the grid x (n,), a panel each; steps (T,)."""
    need_mapping("histories", histories)
    x = as_array("x", x, 1)
    figure, panels = sheet(
        1, len(histories), (min(2.4, (WIDTH - 2.4) / len(histories)), 1.9), (0.65, 1.15, 0.55, 0.35), gaps=(0.28, 0)
    )
    stacks = {name: as_array(name, values, 2) for name, values in histories.items()}
    wrong = [name for name, values in stacks.items() if values.shape != (len(steps), len(x))]
    if wrong:
        raise ValueError(f"{wrong[0]!r} must be ({len(steps)}, {len(x)}) for these steps and x, got "
                         f"{stacks[wrong[0]].shape}.")  # fmt: skip
    colours = colour_scale(np.array([0.0, max(steps)]), False)
    colours.set_cmap(ListedColormap(colours.cmap(np.linspace(0, 0.92, 256))))  # its lightest are hard to see as lines
    reach = 1.05 * max(np.abs(values).max() for values in stacks.values()) or 1.0
    for axes, (name, values) in zip(panels, stacks.items(), strict=True):
        shades = colours.to_rgba(np.asarray(steps, dtype=float))
        for line, shade, last in zip(values, shades, np.arange(len(steps)) == len(steps) - 1, strict=True):
            axes.plot(x, line, color=shade, linewidth=2.4 if last else 1.2)
        axes.axhline(0, color=INK, linewidth=0.7)
        axes.set(xlim=(x[0], x[-1]), ylim=(-reach, reach))
        axes.set_title(name, fontsize=9.5, color=INK)
        label_axes(axes, "score $S_{kq}$", r"$\phi_{pq}$(score)" if axes is panels[0] else "")
        axes.tick_params(labelleft=axes is panels[0])
        axes.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
    colour_bar(figure, colours, panels[-1].get_position().bounds, "step of training")
    return figure
