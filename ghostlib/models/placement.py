"""Placement by accelerate, which may give every module a device of its own.

Offloaded weights are empty "meta" tensors in the model; each forward pass of their module loads
them onto its execution device and drops them again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of token ids, on which the embeddings are looked up."""
    return compute_device(model.get_input_embeddings())


def check_device(device: Any) -> None:
    """Raise unless ``device`` is available.

    Raises:
        ValueError: it is not; the message quotes torch.
    """
    try:
        if device is None:
            raise TypeError("None")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: not built in
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}): name another") from None


def compute_device(module: nn.Module) -> torch.device:
    """The device on which ``module`` computes: that of its first weight once it is loaded.

    Raises:
        ValueError: its weights are neither in memory nor loaded by an accelerate hook.
    """
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    raise ValueError(_EMPTY.format(type(module).__name__))


def loaded_parameters(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of ``module`` in the order of `nn.Module.parameters`, loaded if offloaded.

    Raises:
        ValueError: a weight has no values, or is offloaded with its block
            (``preload_module_classes``).
    """
    for part in module.modules():
        with align_module_device(part):
            for parameter in part.parameters(recurse=False):
                if parameter.device.type == "meta":
                    raise ValueError(_EMPTY.format(type(part).__name__))
                yield parameter


def offload_stores(model: PreTrainedModel) -> Iterator[Any]:
    """The stores of offloaded weights in the hooks, which a copy of the model can share."""
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
    """Placement hooks of accelerate on ``module`` and its submodules."""
    for part in module.modules():
        chain = getattr(part, "_hf_hook", None)
        for hook in getattr(chain, "hooks", (chain,)):
            if hasattr(hook, "weights_map"):
                yield hook
