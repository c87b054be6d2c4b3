"""What `bench` measures on a CPU and on a GPU."""

from dataclasses import dataclass

from .analysis.rivals import Case
from .vit import SIZES


@dataclass(frozen=True)
class Sizes:
    """What is measured. Two hands full of sizes each, because a benchmark that takes an hour is not run."""

    seconds: float  # in all, divided over the parts
    repeats: int  # rounds of a comparison at most
    shapes: tuple[Case, ...]  # layers of whole models
    tokens: tuple[int, ...]  # N, with `tokens_of` for the rest
    tokens_of: Case
    grids: tuple[int, ...]  # G and
    ranks: tuple[int | None, ...]  # r (None: full), with `grids_of` for the rest
    grids_of: Case
    models: tuple[Case, ...]
    img_size: int = 224  # pixels, of the models' images
    dtypes: tuple[str, ...] = ("float32",)  # of shapes and tokens
    at_once: int = 1  # runs in one timing: a GPU's launches then hide behind its work, as in a model
    room: float = 4e9  # bytes that a layer may take
    limits: int = 1024  # size of the matrices whose product tells how fast the machine is
    compiler: str = "inductor"


def model_case(name: str, images: int, **options) -> Case:
    """ViT at 224 pixels: 14 x 14 patches and the class token."""
    size = SIZES[name]
    return Case(images, size["num_heads"], 197, size["dim"] // size["num_heads"], model=name, **options)


VITS = ("vit_tiny", "vit_small", "vit_base")
TOKENS = (65, 197, 401, 785, 1025, 1601, 2305, 4097)
AXES = dict(tokens=TOKENS, grids=(1, 2, 3, 5, 7, 9, 11), ranks=(2, 4, 12, 24, 48, 96, None))
CPU = Sizes(
    seconds=280,
    repeats=20,
    shapes=tuple(model_case(name, 8)._replace(model=None) for name in VITS),
    tokens_of=Case(1, 3, 197, 64),
    grids_of=Case(2, 3, 197, 64),
    models=(model_case("vit_tiny", 8), model_case("vit_small", 1), model_case("vit_base", 1)),
    **AXES,
)
GPU = Sizes(
    seconds=400,
    repeats=50,
    shapes=tuple(model_case(name, 128)._replace(model=None) for name in VITS),
    tokens_of=Case(16, 3, 197, 64),
    grids_of=Case(128, 3, 197, 64, dtype="bfloat16"),
    models=tuple(
        model_case(name, 64, dtype="bfloat16", compiled=compiled) for compiled in (False, True) for name in VITS
    ),
    dtypes=("bfloat16", "float32"),
    at_once=10,
    limits=8192,
    **AXES,
)
