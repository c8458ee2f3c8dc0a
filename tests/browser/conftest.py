"""Servers and a browser for the tests of what people see; all are stopped when the tests end."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

try:
    from playwright import sync_api
except ImportError:  # the extra `browser` is not installed
    collect_ignore_glob = ["test_*.py"]

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "screenshots"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_itemcollected(item: pytest.Item) -> None:
    """All tests in this folder need the browser."""
    item.add_marker("browser")


@pytest.fixture(scope="session")
def browser() -> "Iterator[sync_api.Browser]":
    """Debian's Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def shoot() -> Callable[..., None]:
    """Take a screenshot of a page into build/screenshots."""
    SHOTS.mkdir(parents=True, exist_ok=True)

    def take(page: "sync_api.Page", name: str) -> None:
        page.screenshot(path=SHOTS / f"{name}.png")

    return take


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start a Python module that serves notebooks on a free local port; returns its address.

    It ends with the test, and reads and writes none of the user's settings of Jupyter.
    """
    started = []

    def start(module: str, *arguments: str, cwd: Path, probe: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path / f"{module}.log"
        command = [sys.executable, "-m", module, *arguments, f"--port={port}"]
        env = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_DATA_DIR": str(tmp_path)}
        with log.open("w") as output:
            server = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT
            )
        started.append(server)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(address + probe, timeout=5)
            except urllib.error.HTTPError:
                return address  # it answers, if only that it knows no such page
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
            else:
                return address
        raise AssertionError(f"{module} did not answer: {log.read_text()}")

    yield start
    for server in started:
        server.terminate()
        server.wait(60)
