"""Image folders that tests write for themselves: noisy pictures of one colour a class, which a model learns at once."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 70), "red": (210, 50, 40)}


def write_folder(root: Path, parts=("train", "test"), classes=tuple(COLOURS), count=4, size=(8, 8), seed=0) -> Path:
    """root/<part>/<class>/<i>.png, `count` noisy pictures of every class; `size` is (width, height)."""
    random = np.random.default_rng(seed)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                noise = random.normal(scale=25, size=(size[1], size[0], 3))
                pixels = np.clip(noise + COLOURS.get(name, (128, 128, 128)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root
