"""Command line: make a finished training one of the committed checkpoints, in half precision.

python -m karat_lite.publish runs/shapes_karat_seed0 shapes_karat --data shapes
"""

import argparse
from pathlib import Path

from .checkpoints import CHECKPOINTS, load_checkpoint, save_checkpoint, write_whole
from .checks import run_command
from .evaluation import evaluate, is_part_of, load_tested
from .trajectory import FILE, TRAJECTORIES, load_trajectory

ROUNDING = 0.01  # of accuracy: what half precision may change


def main(argv: list[str] | None = None) -> None:
    """Round the weights to half precision, test them anew, and write data/checkpoints/NAME; a trajectory goes along.

    The accuracy on the new card is that of the rounded weights. Raises `ValueError` for a name that would not be found.
    """
    parser = argparse.ArgumentParser(prog="python -m karat_lite.publish", description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=Path, help="folder of a training: model.safetensors, perhaps trajectory.safetensors"
    )
    parser.add_argument("name", help="what load_checkpoint will find it by")
    parser.add_argument("--data", required=True, help="the dataset it was trained on, by name or path")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if Path(args.name).name != args.name or Path(args.name).suffix:
        raise ValueError(f"a checkpoint's name has no folder and no ending, got {args.name!r}.")
    model, card = load_checkpoint(args.run / "model.safetensors")
    before = card.get("metrics", {}).get("test_accuracy")
    if before is None:
        raise ValueError(f"the card of {args.run} tells no test accuracy: there is nothing to compare with.")
    if not is_part_of(args.data, card):
        raise ValueError(f"{args.run} was trained on {card.get('data')!r}, not on {args.data}: give its own --data.")
    trajectory = load_trajectory(args.run / FILE).card if (args.run / FILE).is_file() else None
    if trajectory is not None and any(trajectory.get(key) != card.get(key) for key in ("seed", "recipe", "config")):
        raise ValueError(f"{args.run / FILE} is of another training than model.safetensors beside it: remove it.")
    model = model.half().float()
    found = evaluate(model, load_tested(args.data, model, card), args.device)
    if abs(found["accuracy"] - before) > ROUNDING:
        raise ValueError(
            f"the rounded weights have {found['accuracy']:.2%} on {args.data}, and the card says {before:.2%}: "
            "are these the pictures that it was tested on?"
        )
    card["metrics"] |= {"test_loss": found["loss"], "test_accuracy": found["accuracy"], "test_top5": found["top5"]}
    path = save_checkpoint(CHECKPOINTS / f"{args.name}.safetensors", model.half(), {**card, "precision": "float16"})
    print(f"{path.name}: {found['accuracy']:.2%}, before rounding {before:.2%}, {path.stat().st_size / 1e6:.2f} MB")
    target = TRAJECTORIES / f"{args.name}.safetensors"
    target.unlink(missing_ok=True)  # of an earlier checkpoint of this name
    if trajectory is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda temporary: temporary.write_bytes((args.run / FILE).read_bytes()))
        print(f"its trajectory: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_command(main)
