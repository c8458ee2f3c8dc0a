"""A configuration that agrees with its model after layers have been removed.

Settings of individual layers follow the kept layers: lists with an entry per layer, lists of layer
indices, settings by index, repeated patterns, and counts of first or last layers of a kind. Other
rules that compute the kind of a layer from its index cannot be followed. So `check_agreement`
builds the model that the new configuration describes, without memory for its weights, and compares.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_COUNT = re.compile(r"(num_|n_)?(hidden_|decoder_|text_)?(layers?|blocks)$|depth$")
# Counts of the first layers, or of the last, that are of one kind.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
_LAST = ("num_kv_shared_layers",)
_REPEATED = ("attention_types", "block_types")
# Divided by the square root of the number of layers.
_BY_ROOT = ("scale_depth",)
_INDICES = re.compile(r".*(layers|layer_ids|layer_indices|indices|idxs?|layer_idx|block_map)$")
_BY_INDEX = ("layer_dic",)
# Tables with a block of columns (axis 1) or rows (axis 0) per layer.
_TABLES = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
_NUMBER = re.compile(r"_?(layer_?(idx|id|index|number|num)|idx|index|block_idx)$")


def follow(model: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Reduce the decoder layers at ``path`` to the ascending indices ``kept``, in place.

    The configurations, layer numbers (places in the key-value cache) and tables per layer follow.
    """
    layers: Any = model.get_submodule(path)
    total = len(layers)
    numbers = _numbers(layers)
    owners = list(_owners(model, path))
    configs = _configs(owners, layers, total)
    setattr(owners[-1], path.rpartition(".")[2], type(layers)([layers[i] for i in kept]))
    for index, module, name, step, offset in numbers:
        if index in kept:
            setattr(module, name, step * kept.index(index) + offset)
    for config in configs:
        overrides = _per_layer(config)
        if overrides:
            config.per_layer_config = None
        _follow_settings(config, total, kept)
        if overrides:
            config.per_layer_config = {kept.index(i): s for i, s in overrides.items() if i in kept}
    for owner in owners:
        _follow_settings(owner, total, kept)
    # A set, since layers may share modules.
    for module in {module for index in kept for module in layers[index].modules()}:
        _follow_settings(module, total, kept)
    if not hasattr(layers[kept[0]], "pre_ln") and hasattr(layers[0], "pre_ln"):
        layers[kept[0]].pre_ln = nn.Identity()  # called in the first RWKV layer; checked below
    for owner in owners[1:]:
        _follow_tables(owner, total, kept)
    for owner in owners:
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            _follow_paths(vars(owner).get(name), path.rpartition(".")[2], kept)


def _follow_paths(tied: dict[str, str] | None, name: str, kept: Sequence[int]) -> None:
    """Renumber the layers in the paths of tied weights (Zamba 2)."""
    number = re.compile(rf"(?<=\b{name}\.)\d+")

    def renumbered(path: str) -> str:
        return number.sub(lambda match: str(kept.index(int(match[0]))), path)

    if tied:
        pairs = list(tied.items())
        tied.clear()
        for target, source in pairs:
            if all(int(index) in kept for index in number.findall(f"{target} {source}")):
                tied[renumbered(target)] = renumbered(source)


def _per_layer(config: PretrainedConfig) -> dict[int, Any]:
    """Settings of single layers, by index."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(index): s for index, s in config.to_dict()["per_layer_config"].items()}


def _owners(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The ancestors of the module at ``path``, from the model down."""
    yield model
    for name in path.split(".")[:-1]:
        model = getattr(model, name)
        yield model


def _configs(owners: Sequence[nn.Module], layers: nn.Module, total: int) -> list[PretrainedConfig]:
    """The configurations that describe the layers, each once."""
    configs: dict[int, PretrainedConfig] = {}
    for module in (*owners, *layers.modules()):
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            counts = [value for name, value in vars(config).items() if _COUNT.fullmatch(name)]
            if total in (getattr(config, "num_hidden_layers", None), *counts):
                configs[id(config)] = config
    return list(configs.values())


def _follow_settings(owner: Any, total: int, kept: Sequence[int]) -> None:
    for name, value in list(vars(owner).items()):
        if not name.startswith("_") and _plain(value):
            new = _followed(name, value, total, kept)
            if new is not None:
                setattr(owner, name, new)


def _follow_tables(owner: Any, total: int, kept: Sequence[int]) -> None:
    """Keep the blocks of the kept layers in tables with a block per layer (Gemma 3n).

    Raises:
        ValueError: a table is offloaded.
    """
    for name, axis in _TABLES.items():
        table = getattr(owner, name, None)
        if table is None or table.weight.shape[axis] % total or len(kept) == total:
            continue
        if table.weight.device.type == "meta" and hasattr(table, "_hf_hook"):
            raise ValueError(
                f"the table {name}, of which every layer has a part, is offloaded: load the model "
                "without offloading it"
            )
        blocks = table.weight.detach().unflatten(axis, (total, -1))
        indices = torch.tensor(kept, device=blocks.device)
        weight = blocks.index_select(axis, indices).flatten(axis, axis + 1)
        table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        size = "embedding_dim" if isinstance(table, nn.Embedding) else "out_features"
        setattr(table, size, weight.shape[axis])


def _followed(name: str, value: Any, total: int, kept: Sequence[int]) -> Any:
    """The setting for the layers ``kept``, or None if it does not depend on them."""
    if type(value) is int:
        if name in _FIRST:
            return sum(index < value for index in kept)
        if name in _LAST:
            return sum(index >= total - value for index in kept)
        if value == total and (_COUNT.fullmatch(name) or name == "first_kv_shared_layer_idx"):
            return len(kept)
    if name in _BY_INDEX and isinstance(value, dict):
        return {kept.index(index): v for index, v in value.items() if index in kept}
    if name in _BY_ROOT and isinstance(value, int | float):
        return value * math.sqrt(len(kept) / total)
    if isinstance(value, list | tuple) and value:
        if name in _REPEATED:
            return _pattern(name, value, total, kept)
        if _INDICES.fullmatch(name) and _are_indices(value, total):
            return type(value)(kept.index(index) for index in value if index in kept)
        if len(value) == total:
            return type(value)(value[index] for index in kept)
    return None


def _pattern(name: str, value: Sequence[Any], total: int, kept: Sequence[int]) -> Any:
    """A pattern of kinds that is repeated over the layers, written out for the kept layers."""
    if name == "attention_types":  # [[kinds, times], …]
        kinds = [kind for part, times in value for kind in list(part) * times]
        return [[[kinds[index] for index in kept], 1]]
    kinds = list(itertools.islice(itertools.cycle(value), total))
    return [kinds[index] for index in kept]


def _are_indices(value: Sequence[Any], total: int) -> bool:
    in_range = all(type(index) is int and 0 <= index < total for index in value)
    return in_range and sorted(set(value)) == list(value)


def _numbers(layers: nn.ModuleList) -> list[tuple[int, nn.Module, str, int, int]]:
    """Every attribute with the number of its layer, as ``step * index + offset``.

    The step is two where a layer has two attentions, each with its place in the cache.

    Returns:
        ``(index of the layer, module, name of the attribute, step, offset)``.
    """
    attributes: dict[tuple[str, str], list[tuple[int, nn.Module, int]]] = {}
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and _NUMBER.fullmatch(name):
                    attributes.setdefault((path, name), []).append((index, module, value))
    numbers = []
    for (_, name), places in attributes.items():
        (first, _, low), (last, _, high) = places[0], places[-1]
        step = (high - low) // (last - first) if last > first else 1
        offset = low - step * first
        if all(value == step * index + offset for index, _, value in places):
            numbers += [(index, module, name, step, offset) for index, module, _ in places]
    return numbers


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model that the configuration of ``model`` describes once saved, without weights."""
    config: Any = model.config
    config = type(config).from_dict(config.to_diff_dict())
    with torch.device("meta"):
        made: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    return made


# By all that determines a twin: removing one of several equal layers gives the same.
_TWIN_PARTS: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}


def _twin_parts(model: PreTrainedModel, path: str) -> dict[str, dict[str, Any]]:
    key = (type(model), model.config.to_json_string(), model.dtype, path)
    if key not in _TWIN_PARTS:
        if len(_TWIN_PARTS) > 7:
            _TWIN_PARTS.clear()
        _TWIN_PARTS[key] = _parts(twin(model), path)
    return _TWIN_PARTS[key]


def _parts(model: PreTrainedModel, path: str) -> dict[str, dict[str, Any]]:
    """Settings of every module from the parent of ``path`` down, by name."""
    parent = model.get_submodule(path.rpartition(".")[0])
    # The innermost model initialises buffers that are not saved.
    inner = parent if isinstance(parent, PreTrainedModel) else model
    return {name: _settings(module, inner) for name, module in parent.named_modules()}


def differences(model: PreTrainedModel, path: str) -> list[str]:
    """Differences between ``model`` and its `twin`.

    Compared by name, from the parent of the layers at ``path`` down: classes of modules, shapes and
    dtypes of parameters and buffers, every plain setting of a module, and the values of buffers
    that are not saved.

    Returns:
        One line a difference, such as ``layers.3.self_attn.sliding_window: 8, not None``: the
        value in the model, and that in one made from its configuration.
    """
    ours, theirs = _parts(model, path), _twin_parts(model, path)
    lines = []
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs:
            presence = "there, not there" if name in ours else "not there, there"
            lines.append(f"{name}: {presence} in the twin")
            continue
        own = ours[name]
        for key, value in theirs[name].items():
            if key in own and not _agree(own[key], value, theirs[name]["class"]):
                lines.append(f"{name}.{key}: {own[key]}, not {value}".lstrip("."))
    return sorted(lines)


def kinds(model: PreTrainedModel, path: str) -> list[int]:
    """For each layer at ``path``, the first that equals it in all but its number and weights."""
    layers: list[dict[str, dict[str, Any]]] = []
    for index in range(len(model.get_submodule(path))):
        parts = _parts(model, f"{path}.{index}.")
        layers.append(
            {
                name: {k: v for k, v in settings.items() if not _NUMBER.fullmatch(k)}
                for name, settings in parts.items()
            }
        )
    return [layers.index(layer) for layer in layers]


def _agree(ours: Any, theirs: Any, kind: str) -> bool:
    """Equal, up to rounding; rotary embeddings may have kinds of layers that are removed."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    if "Rotary" in kind:
        if isinstance(ours, dict) and isinstance(theirs, dict):
            return theirs.items() <= ours.items()
        if isinstance(ours, list) and isinstance(theirs, list):
            return all(kind in ours for kind in theirs)
    return bool(ours == theirs)


# Attributes set by a run, by training or by device placement, or different in every object; and
# which masks are made, of which each layer takes its own.
_TRANSIENT = re.compile(
    r"_.*|training|gradient_checkpointing|max_seq_len_cached|all_tied_weights_keys|has_sliding_layers|hf_device_map|name_or_path|warnings_issued|vocab_size"
)


def _settings(module: nn.Module, model: PreTrainedModel) -> dict[str, Any]:
    """All that defines ``module``, except for the values of its weights."""
    settings: dict[str, Any] = {"class": type(module).__name__}
    for name, value in vars(module).items():
        if not _TRANSIENT.fullmatch(name) and _plain(value):
            settings[name] = value
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    for name, tensor in own.items():
        settings[f"{name}, shape"] = tuple(tensor.shape)
        settings[f"{name}, dtype"] = tensor.dtype
    for name, values in _computed(module, model):
        settings[f"{name}, values"] = values
    return settings


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _computed(module: nn.Module, model: PreTrainedModel) -> Iterator[tuple[str, list[float]]]:
    """The buffers that are computed from the configuration and not saved."""
    buffers = dict(module.named_buffers(recurse=False))
    names = [name for name in module._non_persistent_buffers_set if name in buffers]
    empty = [name for name in names if buffers[name].device.type == "meta"]
    for name in empty:
        setattr(module, name, torch.full_like(buffers[name], -1, device="cpu"))
    if empty:
        model._init_weights(module)
    for name in names:
        values = module.get_buffer(name)
        if values.numel() <= 4096 and not (name in empty and bool((values == -1).all())):
            yield name, values.double().flatten().tolist()


# Differences between models and their own configuration before any layer is removed.
_BEFORE: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_NUMBERS = re.compile(r"\.\d+\.")


def check_agreement(model: PreTrainedModel, path: str, original: PreTrainedModel) -> None:
    """Raise unless the configuration of ``model`` describes it, so that it can be saved.

    Differences that ``original``, the model before layers were removed, has from its own
    configuration are allowed. ``path`` is that of the decoder layers.

    Raises:
        ValueError: it shows up to three `differences`.
    """
    try:
        lines = differences(model, path)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        lines = [f"{type(error).__name__}: {error}".splitlines()[0]]
    if lines:
        if original not in _BEFORE:
            _BEFORE[original] = {_NUMBERS.sub("", line) for line in differences(original, path)}
        before = _BEFORE[original]
        lines = [line for line in lines if _NUMBERS.sub("", line) not in before]
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ValueError(
            f"these layers cannot be removed from a {model.config.model_type}: a model made from "
            f"its new configuration would differ in {'; '.join(lines[:3])}{more}. This type "
            "computes what a layer is from its number: remove layers that leave the pattern as it "
            "is, such as whole periods of it"
        )
