"""Figures from plain arrays: every function returns a `matplotlib.figure.Figure` and touches no global state.

Arrays may be NumPy arrays, tensors (on any device, with or without a graph) or nested lists. Nothing goes through
pyplot, so a figure is shown once, where it is returned, and callbacks in other threads may draw.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullLocator

from .canvas import (
    COLOURS,
    FAINT,
    INK,
    WIDTH,
    apart,
    as_array,
    as_grid,
    as_picture,
    as_shares,
    colour_bar,
    colour_scale,
    hang,
    in_order,
    label_axes,
    legend,
    multiple_of_pi,
    need_mapping,
    sheet,
    short,
    show_pixels,
    shown,
    stretch,
    style,
    wall,
)
from .checks import at_least
from .history import History

GHOST = 0.4  # how much of the grey image shows through the colours laid over it


def training_curves(histories: Mapping[str, History | Sequence[Mapping]]) -> Figure:
    """Loss and test accuracy per epoch, one colour and line style a model; on the left, training losses are thin.

    histories: name -> `History` or its list of records (epoch, train_loss, test_loss, test_accuracy, ...).
    """
    need_mapping("histories", histories)
    figure, (loss, accuracy) = sheet(1, 2, (3.75, 2.8), margins=(0.65, 0.1, 0.55, 0.12), gaps=(0.75, 0))
    for i, (name, history) in enumerate(histories.items()):
        records = history.records if isinstance(history, History) else history
        wanted = ("epoch", "train_loss", "test_loss", "test_accuracy")
        if not records or any(key not in record for record in records for key in wanted):
            raise ValueError(f"the history of {name!r} must hold at least one record with {', '.join(wanted)}.")
        epoch, train, test, right = ([record[key] for record in records] for key in wanted)
        right = [100 * share for share in right]
        dot = dict(marker="o", markersize=3.5) if len(epoch) <= 20 else {}
        loss.plot(epoch, train, linewidth=1, alpha=0.75, label=f"{name}, training", **style(i))
        loss.plot(epoch, test, linewidth=2, label=f"{name}, test", **style(i), **dot)
        accuracy.plot(epoch, right, linewidth=2, label=f"{name}: {right[-1]:.1f} % at the end", **style(i), **dot)
    loss.set_ylim(bottom=0)
    for axes, label in ((loss, "cross-entropy (nats)"), (accuracy, "test accuracy (%)")):
        label_axes(axes, "epoch", label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        legend(axes, loc="best")
    return figure


def twins_accuracy(results: Mapping) -> Figure:
    """Test accuracy of every seed as a dot, and the mean of each model as a bar through its dots.

    results: what `python -m karat_lite.train --results` wrote, or name -> accuracies in [0, 1].
    """
    need_mapping("results", results)
    groups: dict[str, list] = {}
    for run in results.get("runs", ()):
        groups.setdefault(shown(run["attention"]), []).append(run["accuracy"])
    if "runs" in results:
        need_mapping("runs of these results", groups)
    groups = {name: as_shares(f"accuracies of {name!r}", values) for name, values in (groups or results).items()}
    name_width = 0.25 + 0.085 * max(map(len, groups))
    figure, (axes,) = sheet(1, 1, (4.5, 0.75 * len(groups)), margins=(name_width, 0.1, 0.55, 0.1))
    for i, values in enumerate(groups.values()):
        colour, mean = COLOURS[i % len(COLOURS)], 100 * values.mean()
        spread = f" ± {100 * values.std(ddof=1):.2f}" if len(values) > 1 else ""
        height = i + np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [i]
        axes.plot([mean, mean], [i - 0.3, i + 0.3], color=colour, linewidth=2)
        axes.plot(100 * values, height, "os^Dv"[i % 5], color=colour, markersize=7, markeredgecolor="white")
        note = f"{mean:.2f}{spread} % ({len(values)} seed{'s' * (len(values) > 1)})"
        axes.annotate(note, (mean, i - 0.34), ha="center", va="bottom", color=INK, fontsize=9)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.75)
    axes.margins(x=0.25)
    axes.set_xlim(max(0, axes.get_xlim()[0]), min(100.5, axes.get_xlim()[1]))
    label_axes(axes, "test accuracy (%)", "")
    return figure


def images(images, titles: Sequence[str] | None = None, columns: int = 8) -> Figure:
    """A gallery. images (n, 3, H, W), or a list of (3, H, W): float in [0, 1] or uint8; pixels stay square blocks."""
    pictures = [as_picture(f"images[{i}]", image) for i, image in enumerate(images)]
    columns = min(at_least("columns", columns, 1), len(pictures))
    if not pictures or (titles is not None and len(titles) != len(pictures)):
        raise ValueError(f"got {len(pictures)} images and {'no' if titles is None else len(titles)} titles: expected "
                         "at least one image, and as many titles as images or none.")  # fmt: skip
    rows = -(-len(pictures) // columns)
    side = min(1.6, WIDTH / columns)
    lines = 0 if titles is None else max(str(title).count("\n") + 1 for title in titles)
    top = 0.06 + 0.2 * lines
    figure, axes, places = wall(rows, columns, (side, side), margins=(0.02, 0.02, 0.02, top), gaps=(0.06, top))
    for picture, title, place in zip(pictures, titles or [""] * len(pictures), places, strict=False):
        hang(axes, picture, place, str(title))
    return figure


def matrices(matrices: Mapping, signed: bool | None = None) -> Figure:
    """N x N scores or activated maps: title -> (N, N), side by side; or title -> (h, N, N), a row with its heads.

    A title's heads share one colour bar. signed: a diverging map with white at 0; None takes it where values are
    negative. Rows are query tokens k, columns key tokens q.
    """
    need_mapping("matrices", matrices)
    stacks = {}
    for title, values in matrices.items():
        values = as_array(f"matrix {title!r}", values, (2, 3))
        if values.shape[-1] != values.shape[-2]:
            raise ValueError(f"matrix {title!r} must be (N, N) or (h, N, N), got shape {values.shape}.")
        stacks[title] = values.reshape(-1, *values.shape[-2:])
    heads = max(len(stack) for stack in stacks.values())
    rows, columns = (len(stacks), heads) if heads > 1 else (1, len(stacks))
    gap = 0.12 if heads > 1 else 1.1  # one bar at the end of a line of heads, or one behind each matrix
    side = min(2.8, (WIDTH - 1.4 - gap * (columns - 1)) / columns)
    alike = len({stack.shape[-1] for stack in stacks.values()}) == 1
    gaps = (gap, 0.35 if alike else 0.8)
    if side < 0.3:
        raise ValueError(f"{columns} matrices side by side leave {max(side, 0):.1f} inches for each: draw fewer.")
    figure, grid = sheet(rows, columns, (side, side), margins=(0.6, 0.8, 0.55, 0.3), gaps=gaps)
    for i, (title, stack) in enumerate(stacks.items()):
        panels = grid[i * columns : (i + 1) * columns] if heads > 1 else grid[i : i + 1]
        colours = colour_scale(stack, signed)
        for head, axes in enumerate(panels):
            if head >= len(stack):
                axes.set_axis_off()
                continue
            show_pixels(axes, stack[head], cmap=colours.cmap, norm=colours.norm)
            axes.set_title(f"{title}, head {head}" if len(stack) > 1 else title, fontsize=10, color=INK)
            # The inner pictures share the outer ones' numbers.
            lowest, first = heads == 1 or i == rows - 1 or not alike, head == 0
            label_axes(axes, "key token q" if lowest else "", "query token k" if axes in grid[::columns] else "")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True) if lowest else NullLocator())
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True) if first else NullLocator())
        colour_bar(figure, colours, panels[-1].get_position().bounds, "")
    return figure


def attention_over_image(
    image,
    rows,
    grid: int | tuple[int, int],
    titles: Sequence[str] | None = None,
    signed: bool | None = None,
    label: str | Mapping[str, str] = "weight of a patch",
) -> Figure:
    """The image, and for each head the class token's row over it: strong colour where the weight is large.

    Args:
        image: (3, H, W), float in [0, 1] or uint8.
        rows: (h, n) or (n,): the row of the map at k = 0 without its own entry, `maps[0, :, 0, 1:]`; or model's name ->
            such rows, one line of pictures a model. Each line has a colour scale of its own.
        grid: patches per side, or (down, across); n = down * across.
        titles: one for each head (default "head 0", ...).
        signed: diverging colours, white (clear) at 0; None takes them where weights are negative.
        label: what the colour bars measure; with several lines of pictures also name -> label.
    """
    picture = as_picture("image", image)
    down, across = as_grid(grid)
    models = {}
    for name, values in (rows if isinstance(rows, Mapping) else {"": rows}).items():
        values = np.atleast_2d(as_array("rows" if name == "" else f"rows of {name!r}", values, (1, 2)))
        if values.shape[1] != down * across:
            own = " (take [..., 1:]: the class token's own entry is no patch)" * (values.shape[1] == down * across + 1)
            raise ValueError(f"{values.shape[1]} weights a row do not fill a grid of {down} x {across} patches{own}.")
        models[name] = values
    need_mapping("rows", models)
    heads = max(map(len, models.values()))
    titles = [f"head {head}" for head in range(heads)] if titles is None else list(titles)
    if len(titles) != heads:
        raise ValueError(f"{len(titles)} titles for {heads} heads.")
    labels = dict.fromkeys(models, label) if isinstance(label, str) else label
    if missing := [name for name in models if name not in labels]:
        raise ValueError(f"label names {', '.join(labels)}, but rows also {', '.join(missing)}: give a label for each.")

    side = min(2.0, (WIDTH - 1.2) / (heads + 1) - 0.06)
    margins = (0.3 if any(models) else 0.05, 0.9, 0.08, 0.3)
    figure, axes, places = wall(len(models), heads + 1, (side, side), margins, gaps=(0.06, 0.12))
    grey = 0.3 + 0.7 * (picture @ np.array([0.299, 0.587, 0.114]))[..., None]  # how bright it looks, kept off black
    for i, (name, values) in enumerate(models.items()):
        line = places[i * (heads + 1) : (i + 1) * (heads + 1)]
        colours = colour_scale(values, signed)
        weights = colours.cmap(colours.norm(values.reshape(-1, down, across)))[..., :3]
        over = [(1 - GHOST) * stretch(head, grey.shape) + GHOST * grey for head in weights]
        for drawn, title, place in zip([picture, *over], ["image", *titles], line, strict=False):
            hang(axes, drawn, place, title if i == 0 else "")
        left, bottom, _, height = line[0]
        middle = dict(rotation=90, ha="center", va="center", fontsize=10, color=INK)
        axes.text(left / 2, bottom + height / 2, name, **middle)
        colour_bar(figure, colours, line[-1], labels[name])
    return figure


def learned_functions(
    x, curves, labels: Sequence[str] | None = None, title: str = "", scores=None, symbol: str = r"\phi_{pq}"
) -> Figure:
    """Learned functions phi_pq(x) of one head: those with a label stand out, the others are thin lines behind them.

    Args:
        x: (n,) scores at which the curves are given.
        curves: one or more arrays (n,).
        labels: one for each curve, "" for a thin line; None makes all of them thin.
        scores: where the scores of real images fall, any shape: their histogram stands below, and the range that holds
            99 % of them is white in the picture. Outside it the function was hardly ever asked.
        symbol: what the functions are called on the vertical axis, in TeX.
    """
    x = as_array("x", x, 1)
    if len(x) < 2 or (np.diff(x) <= 0).any():
        raise ValueError("x must hold at least two scores in rising order, such as torch.linspace(-3, 3, 300).")
    curves = [as_array(f"curves[{i}]", curve, 1) for i, curve in enumerate(curves)]
    labels = [""] * len(curves) if labels is None else list(labels)
    if not curves or len(labels) != len(curves) or any(len(curve) != len(x) for curve in curves):
        raise ValueError(
            f"expected at least one curve, each with the {len(x)} points of x, and a label for each: got "
            f"{len(curves)} curves of {sorted({len(curve) for curve in curves})} points and {len(labels)} labels."
        )
    named = [label for label in labels if label]
    # Above the lines, where the legend hides none: beside the title while it fits there, else in rows over it.
    entry = 0.62 + 0.075 * max(map(len, named), default=0)
    beside = len(named) * entry + 0.075 * len(title) <= 6.1
    columns = len(named) if beside else max(1, int(6.1 / entry))
    above = 0 if beside else 0.05 + 0.19 * -(-len(named) // columns)
    margins = (0.7, 0.15, 0.55, 0.35 + above)
    if scores is None:
        figure, (axes,) = sheet(1, 1, (6, 2.8), margins)
        below = axes
    else:
        figure, (axes, below) = sheet(2, 1, (6, (2.8, 0.65)), margins, gaps=(0, 0.12))
        below.sharex(axes)
        axes.tick_params(labelbottom=False)
        scores = as_array("scores", scores, None).ravel()
        low, high = np.quantile(scores, (0.005, 0.995))
        axes.set_facecolor("#ececec")
        axes.axvspan(low, high, color="white", zorder=0)
        counts, edges = np.histogram(scores, bins=60, range=(x[0], x[-1]))
        below.stairs(100 * counts / len(scores), edges, fill=True, color="#7a7a7a")
        label_axes(below, "", "scores (%)")
        below.yaxis.set_major_locator(MaxNLocator(2))
    axes.axhline(0, color=INK, linewidth=0.8)
    styles = map(style, range(len(named)))
    for curve, label in zip(curves, labels, strict=True):
        if label:
            axes.plot(x, curve, linewidth=2.2, label=label, **next(styles))
        else:
            axes.plot(x, curve, color=FAINT, linewidth=0.8, zorder=1.5)
    if scores is not None:  # a function that shoots up where it is hardly ever asked would leave all else flat
        there = np.concatenate([curve[(x >= low) & (x <= high)] for curve in curves])
        if there.size and np.ptp(curves) > 10 * np.ptp(there) > 0:
            axes.set_ylim(there.min() - 0.08 * np.ptp(there), there.max() + 0.25 * np.ptp(there))
    if named:
        at = dict(loc="lower right", bbox_to_anchor=(1, 1 if beside else 1 + 0.25 / 2.8))
        legend(axes, **at, ncols=columns, frameon=False, borderaxespad=0.1)
    label_axes(axes, "", f"${symbol}$(score)")
    label_axes(below, "score $S_{kq}$", below.get_ylabel())
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlim(x[0], x[-1])
    turns = (x[-1] - x[0]) / (2 * np.pi)
    if 0.9 <= turns <= 5 and "phi" in symbol:  # a Fourier unit repeats after 2 pi: let the ticks show it
        below.xaxis.set_major_locator(MultipleLocator(np.pi / 2 if turns < 1.6 else np.pi))
        below.xaxis.set_major_formatter(FuncFormatter(multiple_of_pi))
    return figure


def costs(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Ways of doing one thing, dark to light, and a panel for every quantity that they cost, on a logarithmic axis.

    rows: name -> quantity with its unit -> value. Beside a panel stands each value, and how many times the first row's
    it is (where that is not 1 anyway).
    """
    need_mapping("rows", rows)
    names, quantities = list(rows), list(next(iter(rows.values())))
    values = as_array("rows", [[rows[name].get(quantity, np.nan) for quantity in quantities] for name in names], 2)
    if values.min() <= 0:
        raise ValueError(f"a logarithmic axis has no place for {values.min():g}: values must be positive.")
    said = [[short(v) for v in values[0]]]
    for row in values[1:]:
        ratios = ["" if base == 1 else f" ({short(v / base)}x)" for v, base in zip(row, values[0], strict=True)]
        said.append([short(v) + ratio for v, ratio in zip(row, ratios, strict=True)])
    left, words = 0.2 + 0.078 * max(map(len, names)), max(1.15, 0.12 + 0.07 * max(len(w) for row in said for w in row))
    panel = ((WIDTH - left) / len(quantities) - words, 0.1 + 0.3 * len(names))
    figure, panels = sheet(1, len(quantities), panel, margins=(left, words, 0.55, 0.1), gaps=(words, 0))
    for i, (axes, column) in enumerate(zip(panels, values.T, strict=True)):
        axes.set_xscale("log")
        low, high = np.log10(column.min()), np.log10(column.max())
        room = 0.12 * max(0.5, high - low)
        axes.set_xlim(10 ** (low - room), 10 ** (high + room))
        axes.axvline(column[0], color="#cccccc", linewidth=1, zorder=0)  # a stem's length is the ratio to the first row
        for j, value in enumerate(column):
            axes.plot([column[0], value], [j, j], color="#cccccc", linewidth=1.5, zorder=1)
            axes.plot(value, j, "o", color=in_order(j, len(names)), markersize=7)
            beside = dict(xycoords=("axes fraction", "data"), va="center", color=INK, fontsize=8.5)
            axes.annotate(said[j][i], (1.04, j), **beside)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names), fontsize=9.5)
        axes.tick_params(axis="y", length=0)
        label_axes(axes, quantities[i], "")
        axes.xaxis.set_label_coords(0.5, -0.34 / panel[1])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high - low < 1.3 else LogLocator(numticks=4))
        if high - low < 0.6:  # fewer than two of those: even steps, and no more than there is room for
            axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        if high - low < 1.3:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(visible=False, axis="y")
    return figure


def roofline(points: Mapping[str, tuple[float, float]], flops: float, bytes: float) -> Figure:
    """What a machine can do at most, and what was reached: operations per byte across, operations per second up.

    points: name -> (operations per byte visited, operations per second). flops, bytes: the limits, per second. A name
    stands at the right, at its point's height or as near as there is room, with a thin line to the point. Colours go
    from dark to light in the order of the points, as in `costs`.
    """
    need_mapping("points", points)
    dots = as_array("points", list(points.values()), 2)
    if dots.min() <= 0 or min(flops, bytes) <= 0:
        raise ValueError("a logarithmic axis has no place for 0: points and limits must be positive.")
    width, height = 5.4, 3.7
    figure, (axes,) = sheet(1, 1, (width, height), margins=(0.75, 0.3 + 0.085 * max(map(len, points)), 0.55, 0.15))
    ridge = flops / bytes
    across = np.array([min(dots[:, 0].min(), ridge) / 2, max(dots[:, 0].max(), ridge) * 2])
    up = np.array([min(dots[:, 1].min(), across[0] * bytes) / 2, max(flops, dots[:, 1].max()) * 2.2]) / 1e9
    axes.set(xscale="log", yscale="log", xlim=across, ylim=up)
    axes.tick_params(which="both", colors=INK)
    roof = np.array([across[0], ridge, across[1]])
    axes.plot(roof, np.minimum(roof * bytes, flops) / 1e9, color=INK, linewidth=2)
    look = dict(textcoords="offset points", fontsize=9, color=INK)
    axes.annotate(f"matrix products: {short(flops / 1e9)} G/s", (ridge, flops / 1e9), (2, 5), **look)
    slope = np.degrees(np.arctan((height / np.log10(up[1] / up[0])) / (width / np.log10(across[1] / across[0]))))
    start = across[0] * 1.2
    axes.annotate(f"memory: {short(bytes / 1e9)} GB/s", (start, start * bytes / 1e9), (-3, 5), rotation=slope,
                  rotation_mode="anchor", **look)  # fmt: skip
    order = np.argsort(-dots[:, 1])
    height_of = lambda value: np.log10(value / 1e9 / up[0]) / np.log10(up[1] / up[0])  # noqa: E731
    heights = apart(height_of(dots[order, 1]), gap=0.068, top=height_of(flops) - 0.03)
    for j, at in zip(order, heights, strict=True):
        colour, line = in_order(j, len(points)), dict(arrowstyle="-", linewidth=0.8, shrinkA=0, relpos=(0, 0.5))
        axes.annotate(list(points)[j], dots[j] / (1, 1e9), (1.03, at), textcoords="axes fraction", va="center",
                      fontsize=9, color=INK, arrowprops=line | {"color": colour})  # fmt: skip
        axes.plot(dots[j, 0], dots[j, 1] / 1e9, "o", color=colour, markersize=8, markeredgecolor="white", zorder=4)
    label_axes(axes, "operations per byte visited", "operations per second (billions)")
    return figure
