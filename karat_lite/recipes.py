"""Training configurations: small, frozen, a reason beside each field."""

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real

from .checks import at_least, one_of

PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # ours, and accelerate's word for it


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Twins share one recipe: what differs between them is the activation alone."""

    epochs: int = 30
    batch_size: int = 32  # of all processes together; small data: many steps per epoch matter more than full cores

    # Schedule: warm-up from warmup_lr to lr, then half a cosine down to min_lr.
    lr: float = 2e-3  # peak, at this batch size; pico models take more than the usual 5e-4
    min_lr: float = 1e-5  # the cosine ends here, as in the paper's recipe
    warmup_epochs: float = 2.0  # attention scores settle before large steps; at most all steps but the last
    warmup_lr: float = 0.0

    # AdamW. Its first average has decay 0.9: what the paper's table calls momentum.
    weight_decay: float = 0.05  # the paper's; on matrices, coefficients and W, never on biases, norms, tokens, scales
    eps: float = 1e-8  # torch's
    clip_norm: float = 1.0  # the paper's
    operator_lr: float = 1.0  # times lr, for KArAt's parameters; 1 is the paper's: it names no other
    operator_decay: float | None = None  # weight decay of coefficients and W; None: as everything else

    # Targets
    label_smoothing: float = 0.1  # the paper's
    mixup: float = 0.0  # alpha of mixup, 0: off; with cutmix each batch gets one of the two, by a fair coin
    cutmix: float = 0.0  # alpha of cutmix, 0: off

    # Augmentation: of whole batches, where the model computes; or, with crop_scale, of single pictures, by timm.
    flip: float = 0.0  # probability of a mirror image, for data whose classes allow it: no digits
    shift: int = 0  # batches only; pixels: pad by as many, crop at random
    crop_scale: tuple[float, float] | None = None  # share of the picture's area that a random crop keeps
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width over height of that crop
    color_jitter: float = 0.0  # timm leaves it out where auto_augment changes colours too
    auto_augment: str | None = None  # timm's notation
    test_crop: float = 1.0  # test pictures: resized so that a centre crop keeps this share of their side

    ema: float | None = None  # decay of an exponential moving average of the weights, per step; None: no average
    precision: str = "float32"  # of matrix products; scores and basis functions stay in float32 whatever this says

    def __post_init__(self):
        self._check_numbers()
        at_least("recipe's epochs", self.epochs, 1)
        at_least("recipe's batch_size", self.batch_size, 1)
        at_least("recipe's shift", self.shift, 0)
        one_of("precision", self.precision, PRECISIONS)
        if not 0 < self.min_lr <= self.lr:
            raise ValueError(f"a recipe needs 0 < min_lr <= lr, got min_lr = {self.min_lr} and lr = {self.lr}.")
        if not 0 <= self.warmup_lr <= self.lr:
            raise ValueError(
                f"a recipe needs 0 <= warmup_lr <= lr, got warmup_lr = {self.warmup_lr} and lr = {self.lr}."
            )
        for name in ("warmup_epochs", "weight_decay", "mixup", "cutmix", "color_jitter"):
            self._need(name, getattr(self, name) >= 0, ">= 0")
        for name in ("clip_norm", "eps", "operator_lr"):
            hint = ": infinity switches clipping off" if name == "clip_norm" else ""
            self._need(name, getattr(self, name) > 0, "> 0", hint)
        self._need("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._need("flip", 0 <= self.flip <= 1, "in [0, 1]")
        self._need("test_crop", 0 < self.test_crop <= 1, "in (0, 1]")
        self._need("ema", self.ema is None or 0 < self.ema < 1, "in (0, 1), or None")
        self._need("operator_decay", self.operator_decay is None or self.operator_decay >= 0, ">= 0, or None")
        for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            if (pair := getattr(self, name)) is not None:
                if not isinstance(pair, list | tuple) or not all(isinstance(x, Real) for x in pair):
                    raise TypeError(f"recipe's {name} must be two numbers, got {pair!r}.")
                object.__setattr__(self, name, pair := tuple(pair))  # JSON gives lists
                fits = len(pair) == 2 and 0 < pair[0] <= pair[1] <= most
                self._need(name, fits, f"two numbers, 0 < least <= most <= {most:g}")
        if self.single_pictures and self.shift:
            raise ValueError("a recipe's shift is for whole batches, crop_scale for single pictures: take one of them.")
        if not self.single_pictures:
            for name in ("color_jitter", "auto_augment", "test_crop", "crop_ratio"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"a recipe's {name} needs crop_scale: it works on single pictures.")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"mixup and cutmix pair a batch with itself: batch_size must be even, got {self.batch_size}."
            )

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type not in (float, float | None) or (value is None and field.type is not float):
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(
                    f"recipe's {field.name} must be a number, got {value!r} of type {type(value).__name__}."
                )
            self._need(field.name, math.isfinite(value) or (field.name == "clip_norm" and value > 0), "a finite number")

    @property
    def single_pictures(self) -> bool:
        """Whether pictures are augmented one by one (crops, colours), not as batches of bytes."""
        return self.crop_scale is not None

    def with_batch(self, batch_size: int) -> "Recipe":
        """The same for batches of another size: learning rates in proportion, the average's decay to the same age.

        lr, min_lr and warmup_lr are multiplied by the ratio of sizes (linear rule), and ema is raised to that power.
        """
        ratio = at_least("batch_size", batch_size, 1) / self.batch_size
        rates = {name: getattr(self, name) * ratio for name in ("lr", "min_lr", "warmup_lr")}
        return dataclasses.replace(self, batch_size=batch_size, ema=self.ema and self.ema**ratio, **rates)

    def _need(self, name: str, fits: bool, expected: str, hint: str = "") -> None:
        if not fits:
            raise ValueError(f"recipe's {name} must be {expected}, got {getattr(self, name)}{hint}.")


SMALL = Recipe()
PAPER = Recipe(
    epochs=100,
    batch_size=32,
    lr=5e-4 * 32 / 512,  # the paper scales 5e-4 by batch / 512
    min_lr=1e-5,
    warmup_epochs=5.0,
    warmup_lr=1e-6,
    weight_decay=0.05,
    eps=1e-6,
    clip_norm=1.0,
    label_smoothing=0.1,
    mixup=0.8,  # the paper gives the probability of each, 0.5; the alphas are DeiT's
    cutmix=1.0,
    flip=0.5,
    crop_scale=(0.08, 1.0),
    crop_ratio=(0.67, 1.5),
    color_jitter=0.4,
    auto_augment="rand-m15-n2-mstd1.0-inc1",  # timm clips m15 to its largest magnitude, 10
    test_crop=0.9,
    ema=0.99992,
)
RECIPES = {
    # Seconds: the tutorial's smoke profile. Fewer epochs, no smoothing, so that accuracy rises early.
    "smoke": Recipe(epochs=4, warmup_epochs=1.0, label_smoothing=0.0),
    # Minutes: 8- to 32-pixel images on a laptop.
    "small": SMALL,
    # The same for small photographs, CIFAR above all, with the augmentation that everyone gives them.
    "small_photos": dataclasses.replace(SMALL, flip=0.5, shift=4),
    # The paper's table 5 (section 4 of its facts) on 224-pixel images: CIFAR's batch size, then ImageNet's.
    "paper": PAPER,
    "paper_imagenet": dataclasses.replace(PAPER, batch_size=128, lr=5e-4 * 128 / 512),
    # What the same table gives ConViT and Swin in other words; for ImageNet, as above, with --scale-batch 128.
    "paper_convit": dataclasses.replace(PAPER, eps=1e-8, auto_augment="rand-m9-mstd0.5-inc1", ema=None),
    "paper_swin": dataclasses.replace(PAPER, eps=1e-8, ema=None),
}


def make_recipe(name: str, **changes) -> Recipe:
    """The recipe called `name`, with some of its fields changed. `ValueError` names an unknown one and its like."""
    recipe = RECIPES[one_of("recipe", name, RECIPES)]
    for key in changes:
        one_of("field of a recipe", key, [field.name for field in dataclasses.fields(Recipe)])
    return dataclasses.replace(recipe, **changes)
