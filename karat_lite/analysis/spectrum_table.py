"""Ranks before and after the activation, and weights over training, of several seeds: the table behind the findings.

python -m karat_lite.train --data shapes --seeds 0 1 2 --snapshots 20 --out runs
python -m karat_lite.analysis.spectrum_table --runs runs --results data/results/shapes_spectrum.json

Runs whose names differ in the seed alone are seeds of one model; a trajectory.safetensors beside the model adds the
history of its weights.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from ..checkpoints import write_whole
from ..checks import at_least, run_command
from ..data import load_dataset, name_of
from ..trajectory import FILE, load_trajectory
from .cost import machine
from .runs import find_runs, source_of
from .spectrum import rank_table, spectra
from .weights import tail_table

DIGITS = 5  # of the numbers in the file


def seeds_table(folder: str | Path, images: int = 64, data: str | None = None, rank: int = 12) -> dict:
    """Measure the runs in `folder` on the first `images` test images; means and standard deviations (n - 1) of seeds.

    data: the dataset, or the path of the image folder, that the runs are named after, where `folder` holds runs of
    several; rank: r of "energy in r".
    The record's parts:
        runs      a line each: run, model, seed, accuracy, ranks (`rank_table`), weights (`tail_table`, or None)
        ranks     model -> measure -> "before" | "after" -> {"mean": L numbers, "std": L numbers}
        weights   model -> kind -> "count", and "std", "kurtosis", "beyond4", "moved" -> {"mean": 3 numbers, "std": 3}
                  at the first, middle and last snapshot; where a number is not defined it is None
    Raises as `find_runs` does.
    """
    at_least("images", images, 1)
    found_runs, runs = find_runs(folder, data and name_of(data)), []
    size = found_runs[0].card["img_size"]
    shown = load_dataset(source_of(found_runs[0], data), "test", img_size=size, limit=images)[:][0]
    for run in found_runs:
        trajectory = run.folder / FILE
        ranks = rank_table(spectra(run.model(), shown), rank)
        history = tail_table(load_trajectory(trajectory)) if trajectory.is_file() else None
        line = {"run": run.folder.name, "model": run.variant, "seed": run.seed}
        line |= {"accuracy": run.card["metrics"]["test_accuracy"], "ranks": ranks, "weights": history}
        runs.append(line)
    names = dict.fromkeys(run["model"] for run in runs)
    found = {"data": {"name": run.data, "images": len(shown), "img_size": size}, "rank": rank}
    for part in ("ranks", "weights"):
        of_model = {model: [run[part] for run in runs if run["model"] == model and run[part]] for model in names}
        found[part] = {model: _over_seeds(tables) for model, tables in of_model.items() if tables}
    return _rounded({**found, "runs": runs})


def _over_seeds(tables: list):
    """The same nesting, with lists of numbers replaced by their mean and spread over the tables (None of one)."""
    first = tables[0]
    if isinstance(first, dict):
        return {key: _over_seeds([table[key] for table in tables]) for key in first}
    if not isinstance(first, list):
        return first
    values = np.array(tables, dtype=float)  # None becomes NaN
    spread = values.std(axis=0, ddof=1).tolist() if len(values) > 1 else None
    return {"mean": values.mean(axis=0).tolist(), "std": spread}


def _rounded(value):
    """To `DIGITS` significant digits, and NaN to None, at any depth."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return None if np.isnan(value) else float(f"{value:.{DIGITS}g}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Write the table, with the command and the machine that made it."""
    parser = argparse.ArgumentParser(prog="python -m karat_lite.analysis.spectrum_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=Path, required=True, help="the folder that training wrote with --out")
    parser.add_argument("--results", type=Path, required=True, help="JSON file for the table")
    parser.add_argument("--images", type=int, default=64, help="test images (64)")
    parser.add_argument("--data", help="dataset or image folder that the runs are named after")
    parser.add_argument("--rank", type=int, default=12, help="r, for the share of the energy in r values (12)")
    args = parser.parse_args(argv)
    command = "python -m karat_lite.analysis.spectrum_table " + shlex.join(sys.argv[1:] if argv is None else argv)
    table = seeds_table(args.runs, args.images, args.data, args.rank)
    found = {"command": command, "machine": machine(), **table}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.results, lambda temporary: temporary.write_text(json.dumps(found, indent=1) + "\n"))
    for model, measures in found["ranks"].items():
        seeds = sorted(run["seed"] for run in found["runs"] if run["model"] == model)
        for side in ("before", "after"):
            values = ", ".join(f"{value:.2f}" for value in measures["effective rank"][side]["mean"])
            print(f"{model:10s} seeds {seeds}: effective rank {side:6s} by layer {values}")
    print(f"written: {args.results}")


if __name__ == "__main__":
    run_command(main)
