"""What a notebook's first cells get: one set-up, figures that are shown once, exercises with one verdict."""

from pathlib import Path

import numpy as np
import pytest
import torch

import karat_lite as kl
from karat_lite import notebook

ROOT = Path(__file__).resolve().parent.parent


def test_setup_seeds_everything_and_says_so_in_one_line(capsys):
    setup = kl.notebook.setup("smoke", 3, "cpu")
    first = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    assert capsys.readouterr().out == f"profile smoke, seed 3, device cpu, torch {torch.__version__}\n"
    kl.notebook.setup("smoke", 3, "cpu")
    assert torch.equal(torch.rand(3), first[0]) and np.array_equal(np.random.rand(3), first[1])  # noqa: NPY002
    assert setup == notebook.Setup("smoke", 3, torch.device("cpu"))
    assert setup.pick(smoke=1, reader=2, full=3) == 1
    with pytest.raises(AttributeError):
        setup.seed = 4
    with pytest.raises(ValueError, match="did you mean 'reader'"):
        kl.notebook.setup("raeder", 0, "cpu")
    with pytest.raises(ValueError, match="seed"):
        kl.notebook.setup("smoke", -1, "cpu")
    with pytest.raises(ValueError, match="not on this machine"):
        kl.notebook.setup("smoke", 0, "cuda:99")


CELL = """
import karat_lite as kl
setup = kl.notebook.setup("smoke", 0, "cpu")
{before}
kl.plots.matrices({{"S": [[0.0, 1.0], [2.0, 3.0]]}})
"""


@pytest.mark.parametrize("before", ["", "import matplotlib.pyplot as plt"])
def test_a_figure_at_the_end_of_a_cell_is_shown_once(before):
    """In a real kernel: one PNG, sharp, and no second one from pyplot."""
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(before=before))])
    NotebookClient(nb, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    pictures = [out for out in nb.cells[0].outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 1 and pictures[0].output_type == "execute_result"
    assert pictures[0].metadata["image/png"]["width"] > 200
    assert {out.output_type for out in nb.cells[0].outputs} == {"stream", "execute_result"}


def test_check_gives_one_verdict_and_never_raises(capsys):
    def test(answer):
        if answer(2) != 4:
            raise AssertionError("expected 4 for 2")  # a plain assert is rewritten by pytest

    def verdict(answer, hint=None):
        kl.notebook.check(answer, test, hint)
        return capsys.readouterr().out

    def square(x):
        raise NotImplementedError

    assert verdict(square) == "not done yet: square\n"

    def square(x):
        raise NotImplementedError("your turn")

    assert verdict(square, "think") == "not done yet: square\n"

    @torch.no_grad()
    def square(x):
        raise NotImplementedError

    assert verdict(square) == "not done yet: square\n"

    def square(x):
        return torch.nn.Module()(x)  # an answer that calls what has no forward

    assert verdict(square).startswith("✗ square raised NotImplementedError")

    def square(x):
        return x + 1

    assert verdict(square, "multiply") == "✗ not right yet: expected 4 for 2\n  hint: multiply\n"

    def square(x):
        return x / 0

    assert verdict(square) == "✗ square raised ZeroDivisionError: division by zero\n  at `return x / 0`\n"

    def square(x):
        return torch.empty(2, device="meta").item()

    assert verdict(square).startswith("✗ square raised "), "torch's own NotImplementedError is no empty stub"

    def square(x):
        return x * x

    assert verdict(square) == "✓ correct: square\n"

    def bare(answer):
        raise AssertionError

    kl.notebook.check(square, bare)
    assert capsys.readouterr().out == "✗ not right yet: raise AssertionError\n"


LIVE = """
import karat_lite as kl
from karat_lite.history import History
setup = kl.notebook.setup("smoke", 0, "cpu")
show = kl.notebook.live(lambda history: kl.plots.matrices({"S": [[float(len(history.records)), 1.0], [2.0, 3.0]]}))
for count in (1, 2, 3):
    show(History([{}] * count))
"""


def test_live_figures_replace_one_another():
    """In a real kernel: three epochs leave one picture, the last."""
    import nbformat
    from nbclient import NotebookClient

    last = LIVE.replace("(1, 2, 3)", "(3,)")
    never = LIVE.replace("}))\nfor", "}), every=4)\nfor")
    ended = LIVE.replace("}))\nfor", "}), every=2, epochs=3)\nfor")
    sources = (LIVE, last, last.replace("(3,)", "(1,)"), never, ended)
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nb = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(nb, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [[out.get("data", {}) for out in cell.outputs] for cell in nb.cells]
    shown, expected, first, none, end = ([d["image/png"] for d in each if "image/png" in d] for each in outputs)
    assert len(shown) == 1 and shown == expected != first and never != LIVE and none == []
    assert end == expected, "the last epoch is shown though 2 does not divide 3"


def test_live_figures_need_a_number_of_epochs():
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        notebook.live(print, every=0)
    with pytest.raises(ValueError, match="epochs must be >= 1, got 0"):
        notebook.live(print, epochs=0)


def test_live_works_outside_a_notebook_and_with_pyplot(monkeypatch):
    """There display has no handle to replace a figure by; pyplot would keep every figure, and show it again."""
    import IPython.display
    from matplotlib import pyplot

    monkeypatch.setattr(IPython.display, "display", lambda *args, **options: shown.append(args))
    shown, history = [], kl.History()
    show = notebook.live(lambda history: pyplot.subplots()[0])
    for epoch in (1, 2):
        history.records.append({"epoch": epoch})
        show(history)
    assert len(shown) == 2 and pyplot.get_fignums() == []
