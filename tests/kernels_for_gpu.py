"""Compile the fused kernels for NVIDIA GPUs that are not here: python tests/kernels_for_gpu.py [capability ...].

The interpreter runs kernels that no GPU would take: it knows neither shared memory nor the rules of tensor cores. One
line per kernel: capability, type, sizes, name, kilobytes of shared memory. Written for Triton 3.3 or newer.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from karat_lite.kernels import fourier_programs
from karat_lite.kernels.fourier_triton import _plan

CASES = {  # type: (d, e, G), modular heads of ViT-Tiny and the largest full-rank heads
    torch.float16: [(64, 12, 3), (128, 128, 16)],
    torch.bfloat16: [(64, 12, 3), (128, 128, 16)],
    torch.float32: [(128, 128, 16)],
}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
NATIVE = {"q", "k", "own", "other", "result", "right"}  # in the inputs' type; the other pointers are float32


def compile_for(capability: int, kernel, dtype: torch.dtype, constants: dict, plan: dict):
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        known = constants | plan | ({name: 1} if name.endswith("_channel") else {})
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


def main(capabilities: list[int]) -> None:
    kernels = {
        "mix": {},
        "score_gradient": dict(KEYS=False),
        "score_gradient, keys": dict(KEYS=True),
        "right_gradient": dict(FIRST=0, COUNT=3),
        "key_and_right_gradient": {},
    }
    for capability in capabilities:
        for dtype, sizes in CASES.items():
            for d, e, grid in sizes:
                plan = _plan(torch.empty(1, 1, 1, d, dtype=dtype), torch.empty(1, 1, 2 * grid, 1, e, device="meta"))
                for name, constants in kernels.items():
                    if name == "key_and_right_gradient" and grid > 3:
                        continue
                    kernel = getattr(fourier_programs, name.split(",")[0])
                    made = compile_for(capability, kernel, dtype, constants, plan)
                    print(
                        f"{capability}; {NAMES[dtype]} d={d} e={e} G={grid}; {name}; {made.metadata.shared / 1024:.0f}"
                    )


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:]] or [80, 90])
