"""What a computation costs: bytes kept for the backward pass, operations, bytes visited, time, peak memory.

`kept_bytes` and `count` are exact and the same on every machine; `predict` is a formula for them, for sizes that nobody
wants to run; `compare`, `peak_memory` and `machine_limits` measure this one.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..checks import at_least, one_of

# Operations whose every output number costs far more than one multiplication; FlopCounterMode counts them as nothing.
TRANSCENDENTAL = set(
    "cos sin tan exp exp2 expm1 tanh sinh cosh _softmax _log_softmax softplus gelu gelu_backward silu silu_backward "
    "erf sigmoid log log1p pow sqrt rsqrt".split()
)


def kept_bytes(run: Callable[[], Tensor], given: Iterable[Tensor] = ()) -> int:
    """Bytes that the forward pass `run` keeps for the backward pass, as `saved_tensors_hooks` sees them.

    Tensors that share memory count once, and `given` (parameters, say, which are there anyway) do not count.
    """
    kept, own = {}, {x.untyped_storage().data_ptr() for x in given}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    if not out.requires_grad:
        raise ValueError("run() returns a tensor without a graph: nothing is kept. Let its inputs require gradients.")
    return sum(size for pointer, size in kept.items() if pointer not in own)


class Count(NamedTuple):
    """Operations and traffic of one run."""

    flops: int  # of matrix products; a multiplication and an addition are two
    transcendental: int  # numbers that are a cosine, sine, exponential, ...
    bytes_visited: int  # read and written by all operations together, as if no cache were there

    @property
    def intensity(self) -> float:
        """Operations per byte visited; a transcendental counts as one."""
        return (self.flops + self.transcendental) / max(1, self.bytes_visited)


class _Traffic(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.visited, self.transcendental = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "new_empty")):  # no number is touched
            return out
        filled = {a.name for a in func._schema.arguments if a.kwarg_only and a.is_out}  # out=: written, never read
        given = args[1:] if kwargs.get("beta") == 0 else args  # nothing of the sum is there yet
        read = [given, *(value for key, value in kwargs.items() if key not in filled)]
        self.visited += sum(x.numel() * x.element_size() for x in _tensors((read, out)))
        square = name == "pow" and len(args) > 1 and isinstance(args[1], int)  # multiplications
        if name.rstrip("_") in TRANSCENDENTAL and not square:
            self.transcendental += sum(x.numel() for x in _tensors(out)[:1])
        return out


def _tensors(tree) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _fused_attention(q, k, v, *args, out_shape=None, **kwargs) -> int:
    """Q K^T and A V of `scaled_dot_product_attention` on a CPU, which FlopCounterMode does not know."""
    (*batch, rows, width), keys = q, k[-2]
    return 4 * math.prod(batch) * rows * keys * width


def _fused_attention_gradients(grad, q, k, *args, out_shape=None, **kwargs) -> int:
    return _fused_attention(q, k, None) * 5 // 2  # the scores again, and two products each for both of the two


def _product_in_place(total, a, b, *args, out_shape=None, **kwargs) -> int:
    """total += a b, which FlopCounterMode knows only where it makes a new tensor."""
    return 2 * math.prod(a) * b[-1]


def count(run: Callable[[], object]) -> Count:
    """Count the operations of `run()`, forward and backward as it does them; inside a fused kernel only products."""
    unknown = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_attention_gradients,
        torch.ops.aten.addmm_: _product_in_place,
        torch.ops.aten.baddbmm_: _product_in_place,
    }
    with FlopCounterMode(display=False, custom_mapping=unknown) as products, _Traffic() as traffic:
        run()
    return Count(products.get_total_flops(), traffic.transcendental, traffic.visited)


class Predicted(NamedTuple):
    """What `kept_bytes` and `count` would find, by formula."""

    kept: int  # bytes kept for the backward pass, parameters apart
    flops: int  # forward and backward
    bytes_visited: int


FORMS = ("softmax", "fused softmax", "broadcast", "features", "recompute")


def predict(
    form: str, *, batch: int, heads: int, tokens: int, width: int, grid: int = 3, rank: int | None = 12
) -> Predicted:
    """One attention layer in float32, forward and backward, without running it; `rank=None` is the full-rank operator.

    Forms: "softmax", product by product; "fused softmax", `scaled_dot_product_attention`; "broadcast", every unit on
    every score; "features", the maps cos and sin of mS side by side and one product; "recompute", the package's
    backend. Bytes kept and flops are what the counters find (a single image saves "features" a copy of the
    coefficients); traffic, from 65 tokens on, to a fifth: large arrays are counted, small ones fitted. The flops of
    "broadcast" hold the multiplications and additions of its units: no matrix products, so `count` does not see them.
    """
    one_of("form", form, FORMS)
    full, r = rank is None, tokens if rank is None else rank
    maps = 2 * grid
    scores, q = batch * heads * tokens**2, batch * heads * tokens * width
    y, coef = batch * heads * tokens * r, heads * r * tokens * maps
    product = 2 * scores * width  # Q K^T, and whatever takes as many
    mixing = 2 * scores * maps * (width if full else r)  # the maps times coefficients, or times mixed values
    if form == "softmax":
        kept, flops, visited = scores + 3 * q, 6 * product, 13 * scores + 18 * q
    elif form == "fused softmax":
        kept, flops, visited = 4 * q + q // width, 7 * product, 12 * q + 2 * q // width
    elif form == "broadcast":
        kept = (3 * grid + 1) * scores + 3 * q + (0 if full else y)
        flops = 6 * product + 6 * scores * r * maps + (0 if full else 6 * scores * r)
        visited = scores * (18 * r * grid + 2 * r + 29 * grid + (11 if full else 18)) + 19 * q + 9 * coef
    elif form == "features":
        more = maps * q + coef if full else (maps + 2) * y + y // tokens * width
        kept = 3 * grid * scores + 3 * q + more
        flops = 3 * product + (6 * mixing if full else 3 * mixing + 12 * y * width)
        small = (21 + 27 * grid) * q + 8 * coef if full else 19 * q + (17 + 10 * grid) * y + 12 * coef
        visited = scores * (32 * grid + 7) + small
    else:
        kept = 3 * q + (0 if full else y)
        flops = 4 * product + (8 * coef * maps + 7 * mixing if full else 6 * coef * maps + 3 * mixing + 14 * y * width)
        small = (50 + 51 * grid) * q + 28 * coef if full else 40 * q + (27 * grid + 38) * y + 14 * coef
        finished = ((grid + 1) // 2 - 1) // 2 + max(0, grid // 2 - 1)  # raw maps that later harmonics need whole
        visited = scores * (26 * grid - 2 + 8 * finished) + small
    return Predicted(4 * kept, flops, 4 * visited)


class Timing(NamedTuple):
    """Seconds of one run: median and quartiles over the repetitions; ratio to the baseline, pair by pair."""

    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float


def compare(
    runs: dict[str, Callable[[], object]],
    baseline: str,
    *,
    repeats: int = 10,
    seconds: float = float("inf"),
    warm_up: bool = True,
    settle: bool | Collection = False,
) -> dict[str, Timing]:
    """Time several ways of doing a thing in turns, so that what disturbs the machine disturbs all of them.

    Each round runs every one once, after one round to warm up (`warm_up=False`: the caller has done that); there are at
    most `repeats` rounds, and no new one begins after `seconds` (three are made in any case). `ratio` is the median of
    the rounds' time over `baseline`'s. settle: every timed run (or those whose names it holds) comes right after an
    untimed one of the same way and finds memory as it left it itself, as in a training, and not as its rivals did.
    Raises `ValueError` for a baseline that is no run, or less than three repeats.
    """
    one_of("baseline", baseline, runs)
    at_least("repeats", repeats, 3)
    settled = set(runs if settle is True else settle or ())
    for run in runs.values() if warm_up else ():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        for name, run in runs.items():
            if name in settled:
                run()
            finish()
            before = time.perf_counter()
            run()
            finish()
            found[name].append(time.perf_counter() - before)
    result = {}
    for name, times in found.items():
        ratios = [mine / its for mine, its in zip(times, found[baseline], strict=True)]
        result[name] = Timing(*_middle(times), *_middle(ratios))
    return result


def _middle(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def finish() -> None:
    """Wait until the current GPU, if there is one, has done its work: a call returns before that."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def peak_memory(run: Callable[[], object], device: str | torch.device = "cpu", *, warm_up: bool = True) -> int | None:
    """Bytes that `run()` needs at its peak beyond what is there before. On a CPU by Linux's own count; else None.

    Linux counts pages and is a megabyte or so off. `warm_up=False` where `run` has run before.
    """
    if warm_up:
        run()  # code and workspaces that are loaded once
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier runs left in the heap would serve this one unseen
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the peak starts again from what is resident now
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class Limits(NamedTuple):
    """What this machine can do at best."""

    flops: float  # per second, in matrix products
    bytes: float  # per second, from and to memory


def machine_limits(
    device: str | torch.device = "cpu", *, size: int = 1024, repeats: int = 10, dtype: torch.dtype = torch.float32
) -> Limits:
    """The two limits of a roofline, measured: a large matrix product in `dtype`, and a copy that no cache holds.

    `size` is that of the matrices: 1024 keeps two cores busy, a large GPU needs 8192.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(1 << 26, device=device).fill_(1.0)  # 256 MiB
    copied = torch.empty_like(source)
    runs = {"product": lambda: torch.mm(a, b), "copy": lambda: copied.copy_(source)}
    times = compare(runs, "product", repeats=repeats)
    return Limits(2 * size**3 / times["product"].low, 2 * source.numel() * 4 / times["copy"].low)


class Others:
    """How much of the machine other processes take while this one measures: `with Others() as others: ...`

    `others.share` is their part of all cores, 0 to 1, by Linux's own count (in ticks of 10 ms: for blocks of half a
    second or more); None on other systems, and inside the block. Times taken while it is above a few percent say more
    about the others than about what was timed.
    """

    share: float | None = None

    def __enter__(self) -> "Others":
        self.before = self._seconds()
        return self

    def __exit__(self, *_) -> None:
        after = self._seconds()
        if self.before is not None and after is not None:
            wall, busy, own = (b - a for a, b in zip(self.before, after, strict=True))
            self.share = min(1.0, max(0.0, (busy - own) / (max(wall, 1e-9) * os.cpu_count())))

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Now; and since the start, the time that all cores worked, and that this process did."""
        try:
            with open("/proc/stat") as lines:
                user, nice, system, _, _, *interrupts = map(int, lines.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, sum(os.times()[:2])


def machine() -> str:
    """The kind of machine, as results name it; with a GPU, Triton too, on which the kernels' times depend."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    if gpu and importlib.util.find_spec("triton"):
        gpu += f", triton {importlib.metadata.version('triton')}"
    return f"{os.cpu_count()} cores, {platform.machine()}{gpu}, torch {torch.__version__}"
