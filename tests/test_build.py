"""notebooks/build.py and its helpers, on notebooks small enough to read here."""

import base64
import io
import json
import re
import resource
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import build
import fingerprint
import hygiene
import pages

PARAMETERS = 'PROFILE = "reader"\nSEED = 0\nDEVICE = "auto"'


def as_base64(image) -> str:
    png = io.BytesIO()
    image.save(png, format="png", optimize=True)
    return base64.b64encode(png.getvalue()).decode()


def code(source, *tags, **kwargs):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {}, **kwargs)


def notebook(*cells):
    """A notebook that keeps the rules, with more cells at its end."""
    nb = new_notebook(metadata={**hygiene.KERNEL, "karat_lite": {"profile": "reader"}})
    nb.cells = [
        new_markdown_cell("# T"),
        code(hygiene.bootstrap(), "bootstrap"),
        code(PARAMETERS, "parameters"),
        *cells,
    ]
    for number, (_, cell) in enumerate(hygiene.code_cells(nb), 1):
        cell.execution_count = number
    return nb


def found(nb, folder: Path) -> str:
    path = folder / "00_sample.ipynb"
    nbformat.write(nb, path)
    return "\n".join(hygiene.problems(path))


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def display(**data):
    return new_output("display_data", {key.replace("_", "/", 1): value for key, value in data.items()})


# ---- the rules ------------------------------------------------------------------------------------------------------


def test_a_clean_notebook_has_no_problems(tmp_path):
    exercise = [
        code("def f():\n    raise NotImplementedError", "exercise"),
        code("kl.notebook.check(f, test)", "check"),
        new_markdown_cell("<details><summary>Solution</summary>\n\n```python\ndef f(): ...\n```\n</details>"),
    ]
    assert found(notebook(*exercise), tmp_path) == ""
    assert hygiene.exercises(notebook(*exercise)) == [(3, 4, "def f(): ...")]


BROKEN = {
    "raised ZeroDivisionError": code("1/0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="x")]),
    "has 41 lines": code("\n".join("x = 1" for _ in range(41))),
    "prints a machine path: /opt/me/x": code("f()", outputs=[stream("saved in /opt/me/x\n")]),
    "names a machine path": code("open('/tmp/here')"),
    "gives the parameter SEED another value": code("SEED = 3"),
    "gives the parameter DEVICE another value": code("from x import DEVICE"),
    "no cell tagged `check`": code("def f(): raise NotImplementedError", "exercise"),
    "carries the metadata ['papermill']": new_code_cell("f()", metadata={"papermill": {}}),
    "carries the metadata ['injected-parameters']": code("SED = 1", "injected-parameters"),
    "fetches a picture": new_markdown_cell("![badge](https://example.org/x.svg)"),
    "links to 09_nothing.ipynb": new_markdown_cell("[next](09_nothing.ipynb)"),
    "sections are numbered 1, 2, 4: one is lost": new_markdown_cell("## 1 · A\n\n## 2 · B\n\n## 4 · D"),
    "shows a widget view": code("w", outputs=[new_output("display_data", {hygiene.VIEW: {"model_id": "a"}})]),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_each_broken_rule_is_named(problem, tmp_path):
    assert problem in found(notebook(BROKEN[problem]), tmp_path)


def test_broken_frames_are_named(tmp_path):
    nb = notebook(code("1"))
    nb.cells[-1].execution_count = 9
    assert "execution counts are not 1..n" in found(nb, tmp_path)
    nb = notebook()
    nb.cells[1].source += "\n# mine"
    assert "the bootstrap cell is not notebooks/bootstrap.py" in found(nb, tmp_path)
    nb = notebook()
    nb.cells[2].source = PARAMETERS.replace('"reader"', '"smoke"')
    assert "the parameters cell does not say PROFILE = 'reader'" in found(nb, tmp_path)
    nb.cells[2].metadata.tags = []
    assert "0 cells are tagged `parameters`" in found(nb, tmp_path)
    nb = notebook()
    nb.metadata.widgets, nb.metadata.kernelspec.name = {}, "conda-env-x"
    assert "metadata.widgets is committed" in found(nb, tmp_path)
    assert "the kernelspec is not python3" in found(nb, tmp_path)
    assert "1.9 MB, 1.5 at most" in found(notebook(code("x", outputs=[stream("x" * 1_900_000)])), tmp_path)
    (tmp_path / "cut.ipynb").write_text('{"cells": [')
    assert "not a valid notebook" in hygiene.problems(tmp_path / "cut.ipynb")[0]


# ---- what papermill does not see ------------------------------------------------------------------------------------

SILENT = (
    """
import ipywidgets as widgets
from IPython.display import display
fine = widgets.HTML("all is well")
out = widgets.Output()
with out:
    print("shown") if {good} else 1 / 0
display(widgets.VBox([fine, out]))
""",
    """
note = widgets.HTML()
display(widgets.VBox([widgets.IntSlider(), note]))
note.value = "moved" if {good} else '<div class="karat-error"><b>draw</b> failed: no head 7</div>'
""",
)


OUTSIDE = """
import socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError as error:
    assert "no network in tests" in str(error)
else:
    raise AssertionError("a kernel left the machine")
"""


def run(nb, folder: Path):
    folder.mkdir()
    nbformat.write(nb, folder / "in.ipynb")
    return build.execute(folder / "in.ipynb", folder / "out.ipynb", cwd=folder)


def test_errors_inside_widgets_fail_a_run(tmp_path):
    """And no kernel leaves this machine."""
    cells = [[code(source.format(good=good)) for source in SILENT] for good in (True, False)]
    cells[0].append(code(OUTSIDE))
    assert run(new_notebook(cells=cells[0]), tmp_path / "good").problems == []
    problems = run(new_notebook(cells=cells[1]), tmp_path / "bad").problems
    assert "cell 1: an Output widget holds ZeroDivisionError: division by zero" in problems
    assert "cell 2: an explorer reports a failed callback: draw failed: no head 7" in problems


def test_a_raise_names_its_cell_and_memory_is_the_kernels(tmp_path):
    cells = [code("block = bytearray(700_000_000)"), code("raise KeyError('head')"), code("never = 1")]
    result = run(new_notebook(cells=cells), tmp_path / "raises")
    assert [line.partition(":")[0] for line in result.problems] == ["cell 2 raised KeyError"]
    # Linux counts a child's peak from the fork on, so that it cannot be below what this process held then.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    assert 700 < result.megabytes < max(1200, 1.01 * own) and result.seconds > 0


def test_a_cell_without_end_and_a_kernel_that_dies_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(build.CELL_TIMEOUT, "smoke", 3)
    cells = [code("import os, time"), code("time.sleep(60)")]
    problems = run(new_notebook(cells=cells), tmp_path / "waits").problems
    assert problems == ["cell 2 raised KeyboardInterrupt: ", "a cell took longer than 3 s and was stopped"]
    cells[1] = code("os._exit(1)")
    (problem,) = run(new_notebook(cells=cells), tmp_path / "dies").problems
    assert re.match(r"papermill ended with \d+ at cell 2: .*DeadKernelError", problem), problem


def test_a_kernel_that_does_not_start_is_started_again(tmp_path, monkeypatch):
    tried = tmp_path / "tried"
    script = f"""
import os, sys
tried = len(open({str(tried)!r}).read()) if os.path.exists({str(tried)!r}) else 0
open({str(tried)!r}, "a").write("x")
if tried < int(os.environ["DYING"]):
    os._exit(1)
os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *sys.argv[1:]])
"""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-c", script, "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "slow", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("DYING", "1")
    assert run(new_notebook(cells=[code("print(1)")]), tmp_path / "twice").problems == []
    assert tried.read_text() == "xx"
    monkeypatch.setenv("DYING", "99")
    monkeypatch.setattr(build, "STARTS", 2)
    (problem,) = run(new_notebook(cells=[code("print(1)")]), tmp_path / "never").problems
    assert "Kernel died before replying" in problem and len(tried.read_text()) == 2 + build.STARTS


# ---- what is committed ----------------------------------------------------------------------------------------------


def test_outputs_are_tidied():
    bar, named = (display(text_plain=words + "  0%|          | 0/9") for words in ("", "loss:"))
    png = as_base64(Image.new("RGB", (2, 2)))
    widget = display(text_plain="VBox(children=())", image_png=png)
    bar.data[hygiene.VIEW] = named.data[hygiene.VIEW] = widget.data[hygiene.VIEW] = {"model_id": "a"}
    outputs = [
        stream("\r 10%|#\r100%|##########\n"), stream("done in " + str(hygiene.ROOT / "data") + "\n"), bar, named,
        widget,
        stream("one ", "stderr"), display(text_plain="figure"), stream("two", "stderr"), stream("\r        \r"),
    ]  # fmt: skip
    kept = hygiene.tidy_outputs(outputs)
    assert [out.get("text") for out in kept] == ["100%|##########\ndone in data\n", None, "one two", None]
    assert kept[1].data == {"image/png": png, "text/plain": "(interactive: run this cell to move its controls)"}


def test_pictures_are_made_lighter_and_look_the_same():
    """A drawing with soft edges and thousands of colours; what is half transparent keeps all of them."""
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.contourf(np.add.outer(np.arange(40) ** 2, 30 * np.arange(40)), levels=30)
    axes.plot(20 + 15 * np.sin(np.linspace(0, 9, 40)), color="white")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    drawn = np.asarray(Image.open(png).convert("RGB"))
    before = base64.b64encode(png.getvalue()).decode()
    after = hygiene.lighter(before)
    assert len(after) < 0.6 * len(before)
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(after))).convert("RGB")).astype(int)
    ground = (drawn == 255).all(axis=-1)
    assert (seen[ground] == 255).all() and np.abs(seen - drawn).mean() < 2 and np.abs(seen - drawn).max() < 60
    scale = np.full((200, 600, 3), 255, dtype=np.uint8)  # a white sheet, a smooth patch, and a narrow scale beside it
    scale[20:180, 20:400] = [[[250, 250 - i // 4, 250 - i // 4] for i in range(380)]]
    scale[20:180, 420:428] = (255 * colormaps["RdBu_r"](np.linspace(1, 0, 160))[:, None, :3]).round()
    png = io.BytesIO()
    Image.fromarray(scale).save(png, format="png")
    after = hygiene.lighter(base64.b64encode(png.getvalue()).decode())
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(after))).convert("RGB")).astype(int)
    assert np.abs(seen - scale)[20:180, 420:428].max() < 16, "a scale keeps its colours, however few pixels have them"
    clear = Image.fromarray(drawn).convert("RGBA")
    clear.putalpha(100)
    assert hygiene.lighter(as_base64(clear)) == as_base64(clear)


def test_committed_keeps_the_author_and_the_outputs_only():
    source = notebook(code("print(1)", "check"))
    executed = nbformat.from_dict(json.loads(json.dumps(source)))
    executed.metadata.update(papermill={}, widgets={})
    executed.cells[-1].metadata.update(papermill={}, execution={})
    executed.cells[-1].outputs = [stream("1\n")]
    nb = hygiene.committed(source, executed)
    assert set(nb.metadata) == {"kernelspec", "language_info", "karat_lite"}
    assert nb.cells[-1].metadata == {"tags": ["check"]} and nb.cells[-1].outputs[0].text == "1\n"
    assert [cell.source for cell in nb.cells] == [cell.source for cell in source.cells]


def test_fingerprint_follows_the_code_and_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "karat_lite"
    package.mkdir()
    files = {
        "__init__": "from .vit import create_model\n",
        "vit": "from . import bases\ndef create_model():\n    from .shapes import draw\n",
        "bases": "def register_basis(name): ...\n", "more": "@register_basis('dog')\nclass Dog: ...\n",
        "shapes": "", "plots": "from .bases import x\n", "train": "",
    }  # fmt: skip
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    assert fingerprint.modules_used("kl.create_model()") == ["bases", "more", "shapes", "vit"]
    assert fingerprint.modules_used("%time\nkl.plots.curve(1)") == ["bases", "more", "plots"]
    assert fingerprint.modules_used("from karat_lite import plots") == ["bases", "more", "plots"]
    assert fingerprint.modules_used("from karat_lite.train import main") == ["train"]

    def renewed(*cells):
        return fingerprint.fingerprint(notebook(*cells))

    first = renewed(code("kl.create_model()"), new_markdown_cell("prose"))
    assert renewed(code("kl.create_model()"), new_markdown_cell("better prose")) == first
    assert renewed(code("kl.create_model() ")) != first
    (package / "train.py").write_text("# not used")
    assert renewed(code("kl.create_model()")) == first
    (package / "shapes.py").write_text("# used inside a function")
    assert renewed(code("kl.create_model()")) != first


def test_committing_replaces_a_notebook_by_a_run_of_it_or_leaves_it(tmp_path, monkeypatch):
    """A cell that raises, and an edit while it runs: not a byte changes. Then `stale` tells an edited cell."""
    path = tmp_path / "00_sample.ipynb"
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "address", lambda: None)

    def ran(*outputs, meanwhile=None):
        def execute(source, out, profile):
            nb = nbformat.read(source, as_version=4)
            nb.cells[-1].outputs = list(outputs)
            nbformat.write(nb, out)
            if meanwhile:
                nbformat.write(meanwhile, path)
            return build.Run(source.stem, out, profile, problems=list(hygiene.failures(nb)))

        monkeypatch.setattr(build, "execute", execute)
        build.commit(())

    nbformat.write(notebook(code("print(1)")), path)
    before = path.read_bytes()
    assert hygiene.stale(path), "never run"
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        ran(new_output("error", ename="ZeroDivisionError", evalue="x"))
    assert path.read_bytes() == before
    ran(stream("1\n"))
    assert nbformat.read(path, as_version=4).cells[-1].outputs[0].text == "1\n" and not hygiene.stale(path)
    edited = notebook(code("print(2)"), code("3"))
    with pytest.raises(SystemExit, match="edited during the run: run it again"):
        ran(stream("1\n"), meanwhile=edited)
    assert nbformat.read(path, as_version=4).cells[-1].outputs == [] and hygiene.stale(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a part was left"


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_a_page_fetches_nothing(tmp_path):
    markdown = "# A title\n\nWhat it does, $x^2$.\n\n$$\\begin{aligned} a &= b \\end{aligned}$$\n\n[next](01_b.ipynb)"
    nb = new_notebook(cells=[new_markdown_cell(markdown), code("1 < 2", outputs=[stream("yes")])])
    nb.metadata.widgets = {hygiene.STATE: {}}
    pages.page(nb, tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text(encoding="utf8")
    assert "<title>A title</title>" in html and html.count("<math") == 2 and "<mtable" in html
    assert 'href="01_b.html"' in html
    assert not [word for word in ("<script", "<link", 'src="http', "@import", "url(http") if word in html]
    assert "<math" in pages.summary(nb) and pages.summary(nb).startswith("<p>What it does")


def test_an_unknown_formula_is_shown_as_written():
    assert '<code class="undrawn">\\nosuchcommand{x}</code>' in pages.markdown("$\\nosuchcommand{x}$")


@pytest.mark.parametrize("jobs", [1, 2])
def test_notebooks_run_as_many_at_a_time_as_asked(jobs, capsys):
    """Lines stay in reading order, whoever is done first."""
    running, most = [], []

    def work(path):
        running.append(path)
        most.append(len(running))
        time.sleep(0.1 if path.stem == "a" else 0.05)
        running.remove(path)
        return build.Run(path.stem, path, "smoke")

    paths = [Path(name) for name in "abcd"]
    assert [run.name for run in build.each(paths, work, jobs)] == list("abcd")
    assert max(most) == jobs
    assert re.findall(r"^\[\d/4\] (\w)", capsys.readouterr().out, flags=re.M) == list("abcd")


def test_a_run_takes_a_profile_and_parameters(tmp_path, monkeypatch):
    seen = []

    def execute(source, out, profile="smoke", parameters=(), **_):
        seen.append((source.stem, profile, dict(parameters)))
        return build.Run(source.stem, out, profile)

    monkeypatch.setattr(build, "execute", execute)
    words = ["run", "--out", str(tmp_path), "--profile", "full", "-p", "PLAN=paper", "-p", "EPOCHS=2", "05_training"]
    monkeypatch.setattr(sys, "argv", ["build.py", *words])
    build.main()
    assert seen == [("05_training", "full", {"PROFILE": "full", "PLAN": "paper", "EPOCHS": "2"})]
    for wrong in ("PLAM=paper", "PLAN"):
        with pytest.raises(SystemExit, match=f"-p {wrong}: expected NAME=VALUE, where NAME is a parameter of every"):
            build.build(["05_training"], tmp_path, parameters=[wrong])
    with pytest.raises(SystemExit, match="-p PLAN=pico: expected"):
        build.build(["05_training", "04_fourier_karat"], tmp_path, parameters=["PLAN=pico"])


def test_no_notebook_at_a_time_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build.py", "run", "--jobs", "0"])
    with pytest.raises(SystemExit):
        build.main()
    assert "--jobs must be at least 1, given 0" in capsys.readouterr().err
