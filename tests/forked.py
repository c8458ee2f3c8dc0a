"""Kernels that cost a fork: `pytest -p forked` starts those of nbval as `fresh` starts processes.

A kernel of its own takes ten seconds of a core for what every notebook imports. ghostlib itself is
imported by each notebook.
"""

import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import fresh
from jupyter_client.provisioning import local_provisioner

# A kernel sets the backend before anything imports matplotlib, so this does as well.
IMPORTS = (
    "import os; os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'\n"
    f"{fresh.ALL}; transformers.AutoModelForCausalLM, transformers.AutoTokenizer\n"
    "import ipykernel.kernelapp, matplotlib.pyplot, seaborn, scipy.stats\n"
)
KERNEL = f"""
import json, os, sys
os.setsid()
os.chdir(sys.argv[1])
os.environ.update(json.loads(sys.argv[2]))
with open(sys.argv[3] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.replace(sys.argv[3] + ".new", sys.argv[3])
del sys.argv[1:4]
{fresh.KERNEL}
"""


class Forked:
    """What jupyter_client asks of the process of a kernel, see `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(
        self,
        command: list[str],
        *,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        **_: Any,
    ) -> None:
        self._ended: list[fresh.Done] = []
        options = command[command.index("ipykernel_launcher") + 1 :]
        with TemporaryDirectory() as folder:
            file = Path(folder, "pid")
            arguments = (cwd or os.getcwd(), json.dumps(env or {}), file, *options)
            self._thread = Thread(target=self._run, args=arguments, daemon=True)
            self._thread.start()
            while not file.exists():
                if self._ended:
                    raise RuntimeError(f"no kernel: {self._ended[0].stderr}")
                time.sleep(0.02)
            self.pid = int(file.read_text())

    def _run(self, *arguments: object) -> None:
        self._ended.append(fresh.run(KERNEL, *arguments, imports=IMPORTS))

    def poll(self) -> int | None:
        """How it ended; None while it runs."""
        return self._ended[0].returncode if self._ended else None

    def wait(self) -> int:
        """How it ends."""
        self._thread.join()
        return self._ended[0].returncode

    def send_signal(self, number: int) -> None:
        """To the kernel and all that it started."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """End it now."""
        self.send_signal(9)

    terminate = kill


local_provisioner.launch_kernel = Forked
