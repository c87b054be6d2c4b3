"""What a benchmark's rows say: how cost grows with N and G, and whether it stays within the bounds set beforehand."""

from collections.abc import Sequence

import numpy as np

LARGE = 785  # tokens from which on the terms in N^2 decide: images of 448 pixels in patches of 16
QUANTITIES = {"pairs": "time", "median": "time", "kept_bytes": "bytes kept", "peak_bytes": "peak of memory"}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """p of the power law y = c x^p, by least squares on logarithms. `ValueError` for fewer than two different x."""
    return _line(np.log(x), np.log(y))[0]


def r_squared(x: Sequence[float], y: Sequence[float]) -> float:
    """R^2 of a straight line through (x, y): 1 where y is linear in x. `ValueError` for fewer than two different x."""
    return _line(np.asarray(x, dtype=float), np.asarray(y, dtype=float))[1]


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    if len(x) != len(y) or len(set(x.tolist())) < 2:
        raise ValueError(f"a line needs two different x and a y for each, got {len(x)} x and {len(y)} y.")
    x, y = x - x.mean(), y - y.mean()
    gradient = (x @ y) / (x @ x)
    left, all_of_it = ((y - gradient * x) ** 2).sum(), (y**2).sum()
    return float(gradient), 1.0 if all_of_it == 0 else float(1 - left / all_of_it)


def growth(rows: Sequence[dict]) -> list[dict]:
    """Per competitor, operation and type: exponents in N for N >= `LARGE`, of time and memory, and linearity in G.

    Time in N is that of the part "growth": all sizes in turns, each as a ratio to the smallest of the same round, so
    that a machine whose speed wavers does not bend the line. Left out where fewer than three points are there.
    Records: {"of": "time" | "kept_bytes" | "peak_bytes", "in": "N", "what", "competitor", "dtype", "points", "slope"},
    or {"of": "time", "in": "G", ..., "r_squared"}.
    """
    found = []
    memory = [("tokens", "N", quantity) for quantity in ("kept_bytes", "peak_bytes")]
    for part, axis, quantity in (("growth", "N", "ratio"), *memory, ("grids", "G", "median")):
        lines: dict[tuple, list[dict]] = {}
        for row in rows:
            if row["part"] == part and row[axis] is not None and (axis == "G" or row["N"] >= LARGE):
                lines.setdefault((row["what"], row["competitor"], row["dtype"]), []).append(row)
        for (what, competitor, dtype), line in lines.items():
            points = [(row[axis], row[quantity]) for row in line if row[quantity]]
            if len(points) < 3:
                continue
            kind, fit = ("slope", slope) if axis == "N" else ("r_squared", r_squared)
            named = {"of": quantity if part == "tokens" else "time", "in": axis, "what": what}
            named |= {"competitor": competitor, "dtype": dtype, "points": len(points)}
            found.append({**named, kind: round(fit(*zip(*points, strict=True)), 4)})
    return found


def targets(rows: Sequence[dict], grown: Sequence[dict], karat: str) -> list[dict]:
    """The bounds that were set before anything was measured, and what came out: {target, bound, found, met}.

    karat: the backend that "auto" takes, G = 3, r = 12 or full rank. A target whose rows are missing (no time, no
    memory) is left out. On a CPU times are compared with eager softmax, pair by pair; on a GPU with the fused one.
    """
    found: list[dict] = []

    def check(target: str, value: float, low: float, high: float) -> None:
        bound = f"<= {high:g}" if low == 0 else f">= {low:g}" if high == np.inf else f"{low:g} to {high:g}"
        found.append({"target": target, "bound": bound, "found": round(value, 4), "met": bool(low <= value <= high)})

    def over(other: str, quantity: str, limits: tuple[float, float], full: bool = False, **which) -> None:
        """KArAt's quantity over another competitor's, in every case of `which` that has both."""
        of_karat = {"competitor": karat, "G": 3, **which}
        for row in rows:
            if any(row[key] != value for key, value in of_karat.items()) or row["r"] != (row["N"] if full else 12):
                continue
            case = ("part", "what", "B", "h", "N", "d", "dtype", "model", "compiled")
            for its in rows:
                if its["competitor"] == other and all(its[key] == row[key] for key in case):
                    if quantity == "pairs":
                        value = row["ratio"]
                    elif row[quantity] and its[quantity]:
                        value = row[quantity] / its[quantity]
                    else:
                        continue
                    who = f"{karat}{', full rank' if full else ''} over {other}"
                    check(f"{QUANTITIES[quantity]}, {who}: {described(row)}", value, *limits)

    step, both = "model training step", "layer forward and backward"
    if any(row["dtype"] == "bfloat16" for row in rows):
        for n in (197, 1025):
            over("sdpa", "median", (0, 1.25), what=both, dtype="bfloat16", N=n, part="tokens")
        over("sdpa", "median", (0, 1.10), what=step, compiled=True)
        over("sdpa", "peak_bytes", (0, 1.02), what=step)
    else:
        over("softmax", "pairs", (0, 1.30), what=step, B=8)  # set for ViT-Tiny; for single images Python weighs too
        over("softmax", "pairs", (0, 1.20), what="model inference", B=8)
        over("features", "median", (0, 0.5), part="shapes", h=3)
    over("sdpa", "kept_bytes", (0, 1.02), what=step)
    over("softmax", "kept_bytes", (0, 0.90), what=step)
    over("sdpa", "kept_bytes", (0, 1.10), full=True, what=step)
    for line in grown:
        if line["competitor"] != karat:
            continue
        where = f"{karat}, {line['what']}, {line['dtype']}"
        if line["of"] == "peak_bytes" and karat == "triton":  # the blocks of a CPU have the same scratch for all sizes
            check(f"exponent of peak memory in N >= {LARGE}: {where}", line["slope"], 0.9, 1.1)
        if line["of"] == "time":
            if line["in"] == "N":
                check(f"exponent of time in N >= {LARGE}: {where}", line["slope"], 1.8, 2.1)
            else:
                check(f"R^2 of time linear in G: {where}", line["r_squared"], 0.98, np.inf)
    return found


def described(row: dict) -> str:
    """A row's case in words."""
    model = f", {row['model']}{', compiled' if row['compiled'] else ''}" if row["model"] else f", h={row['h']}"
    return f"{row['what']}{model}, B={row['B']}, N={row['N']}, {row['dtype']}"
