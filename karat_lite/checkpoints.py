"""Checkpoints: weights as safetensors with a card that says what they are. Whole or not at all, and never a pickle.

The card travels inside the file (safetensors' header), so weights and card cannot part; a copy beside it, NAME.json, is
for people to read. Committed checkpoints stand in data/checkpoints/ and load by name.
"""

import contextlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from .bases import available_bases
from .checks import one_of
from .vit import VisionTransformer, check_as_built, create_model

CHECKPOINTS = Path(__file__).resolve().parent.parent / "data" / "checkpoints"


def save_checkpoint(path: str | Path, model: VisionTransformer, card: dict | None = None) -> Path:
    """Write `model` to `path` (.safetensors) and its card beside it (.json); return the path.

    The card holds the model's configuration, library versions, and what `card` adds (data, seed, recipe, metrics:
    anything JSON can say). A tensor that all blocks share (universal mode) is stored once. `ValueError` for another
    file ending, or a model that `create_model` did not build, or that was changed since.
    """
    from safetensors.torch import save_model

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a checkpoint's name ends in .safetensors, got {path.name!r}.")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model): the same weights under the same names
    if not getattr(model, "config", None):
        raise ValueError("only a model that create_model built knows its configuration and can be saved with a card.")
    check_as_built(model)
    text = json.dumps({**(card or {}), "format": 1, "config": model.config, "versions": versions}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: save_model(model, str(temporary), metadata={"karat_lite": text}))
    write_whole(path.with_suffix(".json"), lambda temporary: temporary.write_text(text + "\n"))
    return path


def load_checkpoint(path_or_name: str | Path, model: VisionTransformer | None = None) -> tuple[VisionTransformer, dict]:
    """Load a checkpoint by path, or a committed one by name: (model in eval mode, card).

    Without `model` one is built from the card's configuration, in float32; a given one must have that configuration.
    Raises `FileNotFoundError` for a path or name that is not there, `ValueError` for a file that is damaged, is no
    safetensors file, carries no card, or holds another configuration than `model`.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    path = _find(path_or_name)
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get("karat_lite")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is no safetensors file ({error}): train or fetch it again.") from error
    if text is None:
        raise ValueError(f"{path} has no KArAt-lite card: load bare weights with safetensors.torch.load_model instead.")
    try:
        card = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the card in {path} is damaged ({error}): train or fetch the checkpoint again.") from error
    if not isinstance(card, dict) or not isinstance(card.get("config"), dict):
        raise ValueError(f"the card in {path} names no configuration of a model: train or fetch the checkpoint again.")
    if (basis := card["config"].get("basis", "fourier")) not in available_bases():
        raise ValueError(
            f"{path.name} uses the basis {basis!r}, which is not registered here: run the code that defines it "
            f"(@register_basis({basis!r})) first. There are {', '.join(available_bases())}."
        )
    if model is None:
        with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
            model = create_model(**card["config"]).float()
    elif model.config != card["config"]:
        mine, its = model.config, card["config"]
        keys = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
        differences = ", ".join(f"{key}: model {mine.get(key)!r}, checkpoint {its.get(key)!r}" for key in keys)
        raise ValueError(
            f"{path.name} holds another configuration ({differences}): load it without `model` to build it."
        )
    try:
        load_model(getattr(model, "_orig_mod", model), path)
    except RuntimeError as error:
        if isinstance(card.get("steps"), list):
            raise ValueError(f"{path} holds the weights of many steps: load it with load_trajectory.") from error
        raise ValueError(f"the weights in {path} are not those of its card: train or fetch it again.") from error
    return model.eval(), card


def available_checkpoints() -> list[str]:
    """Names of the committed checkpoints."""
    return sorted(path.stem for path in CHECKPOINTS.glob("*.safetensors"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the folder of `path`, then rename it: `path` is never seen half-written.

    Raises `OSError` that names the path where that fails (disk full, folder read-only); then `path` is as it was.
    """
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode  # safetensors makes files for their owner alone
        write(temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())  # the bytes before the name: after a power cut, too
        os.chmod(temporary, mode & 0o777)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors have errors of their own
        kept = "what it held before is unharmed" if path.exists() else "nothing was left behind"
        raise OSError(
            f"could not write {path} ({first_line(error)}); {kept}. "
            "Free some space, or choose a folder that can be written."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.suffix == "" and path.name == str(path_or_name):
        if (CHECKPOINTS / f"{path.name}.safetensors").is_file():
            return CHECKPOINTS / f"{path.name}.safetensors"
        try:
            one_of("checkpoint", path.name, available_checkpoints())
        except ValueError as error:
            raise FileNotFoundError(str(error)) from None
    raise FileNotFoundError(
        f"no checkpoint at {path}: give the path of a .safetensors file or one of {available_checkpoints()}."
    )
