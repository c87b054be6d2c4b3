"""How long the fused kernels take on an H200 at least, by each of its limits: python tests/limits_for_gpu.py FILE.json

No GPU is needed. The kernels of forward and backward pass are compiled for it (see kernels_for_gpu.py), as they are
launched for ViT-Tiny's heads, modular, G = 3, r = 12, bfloat16; their machine code is read, its loops are found, and
what they execute is counted:

    instructions    of warps: an issue slot takes one a clock, and a multiprocessor has four of them
    special         of those, sines, cosines and roundings: 16 numbers a clock in a multiprocessor, a warp has 32
    flops           of matrix products, padding included
    bytes           to and from memory, each number once: q, k, R, Y or its gradient, and what is written

A kernel cannot be faster than the largest of the four times. Written for Triton 3.3 or newer.
"""

import math
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from kernels_for_gpu import CUOBJDUMP, compile_for
from kernels_for_gpu import PROGRAMS as KERNELS

from karat_lite.bench import as_text
from karat_lite.checkpoints import write_whole
from karat_lite.kernels import fourier_programs
from karat_lite.kernels.fourier_triton import PROGRAMS, _plans

HEADS, WIDTH, UNITS, GRID = 3, 64, 12, 3
CASES = ((128, 197), (16, 1025))  # images, tokens: those of data/results/h200_kernels.json
H200 = {
    "flops": 989.4e12,  # a second, bfloat16, not sparse: NVIDIA's data sheet, as the next line
    "bytes": 4.8e12,
    "multiprocessors": 132,
    "slots": 4,  # of a multiprocessor
    "special": 16,  # numbers a clock: CUDA C++ Programming Guide, arithmetic instructions, compute capability 9.0
    "clock": 1.83e9,  # at which 132 x 4,096 operations a clock are the data sheet's flops
}
# What the special function units do of that which these kernels hold. MUFU is a sine or cosine; for FRND, a rounding,
# the guide has no line: it is taken to be as slow.
SPECIAL = ("MUFU", "FRND")


def machine_code(cubin: bytes) -> list[tuple[int, str]]:
    """(address, instruction) of a compiled kernel."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([^;]+);", text)
    return [(int(address, 16), instruction) for address, instruction in found]


def loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last) address of each loop, that is of each branch backwards; inner loops first. No waiting in place."""
    jumps = [(_target(text), at) for at, text in code]
    return sorted(((to, at) for to, at in jumps if to is not None and to < at), key=lambda loop: loop[1] - loop[0])


def _target(instruction: str) -> int | None:
    """The address that a branch goes to; None for whatever is no branch."""
    to = re.search(r"0x[0-9a-f]+", instruction) if instruction.startswith("BRA") else None
    return int(to[0], 16) if to else None


def weigh(code: list[tuple[int, str]], trips: list[int]) -> dict:
    """What a warp (flops: a group of four) executes; trips: how often the innermost loop goes round, then the next."""
    nested = loops(code)
    if len(nested) != len(trips):
        raise ValueError(f"the kernel has {len(nested)} loops, expected {len(trips)}: look at its machine code.")
    total = dict.fromkeys(("instructions", "special", "flops"), 0)
    for at, text in code:
        if text.startswith("NOP") or _target(text) == at:  # behind the end
            continue
        times = math.prod(trip for (first, last), trip in zip(nested, trips, strict=True) if first <= at <= last)
        total["instructions"] += times
        total["special"] += times * text.startswith(SPECIAL)
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", text):
            total["flops"] += times * 2 * math.prod(map(int, shape.groups()))
    return total


def least(work: dict) -> dict:
    """Microseconds at least, by each limit, of what all programs do together."""
    of_all = H200["multiprocessors"] * H200["clock"]
    seconds = {
        "issue slots": work["instructions"] / H200["slots"] / of_all,
        "special function units": work["special"] * 32 / H200["special"] / of_all,
        "matrix units": work["flops"] / H200["flops"],
        "memory": work["bytes"] / H200["bytes"],
    }
    return {name: round(1e6 * value, 1) for name, value in seconds.items()}


def of_kernel(name: str, plan: dict, code: list[tuple[int, str]], images: int, tokens: int) -> dict:
    """One kernel at one size: what all its programs execute, the bytes they move, and the least times."""
    blocks, rounds = math.ceil(tokens / plan["BLOCK_OWN"]), math.ceil(tokens / plan["BLOCK_OTHER"])
    token, right = images * HEADS * tokens, 2 * GRID * HEADS * tokens * UNITS
    moved = 2 * (2 * token * WIDTH + right) + 4 * token * UNITS  # q, k and R; and Y, or its gradient, in float32
    groups, trips = images, [rounds]
    if name != "mix":
        moved += 2 * token * WIDTH  # dQ, or dK
    if name == "keys and right":
        share = -(-images // (PROGRAMS // (blocks * HEADS)))
        groups, trips = -(-images // share), [rounds, share]
        moved += 4 * (2 * groups + 1) * right  # partial sums, there and back, and what they add up to
    each, warps = weigh(code, trips), groups * HEADS * blocks * plan["num_warps"]
    work = {"instructions": each["instructions"] * warps, "special": each["special"] * warps}
    work |= {"flops": each["flops"] * warps // 4, "bytes": moved}
    return {"kernel": name, "images": images, "tokens": tokens, **work, "least microseconds": least(work)}


def main(path: Path) -> None:
    q = torch.empty(2, 1, 1, WIDTH, dtype=torch.bfloat16, device="meta")
    plans, rows = _plans(q, torch.empty(1, 1, 2 * GRID, 1, UNITS, device="meta")), []
    for name, plan in plans.items():
        made = compile_for(90, getattr(fourier_programs, KERNELS[name]), q.dtype, plan)
        code = machine_code(made.asm["cubin"])
        rows += [of_kernel(name, plan, code, *case) for case in CASES]
    of = f"h = {HEADS}, d = {WIDTH}, r = {UNITS}, G = {GRID}, bfloat16, sm_90, triton {triton.__version__}"
    found = {"command": f"python tests/limits_for_gpu.py {path}", "of": of, "H200": H200, "rows": rows}
    write_whole(path, lambda temporary: temporary.write_text(as_text(found)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
