"""Peak memory of this process."""

import resource
import sys
from pathlib import Path


def peak_gigabytes() -> float:
    """Largest resident memory of this process since it started its program, in GB.

    On Linux ``ru_maxrss`` of a child starts at its parent's memory at the fork; the high water mark
    of the address space does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 1e9  # bytes on macOS, else KiB


def restart_peak() -> None:
    """Reset the peak to the memory in use, where the system can (Linux)."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")
