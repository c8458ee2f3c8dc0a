"""Calibration: one streaming pass of the dense model, from token windows to moments.

The pass serves any set of boundaries and regressors at once. It frees each activation after the
last boundary that needs it, stops after the last boundary, and never computes the language-model
head.
"""

from collections.abc import Collection, Iterable, Sequence
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
_VECTORS = 6  # sums of the stream's width in `Moments`
_CGROUP = Path("/sys/fs/cgroup")


class Similarity(NamedTuple):
    """Similarity of the stream at both ends of a boundary, averaged over tokens.

    Attributes:
        cosine: mean over tokens of ``cos(x_start, x_stop)``, computed over channels.
        angular: mean of ``arccos(cos) / pi``, from 0 (same direction) to 1 (opposite).
    """

    cosine: float
    angular: float


class Calibration(dict[Boundary, Moments]):
    """Result of one pass: ``{Boundary: Moments}`` of the plain stream, with the attributes below.

    Boundaries with the same start share one Gram matrix in memory, unless tokens are weighted.

    Attributes:
        similarities: ``{Boundary: Similarity}``.
        collected: ``{(regressor, Boundary): Moments}`` of the widest regressors; `of` cuts the
            narrower ones from their blocks.
        model: fingerprint of the model.
        tokens: number of tokens used.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.similarities: dict[Boundary, Similarity] = {}
        self.collected: dict[tuple[Regressor, Boundary], Moments] = {}
        self.model = model
        self.tokens = 0
        self._parts: dict[Regressor, dict[Boundary, Moments]] = {}

    def of(self, regressor: Regressor | str) -> dict[Boundary, Moments]:
        """The moments of one regressor, by boundary.

        A regressor that reads the MLP before the gap has none for a gap that starts at layer 0.

        Raises:
            ValueError: the pass did not collect its features with its token weight.
        """
        narrow = Regressor.parse(regressor).generic
        if narrow == STREAM and self:
            return dict(self)  # including entries set by hand
        parts = self._parts.setdefault(narrow, {})
        grams: dict[int, Tensor] = {}  # boundaries that share a matrix share its part
        for (wide, boundary), moments in self.collected.items():
            if wide.contains(narrow) and boundary not in parts:
                norms = [f.norm for f in moments.regressor.features if f.norm]
                part = moments.part(narrow.resolve(norms[0]) if norms else narrow)
                part.G = grams.setdefault(id(moments.G), part.G)
                parts[boundary] = part
        if not parts:
            raise ValueError(
                f"no moments of {narrow} were collected: "
                f"calibrate(…, moments=True, regressors=['{narrow}'])"
            )
        return dict(parts)


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
        boundaries: the blocks that may be removed, in any number; they may overlap.
        attention_mask: (windows, length), 0 at padding; padding enters no statistic.
        skip_leading: number of leading (unpadded) positions of each window to leave out. (Not a
            remedy for massive activations, see notebook 13: the model needs them repaired.)
        batch_size: windows per forward pass.
        moments: collect second moments; without them the pass gives similarities only.
        regressors: further regressors besides the stream, for every boundary: a family's
            ``regressor``, or a spelling such as ``"x, n(x); 1/|y|"``; ``.of(…)`` returns their
            moments. A subset of another's features costs nothing at the same token weight.

    Returns:
        `Calibration`, a dictionary from `Boundary` to `Moments` (on the CPU, float64).

    Raises:
        ValueError: windows, mask or boundaries that do not fit the model, NaN or infinite
            activations (the message names the layer and the window), a mask and ``skip_leading``
            that leave no token, or regressors that are unknown or that the architecture does not
            support.
        MemoryError: less memory is available than this needs (see `calibration_bytes`).
    """
    check_windows(model, windows, attention_mask)
    gaps = [check_boundary(boundary, num_layers(model)) for boundary in boundaries]
    if not gaps:
        raise ValueError("no boundary to calibrate: name at least one, such as Boundary(12, 19)")
    mask, real, used = usable(windows, attention_mask, skip_leading, batch_size)
    extra = [Regressor.parse(regressor).generic for regressor in regressors]
    if not moments and extra:
        raise ValueError("regressors are collected as moments: leave moments=True")
    sizes = {"length": windows.shape[1], "batch_size": batch_size}
    require_memory(calibration_bytes(model, gaps, moments=moments, regressors=extra, **sizes))

    collector = _Collector(model, list(dict.fromkeys(gaps)), {STREAM, *extra} if moments else ())
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
    """The attention mask, the real tokens and the tokens to learn from, each (windows, length).

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
    """Moments of a gap, without tokens, for a model of this fingerprint."""
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


class _Batch(NamedTuple):
    """The stream at one layer, for a batch of windows.

    ``sequences`` and ``designs`` have an entry for each sequence of the batch with a token to use;
    a design is the (tokens, p) features of one regressor.
    """

    sequences: list[Stream]
    directions: Tensor
    designs: dict[Regressor, list[Tensor]]


class _Collector:
    """Accumulates moments and similarities from the streams of a pass."""

    def __init__(
        self, model: PreTrainedModel, boundaries: list[Boundary], regressors: Collection[Regressor]
    ) -> None:
        self.boundaries = boundaries
        self.indices = {index for boundary in boundaries for index in boundary}
        self.last_stop = dict(sorted(boundaries))  # of each start
        self.calibration = Calibration(fingerprint(model))
        # A stream may pass through several devices; its statistics are computed on one.
        self.device = input_device(model)
        if self.device.type == "mps":  # which has no float64
            self.device = torch.device("cpu")
        # By generic regressor, whatever the norm of this model.
        self.regressors = {
            start: {generic: suited(model, generic) for generic in widest_at(start, regressors)}
            for start in self.last_stop
        }
        self.mlps = {s for s in self.last_stop if any(r.reads_mlp for r in self.regressors[s])}
        for boundary in boundaries:
            for generic, regressor in self.regressors[boundary.start].items():
                name = self.calibration.model
                moments = empty_moments(model, boundary, regressor, name, self.device)
                if regressor.weight.name == "1":
                    # Boundaries with the same start share a Gram matrix.
                    moments.G = torch.empty(0)
                self.calibration.collected[generic, boundary] = moments
        self.grams: dict[tuple[Regressor, int], Tensor] = {}
        self.cosines = dict.fromkeys(boundaries, 0.0)
        self.angles = dict.fromkeys(boundaries, 0.0)

    def begin(self, first: int, used: Tensor, real: Tensor) -> None:
        """Prepare for the batch whose first window has number ``first``.

        Args:
            used: (windows, length) tokens to learn from.
            real: (windows, length) tokens that are not padding.
        """
        self.first, self.used, self.real = first, used.to(self.device), real.to(self.device)
        self.open: dict[int, _Batch] = {}
        self.mlp: dict[int, Sequence[Tensor]] = {}
        self.calibration.tokens += int(used.sum())

    def on_mlp(self, start: int, hidden: Tensor, output: Tensor) -> None:
        """Store input and output of the down-projection before layer ``start``."""
        # OPT flattens the batch before its MLP.
        self.mlp[start] = [t.view(*self.used.shape, -1).to(self.device) for t in (hidden, output)]

    def on_stream(self, index: int, stream: Tensor) -> None:
        """Close the boundaries that stop at ``index`` and open those that start there."""
        if not torch.isfinite(stream).all():
            bad = (~torch.isfinite(stream)).flatten(1).any(1).nonzero()[0].item()
            raise ValueError(
                f"the input of layer {index} has NaN or infinite activations in window "
                f"{self.first + bad}: use a wider dtype (bfloat16 or float32) or another window"
            )
        batch = self._batch(index, stream.to(self.device))
        for boundary in self.boundaries:
            if boundary.stop == index:
                self._close(boundary, self.open[boundary.start], batch)
        if index in self.last_stop:
            self.open[index] = batch
        self.open = {s: batch for s, batch in self.open.items() if self.last_stop[s] > index}

    def _batch(self, index: int, stream: Tensor) -> _Batch:
        sequences = []
        if self.calibration.collected:
            rows = zip(stream, self.used, strict=True)
            sequences = [Stream.of(x[used]) for x, used in rows if used.any()]
        directions = nn.functional.normalize(stream[self.used].float(), dim=-1)
        designs: dict[Regressor, list[Tensor]] = {}
        sources = Sources(stream, *self.mlp.pop(index, ()))
        for generic, regressor in self.regressors.get(index, {}).items():
            if regressor.features == STREAM.features:
                designs[generic] = [sequence.values for sequence in sequences]
            else:
                designs[generic] = self._designs(regressor, sources)
            if regressor.weight.name == "1" and designs[generic]:
                gram = torch.stack([F.T @ F for F in designs[generic]]).sum(0)
                self.grams[generic, index] = gram + self.grams.get((generic, index), 0)
        return _Batch(sequences, directions, designs)

    def _designs(self, regressor: Regressor, sources: Sources) -> list[Tensor]:
        """(tokens, p) features of every sequence with a token to use."""
        designs = []
        for row, (used, real) in enumerate(zip(self.used, self.real, strict=True)):
            if used.any():
                one = sources.map(lambda source, row=row: source[row].double())  # type: ignore[misc]
                designs.append(regressor.design(one, real)[used])
        return designs

    def _close(self, boundary: Boundary, before: _Batch, after: _Batch) -> None:
        cosine = torch.linalg.vecdot(before.directions, after.directions).clamp(-1, 1).double()
        self.cosines[boundary] += float(cosine.sum())
        self.angles[boundary] += float(cosine.arccos().sum() / torch.pi)
        for generic, regressor in self.regressors[boundary.start].items():
            moments = self.calibration.collected[generic, boundary]
            rows = zip(before.designs[generic], before.sequences, after.sequences, strict=True)
            for F, x, y in rows:
                moments.add_sequence(F, x, y, with_gram=regressor.weight.name != "1")

    def result(self) -> Calibration:
        """The finished `Calibration`, its moments on the CPU."""
        calibration = self.calibration
        shared = {key: gram.cpu() for key, gram in self.grams.items()}
        for (generic, boundary), moments in calibration.collected.items():
            moved = moments.to("cpu")
            moved.G = shared.get((generic, boundary.start), moved.G)
            calibration.collected[generic, boundary] = moved
        if calibration.collected:
            calibration.update(calibration.of(STREAM))
        for boundary in self.boundaries:
            cosine, angle = self.cosines[boundary], self.angles[boundary]
            similarity = Similarity(cosine / calibration.tokens, angle / calibration.tokens)
            calibration.similarities[boundary] = similarity
        return calibration


def widest_at(start: int, regressors: Iterable[Regressor]) -> list[Regressor]:
    """The regressors to collect for a gap that starts here: at layer 0, none that reads an MLP."""
    return widest(r for r in regressors if start > 0 or not r.reads_mlp)


def suited(model: PreTrainedModel, regressor: Regressor) -> Regressor:
    """``regressor`` with the normalised features that the layers of ``model`` read.

    Raises:
        ValueError: a normalised feature, where the layers read the stream without a norm.
    """
    return regressor.resolve(stream_norm(model)) if regressor.normalised else regressor


# ---------------------------------------------------------------- memory


class CalibrationBytes(NamedTuple):
    """Memory of one pass of `calibrate` in addition to the model and its forward pass, in bytes.

    Attributes:
        moments: Gram matrices, cross moments and column sums.
        streams: peak of the activations stored for open boundaries.
        working: temporaries while one sequence is added to the sums, an upper estimate.
    """

    moments: int
    streams: int
    working: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
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
    """Memory that a calibration will need, whatever the number of windows.

    Args:
        model: the dense model, or its width.
        boundaries: as in `calibrate`.
        length: tokens per window.
        batch_size: windows per forward pass.
        moments: as in `calibrate`; without them only directions are stored, in float32.
        regressors: as in `calibrate`.
        hidden: width of the MLP, where a regressor needs it and ``model`` is a width.

    Raises:
        ValueError: a width, length or batch size below 1, or no boundary.

    >>> calibration_bytes(4096, [(20, 27)]).moments / 1e6  # 2 x 4096 x 4096 x 8 bytes, and sums
    268.664832
    """
    if not isinstance(model, int) or isinstance(model, bool):
        check_model(model)
    width = model if isinstance(model, int) else hidden_size(model)
    at_least(1, width=width, length=length, batch_size=batch_size, hidden=hidden)
    gaps = set(map(check_boundary, boundaries))
    if not gaps:
        raise ValueError("no boundary to count: name at least one, such as Boundary(12, 19)")
    last_stop = dict(sorted(gaps))  # of each start
    stored = max(  # the current stream, and the streams of all open boundaries
        1 + sum(start < index <= stop for start, stop in last_stop.items())
        for index in {index for gap in gaps for index in gap}
    )
    stream = batch_size * length * width
    if not moments:
        return CalibrationBytes(0, stored * stream * _SINGLE, 2 * stream * _SINGLE)
    generic = {STREAM, *(Regressor.parse(regressor).generic for regressor in regressors)}
    reads_hidden = any("hidden" in regressor.sources for regressor in generic)
    sums, designs, widest_design = 0, 0, 0
    for start in last_stop:
        if reads_hidden and start > 0 and not isinstance(model, int):
            hidden = intermediate_size(model, start - 1)
        count = sum(gap.start == start for gap in gaps)
        columns = 0
        for regressor in widest_at(start, generic):
            p = sum(regressor.widths(width, hidden))
            grams = 1 if regressor.weight.name == "1" else count
            sums += (grams * p * p + count * (p * width + p + _VECTORS * width)) * _DOUBLE
            columns += 0 if regressor.features == STREAM.features else p
            widest_design = max(widest_design, p)
        designs = max(designs, batch_size * length * columns * _DOUBLE)
    return CalibrationBytes(
        moments=sums,
        streams=stored * (stream * (_DOUBLE + _SINGLE) + designs),
        working=max(2 * batch_size, 2) * widest_design**2 * _DOUBLE
        + 2 * length * (width + 2 * widest_design) * _DOUBLE,
    )


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory available to this process, on the machine or in its container, whichever is less."""
    machine: int = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" without a limit
        used = int((cgroup / "memory.current").read_text())
        counters = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return machine
    working_set = used - int(counters.get("inactive_file", 0))  # without the file cache
    return min(machine, max(limit - working_set, 0))


def require_memory(needed: CalibrationBytes) -> None:
    """Raise `MemoryError` if fewer bytes are available than a calibration needs."""
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
