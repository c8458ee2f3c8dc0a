"""New processes that cost a fork: each comes from one that has imported the heavy libraries.

A process that imports torch and transformers takes ten seconds of a core before it does anything.
Here one does, once for all tests of a worker, and never imports ghostlib; what is run is forked
from it, with arguments, output and an end of its own.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

# Reads lists of jobs, one list a line; runs the jobs of a list side by side; answers with how each
# of them ended.
SERVER = """
import json, os, sys

def run(code, arguments, folder, environment, out, err):
    for name, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})

exec(sys.argv[1])
assert "ghostlib" not in sys.modules
answers = os.fdopen(os.dup(1), "w", buffering=1)
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        if child := os.fork():
            children.append(child)
            continue
        run(*job)
        sys.exit()
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(ends), file=answers)
"""

ALL = "import torch, transformers, transformers.generation; transformers.LlamaForCausalLM"


class Done(NamedTuple):
    """How a process ended and what it printed, as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


@cache
def _server(imports: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SERVER, imports]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    atexit.register(server.communicate)  # it ends with its input
    return server


def run_all(code: str, *jobs: tuple[object, ...], imports: str = ALL) -> list[Done]:
    """Run ``code`` once for each list of arguments, in processes of their own, side by side.

    Where nothing can be forked, new processes are started instead.
    """
    if not hasattr(os, "fork"):
        commands = [[sys.executable, "-c", code, *map(str, arguments)] for arguments in jobs]
        ended = [subprocess.run(command, capture_output=True, text=True) for command in commands]
        return [Done(done.returncode, done.stdout, done.stderr) for done in ended]
    server = _server(imports)
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"{i}.out"), Path(folder, f"{i}.err")) for i in range(len(jobs))]
        asked = [
            (code, [*map(str, arguments)], os.getcwd(), dict(os.environ), str(out), str(err))
            for arguments, (out, err) in zip(jobs, files, strict=True)
        ]
        assert server.stdin and server.stdout
        print(json.dumps(asked), file=server.stdin)
        ends = json.loads(server.stdout.readline())
        printed = [(out.read_text(), err.read_text()) for out, err in files]
    return [Done(end, *texts) for end, texts in zip(ends, printed, strict=True)]


def run(code: str, *arguments: object, imports: str = ALL) -> Done:
    """Run ``code`` with ``arguments`` in a process of its own, as ``python -c`` does."""
    (done,) = run_all(code, arguments, imports=imports)
    return done


KERNEL = "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"


@contextmanager
def kernel(folder: Path) -> Iterator[Any]:
    """The client of a Jupyter kernel, whose connection file lies in ``folder``."""
    from jupyter_client.blocking import BlockingKernelClient
    from jupyter_client.connect import write_connection_file

    file, _ = write_connection_file(str(folder / "kernel.json"))
    ended: list[Done] = []
    running = Thread(target=lambda: ended.append(run(KERNEL, "-f", file)))
    running.start()
    client = BlockingKernelClient(connection_file=file)
    client.load_connection_file()
    client.start_channels()
    try:
        while not ended:
            with suppress(RuntimeError):  # it counts as dead until it listens
                client.wait_for_ready(timeout=300)
                break
        yield client
    finally:
        client.shutdown()
        running.join(timeout=60)
        client.stop_channels()
    assert ended and ended[0].returncode == 0, ended
