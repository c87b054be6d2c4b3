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
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import matplotlib
import nbformat
import pytest
from jupyter_client import BlockingKernelClient
from nbformat.v4 import new_code_cell, new_notebook

import build

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "build" / "browser"
NAMES = [path.stem for path in build.chosen(()) if "kl.widgets.explore" in path.read_text(encoding="utf8")]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()  # fmt: skip
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

# Runs in the notebook's kernel: for each explorer, what its callback draws for the values that its controls say.
TRUTH = """
import hashlib, json
from karat_lite.widgets import Explorer, render
print(json.dumps([
    {"values": e.values, "error": e.error.value, "drawn": hashlib.sha256(render(e.draw(**e.values))).hexdigest()}
    for _, e in sorted((n, e) for n, e in Out.items() if isinstance(e, Explorer))
]))
"""


PICTURE = "img.widget-image"
HASH = """async image => {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    return [...digest].map(byte => byte.toString(16).padStart(2, "0")).join("");
}"""


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
        yield chromium
        chromium.close()


class Page:
    """One notebook in the browser, all its cells run."""

    def __init__(self, lab, browser, name: str, nb):
        self.address, token, self.folder = lab
        nbformat.write(nb, self.folder / f"{name}.ipynb")
        self.name, self.errors, self.refused = name, [], []
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.route("**/*", self.stay_here)
        # A workspace of its own: a shared one opens the notebooks of earlier tests again, beside this one.
        self.page.goto(f"{self.address}/lab/workspaces/{name}/tree/{name}.ipynb?token={token}")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel")
        self.page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        count = sum(cell.cell_type == "code" for cell in nb.cells)
        self.page.wait_for_function(
            f"{prompts}.filter(prompt => /\\d/.test(prompt.innerText)).length >= {count}", timeout=120_000
        )
        self.page.wait_for_selector(PICTURE)
        self.explorers = self.page.locator(f".jp-OutputArea-child:has({PICTURE})").all()

    def stay_here(self, route) -> None:
        """No request leaves this machine; what a page keeps in itself (blob:, data:) is no request."""
        if route.request.url.startswith(self.address):
            route.continue_()
        else:
            self.refused.append(route.request.url)
            route.abort()

    def truth(self) -> list[dict]:
        """`TRUTH`, asked of the notebook's own kernel."""
        kernel = self.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.id")
        client = BlockingKernelClient(connection_file=str(self.folder.parent / "runtime" / f"kernel-{kernel}.json"))
        client.load_connection_file()
        client.start_channels()
        try:
            said = []
            hear = lambda message: said.append(message["content"].get("text", ""))  # noqa: E731
            reply = client.execute_interactive(TRUTH, store_history=False, timeout=60, output_hook=hear)
            assert reply["content"]["status"] == "ok", reply["content"]
            return json.loads("".join(said))
        finally:
            client.stop_channels()

    def shown(self, number: int) -> str:
        """SHA-256 of the one picture that an explorer shows; more than one is a failure."""
        explorer = self.explorers[number]
        assert explorer.locator("img").count() == 1
        return explorer.locator(PICTURE).evaluate(HASH)

    def settled(self, number: int, before: str, name: str, said) -> dict:
        """Wait until the kernel has the value of the control `name` that the page shows, `said()`, and the picture is
        another one than before, and the one that the callback draws."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            truth = self.truth()[number]
            shown = self.shown(number)
            if same(truth["values"][name], said()) and shown == truth["drawn"] != before:
                return truth
            time.sleep(0.1)
        pytest.fail(f"{self.name}, explorer {number}: shows {shown[:8]}, before {before[:8]}, {name} {said()}, {truth}")

    def snap(self, number: int, what: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.explorers[number].screenshot(path=PICTURES / f"{self.name}_{number}_{what}.png")


def same(value, said: str) -> bool:
    """Whether a control's value is what the page says: a slider shows -1.5 as −1.50."""
    return str(value) == said if isinstance(value, str) else float(said.replace("−", "-")) == pytest.approx(value)


def drag(page: Page, slider) -> None:
    """Take a slider's handle with the mouse and drop it well inside the other half of its track."""
    slider.scroll_into_view_if_needed()
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    share = 0.7 if x < track["x"] + track["width"] / 2 else 0.3
    mouse = page.page.mouse
    mouse.move(x, y)
    mouse.down()
    mouse.move(track["x"] + share * track["width"], y, steps=4)
    page.page.wait_for_timeout(200)  # a busy page is a little behind the mouse
    mouse.up()


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


def no_complaint(page: Page) -> None:
    """Nothing went wrong in the page, and nothing was asked of the network."""
    assert page.errors == [] and page.refused == []
    assert page.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    page.page.close()


def test_an_explorer_in_jupyterlab(lab, browser):
    """Every kind of control; a callback that fails is told under the controls, beside the last good picture."""
    page = Page(lab, browser, "tiny", new_notebook(cells=list(map(new_code_cell, TINY)), metadata=build.hygiene.KERNEL))
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


@pytest.mark.parametrize("name", NAMES)
def test_the_explorers_of_a_notebook(lab, browser, name):
    nb = nbformat.read(build.FOLDER / f"{name}.ipynb", as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r"(?m)^PROFILE = .*$", 'PROFILE = "smoke"', cell.source)
    page = Page(lab, browser, name, nb)
    try_sliders(page)
    no_complaint(page)
