"""Command line: train twins and write down what came out.

python -m karat_lite.train --data digits --seeds 0 1 2 --out runs --results data/results/digits_twins.json
python -m karat_lite.train --data digits --basis fourier dog --order w_phi phi_w full --results table.json --resume
python -m karat_lite.train --data cifar10 --recipe paper --model vit_tiny --img-size 224 --workers 8 --out runs --resume
torchrun --nproc-per-node 2 -m karat_lite.train --data digits --out runs

Every field of a recipe is an option of that name: --epochs 3 --mixup 0 --ema 0.999 --crop-scale 0.5 1.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shlex
import sys
from pathlib import Path

import torch

from .analysis.cost import machine
from .analysis.signal import signal_sizes
from .augment import as_tested, in_order
from .bases import BASE_ACTIVATIONS, available_bases
from .checkpoints import write_whole
from .data import FILES_SIZE, NAMED, load_dataset
from .evaluation import evaluate
from .history import History
from .operators import INITS, ORDERS
from .processes import pick_device
from .recipes import PRECISIONS, RECIPES, Recipe, make_recipe
from .training import train
from .vit import ATTENTIONS, LEARNED, MODES, SIZES, create_model, resize


def main(argv: list[str] | None = None) -> None:
    """Train every variant with every seed; all runs of one call share data, recipe and steps."""
    args = _parser().parse_args(argv)
    command = "python -m karat_lite.train " + shlex.join(sys.argv[1:] if argv is None else argv)
    changed = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    recipe = make_recipe(args.recipe, **{name: value for name, value in changed.items() if value is not None})
    first = int(os.environ.get("RANK", 0)) == 0  # of several processes one speaks and writes
    say = print if first else lambda *_: None
    size = args.img_size or (224 if recipe.single_pictures else None)
    stored = None if recipe.single_pictures else size  # single pictures are cropped and resized from the whole
    files = recipe.single_pictures and (args.data in FILES_SIZE or args.data not in NAMED)
    load = functools.partial(load_dataset, args.data, in_memory=False if files else None)
    train_data = load("train", img_size=stored, limit=args.limit)
    test_data = load("test", img_size=stored or train_data.img_size)
    larger = None if args.resize_to is None else load_dataset(args.data, "test", img_size=args.resize_to)
    size = size or train_data.img_size
    variants = _variants(args)

    def build(variant, seed):
        torch.manual_seed(seed)
        patch_size = args.patch_size or (16 if size >= 96 else 4 if size >= 16 else 2)
        shape = dict(img_size=size, patch_size=patch_size, num_classes=len(train_data.classes))
        return create_model(args.model, **variants[variant], **shape)

    for variant in variants:
        model = build(variant, seed=0)  # an option that does not fit is told before anything is trained, not after
        if larger is not None:
            resize(model, larger.img_size)

    results = {
        "command": command,
        "machine": machine(),
        "data": {"name": train_data.name, "train": len(train_data), "test": len(test_data), "img_size": size},
        "recipe": dataclasses.asdict(recipe),
        "summary": {},
        "runs": _runs_so_far(args, command),
    }
    there = {(run["attention"], run["seed"]) for run in results["runs"]}
    options = dict(device=args.device, workers=args.workers, snapshots=args.snapshots, log_every=args.log_every)
    options |= dict(save_minutes=args.save_minutes, card={"command": command})
    if args.signal:
        if not args.log_every:
            raise ValueError("--signal measures at logged steps: add --log-every STEPS.")
        options["measure"] = _measure_signal(as_tested(test_data, recipe, size), args.device)
    for seed in args.seeds:
        for variant in variants:
            name = f"{train_data.name}_{variant.replace(' ', '_')}_seed{seed}"
            say(name)
            if (variant, seed) in there:
                say("already in the results")
                continue
            model, out = build(variant, seed), None if args.out is None else args.out / name
            resume = args.resume and out is not None
            history = train(model, train_data, test_data, recipe, seed=seed, out=out, resume=resume, **options)
            results["runs"].append(_line(variant, seed, model, history))
            if larger is not None:
                resized = evaluate(resize(model, larger.img_size), larger, args.device)
                results["runs"][-1]["resized"] = {"img_size": larger.img_size, "accuracy": resized["accuracy"]}
            results["summary"] = _summaries(results["runs"])
            if args.results is not None and first:  # after every run: an interruption loses one, not all
                args.results.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(results, indent=1)
                write_whole(args.results, lambda temporary, text=text: temporary.write_text(text + "\n"))
    for name, line in _summaries(results["runs"]).items():
        say(f"{name:8s} test accuracy {line['mean']:.2%} +- {line['std']:.2%} over {line['seeds']} seed(s)")
    if args.results is not None:
        say(f"written: {args.results}")


def _measure_signal(data, device: str):
    """A function of the model: the sizes of its signals on the first test images, to four digits."""
    images, _ = next(in_order(data, 64, pick_device(device)))
    return lambda model: {
        name: [float(f"{value:.4g}") for value in values] for name, values in signal_sizes(model, images).items()
    }


def _line(variant: str, seed: int, model, history: History) -> dict:
    """What the table of results keeps of a run."""
    last = history.records[-1]
    line = {"attention": variant, "seed": seed, "accuracy": last["test_accuracy"], "top5": last["test_top5"]}
    if "average_accuracy" in last:
        line["average_accuracy"] = last["average_accuracy"]
    line |= {"seconds": round(sum(history.column("seconds")), 1), "peak_memory": last["peak_memory"]}
    line |= {"parameters": sum(p.numel() for p in model.parameters()), "config": model.config}
    line |= {name: [round(value, 5) for value in history.column(name)] for name in ("test_accuracy", "train_loss")}
    return {**line, **({"steps": history.steps} if history.steps else {})}


def _variants(args) -> dict[str, dict]:
    """Name -> arguments of create_model: every attention, and for those that learn every choice of their options.

    A name says what differs within this call.
    """
    if (args.softmax_heads or args.softmax_layers) and "hybrid" not in args.attention:
        raise ValueError(
            "--softmax-heads and --softmax-layers are for hybrids: add --attention hybrid, or leave them out."
        )
    found: dict[str, dict] = {}
    several = {name for name in ("basis", "order", "init", "rank", "mode", "depth") if len(getattr(args, name)) > 1}
    for attention in args.attention:
        lists = (args.depth, args.basis, args.order, args.mode, args.rank, args.init)
        for depth, basis, order, mode, rank, init in itertools.product(*lists):
            body = {} if depth is None else {"depth": depth}
            words = [f"depth {depth}"] * ("depth" in several)
            if attention not in LEARNED:
                found[" ".join([attention, *words])] = dict(attention=attention, **body)
                continue
            options = dict(attention=attention, basis=basis, base=args.base, simplex=args.simplex, **body)
            options |= dict(mode=mode, grid=args.grid, init=init, rank=rank, order=order)
            if order == "full":
                options |= dict(rank=None, order="w_phi")
            if attention == "hybrid":
                options |= dict(softmax_heads=args.softmax_heads, softmax_layers=args.softmax_layers)
            said = {"basis": basis, "order": order, "mode": mode, "rank": f"rank {rank}", "init": init}
            words = [attention, *(said[name] for name in said if name in several), *words]
            found[" ".join(words)] = options
    return found


def _runs_so_far(args, command: str) -> list[dict]:
    """With --resume, the runs that an interrupted call of the same command left in its results file."""
    if args.resume and args.results is None and args.out is None:
        raise ValueError("--resume needs --out FOLDER or --results FILE: what is there already stands in them.")
    if not args.resume or args.results is None or not args.results.is_file():
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


def _kind(field: dataclasses.Field) -> dict:
    """How the command line reads a field of a recipe."""
    if field.name == "precision":
        return {"choices": list(PRECISIONS)}
    if field.name in ("crop_scale", "crop_ratio"):
        return {"type": float, "nargs": 2, "metavar": ("LEAST", "MOST")}
    if field.name == "auto_augment":
        return {}
    return {"type": int if field.type == "int" or field.type is int else float}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m karat_lite.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help=f"{', '.join(NAMED)}, or the path of an image folder with train/ and test/")
    add("--attention", nargs="+", default=["softmax", "karat"], choices=ATTENTIONS, help="one run each")
    add("--seeds", nargs="+", type=int, default=[0], help="initial weights and order of batches")
    add("--model", default="vit_pico", choices=list(SIZES))
    add("--depth", nargs="+", type=int, default=[None], help="blocks, in place of the model's")
    add("--mode", nargs="+", default=["blockwise"], choices=MODES)
    add("--grid", type=int, default=3, help="G, harmonics of a unit")
    add("--rank", nargs="+", type=int, default=[12], help="r, the units of an operator with a projector")
    add("--basis", nargs="+", default=["fourier"], choices=available_bases(), help="one run each")
    add("--order", nargs="+", default=["w_phi"], choices=[*ORDERS, "full"], help="one run each; 'full': no projector")
    add("--base", choices=list(BASE_ACTIVATIONS), help="base activation (default: the basis's own)")
    add("--simplex", action="store_true", help="project activated rows on the simplex")
    add("--softmax-heads", nargs="+", type=int, default=[], help="of a hybrid")
    add("--softmax-layers", nargs="+", type=int, default=[], help="of a hybrid")
    add("--init", nargs="+", default=["variance"], choices=INITS)
    add("--img-size", type=int, help="pixels (default: the dataset's own; 224 where a recipe crops single pictures)")
    add("--resize-to", type=int, help="pixels: test the trained model at this size too, resized without training")
    add("--patch-size", type=int, help="pixels (default: 4; 2 for images smaller than 16, 16 from 96 on)")
    add("--limit", type=int, help="use this many training images")
    add("--recipe", default="small", choices=list(RECIPES))
    for field in dataclasses.fields(Recipe):
        add(f"--{field.name.replace('_', '-')}", **_kind(field), help="in place of the recipe's")
    add("--device", default="auto")
    add("--workers", type=int, default=0, help="processes that read and augment pictures")
    add("--snapshots", type=int, default=0, help="copies of the weights over the training, in OUT/RUN/trajectory")
    add("--log-every", type=int, default=0, help="steps between lines of loss and gradient norm in the history")
    add("--signal", action="store_true", help="measure at these steps how large signals are in every block, too")
    add("--save-minutes", type=float, default=10.0, help="between saves of the state within an epoch")
    add("--out", type=Path, help="folder for checkpoints and histories, one sub-folder a run")
    add("--results", type=Path, help="JSON file for the table of runs")
    add("--resume", action="store_true", help="go on: leave out what is in --results, continue what is in --out")
    return parser


if __name__ == "__main__":
    main()
