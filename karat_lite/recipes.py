"""Training configurations: small, frozen, a reason beside each field."""

from dataclasses import dataclass

from .checks import at_least


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Twins share one recipe: what differs between them is the activation alone."""

    epochs: int = 30
    batch_size: int = 32  # small data: many steps per epoch matter more than full cores; the paper's for CIFAR
    lr: float = 2e-3  # peak of the schedule, at this batch size; pico models take more than the usual 5e-4
    min_lr: float = 1e-5  # the cosine ends here, as in the paper's recipe
    warmup_epochs: float = 2.0  # from 0 to the peak: attention scores settle before large steps
    weight_decay: float = 0.05  # the paper's; on matrices, coefficients and W, never on biases, norms, tokens, scales
    clip_norm: float = 1.0  # the paper's
    label_smoothing: float = 0.1  # the paper's

    def __post_init__(self):
        at_least("recipe's epochs", self.epochs, 1)
        at_least("recipe's batch_size", self.batch_size, 1)
        if not 0 < self.min_lr <= self.lr:
            raise ValueError(f"a recipe needs 0 < min_lr <= lr, got min_lr = {self.min_lr} and lr = {self.lr}.")
        for name in ("warmup_epochs", "weight_decay", "label_smoothing"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"recipe's {name} must be >= 0, got {getattr(self, name)}.")
        if not self.clip_norm > 0:
            raise ValueError(f"recipe's clip_norm must be > 0, got {self.clip_norm}: infinity switches clipping off.")


RECIPES = {
    # Seconds: the tutorial's smoke profile. Fewer epochs, no smoothing, so that accuracy rises early.
    "smoke": Recipe(epochs=8, warmup_epochs=1.0, label_smoothing=0.0),
    # Minutes: 8- to 32-pixel images on a laptop.
    "small": Recipe(),
}
