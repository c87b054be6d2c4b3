"""The path of a training through its weights: snapshots in half precision, evenly spread over all steps.

What needs the path (weight histories, loss landscapes) reads one file in which each tensor carries a leading axis T.
"""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import CHECKPOINTS, write_whole
from .vit import VisionTransformer, create_model

FILE = "trajectory.safetensors"
TRAJECTORIES = CHECKPOINTS.with_name("trajectories")


def snapshot_steps(count: int, steps: int) -> set[int]:
    """`count` numbers of finished steps, from 0 to `steps`, evenly spread."""
    return {round(i * steps / (count - 1)) for i in range(count)} if count else set()


def save_snapshot(folder: Path, model: nn.Module, step: int) -> None:
    """folder/snapshots/<step>.safetensors: the weights after `step` steps in half precision, shared tensors once."""
    from safetensors.torch import save_file

    weights = {name: value.detach().half().cpu().contiguous() for name, value in model.named_parameters()}
    path = folder / "snapshots" / f"{step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: save_file(weights, temporary))


def pack_snapshots(folder: Path, steps: set[int], card: dict, model_config: dict) -> None:
    """Put the snapshots after `steps`, if all are there, in folder/trajectory.safetensors; then remove them."""
    from safetensors.torch import load_file, save_file

    files = sorted((folder / "snapshots").glob("[0-9]" * 8 + ".safetensors"))
    if (folder / FILE).is_file() and not files:
        return  # packed before
    if lacking := steps - {int(file.stem) for file in files}:
        warnings.warn(
            f"{folder} has no trajectory: its snapshots lack step {min(lacking)}{' and others' * (len(lacking) > 1)}. "
            "What is there stays in snapshots/.",
            stacklevel=3,
        )
        return
    if {int(file.stem) for file in files} == steps:
        each = [load_file(file) for file in files]
        stacked = {name: torch.stack([weights[name] for weights in each]) for name in each[0]}
        about = json.dumps({**card, "config": model_config, "steps": sorted(steps)}, indent=1)
        write_whole(folder / FILE, lambda temporary: save_file(stacked, temporary, metadata={"karat_lite": about}))
    remove_snapshots(folder)


def remove_snapshots(folder: Path) -> None:
    """Those of an earlier training, or that are packed."""
    shutil.rmtree(folder / "snapshots", ignore_errors=True)


@dataclass(frozen=True)
class Trajectory:
    """T snapshots of one training.

    weights: name -> (T, ...) float32, rounded to half precision; card: what the checkpoint's card says, and the steps.
    """

    weights: dict[str, Tensor]
    card: dict

    @property
    def steps(self) -> list[int]:
        """The T numbers of finished steps, from 0 on."""
        return self.card["steps"]

    def __len__(self) -> int:
        return len(self.steps)

    @torch.no_grad()
    def model(self, t: int) -> VisionTransformer:
        """The model at snapshot t (negative: from the end), in eval mode. Raises `ValueError` where there is none."""
        if not -len(self) <= t < len(self):
            raise ValueError(f"snapshot {t} is not there: this trajectory holds snapshots 0 to {len(self) - 1}.")
        with torch.random.fork_rng(devices=[]):  # what it draws is overwritten: looking leaves no trace
            model = create_model(**self.card["config"])
        for name, parameter in model.named_parameters():
            parameter.copy_(self.weights[name][t])
        return model.eval()


def available_trajectories() -> list[str]:
    """Names of the committed trajectories: those of the checkpoints that they end in."""
    return sorted(path.stem for path in TRAJECTORIES.glob("*.safetensors"))


def load_trajectory(path_or_name: str | Path) -> Trajectory:
    """Load a trajectory by path, or a committed one by name.

    Raises `FileNotFoundError`, or `ValueError` for a file that is no trajectory.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path_or_name)
    if not path.is_file() and path.name == str(path_or_name):
        path = TRAJECTORIES / f"{path.name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no trajectory at {path_or_name}: there are {', '.join(available_trajectories()) or 'none by name'}; "
            "training with snapshots=20 and out=FOLDER writes FOLDER/trajectory.safetensors."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            card = json.loads((opened.metadata() or {}).get("karat_lite", "{}"))
            weights = {name: opened.get_tensor(name).float() for name in opened.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or is no safetensors file ({error}): train or fetch it again.") from error
    if "steps" not in card:
        raise ValueError(f"{path} is no trajectory: its card names no steps. load_checkpoint reads single checkpoints.")
    return Trajectory(weights, card)
