"""Command line: how sharp are trained models, and what do the planes of their trainings hold? One table over all runs.

python -m karat_lite.analysis.landscape_table --runs runs --results data/results/shapes_landscape.json

--runs holds what `karat_lite.train --out` wrote: a folder a run, with model.safetensors and, from --snapshots,
trajectory.safetensors; without it there is nothing to say about the path. A table is of one dataset. Losses are taken
on training images, with the label smoothing of the run's recipe (what was minimised); "plain" means without it. After
every run the table is written; a call that is repeated goes on.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from ..checkpoints import write_whole
from ..checks import run_command
from ..data import load_dataset, name_of
from ..evaluation import evaluate
from ..processes import pick_device
from ..trajectory import FILE, load_trajectory
from .cost import machine
from .directions import path_lengths, principal_directions
from .hessian import hessian_spectrum
from .landscape import batch_loss, path_losses, rise
from .runs import Run, find_runs, source_of

NAME = "karat_lite.analysis.landscape_table"
MEASURES = {
    "largest": "largest Hessian eigenvalue",
    "largest_plain": "the same, without smoothing",
    "largest_relative": "the same, in relative steps",
    "rise": "loss rise, random steps",
    "explained_two": "share of two directions (%)",
    "length": "length of the path",
}
CURVATURES = ("", "_plain", "_relative")  # endings of "largest", "eigenvalues", "converged" ...
SAME_TABLE = ("runs", "results", "device", "progress")  # options in which calls that fill one table may differ


def main(argv: list[str] | None = None) -> None:
    """Measure every run of a folder; write runs, and mean and spread over seeds."""
    args = _parser().parse_args(argv)
    runs = find_runs(args.runs, args.data and name_of(args.data))
    runs.sort(key=lambda run: not run.variant.startswith("softmax"))  # what is compared with comes first
    results = {
        "command": f"python -m {NAME} {shlex.join(sys.argv[1:] if argv is None else argv)}",
        "machine": machine(),
        "settings": {key: getattr(args, key) for key in ("images", "count", "radius", "directions", "tolerance")},
        "measures": {},
        "summary": {},
        "runs": _so_far(args, runs[0].data),
    }
    there = {(run["model"], run["seed"]) for run in results["runs"]}
    for run in runs:
        if (run.variant, run.seed) in there:
            print(f"{run.folder.name}: already in the results")
            continue
        line = {"model": run.variant, **measure(run, args)}
        said = [f"{key} {line[key]:.4g}" + " (not converged)" * _open(line, key) for key in MEASURES if key in line]
        print(f"{run.folder.name}: {', '.join(said)}", flush=True)
        results["runs"].append(line)
        results["measures"] = {key: MEASURES[key] for key in MEASURES if all(key in each for each in results["runs"])}
        results["summary"] = summary(results["runs"])
        args.results.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1)
        write_whole(args.results, lambda temporary, text=text: temporary.write_text(text + "\n"))
    for name, line in summary(results["runs"]).items():
        for key in (f"largest{kind}" for kind in CURVATURES):
            if few := line[key].get("unconverged"):
                print(f"{name}: {key} had not converged in {few} of {line['seeds']} seeds: try more --iterations.")
    print(f"written: {args.results}")


def measure(run: Run, args) -> dict:
    """Everything that the table holds of one run."""
    device = pick_device(args.device)
    card, path = run.card, run.folder / FILE
    model = run.model().to(device)
    data = load_dataset(source_of(run, args.data), "train", img_size=card["img_size"], limit=args.images)
    images, labels = (part.to(device) for part in data[:])
    smoothing = card["recipe"]["label_smoothing"]
    options = dict(tolerance=args.tolerance, iterations=args.iterations, progress=args.progress)
    found = {
        "seed": run.seed,
        "data": {"name": data.name, "split": "train", "images": len(data), "img_size": data.img_size},
        "test_accuracy": card["metrics"]["test_accuracy"],
        "train_accuracy": evaluate(model, data, device)["accuracy"],
        "smoothing": smoothing,
        "loss": batch_loss(model, images, labels, smoothing=smoothing),
        "loss_plain": batch_loss(model, images, labels),
    }
    settings = dict(smoothing=smoothing), {}, dict(smoothing=smoothing, relative=True)
    for kind, which in zip(CURVATURES, settings, strict=True):
        spectrum = hessian_spectrum(model, images, labels, args.count, **which, **options)
        found[f"largest{kind}"] = float(spectrum.values[0])
        found[f"eigenvalues{kind}"] = _rounded(spectrum.values)
        found[f"residuals{kind}"] = _rounded(spectrum.residuals)
        found[f"lowest{kind}"] = float(f"{spectrum.lowest:.4g}")
        found[f"products{kind}"], found[f"converged{kind}"] = spectrum.iterations, bool(spectrum.converged)
    found["rise"] = rise(model, images, labels, args.radius, args.directions, smoothing=smoothing).mean
    if not path.is_file():
        return found
    trajectory = load_trajectory(path)
    directions, lengths = principal_directions(trajectory), path_lengths(trajectory)
    losses = path_losses(model, directions, trajectory, images, labels, smoothing=smoothing)
    return found | {
        "explained": _rounded(directions.explained[:8]),
        "explained_two": 100 * float(directions.explained[:2].sum()),
        "length": float(lengths.steps.sum()),
        "distance": float(lengths.to_end[0]),
        "norms": [float(lengths.norms[0]), float(lengths.norms[-1])],
        "projected": _rounded(losses.projected),
        "own": _rounded(losses.own),
    }


def summary(runs: list[dict]) -> dict[str, dict]:
    """Mean and spread (standard deviation over seeds, n - 1; None of one seed) of every measure, model by model.

    An eigenvalue that has not converged in some seeds says in how many: "unconverged".
    """
    found = {}
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        found[name] = {"seeds": len(mine)}
        for key in ("test_accuracy", "loss", *MEASURES):
            if not all(key in run for run in mine):
                continue  # no snapshots were kept
            values = np.array([run[key] for run in mine])
            spread = float(values.std(ddof=1)) if len(values) > 1 else None
            found[name][key] = {"mean": float(values.mean()), "std": spread}
            if unsure := sum(_open(run, key) for run in mine):
                found[name][key]["unconverged"] = unsure
    return found


def _open(run: dict, measure: str) -> bool:
    """Whether this measure of a run is an eigenvalue that has not converged."""
    return measure.startswith("largest") and not run[measure.replace("largest", "converged")]


def _rounded(values) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _so_far(args, data: str) -> list[dict]:
    """The runs that an earlier call left in the file, one on the same data that differs in `SAME_TABLE` alone."""
    if not args.results.is_file():
        return []
    try:
        before = json.loads(args.results.read_text())
        words, runs = shlex.split(before["command"]), before["runs"]
        names = [run["data"]["name"] for run in runs if {"model", "seed", "largest"} <= set(run)]
        earlier = vars(_parser().parse_args(words[words.index(NAME) + 1 :]))
        if len(names) < len(runs):
            raise ValueError("its runs hold no eigenvalues")
    except (ValueError, TypeError, KeyError, SystemExit) as error:
        raise ValueError(
            f"{args.results} is no table of landscapes, or damaged ({error}): give another file."
        ) from error
    earlier = {**earlier, "dataset": names[0] if names else data}
    for key, value in {**vars(args), "dataset": data}.items():
        if key not in SAME_TABLE and earlier[key] != value:
            raise ValueError(
                f"{args.results} was measured with {key} = {earlier[key]}, now {value}: give the same settings, or "
                "another file."
            )
    return runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of run folders")
    add("--results", type=Path, required=True, help="JSON file for the table")
    add("--data", help="dataset or image folder that the runs are named after, where it is not the only one")
    add("--images", type=int, default=256, help="training images that losses are taken on")
    add("--count", type=int, default=3, help="eigenvalues")
    add("--iterations", type=int, default=60, help="products H v at most")
    add("--tolerance", type=float, default=1e-2, help="of residuals, as a share of the largest eigenvalue")
    add("--radius", type=float, default=0.2, help="of random steps, as a share of every filter's norm")
    add("--directions", type=int, default=20, help="random directions, both signs")
    add("--device", default="auto")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show progress bars")
    return parser


if __name__ == "__main__":
    run_command(main)
