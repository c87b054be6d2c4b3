"""A Vision Transformer that reads like its figure: patches, class token, positions, L blocks, a head.

Parameters are named as in timm, so that a timm ViT's weights load name by name.
"""

import json
from collections.abc import Iterable, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .attention import HybridActivation, MultiHeadAttention, StaticMixer, check_heads
from .bases import Basis, make_basis
from .checks import at_least, divides, one_of
from .operators import KArAtOperator
from .token_grid import resize_tokens

# pico is ours: small enough to train in a minute on a laptop. The others are the usual ViT sizes (paper, section 2).
# Positions usually start at standard deviation 0.02. In pico they start as large as embedded patches: a small softmax
# model then finds out where things are in a few epochs instead of twenty.
SIZES = {
    "vit_pico": dict(dim=64, depth=4, num_heads=4, pos_std=0.2),
    "vit_tiny": dict(dim=192, depth=12, num_heads=3, pos_std=0.02),
    "vit_small": dict(dim=384, depth=12, num_heads=6, pos_std=0.02),
    "vit_base": dict(dim=768, depth=12, num_heads=12, pos_std=0.02),
}
OVERRIDES = ("dim", "depth", "num_heads", "in_chans")
ATTENTIONS = ("softmax", "karat", "hybrid", "static", "pooled")
LEARNED = ("karat", "hybrid")  # those with KArAt operators
MODES = ("blockwise", "universal")


class PatchEmbed(nn.Module):
    """Cut the image in P x P patches and embed each one: (B, 3, H, W) -> (B, n, dim)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "B dim H W -> B (H W) dim")


class Mlp(nn.Module):
    """dim -> 4 dim -> dim with a GELU between, on every token alone."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """One encoder block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MultiHeadAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, return_attention: bool = False):
        attended = self.attn(self.norm1(x), return_attention)
        attended, record = attended if return_attention else (attended, None)
        x = x + attended
        x = x + self.mlp(self.norm2(x))
        return (x, record) if return_attention else x


class VisionTransformer(nn.Module):
    """images (B, 3, H, W) -> logits (B, num_classes), with softmax attention.

    Build it with `create_model`, which checks its arguments, may put another activation in and remembers the `config`.
    """

    def __init__(self, dim, depth, num_heads, img_size, patch_size, num_classes, in_chans=3, pos_std=0.02):
        super().__init__()
        n = (img_size // patch_size) ** 2
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + n, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.config: dict = {}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=pos_std)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, x: Tensor, return_attention: bool = False):
        """x (B, in_chans, H, W), finite -> logits; with `return_attention` also an `AttentionRecord` for every block.

        Token 0 is the class token; tokens 1 .. n are the patches, row by row. Raises `ValueError` for another size or
        channel count, or images that are not finite.
        """
        self.check_images(x)
        tokens = self.embed(x)
        records = []
        for block in self.blocks:
            tokens = block(tokens, return_attention)
            if return_attention:
                tokens, record = tokens
                records.append(record)
        logits = self.head(self.norm(tokens)[:, 0])
        return (logits, records) if return_attention else logits

    def embed(self, x: Tensor) -> Tensor:
        """What the first block reads: x (B, in_chans, H, W) -> tokens (B, N, dim), N = 1 + n, positions added."""
        tokens = self.patch_embed(x)  # (B, n, dim)
        cls = repeat(self.cls_token, "1 1 dim -> B 1 dim", B=x.shape[0])
        return torch.cat([cls, tokens], dim=1) + self.pos_embed

    def operators(self) -> list[KArAtOperator]:
        """The KArAt operators, block by block (universal mode: the same object every time); empty for softmax."""
        found = [block.attn.activation for block in self.blocks]
        found = [each.operator if isinstance(each, HybridActivation) else each for each in found]
        return [activation for activation in found if isinstance(activation, KArAtOperator)]

    def check_images(self, x: Tensor) -> None:
        """Raises `ValueError` or `TypeError` unless x is a batch of this model's images, all of it finite.

        While a model is trained on a GPU nobody looks whether they are: each look would wait for the GPU.
        """
        expected = (self.in_chans, self.img_size, self.img_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"this model takes images of shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}: resize "
                "the images (load_dataset(..., img_size=...)) or build the model with their img_size."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"images must be floating point, got {x.dtype}: karat_lite.data.normalise(images) makes them."
            )
        own = self.pos_embed.dtype
        if x.dtype != own and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"this model computes in {own}, got images in {x.dtype}: take images.to({own}).")
        if self.training and x.device.type == "cuda":
            return
        if x.is_meta or torch._C._are_functorch_transforms_active():  # there is no number to look at
            return
        # A sum is finite only if (barring overflow) every term is; one number to look at instead of a mask of booleans.
        if not torch.compiler.is_compiling() and not x.sum().isfinite() and not x.isfinite().all():
            bad = (~x.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"images must be finite: NaN or infinity in {len(bad)} of {len(x)} images (first: {bad[0]})."
            )


def create_model(
    name: str,
    attention: str = "karat",
    mode: str = "blockwise",
    grid: int = 3,
    rank: int | None = 12,
    basis: str | Basis = "fourier",
    img_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 10,
    init: str = "variance",
    edge_scales: bool = False,
    order: str = "w_phi",
    base: str | None = None,
    simplex: bool = False,
    basis_options: dict | None = None,
    softmax_heads: Sequence[int] = (),
    softmax_layers: Sequence[int] = (),
    **overrides,
) -> VisionTransformer:
    """Build a Vision Transformer with softmax or Kolmogorov-Arnold attention.

    Args:
        name: "vit_pico" | "vit_tiny" | "vit_small" | "vit_base".
        attention: "karat" | "softmax" | "hybrid", or a `StaticMixer`, with rows of their own for all queries ("static")
            or one for all of them ("pooled"). All but "karat" and "hybrid" have no operator, so the operator's
            arguments, `softmax_heads` and `softmax_layers` play no part in them: twins are built by two calls that
            differ in this word alone.
        mode: "blockwise", every block has its own h operators (the paper's GnB), or "universal", all share h (GnU).
        grid, rank, basis, init, edge_scales, order, base, simplex, basis_options: see `KArAtOperator`; rank=None is
            full rank.
        softmax_heads, softmax_layers: for "hybrid", the heads (in every layer) and the layers that keep softmax.
        img_size, patch_size: pixels; N = 1 + (img_size / patch_size)^2 tokens.
        overrides: dim, depth, num_heads, in_chans, to depart from the named size.

    Returns the model; `model.config` holds every argument, so `create_model(**model.config)` builds its like.
    Raises `ValueError`/`TypeError` naming what does not fit.
    """
    size = dict(SIZES[one_of("model", name, SIZES)])
    # `at_least` makes plain ints of NumPy's: the configuration is written as JSON.
    overrides = {one_of("model option", key, OVERRIDES): at_least(key, value, 1) for key, value in overrides.items()}
    size.update(overrides)
    one_of("attention", attention, ATTENTIONS)
    one_of("mode", mode, MODES)
    num_classes, patch_size = at_least("num_classes", num_classes, 1), at_least("patch_size", patch_size, 1)
    img_size = at_least("img_size", img_size, 1)
    divides("patch_size", patch_size, "img_size", img_size)
    divides("num_heads", size["num_heads"], "dim", size["dim"])

    model = VisionTransformer(**size, img_size=img_size, patch_size=patch_size, num_classes=num_classes)
    model.config = dict(
        name=name, attention=attention, img_size=img_size, patch_size=patch_size, num_classes=num_classes
    )
    model.config.update(overrides)
    if attention in ("static", "pooled"):
        for block in model.blocks:
            mixer = StaticMixer(size["num_heads"], model.pos_embed.shape[1], shared=attention == "pooled")
            block.attn.activation = mixer
    if attention in LEARNED:
        softmax = _softmax_parts(attention, softmax_heads, softmax_layers, size["num_heads"], size["depth"])
        rank = None if rank is None else at_least("rank", rank, 1)
        options = dict(order=order, base=base, simplex=simplex, basis_options=basis_options)
        args = dict(basis=basis, grid=grid, rank=rank, init=init, edge_scales=edge_scales, **options)
        operators = _put_operators(model, args, mode, *softmax)
        basis = operators[0].basis if operators else make_basis(basis, grid, **(basis_options or {}))
        if not basis.name or hasattr(basis, "base"):
            raise ValueError(
                f"a model is saved and made again by its basis's name, and {basis!r} has none of its own: "
                '@register_basis("...") its class (and choose a base activation by base=...).'
            )
        model.config.update(basis=basis.name, rank=rank, init=init, edge_scales=edge_scales, grid=basis.grid, mode=mode)
        # Only what is not the default: cards from before these options still describe the same model.
        options["basis_options"] = _as_json(basis)
        said = {**options, "softmax_heads": softmax[0], "softmax_layers": softmax[1]}
        model.config.update({key: value for key, value in said.items() if value and value != "w_phi"})
    return model


def _as_json(basis: Basis) -> dict:
    """A basis's options as a card gives them back: lists for tuples. `TypeError` for what JSON cannot say."""
    try:
        return json.loads(json.dumps(basis.options))
    except TypeError as error:
        raise TypeError(
            f"a model's card is JSON, which cannot say the options of {basis!r} ({error}): give numbers, text, lists."
        ) from None


def _softmax_parts(attention, softmax_heads, softmax_layers, num_heads: int, depth: int) -> tuple[list, list]:
    """The heads and the layers that keep softmax, checked."""
    heads = check_heads(num_heads, softmax_heads)
    if not isinstance(softmax_layers, Iterable):
        raise ValueError(f"softmax_layers must be a list of layers, got {softmax_layers!r}: give [{softmax_layers!r}].")
    layers = sorted({at_least("softmax layer", layer, 0) for layer in softmax_layers})
    if layers and layers[-1] >= depth:
        raise ValueError(f"softmax layer {layers[-1]} is not there: this model has layers 0 .. {depth - 1}.")
    if (attention == "hybrid") != bool(heads or layers):
        raise ValueError(
            f"attention = {attention!r} with softmax_heads = {heads} and softmax_layers = {layers}: 'hybrid' takes at "
            "least one of the two, 'karat' neither."
        )
    return heads, layers


def _put_operators(model: VisionTransformer, args: dict, mode: str, softmax_heads, softmax_layers) -> list:
    """Give every block that shall have one an operator: its own, or in universal mode the first one's."""
    heads, tokens = model.blocks[0].attn.num_heads, model.pos_embed.shape[1]
    if len(softmax_heads) == heads:
        return []
    # The operators go in after the body has drawn its random numbers: with one seed, twins start from the same weights
    # everywhere else.
    made: list[KArAtOperator] = []
    for layer, block in enumerate(model.blocks):
        if layer not in softmax_layers:
            if not made or mode == "blockwise":
                made.append(KArAtOperator(heads - len(softmax_heads), tokens, **args))
            hybrid = HybridActivation(heads, softmax_heads, made[-1]) if softmax_heads else made[-1]
            block.attn.activation = hybrid
    return made


def check_as_built(model: VisionTransformer) -> None:
    """Raise `ValueError` unless the model has the tensors and parts that `create_model(**model.config)` gives it.

    A file or another size is made from the configuration, and would lose a head, say, that was put in afterwards, an
    activation, or that two blocks share one. Dropout may be added: it plays no part when a model is used.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        built = create_model(**model.config)
    for look in (_tensors, _modules):
        expected, found = look(built), look(model)
        if odd := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
            raise ValueError(
                f"this model is not as create_model built it: {odd[0]} is {found.get(odd[0], 'not there')}, its "
                f"configuration says {expected.get(odd[0], 'nothing of it')}. Build a model with what you need "
                "(num_classes=..., attention=...), or save the weights by safetensors.torch.save_model."
            )


def _tensors(model: nn.Module) -> dict[str, object]:
    """Name -> shape, or the name of the tensor that it shares."""
    first: dict[int, str] = {}
    for name, x in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(x), name)
    shared = {n: first[id(x)] for n, x in model.named_parameters(remove_duplicate=False) if first[id(x)] != n}
    return {name: f"that of {shared[name]}" if name in shared else tuple(x.shape)
            for name, x in model.state_dict().items()}  # fmt: skip


def _modules(module: nn.Module, name: str = "the model") -> dict[str, str]:
    """Name -> what stands there, in words; without dropout, and seeing through what holds one part beside it."""
    inner = [(n, part) for n, part in module.named_children() if not isinstance(part, nn.modules.dropout._DropoutNd)]
    if type(module) is nn.Sequential and len(inner) == 1:
        return _modules(inner[0][1], name)
    found = {name: f"{type(module).__name__}({module.extra_repr()})"}
    for n, part in inner:
        found |= _modules(part, n if name == "the model" else f"{name}.{n}")
    return found


@torch.no_grad()
def resize(model: VisionTransformer, img_size: int) -> VisionTransformer:
    """The same model for images of another size: positions and operators are interpolated to the new token grid.

    Nothing is trained. At equal size all numbers stay the same. The patch size stays, so N changes; sums over tokens
    keep their size (`KArAtOperator.resized`). Operators' backends and what is frozen stay. Raises `ValueError` where
    the image cannot be cut, for static mixers, for models that were changed since `create_model`, and see there.
    """
    check_as_built(model)
    if any(isinstance(block.attn.activation, StaticMixer) for block in model.blocks):
        raise ValueError("a static mixer is bound to its tokens and is not resized: train one at the new size.")
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
        new = create_model(**{**model.config, "img_size": img_size})
    side = img_size // model.patch_size
    moved = {id(operator): operator.resized(side) for operator in model.operators()}
    for mine, its in zip(new.operators(), model.operators(), strict=True):
        mine.load_state_dict(moved[id(its)].state_dict())
        mine.backend = its.backend
    state = {key: value for key, value in model.state_dict().items() if ".attn.activation." not in key}
    state["pos_embed"], _ = resize_tokens(state["pos_embed"], 1, side)
    new.load_state_dict(state, strict=False)
    for name, parameter in model.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new.to(model.pos_embed.device, model.pos_embed.dtype).train(model.training)


def load_timm_weights(model: VisionTransformer, source: nn.Module) -> list[str]:
    """Copy the weights of a timm `VisionTransformer` of the same size into `model`; return the names it left alone.

    What timm has no counterpart for stays as it is: the KArAt operators, and the head where the class counts differ.
    Raises `ValueError` when any other tensor is missing or of another shape; then nothing is copied.
    """
    ours, theirs = model.state_dict(), source.state_dict()
    kept = [key for key in ours if ".attn.activation." in key]
    if theirs.get("head.weight") is None or theirs["head.weight"].shape != ours["head.weight"].shape:
        kept += ["head.weight", "head.bias"]
    taken = [key for key in ours if key not in kept]
    bad = [key for key in taken if key not in theirs or theirs[key].shape != ours[key].shape]
    if bad:
        found = tuple(theirs[bad[0]].shape) if bad[0] in theirs else "nothing"
        raise ValueError(
            f"{len(bad)} tensors of this {type(source).__name__} do not fit, first {bad[0]}: expected "
            f"{tuple(ours[bad[0]].shape)}, found {found}. Build both with the same size, img_size and patch_size."
        )
    unknown = [key for key in theirs if key not in ours and not key.startswith("head.")]
    if unknown:
        raise ValueError(
            f"this {type(source).__name__} has parts a plain ViT lacks, such as {unknown[0]}: its outputs would differ."
        )
    for name, part in source.named_modules():  # no weights, and yet another function
        other = isinstance(part, nn.LayerNorm) and part.eps != model.norm.eps
        other |= name.endswith("mlp.act") and not (isinstance(part, nn.GELU) and part.approximate == "none")
        other |= name.split(".")[-1].startswith("norm") and not isinstance(part, nn.LayerNorm | nn.Identity)
        if other:
            raise ValueError(
                f"this {type(source).__name__} has {name} = {part!r}, the model eps = {model.norm.eps:g} in every "
                "LayerNorm and the exact GELU: its outputs would differ. Build the source with timm's defaults."
            )
    mine, its = model.blocks[0].attn.num_heads, source.blocks[0].attn.num_heads
    if mine != its:  # the tensors have the same shapes, the function is another
        raise ValueError(
            f"this {type(source).__name__} has num_heads = {its}, the model {mine}: build it with num_heads={its}."
        )
    if getattr(source, "global_pool", "token") != "token":
        raise ValueError(
            f"this {type(source).__name__} pools by {source.global_pool!r}, the model reads its class token: "
            "build the source with global_pool='token'."
        )
    model.load_state_dict({key: theirs[key] for key in taken}, strict=False)
    return kept
