"""When numbers are no longer finite: which ones were the first."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> str:
    """A sentence's part: the first parameter that is not finite, else the first module whose output on `images` is not.

    Modules are asked in the order in which they compute, and the innermost is named.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name} are no longer finite"
    if not images.isfinite().all():
        return "the images are not finite"
    found: list[str] = []

    def watch(name):
        def hook(module, given, output):
            if isinstance(output, Tensor) and not found and not output.isfinite().all():
                found.append(name)  # an inner module computes before the one around it

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the first output that is not finite is that of {found[0]}"
    return "all weights and the outputs of all modules are finite"
