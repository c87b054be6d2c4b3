"""Command line: what KArAt costs beside softmax attention on this machine, as JSON and one figure.

python -m karat_lite.bench                                   # CPU, under 5 minutes on 2 quiet cores
python -m karat_lite.bench --device cuda                     # one GPU, under 8 minutes
python -m karat_lite.bench --results FILE.json --draw        # no measurement, only the figure

All that is compared runs in turns (`analysis.cost.compare`): a row holds the median and quartiles of its seconds, and
of its ratio to eager softmax attention pair by pair (of part "growth": to the same competitor with fewest tokens). On
a CPU every timed run of a layer of up to 2,000 tokens follows an untimed one of the same layer.
See `analysis.rivals` for who is compared.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .analysis import cost
from .analysis.rivals import Case, Layer, Model, Rival, feature_form, karat_kinds, workspace
from .analysis.verdict import LARGE, described, growth, targets
from .bench_sizes import CPU, GPU, Sizes
from .checkpoints import write_whole
from .checks import at_least, run_command
from .training import pick_device

__all__ = ["CPU", "GPU", "Sizes", "feature_form", "main", "run"]
QUIET = 0.05  # part of the machine that others may take before a run is doubted aloud
LAYER = {"infer": "layer forward", "learn": "layer forward and backward"}
MODEL = {"infer": "model inference", "gradients": "model forward and backward", "learn": "model training step"}
# Runs that a comparison takes at least: three, and two to see the memory.
ROUNDS = {"infer": 3, "gradients": 5, "learn": 5}


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    """Measure, write the JSON whole, draw it. `sizes` in place of the device's own, for tests."""
    args = _parser().parse_args(argv)
    device = pick_device(args.device)
    if device.type == "cuda":  # the one whose memory is counted and whose work is waited for
        torch.cuda.set_device(device)
    path = args.results or Path("data/results") / f"bench_{'cpu' if device.type == 'cpu' else 'gpu'}.json"
    figure = args.figure or path.with_suffix(".png")
    if not args.draw:
        if args.seconds is not None and not args.seconds > 0:
            raise ValueError(f"--seconds must be positive, got {args.seconds:g}.")
        command = "python -m karat_lite.bench " + shlex.join(sys.argv[1:] if argv is None else argv)
        if args.threads is not None:
            torch.set_num_threads(at_least("--threads", args.threads, 1))
        sizes = sizes or (CPU if device.type == "cpu" else GPU)
        if args.seconds is not None:
            sizes = dataclasses.replace(sizes, seconds=args.seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        results = {"command": command.strip(), **run(sizes, device)}
        write_whole(path, lambda temporary: temporary.write_text(as_text(results)))
        print(f"written: {path}")
    elif not path.is_file():
        raise ValueError(f"--draw needs the measurements, and there is no {path}: run without --draw first.")
    from .bench_plots import as_png, bench_figure  # matplotlib is not everybody's

    png = as_png(bench_figure(json.loads(path.read_text())))
    figure.parent.mkdir(parents=True, exist_ok=True)
    write_whole(figure, lambda temporary: temporary.write_bytes(png))
    print(f"drawn: {figure}")


def run(sizes: Sizes, device: torch.device) -> dict:
    """Measure everything: {machine, threads, torch, seconds, others, limits, targets, growth, left_out, rows}.

    A row: part, what, competitor, the fields of a `Case`, those of a `cost.Timing` (seconds; ratios to eager softmax
    attention), kept_bytes and peak_bytes (None where not measured), others: percent of the machine that other processes
    took meanwhile, as for the whole run. left_out: what there was no time or memory for.
    """
    started = time.perf_counter()
    torch.manual_seed(0)
    karat = karat_kinds(device)
    print(f"{cost.machine()}, {torch.get_num_threads()} threads; KArAt by {', '.join(karat)}")
    limits = {
        dtype: cost.machine_limits(device, size=sizes.limits, dtype=getattr(torch, dtype)) for dtype in sizes.dtypes
    }
    bench = Bench(sizes, device, karat)
    shares = {bench.models: 0.4, bench.shapes: 0.14, bench.along_n: 0.22}
    shares |= {bench.growth_in_n: 0.13, bench.along_g: 0.06, bench.along_r: 0.05}
    if device.type == "cuda":  # there models are compiled, and what that overruns is taken from the parts behind
        shares[bench.models] = shares.pop(bench.models)
    left = started + sizes.seconds
    with cost.Others() as others:
        for part, some in _divide(left - time.perf_counter(), list(shares), list(shares.values())):
            part(some)
    grown = growth(bench.rows)
    results = {
        "machine": cost.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        "others": _percent(others),
        "limits": {dtype: found._asdict() for dtype, found in limits.items()},
        "targets": targets(bench.rows, grown, karat[0]),
        "growth": grown,
        "left_out": bench.left_out,
        "rows": bench.rows,
    }
    for target in results["targets"]:
        print(
            f"{'met   ' if target['met'] else 'MISSED'} {target['found']:.3g} ({target['bound']}): {target['target']}"
        )
    if others.share is not None and others.share > QUIET:
        print(f"Other processes took {others.share:.0%} of this machine: pause them and measure again.")
    return results


class Bench:
    """The parts of a run; each takes the seconds that it may use and adds to `rows` and `left_out`."""

    def __init__(self, sizes: Sizes, device: torch.device, karat: Sequence[str]):
        self.sizes, self.device, self.karat = sizes, device, karat
        # In this order they are given time: what comes last is left out first.
        self.everybody = ("softmax", "sdpa", *karat, "features", "broadcast")
        self.room = sizes.room
        if device.type == "cuda":
            self.room = torch.cuda.mem_get_info(device)[0] / 2
        self.rows: list[dict] = []
        self.left_out: list[dict] = []

    def shapes(self, seconds: float) -> None:
        """Layers of whole models."""
        cases = [case._replace(dtype=dtype) for case in self.sizes.shapes for dtype in self.sizes.dtypes]
        steps = list(itertools.product(cases, LAYER))
        for (case, mode), some in _divide(seconds, steps, [case.h * ROUNDS[mode] for case, mode in steps]):
            self._measure("shapes", mode, [(name, case) for name in self.everybody], some)

    def along_n(self, seconds: float) -> None:
        """Layers of more and more tokens, everybody as far as there is time."""
        steps = list(itertools.product(self.sizes.dtypes, LAYER, self.sizes.tokens))
        weights = [(1500 + n**2 / 1000) * ROUNDS[mode] for _, mode, n in steps]
        slow: dict[tuple[str, str], list[str]] = {}
        for (dtype, mode, n), some in _divide(seconds, steps, weights):
            case = self.sizes.tokens_of._replace(N=n, r=min(n, self.sizes.tokens_of.r), dtype=dtype)
            too_slow = slow.setdefault((dtype, mode), [])  # at fewer tokens already: not worth another trial
            self._leave_out("tokens", mode, [(name, case) for name in too_slow], "time")
            line_up = [(name, case) for name in self.everybody if name not in too_slow]
            names = self._measure("tokens", mode, line_up, some)
            if n >= LARGE and names:
                too_slow += [name for name, _ in line_up if name not in names]

    def growth_in_n(self, seconds: float) -> None:
        """Many tokens again, each competitor by itself and all its sizes in turns: how time grows, whatever happens."""
        many = [n for n in self.sizes.tokens if n >= LARGE]
        steps = list(itertools.product(self.sizes.dtypes, LAYER, ("sdpa", self.karat[0])))
        for (dtype, mode, name), some in _divide(seconds, steps, [ROUNDS[mode] for _, mode, _ in steps]):
            cases = [self.sizes.tokens_of._replace(N=n, dtype=dtype) for n in many]
            self._measure("growth", mode, [(name, case) for case in cases], some)

    def along_g(self, seconds: float) -> None:
        """One layer with more and more harmonics, all of them in turns."""
        cases = [self.sizes.grids_of._replace(G=grid) for grid in self.sizes.grids]
        self._axis("grids", cases, seconds)

    def along_r(self, seconds: float) -> None:
        """One layer with more and more units, and full rank."""
        cases = [self.sizes.grids_of._replace(r=r or self.sizes.grids_of.N) for r in self.sizes.ranks]
        self._axis("ranks", cases, seconds)

    def _axis(self, part: str, cases: list[Case], seconds: float) -> None:
        line_up = [("softmax", cases[0]), ("sdpa", cases[0]), *itertools.product(self.karat, cases)]
        for mode, some in _divide(seconds, list(LAYER), [ROUNDS[mode] for mode in LAYER]):
            self._measure(part, mode, line_up, some)

    def models(self, seconds: float) -> None:
        """Whole models: inference, forward and backward pass, training steps.

        Of the first model bounds are judged, so its three are compared often, and the slower ways by themselves after.
        """
        first, line_ups = self.sizes.models[0].model, {}
        for case, mode in itertools.product(self.sizes.models, MODEL):
            if mode == "gradients" and (case.compiled or (self.device.type == "cpu" and case.model != first)):
                continue  # a step is hardly more
            line_ups[case, mode, False] = [(name, case) for name in self.everybody[:3]]
            if mode != "gradients" and case.model == first:
                slower = [(name, case) for name in self.karat[1:] if not case.compiled]
                line_ups[case, mode, True] = [("softmax", case), *slower, (self.karat[0], case._replace(r=case.N))]
        long = [1 if mode == "gradients" or case.model != first else 3 - again for case, mode, again in line_ups]
        weights = [
            n * case.B * case.h**2 * ROUNDS[mode] * (3 if case.compiled else 1)
            for n, (case, mode, _) in zip(long, line_ups, strict=True)
        ]
        for (case, mode, again), some in _divide(seconds, list(line_ups), weights):
            if case.compiled:  # all blocks share one code, of which torch.compile keeps 8 versions, then gives up
                torch._dynamo.reset()
            self._measure("models", mode, line_ups[case, mode, again], some, again)

    def _measure(
        self, part: str, mode: str, line_up: list[tuple[str, Case]], seconds: float, again: bool = False
    ) -> list[str]:
        """Compare those of `line_up` that fit into memory and seconds, the first being the baseline. Returns the names.

        Each runs once or twice before it is let in: that warms it up and says what its rounds will take. again: the
        baseline has its row already.
        """
        deadline, reserved = time.perf_counter() + seconds, 0.0
        runs: dict[tuple[str, Case], Rival] = {}
        for name, case in line_up:
            rival, needs, why = self._try(name, case, mode, seconds - reserved)
            if rival is not None:
                runs[name, case], reserved = rival, reserved + needs
                continue
            self._leave_out(part, mode, [(name, case)], why)
            reserved = reserved if runs else seconds  # without the baseline nothing is worth its time
        if len(runs) < 2:
            return []
        some = deadline - time.perf_counter() - reserved * (1 - 3 / ROUNDS[mode])
        timed = {key: self._runner(rival, mode) for key, rival in runs.items()}
        with cost.Others() as others:
            times = cost.compare(
                timed,
                next(iter(runs)),
                repeats=self.sizes.repeats,
                seconds=some,
                warm_up=False,
                settle=[key for key in timed if self._settles(*key)],
            )
        said = []
        for (name, case), rival in list(runs.items())[again:]:
            timing = times[name, case]
            seconds_each = {key: value / self.sizes.at_once for key, value in timing._asdict().items()}
            row = {"part": part, "what": _what(case, mode), "competitor": name, **rival.case._asdict(), **seconds_each}
            row |= {key: value for key, value in timing._asdict().items() if key.startswith("ratio")}
            row = {key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in row.items()}
            self.rows.append({**row, **self._memory(rival, mode), "others": _percent(others)})
            shown = {"growth": ("N",), "tokens": (), "shapes": ()}.get(part, ("G", "r") if row["r"] else ())
            of = "".join(f" {key}={getattr(case, key)}" for key in shown)
            said.append(f"{name}{of} {1e3 * row['median']:.2f} ms ({row['ratio']:.2f})")
        print(f"{described(row)}: {', '.join(said)}", flush=True)
        return [name for name, _ in runs]

    def _leave_out(self, part: str, mode: str, line_up: list[tuple[str, Case]], why: str) -> None:
        for name, case in line_up:
            named = {"part": part, "what": _what(case, mode), "competitor": name}
            self.left_out.append({**named, **case._asdict(), "why": why})

    def _try(self, name: str, case: Case, mode: str, seconds: float) -> tuple[Rival | None, float, str]:
        """(who was asked for, the seconds that its rounds will take, ""), or (None, 0, why it cannot take part).

        Both softmaxes and the fastest KArAt are what everything is about: they may take three times their share.
        """
        if workspace(name, case) > self.room:
            return None, 0.0, "memory"
        if seconds <= 0:
            return None, 0.0, "time"
        patience = max(3 * seconds, 2.0) if name in self.everybody[:3] else seconds
        try:
            if case.model:
                rival: Rival = Model(name, case, self.device, self.sizes.img_size, self.sizes.compiler)
            else:
                rival = Layer(name, case, self.device)
            run = self._runner(rival, mode)
            for _ in range(2):  # the first may have compiled something
                cost.finish()
                started = time.perf_counter()
                run()
                cost.finish()
                needs = ROUNDS[mode] * (1 + self._settles(name, case)) * (time.perf_counter() - started)
                if needs <= patience:
                    return rival, needs, ""
        except torch.OutOfMemoryError:
            return None, 0.0, "memory"
        return None, 0.0, "time"

    def _settles(self, name: str, case: Case) -> bool:
        """Layers on a CPU: a few milliseconds in which pages that another layer gave back cost as much as the work.

        Not beyond 2,000 tokens: a run takes long enough, and arrays so large never come from pages given back.
        """
        return self.device.type == "cpu" and not case.model and case.N <= 2000

    def _runner(self, rival: Rival, mode: str) -> Callable[[], object]:
        method = getattr(rival, mode)
        return lambda: [method() for _ in range(self.sizes.at_once)]

    def _memory(self, rival: Rival, mode: str) -> dict:
        """Bytes kept for the backward pass, and the peak: of the forward pass, or of forward and backward pass."""
        if mode == "infer":
            return {"kept_bytes": None, "peak_bytes": cost.peak_memory(rival.infer, self.device, warm_up=False)}
        kept = None if rival.case.compiled else cost.kept_bytes(rival.forward, rival.given)
        return {"kept_bytes": kept, "peak_bytes": cost.peak_memory(getattr(rival, mode), self.device, warm_up=False)}


def _percent(others: cost.Others) -> float | None:
    return None if others.share is None else round(100 * others.share, 1)


def _what(case: Case, mode: str) -> str:
    return (MODEL if case.model else LAYER)[mode]


def _divide(seconds: float, steps: Sequence, weights: Sequence[float]) -> Iterator[tuple]:
    """(step, the seconds for it): what a step leaves over, the later ones have."""
    deadline = time.perf_counter() + seconds
    for i, (step, weight) in enumerate(zip(steps, weights, strict=True)):
        yield step, (deadline - time.perf_counter()) * weight / sum(weights[i:])


def as_text(results: dict) -> str:
    """JSON with one record a line, to be read and compared by people too."""
    lines = []
    for key, value in results.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[" + ",".join(f"\n  {json.dumps(record)}" for record in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m karat_lite.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--seconds", type=float, help=f"to measure for (default: {CPU.seconds:g} on a CPU, {GPU.seconds:g} on a GPU)")
    add("--threads", type=int, help="of the CPU (default: all); 1 bears other work on the machine, more do not")
    add("--results", type=Path, help="JSON file (default: data/results/bench_cpu.json or bench_gpu.json)")
    add("--figure", type=Path, help="PNG file (default: beside the results, under their name)")
    add("--draw", action="store_true", help="measure nothing, draw the results that are there")
    return parser


if __name__ == "__main__":
    run_command(main)
