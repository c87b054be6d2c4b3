"""Ranks before and after the activation, and weights over training, of several seeds: the table behind the findings.

python -m karat_lite.train --data shapes --seeds 0 1 2 --snapshots 20 --out runs
python -m karat_lite.analysis.spectrum_table --runs runs --results data/results/shapes_spectrum.json

Every folder in `--runs` that holds a model.safetensors is one run. Runs whose names differ in the seed alone are seeds
of one model; a trajectory.safetensors beside the model adds the history of its weights.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np

from ..checkpoints import load_checkpoint, write_whole
from ..checks import at_least, run_command
from ..data import load_dataset
from ..trajectory import FILE, load_trajectory
from .cost import machine
from .spectrum import rank_table, spectra
from .weights import tail_table

DIGITS = 5  # of the numbers in the file


def seeds_table(folder: str | Path, images: int = 64, data: str | None = None, rank: int = 12) -> dict:
    """Measure every run in `folder` on the first `images` test images; means and standard deviations (n - 1) of seeds.

    data: a dataset's name or folder, in place of the one on the runs' cards; rank: r of "energy in r".
    The record's parts:
        runs      a line each: run, model, seed, accuracy, ranks (`rank_table`), weights (`tail_table`, or None)
        ranks     model -> measure -> "before" | "after" -> {"mean": L numbers, "std": L numbers}
        weights   model -> kind -> "count", and "std", "kurtosis", "beyond4", "moved" -> {"mean": 3 numbers, "std": 3}
                  at the first, middle and last snapshot; where a number is not defined it is None
    Raises `FileNotFoundError` for a folder without runs, `ValueError` for a run that is not finished, or runs of
    several datasets.
    """
    paths = sorted(Path(folder).glob("*/model.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"no run in {folder}: expected folders with a model.safetensors in it, as "
            "python -m karat_lite.train --out FOLDER makes."
        )
    runs, sets = [], {}
    for path in paths:
        model, card = load_checkpoint(path)
        done, wanted = card["metrics"]["epoch"], card["recipe"]["epochs"]
        if done < wanted:
            raise ValueError(f"the run {path.parent.name} has trained {done} of {wanted} epochs: finish it first.")
        key = (data or card["data"], card["img_size"])
        if sets and key not in sets:
            raise ValueError(
                f"the run {path.parent.name} is of {key[0]} at {key[1]} pixels, others are of {next(iter(sets))[0]} at "
                f"{next(iter(sets))[1]}: one table holds runs of one dataset."
            )
        if key not in sets:
            sets[key] = load_dataset(key[0], "test", img_size=key[1], limit=at_least("images", images, 1))
        shown = sets[key][: len(sets[key])][0]
        trajectory = path.with_name(FILE)
        ranks = rank_table(spectra(model, shown), rank)
        history = tail_table(load_trajectory(trajectory)) if trajectory.is_file() else None
        line = {"run": path.parent.name, "model": _model_name(path.parent.name, card), "seed": card["seed"]}
        line |= {"accuracy": card["metrics"]["test_accuracy"], "ranks": ranks, "weights": history}
        runs.append(line)
    ((name, size),) = sets
    names = dict.fromkeys(run["model"] for run in runs)
    found = {"data": {"name": name, "images": len(sets[name, size]), "img_size": size}, "rank": rank}
    for part in ("ranks", "weights"):
        of_model = {model: [run[part] for run in runs if run["model"] == model and run[part]] for model in names}
        found[part] = {model: _over_seeds(tables) for model, tables in of_model.items() if tables}
    return _rounded({**found, "runs": runs})


def _model_name(folder: str, card: dict) -> str:
    """What a run's folder says of its model: "shapes_karat_seed1" -> "karat"."""
    return re.sub(r"_seed\d+$", "", folder).removeprefix(f"{card['data']}_")


def _over_seeds(tables: list):
    """The same nesting, with lists of numbers replaced by their mean and spread over the tables."""
    first = tables[0]
    if isinstance(first, dict):
        return {key: _over_seeds([table[key] for table in tables]) for key in first}
    if not isinstance(first, list):
        return first
    values = np.array(tables, dtype=float)  # None becomes NaN
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.where(np.isnan(values[0]), np.nan, 0.0)
    return {"mean": values.mean(axis=0).tolist(), "std": spread.tolist()}


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
    parser.add_argument("--data", help="dataset or image folder, in place of the one on the runs' cards")
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
