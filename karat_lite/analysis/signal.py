"""How large signals are inside a model: what the initialisation argument predicts, measured (04_fourier_karat)."""

import torch
from einops import rearrange
from torch import Tensor

from ..functional import attention_scores
from ..vit import VisionTransformer
from .inputs import checked, must_be_finite, steady


@torch.no_grad()
def signal_sizes(model: VisionTransformer, images: Tensor) -> dict[str, list[float]]:
    """Root mean squares over all images, tokens and channels, block by block.

        scores      the scores S; L numbers. Beyond pi a Fourier unit has turned: nothing in it tells S from S + 2 pi
        attention   attention's output over the values that it mixes, before its last linear map; L numbers
        stream      the residual stream: the embedding, then after each block; 1 + L numbers
        apart       share of the stream's power that tells tokens of one image apart (the rest is the tokens' mean);
                    1 + L numbers

    images (B, 3, H, W) in [-1, 1], B >= 1, on the model's device. Raises `ValueError` where they do not fit the model,
    and for a model whose numbers are not finite.
    """
    checked(model, images)
    steady(model)
    must_be_finite(model, images, model(images))
    tokens = model.embed(images)
    found: dict[str, list[float]] = {"scores": [], "attention": [], "stream": [], "apart": []}

    def look(tokens: Tensor) -> None:
        found["stream"].append(_rms(tokens))
        found["apart"].append(_share(_rms(tokens - tokens.mean(dim=1, keepdim=True)), _rms(tokens)) ** 2)

    look(tokens)
    for block in model.blocks:
        q, k, v = rearrange(
            block.attn.qkv(block.norm1(tokens)), "B N (three h d) -> three B h N d", three=3, h=block.attn.num_heads
        )
        found["scores"].append(_rms(attention_scores(q, k)))
        found["attention"].append(_share(_rms(block.attn.activation.attend(q, k, v)), _rms(v)))
        tokens = block(tokens)
        look(tokens)
    return found


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0  # of nothing


def _rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()
