"""Command line: train twins and write down what came out.

python -m karat_lite.train --data digits --seeds 0 1 2 --out runs --results data/results/digits_twins.json
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

from .bases import available_bases
from .checkpoints import write_whole
from .data import load_dataset
from .operators import INITS
from .recipes import RECIPES
from .training import train
from .vit import ATTENTIONS, MODES, SIZES, create_model


def main(argv: list[str] | None = None) -> None:
    """Train every attention with every seed; all runs of one call share data, recipe and steps."""
    args = _parser().parse_args(argv)
    command = "python -m karat_lite.train " + shlex.join(sys.argv[1:] if argv is None else argv)
    changed = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr") if getattr(args, name) is not None}
    recipe = dataclasses.replace(RECIPES[args.recipe], **changed)
    train_data = load_dataset(args.data, "train", img_size=args.img_size, limit=args.limit)
    test_data = load_dataset(args.data, "test", img_size=train_data.img_size)

    def build(attention, seed):
        torch.manual_seed(seed)
        return create_model(
            args.model, attention, mode=args.mode, grid=args.grid, rank=args.rank, basis=args.basis, init=args.init,
            img_size=train_data.img_size, patch_size=args.patch_size or (4 if train_data.img_size >= 16 else 2),
            num_classes=len(train_data.classes),
        )  # fmt: skip

    for attention in args.attention:
        build(attention, seed=0)  # an option that does not fit is told before anything is trained, not after

    results = {
        "command": command,
        "machine": _machine(),
        "data": {
            "name": train_data.name,
            "train": len(train_data),
            "test": len(test_data),
            "img_size": train_data.img_size,
        },
        "recipe": dataclasses.asdict(recipe),
        "summary": {},
        "runs": [],
    }  # fmt: skip
    for seed in args.seeds:
        for attention in args.attention:
            name = f"{train_data.name}_{attention}_seed{seed}"
            print(name)
            model, out = build(attention, seed), None if args.out is None else args.out / name
            started, described = time.perf_counter(), {"command": command}
            history = train(
                model, train_data, test_data, recipe, seed=seed, device=args.device, out=out, card=described
            )
            results["runs"].append(
                {
                    "attention": attention,
                    "seed": seed,
                    "accuracy": history.records[-1]["test_accuracy"],
                    "seconds": round(time.perf_counter() - started, 1),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "config": model.config,
                    "test_accuracy": [round(a, 5) for a in history.column("test_accuracy")],
                }
            )
            results["summary"][attention] = _summary(results["runs"], attention)
            if args.results is not None:  # after every run: an interruption loses one, not all
                args.results.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(results, indent=1)
                write_whole(args.results, lambda temporary, text=text: temporary.write_text(text + "\n"))
    for attention, line in results["summary"].items():
        print(f"{attention:8s} test accuracy {line['mean']:.2%} +- {line['std']:.2%} over {line['seeds']} seed(s)")
    if args.results is not None:
        print(f"written: {args.results}")


def _summary(runs: list[dict], attention: str) -> dict:
    """Mean and spread (standard deviation over seeds, n - 1) of the final test accuracy."""
    accuracy = torch.tensor([run["accuracy"] for run in runs if run["attention"] == attention], dtype=torch.float64)
    spread = accuracy.std().item() if len(accuracy) > 1 else 0.0
    return {"mean": accuracy.mean().item(), "std": spread, "seeds": len(accuracy)}


def _machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores, {platform.machine()}{gpu}, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m karat_lite.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="digits, shapes, or the path of an image folder with train/ and test/")
    add("--attention", nargs="+", default=list(ATTENTIONS), choices=ATTENTIONS, help="one run each (default: both)")
    add("--seeds", nargs="+", type=int, default=[0], help="initial weights and order of batches")
    add("--model", default="vit_pico", choices=list(SIZES))
    add("--mode", default="blockwise", choices=MODES)
    add("--grid", type=int, default=3, help="G, harmonics of a unit")
    add("--rank", type=lambda text: None if text == "full" else int(text), default=12, help="r, or 'full'")
    add("--basis", default="fourier", choices=available_bases())
    add("--init", default="variance", choices=INITS)
    add("--img-size", type=int, help="pixels (default: the dataset's own)")
    add("--patch-size", type=int, help="pixels (default: 4, or 2 for images smaller than 16)")
    add("--limit", type=int, help="use this many training images")
    add("--recipe", default="small", choices=list(RECIPES))
    add("--epochs", type=int, help="in place of the recipe's")
    add("--batch-size", type=int, help="in place of the recipe's")
    add("--lr", type=float, help="in place of the recipe's")
    add("--device", default="auto")
    add("--out", type=Path, help="folder for checkpoints and histories, one sub-folder a run")
    add("--results", type=Path, help="JSON file for the table of runs")
    return parser


if __name__ == "__main__":
    main()
