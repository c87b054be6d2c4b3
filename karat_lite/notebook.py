"""What every notebook's first cells need: one set-up, and a check for exercises that never stops a run."""

import inspect
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .canvas import release
from .checks import at_least, one_of
from .processes import pick_device

PROFILES = ("smoke", "reader", "full")  # seconds; minutes on a CPU; a GPU


@dataclass(frozen=True)
class Setup:
    """What a notebook runs with: its profile, its seed, and the device that was found."""

    profile: str
    seed: int
    device: torch.device

    def pick(self, *, smoke, reader, full):
        """The value for this profile."""
        return {"smoke": smoke, "reader": reader, "full": full}[self.profile]


def setup(profile: str = "reader", seed: int = 0, device: str = "auto") -> Setup:
    """Seed the random numbers, choose the device, make figures sharp; print one line that says what was chosen.

    Raises `ValueError` for an unknown profile or a device that is not there.
    """
    chosen = Setup(one_of("profile", profile, PROFILES), at_least("seed", seed, 0), pick_device(device))
    random.seed(chosen.seed)
    np.random.seed(chosen.seed)  # noqa: NPY002 - libraries still draw from the old global generator
    torch.manual_seed(chosen.seed)
    _show_figures()
    print(f"profile {chosen.profile}, seed {chosen.seed}, device {chosen.device}, torch {torch.__version__}")
    return chosen


def live(draw: Callable, every: int = 1, epochs: int | None = None) -> Callable:
    """A callback for `train(on_epoch=...)`: shows the figure draw(history), replaced every `every` epochs.

    epochs: how many the training has (`recipe.epochs`): the last one is then shown even if `every` does not divide it.
    A callback has one place on the page, where a training that is resumed goes on: make one for each training.
    """
    every, epochs = at_least("every", every, 1), epochs if epochs is None else at_least("epochs", epochs, 1)
    from IPython.display import display

    shown: list = []

    def show(history) -> None:
        done = len(history.records)
        if done % every and done != epochs:
            return
        figure = draw(history)
        if shown and shown[0] is not None:
            shown[0].update(figure)
        else:
            shown[:] = [display(figure, display_id=True)]  # outside a notebook there is nothing to replace
        release(figure)

    return show


def check(stub: Callable, test: Callable, hint: str | None = None) -> None:
    """Try an exercise: `test(stub)` asserts what the answer must do. Prints one verdict and raises nothing."""
    name = getattr(stub, "__name__", "this exercise")
    try:
        test(stub)
    except Exception as error:  # noqa: BLE001 - a reader's mistake is an answer, not a stop
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        where = traceback.extract_tb(error.__traceback__)[-1]
        raised = (where.line or "raise").startswith("raise")
        if isinstance(error, NotImplementedError) and raised and _is_in(frame, stub):
            print(f"not done yet: {name}")
            return
        said = " ".join(str(error).split())
        if isinstance(error, AssertionError):
            print(f"✗ not right yet: {said or where.line}")
        else:
            print(f"✗ {name} raised {type(error).__name__}: {said}\n  at `{where.line}`")
        if hint:
            print(f"  hint: {hint}")
    else:
        print(f"✓ correct: {name}")


def _is_in(frame, stub: Callable) -> bool:
    """Whether a frame runs the stub itself, or a method of it where it is a class; True where nobody can tell."""
    if isinstance(stub, type):
        return any(getattr(part, "__code__", None) is frame.f_code for part in vars(stub).values())
    return frame.f_code is getattr(inspect.unwrap(stub), "__code__", frame.f_code)


def _show_figures() -> None:
    """In IPython, a figure at the end of a cell is shown as a PNG with two pixels for one, pyplot or not."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    from IPython.core.pylabtools import select_figure_formats
    from matplotlib_inline.config import InlineBackend

    # In the backend's settings, so that pyplot, which sets formats when it is first imported, keeps them; and at once.
    backend = InlineBackend.instance(parent=shell)
    backend.figure_formats = {"retina"}
    select_figure_formats(shell, backend.figure_formats, **backend.print_figure_kwargs)
