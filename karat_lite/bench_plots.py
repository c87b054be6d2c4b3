"""Figures of benchmarks: time against N and G, ratios and memory of whole models, what limits a kernel."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from .canvas import COLOURS, INK, LINES, as_array, label_axes, legend, need_mapping, sheet

# Softmax in greys, KArAt in colours: the eye sorts them before it reads.
LOOKS = {
    "softmax": ("softmax, eager", INK, LINES[0], "o"),
    "sdpa": ("softmax, fused", "#8a8a8a", LINES[0], "s"),
    "triton": ("KArAt, fused kernel", COLOURS[5], LINES[0], "D"),
    "recompute": ("KArAt, recompute", COLOURS[0], LINES[0], "^"),
    "contraction": ("KArAt, contraction", COLOURS[2], LINES[1], "v"),
    "features": ("KArAt, features", COLOURS[3], LINES[3], "P"),
    "broadcast": ("KArAt, broadcast", COLOURS[1], LINES[2], "X"),
}
BOTH, STEP = "layer forward and backward", "model training step"
BAR = 0.22  # inches of a bar's place
DOUBTFUL = 5  # percent of the machine: above, the figure itself says that the run was disturbed
MODELS = {"vit_pico": "ViT-Pico", "vit_tiny": "ViT-Tiny", "vit_small": "ViT-Small", "vit_base": "ViT-Base"}


def bench_figure(results: Mapping) -> Figure:
    """Four panels: time against N and against G (one layer), time and memory of training steps (whole models).

    results: what `python -m karat_lite.bench --results` wrote. Where bfloat16 and compiled models were measured, those
    are shown. Raises `ValueError` for results without rows; a panel whose part was left out says so.
    """
    need_mapping("results", results)
    rows = results.get("rows") or []
    if not rows:
        raise ValueError("results hold no rows, there is nothing to draw: give the benchmark more --seconds.")
    dtype = "bfloat16" if any(row["dtype"] == "bfloat16" for row in rows) else "float32"
    rows = [row for row in rows if row["dtype"] == dtype]
    model, speed = _groups(rows, {"training step": (STEP, "ratio"), "inference": ("model inference", "ratio")})
    other, memory = _groups(
        rows, {"peak of a training step": (STEP, "peak_bytes"), "kept for the backward pass": (STEP, "kept_bytes")}
    )
    bars = max(sum(1.5 + len(mine) for *_, mine in groups) for groups in (speed, memory, [("", "", [None] * 6)]))
    figure, panels = sheet(2, 2, (3.6, (3.3, BAR * bars)), margins=(0.75, 1.8, 0.6, 0.75), gaps=(2.6, 1.0))
    _lines(panels[0], [row for row in rows if row["part"] == "tokens" and row["what"] == BOTH], "N")
    _lines(panels[1], [row for row in rows if row["part"] == "grids" and row["what"] == BOTH], "G")
    _bars(panels[2], f"Time: {model}", speed, 1, "time, eager softmax = 1", ".2f")
    _bars(panels[3], f"Memory: {other}", memory, 1e6, "memory (MB)", ",.0f")
    width, height = figure.get_size_inches()
    threads = f"{results['threads']} thread{'s' * (results['threads'] > 1)}"
    said = f"{results['machine']}, {threads}, {dtype}; medians, and quartiles as bands and lines"
    if (results.get("others") or 0) > DOUBTFUL:
        said += f"; other processes took {results['others']:.0f} % of the machine"
    figure.text(0.15 / width, 1 - 0.2 / height, said, fontsize=9, color=INK, va="center")
    return figure


def _lines(axes, rows: Sequence[Mapping], axis: str) -> None:
    """Time against N or G, a line for each competitor, its name at the line's end; quartiles as a band."""
    if not rows:
        return _nothing(axes)
    first = rows[0]
    ends = []
    xs = sorted({row[axis] for row in rows if row[axis] is not None})
    for name, (label, colour, line, marker) in LOOKS.items():
        mine = sorted((row for row in rows if row["competitor"] == name), key=lambda row: row[axis] or 0)
        if not mine:
            continue
        x = [row[axis] for row in mine] if mine[0][axis] is not None else xs
        median, low, high = (
            np.broadcast_to([1e3 * row[key] for row in mine], len(x)) for key in ("median", "low", "high")
        )
        flat = mine[0][axis] is None  # softmax knows no G
        axes.plot(x, median, color=colour, linestyle=line, linewidth=1.8, marker=None if flat else marker, markersize=5)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        ends.append((x[-1], median[-1], label, colour))
    if axis == "N":
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.tick_params(which="minor", color=INK)
        axes.xaxis.set_major_locator(FixedLocator(_apart(xs)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    else:
        axes.set_ylim(bottom=0)
        axes.set_xticks(xs)
    label_axes(axes, {"N": "tokens $N$", "G": "harmonics $G$"}[axis], "forward and backward (ms)")
    rest = f"$r$ = {_rank(rows)}, $h$ = {first['h']}, $d$ = {first['d']}, {first['B']} image{'s' * (first['B'] > 1)}"
    rest = f"$G$ = {_grid(rows)}, {rest}" if axis == "N" else f"$N$ = {first['N']}, {rest}"
    axes.set_title(f"One layer: {rest}", fontsize=10, color=INK, loc="left")
    _names_at_ends(axes, ends)


def _apart(values: Sequence[float]) -> list[float]:
    """Those of rising values whose labels do not touch on a logarithmic axis."""
    kept = [values[0]]
    for value in values[1:]:
        if value / kept[-1] >= 1.7:
            kept.append(value)
    return kept


def _rank(rows) -> int | None:
    return max((row["r"] for row in rows if row["r"] is not None), default=None)


def _grid(rows) -> int | None:
    return next((row["G"] for row in rows if row["G"] is not None), None)


def _names_at_ends(axes, ends) -> None:
    """Each label to the right of the axes at the height of its line's end, pushed apart where they would overlap."""
    height = axes.get_position().height * axes.figure.get_size_inches()[1]
    places = [(axes.transData.transform((x, y)), (x, y), label, colour) for x, y, label, colour in ends]
    inverse = axes.transAxes.inverted()
    places = sorted(
        ((inverse.transform(at), own, label, colour) for at, own, label, colour in places), key=lambda p: p[0][1]
    )
    gap, heights = 0.19 / height, []
    for at, *_ in places:
        heights.append(max(at[1], heights[-1] + gap if heights else 0.0))
    for i in range(len(heights) - 1, -1, -1):  # what was pushed over the top comes down again
        heights[i] = min(heights[i], 1.0 - gap * (len(heights) - 1 - i))
    for (_, own, label, colour), y in zip(places, heights, strict=True):
        thread = dict(arrowstyle="-", color=colour, linewidth=0.7, alpha=0.7, shrinkA=0, shrinkB=3)
        axes.annotate(label, own, (1.05, y), "data", "axes fraction", color=colour, fontsize=9, va="center",
                      arrowprops=thread, annotation_clip=False)  # fmt: skip


def _groups(rows: Sequence[Mapping], quantities: Mapping[str, tuple[str, str]]) -> tuple[str, list]:
    """(whose, [(heading, quantity, rows), ...]) for a panel of bars; compiled models where there are such.

    quantities: heading -> (what of a row, its quantity). The first model has a group for each, the others for the first
    one: more bars than that are not read.
    """
    compiled = any(row["compiled"] for row in rows)
    rows = [row for row in rows if row["model"] and row["compiled"] == compiled]
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = []
    for heading, (what, quantity) in quantities.items():
        for model in models[: 1 if groups else None]:
            mine = [row for row in rows if row["what"] == what and row["model"] == model and row[quantity] is not None]
            if mine:
                whose = f"{MODELS.get(model, model)}, {mine[0]['B']} image{'s' * (mine[0]['B'] > 1)}"
                groups.append((f"{heading}, {whose}", quantity, mine))
    return f"whole models{', compiled' if compiled else ''}", groups


def _bars(axes, title: str, groups: Sequence[tuple[str, str, list]], unit: float, label: str, mark: str) -> None:
    """Horizontal bars under the headings of their groups, quartiles as a line; number and name beside each bar."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    if not groups:
        return _nothing(axes)
    at = 0.0
    longest = max(row["ratio_high" if of == "ratio" else of] for _, of, rows in groups for row in rows) / unit
    look = dict(fontsize=9, color=INK, va="center", bbox=dict(facecolor="white", edgecolor="none", pad=1))
    for heading, quantity, rows in groups:
        axes.annotate(heading, (0, at), (4, 0), textcoords="offset points", style="italic", **look)
        for row in rows:
            at += 1
            name, colour, *_ = LOOKS[row["competitor"]]
            value, reach = row[quantity] / unit, row[quantity] / unit
            axes.barh(at, value, 0.78, color=colour, linewidth=0, alpha=0.85)
            if quantity == "ratio":
                axes.plot([row["ratio_low"], row["ratio_high"]], [at, at], color=INK, linewidth=1.2)
                reach = max(value, row["ratio_high"])
            said = f"{value:{mark}}  {name}{', full rank' if row['r'] == row['N'] else ''}"
            axes.annotate(said, (reach, at), (5, 0), textcoords="offset points", annotation_clip=False, **look)
        at += 1.5
    axes.set_ylim(at - 1, -0.6)
    axes.set_xlim(0, 1.05 * longest)
    label_axes(axes, label, "")
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.grid(visible=False, axis="y")


def limit_bars(least: Mapping[str, Mapping[str, float]], measured: Mapping[str, float]) -> Figure:
    """What each limit of a machine takes of a kernel at least, one after the other, and what the kernel took: a mark.

    least: kernel -> limit -> microseconds; all kernels have the same limits. measured: kernel -> microseconds. Where
    bars end at their marks, the limits take turns; a kernel that hides one behind the other is faster than its bar.
    """
    need_mapping("least", least)
    limits = list(next(iter(least.values())))
    values = as_array("least", [[its.get(limit, np.nan) for limit in limits] for its in least.values()], 2)
    took = as_array("measured", [measured.get(name, np.nan) for name in least], 1)
    if values.min() < 0 or took.min() <= 0:
        raise ValueError("times are positive: look at `least` and `measured`.")
    left = 0.2 + 0.075 * max(map(len, least))
    figure, (axes,) = sheet(1, 1, (6.6 - left / 2, 0.3 * len(least)), margins=(left, 0.6, 0.5, 0.6))
    ends = np.cumsum(values, axis=1)
    for i, limit in enumerate(limits):
        colour = COLOURS[i % len(COLOURS)]
        axes.barh(range(len(values)), values[:, i], 0.72, left=ends[:, i] - values[:, i], color=colour, label=limit,
                  edgecolor="white")  # fmt: skip
    for j, time in enumerate(took):
        axes.plot([time, time], [j - 0.43, j + 0.43], color=INK, linewidth=2.5, label=None if j else "measured")
        axes.annotate(f"{time:.3g}", (max(time, ends[j, -1]), j), (6, 0), textcoords="offset points", fontsize=9,
                      color=INK, va="center", annotation_clip=False)  # fmt: skip
    axes.set_yticks(range(len(least)), list(least))
    axes.set(xlim=(0, 1.02 * max(took.max(), ends.max())), ylim=(len(least) - 0.4, -0.6))
    label_axes(axes, "microseconds", "")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2, columnspacing=1.2,
           handletextpad=0.5)  # fmt: skip
    return figure


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, which are plenty for flat ones: under half the size."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, facecolor="white")
    picture = Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(small := io.BytesIO(), format="png", optimize=True)
    return small.getvalue()


def _nothing(axes) -> None:
    axes.set_axis_off()
    axes.text(0, 1, "not measured: there was no time", fontsize=9, color=INK, va="top")
