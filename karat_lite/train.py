"""Command line: train twins and write down what came out.

python -m karat_lite.train --data digits --seeds 0 1 2 --out runs --results runs/digits_twins.json
python -m karat_lite.train --data digits --basis fourier dog --order w_phi phi_w full --results table.json --resume
python -m karat_lite.train --data cifar10 --recipe paper --model vit_tiny --img-size 224 --workers 8 --out runs --resume
torchrun --nproc-per-node 2 -m karat_lite.train --data digits --out runs

Every field of a recipe is an option of that name: --epochs 3 --mixup 0 --ema 0.999 --crop-scale 0.5 1. Where a GPU
has room, --scale-batch 512 takes the recipe to larger batches: linear learning rates, an average of the same age.
"""

import argparse
import dataclasses
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
from .bases import BASE_ACTIVATIONS, available_bases, make_basis
from .checkpoints import write_whole
from .checks import at_least, run_command
from .data import NAMED
from .evaluation import evaluate, load_part
from .history import History
from .operators import INITS, ORDERS
from .processes import pick_device
from .recipes import PRECISIONS, RECIPES, Recipe, make_recipe
from .resume import FILE
from .training import train
from .vit import ATTENTIONS, LEARNED, MODES, SIZES, create_model, resize


def main(argv: list[str] | None = None) -> None:
    """Train every variant with every seed; all runs of one call share data, recipe and steps."""
    args = _parser().parse_args(argv)
    command = "python -m karat_lite.train " + shlex.join(sys.argv[1:] if argv is None else argv)
    changed = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)}
    recipe = make_recipe(args.recipe, **changed)
    if args.scale_batch is not None:
        if "batch_size" in changed:
            raise ValueError("--scale-batch keeps rates in proportion, --batch-size as they are: give one of them.")
        recipe = recipe.with_batch(args.scale_batch)
    first = int(os.environ.get("RANK", 0)) == 0  # of several processes one speaks and writes
    say = print if first else lambda *_: None
    _check_options(args)
    train_data = load_part(args.data, "train", recipe, args.img_size, args.limit)
    size = args.img_size or (224 if recipe.single_pictures else train_data.img_size)
    test_data, larger = load_part(args.data, "test", recipe, size), args.resize_to
    resized_data = larger and as_tested(load_part(args.data, "test", recipe, larger), recipe, larger)
    variants = _variants(args)

    def build(variant, seed):
        torch.manual_seed(seed)
        patch_size = args.patch_size or (16 if size >= 96 else 4 if size >= 16 else 2)
        shape = dict(img_size=size, patch_size=patch_size, num_classes=len(train_data.classes))
        return create_model(args.model, **variants[variant], **shape)

    for variant in variants:
        model = build(variant, seed=0)  # an option that does not fit is told before anything is trained, not after
        if larger is not None:
            resize(model, larger)

    names = {variant: f"{train_data.name}_{variant.replace(' ', '_')}_seed" for variant in variants}
    if args.out is not None and not args.resume:
        for name in (f"{name}{seed}" for name in names.values() for seed in args.seeds):
            if (args.out / name / FILE).exists():
                raise ValueError(f"{args.out / name} holds a training: add --resume to go on, or give another --out.")
    results = {
        "command": command,
        "machine": machine(),
        "data": {"name": train_data.name, "train": len(train_data), "test": len(test_data), "img_size": size},
        "recipe": dataclasses.asdict(recipe),
        "summary": {},
        "runs": _runs_so_far(args, variants),
    }
    there = {(run["attention"], run["seed"]) for run in results["runs"]}
    options = dict(device=args.device, workers=args.workers, snapshots=args.snapshots, log_every=args.log_every)
    options |= dict(save_minutes=args.save_minutes, card={"command": command}, progress=not args.no_progress)
    if args.signal:
        if not args.log_every:
            raise ValueError("--signal measures at logged steps: add --log-every STEPS.")
        options["measure"] = _measure_signal(as_tested(test_data, recipe, size), args.device)
    for seed in args.seeds:
        for variant in variants:
            name = f"{names[variant]}{seed}"
            say(name)
            if (variant, seed) in there:
                say("already in the results")
                continue
            model, out = build(variant, seed), None if args.out is None else args.out / name
            resume = args.resume and out is not None
            history = train(model, train_data, test_data, recipe, seed=seed, out=out, resume=resume, **options)
            results["runs"].append(_line(variant, seed, model, history))
            if larger is not None:
                resized = evaluate(resize(model, larger), resized_data, args.device)
                results["runs"][-1]["resized"] = {"img_size": larger, "accuracy": resized["accuracy"]}
            if args.resume and args.results is not None:
                _add_others(results["runs"], args.results)
            results["summary"] = _summaries(results["runs"])
            if args.results is not None and first:  # after every run: an interruption loses one, not all
                text = json.dumps(results, indent=1)
                write_whole(args.results, lambda temporary, text=text: temporary.write_text(text + "\n"))
    for name, line in _summaries(results["runs"]).items():
        spread = "with one seed" if line["std"] is None else f"+- {line['std']:.2%} over {line['seeds']} seeds"
        say(f"{name:8s} test accuracy {line['mean']:.2%} {spread}")
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
    if not set(args.attention) & set(LEARNED):
        taken = ("grid", "rank", "basis", "order", "base", "simplex", "mode", "init")
        idle = [f"--{name}" for name in taken if getattr(args, name) != _parser().get_default(name)]
        if idle:
            raise ValueError(
                f"{', '.join(idle)}: for attention that learns ({', '.join(LEARNED)}), got {' '.join(args.attention)}."
            )
    elif args.order == ["full"] and args.rank != _parser().get_default("rank"):
        raise ValueError(f"--rank {' '.join(map(str, args.rank))}: a full-rank operator has none: leave it out.")
    elif args.grid != (usual := _parser().get_default("grid")):
        sizes = {name: {make_basis(name, grid).num_parameters for grid in (usual, usual + 1)} for name in args.basis}
        if all(len(each) == 1 for each in sizes.values()):
            raise ValueError(f"--grid {args.grid}: none of the bases {', '.join(sizes)} has a grid: leave it out.")
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
            if order == "full":
                del said["rank"]  # it has none: one variant, however many ranks the others have
            words = [attention, *(said[name] for name in said if name in several), *words]
            found[" ".join(words)] = options
    return found


def _check_options(args) -> None:
    """What can be told before anything is loaded; --results can be written, or the runs would be lost with it."""
    for name, least in (("img_size", 1), ("patch_size", 1), ("resize_to", 1), ("workers", 0), ("log_every", 0)):
        if (value := getattr(args, name)) is not None:
            at_least(f"--{name.replace('_', '-')}", value, least)
    for seed in args.seeds:
        if args.seeds.count(at_least("a seed", seed, 0)) > 1:
            raise ValueError(f"--seeds names {seed} twice: the same training again would count as another.")
    if args.results is None:
        return
    try:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        free = not args.results.is_dir() and os.access(args.results.parent, os.W_OK)
    except OSError as error:
        raise OSError(f"cannot make the folder of {args.results} ({error}): give another --results.") from error
    if not free:
        raise OSError(f"cannot write {args.results}: a folder, or in a read-only one. Give another --results.")


SAME_TABLE = ("resume", "seeds", "device", "workers", "save_minutes", "out", "results", "no_progress")


def _runs_so_far(args, variants) -> list[dict]:
    """With --resume, the runs that an earlier call left in its results file: one that differs in `SAME_TABLE` alone."""
    if args.resume and args.results is None and args.out is None:
        raise ValueError("--resume needs --out FOLDER or --results FILE: what is there already stands in them.")
    if args.results is None or not args.results.is_file():
        return []
    if not args.resume:
        raise ValueError(f"{args.results} is there already: add --resume to go on with it, or give another file.")
    try:
        before = json.loads(args.results.read_text())
        words, runs = shlex.split(before["command"]), before["runs"]
        there = [(run["attention"], run["seed"]) for run in runs]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{args.results} is no table of runs, or damaged ({error}): give another file.") from error
    try:
        earlier = vars(_parser().parse_args(words[words.index("karat_lite.train") + 1 :]))
    except (ValueError, SystemExit):  # an option that is gone
        earlier = {}
    mine = {name: value for name, value in vars(args).items() if name not in SAME_TABLE}
    if mine != {name: value for name, value in earlier.items() if name not in SAME_TABLE}:
        raise ValueError(
            f"{args.results} holds runs of another command ({before['command']}): give the same one, or another file."
        )
    if lost := sorted({seed for name, seed in there if name not in variants or seed not in args.seeds}):
        raise ValueError(f"{args.results} holds runs of seeds {', '.join(map(str, lost))}: name them in --seeds, too.")
    return runs


def _add_others(runs: list[dict], path: Path) -> None:
    """Runs that another call has written into the same file meanwhile stay there."""
    if path.is_file():
        mine = {(run["attention"], run["seed"]) for run in runs}
        found = json.loads(path.read_text())["runs"]
        runs += [run for run in found if (run["attention"], run["seed"]) not in mine]


def _summaries(runs: list[dict]) -> dict[str, dict]:
    """Mean and spread (standard deviation over seeds, n - 1; None for one) of every variant's final test accuracy."""
    found = {}
    for name in dict.fromkeys(run["attention"] for run in runs):
        accuracy = torch.tensor([run["accuracy"] for run in runs if run["attention"] == name], dtype=torch.float64)
        spread = accuracy.std().item() if len(accuracy) > 1 else None
        found[name] = {"mean": accuracy.mean().item(), "std": spread, "seeds": len(accuracy)}
    return found


def _kind(field: dataclasses.Field) -> dict:
    """How the command line reads a field of a recipe; one that is not given leaves no trace."""
    name, or_none = field.name, "None" in str(field.type)
    kind = {"default": argparse.SUPPRESS, "help": "in place of the recipe's" + "; or none" * or_none}
    if name == "precision":
        return kind | {"choices": list(PRECISIONS)}
    if name in ("crop_scale", "crop_ratio"):
        return kind | {"type": _number_or_none, "nargs": "+", "action": _Pair, "metavar": ("LEAST", "MOST")}
    if name == "auto_augment":
        return kind | {"type": lambda text: None if text == "none" else text}
    return kind | {"type": _number_or_none if or_none else int if field.type is int else float}


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


class _Pair(argparse.Action):
    """Two numbers, or `none` alone."""

    def __call__(self, parser, namespace, values, option_string=None):
        if None in values and len(values) > 1:
            parser.error(f"{option_string} takes two numbers, or `none` alone.")
        setattr(namespace, self.dest, None if values == [None] else tuple(values))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m karat_lite.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help=f"{', '.join(NAMED)}, or the path of an image folder with train/ and test/")
    add("--attention", nargs="+", default=["softmax", "karat"], choices=ATTENTIONS, help="one run each")
    add("--seeds", nargs="+", type=int, default=[0], help="initial weights and order of batches")
    add("--model", default="vit_pico", choices=list(SIZES))
    add("--depth", nargs="+", type=int, default=[None], help="blocks, in place of the model's")
    add("--mode", nargs="+", default=["blockwise"], choices=MODES)
    add("--grid", type=int, default=3, help="G: harmonics, intervals or degrees of a unit, as its basis has them")
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
    add("--limit", type=int, help="use at most this many training images")
    add("--recipe", default="small", choices=list(RECIPES))
    for field in dataclasses.fields(Recipe):
        add(f"--{field.name.replace('_', '-')}", **_kind(field))
    add("--scale-batch", type=int, help="batches of this size, with learning rates and ema in proportion")
    add("--device", default="auto")
    add("--workers", type=int, default=0, help="processes that read and augment pictures")
    add("--snapshots", type=int, default=0, help="at most so many copies of the weights, in OUT/RUN/trajectory")
    add("--log-every", type=int, default=0, help="steps between lines of loss and gradient norm in the history")
    add("--signal", action="store_true", help="measure at these steps how large signals are in every block, too")
    add("--save-minutes", type=float, default=10.0, help="between saves of the state within an epoch")
    add("--out", type=Path, help="folder for checkpoints and histories, one sub-folder a run")
    add("--results", type=Path, help="JSON file for the table of runs")
    add("--no-progress", action="store_true", help="no bar; TQDM_DISABLE=1 does the same")
    add("--resume", action="store_true", help="go on: leave out what is in --results, continue what is in --out")
    return parser


if __name__ == "__main__":
    run_command(main)
