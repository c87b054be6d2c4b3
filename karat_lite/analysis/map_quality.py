"""Do maps lie on the object? Pointing game, mass inside the mask, best overlap, deletion and insertion.

    python -m karat_lite.analysis.map_quality --runs runs --data shapes --results data/results/shapes_map_quality.json

A map gives every patch of an image a number, larger for "more important". Where the object's mask is known, the first
three scores say how well it marks the object; the last two ask the model itself, mask or not. No score is good or bad
by itself: compare with the baselines, and over several seeds.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, reduce, repeat
from torch import Tensor

from ..checkpoints import write_whole
from ..checks import at_least, one_of, run_command
from ..data import name_of, normalise
from ..vit import VisionTransformer
from .cost import machine
from .maps import KINDS, SIGNS, ClassTokenMaps, class_token_maps
from .masked import Masked, load_masked
from .runs import find_runs

BASELINES = ("random", "centre", "brightness", "average", "mask")
FILLS = ("mean", "blur")
ON_OBJECT, ON_MODEL = ("pointing", "mass", "iou"), ("deletion", "insertion")
BATCH = 250  # images that a model sees at a time


def coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of each patch that the object covers: masks (B, H, W) bool -> (B, n) in [0, 1]."""
    down, across = grid
    if masks.ndim != 3 or masks.shape[1] % down or masks.shape[2] % across:
        raise ValueError(f"masks of shape {tuple(masks.shape)} are not (B, H, W) cut in {down} x {across} patches.")
    return reduce(masks.cpu().double(), "B (down a) (across b) -> B (down across)", "mean", down=down, across=across)


class OnObject(NamedTuple):
    """One number an image, (B,), each in [0, 1], larger is better.

    pointing: the share of the strongest patch that lies on the object: the chance that a point in it hits. Patches that
        tie for the first place are averaged. Of a random map that is the object's share of the picture, on average.
    mass: the share of all positive weight that lies on the object, each patch's weight spread evenly over it; negative
        weights count as 0. A map without positive weight says nothing, and scores as an even one. Largest with all
        weight on the one patch that the object covers best: an honest outline of the object scores less.
    iou: intersection over union of object and the patches above a threshold, at the threshold that is best for this
        image. It flatters every map, random ones too.
    """

    pointing: Tensor
    mass: Tensor
    iou: Tensor


def on_object(maps: Tensor, masks: Tensor, grid: tuple[int, int]) -> OnObject:
    """How maps (B, n) lie on the objects in masks (B, H, W); n patches on `grid`, row by row."""
    covered = coverage(masks, grid)
    maps = _checked(maps, covered.shape)
    if (covered.sum(dim=1) == 0).any():
        bad = (covered.sum(dim=1) == 0).nonzero().flatten().tolist()
        raise ValueError(f"{len(bad)} of {len(masks)} masks hold no object (first: {bad[0]}): leave those images out.")
    first = (maps == maps.amax(dim=1, keepdim=True)).double()
    weights = maps.clamp_min(0)
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
    values, order = maps.sort(dim=1, descending=True)
    inside = covered.gather(1, order).cumsum(dim=1)  # of the m strongest patches, in patches
    union = torch.arange(1, maps.shape[1] + 1) + covered.sum(dim=1, keepdim=True) - inside
    # A threshold cannot fall between equal values.
    iou = (inside / union).where(F.pad(values[:, :-1] != values[:, 1:], (0, 1), value=True), -torch.inf)
    return OnObject(
        einsum(first, covered, "B n, B n -> B") / first.sum(dim=1),
        einsum(weights, covered, "B n, B n -> B") / weights.sum(dim=1),
        iou.amax(dim=1),
    )


class Curves(NamedTuple):
    """Probability of the class that the model gives the whole image, as patches go or come; (B, steps + 1).

    shares (steps + 1,): of the patches, 0 .. 1. deletion: the strongest `share` of patches is filled in; a map that
    knows what the model needs makes it fall early (small area). insertion: only the strongest `share` is there; large
    area is better.
    """

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    def areas(self) -> tuple[Tensor, Tensor]:
        """Areas under both curves by the trapezoid rule, (B,) each, in [0, 1]."""
        return torch.trapezoid(self.deletion, self.shares), torch.trapezoid(self.insertion, self.shares)


@torch.no_grad()
def deletion_insertion(
    model: VisionTransformer, images: Tensor, maps: Tensor, steps: int = 8, fill: str = "mean"
) -> Curves:
    """Take patches away in the order of a map, and bring them in that order (Petsiuk et al. 2018, RISE).

    Args:
        images: (B, 3, H, W) in [-1, 1]; maps: (B, n).
        steps: shares 0, 1/steps, ..., 1 of the patches (rounded to whole ones). Equal values go in reading order.
        fill: what stands where a patch is gone: "mean", the image's mean colour; "blur", the image blurred by a
            Gaussian with a standard deviation of an eighth of its side, cut off at two of these. No model was trained
            on either: part of what the curves measure is how a model takes filled patches, so compare with the same
            model's random order.
    """
    steps = at_least("steps", steps, 1)
    side = model.img_size // model.patch_size
    maps = _checked(maps, (len(images), side * side))
    filled = _filled(images, fill)
    ranks = maps.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    counts = [round(side * side * step / steps) for step in range(steps + 1)]
    device, rows = model.pos_embed.device, []
    for some in torch.arange(len(images)).split(BATCH):
        whole, gone = images[some].to(device), filled[some].to(device)
        ends = [model(x).softmax(dim=-1) for x in (whole, gone)]
        target = ends[0].argmax(dim=-1, keepdim=True)
        first, last = (end.gather(1, target) for end in ends)
        curve = {"deletion": [first], "insertion": [last]}
        for count in counts[1:-1]:
            strong = repeat(ranks[some] < count, "B (h w) -> B 1 (h a) (w b)", h=side, a=model.patch_size,
                            b=model.patch_size).to(device)  # fmt: skip
            for name, x in (("deletion", gone.where(strong, whole)), ("insertion", whole.where(strong, gone))):
                curve[name].append(model(x).softmax(dim=-1).gather(1, target))
        rows.append([torch.cat([*curve[name], end], dim=1) for name, end in (("deletion", last), ("insertion", first))])
    deletion, insertion = (torch.cat(part).cpu().double() for part in zip(*rows, strict=True))
    return Curves(torch.tensor(counts, dtype=torch.float64) / counts[-1], deletion, insertion)


def _filled(images: Tensor, fill: str) -> Tensor:
    if one_of("fill", fill, FILLS) == "mean":
        return reduce(images, "B c H W -> B c 1 1", "mean").expand_as(images)
    from torchvision.transforms.functional import gaussian_blur

    sigma = images.shape[-1] / 8
    return gaussian_blur(images, 2 * min(round(2 * sigma), images.shape[-1] // 2 - 1) + 1, sigma)


def _checked(maps: Tensor, shape) -> Tensor:
    if tuple(maps.shape) != tuple(shape):
        raise ValueError(
            f"expected a map of {shape[1]} patches for each of {shape[0]} images, got {tuple(maps.shape)}."
        )
    if not maps.isfinite().all():
        raise ValueError("maps must be finite: NaN or infinity cannot be ranked.")
    return maps.cpu().double()  # in this order: Apple's devices know no float64


def make_maps(
    seen: ClassTokenMaps, data: Masked, kind: str, layer: int = -1, signs: str = "signed", seed: int = 0
) -> Tensor:
    """Maps (B, n) of one of `KINDS` (see `ClassTokenMaps.kind`), or of a baseline, which looks at no attention:

        random      uniform numbers, drawn from `seed`
        centre      a Gaussian on the middle of the picture, standard deviation a quarter of its side; the picture ends
                    at two of these, so that its weights spread by 0.22 of the side only
        brightness  the luma of each patch
        average     the mean over all images of the "attention" map of `layer`: the same for every image
        mask        the share of each patch that the object covers: the ceiling that patches allow for pointing and
                    iou; for mass no ceiling, but what an honest outline scores

    seen: `class_token_maps` of data's images.
    """
    one_of("kind of map", kind, (*KINDS, *BASELINES))
    (down, across), count = seen.grid, len(seen.logits)
    if kind in KINDS:
        return seen.kind(kind, layer, signs)
    if kind == "random":
        return torch.rand(count, down * across, generator=torch.Generator().manual_seed(seed))
    if kind == "mask":
        if data.masks is None:
            raise ValueError(f"the pictures of {data.name} have no masks: take another baseline than 'mask'.")
        return coverage(data.masks, seen.grid)
    if kind == "average":
        return seen.kind("attention", layer, signs).mean(dim=0).expand(count, -1)
    if kind == "brightness":
        luma = einsum(data.images.float(), torch.tensor([0.299, 0.587, 0.114]), "B c H W, c -> B H W")
        return reduce(luma, "B (down a) (across b) -> B (down across)", "mean", down=down, across=across)
    y, x = (((torch.arange(m) + 0.5) / m - 0.5) ** 2 for m in (down, across))
    return torch.exp(-8 * (y[:, None] + x)).flatten().expand(count, -1)


def map_quality(
    model: VisionTransformer,
    data: Masked,
    kind: str = "attention",
    layer: int = -1,
    signs: str = "signed",
    steps: int = 8,
    fill: str = "mean",
    seen: ClassTokenMaps | None = None,
) -> dict[str, float]:
    """All five scores of one kind of map of one model: means over the images of `data` (see `load_masked`).

    Without masks there are two, deletion and insertion.

    kind: one of `KINDS` or `BASELINES`; seen: what `class_token_maps` gave for these images, to look only once.
    """
    images = normalise(data.images)
    seen = class_token_maps(model, images) if seen is None else seen
    maps = make_maps(seen, data, kind, layer, signs)
    areas = deletion_insertion(model, images, maps, steps, fill).areas()
    scores = {} if data.masks is None else on_object(maps, data.masks, seen.grid)._asdict()
    return {
        name: values.mean().item() for name, values in {**scores, **dict(zip(ON_MODEL, areas, strict=True))}.items()
    }


# ---- the table of a results file ------------------------------------------------------------------------------------


def run_rows(model: VisionTransformer, data: Masked, steps: int, fills, seed: int = 0) -> list[dict]:
    """Every kind of map, layer and way to read signs, and the baselines, of one model: scores, means over images.

    Deletion and insertion, `deletion_mean` and so on by fill, are measured for the last layer alone, where a row of
    another layer holds None.
    """
    images = normalise(data.images)
    seen = class_token_maps(model, images)
    depth, rows = seen.maps.shape[1], []
    known = data.masks is not None  # else nothing can lie on the object, and blocks but the last have no score
    layers = range(0 if known else depth - 1, depth)
    cases = [(kind, layer, signs) for kind in KINDS for layer in layers for signs in SIGNS]
    baselines = [kind for kind in BASELINES if known or kind != "mask"]
    for kind, layer, signs in [*cases, *((kind, depth - 1, "signed") for kind in baselines)]:
        maps, last = make_maps(seen, data, kind, layer, signs, seed), layer == depth - 1
        row = {"map": kind, "layer": layer, "signs": signs}
        if signs == "absolute":
            signed = make_maps(seen, data, kind, layer, "signed")
            if (maps - signed).abs().max() <= 1e-6 * maps.abs().max():  # a map's scale is free (see maps.py)
                rows.append({**rows[-1], **row})  # nothing is negative: the same maps again
                continue
        scores = on_object(maps, data.masks, seen.grid)._asdict() if known else {}
        row |= {name: values.mean().item() for name, values in scores.items()}
        for fill in fills:
            areas = deletion_insertion(model, images, maps, steps, fill).areas() if last else (None, None)
            row |= {
                f"{name}_{fill}": a if a is None else a.mean().item() for name, a in zip(ON_MODEL, areas, strict=True)
            }
        rows.append(row)
    return rows


def summarise(runs: list[dict]) -> list[dict]:
    """Mean and spread (standard deviation over seeds, n - 1; None of one seed) of every score, by attention and map.

    A line for every map, layer and way to read signs; attention: what varies between runs. Raises `ValueError` where it
    has a seed twice.
    """
    keys, groups, there = ("map", "layer", "signs"), {}, set()
    for run in runs:
        if (run["attention"], run["seed"]) in there:
            raise ValueError(f"{run['attention']} with seed {run['seed']} comes twice: give each run once.")
        there.add((run["attention"], run["seed"]))
        for row in run["rows"]:
            groups.setdefault((run["attention"], *(row[key] for key in keys)), []).append(row)
    found = []
    for (attention, *which), rows in groups.items():
        line = {"attention": attention, **dict(zip(keys, which, strict=True)), "seeds": len(rows)}
        for name in (name for name in rows[0] if name not in keys):
            values = [row[name] for row in rows if row[name] is not None]
            if values:
                values = torch.tensor(values, dtype=torch.float64)
                spread = values.std().item() if len(values) > 1 else None
                line[name] = {"mean": values.mean().item(), "std": spread}
        found.append(line)
    return found


def main(argv: list[str] | None = None) -> None:
    """Score the maps of the runs that `python -m karat_lite.train --out` left in a folder, those on one dataset."""
    parser = argparse.ArgumentParser(prog="python -m karat_lite.analysis.map_quality", description=main.__doc__)
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of the runs that karat_lite.train --out wrote")
    add(
        "--data",
        default="shapes",
        help="shapes, a folder with images/ and masks/, or one with test/<class>/ and no masks: deletion alone",
    )
    add("--limit", type=int, default=500, help="images")
    add("--steps", type=int, default=8, help="of deletion and insertion")
    add("--fill", nargs="+", default=["mean"], choices=FILLS, help="what stands where a patch is gone")
    add("--results", type=Path, required=True, help="JSON file")
    args = parser.parse_args(argv)
    command = f"{parser.prog} {shlex.join(sys.argv[1:] if argv is None else argv)}"
    # A model can be asked about any picture, but drawn shapes mean nothing to one that has seen none.
    found = find_runs(args.runs, name_of(args.data), elsewhere=args.data != "shapes")
    found.sort(key=lambda run: not run.variant.startswith("softmax"))  # what is compared with comes first
    runs = []
    for one in found:
        model = one.model()
        data = load_masked(args.data, model.img_size, args.limit)
        run = {"run": one.folder.name, "attention": one.variant, "seed": one.seed}
        run |= {"trained_on": one.data, "test_accuracy": one.card["metrics"]["test_accuracy"]}
        run["rows"] = run_rows(model, data, args.steps, args.fill, one.seed)
        runs.append(run)
        last = [row for row in run["rows"] if (row["map"], row["signs"]) == ("attention", "signed")][-1]
        print(run["run"], "attention, last layer:", {name: f"{last[name]:.3f}" for name in ON_OBJECT if name in last})
    about = {"name": data.name, "images": len(data.images), "img_size": data.images.shape[-1]}
    about["object_share"] = None if data.masks is None else data.masks.double().mean().item()
    results = {"command": command, "machine": machine(), "data": about, "steps": args.steps, "fills": args.fill}
    results |= {"summary": summarise(runs), "runs": runs}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.results, lambda temporary: temporary.write_text(json.dumps(results, indent=1) + "\n"))
    print(f"written: {args.results}")


if __name__ == "__main__":
    run_command(main)
