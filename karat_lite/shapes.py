"""The `shapes` dataset: one coloured paper shape on a patterned ground among streamers and confetti, drawn from a seed.

A scene is one row of uniform random numbers. Everything in it (class, place, turn, colours, pattern, clutter) is a
function of that row in continuous coordinates: x to the right and y down over the unit square. A picture samples those
functions at its pixel centres. Hence

- the same seed gives the same scenes at every resolution, with object masks;
- the first m of n scenes are the m scenes that the same seed gives alone;
- every machine draws the same bytes: only +, -, *, /, sqrt, floor and comparisons touch a pixel, and IEEE arithmetic
  leaves no choice in how these are rounded (the last bit of a sine differs from one maths library to another).

The outline alone tells the classes apart: colours, areas, turns and patterns have the same distribution in each. The
object lies on top of the clutter, so its mask is all of it that falls inside the picture. Two choices keep a small
transformer's training short: every paper is lighter than every ground, and a shape turns by TURN degrees at most.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .checks import at_least

AREA = (0.10, 0.22)  # of the object, as a share of the picture, before the picture's edge cuts a tip off
TURN = 20  # degrees to either side
OVERHANG = 0.15  # share of the object's radius that may lie outside the picture: it spreads the centres further
CLUTTER = 7  # streamers and confetti under the object
PIXELS_AT_ONCE = 1 << 17  # drawn in chunks whose planes stay in the processor's cache

# The ground's two tones, then the papers of shapes and clutter: every paper is lighter than every ground.
PALETTES = (
    ("1f3349 2b4763", "f4b860 f28a6b f3e3c3 7fd1b9"),  # night
    ("3b2c4a 51406a", "f6c667 f19a9b e9dff2 8fd3e8"),  # aubergine
    ("20453f 2f5f55", "f7d488 f4a582 e8f1da a7d9f5"),  # fir
    ("5a2a34 753a44", "f9d7a0 f5b7a8 f1ede0 9ed8c6"),  # mulberry
    ("143f52 1d586e", "ffd97d ff9f80 e6f4f1 b9e28c"),  # lagoon
    ("2e2a2b 4a4341", "e9c46a f08a5d f7ebd5 84c7d0"),  # charcoal
    ("4f3422 6b4a33", "fbd38d f7a072 fdf0d5 a8dadc"),  # walnut
    ("2b2f5c 40467d", "ffcf70 ff9aa2 e2e6ff 9be3c3"),  # indigo
)


# --- Outlines: signed distance to the boundary, negative inside ------------------------------------------------------


def _disc(x, y, radius=1.0, cx=0.0, cy=0.0):
    return np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - radius


def _ring(x, y):
    return np.abs(_disc(x, y, 0.76)) - 0.24


def _crescent(x, y):
    return np.maximum(_disc(x, y, 1.0, 0.25), -_disc(x, y, 0.85, 0.8))


def _heart(x, y):
    """A square standing on its corner, with a disc on the middle of each of its upper sides."""
    x, y = np.abs(x), y + 0.05
    return np.minimum(_disc(x, y, 0.495, 0.35, -0.35), (x + np.abs(y) - 0.7) * 0.7071)


def _polygon(x, y, corners):
    """Distance to the nearest side; the sign by how many sides a ray along +x crosses: an odd number means inside."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        t = np.clip((wx * ex + wy * ey) * (1 / (ex * ex + ey * ey)), 0, 1)
        nearest = np.minimum(nearest, (wx - t * ex) ** 2 + (wy - t * ey) ** 2)
        if ey:
            inside ^= ((y < ay) != (y < by)) & (wx < wy * (ex / ey))
    return np.where(inside, -1, 1).astype(x.dtype) * np.sqrt(nearest)


class Outline(NamedTuple):
    distance: Callable  # (x, y) -> signed distance, around the origin
    area: float  # in its own units: scenes scale it to the area that they want
    radius: float  # of the circle around the origin that holds it


def _outline(corners) -> Outline:
    """The polygon of these corners, its centroid moved to the origin; area and centroid by the shoelace sum."""
    sides = list(zip(corners, corners[1:] + corners[:1], strict=True))
    cross = [ax * by - bx * ay for (ax, ay), (bx, by) in sides]
    area = sum(cross) / 2
    cx, cy = (sum(c * (a[i] + b[i]) for c, (a, b) in zip(cross, sides, strict=True)) / (6 * area) for i in (0, 1))
    corners = [(round(x - cx, 6), round(y - cy, 6)) for x, y in corners]  # as in `direction`
    radius = max(math.hypot(x, y) for x, y in corners)
    return Outline(lambda x, y: _polygon(x, y, corners), round(abs(area), 6), round(radius, 6))


def _spokes(count, *radii):
    """Corners all around the origin, `count` in all, at these radii in turn."""
    turns = [math.tau * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.sin(t), -radii[i % len(radii)] * math.cos(t)) for i, t in enumerate(turns)]


_ARM = ((0.3, -1), (0.3, -0.3), (1, -0.3))  # a quarter of the cross
_QUARTERS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # cosine and sine of its four turns
OUTLINES = {
    "circle": Outline(_disc, math.pi, 1.0),
    "ring": Outline(_ring, math.pi * (1 - 0.52**2), 1.0),
    "crescent": Outline(_crescent, 1.475, 1.13),
    "heart": Outline(_heart, 1.75, 1.026),
    "triangle": _outline(_spokes(3, 1.0)),
    "square": _outline([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "star": _outline(_spokes(10, 1.0, 0.45)),
    "cross": _outline([(c * x - s * y, s * x + c * y) for c, s in _QUARTERS for x, y in _ARM]),
    "arrow": _outline([(0, -1), (0.8, -0.1), (0.28, -0.1), (0.28, 1), (-0.28, 1), (-0.28, -0.1), (-0.8, -0.1)]),
    "hourglass": _outline([(-0.75, -1), (0.75, -1), (0.15, 0), (0.75, 1), (-0.75, 1), (-0.15, 0)]),
}
SHAPE_CLASSES = tuple(OUTLINES)


# --- Scenes ----------------------------------------------------------------------------------------------------------


class _Dice:
    """The scenes' random numbers, a row each: every call takes the next column for all b scenes of a chunk."""

    COLUMNS = 17 + 6 * CLUTTER  # a scene's random numbers after its class

    def __init__(self, rows):
        self.columns = iter(rows.T)

    def pick(self, count):
        return (next(self.columns) * count).astype(np.int64)

    def between(self, low, high):
        """Uniform in [low, high), shape (b, 1, 1); low and high are numbers or such columns."""
        u = next(self.columns).astype(np.float32)[:, None, None]
        return low + (high - low) * u

    def direction(self, turn=180):
        """Cosine and sine of an angle of up to `turn` degrees to either side.

        Rounded, so that the last bit of a machine's own cosine does not show.
        """
        angle = math.radians(turn) * (2 * next(self.columns) - 1)
        return [np.round(f(angle), 6).astype(np.float32)[:, None, None] for f in (np.cos, np.sin)]

    def wave(self, x, y, low, high, warp=0.0):
        """A plane wave in [-1, 1] of random direction and phase, `low` to `high` periods over the picture's side.

        A period is two parabolas, which no eye tells from a sine.
        """
        (c, s), periods = self.direction(), self.between(low, high)
        t = periods * (c * x + s * y) + self.between(0, 1) + warp
        t = 2 * (t - np.floor(t)) - 1
        return 4 * t * (1 - np.abs(t))


def _colours(text):
    return np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in text.split()], dtype=np.float32)


_GROUNDS = np.stack([_colours(tones) for tones, _ in PALETTES])  # (palettes, 2, 3)
_PAPERS = np.stack([_colours(papers) for _, papers in PALETTES])  # (palettes, 4, 3)


def _lay(canvas, colour, cover):
    """Lay a colour (b, 3) over the canvas (b, 3, H, W), in place, where the cover (b, H, W) in [0, 1] says."""
    canvas += cover[:, None] * (colour[:, :, None, None] - canvas)


def _draw(dice, outline, size):
    """Pictures (b, 3, size, size) uint8 and masks (b, size, size) of the scenes in `dice`, all of one outline."""
    x = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = x[None, None, :], x[None, :, None]

    def cover(distance):  # of the pixel by what lies within: a ramp one pixel wide
        return np.clip(0.5 - distance * size, 0, 1)

    # Ground: stripes between two tones, bent by a second wave into folds and eddies, soft or crisp.
    palette = dice.pick(len(PALETTES))
    stripes = dice.wave(x, y, 2, 5, warp=dice.between(0, 0.35) * dice.wave(x, y, 1, 2.5))
    tone = np.clip(0.5 + dice.between(0.4, 1.2) * stripes, 0, 1)
    ground, second = _GROUNDS[palette].swapaxes(0, 1)
    canvas = np.empty((len(palette), 3, size, size), dtype=np.float32)
    canvas[:] = ground[:, :, None, None]
    _lay(canvas, second, tone)

    # Clutter: confetti (short) and streamers (long), toned down towards the ground.
    for _ in range(CLUTTER):
        (c, s), half = dice.direction(), dice.between(0.0, 0.14)
        dx, dy = x - dice.between(0, 1), y - dice.between(0, 1)
        along = dx * c + dy * s
        along = along - np.clip(along, -half, half)
        distance = np.sqrt(along * along + (dy * c - dx * s) ** 2) - dice.between(0.015, 0.035)
        colour = _PAPERS[palette, dice.pick(4)]
        _lay(canvas, ground + 0.55 * (colour - ground), cover(distance))

    # Object: its shadow all around it, then the paper with a faint grain.
    area = dice.between(*AREA)
    scale = np.sqrt(area / np.float32(outline.area))
    margin = (1 - OVERHANG) * outline.radius * scale
    dx, dy = x - dice.between(margin, 1 - margin), y - dice.between(margin, 1 - margin)
    c, s = dice.direction(TURN)
    distance = scale * outline.distance((dx * c + dy * s) / scale, (dy * c - dx * s) / scale)
    shadow = np.clip(1 - distance * 16, 0, 1)
    _lay(canvas, 0.4 * ground, 0.5 * shadow * shadow)
    colour = _PAPERS[palette, dice.pick(4)]
    _lay(canvas, colour, cover(distance))
    grain = dice.wave(x, y, 3, 7)
    _lay(canvas, 0.8 * colour, cover(distance) * (0.25 + 0.25 * grain))
    return (canvas + 0.5).astype(np.uint8), distance < 0


def draw_shapes(n: int, img_size: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw n scenes: images (n, 3, H, W) uint8, labels (n,) int64 into `SHAPE_CLASSES`, masks (n, H, W) bool.

    H = W = img_size >= 8. A mask is true at the pixels whose centre the object covers. Raises `ValueError` for n < 1,
    img_size < 8 or seed < 0, `TypeError` for anything but whole numbers.
    """
    n, size, seed = at_least("n", n, 1), at_least("img_size", img_size, 8), at_least("seed", seed, 0)
    rows = np.random.default_rng(seed).random((n, 1 + _Dice.COLUMNS))
    labels = (rows[:, 0] * len(SHAPE_CLASSES)).astype(np.int64)
    images = np.empty((n, 3, size, size), dtype=np.uint8)
    masks = np.empty((n, size, size), dtype=bool)
    chunk = max(1, PIXELS_AT_ONCE // size**2)
    for label, outline in enumerate(OUTLINES.values()):
        members = np.flatnonzero(labels == label)
        for start in range(0, len(members), chunk):
            some = members[start : start + chunk]
            images[some], masks[some] = _draw(_Dice(rows[some, 1:]), outline, size)
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(masks)
