"""Calibration: one streaming pass of the dense model, from token windows to moments.

The pass serves any set of boundaries at once. It keeps no activation longer than the boundaries
that are open in the current window need it, stops the forward pass after the last boundary, and
never computes the language-model head.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.boundaries import Boundary, check_boundary
from ghostlib.models import EndOfPass, fingerprint, hidden_size, num_layers, receiver
from ghostlib.moments import Moments
from ghostlib.placement import input_device
from ghostlib.progress import track
from ghostlib.streams import Stream


class Similarity(NamedTuple):
    """How alike the stream is at both ends of a boundary, averaged over tokens.

    ``cosine`` is the mean over tokens of ``cos(x_start, x_stop)``, taken over channels;
    ``angular`` the mean of ``arccos(cos) / pi``, from 0 (same direction) to 1 (opposite).
    """

    cosine: float
    angular: float


class Calibration(dict[Boundary, Moments]):
    """What one pass collected: ``{Boundary: Moments}``, and the similarities of each boundary.

    Moments of boundaries with the same start share one Gram matrix in memory.

    Attributes:
        similarities: ``{Boundary: Similarity}``.
        model: fingerprint of the model the activations come from.
        tokens: number of tokens used.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.similarities: dict[Boundary, Similarity] = {}
        self.model = model
        self.tokens = 0


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
) -> Calibration:
    """Collect the moments and similarities of every boundary in one pass over ``windows``.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids.
        boundaries: which blocks may be removed, in any number and overlapping as they like.
        attention_mask: (windows, length), 0 at padding; padding enters no statistic.
        skip_leading: how many of the first (unpadded) positions of each window to leave out, for
            instance 1 for the token that carries a massive activation.
        batch_size: windows per forward pass.
        moments: collect second moments; without them the pass gives similarities only.

    Returns:
        `Calibration`, a dictionary from `Boundary` to `Moments` (on the CPU, float64).

    Raises:
        ValueError: windows, mask or boundaries that do not fit the model, or NaN or infinite
            activations (the message names the layer and the window).
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
    used = attention_mask.bool() & (attention_mask.cumsum(1) > skip_leading)
    device = input_device(model)

    collector = _Collector(model, dict.fromkeys(asked), moments)
    starts = range(0, len(windows), batch_size)
    with tap(model, collector.indices, collector.on_stream) as run:
        for first in track(starts, "calibrating", unit="batch"):
            rows = slice(first, first + batch_size)
            collector.begin(first, used[rows])
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


class _Open(NamedTuple):
    """A stream waiting for the boundaries that start there, one entry a sequence of the batch."""

    sequences: list[Stream] | None
    directions: Tensor


class _Collector:
    """Turns streams, as they pass, into moments and similarities."""

    def __init__(self, model: PreTrainedModel, asked: Iterable[Boundary], moments: bool) -> None:
        self.boundaries = list(asked)
        self.moments = moments
        self.indices = {index for boundary in self.boundaries for index in boundary}
        self.last_stop: dict[int, int] = {}  # where the stream of each start is no longer needed
        for start, stop in self.boundaries:
            self.last_stop[start] = max(stop, self.last_stop.get(start, stop))
        self.calibration = Calibration(fingerprint(model))
        width = hidden_size(model)
        # A stream may pass several devices; all that is made of it is made in one place.
        self.home = input_device(model)
        if self.home.type == "mps":  # which has no float64
            self.home = torch.device("cpu")
        for boundary in self.boundaries if moments else ():
            self.calibration[boundary] = Moments(
                width, boundary=boundary, model=self.calibration.model, device=self.home
            )
        self.grams: dict[int, Tensor] = {}
        self.cosines = dict.fromkeys(self.boundaries, 0.0)
        self.angles = dict.fromkeys(self.boundaries, 0.0)

    def begin(self, first: int, used: Tensor) -> None:
        """Prepare for the batch whose first window has number ``first``."""
        self.first, self.used = first, used
        self.open: dict[int, _Open] = {}
        self.calibration.tokens += int(used.sum())

    def on_stream(self, index: int, hidden: Tensor) -> None:
        """Close the boundaries that stop at ``index``, then open those that start there."""
        if not torch.isfinite(hidden).all():
            bad = (~torch.isfinite(hidden)).flatten(1).any(1).nonzero()[0].item()
            raise ValueError(
                f"the input of layer {index} has NaN or infinite activations in window "
                f"{self.first + bad}: use a wider dtype (bfloat16 or float32) or another window"
            )
        hidden, used = hidden.to(self.home), self.used.to(self.home)
        stream = _Open(
            [Stream.of(h[u]) for h, u in zip(hidden, used, strict=True) if u.any()]
            if self.moments
            else None,
            nn.functional.normalize(hidden[used].float(), dim=-1),
        )
        for boundary in self.boundaries:
            if boundary.stop == index:
                self._close(boundary, self.open[boundary.start], stream)
        if index in self.last_stop:
            self.open[index] = stream
            if stream.sequences:
                gram = torch.stack([x.gram() for x in stream.sequences]).sum(0)
                self.grams[index] = self.grams[index] + gram if index in self.grams else gram
        self.open = {s: waiting for s, waiting in self.open.items() if self.last_stop[s] > index}

    def _close(self, boundary: Boundary, before: _Open, after: _Open) -> None:
        cosine = torch.linalg.vecdot(before.directions, after.directions).clamp(-1, 1)
        self.cosines[boundary] += float(cosine.double().sum())
        self.angles[boundary] += float(cosine.double().arccos().sum() / torch.pi)
        for x, y in zip(before.sequences or (), after.sequences or (), strict=True):
            self.calibration[boundary].add_sequence(x, y)

    def result(self) -> Calibration:
        """The finished `Calibration`, its moments on the CPU."""
        calibration = self.calibration
        if calibration.tokens == 0:
            raise ValueError("the attention mask and skip_leading leave no token to calibrate with")
        grams = {start: gram.cpu() for start, gram in self.grams.items()}
        for boundary, moments in calibration.items():
            moments = calibration[boundary] = moments.to("cpu")
            moments.G = grams[boundary.start]  # shared between boundaries with the same start
        for boundary in self.boundaries:
            calibration.similarities[boundary] = Similarity(
                self.cosines[boundary] / calibration.tokens,
                self.angles[boundary] / calibration.tokens,
            )
        return calibration
