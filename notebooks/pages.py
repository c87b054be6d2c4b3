"""HTML pages of executed notebooks, and their index: complete in themselves, nothing is fetched to show them.

nbconvert's own page loads MathJax, require.js and a widget renderer from the network. Here formulas become MathML,
which browsers draw themselves, and a widget is shown by the picture that its output carries.
"""

import html
import os
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from hygiene import address, tidy_outputs

TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}<style>
  body.jp-Notebook { max-width: 70rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
  math[display="block"] { margin: 0.8em 0; font-size: 1.1em; }
  .jp-InputArea .jp-InputArea-editor { overflow-x: auto; }
  .jp-RenderedImage img { max-width: 100%; height: auto; }
  summary { cursor: pointer; }
</style>{%- endblock -%}"""


class Renderer(IPythonRenderer):
    """Markdown to HTML with MathML formulas; links between notebooks become links between pages."""

    def math(self, body: str, display: str) -> str:
        formula = convert(body.replace("{aligned}", "{align*}").replace("{gathered}", "{gather*}"), display=display)
        if "\\" in formula or "<mi>&</mi>" in formula:  # what the converter does not know it leaves as it was written
            return f'<code class="undrawn">{self.escape_html(body)}</code>'
        return formula

    def block_math(self, body: str) -> str:
        return self.math(body.strip(), "block")

    def inline_math(self, body: str) -> str:
        return self.math(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.math(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, re.sub(r"^(\w+)\.ipynb", r"\1.html", url), title)


def markdown(source: str) -> str:
    """A Markdown cell as HTML."""
    return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(source)


class Pages(HTMLExporter):
    """nbconvert's exporter with our Markdown."""

    def markdown2html(self, source):
        return markdown(source)


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf8")
    os.replace(part, path)


def page(nb, path: Path) -> None:
    """One notebook as one HTML file."""
    nb = nbformat.from_dict(nb)
    nb.metadata.pop("widgets", None)
    nb.metadata["title"] = title(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = tidy_outputs(cell.outputs)
    exporter = Pages(raw_template=TEMPLATE)
    exporter.log.setLevel("ERROR")  # no count of pictures without a description: the text under them describes them
    write_whole(path, exporter.from_notebook_node(nb)[0])


def title(nb) -> str:
    """The first heading."""
    return next((m[1] for cell in nb.cells if (m := re.match(r"#\s+(.+)", cell.source))), "Untitled")


def summary(nb) -> str:
    """The first paragraph under the title that is prose: no badge, no list, no table, no heading."""
    text = re.sub(r"^#.*\n", "", nb.cells[0].source) if nb.cells else ""
    prose = [part.strip() for part in re.split(r"\n\s*\n", text) if re.match(r"\s*[\w*_`]", part) and "](" not in part]
    return markdown(prose[0]) if prose else ""


def index(runs, path: Path) -> None:
    """The front page: what each notebook is about, how long it took here."""
    items = []
    for run in runs:
        nb = nbformat.read(run.out, as_version=4)
        figures = f"{run.seconds:.0f} s, {run.megabytes / 1000:.1f} GB at most, {run.profile} profile"
        items.append(
            f'<li><a href="{run.name}.html"><h2>{html.escape(title(nb))}</h2></a>{summary(nb)}'
            f'<p class="figures"><code>{run.name}.ipynb</code>: {figures}</p></li>'
        )
    write_whole(path, INDEX.replace("@items@", "\n".join(items)).replace("@address@", html.escape(address())))


INDEX = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>KArAt-lite: the tutorial</title><style>
  body { font: 17px/1.55 system-ui, sans-serif; color: #1c2330; background: #fff; max-width: 46rem; margin: 0 auto;
         padding: 2.5rem 1.25rem 4rem; }
  h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 0; }
  ol { list-style: none; padding: 0; margin: 2rem 0; }
  li { border: 1px solid #d8dee8; border-radius: 10px; padding: 1rem 1.25rem; margin: 0 0 1rem; }
  a { color: #0b5cad; text-decoration: none; } a:hover, a:focus { text-decoration: underline; }
  p { margin: .45rem 0; } .figures { color: #566173; font-size: .88rem; } code { font-size: .92em; }
</style></head><body>
<h1>KArAt-lite: the tutorial</h1>
<p>Kolmogorov-Arnold attention, built, trained and looked into. These pages were just run on this machine; the pictures
move in JupyterLab: <code>make lab</code>.</p>
<ol>
@items@
</ol>
<p class="figures">Source: <a href="@address@">@address@</a>. Apache-2.0, KArAt-lite contributors.</p>
</body></html>
"""
