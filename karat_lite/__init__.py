"""karat_lite: Kolmogorov-Arnold attention for Vision Transformers, small and readable.

Ground floor first: checks; bases, fourier, linear_bases, edge_bases; kernels, recompute, functional; operators,
attention, vit; data, recipes, checkpoints, training beside them. `plots`, `widgets` and `notebook` bring matplotlib and
ipywidgets with them, so they load when first named; downloads and named_data, with torchvision, when a dataset needs
them.
"""

import importlib

from . import checkpoints, data, edge_bases, functional, linear_bases, recipes, training
from .attention import (
    AttentionRecord,
    HybridActivation,
    KArAttention,
    MultiHeadAttention,
    SoftmaxActivation,
    StaticMixer,
)
from .bases import Basis, LinearBasis, available_bases, make_basis, register_basis
from .checkpoints import available_checkpoints, load_checkpoint, save_checkpoint
from .data import load_dataset
from .edge_bases import EdgeBasis
from .evaluation import evaluate
from .fourier import Fourier
from .history import History
from .operators import KArAtOperator
from .recipes import RECIPES, Recipe
from .trajectory import Trajectory, load_trajectory
from .vit import VisionTransformer, create_model, load_timm_weights, resize

__version__ = "0.1.0"
_LAZY = ("notebook", "plots", "widgets")
__all__ = [
    "AttentionRecord", "Basis", "EdgeBasis", "Fourier", "History", "HybridActivation", "KArAtOperator", "KArAttention",
    "LinearBasis", "MultiHeadAttention", "RECIPES", "Recipe", "SoftmaxActivation", "StaticMixer", "Trajectory",
    "VisionTransformer", "available_bases", "available_checkpoints", "checkpoints", "create_model", "data",
    "edge_bases", "evaluate", "functional", "linear_bases", "load_checkpoint", "load_dataset", "load_timm_weights",
    "load_trajectory", "make_basis", "recipes", "register_basis", "resize", "save_checkpoint", "training", *_LAZY,
]  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
