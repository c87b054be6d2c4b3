"""The real notebooks, run: as `make tutorial` does, as Colab does, with other parameters, with the exercises solved."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell
from pace import slowness
from PIL import Image

import build
import hygiene

ROOT = Path(__file__).resolve().parent.parent
NAMES = [path.stem for path in build.chosen(())]
WITH_WIDGETS = [path.stem for path in build.chosen(()) if "widgets" in path.read_text(encoding="utf8")]
OVERLAY = ROOT / ".venv" / "ipywidgets7"
TORCH, WIDGETS = importlib.metadata.version("torch"), importlib.metadata.version("ipywidgets")

PROBE = """
import importlib.metadata, json, socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
except OSError as error:
    refused = str(error)
versions = {name: importlib.metadata.version(name) for name in ("torch", "ipywidgets")}
from karat_lite.widgets import Explorer, render
def try_all(explorer):  # in a function: names at the top are the notebook's own
    moves = 0
    for name, start in explorer.values.items():
        control = explorer.controls[name]
        ends = control.options[:1] + control.options[-1:] if hasattr(control, "options") else (control.min, control.max)
        for value in (*ends, start):
            explorer.set(**{name: value})
            assert explorer.error.value == "", explorer.error.value
            assert explorer.image.value == render(explorer.draw(**explorer.values)), explorer.values
            moves += 1
    return moves
moved = sum(try_all(shown) for shown in list(Out.values()) if isinstance(shown, Explorer))
found = {"home": kl.__file__, "seed": SEED, "profile": PROFILE, "network": refused, "moves": moved, **versions}
print("probe", json.dumps(found))
"""


def source(name):
    return nbformat.read(build.FOLDER / f"{name}.ipynb", as_version=4)


def text(cell) -> str:
    """What a cell printed."""
    return "".join(out.get("text", "") for out in cell.outputs)


def probed(run) -> dict:
    """What the probe at a notebook's end found, once the run is known to be without problems."""
    assert run.problems == []
    return json.loads(text(nbformat.read(run.out, as_version=4).cells[-1]).removeprefix("probe "))


# ---- as `make tutorial` runs them -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One smoke run of all notebooks: its folder; name -> (seconds, gigabytes) from the lines that it prints; minutes
    in all; and how much slower than two quiet cores the machine was before or after it."""
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, str(build.FOLDER / "build.py"), "run", "--out", str(folder)]
    before, start = slowness(), time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    minutes = (time.perf_counter() - start) / 60
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(r"^\[\d+/\d+\] (\w+) +([\d.]+) s +([\d.]+) GB  ok$", result.stdout, flags=re.M)
    costs = {name: (float(seconds), float(gigabytes)) for name, seconds, gigabytes in lines}
    return folder, costs, minutes, max(before, slowness())


@pytest.mark.alone
def test_smoke_run_stays_in_its_budget(smoke, tmp_path):
    """Budgets on 2 quiet cores: 6 minutes in all, 60 s a notebook, 30 s for the quick start, 3 GB of memory.

    A slower or busier machine has as much longer as the yardstick of pace.py took longer, and a notebook that was over
    its budget, beside another one, is run by itself, twice if need be: a neighbour's burst passes, a slow cell stays.
    """
    _, costs, minutes, slow = smoke
    assert list(costs) == NAMES
    assert max(gigabytes for _, gigabytes in costs.values()) <= 3.0, costs
    assert minutes <= 6 * slow, (minutes, slow, costs)
    for name, (seconds, _) in costs.items():
        budget, alone = 30 if name == "00_quickstart" else 60, []
        while min([seconds, *alone]) > budget * slow:
            assert len(alone) < 2, (name, alone, slow, costs)
            before = slowness()
            smoke_only = {"PROFILE": "smoke"}
            again = build.execute(build.FOLDER / f"{name}.ipynb", tmp_path / "again.ipynb", parameters=smoke_only)
            assert again.problems == []
            alone.append(again.seconds)
            slow = max(slow, before, slowness())


@pytest.mark.alone
@pytest.mark.parametrize("name", NAMES)
def test_smoke_run_leaves_a_page_and_undone_exercises(smoke, name):
    folder, *_ = smoke
    page = (folder / f"{name}.html").read_text(encoding="utf8")
    assert not re.search(r'<script|<link|src="http|url\(["\']?http', page), "the page fetches something"
    assert "undrawn" not in page, "a formula holds a command that latex2mathml does not know"
    assert f'href="{name}.html"' in (folder / "index.html").read_text(encoding="utf8")
    checks = hygiene.tagged(nbformat.read(folder / f"{name}.ipynb", as_version=4), "check")
    assert [text(cell) for _, cell in checks if "not done yet" not in text(cell)] == []


# ---- what is committed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebook_keeps_the_rules(name):
    assert hygiene.problems(build.FOLDER / f"{name}.ipynb") == []


def test_check_passes_and_only_warns_of_old_outputs():
    result = subprocess.run([sys.executable, str(build.FOLDER / "build.py"), "check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- in Colab, with other parameters, with solutions ----------------------------------------------------------------


@pytest.fixture(scope="session")
def clone_url(tmp_path_factory):
    """A git repository of the working tree as it would be committed: all that a Colab kernel has of the project."""
    folder = tmp_path_factory.mktemp("origin")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in names:
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-f", "."], [*identity, "commit", "-q", "-m", "as it is"]):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    return folder.as_uri()


def colab(url: str | None, overlay: bool = False) -> dict:
    """The environment of a kernel in Colab: see tests/colab; two of them run at a time, so one thread each.

    `overlay`: with Colab's own ipywidgets, 7.7; under the installed one a browser moves the controls (test_browser.py).
    """
    paths = [str(ROOT / "tests" / "colab"), *([str(OVERLAY)] if overlay else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    env.pop("KARAT_LITE_REPO", None)
    return {**env, "KARAT_LITE_REPO": url} if url else env


def solved(name):
    """A notebook with every exercise's solution in the place of its stub."""
    nb = source(name)
    for stub, _, solution in hygiene.exercises(nb):
        nb.cells[stub].source = solution
    return nb


def seed_of(name) -> int:
    """Every second notebook runs with the seed that it names, the others with another one."""
    return 7 * (NAMES.index(name) % 2)


@pytest.fixture(scope="session")
def started(request, clone_url, tmp_path_factory):
    """started(name) -> Run. What the selected tests ask for runs two at a time; each test waits for its own."""

    def job(name):
        folder = tmp_path_factory.mktemp(f"colab-{name}")
        nb = solved(name)
        nb.cells.append(new_code_cell(PROBE))
        nbformat.write(nb, folder / f"{name}.ipynb")
        env = colab(clone_url, overlay=name in WITH_WIDGETS)
        parameters = {"PROFILE": "smoke", "SEED": seed_of(name)}
        return build.execute(folder / f"{name}.ipynb", folder / "out.ipynb", parameters=parameters, cwd=folder, env=env)

    with ThreadPoolExecutor(2) as pool:
        items = [item for item in request.session.items if "started" in getattr(item, "fixturenames", ())]
        futures = {item.callspec.params["name"]: None for item in items}
        futures = {name: pool.submit(job, name) for name in futures}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_runs_in_colab_with_parameters_and_solutions_pass(started, clone_url, name):
    """That no later cell gives an injected parameter another value is one of the rules of hygiene.py."""
    if not OVERLAY.is_dir():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("ipywidgets 7.7 is not installed: run `make test`")
    run = started(name)
    probe = probed(run)
    assert (probe["seed"], probe["profile"]) == (seed_of(name), "smoke")
    assert "no network in tests" in probe["network"], "a kernel can leave the machine"
    assert Path(probe["home"]).parent == run.out.parent / "karat-lite" / "karat_lite"
    assert probe["torch"] == TORCH
    assert probe["ipywidgets"].startswith("7.7.") if name in WITH_WIDGETS else probe["ipywidgets"] == WIDGETS
    assert (probe["moves"] > 0) == (name in WITH_WIDGETS), "each explorer's controls, at both ends and at the default"
    executed = nbformat.read(run.out, as_version=4)
    checks = hygiene.tagged(executed, "check")
    assert len(checks) == len(hygiene.exercises(source(name))) > 0
    verdicts = [text(cell).strip().rpartition("\n")[2] for _, cell in checks]  # a check may show something before it
    assert [verdict for verdict in verdicts if not verdict.startswith("✓ correct: ")] == []


PLANS = ("SEED = 0", "import dataclasses", "NAMES = {", 'paper = kl.RECIPES["paper"]', "plans = {", "where = (Path(")


@pytest.mark.parametrize("given", ["out of reach", "a folder"])
def test_a_reader_chooses_what_page_05_trains_at_length(given, tmp_path):
    """Its section 8 alone: without a network CIFAR-10 gives way to drawn shapes; a folder's pictures are read whole."""
    nb = source("05_training")
    nb.cells = [c for c in nb.cells if "bootstrap" in c.metadata.get("tags", []) or any(p in c.source for p in PLANS)]
    assert len(nb.cells) == 1 + len(PLANS)
    told = "chosen, parts[0].name, type(parts[0]).__name__, long_run.epochs, len(parts[0])"
    nb.cells.append(new_code_cell(f"print({told})"))
    nbformat.write(nb, tmp_path / "05_training.ipynb")
    parameters = {"PROFILE": "smoke", "EPOCHS": 2, "PLAN": "pico"}
    if given == "a folder":
        pixels = np.random.default_rng(0).integers(0, 255, (24, 36, 3)).astype(np.uint8)
        for path in (tmp_path / "pics" / part / kind for part in ("train", "test") for kind in "ab"):
            path.mkdir(parents=True)
            for i in range(20):
                Image.fromarray(pixels).save(path / f"{i}.png")
        parameters |= {"PLAN": "smoke", "DATA": tmp_path / "pics"}
    run = build.execute(tmp_path / "05_training.ipynb", tmp_path / "out.ipynb", parameters=parameters)
    assert run.problems == []
    cells = nbformat.read(run.out, as_version=4).cells
    said = "smoke shapes Images 2 64" if given == "out of reach" else "smoke pics Files 2 40"
    assert text(cells[-1]).strip() == said
    assert ("cannot download" in "".join(map(text, cells))) == (given == "out of reach")
    assert text(cells[-2]).count("test_accuracy") == 2


def test_colab_without_an_address_says_one_line(tmp_path):
    nb = source("00_quickstart")
    for _, cell in hygiene.tagged(nb, "bootstrap"):
        cell.source = cell.source.replace(hygiene.address(), UNKNOWN)
    nbformat.write(nb, tmp_path / "00_quickstart.ipynb")
    run = build.execute(tmp_path / "00_quickstart.ipynb", tmp_path / "out.ipynb", cwd=tmp_path, env=colab(None))
    assert len(run.problems) == 1 and "KARAT_LITE_REPO" in run.problems[0]
    outputs = [out for _, cell in hygiene.code_cells(nbformat.read(run.out, as_version=4)) for out in cell.outputs]
    (error,) = [out for out in outputs if out.output_type != "display_data"]
    assert (
        len(error.traceback) == 1
        and len(error.traceback[0].splitlines()) == 1
        and "KARAT_LITE_REPO" in error.traceback[0]
    )


# ---- the bootstrap cell alone, in a plain process -------------------------------------------------------------------

UNKNOWN = "https://github.com/" + "OWNER/karat-lite"


def bootstrap(folder: Path, env: dict, before: str = "", after: str = "print(kl.__file__)"):
    """Run the cell twice, as a reader may; (what it printed, the last line of what went wrong)."""
    cell = hygiene.bootstrap().replace(hygiene.address(), UNKNOWN)
    program = "\n".join([before, cell, cell, after])
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True)
    return result.stdout.strip(), (result.stderr.strip().splitlines() or [""])[-1]


def test_bootstrap_clones_once_and_again_after_a_restart(clone_url, tmp_path):
    for url in (clone_url, "file:///nowhere"):  # the second time the clone is there already, and the URL is not asked
        home, error = bootstrap(tmp_path, colab(url))
        assert home == str(tmp_path / "karat-lite" / "karat_lite" / "__init__.py"), error


def test_bootstrap_walks_up_to_a_checkout(clone_url, tmp_path):
    subprocess.run(["git", "clone", "-q", clone_url, "checkout"], cwd=tmp_path, check=True)
    not_installed = "import sys; sys.modules.pop('google.colab')"
    home, error = bootstrap(tmp_path / "checkout" / "notebooks", colab(None), before=not_installed)
    assert home == str(tmp_path / "checkout" / "karat_lite" / "__init__.py"), error
    home, error = bootstrap(tmp_path, colab(None), before=not_installed)
    assert home == "" and "pip install -e ." in error and error.startswith("Stop: ")


def test_bootstrap_says_which_address_failed(tmp_path):
    home, error = bootstrap(tmp_path, colab("file:///nowhere"))
    assert home == "" and "could not clone file:///nowhere" in error and "KARAT_LITE_REPO" in error


def test_bootstrap_installs_what_is_missing_and_light(clone_url, tmp_path):
    """einops hidden, pip replaced by a note of what it is asked for: one package, without its dependencies."""
    pip = tmp_path / "fake" / "pip"
    pip.mkdir(parents=True)
    asked = tmp_path / "asked"
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(
        f"import sys, pathlib\npathlib.Path({str(asked)!r}).write_text(' '.join(sys.argv[1:]))"
    )
    hide = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "einops" else find_spec(name)
"""
    env = colab(clone_url)
    env["PYTHONPATH"] += os.pathsep + str(pip.parent)
    home, error = bootstrap(tmp_path, env, before=hide)
    assert home, error
    assert asked.read_text() == "install -q --no-deps einops"
