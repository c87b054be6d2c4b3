"""The training loop: one for every model, so that twins differ in nothing but their activation."""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from .checkpoints import save_checkpoint, write_whole
from .checks import one_of
from .data import Images
from .recipes import Recipe
from .vit import VisionTransformer

# Never decayed, beside all vectors. Scales of edges are factors near 1; a pull to 0 would silence their units.
KEPT = ("cls_token", "pos_embed", "w_b", "w_s", "w_b2", "w_s2")


@dataclass
class History:
    """What a training wrote down, one record an epoch: epoch, lr, train_loss, test_loss, test_accuracy, seconds."""

    records: list[dict] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One quantity over all epochs."""
        if self.records:
            one_of("history column", name, self.records[0])
        return [record[name] for record in self.records]

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        text = json.dumps(self.records, indent=1)
        write_whole(Path(path), lambda temporary: temporary.write_text(text + "\n"))

    @classmethod
    def load(cls, path: str | Path) -> "History":
        return cls(json.loads(Path(path).read_text()))


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" takes a GPU if there is one. Raises `ValueError` for a device that this machine does not have."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if str(device) == "auto":
        return torch.device(there[1] if len(there) > 1 else "cpu")
    return torch.device(one_of("device (or not on this machine)", str(device), there))


def train(
    model: VisionTransformer,
    train_data: Images,
    test_data: Images,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    card: dict | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place with AdamW, warm-up and cosine decay; evaluate after every epoch.

    Args:
        seed: order of the batches. (Initial weights come from the seed set before the model was made.)
        out: folder that receives model.safetensors, model.json and history.json after every epoch, each file whole.
            An interruption (Ctrl-C, kernel interrupt) therefore leaves the last epoch's.
        card: entries to add to the checkpoint's card.
        progress: show a bar with images per second and time left.

    Returns the `History`. Raises `ValueError` if classes or image sizes of data and model differ, `FloatingPointError`
    if the loss is no longer finite (what stands in `out` is then the last good epoch).
    """
    device = pick_device(device)
    _check_fit(model, train_data, test_data)
    model.to(device)
    loader = DataLoader(
        train_data,
        batch_size=min(recipe.batch_size, len(train_data)),
        shuffle=True,
        drop_last=True,  # every step sees a full batch, so that steps and learning rate mean the same throughout
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.lr)
    steps = recipe.epochs * len(loader)
    warmup = min(round(recipe.warmup_epochs * len(loader)), steps - 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, steps, warmup, recipe) / recipe.lr
    )

    history, bar = History(), _progress_bar(recipe.epochs * len(loader) * loader.batch_size, progress)
    try:
        for epoch in range(1, recipe.epochs + 1):
            started, total = time.perf_counter(), 0.0
            model.train()
            for images, labels in loader:
                images, labels = images.to(device), labels.to(device)
                loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                optimizer.step()
                schedule.step()
                total += loss.detach()
                bar.update(len(images))
            train_loss = float(total) / len(loader)
            test = evaluate(model, test_data, device)
            if not math.isfinite(train_loss + test["loss"]):  # the last step of an epoch shows in the test loss only
                kept = f"; {out} holds epoch {epoch - 1}" if out and epoch > 1 else ""
                raise FloatingPointError(
                    f"the loss is {train_loss} in training and {test['loss']} in the test of epoch {epoch}{kept}: "
                    f"lower the learning rate ({recipe.lr})."
                )
            history.records.append(
                {
                    "epoch": epoch,
                    "lr": schedule.get_last_lr()[0],
                    "train_loss": train_loss,
                    "test_loss": test["loss"],
                    "test_accuracy": test["accuracy"],
                    "seconds": time.perf_counter() - started,
                }
            )
            bar.set_postfix_str(
                f"epoch {epoch}/{recipe.epochs}, loss {train_loss:.3f}, test accuracy {test['accuracy']:.1%}"
            )
            if out is not None:
                described = {
                    "data": train_data.name,
                    "img_size": train_data.img_size,
                    "seed": seed,
                    "metrics": history.records[-1],
                }
                described["recipe"] = dataclasses.asdict(recipe)
                save_checkpoint(Path(out) / "model.safetensors", model, {**described, **(card or {})})
                history.save(Path(out) / "history.json")
    finally:
        bar.close()
    model.eval()
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Images, device: str | torch.device = "auto", batch_size: int = 256
) -> dict[str, float]:
    """Mean cross-entropy ("loss") and share of right answers ("accuracy") of `model` on `data`.

    The model is moved to the device and left in evaluation mode.
    """
    device = pick_device(device)
    model.to(device).eval()
    loss = right = 0.0
    for images, labels in DataLoader(data, batch_size=batch_size):
        logits = model(images.to(device)).float().cpu()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(dim=-1) == labels).sum().item()
    return {"loss": loss / len(data), "accuracy": right / len(data)}


def learning_rate(step: int, steps: int, warmup: int, recipe: Recipe) -> float:
    """Linear from lr / warmup to lr over `warmup` steps, then a half cosine down to min_lr at `steps`."""
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW. What multiplies activations decays: matrices, KArAt's coefficients and W. Biases, norms,
    class token, positions and edge scales do not."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim <= 1 or name.rpartition(".")[2] in KEPT
        (keep if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def _check_fit(model: VisionTransformer, train_data: Images, test_data: Images) -> None:
    classes = model.head.out_features
    for data in (train_data, test_data):
        if len(data) == 0:
            raise ValueError(f"the {data.split} part of {data.name} is empty.")
        if len(data.classes) != classes:
            raise ValueError(
                f"{data.name} has {len(data.classes)} classes and the model {classes}: build it with "
                f"num_classes={len(data.classes)}."
            )
        if data.img_size != model.img_size:
            raise ValueError(
                f"the {data.split} images of {data.name} have {data.img_size} pixels a side and the model takes "
                f"{model.img_size}: load them with img_size={model.img_size}."
            )


def _progress_bar(total: int, progress: bool):
    """A text bar on stdout: one line in a terminal and in a notebook, and it survives in saved outputs."""
    from tqdm import tqdm

    # Half a second between redraws keeps a saved notebook small.
    return tqdm(
        total=total, unit="img", unit_scale=True, mininterval=0.5, file=sys.stdout, disable=not progress, ncols=110
    )
