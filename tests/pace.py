"""How fast the machine is just now: budgets in seconds are for two quiet cores, and machines differ."""

import subprocess
import sys
import time

YARDSTICK = """
import torch
net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
for _ in range(500):
    net(torch.randn(64, 17, 64)).square().mean().backward()
"""
QUIET = 4.0  # seconds that it takes on two quiet cores, for which the budgets are


def slowness() -> float:
    """How many times longer than on two quiet cores it takes to start Python and train in small steps, which is what
    notebooks spend their time on: 1 to 3, no excuse beyond that."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", YARDSTICK], check=True)
    return min(3.0, max(1.0, (time.perf_counter() - start) / QUIET))
