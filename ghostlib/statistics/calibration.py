"""Calibration: one streaming pass of the dense model, from token windows to moments.

The pass serves any set of boundaries and regressors at once. It keeps no activation longer than the
boundaries that are open in the current window need it, stops after the last boundary, and never
computes the language-model head.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.common import at_least, checked, track
from ghostlib.models.architectures import check_model, fingerprint, hidden_size, num_layers
from ghostlib.models.boundaries import Boundary, check_boundary
from ghostlib.models.layers import has_bias, intermediate_size, listen, stream_norm
from ghostlib.models.placement import input_device
from ghostlib.models.streams import check_windows, tap
from ghostlib.statistics.features import STREAM, Regressor, Sources, widest
from ghostlib.statistics.moments import Moments, Stream

_DOUBLE, _SINGLE = 8, 4  # bytes of a float64 and of a float32
_VECTORS = 6  # of the stream's width, beside what has the features', in `Moments`
_CGROUP = Path("/sys/fs/cgroup")


class Similarity(NamedTuple):
    """How alike the stream is at both ends of a boundary, averaged over tokens.

    Attributes:
        cosine: mean over tokens of ``cos(x_start, x_stop)``, taken over channels.
        angular: mean of ``arccos(cos) / pi``, from 0 (same direction) to 1 (opposite).
    """

    cosine: float
    angular: float


class Calibration(dict[Boundary, Moments]):
    """What one pass collected: ``{Boundary: Moments}`` of the plain stream, and what stands beside.

    Boundaries with the same start share one Gram matrix in memory, unless tokens are weighted.

    Attributes:
        similarities: ``{Boundary: Similarity}``.
        collected: ``{(regressor, Boundary): Moments}`` of the widest regressors; `of` reads the
            narrower ones from their blocks.
        model: fingerprint of the model the activations come from.
        tokens: number of tokens used.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.similarities: dict[Boundary, Similarity] = {}
        self.collected: dict[tuple[Regressor, Boundary], Moments] = {}
        self.model = model
        self.tokens = 0
        self._parts: dict[tuple[Regressor, Boundary], Moments] = {}

    def of(self, regressor: Regressor | str) -> dict[Boundary, Moments]:
        """The moments of one regressor, wherever its features have been collected with its weight.

        A regressor that reads the MLP before the gap has none for a gap that starts at layer 0.

        Raises:
            ValueError: the pass did not collect them.
        """
        asked = Regressor.parse(regressor).generic
        if asked == STREAM and self:
            return dict(self)  # with what was put in by hand
        grams: dict[int, Tensor] = {}  # shared matrices stay shared when they are cut
        for (known, boundary), moments in self.collected.items():
            if known.contains(asked) and (asked, boundary) not in self._parts:
                norms = [f.norm for f in moments.regressor.features if f.norm]
                part = moments.part(asked.resolve(norms[0]) if norms else asked)
                part.G = grams.setdefault(id(moments.G), part.G)
                self._parts[asked, boundary] = part
        chosen = {b: part for (known, b), part in self._parts.items() if known == asked}
        if not chosen:
            raise ValueError(
                f"no moments of {asked} were collected: "
                f"calibrate(…, moments=True, regressors=['{asked}'])"
            )
        return chosen


@checked
def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    boundaries: Iterable[Boundary | tuple[int, int]],
    *,
    attention_mask: Tensor | None = None,
    skip_leading: int = 0,
    batch_size: int = 1,
    moments: bool = True,
    regressors: Iterable[Regressor | str] = (),
) -> Calibration:
    """Collect the moments and similarities of every boundary in one pass over ``windows``.

    Args:
        model: the dense model; it is not changed.
        windows: (windows, length) token ids.
        boundaries: which blocks may be removed, in any number and overlapping as they like.
        attention_mask: (windows, length), 0 at padding; padding enters no statistic.
        skip_leading: how many of the first (unpadded) positions of each window to leave out. (For
            massive activations that is no remedy, see notebook 13: the model needs them repaired.)
        batch_size: windows per forward pass.
        moments: collect second moments; without them the pass gives similarities only.
        regressors: what else to regress on beside the stream, for every boundary: a family's
            ``regressor``, or a spelling such as ``"x, n(x); 1/|y|"``; found by ``.of(…)``. Of those
            with one weight, any whose features another has as well costs nothing.

    Returns:
        `Calibration`, a dictionary from `Boundary` to `Moments` (on the CPU, float64).

    Raises:
        ValueError: windows, mask or boundaries that do not fit the model, NaN or infinite
            activations (the message names the layer and the window), a mask and ``skip_leading``
            that leave no token, or regressors that are unknown or that this architecture has no
            ground for.
        MemoryError: less memory is available than this needs (see `calibration_bytes`).
    """
    check_windows(model, windows, attention_mask)
    asked = [check_boundary(boundary, num_layers(model)) for boundary in boundaries]
    if not asked:
        raise ValueError("no boundary to calibrate: name at least one, such as Boundary(12, 19)")
    mask, real, used = usable(windows, attention_mask, skip_leading, batch_size)
    extra = [Regressor.parse(regressor).generic for regressor in regressors]
    if not moments and extra:
        raise ValueError("regressors are collected as moments: leave moments=True")
    sizes = {"length": windows.shape[1], "batch_size": batch_size}
    require_memory(calibration_bytes(model, asked, moments=moments, regressors=extra, **sizes))

    collector = _Collector(model, list(dict.fromkeys(asked)), {STREAM, *extra} if moments else ())
    device = input_device(model)
    with (
        listen(model, collector.mlps, collector.on_mlp),
        tap(model, collector.indices, collector.on_stream) as run,
    ):
        starts = range(0, len(windows), batch_size)
        for first in track(starts, "calibrating", unit="batch"):
            rows = slice(first, first + batch_size)
            collector.begin(first, used[rows], real[rows])
            run(input_ids=windows[rows].to(device), attention_mask=mask[rows].to(device))
    return collector.result()


def usable(
    windows: Tensor, mask: Tensor | None, skip_leading: int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention mask, tokens that are no padding, and those to learn from: (windows, length).

    Raises:
        ValueError: no token to learn from, a negative ``skip_leading``, a batch size below 1.
    """
    at_least(0, skip_leading=skip_leading)
    at_least(1, batch_size=batch_size)
    mask = torch.ones_like(windows) if mask is None else mask
    real = mask.bool()
    used = real & (mask.cumsum(1) > skip_leading)
    if not used.any():
        raise ValueError("the attention mask and skip_leading leave no token to learn from")
    return mask, real, used


def empty_moments(
    model: PreTrainedModel,
    boundary: Boundary,
    regressor: Regressor,
    name: str,
    device: torch.device | str = "cpu",
) -> Moments:
    """Moments of a gap, before any token, for a model of this fingerprint."""
    hidden, before = "hidden" in regressor.sources, boundary.start - 1
    return Moments(
        hidden_size(model),
        regressor=regressor,
        hidden=intermediate_size(model, before) if hidden else None,
        bias=hidden and has_bias(model, before),
        boundary=boundary,
        model=name,
        device=device,
    )


class _Open(NamedTuple):
    """A stream that has arrived, waiting for the boundaries that start there.

    ``sequences`` and ``designs`` have an entry for each sequence of the batch with a token to use;
    a design is the (tokens, p) features of one regressor.
    """

    sequences: list[Stream]
    directions: Tensor
    designs: dict[Regressor, list[Tensor]]


class _Collector:
    """Turns streams, as they pass, into moments and similarities."""

    def __init__(
        self, model: PreTrainedModel, boundaries: list[Boundary], regressors: Collection[Regressor]
    ) -> None:
        self.boundaries = boundaries
        self.indices = {index for boundary in boundaries for index in boundary}
        self.last_stop = _last_stops(boundaries)
        self.calibration = Calibration(fingerprint(model))
        # A stream may pass several devices; all that is made of it is made in one place.
        self.place = input_device(model)
        if self.place.type == "mps":  # which has no float64
            self.place = torch.device("cpu")
        # Known by the name it was asked for under, whatever this model's norm is.
        self.regressors = {
            start: {asked: suited(model, asked) for asked in widest_at(start, regressors)}
            for start in self.last_stop
        }
        self.mlps = {
            start
            for start, known in self.regressors.items()
            if any(regressor.reads_mlp for regressor in known)
        }
        for boundary in boundaries:
            for asked, regressor in self.regressors[boundary.start].items():
                name = self.calibration.model
                collected = empty_moments(model, boundary, regressor, name, self.place)
                if regressor.weight.name == "1":
                    # Boundaries with the same start share a Gram matrix.
                    collected.G = torch.empty(0)
                self.calibration.collected[asked, boundary] = collected
        self.grams: dict[tuple[Regressor, int], Tensor] = {}
        self.cosines = dict.fromkeys(boundaries, 0.0)
        self.angles = dict.fromkeys(boundaries, 0.0)

    def begin(self, first: int, used: Tensor, real: Tensor) -> None:
        """Prepare for the batch whose first window has number ``first``.

        Args:
            used: (windows, length) tokens to learn from.
            real: (windows, length) those that are no padding.
        """
        self.first, self.used, self.real = first, used.to(self.place), real.to(self.place)
        self.open: dict[int, _Open] = {}
        self.mlp: dict[int, tuple[Tensor, Tensor]] = {}
        self.calibration.tokens += int(used.sum())

    def on_mlp(self, start: int, hidden: Tensor, output: Tensor) -> None:
        """Keep what the down-projection before layer ``start`` read and returned."""
        # OPT flattens the batch before its MLP.
        read, returned = (t.view(*self.used.shape, -1).to(self.place) for t in (hidden, output))
        self.mlp[start] = (read, returned)

    def on_stream(self, index: int, stream: Tensor) -> None:
        """Close the boundaries that stop at ``index``, then open those that start there."""
        if not torch.isfinite(stream).all():
            bad = (~torch.isfinite(stream)).flatten(1).any(1).nonzero()[0].item()
            raise ValueError(
                f"the input of layer {index} has NaN or infinite activations in window "
                f"{self.first + bad}: use a wider dtype (bfloat16 or float32) or another window"
            )
        arrived = self._arrive(index, stream.to(self.place))
        for boundary in self.boundaries:
            if boundary.stop == index:
                self._close(boundary, self.open[boundary.start], arrived)
        if index in self.last_stop:
            self.open[index] = arrived
        self.open = {s: waiting for s, waiting in self.open.items() if self.last_stop[s] > index}

    def _arrive(self, index: int, stream: Tensor) -> _Open:
        rows = list(zip(stream, self.used, strict=True))
        wanted = bool(self.calibration.collected)
        sequences = [Stream.of(x[u]) for x, u in rows if u.any()] if wanted else []
        directions = nn.functional.normalize(stream[self.used].float(), dim=-1)
        designs: dict[Regressor, list[Tensor]] = {}
        mlp = self.mlp.pop(index, ())
        for asked, regressor in self.regressors.get(index, {}).items():
            if regressor.features == STREAM.features:
                designs[asked] = [sequence.values for sequence in sequences]
            else:
                designs[asked] = self._designs(regressor, Sources(stream, *mlp))
            if regressor.weight.name == "1" and designs[asked]:
                gram = torch.stack([F.T @ F for F in designs[asked]]).sum(0)
                key = asked, index
                self.grams[key] = self.grams[key] + gram if key in self.grams else gram
        return _Open(sequences, directions, designs)

    def _designs(self, regressor: Regressor, sources: Sources) -> list[Tensor]:
        """(tokens, p) features of every sequence that has a token to use."""
        designs = []
        for row, (used, real) in enumerate(zip(self.used, self.real, strict=True)):
            if used.any():
                one = sources.map(lambda part, row=row: part[row].double())  # type: ignore[misc]
                designs.append(regressor.design(one, real)[used])
        return designs

    def _close(self, boundary: Boundary, before: _Open, after: _Open) -> None:
        cosine = torch.linalg.vecdot(before.directions, after.directions).clamp(-1, 1)
        self.cosines[boundary] += float(cosine.double().sum())
        self.angles[boundary] += float(cosine.double().arccos().sum() / torch.pi)
        for asked, regressor in self.regressors[boundary.start].items():
            moments = self.calibration.collected[asked, boundary]
            alone = regressor.weight.name != "1"
            rows = zip(before.designs[asked], before.sequences, after.sequences, strict=True)
            for F, x, y in rows:
                moments.add_sequence(F, x, y, with_gram=alone)

    def result(self) -> Calibration:
        """The finished `Calibration`, its moments on the CPU."""
        calibration = self.calibration
        shared = {key: gram.cpu() for key, gram in self.grams.items()}
        for (asked, boundary), moments in calibration.collected.items():
            moved = moments.to("cpu")
            if (asked, boundary.start) in shared:
                moved.G = shared[asked, boundary.start]
            calibration.collected[asked, boundary] = moved
        if calibration.collected:
            calibration.update(calibration.of(STREAM))
        for boundary in self.boundaries:
            calibration.similarities[boundary] = Similarity(
                self.cosines[boundary] / calibration.tokens,
                self.angles[boundary] / calibration.tokens,
            )
        return calibration


def _last_stops(boundaries: Iterable[Boundary]) -> dict[int, int]:
    """Where the stream of each start is no longer needed."""
    last: dict[int, int] = {}
    for start, stop in boundaries:
        last[start] = max(stop, last.get(start, stop))
    return last


def widest_at(start: int, regressors: Iterable[Regressor]) -> list[Regressor]:
    """What to collect for a gap that starts here; nothing of an MLP where none is before it."""
    return widest(r for r in regressors if start > 0 or not r.reads_mlp)


def suited(model: PreTrainedModel, regressor: Regressor) -> Regressor:
    """``regressor`` with the normalised features that the layers of ``model`` read.

    Raises:
        ValueError: it asks for a normalised stream, and they read the stream itself.
    """
    return regressor.resolve(stream_norm(model)) if regressor.normalised else regressor


# ---------------------------------------------------------------- memory


class CalibrationBytes(NamedTuple):
    """What one pass of `calibrate` needs beside the model and its forward pass, in bytes.

    Attributes:
        moments: kept until the end: Gram matrices, cross moments and column sums.
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


@checked
def calibration_bytes(
    model: PreTrainedModel | int,
    boundaries: Iterable[Boundary | tuple[int, int]],
    *,
    length: int = 2048,
    batch_size: int = 1,
    moments: bool = True,
    regressors: Iterable[Regressor | str] = (),
    hidden: int | None = None,
) -> CalibrationBytes:
    """Count the memory of a calibration beforehand; the number of windows does not enter.

    Args:
        model: the dense model, or just its width.
        boundaries: those to be calibrated, in any number and overlapping as they like.
        length: tokens of a window.
        batch_size: windows of a forward pass.
        moments: as in `calibrate`; without them only directions are kept, in float32.
        regressors: as in `calibrate`, which collects the widest of them.
        hidden: width of the MLP, where only the model's width is given and a regressor needs it.

    Raises:
        ValueError: a width, length or batch size below 1, or no boundary.

    >>> calibration_bytes(4096, [(20, 27)]).moments / 1e6  # 2 x 4096 x 4096 x 8 bytes, and sums
    268.664832
    """
    if not isinstance(model, int) or isinstance(model, bool):
        check_model(model)
    width = model if isinstance(model, int) else hidden_size(model)
    at_least(1, width=width, length=length, batch_size=batch_size, hidden=hidden)
    asked = set(map(check_boundary, boundaries))
    if not asked:
        raise ValueError("no boundary to count: name at least one, such as Boundary(12, 19)")
    last_stop = _last_stops(asked)
    waiting = max(  # a stream that arrives is read beside all that wait for it or pass it by
        1 + sum(start < index <= stop for start, stop in last_stop.items())
        for index in {index for boundary in asked for index in boundary}
    )
    stream = batch_size * length * width
    if not moments:
        return CalibrationBytes(0, waiting * stream * _SINGLE, 2 * stream * _SINGLE)
    known = {STREAM, *(Regressor.parse(regressor).generic for regressor in regressors)}
    reads_hidden = any("hidden" in regressor.sources for regressor in known)
    kept, designs, widest_design = 0, 0, 0
    for start in last_stop:
        if reads_hidden and start > 0 and not isinstance(model, int):
            hidden = intermediate_size(model, start - 1)
        gaps = sum(boundary.start == start for boundary in asked)
        built = 0
        for regressor in widest_at(start, known):
            p = sum(regressor.widths(width, hidden))
            grams = 1 if regressor.weight.name == "1" else gaps
            kept += (grams * p * p + gaps * (p * width + p + _VECTORS * width)) * _DOUBLE
            built += 0 if regressor.features == STREAM.features else p
            widest_design = max(widest_design, p)
        designs = max(designs, batch_size * length * built * _DOUBLE)
    return CalibrationBytes(
        moments=kept,
        streams=waiting * (stream * (_DOUBLE + _SINGLE) + designs),
        working=max(2 * batch_size, 2) * widest_design**2 * _DOUBLE
        + 2 * length * (width + 2 * widest_design) * _DOUBLE,
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
        parts = ", ".join(f"{name} {readable(count)}" for name, count in needed._asdict().items())
        raise MemoryError(
            f"this calibration needs {readable(needed.total)} of memory ({parts}) and "
            f"{readable(available)} are available: name fewer boundaries or use shorter windows"
        )


def readable(count: int) -> str:
    """Bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
