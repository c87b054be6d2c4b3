"""Command line: how sharp are trained models, and what do the planes of their trainings hold? One table over all runs.

python -m karat_lite.analysis.landscape_table --runs runs --results data/results/shapes_landscape.json

--runs holds what `karat_lite.train --out` wrote: a folder a run, with model.safetensors and, from --snapshots,
trajectory.safetensors; without it there is nothing to say about the path. Losses are taken on training images, with the
label smoothing of the run's recipe (what was minimised); "plain" means without it. After every run the table is
written; a call that is repeated goes on.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from ..checkpoints import load_checkpoint, write_whole
from ..checks import run_command
from ..data import load_dataset
from ..evaluation import evaluate
from ..processes import pick_device
from ..trajectory import FILE, load_trajectory
from .cost import machine
from .directions import path_lengths, principal_directions
from .hessian import hessian_spectrum
from .landscape import batch_loss, path_losses, rise

MEASURES = {
    "largest": "largest Hessian eigenvalue",
    "largest_plain": "the same, without smoothing",
    "largest_relative": "the same, in relative steps",
    "rise": "loss rise, random steps",
    "explained_two": "share of two directions (%)",
    "length": "length of the path",
}


def main(argv: list[str] | None = None) -> None:
    """Measure every run of a folder; write runs, and mean and spread over seeds."""
    args = _parser().parse_args(argv)
    folders = sorted(path.parent for path in args.runs.glob("*_seed*/model.safetensors"))
    folders.sort(key=lambda folder: "_softmax" not in folder.name)  # what is compared with comes first
    if not folders:
        raise ValueError(
            f"no runs in {args.runs}: expected folders NAME_seedK with model.safetensors in them, as `python -m "
            "karat_lite.train --snapshots 20 --out FOLDER` writes."
        )
    results = {
        "command": "python -m karat_lite.analysis.landscape_table "
        + shlex.join(sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "settings": {key: getattr(args, key) for key in ("images", "count", "radius", "directions", "tolerance")},
        "measures": MEASURES,
        "summary": {},
        "runs": _so_far(args),
    }
    there = {(run["model"], run["seed"]) for run in results["runs"]}
    for folder in folders:
        name = folder.name.rpartition("_seed")[0].partition("_")[2]
        if (name, int(folder.name.rpartition("_seed")[2])) in there:
            print(f"{folder.name}: already in the results")
            continue
        run = {"model": name, **measure(folder, args)}
        print(f"{folder.name}: " + ", ".join(f"{key} {run[key]:.4g}" for key in MEASURES if key in run), flush=True)
        results["runs"].append(run)
        results["summary"] = summary(results["runs"])
        args.results.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1)
        write_whole(args.results, lambda temporary, text=text: temporary.write_text(text + "\n"))
    print(f"written: {args.results}")


def measure(folder: Path, args) -> dict:
    """Everything that the table holds of one run."""
    device = pick_device(args.device)
    model, card = load_checkpoint(folder / "model.safetensors")
    model = model.to(device)
    data = load_dataset(args.data or card["data"], "train", img_size=card["img_size"], limit=args.images)
    images, labels = (part.to(device) for part in data[:])
    smoothing = card["recipe"]["label_smoothing"]
    options = dict(tolerance=args.tolerance, iterations=args.iterations, progress=args.progress)
    found = {
        "seed": card["seed"],
        "data": {"name": data.name, "split": "train", "images": len(data), "img_size": data.img_size},
        "test_accuracy": card["metrics"]["test_accuracy"],
        "train_accuracy": evaluate(model, data, device)["accuracy"],
        "smoothing": smoothing,
        "loss": batch_loss(model, images, labels, smoothing=smoothing),
        "loss_plain": batch_loss(model, images, labels),
    }
    kinds = {"": dict(smoothing=smoothing), "_plain": {}, "_relative": dict(smoothing=smoothing, relative=True)}
    for kind, which in kinds.items():
        spectrum = hessian_spectrum(model, images, labels, args.count, **which, **options)
        found[f"largest{kind}"] = float(spectrum.values[0])
        found[f"eigenvalues{kind}"] = _rounded(spectrum.values)
        found[f"residuals{kind}"] = _rounded(spectrum.residuals)
        found[f"lowest{kind}"] = float(f"{spectrum.lowest:.4g}")
        found[f"products{kind}"], found[f"converged{kind}"] = spectrum.iterations, bool(spectrum.converged)
    found["rise"] = rise(model, images, labels, args.radius, args.directions, smoothing=smoothing).mean
    if not (folder / FILE).is_file():
        return found
    trajectory = load_trajectory(folder / FILE)
    directions, lengths = principal_directions(trajectory), path_lengths(trajectory)
    path = path_losses(model, directions, trajectory, images, labels, smoothing=smoothing)
    return found | {
        "explained": _rounded(directions.explained[:8]),
        "explained_two": 100 * float(directions.explained[:2].sum()),
        "length": float(lengths.steps.sum()),
        "distance": float(lengths.to_end[0]),
        "norms": [float(lengths.norms[0]), float(lengths.norms[-1])],
        "projected": _rounded(path.projected),
        "own": _rounded(path.own),
    }


def summary(runs: list[dict]) -> dict[str, dict]:
    """Mean and spread (standard deviation over seeds, n - 1) of every measure, model by model."""
    found = {}
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        found[name] = {"seeds": len(mine)}
        for key in ("test_accuracy", "loss", *MEASURES):
            if not all(key in run for run in mine):
                continue  # no snapshots were kept
            values = np.array([run[key] for run in mine])
            spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            found[name][key] = {"mean": float(values.mean()), "std": spread}
    return found


def _rounded(values) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _so_far(args) -> list[dict]:
    """The runs that an earlier call with the same settings left in the file."""
    if not args.results.is_file():
        return []
    before = json.loads(args.results.read_text())
    for key, value in before["settings"].items():
        if getattr(args, key) != value:
            raise ValueError(
                f"{args.results} was measured with {key} = {value}, now {getattr(args, key)}: give the same settings, "
                "or another file."
            )
    return before["runs"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m karat_lite.analysis.landscape_table", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of run folders")
    add("--results", type=Path, required=True, help="JSON file for the table")
    add("--data", help="dataset or image folder, in place of the one on the runs' cards")
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
