"""Figures of class-token maps and of their quality; as in plots.py, arrays in, `Figure` out, no global state."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .canvas import (
    COLOURS,
    INK,
    LINES,
    SIGNED,
    WIDTH,
    as_array,
    as_grid,
    as_picture,
    colour_bar,
    colour_scale,
    drawn_in,
    hang,
    label_axes,
    legend,
    need_mapping,
    sheet,
    shown,
    stretch,
    style,
    wall,
)
from .checks import one_of

GHOST = 0.4  # how much of the grey image shows through the colours laid over it
# A score's axis, and which end of it is good.
SCORES = {
    "pointing": "pointing game →",
    "mass": "mass inside →",
    "iou": "best IoU →",
    "deletion_mean": "← deletion",
    "insertion_mean": "insertion →",
    "deletion_blur": "← deletion, blur",
    "insertion_blur": "insertion, blur →",
}
MAPS = {
    "scores": "scores, head mean",
    "attention": "activated, head mean",
    "dominant": "activated, dominant head",
    "added": "size added",
    "rollout": "rollout",
    "direct": "direct pushes",
    "regions": "contributing regions",
    "average": "same for all images",
    "brightness": "brightness",
    "centre": "centre",
    "random": "random",
    "mask": "the mask itself",
}


def outlined(image, mask, side: int = 256) -> np.ndarray:
    """The image, enlarged to about `side` pixels, with the object's edge: a white line around, a black one within.

    image (3, H, W), float in [0, 1] or uint8; mask (H, W) bool. Returns (3, z H, z W) float in [0, 1].
    """
    picture, mask = as_picture("image", image), as_array("mask", mask, 2) > 0.5
    if picture.shape[:2] != mask.shape:
        raise ValueError(f"the mask has {mask.shape} pixels, the image {picture.shape[:2]}: they must be equal.")
    zoom = max(1, round(side / max(mask.shape)))
    picture, mask = (x.repeat(zoom, axis=0).repeat(zoom, axis=1) for x in (picture, mask))
    line = max(1, zoom // 4)
    grown, shrunk = _spread(mask, line), ~_spread(~mask, line)
    picture[grown & ~mask], picture[mask & ~shrunk] = 1, 0
    return picture.transpose(2, 0, 1)


def _spread(mask: np.ndarray, reach: int) -> np.ndarray:
    """True wherever `mask` is true within `reach` pixels across and down."""
    for axis in (0, 1):
        moved = mask.copy()
        for step in range(1, reach + 1):
            low, high = [slice(None)] * 2, [slice(None)] * 2
            low[axis], high[axis] = slice(None, -step), slice(step, None)
            moved[tuple(low)] |= mask[tuple(high)]
            moved[tuple(high)] |= mask[tuple(low)]
        mask = moved
    return mask


def kinds_of_map(image, maps: Mapping[str, Mapping], grid: int | tuple[int, int]) -> Figure:
    """The image, and for each model a line of its maps over it: model -> title -> (n,).

    Every map is divided by its own largest absolute value, since kinds have different units: compare places, not sizes.
    White at 0. grid: patches per side, or (down, across). All models have the same titles.
    """
    picture, (down, across) = as_picture("image", image), as_grid(grid)
    need_mapping("maps", maps)
    titles = list(next(iter(maps.values())))
    for name, its in maps.items():
        need_mapping(f"maps of {name!r}", its)
        if list(its) != titles:
            raise ValueError(f"maps of {name!r} are {', '.join(its)}, those above {', '.join(titles)}: give the same.")
    side = min(1.6, (WIDTH - 1.3) / (len(titles) + 1) - 0.06)
    lines = max(title.count("\n") for title in titles)
    margins = (0.3, 0.95, 0.08, 0.3 + 0.16 * lines)
    figure, axes, places = wall(len(maps), len(titles) + 1, (side, side), margins, gaps=(0.06, 0.1))
    colours = ScalarMappable(Normalize(-1, 1), SIGNED)
    grey = 0.3 + 0.7 * (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    for i, (name, its) in enumerate(maps.items()):
        line = places[i * (len(titles) + 1) : (i + 1) * (len(titles) + 1)]
        hang(axes, picture, line[0], "" if i else "image")
        for title, place in zip(titles, line[1:], strict=True):
            values = as_array(f"{title!r} of {name!r}", its[title], 1)
            if len(values) != down * across:
                raise ValueError(f"{title!r} of {name!r}: {len(values)} values do not fill {down} x {across} patches.")
            weights = (values / (np.abs(values).max() or 1.0)).reshape(down, across)
            over = stretch(colours.to_rgba(weights)[..., :3], grey.shape)
            hang(axes, (1 - GHOST) * over + GHOST * grey, place, "" if i else title)
        left, bottom, _, height = line[0]
        middle = dict(rotation=90, ha="center", va="center", fontsize=10, color=INK)
        axes.text(left / 2, bottom + height / 2, name, **middle)
    _, bottom, _, _ = places[-1]
    left, top, width, height = places[len(titles)]
    colour_bar(figure, colours, (left, bottom, width, top + height - bottom), "share of the map's largest value")
    return figure


def map_card(image, values, grid: int | tuple[int, int], title: str, label: str, facts: Mapping[str, str]) -> Figure:
    """One map large: the image, the map over it with its scale, and a few facts in words; for a dashboard.

    values (n,): patches row by row on `grid`, per side or (down, across). Signed maps are white at 0. label: of the
    scale.
    """
    picture, (down, across) = as_picture("image", image), as_grid(grid)
    values = as_array("values", values, 1)
    if len(values) != down * across:
        raise ValueError(f"{len(values)} values do not fill {down} x {across} patches.")
    figure, axes, (left, right) = wall(1, 2, (2.7, 2.7), margins=(0.05, 3.3, 0.08, 0.32), gaps=(0.08, 0))
    colours = colour_scale(values, None)
    grey = 0.3 + 0.7 * (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    over = stretch(colours.to_rgba(values.reshape(down, across))[..., :3], grey.shape)
    hang(axes, picture, left, "image")
    hang(axes, (1 - GHOST) * over + GHOST * grey, right, title)
    colour_bar(figure, colours, right, label)
    width, height = figure.get_size_inches()
    at = right[0] + right[2] + 1.0 / width
    for i, (name, said) in enumerate(facts.items()):
        top = right[1] + right[3] - (0.1 + 0.46 * i) / height
        axes.text(at, top, name, fontsize=8.5, color="#666666", va="top")
        axes.text(at, top - 0.16 / height, said, fontsize=10, color=INK, va="top")
    return figure


def deletion_curves(curves: Mapping) -> Figure:
    """Left what happens when the strongest patches go first, right when they come first; means over images.

    curves: name -> record with `shares` (steps + 1,), `deletion` and `insertion` (B, steps + 1) or (steps + 1,), as
    `analysis.map_quality.deletion_insertion` gives it. The legend says the areas under both curves.
    """
    need_mapping("curves", curves)
    words = max(1.55, 0.95 + 0.075 * max(map(len, curves)))
    size = ((WIDTH - 1.25 - words) / 2, 2.7)
    figure, panels = sheet(1, 2, size, margins=(0.65, words, 0.55, 0.35), gaps=(0.6, 0))
    areas: dict[str, list[float]] = {name: [] for name in curves}
    looks = _by_model(list(curves))
    for axes, which in zip(panels, ("deletion", "insertion"), strict=True):
        for name, curve in curves.items():
            x = as_array(f"shares of {name!r}", curve.shares, 1)
            y = np.atleast_2d(as_array(f"{which} of {name!r}", getattr(curve, which), (1, 2))).mean(axis=0)
            if x.shape != y.shape:
                raise ValueError(f"{which} of {name!r} has {len(y)} points, its shares {len(x)}.")
            areas[name].append(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)))
            axes.plot(100 * x, y, linewidth=2, marker="o", markersize=3.5, label=name, **looks[name])
        axes.set_ylim(0, 1.02)
        gone = which == "deletion"
        title = f"{which}: strongest {'go' if gone else 'come'} first"
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        label_axes(axes, f"patches {'filled in' if gone else 'shown'} (%)", "probability of the answer" if gone else "")
    named = [f"{name}\n{gone:.3f}, {come:.3f}" for name, (gone, come) in areas.items()]
    panels[1].legend(panels[1].lines, named, title="areas: left, right", title_fontsize=9, fontsize=9, labelcolor=INK,
                     loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, handlelength=3.2)  # fmt: skip
    return figure


def _by_model(names: list[str]) -> dict[str, dict]:
    """Looks of lines called "model, kind": a colour for each model, a line for each kind; else as everywhere."""
    parts = [name.partition(", ")[::2] for name in names]
    models, kinds = (list(dict.fromkeys(part)) for part in zip(*parts, strict=True))
    if len(models) == len(names):
        return {name: style(i) for i, name in enumerate(names)}
    found = {}
    for name in names:
        model, _, kind = name.partition(", ")
        found[name] = {"color": style(models.index(model))["color"], "linestyle": LINES[kinds.index(kind) % len(LINES)]}
    return found


def quality_scores(summary: Sequence[Mapping], layer: int | None = None, scores: Sequence[str] | None = None) -> Figure:
    """Every score a panel, every kind of map and baseline a line; a mark for each attention: mean, spread over seeds.

    summary: that of a results file of `analysis.map_quality`. layer: the last one by default; scores: names in
    `SCORES`, by default up to five that are there. Filled marks take values as they are, hollow ones their size; these
    are left out where that is the same. A std of None (one seed) draws no bar. The arrow on an axis shows where better
    is.
    """
    rows = _of(summary)
    layer = max(row["layer"] for row in rows) if layer is None else layer
    rows = [row for row in rows if row["layer"] == layer]
    scores = [s for s in SCORES if any(s in row for row in rows)][:5] if scores is None else list(scores)
    kinds = [kind for kind in MAPS if any(row["map"] == kind for row in rows)]
    attentions = list(dict.fromkeys(row["attention"] for row in rows))
    if not kinds or not scores:
        raise ValueError(f"the summary holds nothing for layer {layer}.")
    for score in scores:
        one_of("score", score, SCORES)
    left = 0.2 + 0.075 * max(len(MAPS[kind]) for kind in kinds)
    width = (WIDTH - left - 0.25 - 0.2 * (len(scores) - 1)) / len(scores)
    height = 0.3 * len(kinds) + 0.15
    figure, panels = sheet(1, len(scores), (width, height), margins=(left, 0.25, 0.55, 0.4), gaps=(0.2, 0))
    for axes, score in zip(panels, scores, strict=True):
        for row in rows:
            if score not in row or (row["signs"] == "absolute" and _same(row, rows, score)):
                continue
            i, signed = attentions.index(row["attention"]), row["signs"] == "signed"
            place = kinds.index(row["map"]) + 0.26 * (i - (len(attentions) - 1) / 2) + (0 if signed else 0.1)
            colour = COLOURS[i % len(COLOURS)]
            axes.errorbar(
                row[score]["mean"], place, xerr=row[score]["std"], color=colour, marker="os^D"[i % 4], markersize=6,
                markerfacecolor=colour if signed else "white", linewidth=1.4, linestyle="none", zorder=3,
            )  # fmt: skip
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_yticks(range(len(kinds)), [MAPS[kind] for kind in kinds] if axes is panels[0] else [""] * len(kinds))
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.margins(x=0.1)
        first = next((i for i, kind in enumerate(kinds) if kind in ("average", "brightness", "centre", "random")), None)
        if first:  # what looks at the model above, the baselines below
            axes.axhline(first - 0.5, color=INK, linewidth=0.8)
        label_axes(axes, SCORES[score], "")
    marks = [
        panels[0].plot([], [], "os^D"[i % 4], color=COLOURS[i % len(COLOURS)], label=shown(name))[0]
        for i, name in enumerate(attentions)
    ]
    marks += panels[0].plot([], [], "o", color=INK, markerfacecolor="white", label="hollow: signs dropped")
    figure.legend(handles=marks, loc="upper left", bbox_to_anchor=(panels[0].get_position().x0 - 0.01, 1.0), fontsize=9,
                  ncols=len(marks), frameon=False, labelcolor=INK, borderaxespad=0.2)  # fmt: skip
    return figure


def quality_by_layer(summary: Sequence[Mapping], score: str = "iou", signs: str = "signed") -> Figure:
    """How one score of every kind of map changes from layer to layer: a panel for each attention, bands over seeds.

    One seed, whose std is None, has no band. A grey line is the random map's score, where the summary has it.
    """
    one_of("score", score, SCORES)
    rows = [row for row in _of(summary) if row["signs"] == signs and score in row]
    attentions = list(dict.fromkeys(row["attention"] for row in rows))
    kinds = [k for k in MAPS if len({row["layer"] for row in rows if row["map"] == k}) > 1]
    if not kinds:
        raise ValueError(f"the summary holds {score!r} ({signs}) of fewer than two layers: nothing to draw.")
    width = (WIDTH - 3.05 - 0.25 * (len(attentions) - 1)) / len(attentions)
    figure, panels = sheet(1, len(attentions), (width, 2.7), margins=(0.65, 2.4, 0.55, 0.35), gaps=(0.25, 0))
    colours = [*COLOURS, INK]  # seven kinds of map have layers
    chance = {row["attention"]: row[score]["mean"] for row in rows if row["map"] == "random"}
    for axes, attention in zip(panels, attentions, strict=True):
        axes.sharey(panels[0])
        for i, kind in enumerate(kinds):
            line = sorted((r["layer"], r[score]) for r in rows if (r["attention"], r["map"]) == (attention, kind))
            if not line:
                continue  # another attention has this kind
            x, mean, std = np.array([(at, s["mean"], s["std"] or 0.0) for at, s in line]).T
            look = dict(color=colours[i % len(colours)], linestyle=LINES[i % len(LINES)])
            axes.plot(x, mean, linewidth=2, marker="o", markersize=3.5, label=MAPS[kind], **look)
            axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.1, linewidth=0)
        if attention in chance:
            axes.axhline(chance[attention], color="#8a8a8a", linewidth=1.5, label=MAPS["random"], zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(shown(attention), fontsize=10, color=INK, loc="left")
        label_axes(axes, "layer", SCORES[score].strip("← →") if axes is panels[0] else "")
        axes.tick_params(labelleft=axes is panels[0])
    panels[0].set_ylim(bottom=0)
    order = [MAPS[kind] for kind in (*kinds, "random")]
    legend(panels[-1], loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, **drawn_in(panels, order))
    return figure


def _of(summary) -> list[Mapping]:
    if isinstance(summary, Mapping) or not summary or any("map" not in row for row in summary):
        raise ValueError("expected the `summary` of a results file of karat_lite.analysis.map_quality: a list of rows.")
    return list(summary)


def _same(row: Mapping, rows: Sequence[Mapping], score: str) -> bool:
    """Whether a row that drops signs has the numbers of the one that does not."""
    keys = ("attention", "map", "layer")
    return any(
        its["signs"] == "signed" and all(its[k] == row[k] for k in keys) and its[score] == row[score] for its in rows
    )
