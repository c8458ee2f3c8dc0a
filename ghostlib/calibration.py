"""Calibration: one streaming pass of the dense model, from token windows to moments.

The pass serves any set of boundaries at once. It keeps no activation longer than the boundaries
that are open in the current window need it, stops the forward pass after the last boundary, and
never computes the language-model head.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.boundaries import Boundary, check_boundary
from ghostlib.collector import Calibration, Collector
from ghostlib.features import Regressor
from ghostlib.memory import calibration_bytes, require_memory
from ghostlib.models import EndOfPass, mlp_output, num_layers, receiver
from ghostlib.nested import widest
from ghostlib.placement import input_device
from ghostlib.progress import track


@contextmanager
def tap(
    model: PreTrainedModel, indices: Iterable[int], on_stream: Callable[[int, Tensor], None]
) -> Iterator[Callable[..., None]]:
    """Watch the residual stream where it enters layers ``indices`` (the layer count: final norm).

    Inside the context, calling the yielded function runs the model as far as the last index and no
    further; ``on_stream(index, hidden)`` receives each stream (batch, tokens, hidden) on the way.
    Forward pre-hooks are used because ``output_hidden_states`` gives its last entry after the final
    norm. The hooks are removed whatever happens.
    """
    wanted = sorted(set(indices))

    def hook_for(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            on_stream(index, args[0] if args else kwargs["hidden_states"])
            if index == wanted[-1]:
                raise EndOfPass

        return hook

    def run(**inputs: Tensor) -> None:
        try:
            with torch.no_grad():
                model(**inputs, use_cache=False)
        except EndOfPass:
            pass

    handles = []
    try:
        for index in wanted:
            module = receiver(model, index)
            handles.append(module.register_forward_pre_hook(hook_for(index), with_kwargs=True))
        yield run
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    boundaries: Iterable[Boundary | tuple[int, int]],
    *,
    attention_mask: Tensor | None = None,
    skip_leading: int = 0,
    batch_size: int = 1,
    moments: bool = True,
    mlp: bool = False,
    regressors: Iterable[str] = (),
) -> Calibration:
    """Collect the moments and similarities of every boundary in one pass over ``windows``.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids.
        boundaries: which blocks may be removed, in any number and overlapping as they like.
        attention_mask: (windows, length), 0 at padding; padding enters no statistic.
        skip_leading: how many of the first (unpadded) positions of each window to leave out. (For
            massive activations that is no remedy, see notebook 10: the model needs them repaired.)
        batch_size: windows per forward pass.
        moments: collect second moments; without them the pass gives similarities only.
        mlp: collect the moments that `replaceme` needs as well, for every boundary with a layer
            before it.
        regressors: what else to regress on, for every boundary: features and weights such as
            ``"x, n(x); 1/|y|"`` (see `ghostlib.features`), found by ``.of("x, n(x); 1/|y|")``;
            ``"stream"`` is always there, ``"mlp"`` is the same as ``mlp=True``. Of those with one
            weight, any whose features another has as well costs nothing.

    Returns:
        `Calibration`, a dictionary from `Boundary` to `Moments` (on the CPU, float64).

    Raises:
        ValueError: windows, mask or boundaries that do not fit the model, NaN or infinite
            activations (the message names the layer and the window), or regressors that are
            unknown, need moments, or do not suit the architecture.
        MemoryError: less memory is available than `calibration_bytes` says the pass will need.
    """
    asked = [check_boundary(b, num_layers(model)) for b in boundaries]
    if not asked:
        raise ValueError("no boundary to calibrate: name at least one, such as Boundary(12, 19)")
    check_windows(model, windows, attention_mask)
    if not 0 <= skip_leading < windows.shape[1]:
        raise ValueError(f"skip_leading must lie in 0 … {windows.shape[1] - 1}, got {skip_leading}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if attention_mask is None:
        attention_mask = torch.ones_like(windows)
    real = attention_mask.bool()
    used = real & (attention_mask.cumsum(1) > skip_leading)
    names = set(regressors) - {"stream"}
    mlp = mlp or "mlp" in names
    richer = widest(Regressor.parse(name) for name in names - {"mlp"})
    if richer and not moments:
        raise ValueError("regressors are collected as moments: leave moments=True")
    require_memory(
        calibration_bytes(
            model,
            asked,
            length=windows.shape[1],
            batch_size=batch_size,
            moments=moments,
            mlp=mlp,
            regressors=map(str, richer),
        )
    )
    device = input_device(model)

    collector = Collector(model, dict.fromkeys(asked), moments, mlp, richer)
    starts = range(0, len(windows), batch_size)
    with (
        tap(model, collector.indices, collector.on_stream) as run,
        listen(model, collector.mlps, collector.on_mlp),
    ):
        for first in track(starts, "calibrating", unit="batch"):
            rows = slice(first, first + batch_size)
            collector.begin(first, used[rows], real[rows])
            run(
                input_ids=windows[rows].to(device),
                attention_mask=attention_mask[rows].to(device),
            )
    return collector.result()


def check_windows(model: PreTrainedModel, windows: Tensor, mask: Tensor | None = None) -> None:
    """Raise `ValueError` unless ``windows`` is a non-empty (windows, length) tensor of ids."""
    if not isinstance(windows, Tensor) or windows.ndim != 2 or windows.is_floating_point():
        got = tuple(windows.shape) if isinstance(windows, Tensor) else type(windows).__name__
        raise ValueError(f"windows must be a (windows, length) tensor of token ids, got {got}")
    if windows.numel() == 0:
        raise ValueError(f"windows hold no token: shape {tuple(windows.shape)}")
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"token ids {low} … {high} do not fit a vocabulary of {model.config.vocab_size}: "
            "were the windows made with another model's tokenizer?"
        )
    if mask is not None and mask.shape != windows.shape:
        raise ValueError(
            f"attention_mask must have the windows' shape {tuple(windows.shape)}, "
            f"got {tuple(mask.shape)}"
        )


@contextmanager
def listen(
    model: PreTrainedModel, starts: Iterable[int], on_mlp: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Watch what the last MLP before each of ``starts`` adds to the stream."""
    handles = []
    try:
        for start in starts:
            handles.append(
                mlp_output(model, start - 1).register_forward_hook(
                    lambda module, args, output, start=start: on_mlp(start, output)
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
