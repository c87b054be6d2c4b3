"""karat_lite: Kolmogorov-Arnold attention for Vision Transformers, small and readable.

Ground floor first: checks, bases, functional, operators, attention, vit; data, recipes, checkpoints, training beside
them. `plots`, `widgets` and `notebook` bring matplotlib and ipywidgets with them, so they load when first named.
"""

import importlib

from . import checkpoints, data, functional, recipes, training
from .attention import AttentionRecord, KArAttention, MultiHeadAttention, SoftmaxActivation
from .bases import Fourier, LinearBasis, available_bases, make_basis, register_basis
from .checkpoints import available_checkpoints, load_checkpoint, save_checkpoint
from .data import load_dataset
from .operators import KArAtOperator
from .recipes import RECIPES, Recipe
from .training import History, evaluate
from .vit import VisionTransformer, create_model, load_timm_weights

__version__ = "0.1.0"
_LAZY = ("notebook", "plots", "widgets")
__all__ = [
    "AttentionRecord", "Fourier", "History", "KArAtOperator", "KArAttention", "LinearBasis", "MultiHeadAttention",
    "RECIPES", "Recipe", "SoftmaxActivation", "VisionTransformer", "available_bases", "available_checkpoints",
    "checkpoints", "create_model", "data", "evaluate", "functional", "load_checkpoint", "load_dataset",
    "load_timm_weights", "make_basis", "recipes", "register_basis", "save_checkpoint", "training", *_LAZY,
]  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
