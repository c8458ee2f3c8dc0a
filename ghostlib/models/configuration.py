"""A configuration that agrees with its model after layers have gone.

What a configuration says of the layers one by one follows the layers that are kept: lists with an
entry for each, lists of their indices, dictionaries by index, and how many the first or the last
are of a kind. Rules that compute a layer's kind from its index cannot be followed in general.
Whether all agree is therefore never assumed: `check_agreement` builds the model that the new
configuration describes, without memory for its weights, and compares.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_COUNT = re.compile(r"(num_|n_)?(hidden_|decoder_|text_)?(layers?|blocks)$")
# How many of the first layers, or of the last, are of one kind.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
_LAST = ("num_kv_shared_layers",)
_INDICES = re.compile(r".*(layers|layer_ids|layer_indices|indices|idxs?|layer_idx)$")
_NUMBER = re.compile(r"_?(layer_?(idx|id|index|number|num)|idx|index|block_idx)$")


def follow(model: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Keep of the modules at ``path`` those with the indices ``kept``; all that counts them follows.

    Args:
        model: changed in place; weights stay as they are.
        path: of the list of decoder layers.
        kept: ascending.
    """
    layers: Any = model.get_submodule(path)
    total = len(layers)
    numbers = _numbers(layers)
    owners = list(_owners(model, path))
    configs = _configs(owners, layers, total)
    setattr(owners[-1], path.rpartition(".")[2], type(layers)([layers[i] for i in kept]))
    for module, name, step, offset in numbers:
        position = kept.index(module[0]) if module[0] in kept else None
        if position is not None:
            setattr(module[1], name, step * position + offset)
    for config in configs:
        _follow_settings(vars(config), total, kept, lambda k, v, c=config: setattr(c, k, v))
    for owner in owners:
        settings = {k: v for k, v in vars(owner).items() if not k.startswith("_")}
        _follow_settings(settings, total, kept, lambda k, v, o=owner: setattr(o, k, v))


def _owners(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that hold the one at ``path``, from the model down."""
    yield model
    names = path.split(".")[:-1]
    for name in names:
        model = getattr(model, name)
        yield model


def _configs(owners: Sequence[nn.Module], layers: nn.Module, total: int) -> list[PretrainedConfig]:
    """The configurations that describe the layers, each once."""
    found: dict[int, PretrainedConfig] = {}
    for module in (*owners, *layers.modules()):
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and _depth_settings(vars(config), total):
            found[id(config)] = config
    return list(found.values())


def _depth_settings(settings: Mapping[str, Any], total: int) -> list[str]:
    return [
        name
        for name, value in settings.items()
        if type(value) is int and value == total and _COUNT.fullmatch(name)
    ]


def _follow_settings(
    settings: Mapping[str, Any], total: int, kept: Sequence[int], put: Callable[[str, Any], None]
) -> None:
    for name, value in list(settings.items()):
        new = _followed(name, value, total, kept)
        if new is not None:
            put(name, new)


def _followed(name: str, value: Any, total: int, kept: Sequence[int]) -> Any:
    """The setting for the layers ``kept``, or None where it does not depend on them."""
    if type(value) is int:
        if name in _FIRST:
            return sum(index < value for index in kept)
        if name in _LAST:
            return sum(index >= total - value for index in kept)
        if value == total and _COUNT.fullmatch(name):
            return len(kept)
    if isinstance(value, list | tuple) and value:
        if _INDICES.fullmatch(name) and _are_indices(value, total):
            return type(value)(kept.index(index) for index in value if index in kept)
        if len(value) == total:
            return type(value)(value[index] for index in kept)
    if name == "per_layer_config" and isinstance(value, Mapping):
        return {kept.index(int(k)): v for k, v in value.items() if int(k) in kept}
    return None


def _are_indices(value: Sequence[Any], total: int) -> bool:
    ascending = all(type(index) is int and 0 <= index < total for index in value)
    return ascending and sorted(set(value)) == list(value)


def _numbers(layers: nn.ModuleList) -> list[tuple[tuple[int, nn.Module], str, int, int]]:
    """Every attribute that holds the number of its layer, as ``step * index + offset``.

    A layer with two attentions has two places in the cache, so the step need not be one.
    """
    places: dict[tuple[str, str], list[tuple[int, nn.Module, int]]] = {}
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and _NUMBER.fullmatch(name):
                    places.setdefault((path, name), []).append((index, module, value))
    found = []
    for (_, name), seen in places.items():
        step, offset = 1, seen[0][2] - seen[0][0]
        if len(seen) > 1:
            step = (seen[1][2] - seen[0][2]) // (seen[1][0] - seen[0][0])
            offset = seen[0][2] - step * seen[0][0]
        if all(value == step * index + offset for index, _, value in seen):
            found += [((index, module), name, step, offset) for index, module, _ in seen]
    return found


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model that the configuration of ``model`` describes, on the meta device: no weights."""
    with torch.device("meta"):
        made: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    return made


def differences(model: PreTrainedModel, path: str) -> list[str]:
    """Where ``model``, from what holds its layers down, is not its `twin`.

    Compared by name: classes of modules, shapes of parameters and buffers, every plain setting of a
    module, and the values of buffers that no file holds.

    Args:
        path: of the list of decoder layers.

    Returns:
        One line a difference, such as ``layers.3.self_attn.sliding_window: 8, not None``: what the
        model has, and what one made from its configuration has.
    """
    parent = path.rpartition(".")[0]
    other = twin(model)
    ours, theirs = (dict(m.get_submodule(parent).named_modules()) for m in (model, other))
    found = []
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs:
            found.append(f"{name}: {_have(name in ours)}, {_have(name in theirs)} in the twin")
            continue
        settings = _settings(theirs[name], other)
        have = _settings(ours[name], model)
        for key, expected in settings.items():
            if key in have and have[key] != expected:
                found.append(f"{name}.{key}: {have[key]}, not {expected}".lstrip("."))
    return sorted(found)


def _have(there: bool) -> str:
    return "there" if there else "not there"


# Set while a model runs or is trained, by device placement, or different in every object.
_PASSING = re.compile(r"_.*|training|gradient_checkpointing|max_seq_len_cached|.*_attn_implementation")


def _settings(module: nn.Module, model: PreTrainedModel) -> dict[str, Any]:
    """What makes ``module`` what it is, but for the values of its weights."""
    found: dict[str, Any] = {"class": _class_of(module)}
    for name, value in vars(module).items():
        if not _PASSING.fullmatch(name) and _plain(value):
            found[name] = value
    for name, tensor in (*module.named_parameters(recurse=False), *_buffers(module)):
        found[f"{name}, shape"] = tuple(tensor.shape)
    for name, values in _computed(module, model):
        found[f"{name}, values"] = values
    return found


def _class_of(module: nn.Module) -> str:
    return type(module).__name__


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return module.named_buffers(recurse=False)


def _computed(module: nn.Module, model: PreTrainedModel) -> Iterator[tuple[str, list[float]]]:
    """The buffers that are computed from the configuration and saved in no file."""
    names = [name for name in module._non_persistent_buffers_set if name in dict(_buffers(module))]
    empty = [name for name in names if module.get_buffer(name).device.type == "meta"]
    for name in empty:
        unknown = torch.full_like(module.get_buffer(name), -1, device="cpu")
        setattr(module, name, unknown)
    if empty:
        model._init_weights(module)
    for name in names:
        values = module.get_buffer(name)
        if values.numel() <= 4096 and not (name in empty and bool((values == -1).all())):
            yield name, values.double().flatten().tolist()


def check_agreement(model: PreTrainedModel, path: str) -> None:
    """Refuse a model that would not come back from a file, because its configuration describes
    another one.

    Args:
        path: of the list of decoder layers.

    Raises:
        ValueError: it shows up to three differences to the `twin`.
    """
    try:
        found = differences(model, path)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        found = [f"{type(error).__name__}: {error}".splitlines()[0]]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"these layers cannot be removed from a {model.config.model_type}: a model made from "
            f"its new configuration would differ in {'; '.join(found[:3])}{more}. This type "
            "computes what a layer is from its number: remove layers that leave the pattern as it "
            "is, such as whole periods of it"
        )
