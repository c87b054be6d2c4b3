"""The bar that a training shows, in a terminal, in a notebook and in a log file."""

import shutil
import sys


def progress_bar(total: int, initial: int, shown: bool):
    """A text bar on stdout that counts images: one line in a terminal and in a notebook, where saved outputs keep it.

    In a log file a line a minute, and one for each epoch. `shown=False` hides it, and so does TQDM_DISABLE=1.
    """
    from tqdm import tqdm

    terminal, notebook = sys.stdout.isatty(), type(sys.stdout).__module__.startswith("ipykernel")
    # Half a second between redraws keeps a saved notebook small.
    look = dict(mininterval=0.5 if terminal or notebook else 60.0, unit="img", unit_scale=True, file=sys.stdout)
    look["ncols"] = min(110, shutil.get_terminal_size().columns) if terminal else 110
    if not shown:
        look["disable"] = True  # not given, the environment decides
    return tqdm(total=total, initial=initial, **look)
