"""Numbers that a reader is told come from a file: each "mean ± spread" of README and notebooks is in data/results."""

import functools
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


@functools.cache
def measured() -> set[str]:
    """Every mean and spread of data/results, as it is written with none, one or two digits, in parts or in percent."""
    pairs = []
    for path in (ROOT / "data" / "results").glob("*.json"):
        results = json.loads(path.read_text(encoding="utf8"))
        pairs += list(summaries(results))
        if isinstance(results.get("runs"), list):
            pairs += list(over_seeds(results["runs"]))
    ways = [(factor, digits) for factor in (1, 100) for digits in (0, 1, 2)]
    return {f"{f * mean:.{d}f} ± {f * spread:.{d}f}" for mean, spread in pairs for f, d in ways}


def summaries(part):
    """(mean, std) of every dict, at any depth, that holds the two."""
    if isinstance(part, dict):
        if isinstance(part.get("mean"), float) and isinstance(part.get("std"), float):
            yield part["mean"], part["std"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from summaries(inner)


def over_seeds(runs):
    """(mean, std) over the runs of a variant, of every number that a run gives, by itself or in a dict."""
    values = defaultdict(list)
    for run in runs:
        for key, value in run.items():
            for name, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, float):
                    values[run.get("attention"), key, name].append(number)
    yield from ((statistics.mean(v), statistics.stdev(v)) for v in values.values() if len(v) > 1)


def quoted(path: Path) -> list[str]:
    text = path.read_text(encoding="utf8")
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
    return [" ".join(found.split()) for found in re.findall(r"\d+(?:\.\d+)?\s±\s\d+(?:\.\d+)?", text)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_what_is_quoted_was_measured(path):
    missing = [pair for pair in quoted(path) if pair not in measured()]
    assert not missing, f"{path.name} quotes figures that no file of data/results holds: {missing}"


def test_the_search_finds_and_misses(tmp_path):
    assert "97.87 ± 0.16" in measured() and "97.87 ± 0.17" not in measured()
    text = tmp_path / "README.md"
    text.write_text("softmax 97.87 ±\n0.58 %, KArAt 1 ± 2", encoding="utf8")
    assert quoted(text) == ["97.87 ± 0.58", "1 ± 2"]
    assert len(quoted(ROOT / "README.md")) > 50
