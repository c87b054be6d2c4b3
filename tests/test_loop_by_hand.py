"""The training loop against ten lines of PyTorch: every setting of a recipe is unusual, and must arrive."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import karat_lite as kl
from karat_lite.augment import batches, mix
from karat_lite.operators import KArAtOperator

UNUSUAL = kl.Recipe(
    epochs=3, batch_size=8, lr=3e-2, min_lr=2e-3, warmup_epochs=1.0, warmup_lr=1e-3, weight_decay=0.3, eps=1e-3,
    clip_norm=0.05, operator_lr=0.5, operator_decay=2.0, label_smoothing=0.3, flip=0.5, shift=1, ema=0.8,
)  # fmt: skip
PER_EPOCH, CPU = 3, torch.device("cpu")
KEPT = ("bias", "cls_token", "pos_embed", "w_b", "w_s")


def model_and_data():
    torch.manual_seed(0)
    options = dict(img_size=8, patch_size=4, depth=2, dim=16, num_heads=2, rank=3, edge_scales=True)
    model = kl.create_model("vit_pico", **options)
    return model, kl.load_dataset("shapes", "train", img_size=8, limit=8 * PER_EPOCH)


def by_hand(model, data, recipe):
    """The model after all steps, its average, and the rates of the steps."""
    operators = {id(p) for m in model.modules() if isinstance(m, KArAtOperator) for p in m.parameters()}
    groups = []
    for name, p in model.named_parameters():
        its = id(p) in operators
        decay = recipe.operator_decay if its else recipe.weight_decay
        plain = p.ndim == 1 or name.endswith(KEPT)
        groups.append(dict(params=[p], weight_decay=0.0 if plain else decay, scale=recipe.operator_lr if its else 1.0))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=recipe.eps)
    average, steps, rates = copy.deepcopy(model.state_dict()), recipe.epochs * PER_EPOCH, []
    for epoch in range(recipe.epochs):
        for i, (images, labels) in enumerate(batches(data, recipe, 8, seed=5, epoch=epoch, device=CPU)):
            t, warm = epoch * PER_EPOCH + i, PER_EPOCH
            if t < warm:
                rate = recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * (t + 1) / warm
            else:
                falling = 1 + math.cos(math.pi * (t - warm) / (steps - warm))
                rate = recipe.min_lr + (recipe.lr - recipe.min_lr) * falling / 2
            targets = F.one_hot(labels, 10) * (1 - recipe.label_smoothing) + recipe.label_smoothing / 10
            if recipe.mixup:
                images, targets = mix(images, labels, recipe, 10, (5, epoch, i, 0))
            loss = -(targets * model(images).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            assert norm > recipe.clip_norm, "or clipping would not show"
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
                group["params"][0].grad.mul_(recipe.clip_norm / (norm + 1e-6))
            optimizer.step()
            now = model.state_dict()
            average = {k: recipe.ema * old + (1 - recipe.ema) * now[k] for k, old in average.items()}
            rates.append(rate)
    return model.state_dict(), average, rates


@pytest.mark.parametrize("mixed", [False, True], ids=["smoothed", "mixed"])
def test_the_loop_is_ten_lines(mixed, tmp_path):
    recipe = UNUSUAL if not mixed else kl.Recipe(**{**vars(UNUSUAL), "mixup": 0.8})
    model, data = model_and_data()
    wanted, average, rates = by_hand(copy.deepcopy(model), data, recipe)
    history = kl.training.train(
        model, data, data, recipe, seed=5, device="cpu", out=tmp_path, log_every=1, progress=False
    )
    averaged, _ = kl.load_checkpoint(tmp_path / "average.safetensors")
    for found, expected in ((model.state_dict(), wanted), (averaged.state_dict(), average)):
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, rtol=1e-4, atol=2e-6), name
    assert [record["lr"] for record in history.steps] == pytest.approx(rates)
