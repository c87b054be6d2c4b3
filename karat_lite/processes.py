"""Where a training computes: one device or several processes. All that the loop needs of accelerate stands here."""

import sys

import torch
from torch import Tensor, nn

from .checks import one_of
from .recipes import PRECISIONS


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" takes a GPU if there is one. Raises `ValueError` for a device that this machine does not have."""
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if str(device) == "auto":
        return torch.device(there[1] if len(there) > 1 else "cpu")
    return torch.device(one_of("device (or not on this machine)", str(device), there))


class Engine:
    """device; part = (number of this process, how many there are); first: whether this process writes and shows."""

    def __init__(self, device: torch.device, precision: str = "float32"):
        from accelerate import Accelerator

        if precision == "float16" and device.type == "cpu":
            raise ValueError("precision float16 is for GPUs, a CPU computes it in float32: take bfloat16 or float32.")
        if device.index is not None:
            torch.cuda.set_device(device)
        _forget()
        self._accelerate = Accelerator(cpu=device.type == "cpu", mixed_precision=PRECISIONS[precision])
        self.device = self._accelerate.device
        self.part = (self._accelerate.process_index, self._accelerate.num_processes)
        self.first = self._accelerate.is_main_process
        self.scales = self._accelerate.scaler is not None  # gradients of float16, and leaves out steps that overflow
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # `peak_memory` is this training's, not an earlier one's

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        """What to call for a training step, and the optimiser to step. `model` itself stays as it is, for tests."""
        return self._accelerate.prepare(_Around(model), optimizer)

    def release(self) -> None:
        """Let go of what `prepare` made."""
        self._accelerate.free_memory()
        _forget()

    def backward(self, loss: Tensor) -> None:
        self._accelerate.backward(loss)

    def clip(self, parameters, norm: float) -> Tensor:
        """Scale all gradients down where their common norm exceeds `norm`; returns the norm before."""
        return self._accelerate.clip_grad_norm_(parameters, norm)

    def mean(self, value: Tensor) -> float:
        """The mean of one number over all processes."""
        return self._accelerate.reduce(value, "mean").item()

    def total(self, values: Tensor) -> Tensor:
        """Sums over all processes, on the CPU."""
        return self._accelerate.reduce(values.to(self.device), "sum").cpu() if self.part[1] > 1 else values

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerate.wait_for_everyone()

    def state(self) -> dict:
        """What a resumed training needs: the scaler of half-precision gradients, and the global random numbers, which
        models with dropout draw."""
        scaler, gpu = self._accelerate.scaler, self.device.type == "cuda"
        return {
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if gpu else None,
        }

    def load(self, state: dict) -> None:
        if state["scaler"] is not None:
            self._accelerate.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if state["random_gpu"] is not None:
            torch.cuda.set_rng_state(state["random_gpu"], self.device)


def _forget() -> None:
    """accelerate keeps device and precision of the first training for the whole process, and its launcher starts others
    only where it has none. A notebook trains more than once; processes that were started together stay as they are."""
    from accelerate.state import AcceleratorState, PartialState

    if AcceleratorState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)


class _Around(nn.Module):
    """accelerate changes the forward of what it prepares (half precision): of this shell, and not of the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that PyTorch held on a GPU since the last `Engine` was made, or the process elsewhere since it
    began; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
