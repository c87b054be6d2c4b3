"""What all figures share: arrays checked, white sheets laid out in inches, colours that every reader can tell apart.

All colours are set here, opaque on white, so that a page's or a reader's dark style leaves no black on black.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, FAINT = "#222222", "#b4b4b4"
# Okabe and Ito's colours, which all readers can tell apart, each with a line of its own for print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9")
LINES = ("-", (0, (6, 2)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
POSITIVE, SIGNED = "viridis", "RdBu_r"  # perceptually even; diverging, white at 0
DPI = 80  # pixels of the page per inch; set-up and widgets draw twice as many, for sharp screens
WIDTH = 9.0  # inches of a full-width figure


def as_array(what: str, values, ndim) -> np.ndarray:
    """Tensor, array or list -> finite float64 array with `ndim` axes (a number, a tuple of them, or None for any)."""

    def plain(part):
        return part.detach().cpu().to(torch.float64).numpy() if isinstance(part, torch.Tensor) else part

    try:
        values = [plain(part) for part in values] if isinstance(values, (list, tuple)) else plain(values)
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected an array of numbers, got {type(values).__name__} ({error}).") from None
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if (allowed and values.ndim not in allowed) or values.size == 0:
        axes = " or ".join(map(str, allowed or ("any",)))
        raise ValueError(f"{what}: expected a non-empty array with {axes} axes, got shape {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} holds {np.count_nonzero(~np.isfinite(values))} values that are not finite.")
    return values


def as_shares(what: str, values) -> np.ndarray:
    """Accuracies in [0, 1], one or more -> array (n,); percents are refused."""
    values = as_array(what, values, 1)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"{what} must lie in [0, 1], got {values.min():g} .. {values.max():g}: divide what is in percent by 100."
        )
    return values


def as_grid(grid) -> tuple[int, int]:
    """Patches per side, or (down, across) -> (down, across)."""
    sides = (grid, grid) if isinstance(grid, Integral) else tuple(grid) if isinstance(grid, Iterable) else ()
    if len(sides) != 2 or not all(isinstance(n, Integral) and n >= 1 for n in sides):
        raise ValueError(f"grid: expected patches per side, such as 8, or (down, across), got {grid!r}.")
    return int(sides[0]), int(sides[1])


def as_picture(what: str, image) -> np.ndarray:
    """(3, H, W), float in [0, 1] or uint8 -> (H, W, 3) float in [0, 1]."""
    whole = (image.dtype if hasattr(image, "dtype") else None) in (torch.uint8, np.uint8)
    values = as_array(what, image, 3) / (255 if whole else 1)
    if values.shape[0] != 3:
        raise ValueError(f"{what}: expected (3, H, W), channels first, got shape {values.shape}.")
    if values.min() < -1e-3 or values.max() > 1 + 1e-3:
        raise ValueError(f"{what}: expected values in [0, 1], got {values.min():.3g} .. {values.max():.3g}: "
                         "karat_lite.data.to_unit(image) brings [-1, 1] there.")  # fmt: skip
    return values.clip(0, 1).transpose(1, 2, 0)


def need_mapping(what: str, value) -> None:
    """Raise `TypeError` or `ValueError` unless `value` is a dict with something in it."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict with a name for each part, got {type(value).__name__}.")
    if not value:
        raise ValueError(f"{what} is empty: nothing to draw.")


def sheet(rows: int, columns: int, panel, margins, gaps=(0.0, 0.0)) -> tuple[Figure, list]:
    """A white figure and its axes, row by row, laid out in inches (see `layout`)."""
    figure, places = layout(rows, columns, panel, margins, gaps)
    panels = [figure.add_axes(place, facecolor="white") for place in places]
    for axes in panels:
        axes.spines[:].set_color(INK)
        axes.tick_params(colors=INK, labelsize=9)
    return figure, panels


def wall(rows: int, columns: int, panel, margins, gaps=(0.0, 0.0)) -> tuple[Figure, Axes, list]:
    """A white figure, one bare axes over all of it, and the places on it where pictures hang (see `hang`).

    Many pictures in one axes are drawn three times faster than in an axes each.
    """
    figure, places = layout(rows, columns, panel, margins, gaps)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, 1), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes, places


def layout(rows: int, columns: int, panel, margins, gaps) -> tuple[Figure, list]:
    """A white figure, and places (left, bottom, width, height) on it in fractions, row by row.

    In inches: panel (width, height) or (width, (height of every row)); margins (left, right, bottom, top); gaps
    (across, down). Fixed places are found faster than by matplotlib's own layouts, and nothing jumps while a slider
    moves.
    """
    left, right, bottom, top = margins
    heights = np.broadcast_to(panel[1], rows)
    width = left + columns * panel[0] + (columns - 1) * gaps[0] + right
    height = bottom + heights.sum() + (rows - 1) * gaps[1] + top
    places = []
    for i in range(rows):
        below = height - top - heights[: i + 1].sum() - i * gaps[1]
        lefts = [left + j * (panel[0] + gaps[0]) for j in range(columns)]
        places += [(at / width, below / height, panel[0] / width, heights[i] / height) for at in lefts]
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", edgecolor="white"), places


def hang(axes, picture: np.ndarray, place, title: str = "") -> None:
    """Hang an image (H, W, 3) on a `wall`, its title above it."""
    left, bottom, width, height = place
    show_pixels(axes, picture, extent=(left, left + width, bottom, bottom + height))
    if title:
        above = bottom + height + 0.05 / axes.figure.get_size_inches()[1]
        axes.text(left + width / 2, above, title, ha="center", va="bottom", fontsize=10, color=INK)


def label_axes(axes, across: str, up: str) -> None:
    """Name the axes; where no image lies, add a faint grid and take away the box."""
    axes.set_xlabel(across, fontsize=10, color=INK)
    axes.set_ylabel(up, fontsize=10, color=INK)
    if not axes.images:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)


def style(i: int) -> dict:
    """Colour and line of the i-th of things that stand beside each other: no two of 36 look alike."""
    return dict(color=COLOURS[i % len(COLOURS)], linestyle=LINES[(i + i // len(COLOURS)) % len(LINES)])


def drawn_in(panels: Sequence[Axes], order: Sequence[str] | None = None) -> dict:
    """What a legend of several panels takes, handles and labels: each name once, also what the first or last lacks.

    order: of the names; None takes them as they appear.
    """
    found: dict = {}
    for panel in panels:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    names = [name for name in order or found if name in found]
    return dict(handles=[found[name] for name in names], labels=names)


def shown(name: str) -> str:
    """What readers see for a name of the command line: "karat variance" -> "KArAt variance"."""
    return " ".join("KArAt" if word == "karat" else word for word in name.split(" "))


def legend(axes, **options) -> None:
    """A legend in our colours; the handles are long enough to show their line style."""
    look = dict(fontsize=9, labelcolor=INK, facecolor="white", edgecolor="#cccccc", framealpha=0.9, handlelength=4)
    axes.legend(**look, **options)


def release(figure) -> None:
    """Make pyplot forget a figure: it would keep its own, and show them a second time."""
    if isinstance(figure, Figure) and "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(figure)


def show_pixels(axes, picture: np.ndarray, **options) -> None:
    """An image or matrix that fills its axes, every entry a block."""
    axes.imshow(picture, interpolation="nearest", aspect="auto", **options)


def stretch(small: np.ndarray, shape) -> np.ndarray:
    """(h, w, 3) -> (H, W, 3): every entry becomes a block; a pixel takes the patch that its centre lies in."""
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(shape, small.shape[:2], strict=False))
    return small[rows][:, columns]


def colour_scale(values: np.ndarray, signed: bool | None) -> ScalarMappable:
    """Colours for these values: diverging and even about 0 if they are signed, else from 0 or below to the largest."""
    if signed or (signed is None and values.min() < 0):
        largest = np.abs(values).max() or 1.0
        return ScalarMappable(Normalize(-largest, largest), SIGNED)
    low, high = min(0.0, values.min()), values.max()
    return ScalarMappable(Normalize(low, high if high > low else low + 1.0), POSITIVE)


def colour_bar(figure: Figure, colours: ScalarMappable, place, label: str) -> None:
    """A bar close to the right of a place (left, bottom, width, height), as high as it."""
    left, bottom, width, height = place
    inch = 1 / figure.get_size_inches()[0]
    axes = figure.add_axes((left + width + 0.1 * inch, bottom, 0.13 * inch, height))
    bar = figure.colorbar(colours, cax=axes, ticks=MaxNLocator(5))
    bar.set_label(label, fontsize=9, color=INK)
    bar.outline.set_edgecolor(INK)
    axes.tick_params(colors=INK, labelsize=8)


def multiple_of_pi(value: float, _) -> str:
    """A tick's label: 0, π/2, −3π/2, 2π ... (the second argument is matplotlib's, the tick's number)."""
    halves = round(2 * value / np.pi)
    if halves == 0:
        return "0"
    whole, half = divmod(abs(halves), 2)
    number = f"{abs(halves) if abs(halves) > 1 else ''}π/2" if half else f"{whole if whole > 1 else ''}π"
    return ("−" if halves < 0 else "") + number


def in_order(i: int, count: int) -> tuple:
    """The colour of the i-th of `count` things that follow each other: dark first, light last."""
    return colormaps[POSITIVE](0.9 * i / max(1, count - 1))


def short(value: float) -> str:
    """A positive number in about three digits, without powers of ten where there is no need."""
    return f"{value:,.0f}" if 99.5 <= value < 1e6 else f"{value:.2g}" if value < 10 else f"{value:.3g}"


def apart(heights: np.ndarray, gap: float, top: float) -> np.ndarray:
    """Falling heights, none above `top`, moved as little as they need to lie at least `gap` from each other."""
    heights = np.array(heights, dtype=float)
    for _ in range(500):
        heights[:1] = np.minimum(heights[:1], top)
        lack = np.maximum(0, gap - (heights[:-1] - heights[1:])) / 2
        if lack.max(initial=0) < 1e-4:
            break
        heights[:-1] += lack
        heights[1:] -= lack
    return heights
