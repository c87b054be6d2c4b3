"""How weights move: groups of parameters, the learning rate at each step, the average of weights."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .operators import KArAtOperator
from .recipes import Recipe

# Never decayed, beside all vectors. Scales of edges are factors near 1; a pull to 0 would silence their units.
KEPT = ("cls_token", "pos_embed", "w_b", "w_s", "w_b2", "w_s2")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the recipe's groups."""
    # PyTorch's choice for a CPU steps tensor by tensor, a visible part of a small model's training; on a GPU
    # fused steps save most of the launches.
    fused = {parameter.device.type for parameter in model.parameters()} in ({"cpu"}, {"cuda"}) or None
    options = dict(lr=recipe.lr, betas=(0.9, 0.999), eps=recipe.eps, fused=fused)
    return torch.optim.AdamW(parameter_groups(model, recipe), **options)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Four groups for AdamW, empty ones left out: of the body and of KArAt's operators, what decays and what does not.

    What multiplies activations decays: matrices, coefficients and W. Biases, norms, class token, positions and edge
    scales do not. `lr_scale` says by what the schedule's rate is multiplied; `name` is for people.
    """
    operators = {id(p) for m in model.modules() if isinstance(m, KArAtOperator) for p in m.parameters()}
    its_decay = recipe.weight_decay if recipe.operator_decay is None else recipe.operator_decay
    groups = {}
    for part, scale, decay in (("body", 1.0, recipe.weight_decay), ("operators", recipe.operator_lr, its_decay)):
        for kind, pull in (("decayed", decay), ("kept", 0.0)):
            settings = dict(name=f"{part}, {kind}", weight_decay=pull, lr=recipe.lr * scale, lr_scale=scale)
            groups[part, kind] = dict(params=[], **settings)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "kept" if parameter.ndim <= 1 or name.rpartition(".")[2] in KEPT else "decayed"
            groups["operators" if id(parameter) in operators else "body", kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def learning_rate(step: int, steps: int, warmup: int, recipe: Recipe) -> float:
    """Linear from warmup_lr up to lr at the last of `warmup` steps, then a half cosine down to min_lr at `steps`."""
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate: the schedule's, times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of weights and buffers: average <- decay average + (1 - decay) model, every step.

    Its first value is the model as it is given. A tensor that blocks share (universal mode) is averaged once a step.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average.update_parameters(model)  # the first call copies, whatever the decay
    return average
