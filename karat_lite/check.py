"""Command line: does a checkpoint still do what its card says?

python -m karat_lite.check --data data/cifar10 cifar10_softmax cifar10_karat
python -m karat_lite.check --data digits
"""

import argparse

from .checkpoints import available_checkpoints, load_checkpoint
from .checks import run_command
from .evaluation import evaluate, is_part_of, load_tested

TOLERANCE = 0.001  # of accuracy: other processors round otherwise, and an image on the border may change sides


def main(argv: list[str] | None = None) -> None:
    """Test checkpoints anew and compare with their cards; the exit status is 1 where one differs.

    Without names: all committed ones whose card names this dataset, or a part of it (cifar10_10k is one of cifar10).
    """
    parser = argparse.ArgumentParser(prog="python -m karat_lite.check", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a dataset by name, or the path of an image folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("checkpoints", nargs="*", help="names or paths")
    args = parser.parse_args(argv)
    loaded, checked, wrong = {}, 0, 0
    for name in args.checkpoints or available_checkpoints():
        model, card = load_checkpoint(name)
        trained_on = card.get("data", "data that it does not name")
        if not args.checkpoints and not is_part_of(args.data, card):
            continue
        if "test_accuracy" not in card.get("metrics", {}):
            raise ValueError(f"the card of {name} tells no test accuracy: there is nothing to compare with.")
        key = (model.img_size, str(card.get("recipe")))
        if key not in loaded:
            loaded = {key: load_tested(args.data, model, card)}  # one at a time: all of CIFAR-10 is large
        test_data = loaded[key]
        accuracy, expected = evaluate(model, test_data, args.device)["accuracy"], card["metrics"]["test_accuracy"]
        off = abs(accuracy - expected) > TOLERANCE
        checked, wrong = checked + 1, wrong + off
        print(f"{name:24s} {accuracy:.2%} on {len(test_data):,} images, card {expected:.2%}"
              + f"  DIFFERENT (trained on {trained_on})" * off)  # fmt: skip
    if checked == 0:
        there = ", ".join(available_checkpoints())
        raise SystemExit(f"no card of a committed checkpoint names {args.data}: name those to check, of {there}.")
    if wrong:
        raise SystemExit(f"{wrong} of {checked} checkpoints differ from their cards.")


if __name__ == "__main__":
    run_command(main)
