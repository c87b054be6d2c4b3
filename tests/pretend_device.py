"""A device that is not here, in the CPU's memory: what mixes it with the CPU, or asks it for float64, fails as there.

It is called mps: of the devices that torch knows, Apple's has no float64. Which tensors are there is an attribute of
theirs, that functions hand on to what they return.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

MPS, PLACES = torch.device("mps"), torch.device | str


def there(x) -> bool:
    return getattr(x, "far", False) if isinstance(x, Tensor) else x in (MPS, "mps")


def marked(out, far: bool):
    def mark(x):
        if far and x.dtype == torch.float64:
            raise TypeError("cannot convert an MPS tensor to float64: the framework does not know it")
        x.far = far
        return x

    return tree_map_only(Tensor, mark, out)


class PretendDevice(TorchFunctionMode):
    """`with PretendDevice() as far:` a model is moved by `far.move(model)`, tensors by `.to(tensor or device)`."""

    def __enter__(self):
        self.copy = copy = nn.Parameter.__deepcopy__  # makes a tensor that no function of torch has returned
        nn.Parameter.__deepcopy__ = lambda parameter, memo: marked(copy(parameter, memo), there(parameter))
        return super().__enter__()

    def __exit__(self, *error):
        nn.Parameter.__deepcopy__ = self.copy
        return super().__exit__(*error)

    def move(self, model):
        marked([*model.parameters(), *model.buffers()], True)
        return model

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = any(map(there, tensors))
        if name == "__get__" and func.__self__ is Tensor.device:
            return MPS if far else torch.device("cpu")
        if name in ("to", "cpu"):
            return self.moved(args[0], *(["cpu"] if name == "cpu" else args[1:]), **kwargs)
        if kwargs.get("device") is not None:
            far, kwargs["device"] = there(kwargs["device"]), "cpu"
        elif far and any(x.ndim > 0 and not there(x) for x in tensors):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found mps and cpu")
        return marked(func(*args, **kwargs), far)

    def moved(self, x, *goals, device=None, **options):
        """x.to(...): a tensor or a place among the goals decides where, a tensor or a type what it becomes."""
        places = [goal for goal in (*goals, device) if isinstance(goal, Tensor | PLACES)]
        types = [goal.dtype if isinstance(goal, Tensor) else goal for goal in goals if not isinstance(goal, PLACES)]
        out = x.to(*types, **options) if types or options else x
        return marked(out if out is not x else x.view_as(x), there(places[-1]) if places else there(x))
