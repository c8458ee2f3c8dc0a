"""Killed, interrupted, or with a clock that jumps: the results are those of an undisturbed run.

What else is done to files: the asset cache killed, with a full disk and by several processes in
tests/text/test_assets.py; results files killed, torn, shared and with a full disk in
tests/experiments/test_results.py; a full disk under `save_pretrained` in
tests/surgery/test_saving.py; a training that is resumed in tests/surgery/test_training.py.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fresh
import pytest
from conftest import tiny_model, tiny_tokenizer, tiny_windows
from transformers import AutoModelForCausalLM

import ghostlib as gl
from ghostlib.experiments.run import run_experiment

pytestmark = pytest.mark.thorough
TOKENIZER = tiny_tokenizer()
MODEL = tiny_model("llama", vocab_size=len(TOKENIZER))
IDS = tiny_windows(3, 16)
forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def killed_at(moment: int, work: Callable[[], object]) -> int:
    """Run ``work`` in a child that is killed when it touches files for the ``moment``-th time.

    Returns:
        How often it did, where it was not killed; -9 where it was.
    """
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            return -os.WTERMSIG(status)
        assert status == 0, "it failed"
        return int(said)
    events = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        touches = event == "open" and arguments[1] not in ("r", "rb")
        if touches or event.split(".")[0] in ("os", "shutil"):
            events += 1  # first: what follows is such an event itself
            if events == moment + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        warnings.simplefilter("ignore")
        sys.addaudithook(hook)
        work()
        os.write(writing, str(events).encode())
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    os._exit(1)


def moments(work: Callable[[Path], object], folder: Path, count: int) -> list[int]:
    """Seeded moments of ``work``, which is done once in ``folder`` to know how many there are."""
    total = killed_at(-1, partial(work, folder / "whole"))
    assert total >= count, f"only {total} moments"
    return sorted(random.Random(0).sample(range(total), count))


@forked
@pytest.mark.parametrize("operator", ["ghost", "refit"])
def test_a_recovery_killed_at_any_moment_is_whole_or_not_there(
    tmp_path: Path, operator: str
) -> None:
    def work(folder: Path) -> None:
        recovered = gl.recover(MODEL, IDS, [2, 3], operator, relative_ridge=1e-3)
        gl.save(recovered, folder, TOKENIZER)

    (tmp_path / "whole").mkdir()
    killed = moments(work, tmp_path / "whole", 6)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole" / "whole").iterdir()}
    expected.pop("README.md")  # which has the name of the folder
    for moment in killed:
        place = tmp_path / str(moment)
        place.mkdir()
        outcome = killed_at(moment, partial(work, place / "out"))
        assert outcome == -signal.SIGKILL or outcome <= moment  # a run may touch fewer files
        if (place / "out").exists():  # killed when it had its name
            AutoModelForCausalLM.from_pretrained(place / "out")
        else:
            work(place / "out")
        found = {p.name: p.read_bytes() for p in (place / "out").iterdir() if p.suffix != ".md"}
        assert found == expected
        assert [p.name for p in place.iterdir()] == ["out"], "something is left over"


def specification(folder: Path) -> gl.Specification:
    text = folder / "text.txt"
    words = ["the", "theory", "of", "thing", "then"]
    rng = random.Random(0)
    text.write_text("\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(30)))
    MODEL.save_pretrained(folder / "tiny")
    sizes: dict[str, Any] = {"windows": 2, "length": 16, "test_windows": 2, "test_length": 16}
    corpora: dict[str, Any] = {"calibration": str(text), "perplexity": str(text)}
    chosen = {"criteria": "cosine", "n": 1, "operators": ("pruned", "ghost", "auto")}
    return gl.Specification(model=str(folder / "tiny"), **chosen, **corpora, **sizes)


def measured(path: Path) -> dict[str, Any]:
    """The records of a results file, without what depends on the hour."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    apart = ("seconds", "environment")
    kept = [{k: v for k, v in r.items() if k not in apart} for r in records]
    kept = [r for r in kept if r["kind"] != "environment"]
    named = {json.dumps({k: v for k, v in r.items() if k != "losses"}): r for r in kept}
    assert len(named) == len(kept), "a cell stands twice"
    return named


@forked
def test_an_experiment_killed_at_any_moment_is_resumed(tmp_path: Path) -> None:
    plan = specification(tmp_path)
    run = partial(run_experiment, plan, model=MODEL, tokenizer=TOKENIZER)
    (tmp_path / "whole").mkdir()
    killed = moments(run, tmp_path / "whole", 6)
    expected = measured(tmp_path / "whole" / "whole")
    for moment in killed:
        place = tmp_path / str(moment)
        place.mkdir()
        assert killed_at(moment, lambda place=place: run(place / "out")) == -signal.SIGKILL  # type: ignore[misc]
        run(place / "out")
        assert measured(place / "out") == expected
        assert [p.name for p in place.iterdir()] == ["out"], "something is left over"


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, rng = specification(tmp_path), random.Random(0)
    run_experiment(plan, tmp_path / "whole", model=MODEL, tokenizer=TOKENIZER)
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: rng.uniform(-1e9, 1e9))
    run_experiment(plan, tmp_path / "jumped", model=MODEL, tokenizer=TOKENIZER)
    assert measured(tmp_path / "jumped") == measured(tmp_path / "whole")


CELLS = (
    """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch, ghostlib as gl
from conftest import tiny_model, tiny_windows
model, ids = tiny_model("llama").train(), tiny_windows()
before = {{name: value.clone() for name, value in model.state_dict().items()}}
def interrupt(index, stream): os.kill(os.getpid(), signal.SIGINT)
print("ready")
""",
    "with gl.tap(model, [0, 3], interrupt) as run: run(input_ids=ids)",
    """
assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
assert torch.is_grad_enabled() and model.training and all(m.training for m in model.modules())
assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
print(gl.recover(model, ids, [2, 3]).config.recovery["removed"])
""",
)


def test_an_interrupt_in_a_notebook_leaves_kernel_and_model(tmp_path: Path) -> None:
    shown = []
    with fresh.kernel(tmp_path) as client:
        for cell in CELLS:
            printed: list[str] = []
            reply = client.execute_interactive(
                cell.format(tests=str(Path(__file__).parents[1])) if "{tests" in cell else cell,
                timeout=300,
                output_hook=lambda m, printed=printed: printed.append(  # type: ignore[misc]
                    m["content"].get("text") or m["content"].get("ename") or ""
                ),
            )
            shown.append((reply["content"]["status"], "".join(printed).strip()))
    (ready, interrupted, after) = shown
    assert ready == ("ok", "ready")
    assert interrupted == ("error", "KeyboardInterrupt")
    assert after[0] == "ok" and after[1].endswith("[2, 3]"), after
