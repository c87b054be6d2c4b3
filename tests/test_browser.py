"""Explorers as a reader meets them: JupyterLab in a real browser, sliders moved by mouse and by keyboard.

JupyterLab runs on loopback with an empty home; the browser asks nothing of the network. Screenshots of every notebook
go to build/browser/.
"""

import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import matplotlib
import nbformat
import pytest
from browser_page import Control, Page, drag
from nbformat.v4 import new_code_cell, new_notebook
from pace import slowness

import build

ROOT = Path(__file__).resolve().parent.parent
DASHBOARDS = ("06_learned_functions", "07_attention_maps", "08_spectrum_and_weights", "09_loss_landscape")
REACTION = 0.3  # seconds of a quiet processor to draw, the median over all moves of a dashboard
NAMES = [path.stem for path in build.chosen(()) if "kl.widgets.explore" in path.read_text(encoding="utf8")]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()  # fmt: skip
FLAGS.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # nothing leaves this machine
SETTINGS = {  # cells that are scrolled away stay in the page; no news from outside
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

TINY = [
    "import karat_lite as kl\nsetup = kl.notebook.setup('smoke', 0, 'cpu')",
    """import torch

x = torch.linspace(-4, 4, 200)

def draw(m=2, kind="cos", shift=0.0):
    if m == 5:
        raise ZeroDivisionError("five is too much")
    return kl.plots.learned_functions(x, [getattr(torch, kind)(m * x + shift)], [f"{kind}, m = {m}"])

draw()""",
    'kl.widgets.explore(draw, m=range(6), kind=["cos", "sin"], shift=(0.0, 3.0, 0.5))',
]


def browser_path() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.fail("no Chromium: install one (Debian, Ubuntu: apt-get install chromium) or set CHROMIUM to its path.")
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own: address, token, and the folder that it shows."""
    home = tmp_path_factory.mktemp("home")
    folder, settings = home / "notebooks", home / "settings"
    folder.mkdir()
    for name, values in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    env |= {
        "HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "MPLCONFIGDIR": matplotlib.get_configdir(),  # finding all fonts again takes seconds
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)]),
        "OMP_NUM_THREADS": "1",  # two notebooks at a time
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}"]
    log = (home / "log").open("w+")
    server = subprocess.Popen(command, env=env, cwd=home, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.25)
        else:
            pytest.fail("JupyterLab did not start: " + (home / "log").read_text()[-2000:])
        yield address, token, folder
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        yield chromium.new_context(viewport={"width": 1280, "height": 1000})  # one: JupyterLab is fetched once
        chromium.close()


def try_sliders(page: Page) -> None:
    """Every explorer: its first slider dragged, then moved by the keyboard; one picture, the right one, every time."""
    start = page.truth()
    assert len(page.explorers) == len(start) > 0
    for number, explorer in enumerate(page.explorers):
        assert page.shown(number) == start[number]["drawn"]
        slider = explorer.locator(".widget-slider").first
        name = slider.locator(".widget-label").inner_text().replace(" ", "_")
        readout = slider.locator(".widget-readout").inner_text
        drag(page, slider)
        dragged = page.settled(number, start[number]["drawn"], name, readout)
        page.snap(number, "mouse")
        slider.locator(".noUi-handle").press("ArrowLeft")
        pressed = page.settled(number, dragged["drawn"], name, readout)
        others = start[number]["values"] | {name: pressed["values"][name]}
        assert start[number]["values"][name] != dragged["values"][name] > pressed["values"][name]
        assert pressed["values"] == others, "a slider moves its own value only"
        explorer.get_by_text(f"{name} = {pressed['values'][name]:g}").wait_for()  # the caption follows the picture
        assert pressed["error"] == "" and explorer.locator(".karat-error").count() == 0
        page.snap(number, "keyboard")


def try_every_control(page: Page) -> None:
    """A dashboard: each control to both ends by mouse and keyboard; then another model, which keeps what was set."""
    (explorer,) = page.explorers
    found = explorer.locator(".widget-hslider, .widget-dropdown, .widget-toggle-buttons").all()
    controls = {control.name: control for control in (Control(page, box) for box in found)}
    start = page.truth()[0]
    assert list(controls) == list(start["values"]) and page.shown(0) == start["drawn"]
    seconds = []
    for name, control in controls.items():
        pictures, reached = {page.shown(0)}, {}
        for end, move in control.ends():
            move()
            truth = page.agrees(0, name, control.said)
            value = truth["values"][name]
            assert reached.setdefault(end.partition(",")[0], value) == value, "mouse and keyboard reach one end"
            pictures.add(truth["drawn"])
            seconds.append(truth["seconds"])
            page.snap(0, f"{name}_{end.replace(', ', '_')}")
        assert len(pictures) > 1, f"{page.name}: the control {name} changes no picture"
        assert reached["first"] != reached["last"]
    slider = next(control for control in controls.values() if control.kind == "slider")
    slider.box.locator(".noUi-handle").press("End")
    before = page.agrees(0, slider.name, slider.said)
    other = next(button for button in controls["model"].box.locator("button").all() if "mod-active" not in
                 button.get_attribute("class"))  # fmt: skip
    here = controls["model"].said()
    other.click()
    after = page.agrees(0, "model", controls["model"].said)
    assert after["drawn"] != before["drawn"] and after["values"]["model"] != here
    assert after["values"] == before["values"] | {"model": after["values"]["model"]}, "what was set is lost"
    controls["model"].box.get_by_role("button", name=here, exact=True).click()
    assert page.agrees(0, "model", controls["model"].said)["drawn"] == before["drawn"]
    assert explorer.locator(".karat-error").count() == 0
    print(f"{page.name}: median {statistics.median(seconds):.2f} s a move, {max(seconds):.2f} at most")
    if statistics.median(seconds) > REACTION:
        assert statistics.median(seconds) <= REACTION * slowness(), seconds


def no_complaint(page: Page) -> None:
    """Nothing went wrong in the page, and nothing was asked of the network."""
    assert page.errors == [] and page.refused == []
    assert page.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    page.close()


def test_an_explorer_in_jupyterlab(lab, browser):
    """Every kind of control; a callback that fails is told under the controls, beside the last good picture."""
    page = Page(lab, browser, "tiny", new_notebook(cells=list(map(new_code_cell, TINY)), metadata=build.hygiene.KERNEL))
    page.wait()
    assert page.page.locator(".jp-RenderedImage img").count() == 1  # the figure at the end of the cell before
    try_sliders(page)
    (explorer,) = page.explorers
    before = page.shown(0)
    explorer.get_by_role("button", name="sin").click()
    pressed = explorer.locator("button.mod-active")
    page.settled(0, before, "kind", lambda: pressed.inner_text())

    before, slider = page.shown(0), explorer.locator(".widget-slider").first
    slider.locator(".noUi-handle").press("End")
    explorer.locator(".karat-error").wait_for()
    assert "ZeroDivisionError: five is too much" in explorer.inner_text() and "m = 5" in explorer.inner_text()
    assert page.shown(0) == before
    page.snap(0, "error")
    slider.locator(".noUi-handle").press("Home")
    explorer.locator(".karat-error").wait_for(state="detached")
    page.settled(0, before, "m", lambda: "0")
    no_complaint(page)


@pytest.fixture(scope="module")
def opened(request, lab, browser):
    """opened(name) -> Page. While hands are at one notebook, the next that is asked for runs already."""

    def page(name):
        nb = nbformat.read(build.FOLDER / f"{name}.ipynb", as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = re.sub(r"(?m)^PROFILE = .*$", 'PROFILE = "smoke"', cell.source)
        # What comes after the last explorer runs in test_notebooks.py.
        del nb.cells[1 + max(i for i, cell in enumerate(nb.cells) if "kl.widgets.explore(" in cell.source) :]
        return Page(lab, browser, name, nb)

    items = [item for item in request.session.items if "opened" in getattr(item, "fixturenames", ())]
    names, pages = [item.callspec.params["name"] for item in items], {}

    def of(name):
        for each in names[names.index(name) :][:2]:
            if each not in pages:
                pages[each] = page(each)
        pages[name].wait()
        return pages[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_the_explorers_of_a_notebook(opened, name):
    page = opened(name)
    if name in DASHBOARDS:
        try_every_control(page)
    else:
        try_sliders(page)
    no_complaint(page)
