"""Compile the fused kernels for NVIDIA GPUs that are not here: python tests/kernels_for_gpu.py [capability ...].

The interpreter runs kernels that no GPU would take: it knows neither registers nor shared memory nor the rules of
tensor cores. Everything that is launched for the sizes below, with the constants it is launched with, one line each:
capability, type, sizes, name, bytes of shared memory, bytes of stack (what a thread has no register for). Written for
Triton 3.3 or newer.
"""

import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from triton.backends.compiler import GPUTarget

from karat_lite.kernels import fourier_programs
from karat_lite.kernels.fourier_triton import HARMONICS, _plans

CASES = [  # type, d, e, G, whether images share R: ViT-Tiny's heads, modular and full rank, and wide heads
    *[(torch.bfloat16, 64, e, 3, True) for e in (12, 24, 48)],
    (torch.bfloat16, 64, 64, 3, False),
    (torch.bfloat16, 128, 128, 16, False),
    (torch.float16, 64, 12, 3, True),
    (torch.float16, 128, 48, 3, True),
    (torch.float32, 64, 12, 3, True),
    (torch.float32, 64, 64, 3, False),
    (torch.float32, 128, 128, 16, False),
]
PROGRAMS = {
    "mix": "mix",
    "queries": "score_gradient",
    "keys": "score_gradient",
    "right": "right_gradient",
    "keys and right": "key_and_right_gradient",
}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
NATIVE = {"q", "k", "own", "other", "result", "right"}  # in the inputs' type; the other pointers are float32
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_for(capability: int, kernel, dtype: torch.dtype, plan: dict):
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        known = plan | ({name: 1} if name.endswith("_channel") else {})
        if name in known:
            signature[name], constexprs[(place,)] = "constexpr", known[name]
        elif name in NATIVE | {"grad", "out", "partial"}:
            signature[name] = f"*{NAMES[dtype] if name in NATIVE else 'fp32'}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if signature[name].startswith("*") or name.endswith(("_image", "_head", "_row")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = dict(num_warps=plan["num_warps"], num_stages=plan["num_stages"])
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack(cubin: bytes) -> int:
    """Bytes of a thread's stack, where it spills what its registers cannot hold."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def line(capability: int, dtype: torch.dtype, d: int, e: int, grid: int, name: str, plan: dict) -> str:
    plan = plan | (dict(FIRST=0, COUNT=min(grid, HARMONICS)) if name == "right" else {})
    made = compile_for(capability, getattr(fourier_programs, PROGRAMS[name]), dtype, plan)
    sizes = f"d={d} e={e} G={grid}"
    return f"{capability}; {NAMES[dtype]}; {sizes}; {name}; {made.metadata.shared}; {stack(made.asm['cubin'])}"


def main(capabilities: list[int]) -> None:
    with ProcessPoolExecutor() as pool:
        lines = []
        for dtype, d, e, grid, shared in CASES:
            q = torch.empty(2, 1, 1, d, dtype=dtype, device="meta")
            plans = _plans(q, torch.empty(1 if shared else 2, 1, 2 * grid, 1, e, device="meta"))
            for name, plan in plans.items():
                # Compiling takes long: the widest and the narrowest of ViT-Tiny for all, the others for the last one.
                some = capabilities if d == 64 and e in (12, 64) and dtype != torch.float16 else capabilities[-1:]
                lines += [pool.submit(line, c, dtype, d, e, grid, name, plan) for c in some]
        for made in lines:
            print(made.result())


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:]] or [80, 90])
