"""Where accelerate has put a model: every module may compute on a device of its own.

Offloaded weights stand in the model as empty "meta" tensors; each forward pass of their module
loads them onto its execution device and drops them again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device on which the model's embeddings are looked up."""
    return compute_device(model.get_input_embeddings())


def check_device(device: Any) -> None:
    """Refuse a device that is not there.

    Raises:
        ValueError: such a device, and what torch says of it.
    """
    try:
        if device is None:
            raise TypeError("None")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # without it built in: the second
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}): name another") from None


def compute_device(module: nn.Module) -> torch.device:
    """The device ``module`` computes on: that of its first weight, wherever that is offloaded to.

    Raises:
        ValueError: it has no weights in memory and no accelerate hook that loads them.
    """
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    raise ValueError(_EMPTY.format(type(module).__name__))


def loaded_parameters(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of ``module`` as `nn.Module.parameters` orders them, offloaded ones loaded.

    Raises:
        ValueError: a weight is nowhere, or offloaded with its whole block
            (``preload_module_classes``).
    """
    for part in module.modules():
        with align_module_device(part):
            for parameter in part.parameters(recurse=False):
                if parameter.device.type == "meta":
                    raise ValueError(_EMPTY.format(type(part).__name__))
                yield parameter


def offload_stores(model: PreTrainedModel) -> Iterator[Any]:
    """What hooks keep of the model's weights outside of it; a copy of the model can share them."""
    for hook in _hooks(model):
        yield from (hook.weights_map, hook.tied_params_map)


def release_movers(copied: PreTrainedModel, original: PreTrainedModel) -> None:
    """Delete from a copy the methods, such as ``to``, that accelerate bound to the original."""
    for name, value in list(vars(copied).items()):
        if getattr(getattr(value, "__wrapped__", None), "__self__", None) is original:
            delattr(copied, name)


_EMPTY = (
    "the weights of a {} are on the meta device, and no accelerate hook of its own loads them: "
    "load the model with from_pretrained(folder, device_map=…), without preload_module_classes"
)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's placement hooks in ``module`` and all its parts."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            if hasattr(single, "weights_map"):
                yield single
