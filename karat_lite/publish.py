"""Command line: make a finished training one of the committed checkpoints, in half precision.

python -m karat_lite.publish runs/shapes_karat_seed0 shapes_karat --data shapes
"""

import argparse
from pathlib import Path

from .checkpoints import CHECKPOINTS, load_checkpoint, save_checkpoint, write_whole
from .checks import run_command
from .evaluation import evaluate, load_tested
from .trajectory import FILE, TRAJECTORIES


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
    before = card["metrics"]["test_accuracy"]
    model = model.half().float()
    found = evaluate(model, load_tested(args.data, model, card), args.device)
    card["metrics"] |= {"test_loss": found["loss"], "test_accuracy": found["accuracy"], "test_top5": found["top5"]}
    path = save_checkpoint(CHECKPOINTS / f"{args.name}.safetensors", model.half(), {**card, "precision": "float16"})
    print(f"{path.name}: {found['accuracy']:.2%}, before rounding {before:.2%}, {path.stat().st_size / 1e6:.2f} MB")
    if (args.run / FILE).is_file():
        target = TRAJECTORIES / f"{args.name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda temporary: temporary.write_bytes((args.run / FILE).read_bytes()))
        print(f"its trajectory: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_command(main)
