"""What the class token looks at: its row of every map, what it takes from each patch, and where that pushes the answer.

Letters: B images, L layers, h heads, N = 1 + n tokens (token 0 is the class token, n patches row by row), D channels.
In layer l, head i, the class token takes from token q

    u_iq = A_0q V_q W_O^(i)        (D,)          A: the activated map, V: values, W_O^(i): the head's rows of W_O

and adds the sum over heads and tokens, and W_O's bias, to itself. A alone is known only up to a factor: (c A, V / c) is
the same model for every c, c < 0 included, when A is KArAt's (scale W, say). Softmax's rows are fixed by their sum of
one. Scores have no free factor, but Fourier units leave their sign: (-S, -b) is the same model as (S, b), b the sines'
coefficients. So only quantities made of u (or of |A| over its row's sum) can be compared between heads, layers and
kinds of attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ..bases import wide
from ..checks import at_least, one_of
from ..data import normalise, read_image, to_square
from ..functional import attention_scores
from ..not_finite import first_not_finite
from ..vit import VisionTransformer
from .inputs import checked, slopes_wanted, steady, whole_numbers

KINDS = ("scores", "attention", "dominant", "added", "rollout", "direct", "regions")
SIGNS = ("signed", "absolute")
AT_ONCE = 1 << 25  # numbers in the largest array, all scores of a layer or u of all layers: 128 MiB


@dataclass(frozen=True)
class ClassTokenMaps:
    """The class token of B images, layer by layer; on the CPU. n patches lie row by row on `grid` (down, across).

    logits (B, classes); target (B,): the class that effects and pushes are about.
    scores, maps (B, L, h, n): the class token's row before and after the activation, without its own entry; own
        (B, L, h): its own entry of the activated row.
    head_sizes (B, L, h): |sum_q u_iq|, the size of what head i adds to the class token; q runs over all tokens.
    added (B, L, n): |sum_i u_iq|, the size of what patch q adds to it through all heads.
    rollout, signed_rollout (B, L, n): see `rollout`, after each layer.
    effects (B, L, n): u_q . g, u_q = sum_i u_iq, g the gradient, at the class token behind attention of layer l, of the
        margin: the logit of `target` above the mean of all logits. To first order what patch q does to the answer by
        way of everything that follows, the MLP of layer l and all later blocks.
    pushes (B, L, n): the part of it on the direct path from layer l to the head, past all that follows: exact where the
        last LayerNorm is frozen (its mean and standard deviation s taken as they are). push_q = u_q . (rho - mean rho)
        / s, rho = gamma * (w_target - mean_c w_c), gamma the norm's weight, w_c the head's rows.
    rest (B,): what all patches' pushes leave over of the margin: embedding, MLPs, biases, and the class token's own
        values. What attention does to the answer by way of later layers and MLPs is in there too.
    """

    grid: tuple[int, int]
    logits: Tensor
    target: Tensor
    scores: Tensor
    maps: Tensor
    own: Tensor
    head_sizes: Tensor
    added: Tensor
    rollout: Tensor
    signed_rollout: Tensor
    effects: Tensor
    pushes: Tensor
    rest: Tensor

    @property
    def dominant(self) -> Tensor:
        """(B, L): the head that adds most to the class token, by `head_sizes`; it may differ from image to image.

        The paper shows a dominant head without defining it. The size of a row of A would not do: softmax's rows all sum
        to one, KArAt's have a free factor (see the module), and either may multiply values that are nearly zero.
        """
        return self.head_sizes.argmax(dim=-1)

    def kind(self, kind: str, layer: int = -1, signs: str = "signed") -> Tensor:
        """One map an image, (B, n), in which a larger number means "more important".

        kind: "scores", "attention": mean over heads, before and after the activation; "dominant": the dominant head's
            activated row; "added"; "rollout": layers 0 to `layer`; "direct": `pushes`; "regions": `effects`.
        signs: "signed" takes values as they are, negative ones last; "absolute" their size (for rollout, see there).

        The mean over heads of A is what others report for softmax; for KArAt it adds heads with free factors.
        """
        one_of("kind of map", kind, KINDS)
        absolute = one_of("signs", signs, SIGNS) == "absolute"
        layer = self._layer(layer)
        if kind == "rollout":
            return (self.rollout if absolute else self.signed_rollout)[:, layer]
        if kind == "dominant":
            values = self.maps[torch.arange(len(self.maps)), layer, self.dominant[:, layer]]
        elif kind in ("added", "direct", "regions"):
            values = {"added": self.added, "direct": self.pushes, "regions": self.effects}[kind][:, layer]
        else:
            each = (self.scores if kind == "scores" else self.maps)[:, layer]  # (B, h, n)
            return (each.abs() if absolute else each).mean(dim=1)
        return values.abs() if absolute else values

    def on_grid(self, values: Tensor) -> Tensor:
        """(..., n) -> (..., down, across)."""
        return rearrange(values, "... (down across) -> ... down across", down=self.grid[0])

    def _layer(self, layer: int) -> int:
        depth = self.maps.shape[1]
        if not -depth <= layer < depth:
            raise ValueError(f"layer {layer} is not there: this model has layers 0 to {depth - 1}.")
        return layer % depth


@torch.no_grad()
def class_token_maps(
    model: VisionTransformer, images: Tensor, target: Tensor | None = None, *, batch_size: int = 64
) -> ClassTokenMaps:
    """Look at images through any model of the package: softmax, KArAt, hybrid.

    Args:
        images: (B, in_chans, H, W) in [-1, 1], as datasets and `picture` give them.
        target: (B,) class that effects and pushes are about; by default the class that the model predicts.
        batch_size: images at a time, at most; fewer where the model is large.

    Raises `ValueError` for images of another size or not finite, a target that is no class, weights that are not
    finite, by name, and inside `torch.inference_mode`: effects are gradients.
    """
    classes, tokens, dim = model.head.out_features, *model.pos_embed.shape[1:]
    one = tokens * max(dim * len(model.blocks), tokens * model.blocks[0].attn.num_heads)  # numbers of one image
    at_once = max(1, min(at_least("batch_size", batch_size, 1), AT_ONCE // one))
    checked(model, images)
    steady(model)
    slopes_wanted()
    if target is not None:
        given, target = target, target.long()
        fits = target.shape == images.shape[:1] and whole_numbers(given)
        if not fits or target.min() < 0 or target.max() >= classes:
            raise ValueError(
                f"target must hold a class from 0 to {classes - 1} for each of the {len(images)} images, "
                f"got {given.tolist()}."
            )
    parts = []
    for start in range(0, len(images), at_once):
        some = slice(start, start + at_once)
        parts.append(_look(model, images[some].to(model.pos_embed.device), None if target is None else target[some]))
    return ClassTokenMaps(**{
        field.name: parts[0].grid if field.name == "grid" else torch.cat([getattr(p, field.name) for p in parts])
        for field in fields(ClassTokenMaps)
    })  # fmt: skip


def _look(model: VisionTransformer, images: Tensor, target: Tensor | None) -> ClassTokenMaps:
    found: dict[str, list[Tensor]] = {key: [] for key in ("scores", "maps", "own", "head_sizes", "added")}
    taken, roll = [], {signs: _Rollout(signs) for signs in SIGNS}
    tokens = model.embed(images)
    for block in model.blocks:
        h = block.attn.num_heads
        q, k, v = rearrange(block.attn.qkv(block.norm1(tokens)), "B N (three h d) -> three B h N d", three=3, h=h)
        scores = attention_scores(q, k)
        maps, v = block.attn.activation.activate(scores), wide(v)
        w_o = rearrange(wide(block.attn.proj.weight), "D (h d) -> h d D", h=h)
        row = maps[:, :, 0]  # (B, h, N)
        heads = einsum(einsum(row, v, "B h q, B h q d -> B h d"), w_o, "B h d, h d D -> B h D")
        u = einsum(row.unsqueeze(-1) * v, w_o, "B h q d, h d D -> B q D")[:, 1:]
        found["scores"].append(scores[:, :, 0, 1:])
        found["maps"].append(row[..., 1:])
        found["own"].append(row[..., 0])
        found["head_sizes"].append(heads.norm(dim=-1))
        found["added"].append(u.norm(dim=-1))
        taken.append(u)
        for each in roll.values():
            each.add(maps)
        tokens = block(tokens)
    logits, cls = wide(model.head(model.norm(tokens[:, 0]))), wide(tokens[:, 0])
    if not logits.isfinite().all():
        raise ValueError(f"the model's answer is not finite: {first_not_finite(model, images)}.")
    target = logits.argmax(dim=-1) if target is None else target.to(logits.device)
    std = (cls.var(dim=-1, unbiased=False) + model.norm.eps).sqrt()
    head = wide(model.head.weight)
    rho = wide(model.norm.weight) * (head[target] - head.mean(dim=0))  # (B, D)
    rho = (rho - rho.mean(dim=-1, keepdim=True)) / std.unsqueeze(-1)
    pushes = torch.stack([einsum(u, rho, "B q D, B D -> B q") for u in taken], dim=1)
    effects = [einsum(u, g, "B q D, B D -> B q") for u, g in zip(taken, _gradients(model, images, target), strict=True)]
    side = model.img_size // model.patch_size
    arrays = {key: torch.stack(values, dim=1) for key, values in found.items()}
    arrays |= {"rollout": roll["absolute"].rows(), "signed_rollout": roll["signed"].rows()}
    arrays |= {"effects": torch.stack(effects, dim=1), "pushes": pushes, "logits": logits, "target": target}
    arrays["rest"] = _margin(logits, target) - pushes.sum(dim=(1, 2))
    return ClassTokenMaps((side, side), **{key: values.cpu() for key, values in arrays.items()})


def _margin(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of `target` above the mean of all: softmax ignores what they share. (B, classes), (B,) -> (B,)."""
    return logits.gather(1, target[:, None])[:, 0] - logits.mean(dim=-1)


def _gradients(model: VisionTransformer, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """For each layer the margin's gradient at the class token behind attention, (B, D)."""
    zeros = [images.new_zeros(len(images), model.pos_embed.shape[-1], requires_grad=True) for _ in model.blocks]

    def add(zero):
        return lambda module, given, out: out + F.pad(zero.unsqueeze(1), (0, 0, 0, out.shape[1] - 1))

    hooks = [block.attn.register_forward_hook(add(zero)) for block, zero in zip(model.blocks, zeros, strict=True)]
    try:
        with torch.enable_grad():
            return tuple(map(wide, torch.autograd.grad(_margin(model(images), target).sum(), zeros)))
    finally:
        for hook in hooks:
            hook.remove()


def rollout(maps: Sequence[Tensor], signs: str = "absolute") -> Tensor:
    """Attention rollout (Abnar, Zuidema 2020): maps, L of (B, h, N, N) -> the class token's row (B, L, N) per layer.

    R_l = (I + mean_i A^_i) / 2 R_(l-1), R_0 = I, row 0: layers are chained as if a token were half its own past and
    half the average of what it looks at. Values, W_O and MLPs are left out.

    signs: "absolute": A^ is |A|, each row divided by its sum: every head weighs the same, its free factor (see the
        module) drops out, and rows of R are shares of one; but what was subtracted counts as if it had been added.
        "signed": A^ is A itself, and signs multiply along a path; free factors stay in, so equal models may differ. R
        is divided by its largest entry where that is above 1: only ratios count.
    For softmax both are the usual rollout; for KArAt neither is canonical.
    """
    running = _Rollout(one_of("signs", signs, SIGNS))
    for layer in maps:
        if layer.ndim != 4 or layer.shape[-1] != layer.shape[-2]:
            raise ValueError(f"maps must be one (B, h, N, N) a layer, got shape {tuple(layer.shape)}.")
        running.add(layer)
    if not running.found:
        raise ValueError("maps of no layer: rollout needs at least one.")
    return torch.stack(running.found, dim=1)


class _Rollout:
    """R of `rollout`, layer by layer: only the class token's rows are kept."""

    def __init__(self, signs: str):
        self.signed, self.through, self.found = signs == "signed", None, []

    def add(self, maps: Tensor) -> None:
        if not self.signed:
            maps = maps.abs()
            maps = maps / maps.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        step = (maps.mean(dim=1) + torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)) / 2
        self.through = step if self.through is None else step @ self.through
        if self.signed:
            self.through = self.through / self.through.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1)
        self.found.append(self.through[:, 0])

    def rows(self) -> Tensor:
        """(B, L, n), without the class token's own entry."""
        return torch.stack(self.found, dim=1)[..., 1:]


class Picture(NamedTuple):
    """A picture as a model takes it, (1, 3, S, S) in [-1, 1], and the same for the eye, (3, S, S) uint8."""

    images: Tensor
    shown: Tensor


def picture(source, model: VisionTransformer) -> Picture:
    """Make a model's input of any picture: resized to the model's side, and cropped at the centre to a square.

    source: a path, a `PIL.Image`, a tensor (3, H, W) or an array (H, W, 3); uint8, or float in [0, 1]. Raises
    `FileNotFoundError`, or `ValueError` for a file that is no picture, another shape, range or type, and a model that
    does not take three channels.
    """
    from PIL import Image

    if model.in_chans != 3:
        raise ValueError(f"this model takes {model.in_chans} channels, a picture has 3.")
    if isinstance(source, str | PathLike):
        with open(source, "rb"):  # a path that is not there says so itself
            pass
        image = read_image(source)
    elif isinstance(source, Image.Image):
        image = source.convert("RGB")
    else:
        image = Image.fromarray(_as_bytes(source))
    shown = to_square(image, model.img_size)
    return Picture(normalise(shown)[None], shown)


def _as_bytes(source) -> np.ndarray:
    """A tensor (3, H, W) or an array (H, W, 3) as (H, W, 3) uint8."""
    if not isinstance(source, Tensor | np.ndarray):
        raise ValueError(
            f"a picture is a path, a PIL image, a tensor (3, H, W) or an array (H, W, 3), got {type(source).__name__}."
        )
    first = isinstance(source, Tensor)
    values = source.detach().cpu().numpy() if first else source
    if values.ndim != 3 or values.shape[0 if first else 2] != 3 or values.size == 0:
        expected = "a tensor (3, H, W), channels first" if first else "an array (H, W, 3), channels last"
        raise ValueError(f"a picture is {expected}, got shape {tuple(values.shape)}.")
    if values.dtype != np.uint8:
        if not np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"a picture's numbers are uint8, or float in [0, 1]; got {values.dtype}.")
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"a picture's floats lie in [0, 1], got {values.min():.3g} .. {values.max():.3g}: divide 0 .. 255 by "
                "255, and karat_lite.data.to_unit(image) brings [-1, 1] there."
            )
        values = np.round(255 * values).astype(np.uint8)
    return np.ascontiguousarray(values.transpose(1, 2, 0) if first else values)
