"""Every bad input to a command: status 2, one line, no traceback, nothing left behind."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
from conftest import tiny_model, tiny_tokenizer

from ghostlib.cli import main, parser

pytestmark = pytest.mark.thorough

TOKENIZER = tiny_tokenizer()
NUMBERS = ("0", "-1", "2.5", "nan", "x", "''")
COUNTS = [(text, "is not a whole number of at least 1") for text in NUMBERS]

# {command: {option: [(value, words)]}}; MODEL, TEXT and OUT stand for what is there.
TABLE: dict[str, dict[str, list[tuple[str, str]]]] = {
    "recover": {
        "--n": [*COUNTS, ("99", "n = 99"), ("6", "n = 6")],
        "--criterion": [
            ("cosin", "did you mean 'cosine'"),
            ("''", "unknown criterion ''"),
            ("<b>", "unknown criterion"),
        ],
        "--layers": [
            ("99", "out of range"),
            ("3-", "layers '3-' are not of the form"),
            ("1-2-3", "layers '1-2-3' are not of the form"),
            ("3-1", "layers '3-1' are not of the form"),
            ("2.5", "layers '2.5' are not"),
            ("2 2", "more than once"),
            ("0-5", "leaves no layer"),
            ("", "expected at least one argument"),
            ("2 3 --n 2", "leave out --n and --criterion"),
            ("2 --criterion cosine", "leave out --n and --criterion"),
            ("0 --operator refit", "no layer before it"),
        ],
        "--operator": [
            ("gost", "did you mean 'ghost'"),
            ("pruned", "unknown operator 'pruned'"),
            ("''", "unknown operator ''"),
            ("'x, y'", "unknown feature 'y'"),
            ("low-rank", "rank"),
            ("auto --windows 1", "give at least 2"),
            ("auto --relative-ridge 1e-3", "leave out --relative-ridge, --rank and --fit"),
        ],
        "--budget": [
            ("none", "--budget is for --operator auto"),
            ("all --operator auto", "unknown budget 'all'"),
        ],
        "--relative-ridge": [
            *[(value, "ridge must be positive") for value in ("0", "-1", "nan", "inf")],
            ("x", "invalid float value: 'x'"),
            ("1e-3 --operator scalar", "scalar has no option 'relative_ridge'"),
            ("1e-3 --operator low-rank", "rank"),
        ],
        "--rank": [
            *COUNTS,
            ("4", "ghost has no option 'rank'"),
            ("999 --operator low-rank --layers 2", "between 1 and"),
            ("4 --operator auto", "leave out --relative-ridge, --rank and --fit"),
        ],
        "--keep": [
            ("copying", "--keep is for --operator auto"),
            ("copyin --operator auto --n 2", "did you mean 'copying'"),
        ],
        "--fit": [
            ("student", "invalid choice: 'student'"),
            ("sequential --operator auto", "leave out"),
        ],
        "--corpus": [
            ("wikki", "did you mean 'wiki'"),
            ("none.txt", "no such corpus file: none.txt"),
            ("''", "unknown corpus ''"),
            ("../../none.jsonl", "no such corpus file"),
            ("'<script>'", "unknown corpus '<script>'"),
        ],
        "--windows": [*COUNTS, ("9999 --layers 2", "fewer than count = 9999")],
        "--length": [*COUNTS, ("999 --layers 2", "128 positions")],
        "--test-windows": [*COUNTS, ("9999 --layers 2", "fewer than count = 9999")],
        "--seed": [
            ("x", "invalid int value: 'x'"),
            ("2.5", "invalid int value: '2.5'"),
            ("", "expected one argument"),
        ],
        "--dtype": [
            ("float33", "unknown dtype 'float33': use float32"),
            ("nn", "unknown dtype 'nn'"),
            ("''", "unknown dtype ''"),
        ],
        "--device": [
            ("nowhere", "device 'nowhere' cannot be used"),
            ("cpu:x", "device 'cpu:x' cannot be used"),
        ],
        "--offload": [("there --device cpu", "leave out --device"), ("", "expected one argument")],
        "--dry-run": [("yes", "unrecognized arguments: yes")],
        "--json": [("yes", "unrecognized arguments: yes")],
        "--portable": [("yes", "unrecognized arguments: yes")],
        "--oper": [("ghost", "unrecognized arguments: --oper ghost; see ghostlib")],
    },
    "experiment": {
        "--model": [
            ("./nope", "no such model folder: ./nope"),
            ("''", "model '' is neither a folder nor an id"),
            ("'a b'", "model 'a b' is neither"),
            ("'<script>'", "model '<script>' is neither"),
        ],
        "--dtype": [("float33", "unknown dtype 'float33'"), ("''", "unknown dtype ''")],
        "--device-map": [("nowhere", "device 'nowhere' cannot be used")],
        "--criteria": [
            ("cosin", "did you mean 'cosine'"),
            ("cosine cosine", "twice"),
            ("cosine --layers 2", "give criteria and n, or the layers"),
        ],
        "--n": [
            ("0", "n = 0"),
            ("-1", "n = -1"),
            ("two", "invalid int value: 'two'"),
            ("2.5", "invalid int"),
            ("99", "n = 99"),
            ("2 2", "twice"),
        ],
        "--layers": [
            ("3-", "layers '3-' are not of the form"),
            ("99", "out of range"),
            ("1-2 --n 2", "give criteria and n, or the layers"),
            ("2,2", "more than once"),
            ("x", "layers 'x' are not"),
        ],
        "--starts": [("0", "starts = 0"), ("x", "invalid int value"), ("99", "n = 99")],
        "--operators": [
            ("gost", "did you mean 'ghost'"),
            ("low-rank", "rank"),
            ("ghost ghost", "twice"),
            ("'refit sequential'", "leave out ' sequential'"),
        ],
        "--calibration": [
            ("wikki", "did you mean 'wiki'"),
            ("none.txt", "no such corpus file"),
            ("", "name at least one calibration corpus"),
        ],
        "--split": [("dev", "unknown split 'dev'"), ("''", "unknown split ''")],
        "--windows": [
            ("0", "windows = 0"),
            ("x", "invalid int"),
            ("9999 --layers 2", "fewer than count"),
        ],
        "--length": [
            ("0", "length = 0"),
            ("x", "invalid int"),
            ("999 --layers 2", "128 positions"),
        ],
        "--selection-windows": [("0", "selection_windows = 0"), ("x", "invalid int")],
        "--selection-length": [
            ("1", "selection_length = 1"),
            ("999", "at most length = 32"),
            ("x", "invalid int"),
        ],
        "--perplexity": [
            ("wikki", "did you mean 'wiki'"),
            ("none.txt", "no such corpus file"),
            ("--layers 2", "nothing to do"),
        ],
        "--test-split": [("dev", "unknown split 'dev'")],
        "--test-windows": [("0", "test_windows = 0"), ("x", "invalid int")],
        "--test-length": [
            ("1", "test_length = 1"),
            ("x", "invalid int"),
            ("999 --layers 2", "128 positions"),
        ],
        "--tasks": [("quiz.jsonl", "no such task file: quiz.jsonl")],
        "--limit": [("0", "limit = 0"), ("-1", "limit = -1"), ("x", "invalid int")],
        "--batch-size": [("0", "batch_size = 0"), ("x", "invalid int")],
        "--seed": [("-1", "seed = -1"), ("x", "invalid int")],
        "--probes": [
            ("copyin", "did you mean 'copying'"),
            ("copying-256 --layers 2", "takes 512"),
        ],
        "--probe-items": [("0", "probe_items = 0"), ("x", "invalid int")],
        "--bos": [("maybe", "'maybe' is neither yes nor no")],
        "--shard": [
            ("3/2", "shard '3/2' is not of the form"),
            ("x", "shard 'x'"),
            ("0/2", "shard '0/2'"),
            ("''", "shard ''"),
        ],
        "--normed": [("yes", "unrecognized arguments: yes")],
        "--repairs": [("ghost", "unrecognized arguments: --repairs ghost")],
    },
    "inspect": {
        "model": [
            ("./nope", "no such model folder: ./nope"),
            ("''", "model '' is neither a folder nor an id"),
            ("'a b'", "model 'a b' is neither"),
            ("", "the following arguments are required: model"),
            ("a b c", "unrecognized arguments"),
        ],
    },
    "abilities": {
        "model": [
            ("./nope", "no such model folder: ./nope"),
            ("''", "model '' is neither a folder nor an id"),
            ("", "the following arguments are required: model"),
        ],
        "--reference": [("./nope", "no such model folder"), ("''", "model '' is neither")],
        "--probes": [("name", "did you mean 'names'"), ("", "expected at least one argument")],
        "--seed": [("x", "invalid int value: 'x'")],
        "--json": [("yes", "unrecognized arguments: yes")],
        "--dtype": [("float33", "unknown dtype 'float33'")],
        "--device": [("nowhere", "device 'nowhere' cannot be used")],
    },
    "fetch": {
        "": [("now", "unrecognized arguments: now"), ("--cache x", "unrecognized arguments")]
    },
    "names": {"": [("ghost", "unrecognized arguments: ghost")]},
}
WHOLE = [
    ("", "the following arguments are required: command"),
    ("grid", "invalid choice: 'grid'"),
    ("--verson", "required: command"),
    ("recover", "required: model, output"),
    ("recover MODEL", "required: output"),
    ("recover ./nope OUT", "no such model folder: ./nope"),
    ("recover '' OUT", "model '' is neither a folder nor an id"),
    ("recover '<script>' OUT", "model '<script>' is neither"),
    (f"recover {'x' * 10_000} OUT", "is neither a folder nor an id"),
    (f"recover MODEL {'x' * 10_000}", "File name too long"),
    ("recover MODEL TEXT", "is a file: name a folder"),
    ("recover MODEL TEXT/out", "is a file"),
    ("recover MODEL .", "exists and is not empty"),
    ("recover MODEL /proc/out --layers 2", "output folder /proc/out"),
    ("experiment", "required: output"),
    ("experiment TEXT", "is no results file"),
    ("experiment MODEL", "cannot be written"),
    ("experiment TEXT/a", "cannot be written"),
    ("experiment ''", "cannot be written"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model with its tokenizer, and a text; what the table's words stand for."""
    folder = tmp_path_factory.mktemp("contract")
    tiny_model("llama", vocab_size=len(TOKENIZER)).save_pretrained(folder / "tiny")
    TOKENIZER.save_pretrained(folder / "tiny")
    text = "\n\n".join(f"Paragraph {i} of the theory of a thing." for i in range(400))
    (folder / "text.txt").write_text(text)
    return {"MODEL": str(folder / "tiny"), "TEXT": str(folder / "text.txt")}


USUAL = {
    "recover": "recover MODEL OUT --corpus TEXT --windows 4 --length 32 --test-windows 2",
    "experiment": "experiment OUT --model MODEL --calibration TEXT --perplexity TEXT --windows 2 "
    "--length 32 --test-windows 2 --test-length 16",
    "inspect": "inspect",
    "abilities": "abilities MODEL",
    "fetch": "fetch",
    "names": "names",
}


def refused(
    line: str, words: str, where: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in where.items():
        line = line.replace(name, path)
    assert main(shlex.split(line)) == 2
    shown = capsys.readouterr()
    assert not shown.out, "it began to work"
    assert shown.err.startswith("ghostlib: ") and shown.err.count("\n") == 1, shown.err
    assert shown.err.strip().isprintable() and "Traceback" not in shown.err
    assert words in shown.err, shown.err


def argued(command: str, option: str, value: str) -> str:
    """The usual line of a command, with one option replaced."""
    words, line = shlex.split(USUAL[command]), []
    if option == "model":
        words = [word for word in words if word != "MODEL"]
    skip = False
    for word in words:
        skip = word == option or (skip and not word.startswith("-"))
        if not skip:
            line.append(word)
    name = "" if option == "model" else option
    return f"{shlex.join(line)} {name} {value}"


CASES = [
    (argued(command, option, value), words)
    for command, options in TABLE.items()
    for option, values in options.items()
    for value, words in values
]


@pytest.mark.parametrize(("line", "words"), [*CASES, *WHOLE])
def test_a_bad_command_is_refused_in_one_line(
    line: str,
    words: str,
    tiny: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "notes").write_text("")
    monkeypatch.chdir(work)
    refused(line, words, tiny | {"OUT": str(tmp_path / "out")}, capsys)
    assert [p.name for p in tmp_path.rglob("*")] == ["work", "notes"], "something is left behind"


@pytest.mark.parametrize(
    ("line", "words"),
    [("recover MODEL OUT --dtype float33", "float33"), ("experiment OUT --n 0", "n = 0")],
)
def test_so_it_is_in_a_process_of_its_own(
    line: str, words: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    for name, path in (tiny | {"OUT": str(tmp_path / "out")}).items():
        line = line.replace(name, path)
    arguments = shlex.split(line)
    if arguments[0] == "recover":  # nothing that is imported prints anything either
        command = [sys.executable, "-m", "ghostlib.cli", *arguments]
        done: Any = subprocess.run(command, capture_output=True, text=True)
    else:
        code = "import runpy; runpy.run_module('ghostlib.cli', run_name='__main__', alter_sys=True)"
        done = fresh.run(code, *arguments)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and words in done.stderr


def test_every_command_and_option_is_in_the_table() -> None:
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(TABLE) == set(commands.choices)
    for name, command in commands.choices.items():
        for action in command._actions:
            options = {*action.option_strings} - {"-h", "--help"}
            tried = options <= set(TABLE[name]) if options else True
            assert tried, f"{name} {', '.join(options)} is not in the table"
            if not action.option_strings:  # output and model, in WHOLE or by name
                assert action.dest in ("output", "model")
