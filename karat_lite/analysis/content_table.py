"""Content against static mixing over several seeds: trained models judged under every change of their scores.

python -m karat_lite.train --data shapes --epochs 20 --attention softmax karat static pooled --seeds 0 1 2 \\
    --snapshots 20 --out runs --resume
python -m karat_lite.analysis.content_table --runs runs --data shapes --results data/results/shapes_content.json
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..checkpoints import write_whole
from ..checks import at_least, run_command
from ..data import load_dataset, name_of
from ..trajectory import FILE, load_trajectory
from .content import CHANGES, ablate, map_shares, through_training
from .cost import machine
from .runs import find_runs

COURSE = 500  # test images on which every snapshot of a training is judged


def tabulate(runs: Path, data: str, limit: int | None = None, calibrate: int = 500, say: Callable = print) -> dict:
    """What `main` writes, from the folders <data>_<name>_seed<k> that `karat_lite.train --out runs` made.

    data: a dataset's name, or the path of an image folder, whose name the runs have. limit: test images (None: all);
    calibrate: training images for "mean over images", at least 2. The course of a training comes from the first seed
    whose folder holds a trajectory. Raises as `find_runs` does, and `ValueError` for too few images.
    """
    source, data = data, name_of(data)
    at_least("--calibrate", calibrate, 2)
    found: dict[str, list] = {}
    courses, there = {}, find_runs(runs, data)
    size = there[0].card["img_size"]
    images, labels = load_dataset(source, "test", img_size=size, limit=limit)[:]
    calibration = load_dataset(source, "train", img_size=size, limit=calibrate)[:][0]
    for run in there:
        say(run.folder.name)
        model, name = run.model(), run.variant
        found.setdefault(name, []).append(_judge(model, images, labels, calibration) | {"seed": run.seed})
        if name not in courses and (run.folder / FILE).is_file():
            course = through_training(
                load_trajectory(run.folder / FILE), images[:COURSE], labels[:COURSE], calibration=calibration
            )
            courses[name] = {"seed": run.seed, "images": len(images[:COURSE]), "steps": course.steps.tolist()}
            courses[name] |= {"accuracy": {change: _plain(values) for change, values in course.accuracy.items()}}
    about = {"name": data, "test": len(images), "calibration": len(calibration), "img_size": size}
    table = {name: _over_seeds(each) for name, each in found.items()}
    return {"machine": machine(), "data": about, "table": table, "training": courses}


def _judge(model, images, labels, calibration) -> dict:
    """One model: change -> accuracy and loss in all layers, change -> accuracies layer by layer, shares of its maps."""
    whole = ablate(model, images, labels, calibration=calibration)
    real = [change for change in CHANGES if change != "as they are"]
    single = ablate(model, images, labels, real, "layers", calibration=calibration)
    return {
        "accuracy": {line.change: line.accuracy for line in whole},
        "loss": {line.change: line.loss for line in whole},
        "layers": {change: [line.accuracy for line in single if line.change == change] for change in real},
        "shares": map_shares(model, images[: len(calibration)]).mean(axis=1),  # (L, 3), heads averaged
    }


def _over_seeds(each: list[dict]) -> dict:
    """Mean and spread (standard deviation over seeds, n - 1; None of one seed) of everything that `_judge` found."""

    def spread(values: list) -> dict:
        values = np.array(values, dtype=float)
        std = _plain(values.std(axis=0, ddof=1)) if len(values) > 1 else None
        return {"mean": _plain(values.mean(axis=0)), "std": std}

    changes = {
        change: {
            "accuracy": spread([run["accuracy"][change] for run in each]),
            "loss": spread([run["loss"][change] for run in each]),
            "accuracies": _plain([run["accuracy"][change] for run in each]),
        }
        for change in CHANGES
    }
    layers = {change: spread([run["layers"][change] for run in each]) for change in each[0]["layers"]}
    shares = spread([run["shares"] for run in each])
    return {"seeds": [run["seed"] for run in each], "changes": changes, "layers": layers, "map shares": shares}


def _plain(values):
    return np.round(np.asarray(values, dtype=float), 5).tolist()


def main(argv: list[str] | None = None) -> None:
    """Judge trained models of several seeds under every change of scores, and write mean and spread down."""
    parser = argparse.ArgumentParser(
        prog="python -m karat_lite.analysis.content_table", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs that karat_lite.train --out wrote")
    parser.add_argument("--data", default="shapes", help="dataset or image folder that the runs are named after")
    parser.add_argument("--limit", type=int, help="use this many test images (default: all)")
    parser.add_argument("--calibrate", type=int, default=500, help="training images for the mean over images")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    words = shlex.join(sys.argv[1:] if argv is None else argv)
    results = {"command": f"python -m karat_lite.analysis.content_table {words}"}
    results |= tabulate(args.runs, args.data, args.limit, args.calibrate)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.results, lambda temporary: temporary.write_text(json.dumps(results, indent=1) + "\n"))
    for name, lines in results["table"].items():
        for change, line in lines["changes"].items():
            spread = "" if line["accuracy"]["std"] is None else f" +- {line['accuracy']['std']:.2%}"
            print(f"{name:8s} {change:18s} {line['accuracy']['mean']:7.2%}{spread}")
    print(f"written: {args.results}")


if __name__ == "__main__":
    run_command(main)
