"""A notebook in a real browser, its explorers and their controls, as hands meet them; used by test_browser.py."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from jupyter_client import BlockingKernelClient

PICTURES = Path(__file__).resolve().parent.parent / "build" / "browser"

# Runs in the notebook's kernel. For each explorer: what its controls say, its error, the picture that it shows; and,
# where that is asked, the picture that its callback draws for these values, and the seconds that it takes.
TRUTH = """
import hashlib, json, time
from karat_lite.widgets import Explorer, render

def truth(e, draw):
    found = {"values": e.values, "error": e.error.value, "shown": hashlib.sha256(e.image.value).hexdigest()}
    if draw:
        start = time.thread_time()  # of the processor: what else the machine does is no part of it
        drawn = render(e.draw(**e.values))
        found |= {"seconds": time.thread_time() - start, "drawn": hashlib.sha256(drawn).hexdigest()}
    return found

print(json.dumps([truth(e, DRAW) for _, e in sorted((n, e) for n, e in Out.items() if isinstance(e, Explorer))]))
"""

PICTURE = "img.widget-image"
HASH = """async image => {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    return [...digest].map(byte => byte.toString(16).padStart(2, "0")).join("");
}"""


class Page:
    """One notebook in the browser. It begins to run at once; `wait` for its end before anything else."""

    def __init__(self, lab, browser, name: str, nb):
        self.address, token, self.folder = lab
        nbformat.write(nb, self.folder / f"{name}.ipynb")
        self.name, self.errors, self.refused = name, [], []
        self.page, self.client = browser.new_page(), None
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", self.must_stay_here)
        # A workspace of its own: a shared one opens the notebooks of earlier tests again, beside this one.
        self.page.goto(f"{self.address}/lab/workspaces/{name}/tree/{name}.ipynb?token={token}")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel")
        self.page.evaluate("() => void jupyterapp.commands.execute('notebook:run-all-cells')")
        self.cells = sum(cell.cell_type == "code" for cell in nb.cells)

    def wait(self) -> None:
        """Until all cells have run and the explorers show their pictures. A page behind another one draws nothing."""
        self.page.bring_to_front()
        prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        self.page.wait_for_function(
            f"{prompts}.filter(prompt => /\\d/.test(prompt.innerText)).length >= {self.cells}", timeout=180_000
        )
        self.page.wait_for_selector(PICTURE)
        self.explorers = self.page.locator(f".jp-OutputArea-child:has({PICTURE})").all()

    def close(self) -> None:
        """The kernel ends, too."""
        if self.client:
            self.client.stop_channels()
        self.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()

    def must_stay_here(self, request) -> None:
        """What a page keeps in itself (blob:, data:) is no request to anybody."""
        if not request.url.startswith((self.address, "blob:", "data:")):
            self.refused.append(request.url)

    def truth(self, draw: bool = True) -> list[dict]:
        """`TRUTH`, asked of the notebook's own kernel, which is behind the page when it is busy."""
        if self.client is None:
            kernel = self.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.id")
            file = self.folder.parent / "runtime" / f"kernel-{kernel}.json"
            self.client = BlockingKernelClient(connection_file=str(file))
            self.client.load_connection_file()
            self.client.start_channels()
        said = []
        hear = lambda message: said.append(message["content"].get("text", ""))  # noqa: E731
        ask = TRUTH.replace("DRAW", str(draw))
        reply = self.client.execute_interactive(ask, store_history=False, timeout=60, output_hook=hear)
        assert reply["content"]["status"] == "ok", reply["content"]
        return json.loads("".join(said))

    def shown(self, number: int) -> str:
        """SHA-256 of the one picture that an explorer shows; more than one is a failure."""
        explorer = self.explorers[number]
        assert explorer.locator("img").count() == 1
        return explorer.locator(PICTURE).evaluate(HASH)

    def settled(self, number: int, before: str, name: str, said) -> dict:
        """Wait until the kernel has the value of the control `name` that the page shows, `said()`, and the page shows
        the kernel's picture, another one than before: it is the one that the callback draws for these values."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            truth, shown = self.truth(draw=False)[number], self.shown(number)
            if same(truth["values"][name], said()) and shown == truth["shown"] != before:
                break
            time.sleep(0.05)
        truth = self.truth()[number]
        told = f"{self.name}, explorer {number}: shows {shown[:8]}, before {before[:8]}, {name} {said()}, {truth}"
        assert self.shown(number) == truth["drawn"] != before and same(truth["values"][name], said()), told
        return truth

    def agrees(self, number: int, name: str, said) -> dict:
        """As `settled`, for a move that may leave the picture as it is."""
        return self.settled(number, "", name, said)

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


class Control:
    """One control of an explorer as hands meet it: `ends` lists ways to move it, by mouse and by keyboard."""

    def __init__(self, page: Page, box):
        self.page, self.box = page, box
        self.name = box.locator(".widget-label").inner_text().replace(" ", "_")
        self.kind = next(
            kind for kind, mark in (("slider", ".noUi-handle"), ("menu", "select"), ("buttons", "button"))
            if box.locator(mark).count()
        )  # fmt: skip

    def said(self) -> str:
        """The value that the page shows."""
        if self.kind == "slider":
            return self.box.locator(".widget-readout").inner_text()
        if self.kind == "menu":
            chosen = self.box.locator("select").evaluate("select => select.selectedOptions[0].text")
            return chosen.replace("\N{NO-BREAK SPACE}", " ")  # as menus write their spaces
        return self.box.locator("button.mod-active").inner_text()

    def ends(self) -> list[tuple[str, Callable[[], None]]]:
        """(which end and how, the move): both ends by mouse, both by keyboard, the first end last."""
        if self.kind == "slider":
            handle = self.box.locator(".noUi-handle")
            return [
                ("last, mouse", lambda: self.drag(1)), ("first, mouse", lambda: self.drag(0)),
                ("last, keyboard", lambda: handle.press("End")), ("first, keyboard", lambda: handle.press("Home")),
            ]  # fmt: skip
        if self.kind == "menu":  # its list is the system's, which no page can click: chosen as by a click
            menu = self.box.locator("select")
            last = menu.locator("option").count() - 1
            return [
                ("last, mouse", lambda: menu.select_option(index=last)),
                ("first, keyboard", lambda: menu.press("Home")), ("last, keyboard", lambda: menu.press("End")),
                ("first, mouse", lambda: menu.select_option(index=0)),
            ]  # fmt: skip
        first, last = self.box.locator("button").first, self.box.locator("button").last
        return [
            ("last, mouse", last.click), ("first, mouse", first.click),
            ("last, keyboard", lambda: last.press("Enter")), ("first, keyboard", lambda: first.press("Space")),
        ]  # fmt: skip

    def drag(self, share: float) -> None:
        """Take the handle with the mouse and drop it beyond an end of its track."""
        self.box.scroll_into_view_if_needed()
        handle = self.box.locator(".noUi-handle").bounding_box()
        track = self.box.locator(".noUi-base").bounding_box()
        mouse = self.page.page.mouse
        mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
        mouse.down()
        beyond = track["x"] + share * track["width"] + (20 if share else -20)
        mouse.move(beyond, track["y"] + track["height"] / 2, steps=4)
        self.page.page.wait_for_timeout(200)
        mouse.up()
