"""Make the virtual environment and install the project into it, with one line that says how far.

python3 tools/install.py .venv --extras dev

Standard library only, because it runs before anything is installed.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUIET_SECONDS = 15  # between two lines of progress when the output is no terminal


class InstallError(Exception):
    """pip or venv failed; the message ends with their last words."""


def describe(line: str) -> str | None:
    """What a line of pip's output says in a few words; None if it says nothing new.

    >>> describe("  Downloading torch-2.13.0-cp311-none-linux_x86_64.whl (200.1 MB)")
    'downloading torch 2.13.0 (200.1 MB)'
    >>> describe("Collecting numpy<3,>=1.26 (from ghostlib==0.1.0)")
    'finding numpy'
    >>> describe("Installing collected packages: six, numpy, torch")
    'unpacking 3 packages'
    >>> describe("  Preparing metadata (pyproject.toml): finished with status 'done'")
    """
    line = line.strip()
    if found := re.match(r"Downloading (\S+?)-(\d[^-]*)\S* \((.+)\)$", line):
        return f"downloading {found[1].rsplit('/', 1)[-1]} {found[2]} ({found[3]})"
    if found := re.match(r"Collecting ([\w.-]+)", line):
        return f"finding {found[1]}"
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages"
    return None


def run(command: list[str], what: str) -> None:
    """Run ``command``, showing what it is doing; raise `InstallError` if it fails."""
    begin = shown_at = time.monotonic()
    tail: deque[str] = deque(maxlen=25)
    now = what
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def read() -> None:
        nonlocal now
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line)
            now = describe(line) or now

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    terminal = sys.stdout.isatty()
    while reader.is_alive():
        reader.join(0.25)
        seconds = time.monotonic() - begin
        if terminal:
            print(f"\r\x1b[K  {seconds:4.0f} s  {now[:70]}", end="", flush=True)
        elif time.monotonic() - shown_at >= QUIET_SECONDS:
            print(f"  {seconds:4.0f} s  {now}", flush=True)
            shown_at = time.monotonic()
    if terminal:
        print("\r\x1b[K", end="", flush=True)
    if process.wait() != 0:
        raise InstallError(f"{what} failed:\n{''.join(tail)}")


def works(python: Path) -> bool:
    """Whether ``python`` is an interpreter that has pip (a half-made environment has none)."""
    try:
        return (
            subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
        )
    except OSError:
        return False


def install(folder: Path, extras: str) -> None:
    """Create ``folder`` unless it works already, and install the project editable into it."""
    begin = time.monotonic()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    version = ".".join(map(str, sys.version_info[:3]))
    if not works(python):
        print(f"Making a virtual environment in {folder} (Python {version})", flush=True)
        run([sys.executable, "-m", "venv", "--clear", str(folder)], "making the environment")
        run([str(python), "-m", "pip", "install", "--upgrade", "pip"], "updating pip")
    target = f".[{extras}]" if extras else "."
    print("Installing the project and what it needs (minutes the first time)", flush=True)
    run(
        [str(python), "-m", "pip", "install", "--progress-bar", "off", "-e", target],
        "finding packages",
    )
    print(f"Installed in {time.monotonic() - begin:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the environment, made if it is not there")
    parser.add_argument("--extras", default="dev", help="extras to install (default: dev)")
    options = parser.parse_args(arguments)
    try:
        install(options.folder.absolute(), options.extras)
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
