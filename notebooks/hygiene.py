"""What a committed notebook must look like, and how an executed one is brought into that shape.

Everything here reads or changes notebooks as data; running them is `build.py`'s work. A problem is one line that names
the cell by its position in the file (the first is cell 1, markdown included).
"""

import ast
import base64
import io
import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

from fingerprint import fingerprint, parsed

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = {"PROFILE": "reader", "SEED": 0, "DEVICE": "auto"}
MAX_BYTES, MAX_LINES = 1_500_000, 40
VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
MACHINE_PATH = re.compile(r"/(?:work|home|root|tmp|opt|usr)/[\w./-]+")
KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def address() -> str:
    """The repository's public address, from its one place."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]["urls"]["Repository"]


def bootstrap() -> str:
    """The source of every notebook's first code cell."""
    text = (ROOT / "notebooks" / "bootstrap.py").read_text(encoding="utf8")
    return text.replace("{repository}", address()).rstrip("\n")


def tagged(nb, tag):
    """(index, cell) of the cells that carry a tag."""
    return [(i, cell) for i, cell in enumerate(nb.cells) if tag in cell.metadata.get("tags", [])]


def code_cells(nb):
    """(index, cell) of the code cells that are not empty."""
    return [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and cell.source.strip()]


# ---- failures that papermill does not see ----------------------------------------------------------------------------


def failures(nb):
    """Errors in outputs, in `Output` widgets and in the explorers' own message, each with the cell that shows it."""
    nb = nbformat.from_dict({**nb, "cells": [cell for cell in nb.cells if not added_by_papermill(cell)]})
    for i, cell in code_cells(nb):
        for out in cell.get("outputs", []):
            if out.output_type == "error":
                yield f"cell {i + 1} raised {out.ename}: {' '.join(out.evalue.splitlines()[:1])}"
    states = nb.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    for model, record in states.items():
        state = record.get("state", {})
        raised = [out for out in state.get("outputs", []) if out.get("output_type") == "error"]
        if raised:
            where = shown_in(nb, states, model)
            yield f"{where}: an Output widget holds {raised[0].get('ename')}: {raised[0].get('evalue')}"
        elif "karat-error" in str(state.get("value", "")):
            text = " ".join(re.sub(r"<[^>]*>", " ", state["value"]).split())
            yield f"{shown_in(nb, states, model)}: an explorer reports a failed callback: {text}"


def added_by_papermill(cell) -> bool:
    """The cells that a run inserts, and that the author's count of cells does not know."""
    return bool({"injected-parameters", "papermill-error-cell-tag"} & set(cell.metadata.get("tags", [])))


def shown_in(nb, states, model) -> str:
    """Which cell displays a widget model, itself or inside a box."""
    family, grown = {model}, True
    while grown:
        above = {m for m, record in states.items() if any(f"IPY_MODEL_{f}" in json.dumps(record) for f in family)}
        grown, family = not above <= family, family | above
    for i, cell in code_cells(nb):
        if any(out.get("data", {}).get(VIEW, {}).get("model_id") in family for out in cell.get("outputs", [])):
            return f"cell {i + 1}"
    return "a widget that no cell displays"


# ---- outputs as they are committed -----------------------------------------------------------------------------------


def portable(text: str) -> str:
    """Paths of the machine that ran the notebook, as a reader may see them."""
    text = re.sub(r"/[\w./-]*/ipykernel_\d+/\d+\.py", "<cell>", text)
    text = re.sub(r"/[\w./-]*/site-packages/", "site-packages/", text)
    return text.replace(f"{ROOT}/", "").replace(str(ROOT), ".").replace(str(Path.home()) + "/", "~/")


def settled(text: str) -> str:
    """What stays on a terminal: of a line that was redrawn with carriage returns, the last drawing."""
    return "\n".join(
        next((part for part in reversed(line.split("\r")) if part), "").rstrip() for line in text.split("\n")
    )


def lighter(picture: str) -> str:
    """A PNG in base64, in a palette of 256 colours where nobody sees that: most figures, at a third of their size.

    An eighth of the palette are greys; the rest is for colours, half by how many pixels have them, half by how many
    there are, so that a narrow colour scale keeps its steps. Left as it is: what is half transparent, and a picture in
    which more than 1 % of the coloured pixels would change by 16 of 255 or more.
    """
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        if "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255):
            return picture  # a palette would lose what is half transparent
        every = image.convert("RGB")
        pixels = np.asarray(every)
        coloured = np.ptp(pixels.astype(int), axis=-1) > 12
        palette = [int(grey) for grey in np.linspace(0, 255, 32).round() for _ in "rgb"]
        if coloured.any():
            for some in (pixels[coloured], np.unique(pixels[coloured], axis=0)):
                cut = Image.fromarray(some[None]).quantize(112, method=Image.Quantize.MEDIANCUT)
                palette += cut.getpalette()[: 3 * 112]
        wanted = Image.new("P", (1, 1))
        wanted.putpalette(palette)
        few = every.quantize(palette=wanted, dither=Image.Dither.NONE)
        moved = np.abs(np.asarray(few.convert("RGB")).astype(int) - pixels).max(axis=-1)
        if (moved[coloured] >= 16).sum() > 0.01 * coloured.sum():
            return picture
    png = io.BytesIO()
    few.save(png, format="png", optimize=True)
    return min(picture, base64.b64encode(png.getvalue()).decode(), key=len)


def tidy_outputs(outputs) -> list:
    """Text in one piece, no widget views or finished progress bars, no machine paths, pictures made lighter."""
    kept, errors = [], None
    for out in outputs:
        if out.output_type == "stream":
            previous = errors if out.name == "stderr" else (kept[-1] if kept else None)
            if previous is not None and previous.output_type == "stream" and previous.name == out.name:
                previous.text += out.text
                continue
            errors = out if out.name == "stderr" else errors
        elif VIEW in out.get("data", {}):
            if re.match(r"([^|%]*:)?\s*\d+%\|", out.data.get("text/plain", "")):  # a bar, drawn before it moved
                continue
            out.data = {mime: data for mime, data in out.data.items() if mime.startswith("image/")}
            out.data["text/plain"] = "(interactive: run this cell to move its controls)"
        kept.append(out)
    for out in kept:
        if out.output_type == "stream":
            out.text = portable(settled(out.text))
        for mime, data in out.get("data", {}).items():
            if isinstance(data, str):
                out.data[mime] = lighter(data) if mime == "image/png" else portable(data)
    return [out for out in kept if out.get("text", "?").strip()]


def committed(source, executed):
    """The authored notebook with the outputs of one clean run; of the run itself nothing stays but a fingerprint."""
    nb = nbformat.from_dict(json.loads(json.dumps(source)))
    for cell, run in zip(nb.cells, executed.cells, strict=True):
        cell.metadata = {key: cell.metadata[key] for key in ("tags", "jupyter") if cell.metadata.get(key)}
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = run.execution_count, tidy_outputs(run.outputs)
    nb.metadata = {**KERNEL, "karat_lite": {"fingerprint": fingerprint(source), "profile": PARAMETERS["PROFILE"]}}
    return nbformat.from_dict(nb)


# ---- the rules -------------------------------------------------------------------------------------------------------


def exercises(nb) -> list[tuple[int, int, str]]:
    """(index of the stub's cell, index of its check cell, solution) of every exercise whose parts are all there."""
    found = []
    for i, _ in tagged(nb, "exercise"):
        check, answer = nb.cells[i + 1 : i + 2], nb.cells[i + 2 : i + 3]
        block = re.search(r"<details>.*?```python\n(.*?)```.*?</details>", answer[0].source if answer else "", re.S)
        if check and "check" in check[0].metadata.get("tags", []) and block:
            found.append((i, i + 1, block[1].rstrip()))
    return found


def reassigned(nb) -> list[str]:
    """Parameters that a cell after the parameters cell assigns, imports or deletes: an injected value would be lost."""
    ((start, cell),) = tagged(nb, "parameters")
    names = {node.id for node in ast.walk(parsed(cell.source)) if isinstance(node, ast.Name)}
    lost = []
    for i, later in code_cells(nb):
        for node in ast.walk(parsed(later.source)) if i > start else ():
            bound = node.id if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) else None
            bound = (node.asname or node.name) if isinstance(node, ast.alias) else bound
            if bound in names:
                lost.append(f"cell {i + 1} gives the parameter {bound} another value")
    return lost


def source_problems(nb, folder: Path):
    """The rules about what the author writes."""
    cells = [cell for _, cell in tagged(nb, "bootstrap")]
    if [cell.source for cell in cells] != [bootstrap()]:
        yield "the bootstrap cell is not notebooks/bootstrap.py with pyproject's address: run `make address`"
    marked = tagged(nb, "parameters")
    if len(marked) != 1:
        yield f"{len(marked)} cells are tagged `parameters`, not one"
    else:
        tree = parsed(marked[0][1].source)
        values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
        for name, value in PARAMETERS.items():
            if name not in values or ast.unparse(values[name]) != repr(value):
                yield f"cell {marked[0][0] + 1}: the parameters cell does not say {name} = {value!r}"
        yield from reassigned(nb)
    whole = {i for i, _, _ in exercises(nb)}
    for i, _ in tagged(nb, "exercise"):
        if i not in whole:
            yield f"cell {i + 1}: no cell tagged `check` and no folded ```python solution after the exercise"
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    sections = [int(number) for number in re.findall(r"^## (\d+) · ", text, re.M)]
    if any(after != before + 1 for before, after in pairwise(sections)):
        yield f"sections are numbered {', '.join(map(str, sections))}: one is lost, or two have one number"
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and len(cell.source.splitlines()) > MAX_LINES:
            yield f"cell {i + 1} has {len(cell.source.splitlines())} lines, {MAX_LINES} at most"
        if MACHINE_PATH.search(cell.source):
            yield f"cell {i + 1} names a machine path: {MACHINE_PATH.search(cell.source)[0]}"
        if cell.cell_type == "markdown":
            for link in re.findall(r"""(?:!\[[^\]]*\]\(|<img[^>]+src=["'])([^)\s"']+)""", cell.source):
                if not link.startswith(("data:", "attachment:")):
                    yield f"cell {i + 1} fetches a picture: {link[:60]}"
            for link in re.findall(r"(?<!!)\[[^\]]*\]\(([\w./-]+\.ipynb)", cell.source):
                if not (folder / link).is_file():
                    yield f"cell {i + 1} links to {link}, which is not there"


def output_problems(nb):
    """The rules about what a clean run leaves behind."""
    counts = [cell.execution_count for _, cell in code_cells(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield "execution counts are not 1..n: the outputs are not of one clean run"
    yield from failures(nb)
    for key in sorted({"widgets", "papermill"} & set(nb.metadata)):
        yield f"metadata.{key} is committed"
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec is not python3"
    if nb.metadata.get("karat_lite", {}).get("profile") != PARAMETERS["PROFILE"]:
        yield "the outputs are not of the `reader` profile, run by `make notebooks`"
    for i, cell in enumerate(nb.cells):
        extra = sorted(set(cell.metadata) - {"tags", "jupyter"}) + [
            tag for tag in cell.metadata.get("tags", []) if tag == "injected-parameters"
        ]
        if extra:
            yield f"cell {i + 1} carries the metadata {extra}"
        texts = []
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if VIEW in data:
                yield f"cell {i + 1} shows a widget view, which a page cannot draw"
            texts += [out.get("text", "")] + [str(data[mime]) for mime in data if not mime.startswith("image/png")]
        if found := MACHINE_PATH.search("\n".join(texts)):
            yield f"cell {i + 1} prints a machine path: {found[0][:60]}"


def problems(path: Path) -> list[str]:
    """Everything that is wrong with one committed notebook."""
    size = path.stat().st_size
    big = [f"{size / 1e6:.1f} MB, {MAX_BYTES / 1e6} at most"] if size > MAX_BYTES else []
    try:
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
    except (ValueError, nbformat.ValidationError) as error:
        return [*big, f"not a valid notebook: {str(error).splitlines()[0]}"]
    return [*big, *source_problems(nb, path.parent), *output_problems(nb)]


def stale(path: Path) -> bool:
    """Whether the outputs are older than the code: a warning, since only a run of minutes mends it."""
    nb = nbformat.read(path, as_version=4)
    return nb.metadata.get("karat_lite", {}).get("fingerprint") != fingerprint(nb)
