"""Calibration: one streaming pass of the dense model, from token windows to moments.

The pass serves any set of boundaries at once. It keeps no activation longer than the boundaries
that are open in the current window need it, stops the forward pass after the last boundary, and
never computes the language-model head.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.common import track
from ghostlib.models.architectures import fingerprint, hidden_size, num_layers
from ghostlib.models.boundaries import Boundary, check_boundary
from ghostlib.models.layers import listen, stream_norm
from ghostlib.models.placement import input_device
from ghostlib.models.streams import check_windows, tap
from ghostlib.statistics.features import Regressor, contains, observe, part, widest
from ghostlib.statistics.moments import Moments, Stream

_DOUBLE, _SINGLE = 8, 4  # bytes of a float64 and of a float32
_VECTORS = 7  # of one width, beside G and B, in `Moments`
_CGROUP = Path("/sys/fs/cgroup")


class CalibrationBytes(NamedTuple):
    """What one pass of `calibrate` needs beside the model and its forward pass, in bytes.

    Attributes:
        moments: kept until the end: a Gram matrix for each start, cross moments and column sums
            for each boundary.
        streams: activations waiting for the boundaries that are open, where most are open at once.
        working: temporaries while one sequence is added to the sums, an upper estimate.
    """

    moments: int
    streams: int
    working: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self)


def calibration_bytes(
    model: PreTrainedModel | int,
    boundaries: Iterable[Boundary | tuple[int, int]],
    *,
    length: int = 2048,
    batch_size: int = 1,
    moments: bool = True,
    mlp: bool = False,
    regressors: Iterable[str] = (),
) -> CalibrationBytes:
    """Count the memory of a calibration beforehand; the number of windows does not enter.

    Args:
        model: the dense model, or just its width.
        boundaries: those to be calibrated, in any number and overlapping as they like.
        length, batch_size: tokens of a window, windows of a forward pass.
        moments, mlp: as in `calibrate`; without moments only directions are kept, in float32; with
            those of the MLP there is twice as much of everything, at most.
        regressors: as in `calibrate`, which collects the widest of them. With k features a boundary
            has k^2 + k more matrices of its own, and working space for one Gram matrix of k times
            the width.

    Raises:
        ValueError: a width, length or batch size below 1, or no boundary.

    >>> calibration_bytes(4096, [(20, 27)]).moments / 1e6  # 2 x 4096 x 4096 x 8 bytes, and sums
    268.664832
    """
    width = model if isinstance(model, int) else hidden_size(model)
    for name, value in (("width", width), ("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    asked = {Boundary(*boundary) for boundary in boundaries}
    if not asked:
        raise ValueError("no boundary to count: name at least one, such as Boundary(12, 19)")
    last_stop: dict[int, int] = {}
    for start, stop in asked:
        last_stop[start] = max(stop, last_stop.get(start, stop))
    waiting = max(  # a stream that arrives is read beside all that wait for it or pass it by
        1 + sum(start < index <= stop for start, stop in last_stop.items())
        for index in {index for boundary in asked for index in boundary}
    )
    matrix, stream = width**2 * _DOUBLE, batch_size * length * width
    if not moments:
        return CalibrationBytes(0, waiting * stream * _SINGLE, 2 * stream * _SINGLE)
    kinds = 2 if mlp else 1
    kept = (len(last_stop) + len(asked)) * matrix + len(asked) * _VECTORS * width * _DOUBLE
    widths = [len(r.features) for r in widest(map(Regressor.parse, regressors))]
    richer = sum((k * k + k) * matrix + (2 * k + 5) * width * _DOUBLE for k in widths)
    most = max(widths, default=0)
    return CalibrationBytes(
        moments=kinds * kept + len(asked) * richer,
        # For features the stream is kept as it came as well, in the model's dtype.
        streams=waiting * stream * (kinds * _DOUBLE + _SINGLE * (2 if widths else 1)),
        working=max(2 * batch_size, 2 * most**2) * matrix
        + (2 + 4 * most) * length * width * _DOUBLE,
    )


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory this process may still use: what the machine has left, or its container if less."""
    machine: int = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" where there is none
        used = int((cgroup / "memory.current").read_text())
        counters = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return machine
    held = used - int(counters.get("inactive_file", 0))  # the rest is a cache of files
    return min(machine, max(limit - held, 0))


def require_memory(needed: CalibrationBytes) -> None:
    """Refuse to begin a calibration that cannot end.

    Raises:
        MemoryError: fewer bytes are available; the message says how many of each.
    """
    available = available_bytes()
    if needed.total > available:
        parts = ", ".join(f"{name} {_readable(count)}" for name, count in needed._asdict().items())
        raise MemoryError(
            f"this calibration needs {_readable(needed.total)} of memory ({parts}) and "
            f"{_readable(available)} are available: name fewer boundaries or use shorter windows"
        )


def _readable(count: int) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


class Similarity(NamedTuple):
    """How alike the stream is at both ends of a boundary, averaged over tokens.

    ``cosine`` is the mean over tokens of ``cos(x_start, x_stop)``, taken over channels;
    ``angular`` the mean of ``arccos(cos) / pi``, from 0 (same direction) to 1 (opposite).
    """

    cosine: float
    angular: float


class Calibration(dict[Boundary, Moments]):
    """What one pass collected: ``{Boundary: Moments}``, and the similarities of each boundary.

    Moments of the stream of boundaries with the same start share one Gram matrix in memory.

    Attributes:
        similarities: ``{Boundary: Similarity}``.
        mlp: ``{Boundary: Moments}`` for `replaceme`, with the output of the last MLP before the
            boundary in place of ``X``; filled by ``calibrate(…, mlp=True)``.
        features: ``{(regressor, Boundary): Moments}`` of features of the stream, those that were
            collected and those that `of` has cut out of them.
        model: fingerprint of the model the activations come from.
        tokens: number of tokens used.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.similarities: dict[Boundary, Similarity] = {}
        self.mlp: dict[Boundary, Moments] = {}
        self.features: dict[tuple[str, Boundary], Moments] = {}
        self.model = model
        self.tokens = 0

    def of(self, regressor: str) -> dict[Boundary, Moments]:
        """The moments of one regressor: ``"stream"``, ``"mlp"``, or features of the stream.

        Those of some of the features that were collected with the same weight are part of what was.

        Raises:
            ValueError: the pass did not collect them.
        """
        if regressor in ("stream", "mlp"):
            return self if regressor == "stream" else self.mlp
        asked = Regressor.parse(regressor)
        for (name, boundary), moments in list(self.features.items()):
            known = Regressor.parse(name)
            if (regressor, boundary) not in self.features and contains(known, asked):
                places = [known.features.index(feature) for feature in asked.features]
                self.features[regressor, boundary] = part(moments, places)
        found = {b: moments for (name, b), moments in self.features.items() if name == regressor}
        if not found:
            raise ValueError(
                f"no moments of {regressor} were collected: "
                f"calibrate(…, regressors=[{regressor!r}])"
            )
        return found


class _Open(NamedTuple):
    """A stream waiting for the boundaries that start there, one entry a sequence of the batch."""

    sequences: list[Stream] | None
    directions: Tensor
    mlp: list[Stream] | None
    hidden: Tensor | None  # all tokens, for features that look back


def _add_grams(grams: dict[int, Tensor], index: int, sequences: list[Stream] | None) -> None:
    if sequences:
        gram = torch.stack([x.gram() for x in sequences]).sum(0)
        grams[index] = grams[index] + gram if index in grams else gram


def _without_gram(moments: Moments) -> Moments:
    """Boundaries with the same start share a Gram matrix; one of their own would stay zero."""
    moments.G = torch.empty(0)
    return moments


class Collector:
    """Turns streams, as they pass, into moments and similarities."""

    def __init__(
        self,
        model: PreTrainedModel,
        asked: Iterable[Boundary],
        moments: bool,
        mlp: bool,
        regressors: Iterable[Regressor] = (),
    ) -> None:
        self.boundaries = list(asked)
        self.moments = moments
        self.mlps = {b.start for b in self.boundaries if b.start > 0 and moments and mlp}
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
            about: dict[str, Any] = {
                "boundary": boundary,
                "model": self.calibration.model,
                "device": self.home,
            }
            self.calibration[boundary] = _without_gram(Moments(width, **about))
            if boundary.start in self.mlps:
                mlp_moments = Moments(width, regressor="mlp", **about)
                self.calibration.mlp[boundary] = _without_gram(mlp_moments)
            for regressor in regressors:
                # Known by the name it was asked for under, whatever this model's norm is.
                self.calibration.features[str(regressor), boundary] = Moments(
                    len(regressor.features) * width,
                    width,
                    regressor=str(suited(model, regressor)),
                    **about,
                )
        self.grams: dict[int, Tensor] = {}
        self.mlp_grams: dict[int, Tensor] = {}
        self.cosines = dict.fromkeys(self.boundaries, 0.0)
        self.angles = dict.fromkeys(self.boundaries, 0.0)

    def begin(self, first: int, used: Tensor, real: Tensor | None = None) -> None:
        """Prepare for the batch whose first window has number ``first``.

        Args:
            used: (windows, length) tokens to learn from. real: all that are no padding.
        """
        self.first, self.used = first, used
        self.real = used if real is None else real
        self.open: dict[int, _Open] = {}
        self.heard: dict[int, list[Stream]] = {}
        self.calibration.tokens += int(used.sum())

    def on_stream(self, index: int, hidden: Tensor) -> None:
        """Close the boundaries that stop at ``index``, then open those that start there."""
        if not torch.isfinite(hidden).all():
            bad = (~torch.isfinite(hidden)).flatten(1).any(1).nonzero()[0].item()
            raise ValueError(
                f"the input of layer {index} has NaN or infinite activations in window "
                f"{self.first + bad}: use a wider dtype (bfloat16 or float32) or another window"
            )
        hidden = hidden.to(self.home)
        stream = _Open(
            self._sequences(hidden) if self.moments else None,
            nn.functional.normalize(hidden[self.used.to(self.home)].float(), dim=-1),
            self.heard.pop(index, None),
            hidden if self.calibration.features else None,
        )
        for boundary in self.boundaries:
            if boundary.stop == index:
                self._close(boundary, self.open[boundary.start], stream)
        if index in self.last_stop:
            self.open[index] = stream
            _add_grams(self.grams, index, stream.sequences)
            _add_grams(self.mlp_grams, index, stream.mlp)
        self.open = {s: waiting for s, waiting in self.open.items() if self.last_stop[s] > index}

    def on_mlp(self, start: int, output: Tensor) -> None:
        """Keep what the MLP before layer ``start`` returned until the stream gets there."""
        # OPT flattens the batch before its MLP.
        self.heard[start] = self._sequences(output.view(*self.used.shape, -1).to(self.home))

    def _sequences(self, hidden: Tensor) -> list[Stream]:
        used = self.used.to(self.home)
        return [Stream.of(h[u]) for h, u in zip(hidden, used, strict=True) if u.any()]

    def _close(self, boundary: Boundary, before: _Open, after: _Open) -> None:
        cosine = torch.linalg.vecdot(before.directions, after.directions).clamp(-1, 1)
        self.cosines[boundary] += float(cosine.double().sum())
        self.angles[boundary] += float(cosine.double().arccos().sum() / torch.pi)
        for x, y in zip(before.sequences or (), after.sequences or (), strict=True):
            self.calibration[boundary].add_sequence(x, y)
        if before.mlp is not None and boundary in self.calibration.mlp:
            for F, x, y in zip(
                before.mlp, before.sequences or (), after.sequences or (), strict=True
            ):
                target = Stream.of(F.values + (y.values - x.values))
                self.calibration.mlp[boundary].add_sequence(F, target)
        for (_, known), moments in self.calibration.features.items():
            if known == boundary and before.hidden is not None and after.hidden is not None:
                used, real = self.used.to(self.home), self.real.to(self.home)
                for x, y, r, u in zip(before.hidden, after.hidden, real, used, strict=True):
                    if u.any():
                        observe(moments, x, y, r, u)

    def result(self) -> Calibration:
        """The finished `Calibration`, its moments on the CPU."""
        calibration = self.calibration
        if calibration.tokens == 0:
            raise ValueError("the attention mask and skip_leading leave no token to calibrate with")
        for collected, grams in ((calibration, self.grams), (calibration.mlp, self.mlp_grams)):
            shared = {start: gram.cpu() for start, gram in grams.items()}
            for boundary, moments in collected.items():
                moments = collected[boundary] = moments.to("cpu")
                moments.G = shared[boundary.start]  # by all boundaries with the same start
        for key, moments in calibration.features.items():
            calibration.features[key] = moments.to("cpu")
        for boundary in self.boundaries:
            calibration.similarities[boundary] = Similarity(
                self.cosines[boundary] / calibration.tokens,
                self.angles[boundary] / calibration.tokens,
            )
        return calibration


def suited(model: PreTrainedModel, regressor: Regressor) -> Regressor:
    """``regressor`` with the normalised features that the layers of ``model`` read.

    Raises:
        ValueError: it asks for a normalised stream, and they read the stream itself.
    """
    return regressor.resolve(stream_norm(model)) if regressor.normalised else regressor


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
            ``"x, n(x); 1/|y|"`` (see `Regressor`), found by ``.of("x, n(x); 1/|y|")``;
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
