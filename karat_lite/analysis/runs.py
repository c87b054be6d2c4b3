"""Trained models in a folder, as `python -m karat_lite.train --out FOLDER` leaves them: where tables of seeds begin."""

from pathlib import Path
from typing import NamedTuple

from ..checkpoints import load_checkpoint
from ..data import NAMED
from ..vit import VisionTransformer

MODEL = "model.safetensors"
NEEDED = ("data", "seed", "img_size", "metrics.epoch", "metrics.test_accuracy", "recipe.epochs",
          "recipe.label_smoothing")  # fmt: skip


class Run(NamedTuple):
    """A finished training in its folder, which is called DATA_VARIANT_seedK."""

    folder: Path
    data: str  # the dataset's name
    variant: str  # what was trained, "_" for blanks: softmax, karat_fourier, ...
    seed: int
    card: dict

    def model(self) -> VisionTransformer:
        """As it was at the end of its training, in evaluation mode."""
        return load_checkpoint(self.folder / MODEL)[0]


def find_runs(folder: str | Path, data: str | None = None, elsewhere: bool = False) -> list[Run]:
    """The runs in `folder` that were trained on one dataset, by variant, then by seed; no (variant, seed) comes twice.

    data: that dataset's name; None where the folder has runs of one alone. elsewhere: runs of another dataset will do,
    where none was trained on this one.

    Raises `FileNotFoundError` for a folder without runs; `ValueError` for a checkpoint whose card tells of no training,
    no run of this dataset or runs of several, and among those that are wanted for one that is not finished, whose
    folder is not called by its dataset and seed (a copy, which would count as another seed), or whose images have
    another size than those of the first.
    """
    files = sorted(Path(folder).glob(f"*/{MODEL}"))
    if not files:
        raise FileNotFoundError(
            f"no run in {folder}: expected {folder}/DATA_VARIANT_seedK/{MODEL}, as python -m karat_lite.train --data "
            f"{data or 'DATA'} --seeds 0 1 2 --snapshots 20 --out {folder} writes."
        )
    cards = {file.parent: _card(file) for file in files}
    names = list(dict.fromkeys(card["data"] for card in cards.values()))
    if data not in names and data is not None and not elsewhere:
        there = ", ".join(path.name for path in cards)
        raise ValueError(f"no run in {folder} was trained on {data}: there are {there}.")
    if data not in names and len(names) > 1:
        raise ValueError(
            f"{folder} holds runs of several datasets ({', '.join(names)}), a table those of one: name it by --data, "
            "or give each a folder of its own."
        )
    wanted = data if data in names else names[0]
    found = [_run(path, card) for path, card in cards.items() if card["data"] == wanted]
    for run in found:
        if (size := run.card["img_size"]) != found[0].card["img_size"]:
            raise ValueError(
                f"the run {run.folder.name} has images of {size} pixels, {found[0].folder.name} of "
                f"{found[0].card['img_size']}: one table holds runs of one size, give each a folder of its own."
            )
    return sorted(found, key=lambda run: (run.variant, run.seed))


def source_of(run: Run, data: str | None) -> str:
    """What `load_dataset` takes for the data of a run, where `data` was given for it, or nothing was."""
    if data is None and run.data not in NAMED and not Path(run.data).is_dir():
        raise ValueError(
            f"{run.folder.name} was trained on an image folder called {run.data}: give its path by --data."
        )
    return data or run.data


def _card(file: Path) -> dict:
    """A checkpoint's card that says how it was trained."""
    _, card = load_checkpoint(file)
    there = {f"{part}.{key}" for part in ("metrics", "recipe") for key in card.get(part) or {}} | set(card)
    if lacking := [part for part in NEEDED if part not in there]:
        raise ValueError(
            f"{file} is no run of karat_lite.train: its card lacks {', '.join(lacking)}. Move it to another folder."
        )
    return card


def _run(path: Path, card: dict) -> Run:
    data, seed, done, wanted = card["data"], card["seed"], card["metrics"]["epoch"], card["recipe"]["epochs"]
    if done < wanted:
        raise ValueError(f"{path.name} is not finished: epoch {done} of {wanted}. Train on with --resume.")
    variant = path.name.removeprefix(f"{data}_").removesuffix(f"_seed{seed}")
    if path.name != f"{data}_{variant}_seed{seed}":
        raise ValueError(
            f"{path} holds a run on {data} with seed {seed}: expected a folder called {data}_VARIANT_seed{seed}. "
            "Rename it so, or move it to another folder: a copy is no other seed."
        )
    return Run(path, data, variant, seed, card)
