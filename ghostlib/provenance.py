"""What a number was measured with: versions, hardware, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("ghostlib", "torch", "transformers", "datasets", "numpy", "scipy", "lm-eval")


def environment() -> dict[str, Any]:
    """Versions, hardware and, in a git checkout of this package, the commit of this very run."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"versions": versions, "hardware": hardware | {"gpus": gpus}, "commit": _commit()}


def _cpu() -> str:
    """Name of the processor, where the system tells it."""
    try:
        listed = re.search(r"model name\s*: *(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        listed = None
    return listed[1] if listed else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit this module was checked out at, marked when files have changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    named = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for command in (tracked, named):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
