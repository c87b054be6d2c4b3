"""Command line: train twins and write down what came out.

python -m karat_lite.train --data digits --seeds 0 1 2 --out runs --results data/results/digits_twins.json
python -m karat_lite.train --data digits --basis fourier dog --order w_phi phi_w full --results table.json --resume
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
import time
from pathlib import Path

import torch

from .analysis.cost import machine
from .bases import BASE_ACTIVATIONS, available_bases
from .checkpoints import write_whole
from .data import NAMED, load_dataset
from .operators import INITS, ORDERS
from .recipes import RECIPES
from .training import evaluate, train
from .vit import ATTENTIONS, MODES, SIZES, create_model, resize


def main(argv: list[str] | None = None) -> None:
    """Train every variant with every seed; all runs of one call share data, recipe and steps."""
    args = _parser().parse_args(argv)
    command = "python -m karat_lite.train " + shlex.join(sys.argv[1:] if argv is None else argv)
    changed = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr") if getattr(args, name) is not None}
    recipe = dataclasses.replace(RECIPES[args.recipe], **changed)
    train_data = load_dataset(args.data, "train", img_size=args.img_size, limit=args.limit)
    test_data = load_dataset(args.data, "test", img_size=train_data.img_size)
    larger = None if args.resize_to is None else load_dataset(args.data, "test", img_size=args.resize_to)
    variants = _variants(args)

    def build(variant, seed):
        torch.manual_seed(seed)
        patch_size = args.patch_size or (4 if train_data.img_size >= 16 else 2)
        size = dict(img_size=train_data.img_size, patch_size=patch_size, num_classes=len(train_data.classes))
        return create_model(args.model, **variants[variant], **size)

    for variant in variants:
        model = build(variant, seed=0)  # an option that does not fit is told before anything is trained, not after
        if larger is not None:
            resize(model, larger.img_size)

    results = {
        "command": command,
        "machine": machine(),
        "data": {
            "name": train_data.name,
            "train": len(train_data),
            "test": len(test_data),
            "img_size": train_data.img_size,
        },
        "recipe": dataclasses.asdict(recipe),
        "summary": {},
        "runs": _runs_so_far(args, command),
    }  # fmt: skip
    there = {(run["attention"], run["seed"]) for run in results["runs"]}
    for seed in args.seeds:
        for variant in variants:
            name = f"{train_data.name}_{variant.replace(' ', '_')}_seed{seed}"
            print(name)
            if (variant, seed) in there:
                print("already in the results")
                continue
            model, out = build(variant, seed), None if args.out is None else args.out / name
            started, described = time.perf_counter(), {"command": command}
            history = train(
                model, train_data, test_data, recipe, seed=seed, device=args.device, out=out, card=described
            )
            results["runs"].append(
                {
                    "attention": variant,
                    "seed": seed,
                    "accuracy": history.records[-1]["test_accuracy"],
                    "seconds": round(time.perf_counter() - started, 1),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "config": model.config,
                    "test_accuracy": [round(a, 5) for a in history.column("test_accuracy")],
                }
            )
            if larger is not None:
                resized = evaluate(resize(model, larger.img_size), larger, args.device)
                results["runs"][-1]["resized"] = {"img_size": larger.img_size, "accuracy": resized["accuracy"]}
            results["summary"] = _summaries(results["runs"])
            if args.results is not None:  # after every run: an interruption loses one, not all
                args.results.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(results, indent=1)
                write_whole(args.results, lambda temporary, text=text: temporary.write_text(text + "\n"))
    for name, line in _summaries(results["runs"]).items():
        print(f"{name:8s} test accuracy {line['mean']:.2%} +- {line['std']:.2%} over {line['seeds']} seed(s)")
    if args.results is not None:
        print(f"written: {args.results}")


def _variants(args) -> dict[str, dict]:
    """Name -> arguments of create_model: every attention, and for those that learn each basis with each order."""
    if (args.softmax_heads or args.softmax_layers) and "hybrid" not in args.attention:
        raise ValueError(
            "--softmax-heads and --softmax-layers are for hybrids: add --attention hybrid, or leave them out."
        )
    found: dict[str, dict] = {}
    for attention in args.attention:
        for basis, order in itertools.product(args.basis, args.order):
            if attention == "softmax":
                found[attention] = dict(attention=attention)
                continue
            options = dict(attention=attention, basis=basis, base=args.base, simplex=args.simplex)
            options |= dict(mode=args.mode, grid=args.grid, init=args.init, rank=args.rank, order=order)
            if order == "full":
                options |= dict(rank=None, order="w_phi")
            if attention == "hybrid":
                options |= dict(softmax_heads=args.softmax_heads, softmax_layers=args.softmax_layers)
            words = [attention, *[basis] * (len(args.basis) > 1), *[order] * (len(args.order) > 1)]
            found[" ".join(words)] = options
    return found


def _runs_so_far(args, command: str) -> list[dict]:
    """With --resume, the runs that an interrupted call of the same command left in its results file."""
    if not args.resume:
        return []
    if args.results is None:
        raise ValueError("--resume needs --results FILE: what is there already stands in that file.")
    if not args.results.is_file():
        return []
    before = json.loads(args.results.read_text())
    if before["command"] != command:
        raise ValueError(
            f"{args.results} holds runs of another command ({before['command']}): give the same one, or another file."
        )
    return before["runs"]


def _summaries(runs: list[dict]) -> dict[str, dict]:
    """Mean and spread (standard deviation over seeds, n - 1) of the final test accuracy of every variant."""
    found = {}
    for name in dict.fromkeys(run["attention"] for run in runs):
        accuracy = torch.tensor([run["accuracy"] for run in runs if run["attention"] == name], dtype=torch.float64)
        spread = accuracy.std().item() if len(accuracy) > 1 else 0.0
        found[name] = {"mean": accuracy.mean().item(), "std": spread, "seeds": len(accuracy)}
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m karat_lite.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help=f"{', '.join(NAMED)}, or the path of an image folder with train/ and test/")
    add("--attention", nargs="+", default=["softmax", "karat"], choices=ATTENTIONS, help="one run each")
    add("--seeds", nargs="+", type=int, default=[0], help="initial weights and order of batches")
    add("--model", default="vit_pico", choices=list(SIZES))
    add("--mode", default="blockwise", choices=MODES)
    add("--grid", type=int, default=3, help="G, harmonics of a unit")
    add("--rank", type=int, default=12, help="r, the units of an operator with a projector")
    add("--basis", nargs="+", default=["fourier"], choices=available_bases(), help="one run each")
    add("--order", nargs="+", default=["w_phi"], choices=[*ORDERS, "full"], help="one run each; 'full': no projector")
    add("--base", choices=list(BASE_ACTIVATIONS), help="base activation (default: the basis's own)")
    add("--simplex", action="store_true", help="project activated rows on the simplex")
    add("--softmax-heads", nargs="+", type=int, default=[], help="of a hybrid")
    add("--softmax-layers", nargs="+", type=int, default=[], help="of a hybrid")
    add("--init", default="variance", choices=INITS)
    add("--img-size", type=int, help="pixels (default: the dataset's own)")
    add("--resize-to", type=int, help="pixels: test the trained model at this size too, resized without training")
    add("--patch-size", type=int, help="pixels (default: 4, or 2 for images smaller than 16)")
    add("--limit", type=int, help="use this many training images")
    add("--recipe", default="small", choices=list(RECIPES))
    add("--epochs", type=int, help="in place of the recipe's")
    add("--batch-size", type=int, help="in place of the recipe's")
    add("--lr", type=float, help="in place of the recipe's")
    add("--device", default="auto")
    add("--out", type=Path, help="folder for checkpoints and histories, one sub-folder a run")
    add("--results", type=Path, help="JSON file for the table of runs")
    add("--resume", action="store_true", help="leave out what an interrupted call of this command has in --results")
    return parser


if __name__ == "__main__":
    main()
