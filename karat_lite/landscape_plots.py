"""Figures of loss landscapes: surfaces that turn, contours with a training's path, profiles, shares, seeds.

Losses are drawn on a logarithmic scale, the same for all models of a figure: a difference of colour or height between
two panels is a difference of loss. Axes of a plane have the same scale for all panels unless they say otherwise.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .analysis.directions import Directions
from .analysis.landscape import Landscape, PathLosses
from .canvas import (
    COLOURS,
    INK,
    LINES,
    POSITIVE,
    as_array,
    label_axes,
    layout,
    legend,
    need_mapping,
    sheet,
    short,
    shown,
)

SMALLEST = 1e-4  # nats: a logarithm has no place for 0
LEVELS = 14
WIDE = 20  # times: from there on one axis in even steps shows the largest value alone
UNITS = {"principal": "principal direction", "random": "random direction", "sharpest": "eigenvector"}


def surface(
    landscapes: Mapping[str, Landscape],
    paths: Mapping[str, PathLosses] | None = None,
    *,
    elevation: float = 35,
    azimuth: float = -60,
    directions: Mapping[str, Directions] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Figure:
    """Loss surfaces side by side, seen from `elevation` degrees above the plane, turned by `azimuth` degrees.

    landscapes: name -> grid; paths: name -> snapshots, drawn over the surface at the loss of their projections, also
    where a hill stands before them; directions: name -> what the axes are, for their labels; bounds: losses at the ends
    of the scale, where figures shall be compared with each other (default: those of the landscapes).
    """
    grids, scale = _checked(landscapes, paths, bounds)
    columns = len(grids)
    wide = min(4.6, 8.1 / columns)
    figure, places = layout(1, columns, (wide, 3.7), margins=(0.05, 0.85, 0.1, 0.42), gaps=(0.05, 0))
    for place, (name, (alphas, betas, loss)) in zip(places, grids.items(), strict=True):
        axes = figure.add_axes(place, projection="3d", computed_zorder=False, facecolor="white")
        # What is beyond the bounds is cut off there, or it would leave the box.
        heights, across = np.log10(loss.clip(scale.norm.vmin, scale.norm.vmax)), np.meshgrid(alphas, betas)
        # A facet has the colour of its corners' mean, on the scale's logarithmic axis: one that the bar beside it has.
        facets = (heights[1:, 1:] + heights[:-1, :-1] + heights[1:, :-1] + heights[:-1, 1:]) / 4
        colours = scale.cmap(scale.norm(10**facets))
        axes.plot_surface(*across, heights, rstride=1, cstride=1, facecolors=colours, shade=False, linewidth=0.25,
                          edgecolor="#ffffff60", antialiased=True)  # fmt: skip
        if paths:
            at, up = paths[name].coordinates, np.log10(np.maximum(paths[name].projected, SMALLEST))
            axes.plot(at[:, 0], at[:, 1], up, color=COLOURS[1], linewidth=1.6, marker="o", markersize=3, zorder=5)
            axes.plot(at[-1:, 0], at[-1:, 1], up[-1:], "*", color=COLOURS[1], markersize=11, markeredgecolor="white",
                      zorder=6)  # fmt: skip
        _look(axes, elevation, azimuth, np.log10([scale.norm.vmin, scale.norm.vmax]))
        for i, put in enumerate((axes.set_xlabel, axes.set_ylabel)):
            put(_axis_name((directions or {}).get(name), i, brief=True), fontsize=8.5, color=INK, labelpad=-2)
        axes.set_title(name, fontsize=10, color=INK, y=1.06)
    _loss_bar(figure, scale, (places[-1][0], 0.17, places[-1][2], 0.66))
    return figure


def _look(axes, elevation: float, azimuth: float, heights) -> None:
    """How a 3-D panel is seen: angle, ticks in nats on its logarithmic height, quiet panes."""
    axes.view_init(elev=elevation, azim=azimuth)
    axes.set_box_aspect((1, 1, 0.72), zoom=0.92)
    axes.set_zlim(*heights)
    axes.zaxis.set_major_locator(FixedLocator(np.log10(_round_losses(*10.0**heights))))
    axes.zaxis.set_major_formatter(FuncFormatter(lambda z, _: f"{10**z:.3g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 1))
        axis.line.set_color(INK)
        axis._axinfo["grid"].update(color="#dddddd", linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=7.5, pad=-2)


def contours(
    landscapes: Mapping[str, Landscape],
    paths: Mapping[str, PathLosses] | None = None,
    *,
    directions: Mapping[str, Directions] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Figure:
    """The same from above: equal loss, equal colour; the path from its first snapshot (ring) to its last (star).

    Arguments as in `surface`. With `directions`, an axis says what share of the squared distances it explains.
    """
    grids, scale = _checked(landscapes, paths, bounds)
    columns = len(grids)
    side = 3.2 if columns > 1 else 4.0
    gap = 0.95
    figure, panels = sheet(1, columns, (side, side), margins=(0.75, 0.95, 0.6, 0.35), gaps=(gap, 0))
    levels = np.geomspace(scale.norm.vmin, scale.norm.vmax, LEVELS)
    for axes, (name, (alphas, betas, loss)) in zip(panels, grids.items(), strict=True):
        axes.contourf(alphas, betas, loss, levels, cmap=scale.cmap, norm=scale.norm, extend="both")
        axes.contour(alphas, betas, loss, levels, colors="white", linewidths=0.5, alpha=0.7)
        if paths:
            at = paths[name].coordinates
            axes.plot(at[:, 0], at[:, 1], color=COLOURS[1], linewidth=1.6, marker="o", markersize=3.5)
            ring = dict(markerfacecolor="none", markeredgecolor=COLOURS[1], markeredgewidth=1.6)
            axes.plot(*at[0, :2], "o", markersize=9, **ring)
        end = paths[name].coordinates[-1] if paths else (0.0, 0.0)
        axes.plot(*end[:2], "*", color=COLOURS[1], markersize=13, markeredgecolor="white")
        axes.set(xlim=(alphas[0], alphas[-1]), ylim=(betas[0], betas[-1]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        kind = (directions or {}).get(name)
        axes.set_xlabel(_axis_name(kind, 0), fontsize=10, color=INK)
        axes.set_ylabel(_axis_name(kind, 1), fontsize=10, color=INK, labelpad=2)
        axes.set_title(name, fontsize=10, color=INK)
    _loss_bar(figure, scale, panels[-1].get_position().bounds)
    return figure


def profiles(x, losses: Mapping[str, Sequence], across: str = "distance", highlight: Sequence[str] = ()) -> Figure:
    """The loss along lines through a model: name -> (n, A), one thin line a direction and a thick one for their median.

    x: (A,) where on the line; across: what x counts. Names in `highlight` are drawn as thick lines, one a direction.
    """
    need_mapping("losses", losses)
    x = as_array("x", x, 1)
    figure, (axes,) = sheet(1, 1, (5.6, 3.0), margins=(0.75, 0.15, 0.6, 0.1 + 0.22 * -(-len(losses) // 2)))
    axes.set_yscale("log")
    for i, (name, lines) in enumerate(losses.items()):
        lines = np.maximum(np.atleast_2d(as_array(f"losses of {name!r}", lines, (1, 2))), SMALLEST)
        if lines.shape[1] != len(x):
            raise ValueError(f"losses of {name!r} have {lines.shape[1]} points a line, x has {len(x)}.")
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=LINES[i % len(LINES)])
        if len(lines) > 1 and name not in highlight:
            axes.plot(x, lines.T, color=style["color"], linewidth=0.7, alpha=0.35)
            axes.plot(x, np.median(lines, axis=0), linewidth=2.2, label=f"{name} (median of {len(lines)})", **style)
        else:
            for number, line in enumerate(lines):
                axes.plot(x, line, linewidth=2.2, label=name if number == 0 else None, **style)
    label_axes(axes, across, "loss (nats)")
    axes.tick_params(which="both", colors=INK)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator(_round_losses(low, high)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    # Above the axes, where it hides no line.
    legend(axes, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, borderaxespad=0.1)
    return figure


def explained_shares(shares: Mapping[str, Sequence], components: int = 8) -> Figure:
    """What share of the squared distances each principal direction explains: name -> shares, largest first."""
    need_mapping("shares", shares)
    figure, (axes,) = sheet(1, 1, (5.6, 2.8), margins=(0.75, 0.15, 0.6, 0.15))
    for i, (name, values) in enumerate(shares.items()):
        values = as_array(f"shares of {name!r}", values, 1)
        if values.min() < -1e-9 or values.sum() > 1 + 1e-6:
            raise ValueError(f"shares of {name!r} must be positive and sum to at most 1, got {values.sum():.3g}.")
        style = dict(color=COLOURS[i % len(COLOURS)], linestyle=LINES[i % len(LINES)], marker="os^Dv"[i % 5])
        shown = 100 * np.maximum(values[:components], 1e-6)
        label = f"{name}: {100 * values[:2].sum():.0f} % in the first two"
        axes.plot(np.arange(1, len(shown) + 1), shown, linewidth=1.8, markersize=5, label=label, **style)
    axes.set_yscale("log")
    axes.set_ylim(0.1, 100)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.tick_params(which="both", colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, "principal direction", "share of squared distance (%)")
    legend(axes, loc="upper right")
    return figure


def sharpness(results: Mapping) -> Figure:
    """Every measure of `landscape_table` that all runs have as a panel: a mark for every seed, a bar at a model's mean.

    Values that differ more than `WIDE` times stand on a logarithmic axis, the bar at their geometric mean.
    """
    need_mapping("results", results)
    runs = results.get("runs") or []
    if not runs:
        raise ValueError("results hold no runs, there is nothing to draw: make them with analysis.landscape_table.")
    models = list(dict.fromkeys(run["model"] for run in runs))
    # Some tables name measures of the path for runs that kept no snapshots.
    measures = [(key, label) for key, label in results["measures"].items() if all(key in run for run in runs)]
    if not measures:
        raise ValueError(f"no measure that results name is there for all runs: {', '.join(results['measures'])}.")
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    figure, panels = sheet(rows, columns, (2.05, 0.32 * len(models) + 0.25), margins=(1.0, 0.15, 0.5, 0.3),
                           gaps=(0.35, 0.75))  # fmt: skip
    for axes in panels[len(measures) :]:
        axes.set_axis_off()
    for place, (axes, (measure, label)) in enumerate(zip(panels, measures, strict=False)):
        low, high = min(run[measure] for run in runs), max(run[measure] for run in runs)
        wide = 0 < WIDE * low < high
        for i, model in enumerate(models):
            values = as_array(measure, [run[measure] for run in runs if run["model"] == model], 1)
            colour = COLOURS[i % len(COLOURS)]
            mean = np.exp(np.log(values).mean()) if wide else values.mean()
            axes.plot([mean] * 2, [i - 0.28, i + 0.28], color=colour, linewidth=2)
            height = i + np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [i]
            axes.plot(values, height, "os^Dv"[i % 5], color=colour, markersize=6,
                      markeredgecolor="white", alpha=0.9)  # fmt: skip
        axes.set_ylim(len(models) - 0.5, -0.5)
        names = [shown(model) if place % columns == 0 else "" for model in models]
        axes.set_yticks(range(len(models)), names)
        axes.tick_params(axis="y", length=0)
        axes.set_title(label, fontsize=9, color=INK, loc="left")
        if wide:
            axes.set(xscale="log", xlim=(low / 1.5, 1.5 * high))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        elif low > 0.5 * high > 0:  # far from 0, which marks do not need
            axes.set_xlim(low - 0.3 * (high - low or low), high + 0.3 * (high - low or high))
        else:
            axes.set_xlim(min(0.0, 1.1 * low), 1.15 * high if high > 0 else 1)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        label_axes(axes, "", "")
        axes.grid(visible=False, axis="y")
    return figure


# ---- shared ----------------------------------------------------------------------------------------------------------


def _checked(landscapes, paths, bounds) -> tuple[dict, ScalarMappable]:
    """name -> (alphas, betas, loss), and one logarithmic colour scale for all of them."""
    need_mapping("landscapes", landscapes)
    grids = {}
    for name, (alphas, betas, loss) in landscapes.items():
        alphas, betas = as_array(f"alphas of {name!r}", alphas, 1), as_array(f"betas of {name!r}", betas, 1)
        loss = as_array(f"loss of {name!r}", loss, 2)
        if loss.shape != (len(betas), len(alphas)) or min(loss.shape) < 2:
            raise ValueError(
                f"loss of {name!r} must be (betas, alphas) = {(len(betas), len(alphas))}, at least 2 x 2, got "
                f"{loss.shape}."
            )
        if loss.min() < 0:
            raise ValueError(f"loss of {name!r} is negative ({loss.min():.3g}): a cross-entropy is not.")
        grids[name] = alphas, betas, np.maximum(loss, SMALLEST)
    for name in grids if paths else ():
        if name not in paths:
            raise ValueError(f"landscapes name {', '.join(grids)}, but paths {', '.join(paths)}: give one for each.")
    if bounds is None:
        bounds = min(g[2].min() for g in grids.values()), max(g[2].max() for g in grids.values())
    low, high = max(bounds[0], SMALLEST), bounds[1]
    if not low <= high < np.inf:
        raise ValueError(f"bounds must be two losses, the lower one first, got {bounds}.")
    return grids, ScalarMappable(LogNorm(low, max(high, 1.01 * low)), POSITIVE)


def _axis_name(directions: Directions | None, i: int, brief: bool = False) -> str:
    """What an axis counts."""
    if directions is None:
        return "αβ"[i]
    if directions.explained is not None:
        share = f"{100 * directions.explained[i]:.0f} %"
        return f"direction {i + 1} ({share})" if brief else f"principal direction {i + 1} ({share} of squared distance)"
    name = f"{UNITS[directions.kind]} {i + 1}"
    return name if brief or directions.kind != "random" else f"{name} (in filter norms)"


def _round_losses(low: float, high: float) -> np.ndarray:
    """A few round losses within these bounds, of one digit where there are, for ticks of a logarithmic scale."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = np.array([digit * decade for decade in decades for digit in digits])
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) >= 3:
            return ticks
    ticks = MaxNLocator(4).tick_values(low, high)  # too narrow for losses of one digit
    return ticks[(ticks >= low) & (ticks <= high)]


def _loss_bar(figure: Figure, scale: ScalarMappable, place) -> None:
    """The bar of the common colour scale, right of a place, with plain numbers beside it."""
    left, bottom, width, height = place
    inch = 1 / figure.get_size_inches()[0]
    axes = figure.add_axes((left + width + 0.12 * inch, bottom, 0.14 * inch, height))
    bar = figure.colorbar(scale, cax=axes)
    bar.set_ticks(_round_losses(scale.norm.vmin, scale.norm.vmax))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
    bar.set_label("loss (nats)", fontsize=9, color=INK)
    bar.outline.set_edgecolor(INK)
    axes.tick_params(colors=INK, labelsize=8)
