"""The state of a training in one file: weights, optimiser, average, place in the epoch, history.

One file, so that its parts cannot disagree, written beside and renamed, so that it is whole; read without pickle's
powers (`weights_only=True`).
"""

from pathlib import Path

import torch

from .checkpoints import first_line, write_whole

FILE = "resume.pt"


def save_state(folder: Path, state: dict) -> None:
    """Write the state to folder/resume.pt. `OSError` where that fails; an earlier state then stays as it is."""
    write_whole(folder / FILE, lambda temporary: torch.save(state, temporary))


def load_state(folder: Path, about: dict) -> dict | None:
    """The state in `folder`, None where there is none yet.

    `about` describes the training that wants to go on (its seed, recipe, data, model): flat, with plain values.
    Raises `ValueError` for a damaged file, or one of another training, with what differs.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        its = state["about"]
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged bytes make PyTorch raise whatever they happen to hit
        raise ValueError(
            f"{path} is damaged ({first_line(error)}): this training cannot go on from it. Remove the file to start "
            f"again; the last epoch's weights are in {folder / 'model.safetensors'}."
        ) from error
    differ = [key for key in {**about, **its} if about.get(key) != its.get(key)]
    if differ:
        said = "; ".join(f"{key}: there {its.get(key)!r}, now {about.get(key)!r}" for key in differ)
        raise ValueError(
            f"{path} belongs to another training ({said}): go on with the same settings, or take another folder."
        )
    return state
