"""Recipes: the paper's, line by line against the objects it builds; groups, schedule and average; what is refused."""

import dataclasses
import math

import pytest
import torch

import karat_lite as kl
from karat_lite.augment import timm_transform
from karat_lite.optimiser import learning_rate, make_average, make_optimizer, parameter_groups, set_learning_rate
from karat_lite.recipes import make_recipe

PAPER = kl.RECIPES["paper"]


def pico(attention="karat", **options):
    torch.manual_seed(0)
    options = {**dict(img_size=8, patch_size=2, depth=1, dim=16, num_heads=2, rank=4), **options}
    return kl.create_model("vit_pico", attention, **options)


# ---- the paper's table 5, line by line ------------------------------------------------------------------------------


def test_paper_epochs_and_batches():
    assert PAPER.epochs == 100 and PAPER.batch_size == 32
    imagenet = kl.RECIPES["paper_imagenet"]
    assert imagenet.batch_size == 128
    same = dataclasses.replace(imagenet, batch_size=32, lr=PAPER.lr)
    assert same == PAPER, "CIFAR and ImageNet differ in the batch and the rate that follows from it alone"


def test_paper_optimiser():
    optimizer = make_optimizer(pico(), PAPER)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert group["eps"] == 1e-6 and group["betas"][0] == 0.9
        assert group["weight_decay"] in (0.05, 0.0)
    assert PAPER.clip_norm == 1.0


@pytest.mark.parametrize("name, batch", [("paper", 32), ("paper_imagenet", 128)])
def test_paper_schedule(name, batch):
    """Peak 5e-4 batch / 512; 5 epochs of warm-up from 1e-6; half a cosine down to 1e-5. timm's scheduler agrees."""
    from timm.scheduler import CosineLRScheduler

    recipe, per_epoch = kl.RECIPES[name], 50_000 // batch
    steps, warmup, peak = recipe.epochs * per_epoch, 5 * per_epoch, 5e-4 * batch / 512
    assert recipe.warmup_epochs == 5 and recipe.lr == pytest.approx(peak, rel=1e-12)

    def rate(step):
        return learning_rate(step, steps, warmup, recipe)

    assert rate(0) == pytest.approx(1e-6 + (peak - 1e-6) / warmup) and rate(warmup) == pytest.approx(peak)
    assert rate((steps + warmup) // 2) == pytest.approx((peak + 1e-5) / 2, rel=1e-3)
    assert rate(steps) == pytest.approx(1e-5)
    weights = [torch.nn.Parameter(torch.zeros(1))]
    theirs = CosineLRScheduler(
        torch.optim.SGD(weights, lr=peak), t_initial=steps - warmup, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6,
        warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    for step in (1, warmup // 2, warmup - 1, warmup, warmup + 1, steps // 2, steps - 1):
        theirs.step_update(step)
        ours = rate(step - 1) if step < warmup else rate(step)  # our warm-up reaches its peak one step earlier
        assert ours == pytest.approx(theirs.optimizer.param_groups[0]["lr"], rel=1e-9), step


def test_paper_average_of_weights():
    assert PAPER.ema == 0.99992


def test_paper_training_pictures():
    """Random crop (0.08, 1) and (0.67, 1.5) to 224, mirror 0.5, rand-augment by that string, then [-1, 1]."""
    from timm.data.auto_augment import RandAugment, rand_augment_transform

    crop, flip, colours, *rest = timm_transform(PAPER, 224, training=True).transforms
    assert tuple(crop.scale) == (0.08, 1.0) and tuple(crop.ratio) == (0.67, 1.5) and tuple(crop.size) == (224, 224)
    assert flip.p == 0.5
    assert PAPER.auto_augment == "rand-m15-n2-mstd1.0-inc1" and isinstance(colours, RandAugment)
    expected = rand_augment_transform("rand-m15-n2-mstd1.0-inc1", {})
    assert colours.num_layers == expected.num_layers == 2
    for mine, theirs in zip(colours.ops, expected.ops, strict=True):
        assert (mine.name, mine.magnitude, mine.magnitude_std) == (theirs.name, theirs.magnitude, theirs.magnitude_std)
    # Without "mmax" in the string timm clips at its largest usual magnitude, 10, when it applies one.
    assert colours.ops[0].magnitude == 15 and colours.ops[0].magnitude_std == 1.0
    assert colours.ops[0].magnitude_max is None
    assert rest[-1].mean.tolist() == rest[-1].std.tolist() == [0.5] * 3
    assert PAPER.color_jitter == 0.4


def test_paper_test_pictures():
    """Crop ratio 0.9: 224 of 248 pixels."""
    resize, crop, *_ = timm_transform(PAPER, 224, training=False).transforms
    assert resize.size == 248 and tuple(crop.size) == (224, 224)


def test_paper_targets(monkeypatch):
    """Mixup and cutmix for half of the batches each, one choice a batch; smoothing 0.1."""
    import timm.data

    from karat_lite.augment import mix

    built = []
    monkeypatch.setattr(timm.data, "Mixup", _recorded(timm.data.Mixup, built))
    images = torch.cat([torch.full((2, 3, 16, 16), -1.0), torch.full((2, 3, 16, 16), 1.0)])
    labels, kinds = torch.tensor([0, 0, 3, 3]), []
    for step in range(200):
        mixed, targets = mix(images.clone(), labels, PAPER, 10, (0, 0, step))
        blended = (mixed.abs() < 0.999).any()  # mixup makes values between; cutmix moves whole pixels
        kinds.append("mixup" if blended else "cutmix")
        assert torch.allclose(targets.sum(dim=1), torch.ones(4)) and targets.min() == pytest.approx(0.01)
        own = (mixed.mean(dim=(1, 2, 3)) * torch.tensor([-1, -1, 1, 1]) + 1) / 2  # the share of its own label's pixels
        share = targets[torch.arange(4), labels]
        assert torch.allclose(share, 0.01 + 0.9 * own, atol=1e-4), "an image and its target are mixed alike"
    assert 70 <= kinds.count("mixup") <= 130
    args, options = built[0]
    assert args == (0.8, 1.0)
    expected = dict(prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=10)
    assert options == expected and PAPER.label_smoothing == 0.1


def _recorded(cls, built):
    def make(*args, **options):
        built.append((args, options))
        return cls(*args, **options)

    return make


def test_a_larger_batch_keeps_the_recipe_in_proportion():
    larger = PAPER.with_batch(512)
    assert larger.lr == pytest.approx(5e-4) and larger.batch_size == 512
    assert larger.ema == pytest.approx(0.99992**16) and larger.min_lr == pytest.approx(1.6e-4)
    assert PAPER.with_batch(32) == PAPER and kl.Recipe().with_batch(64).ema is None


def test_what_the_paper_gives_convit_and_swin():
    """eps 1e-8 and no average for both; ConViT with augmentation of another strength. All else is as for ViT."""
    differ = {name: {key: value for key, value in dataclasses.asdict(kl.RECIPES[name]).items()
                     if value != getattr(PAPER, key)} for name in ("paper_convit", "paper_swin")}  # fmt: skip
    assert differ["paper_swin"] == dict(eps=1e-8, ema=None)
    assert differ["paper_convit"] == dict(eps=1e-8, ema=None, auto_augment="rand-m9-mstd0.5-inc1")


# ---- schedule, groups, average --------------------------------------------------------------------------------------


def test_learning_rate_at_given_steps():
    """10 steps, 4 of them warm-up, from a peak of 1 to 0.1: 0.55 is half way down."""
    recipe = kl.Recipe(lr=1.0, min_lr=0.1)
    expected = {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 6: 0.1 + 0.45 * 1.5, 7: 0.55, 8: 0.1 + 0.45 * 0.5, 10: 0.1}
    for step, lr in expected.items():
        assert learning_rate(step, 10, 4, recipe) == pytest.approx(lr, rel=1e-12), step


BODY = {
    "decayed": ["patch_embed.proj.weight", "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    + ["head.weight"],
    "kept": ["cls_token", "pos_embed", "patch_embed.proj.bias", "norm1.weight", "norm1.bias", "attn.qkv.bias"]
    + ["attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias", "norm.weight", "norm.bias"]
    + ["head.bias"],
}
OPERATORS = {"decayed": ["coef", "weight"], "kept": ["w_b", "w_s"]}


def test_what_decays_and_what_does_not():
    model = pico(edge_scales=True)
    names = {id(p): name.removeprefix("blocks.0.") for name, p in model.named_parameters()}
    recipe = kl.Recipe(lr=1e-3, weight_decay=0.05, operator_lr=0.5, operator_decay=0.01)
    groups = {group["name"]: group for group in parameter_groups(model, recipe)}
    for part, kinds, decay, scale in (("body", BODY, 0.05, 1.0), ("operators", OPERATORS, 0.01, 0.5)):
        for kind, expected in kinds.items():
            group = groups.pop(f"{part}, {kind}")
            found = [names[id(p)].removeprefix("attn.activation.") for p in group["params"]]
            assert sorted(found) == sorted(expected), (part, kind)
            assert group["weight_decay"] == (decay if kind == "decayed" else 0.0)
            assert group["lr"] == 1e-3 * scale
    assert not groups


def test_operators_follow_the_recipe_unless_told_otherwise():
    for group in parameter_groups(pico(), kl.Recipe(weight_decay=0.3)):
        assert group["lr_scale"] == 1.0 and group["weight_decay"] in (0.3, 0.0)
    assert [g["name"] for g in parameter_groups(pico("softmax"), kl.Recipe())] == ["body, decayed", "body, kept"]


def test_operator_rates_follow_the_schedule():
    optimizer = make_optimizer(pico(), kl.Recipe(operator_lr=3.0))
    set_learning_rate(optimizer, 1e-4)
    rates = {group["name"].split(",")[0]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"body": 1e-4, "operators": 3e-4})


def test_a_universal_operator_is_optimised_once():
    model = pico(mode="universal", depth=3)
    params = [p for group in parameter_groups(model, kl.Recipe()) for p in group["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(model.parameters()))


def test_frozen_parameters_are_left_alone():
    model = pico()
    model.patch_embed.requires_grad_(False)
    params = {id(p) for group in parameter_groups(model, kl.Recipe()) for p in group["params"]}
    assert not params & {id(p) for p in model.patch_embed.parameters()}


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
def test_the_average_of_weights_against_sums_by_hand(mode):
    """Three blocks share one operator: an average that visits it once a block would decay three times as fast."""
    model = pico(mode=mode, depth=3)
    average = make_average(model, 0.9)
    by_hand = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for _ in range(4):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p))
                by_hand[name] = 0.9 * by_hand[name] + 0.1 * p
        average.update_parameters(model)
    for name, p in average.module.named_parameters():
        assert torch.allclose(p.double(), by_hand[name], atol=1e-6), name
    operators = average.module.operators()
    assert len({id(operator) for operator in operators}) == (1 if mode == "universal" else 3)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"epoch": 3}, "unknown field of a recipe 'epoch': did you mean 'epochs'"),
        ({"epochs": 0}, "recipe's epochs must be >= 1, got 0"),
        ({"min_lr": 1.0}, "needs 0 < min_lr <= lr"),
        ({"warmup_lr": 1.0}, "needs 0 <= warmup_lr <= lr, got warmup_lr = 1.0 and lr = 0.002"),
        ({"clip_norm": 0.0}, "recipe's clip_norm must be > 0, got 0.0: infinity switches clipping off"),
        ({"label_smoothing": 1.0}, r"recipe's label_smoothing must be in \[0, 1\), got 1.0"),
        ({"flip": 2.0}, r"recipe's flip must be in \[0, 1\], got 2.0"),
        *(({name: -0.1}, f"recipe's {name} must be >= 0, got -0.1")
          for name in ("warmup_epochs", "weight_decay", "mixup", "cutmix", "color_jitter")),
        ({"test_crop": 1.5}, r"recipe's test_crop must be in \(0, 1\], got 1.5"),
        ({"ema": 1.0}, r"recipe's ema must be in \(0, 1\), or None, got 1.0"),
        ({"operator_decay": -1.0}, "recipe's operator_decay must be >= 0, or None, got -1.0"),
        ({"precision": "float31"}, "unknown precision 'float31': did you mean 'float32'"),
        ({"crop_scale": (0.5,)}, "recipe's crop_scale must be two numbers, 0 < least <= most <= 1"),
        ({"crop_scale": (0.5, 1.5)}, "recipe's crop_scale must be two numbers, 0 < least <= most <= 1"),
        ({"crop_scale": (0.5, 1.0), "shift": 2}, "shift is for whole batches, crop_scale for single pictures"),
        ({"color_jitter": 0.4}, "a recipe's color_jitter needs crop_scale: it works on single pictures"),
        ({"mixup": 0.8, "batch_size": 33}, "batch_size must be even, got 33"),
        ({"weight_decay": math.nan}, "recipe's weight_decay must be a finite number, got nan"),
        ({"lr": math.inf}, "recipe's lr must be a finite number, got inf"),
        ({"warmup_epochs": math.inf}, "recipe's warmup_epochs must be a finite number, got inf"),
        ({"crop_ratio": (0.5, 2)}, "a recipe's crop_ratio needs crop_scale: it works on single pictures"),
    ],  # fmt: skip
)
def test_a_recipe_that_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        make_recipe("small", **changes)


@pytest.mark.parametrize("changes", [{"lr": "0.1"}, {"clip_norm": None}, {"ema": True}, {"crop_scale": 0.5}])
def test_what_is_no_number_is_refused(changes):
    ((name, value),) = changes.items()
    with pytest.raises(TypeError, match=f"recipe's {name} must be .* number.*, got {value!r}"):
        make_recipe("small", **changes)


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match="unknown recipe 'papr': did you mean 'paper'"):
        make_recipe("papr")
    assert make_recipe("small", epochs=3) == dataclasses.replace(kl.RECIPES["small"], epochs=3)


def test_pairs_from_json_are_as_good_as_tuples():
    assert make_recipe("paper", crop_scale=[0.5, 1.0]) == make_recipe("paper", crop_scale=(0.5, 1.0))
