"""The training loop: one for every model, on a CPU, a GPU or several processes, so that twins differ in one thing only.

accelerate carries it from machine to machine; what is random comes from augment.py and follows from seed, epoch and
step; so a training that was interrupted goes on to the same weights.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import as_tested, batches, in_order, mix, timm_transform
from .checkpoints import save_checkpoint
from .checks import at_least, divides
from .evaluation import evaluate_together
from .history import History
from .not_finite import first_not_finite
from .optimiser import learning_rate, make_average, make_optimizer, set_learning_rate
from .processes import Engine, peak_memory, pick_device
from .progress import progress_bar
from .recipes import Recipe
from .resume import load_state, save_state
from .trajectory import FILE, pack_snapshots, remove_snapshots, save_snapshot, snapshot_steps
from .vit import VisionTransformer, check_as_built

LOOK_GPU = 20  # steps between looks at the loss: a GPU has to be waited for, a CPU is looked at after every step


def train(
    model: VisionTransformer,
    train_data,
    test_data,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    card: dict | None = None,
    workers: int = 0,
    snapshots: int = 0,
    log_every: int = 0,
    measure: Callable[[VisionTransformer], dict] | None = None,
    save_minutes: float = 10.0,
    on_epoch: Callable[[History], object] | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place with AdamW, warm-up and cosine decay; test after every epoch.

    Args:
        train_data, test_data: what `load_dataset` gives.
        seed: order of the batches and augmentation. (Initial weights come from the seed set before the model was made.)
        out: folder that receives, after every epoch and each file whole, model.safetensors with its card, average.* (if
            the recipe averages weights), history.jsonl, and resume.pt, the state of the training.
        resume: go on from out/resume.pt if it is there; on a CPU to the same bits as without the interruption.
        card: entries to add to the checkpoint's card.
        workers: processes that read and augment pictures.
        snapshots: this many half-precision copies of the weights, evenly spread from the first to the last step, end up
            in out/trajectory.safetensors.
        log_every: write down loss and gradient norm of the first step and of every so many.
        measure: is called with the model, in evaluation mode, at each of these steps; what it returns joins the record.
        save_minutes: write resume.pt this often within an epoch, too; 0: after every step.
        on_epoch: is called with the history after every epoch.
        progress: show a bar with images per second and time left.

    Under torchrun or accelerate launch every process calls this with the same arguments; each takes its share of every
    batch, and the first one alone writes, shows and calls `on_epoch`.

    Returns the `History`. Raises `TypeError` for data, a recipe or card entries of another kind, `ValueError` if
    classes or sizes of data, model and recipe do not fit or resume.pt is damaged or of another training, `OSError` if a
    file cannot be written, `FloatingPointError` if the loss is no longer finite (what stands in `out` is then the last
    good epoch).
    """
    if (snapshots or resume) and out is None:
        raise ValueError("snapshots and resume need out=FOLDER, where they are kept.")
    if at_least("snapshots", snapshots, 0) == 1:
        raise ValueError("a trajectory has at least 2 snapshots, the first and the last: take snapshots=2 or more.")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, as make_recipe('small') gives, got {recipe!r}.")
    at_least("seed", seed, 0), at_least("workers", workers, 0), at_least("log_every", log_every, 0)
    if not save_minutes >= 0:
        raise ValueError(f"save_minutes must be >= 0 (0 saves after every step), got {save_minutes}.")
    try:
        json.dumps({**(card or {}), "config": model.config})  # better now than after an epoch
    except (TypeError, ValueError) as error:
        raise TypeError(f"the card must hold what JSON can say, got {card!r} ({error}).") from error
    if out is not None:
        check_as_built(getattr(model, "_orig_mod", model))
    engine = Engine(pick_device(device), recipe.precision)
    _check_fit(model, train_data, test_data, recipe, engine.part[1])
    out = None if out is None else Path(out)
    if out and engine.first:
        _make_writable(out)
    run = _Training(model, train_data, test_data, recipe, seed, engine, out, card or {})
    run.workers, run.log_every, run.measure, run.save_minutes = workers, log_every, measure, save_minutes
    run.snapshots = snapshot_steps(snapshots, run.steps)
    if resume and (state := load_state(out, run.about())):
        run.load(state)
    elif out and engine.first:
        remove_snapshots(out)  # of another training that was here
        (out / FILE).unlink(missing_ok=True)
    before = (run.epoch * run.per_epoch + run.done) * recipe.batch_size
    bar = progress_bar(run.steps * recipe.batch_size, before, progress and engine.first)
    try:
        while run.epoch < recipe.epochs:
            run.train_epoch(bar)
            run.test_epoch()
            last = run.history.records[-1]
            bar.set_postfix_str(
                f"epoch {run.epoch}/{recipe.epochs}, loss {last['train_loss']:.3f}, test accuracy "
                f"{last['test_accuracy']:.1%}"
            )
            run.keep()
            if on_epoch is not None and engine.first:
                on_epoch(run.history)
    finally:
        bar.close()
        engine.release()
    if snapshots and engine.first:
        pack_snapshots(out, run.snapshots, run.card(), model.config)
    model.eval()
    return run.history


class _Training:
    """A training at some point of its way: `epoch` whole epochs, and `done` steps of the next one."""

    def __init__(self, model, train_data, test_data, recipe: Recipe, seed: int, engine, out: Path | None, card: dict):
        self.model, self.recipe, self.seed, self.engine, self.out, self.more = model, recipe, seed, engine, out, card
        self.plain = getattr(model, "_orig_mod", model)  # of torch.compile(model): what files hold
        self.train_data, self.test_data = train_data, as_tested(test_data, recipe, model.img_size)
        self.per_epoch = len(train_data) // recipe.batch_size
        self.steps = recipe.epochs * self.per_epoch
        self.warmup = min(round(recipe.warmup_epochs * self.per_epoch), self.steps - 1)
        model.to(engine.device)
        self.average = make_average(model, recipe.ema) if recipe.ema else None
        self.wrapped, self.optimizer = engine.prepare(model, make_optimizer(model, recipe))
        self.history = History()
        self.epoch, self.done, self.seconds = 0, 0, 0.0
        self.sums = torch.zeros(3, device=engine.device)  # of losses, of gradient norms, how many norms

    # ---- a way of one epoch

    def train_epoch(self, bar) -> None:
        """The steps of the running epoch that are still to do."""
        self.model.train()
        look = 1 if self.engine.device.type == "cpu" else LOOK_GPU
        started = saved = time.perf_counter()
        earlier = self.seconds
        data = batches(
            self.train_data, self.recipe, self.model.img_size, seed=self.seed, epoch=self.epoch,
            device=self.engine.device, start=self.done, part=self.engine.part, workers=self.workers,
        )  # fmt: skip
        if self.epoch == self.done == 0:
            self._snapshot(0)
        for images, labels in data:
            at = self.epoch * self.per_epoch + self.done  # finished steps
            rate = learning_rate(at, self.steps, self.warmup, self.recipe)
            loss, norm = self.step(images, labels, rate)
            self.done += 1
            if (at + 1) % look == 0 and not self.sums[0].isfinite():
                self._stop(images, at + 1, look)
            if self.log_every and (at == 0 or (at + 1) % self.log_every == 0):
                self._log(at + 1, rate, loss, norm)
            self._snapshot(at + 1)
            bar.update(len(images) * self.engine.part[1])
            self.seconds = earlier + time.perf_counter() - started
            due = self.out and self.engine.first and time.perf_counter() - saved > 60 * self.save_minutes
            if due and self.done < self.per_epoch:  # by the clock of one process: the others meet it in the next step
                # Nothing is kept from which a training could only fail again: a norm that is not finite, and no scaler
                # to leave its step out, has spoilt the weights already.
                if not self.sums[0].isfinite() or not (norm.isfinite() or self.engine.scales):
                    self._stop(images, at + 1, look)
                self.save()
                saved = time.perf_counter()
        if not self.sums[0].isfinite():
            self._stop(images, at + 1, look)
        self.seconds = earlier + time.perf_counter() - started

    def step(self, images: Tensor, labels: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One step of AdamW; returns the loss and the norm of all gradients before they are clipped."""
        recipe, smoothing = self.recipe, self.recipe.label_smoothing
        if recipe.mixup or recipe.cutmix:
            key = (self.seed, self.epoch, self.done, self.engine.part[0])
            images, labels = mix(images, labels, recipe, len(self.train_data.classes), key)
            smoothing = 0.0  # it is in the targets already
        loss = F.cross_entropy(self.wrapped(images).float(), labels, label_smoothing=smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.backward(loss)
        norm = self.engine.clip(self.model.parameters(), recipe.clip_norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        loss, there = loss.detach(), norm.isfinite()  # in half precision a norm may overflow: that step is left out
        self.sums += torch.stack([loss, norm.where(there, 0.0), there.float()])
        return loss, norm

    def test_epoch(self) -> None:
        """Close the epoch: test, and write the record down."""
        started = time.perf_counter()
        test = evaluate_together(self.model, self.test_data, self.engine, self.workers)
        train_loss, norms, count = (self.engine.mean(value) for value in self.sums)
        if not math.isfinite(test["loss"]):  # the last step of an epoch shows in the test alone
            images, _ = next(in_order(self.test_data, 256, self.engine.device))
            self._stop(images, (self.epoch + 1) * self.per_epoch, 1, test["loss"])
        self.epoch, self.done = self.epoch + 1, 0
        rate = learning_rate(self.epoch * self.per_epoch, self.steps, self.warmup, self.recipe)
        record = {"epoch": self.epoch, "lr": rate, "train_loss": train_loss / self.per_epoch}
        record |= {"grad_norm": norms / max(1.0, count), "test_loss": test["loss"]}
        record |= {"test_accuracy": test["accuracy"], "test_top5": test["top5"]}
        if self.average is not None:
            averaged = evaluate_together(self.average.module, self.test_data, self.engine, self.workers)
            record["average_accuracy"] = averaged["accuracy"]
        images = self.per_epoch * self.recipe.batch_size
        record["images_per_second"] = images / self.seconds
        record["seconds"] = self.seconds + time.perf_counter() - started
        record["peak_memory"] = peak_memory(self.engine.device)
        self.history.records.append(record)
        self.sums.zero_()
        self.seconds = 0.0

    # ---- what is kept

    def about(self) -> dict:
        """What a training must share with the one that it goes on from, flat."""
        data = {"data": self.train_data.name, "training images": len(self.train_data), "seed": self.seed}
        recipe = {f"recipe's {key}": value for key, value in dataclasses.asdict(self.recipe).items()}
        model = {f"model's {key}": value for key, value in self.model.config.items()}
        return {**data, **recipe, **model, "snapshots": sorted(self.snapshots)}

    def card(self) -> dict:
        """What a checkpoint's card says about its training."""
        card = {"data": self.train_data.name, "img_size": self.model.img_size, "seed": self.seed}
        card |= {"train_images": len(self.train_data), "metrics": self.history.records[-1]}
        return {**card, "recipe": dataclasses.asdict(self.recipe), **self.more}

    def save(self) -> None:
        """resume.pt: everything from which this training goes on, as the first process has it. Of the running epoch's
        losses and of random numbers for dropout its own share then stands for all."""
        state = {"about": self.about(), "epoch": self.epoch, "done": self.done, "seconds": self.seconds}
        state |= {"model": self.plain.state_dict(), "optimizer": self.optimizer.state_dict(), "sums": self.sums}
        state["average"] = None if self.average is None else self.average.state_dict()
        state |= {"records": self.history.records, "steps": self.history.steps, **self.engine.state()}
        save_state(self.out, state)

    def keep(self) -> None:
        """After an epoch: the state first, then what is made from it."""
        if self.out is None:
            return
        if self.engine.first:
            self.save()
            self.publish()
        self.engine.wait()  # what the first has written, all can read

    def publish(self) -> None:
        """The files that others read."""
        save_checkpoint(self.out / "model.safetensors", self.model, self.card())
        stale = ["average.safetensors", "average.json"] * (self.average is None) + [FILE] * (not self.snapshots)
        for name in stale:  # of another training that was here
            (self.out / name).unlink(missing_ok=True)
        if self.average is not None:
            averaged = {
                **self.card(),
                "average": "exponential moving average of the weights, decay " + str(self.recipe.ema),
            }
            save_checkpoint(self.out / "average.safetensors", self.average.module, averaged)
        self.history.save(self.out / "history.jsonl")

    def load(self, state: dict) -> None:
        """Take up where `state` was saved."""
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.sums.copy_(state["sums"])
        self.engine.load(state)
        self.history = History(state["records"], state["steps"])
        self.epoch, self.done, self.seconds = state["epoch"], state["done"], state["seconds"]
        if self.epoch and not self.done and self.engine.first:
            self.publish()  # an interruption may have fallen between the state and these

    def _log(self, step: int, rate: float, loss: Tensor, norm: Tensor) -> None:
        # None where half precision overflowed and left the step out: JSON knows no infinity.
        norm = norm.item() if norm.isfinite() else None
        record = {"step": step, "lr": rate, "loss": self.engine.mean(loss), "grad_norm": norm}
        if self.measure is not None:
            found = self.measure(self.model.eval())
            try:
                found = dict(
                    json.loads(json.dumps(found))
                )  # to JSON NumPy's numbers are floats, resume.pt refuses them
            except (TypeError, ValueError) as error:
                raise TypeError(f"measure must return a dict that JSON can say, got {found!r} ({error}).") from error
            if taken := {*record, "epoch"} & set(found):
                raise ValueError(
                    f"measure returns {', '.join(sorted(taken))}, names of the history's own: take others."
                )
            record |= found
            self.model.train()
        self.history.steps.append(record)

    def _snapshot(self, step: int) -> None:
        if step in self.snapshots and self.engine.first:
            save_snapshot(self.out, self.plain, step)

    def _stop(self, images: Tensor, step: int, look: int, test_loss: float | None = None) -> None:
        """The loss is not finite: say where, and what is left."""
        steps = f"step {step}" if look == 1 else f"steps {max(1, step - look + 1)} to {step}"
        culprit = first_not_finite(self.model, images)
        what = "training loss" if test_loss is None else f"test loss ({test_loss})"
        kept = f" {self.out} holds epoch {self.epoch}." if self.out and self.epoch else ""
        raise FloatingPointError(
            f"the {what} is no longer finite at {steps}, in epoch {self.epoch + 1}; {culprit}.{kept} "
            f"Lower the learning rate ({self.recipe.lr}) or clip_norm ({self.recipe.clip_norm})."
        )


def _check_fit(model: VisionTransformer, train_data, test_data, recipe: Recipe, processes: int) -> None:
    classes = model.head.out_features
    for data in (train_data, test_data):
        if not hasattr(data, "classes"):
            raise TypeError(f"train and test data must be what load_dataset gives, got {data!r}.")
        if len(data) == 0:
            raise ValueError(f"the {data.split} part of {data.name} is empty.")
        if len(data.classes) != classes:
            raise ValueError(
                f"{data.name} has {len(data.classes)} classes and the model {classes}: build it with "
                f"num_classes={len(data.classes)}."
            )
        if data.img_size != model.img_size and not recipe.single_pictures:
            raise ValueError(
                f"the {data.split} images of {data.name} have {data.img_size} pixels a side and the model takes "
                f"{model.img_size}: load them with img_size={model.img_size}."
            )
    if recipe.batch_size > len(train_data):
        raise ValueError(
            f"a batch of {recipe.batch_size} is larger than the {len(train_data)} training images of "
            f"{train_data.name}: take batch_size <= {len(train_data)}."
        )
    if recipe.single_pictures:
        timm_transform(recipe, model.img_size, training=True)  # what timm cannot read is told now
    divides("the number of processes", processes, "batch_size", recipe.batch_size)
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size // processes % 2:
        raise ValueError(
            f"mixup and cutmix pair images of each process's share of a batch: {recipe.batch_size} images over "
            f"{processes} processes are {recipe.batch_size // processes} each, an odd number. Take another batch_size."
        )


def _make_writable(out: Path) -> None:
    """Better to learn now that it cannot be written than after an epoch."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        allowed = os.access(out, os.W_OK)
    except OSError as error:
        raise OSError(f"cannot make the folder {out} ({error}): give another one.") from error
    if not allowed:
        raise OSError(f"the folder {out} is read-only: give another one, or make it writable.")
    for leftover in out.glob(".*.part"):  # of a writer that was killed
        leftover.unlink(missing_ok=True)
