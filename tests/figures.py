"""Real arrays for figures, and one figure of each kind drawn from them."""

import functools
import io

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import karat_lite as kl
from karat_lite import plots, widgets


@functools.cache
def seen() -> tuple:
    """Digits, and what untrained pico twins see and do in them: images in [0, 1], name -> records, the operators."""
    data = kl.load_dataset("digits", "test", limit=8)
    records, operators = {}, []
    for attention in ("softmax", "karat"):
        torch.manual_seed(0)
        model = kl.create_model("vit_pico", attention, img_size=8, patch_size=2)
        with torch.no_grad():
            _, records[attention] = model(data[:8][0], return_attention=True)
        operators = model.operators()
    return kl.data.to_unit(data[:8][0]), records, operators


def history(*accuracies):
    return kl.History([
        {"epoch": i, "lr": 1e-3, "train_loss": 2 / i, "test_loss": 2.5 / i, "test_accuracy": a, "seconds": 1.0}
        for i, a in enumerate(accuracies, 1)
    ])  # fmt: skip


def pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(widgets.render(figure))))


def texts(figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible())


def scene(name) -> Figure:
    """One figure of each kind on real arrays."""
    images, records, operators = seen()
    x = torch.linspace(-4, 4, 200)
    maps = {attention: record[1].maps[0] for attention, record in records.items()}
    curves = [operators[0].curve(x, 0, 0, q) for q in range(5)]
    return {
        "training_curves": lambda: plots.training_curves({"softmax": history(0.5, 0.9), "KArAt": history(0.6, 0.8)}),
        "twins_accuracy": lambda: plots.twins_accuracy({"softmax": [0.95, 0.96, 0.97], "KArAt": [0.9, 0.94, 0.92]}),
        "images": lambda: plots.images(images, list("abcdefgh"), columns=3),
        "matrices": lambda: plots.matrices(maps),
        "attention_over_image": lambda: plots.attention_over_image(
            images[0], {name: rows[:, 0, 1:] for name, rows in maps.items()}, 4
        ),
        "learned_functions": lambda: plots.learned_functions(
            x, curves, ["chosen", "", "", "", "other"], "a title", scores=records["karat"][0].scores
        ),
        "costs": lambda: plots.costs(COSTS),
        "roofline": lambda: plots.roofline(POINTS, 180e9, 30e9),
    }[name]()


COSTS = {
    "softmax, eager": {"time (ms)": 7.0, "kept (MB)": 7.4, "traffic (GB)": 0.07},
    "broadcast": {"time (ms)": 1043.0, "kept (MB)": 41.1, "traffic (GB)": 82841.0},
    "full rank, values mixed": {"time (ms)": 57.0, "kept (MB)": 3.6, "traffic (GB)": 0.77},
}
# Operations a byte and a second; several of them nearly the same.
POINTS = {"softmax": (10, 100e9), "broadcast": (0.3, 1e9), "contraction": (1.9, 27e9), "associativity": (1.8, 28e9),
          "recompute": (1.6, 26e9), "recurrence": (1.5, 27.5e9), "full rank, values mixed": (8.5, 99e9)}  # fmt: skip

SCENES = ("training_curves", "twins_accuracy", "images", "matrices", "attention_over_image", "learned_functions",
          "costs", "roofline")  # fmt: skip
