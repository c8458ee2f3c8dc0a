"""Importance of a layer by first-order Taylor expansion of the loss in its weights."""

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from ghostlib.calibration import check_windows
from ghostlib.models import decoder_layers
from ghostlib.placement import input_device
from ghostlib.progress import track


def taylor_importance(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """``sum |w dL/dw|`` over the weights of each layer (Shortened LLaMA, arXiv 2402.02834).

    To first order, setting the weight ``w`` to zero changes the loss ``L`` by ``-w dL/dw``. ``L``
    is the mean negative log-likelihood over ``windows``, one backward pass each; the gradients of a
    weight are summed over windows before the absolute value, as the published code does.

    Args:
        model: the dense model; neither its weights nor their ``.grad`` are touched.
        windows: (windows, length) token ids.

    Returns:
        One number a layer, in nats.
    """
    check_windows(model, windows)
    layer_of = {
        id(parameter): index
        for index, layer in enumerate(decoder_layers(model))
        for parameter in layer.parameters()
    }
    # Detached views with gradients of their own, so that the model's parameters keep theirs.
    weights = {
        name: parameter.detach().requires_grad_()
        for name, parameter in model.named_parameters()
        if id(parameter) in layer_of
    }
    owner = [layer_of[id(p)] for p in model.parameters() if id(p) in layer_of]
    totals = [torch.zeros_like(weight) for weight in weights.values()]
    for ids in track(windows.to(input_device(model)).split(1), "differentiating"):
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        loss = functional_call(model, weights, (), inputs).loss / len(windows)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient
    importance = [0.0] * len(decoder_layers(model))
    for index, weight, total in zip(owner, weights.values(), totals, strict=True):
        importance[index] += float((weight.detach() * total).abs().sum(dtype=torch.float64))
    return importance
