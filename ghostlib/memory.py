"""Memory: what a calibration will need, known and checked before it starts."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
from transformers import PreTrainedModel

from ghostlib.boundaries import Boundary
from ghostlib.features import Regressor
from ghostlib.models import hidden_size
from ghostlib.nested import widest

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
