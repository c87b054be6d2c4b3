"""Explorers: real controls beside one picture, which a callback draws anew whenever a control moves.

    explore(draw, layer=range(4), model=["softmax", "karat"], scale=(0.0, 2.0, 0.1))

`draw(layer=..., model=..., scale=...)` returns a matplotlib figure. Works alike under ipywidgets 7.7 (Colab) and 8.
"""

import base64
import inspect
import io
import threading
from collections.abc import Callable
from decimal import Decimal
from html import escape
from itertools import pairwise
from numbers import Integral, Real

import ipywidgets
from matplotlib.figure import Figure

from .canvas import release
from .checks import one_of

ACCEPTED = (
    "a range or list of whole numbers (a slider), a list of words (buttons or a menu), or a tuple (low, high, step) of "
    "floats (a slider)"
)
SHARPNESS = 2  # pixels drawn for one pixel of the page


def explore(draw: Callable[..., Figure], **controls) -> "Explorer":
    """Show the figure `draw(**values)` with one control for each of its parameters.

    Args:
        draw: returns a figure for every combination of values. A control starts at draw's own default for its parameter
            where it has one that the control offers, else at the first value.
        controls: range(4) or [1, 3, 7] -> slider; ["a", "b"] -> buttons or a menu; (0.0, 2.0, 0.1) -> slider.

    Make it the last expression of a cell. Raises `TypeError` or `ValueError` for a control that is none of these, or
    that draw does not take; what the first drawing raises is raised here.
    """
    return Explorer(draw, controls)


def render(figure: Figure) -> bytes:
    """The PNG of a figure, sharp on dense screens. Raises `TypeError` if it is none."""
    if not isinstance(figure, Figure):
        raise TypeError(f"draw must return a matplotlib Figure, got {type(figure).__name__}.")
    png = io.BytesIO()
    # Opaque, whatever the figure's style; the light compression is quicker and costs a few kilobytes.
    look = dict(dpi=SHARPNESS * figure.dpi, facecolor="white", pil_kwargs={"compress_level": 3})
    try:
        figure.savefig(png, format="png", **look)
    finally:
        release(figure)
    return png.getvalue()


class Explorer:
    """What `explore` returns. Parts, all real widgets: `controls` (by name), `image`, `caption`, `error`, `box`.

    A drawing that fails leaves the last picture and its caption, and says in `error` what was raised and for which
    values; the next one that succeeds empties `error`.
    """

    def __init__(self, draw: Callable[..., Figure], controls: dict):
        if not controls:
            raise ValueError(f"explore needs at least one control: give each parameter of draw {ACCEPTED}.")
        if not callable(draw):
            raise TypeError(f"draw must be a function that returns a Figure, got {type(draw).__name__}.")
        self.draw = draw
        labels = f"{max(map(len, controls)) + 1}ch"  # as wide as the longest name: controls stand in one line
        self.controls = {name: _control(name, spec, _default(draw, name), labels) for name, spec in controls.items()}
        _fits(draw, self.values)
        self.image = ipywidgets.Image(format="png", layout={"max_width": "100%", "height": "auto"})
        self.caption = ipywidgets.HTML()
        self.error = ipywidgets.HTML()
        panel = ipywidgets.VBox(list(self.controls.values()))
        self.box = ipywidgets.VBox([panel, self.error, self.image, self.caption])
        self._lock = threading.RLock()  # front ends call from threads of their own
        self._setting = False
        self._show(self.values)
        for control in self.controls.values():
            control.observe(self._moved, names="value")

    @property
    def values(self) -> dict:
        """What the controls say, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def set(self, **values) -> None:
        """Move controls from code, and draw once. Raises `ValueError` for a name or value that is not offered."""
        for name, value in values.items():
            _check_value(name, value, self.controls[one_of("control", name, self.controls)])
        with self._lock:
            self._setting = True
            try:
                for name, value in values.items():
                    self.controls[name].value = value
            finally:
                self._setting = False
            self._redraw()

    def _moved(self, change) -> None:
        with self._lock:
            if not self._setting:
                self._redraw()

    def _redraw(self) -> None:
        values = self.values
        try:
            self._show(values)
        except Exception as error:  # noqa: BLE001 - whatever the callback raises must reach the page, not a log
            said = escape(f"{type(error).__name__}: {error}")
            self.error.value = (
                '<div class="karat-error" role="alert" style="border-left: 4px solid #b00020; padding: 2px 8px; '
                f'color: #b00020; background: #fff"><b>{said}</b><br>for {_said(values)}. '
                "The picture is the last good one.</div>"
            )

    def _show(self, values: dict) -> None:
        figure = self.draw(**values)
        png = render(figure)
        # A figure's width on the page, in CSS pixels; narrow pages shrink it.
        self.image.width = str(round(figure.get_size_inches()[0] * figure.dpi))
        self.image.value = png
        self.caption.value = f'<span style="opacity: 0.7">{_said(values)}</span>'
        if self.error.value:
            self.error.value = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        """The live view; the picture for pages without a kernel; words for everything else."""
        data = {
            "text/plain": f"Explorer({', '.join(f'{name}={value!r}' for name, value in self.values.items())})",
            "image/png": base64.b64encode(self.image.value).decode(),  # ipykernel 7 sends what it is given
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.box.model_id,
            },
        }
        return data, {"image/png": {"width": int(self.image.width)}}


def _control(name: str, spec, default, label_width: str):
    """The widget for one specification; see `ACCEPTED`."""
    wrong = TypeError(f"control {name} = {spec!r} is not understood: give {ACCEPTED}.")
    if not isinstance(spec, (range, list, tuple)):
        raise wrong
    if len(spec) == 0:
        raise ValueError(f"control {name} = {spec!r} offers no value: give {ACCEPTED}.")
    look = dict(description=name.replace("_", " "), style={"description_width": label_width})
    wide = {"width": "min(32rem, 98%)"}
    if isinstance(spec, tuple):
        return _float_slider(name, spec, default, wrong, layout=wide, **look)
    words = all(isinstance(value, str) for value in spec)
    if not words and not all(isinstance(value, Integral) and not isinstance(value, bool) for value in spec):
        raise wrong
    values = list(spec) if words else list(map(int, spec))
    if len(set(values)) != len(values):
        raise ValueError(f"control {name} = {spec!r} offers a value twice.")
    look["value"] = default if default in values else values[0]
    if words and len(values) <= 4 and sum(map(len, values)) <= 48:
        return ipywidgets.ToggleButtons(options=values, **look)
    if words or len(values) == 1:  # a slider needs two ends
        return ipywidgets.Dropdown(options=values, **look)
    steps = {after - before for before, after in pairwise(values)}
    if len(steps) == 1 and min(steps) > 0:
        return ipywidgets.IntSlider(min=values[0], max=values[-1], step=min(steps), layout=wide, **look)
    return ipywidgets.SelectionSlider(options=values, layout=wide, **look)


def _float_slider(name: str, spec: tuple, default, wrong: TypeError, **look):
    numbers = all(isinstance(value, Real) and not isinstance(value, bool) for value in spec)
    if len(spec) != 3 or not numbers or all(isinstance(value, Integral) for value in spec):
        raise wrong
    low, high, step = map(float, spec)
    if not (low < high and 0 < step <= high - low):
        raise ValueError(f"control {name} = {spec!r}: expected low < high and a step that fits between them.")
    start = default if isinstance(default, Real) and low <= default <= high else low
    digits = min(4, max(0, *(-Decimal(str(number)).as_tuple().exponent for number in (low, step))))
    return ipywidgets.FloatSlider(value=start, min=low, max=high, step=step, readout_format=f".{digits}f", **look)


def _default(draw: Callable, name: str):
    """draw's default for a parameter, None if there is none."""
    parameter = inspect.signature(draw).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _fits(draw: Callable, values: dict) -> None:
    try:
        inspect.signature(draw).bind(**values)
    except TypeError as error:
        name = getattr(draw, "__name__", "draw")
        raise TypeError(f"{name} does not take the controls {', '.join(values)}: {error}.") from None


def _check_value(name: str, value, control) -> None:
    if hasattr(control, "options"):
        offered = value in control.options
        what = ", ".join(map(repr, control.options))
    else:
        offered = isinstance(value, Real) and not isinstance(value, bool) and control.min <= value <= control.max
        what = f"{control.min} to {control.max} in steps of {control.step}"
        if offered and isinstance(control, ipywidgets.IntSlider):
            offered = isinstance(value, Integral) and (value - control.min) % control.step == 0
        elif offered:
            steps = (value - control.min) / control.step
            offered = abs(steps - round(steps)) < 1e-6 or value == control.max
    if not offered:
        raise ValueError(f"{name} = {value!r} is not offered: choose from {what}.")


def _said(values: dict) -> str:
    shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return escape(", ".join(f"{name} = {value}" for name, value in shown.items()))
