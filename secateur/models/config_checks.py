"""A model's config from a stranger, looked at before transformers makes anything of it.

transformers makes lists, modules and tensors of the sizes that a config names, follows its pointers
to other files, and sets every key of it as an attribute. Here those are held against the headers of
the weight files, or refused, before that. Code that a checkpoint brings along is none of this: it
runs only where ``trust_remote_code`` was asked for.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.io.safe_parse import HostileError, parse_json, read_bytes
from secateur.io.safetensors_header import Entry, tensors
from secateur.utils.errors import InputError, shown

MAX_BYTES = 2**24
MAX_NODES = 2**20
MAX_PARTS = 1024  # layers, heads or experts where no weight file says that there are more
MAX_EXPERTS = 2**15  # in all layers, likewise
MAX_LABELS = 2**20
MAX_SIZE = 2**53
MAX_PATTERN = 512
MAX_PATTERNS = 2**16
SLACK = 2**24  # numbers that a model may have beyond 4 for each that its files hold
MAX_BUFFERS = 2**28
#: what a config has so many of, and what only sounds so
PARTS = re.compile(r"layer|head|expert|block|depth|group|attention_types", re.IGNORECASE)
LAYERS, EXPERTS = re.compile(r"layers|block|depth"), re.compile(r"experts")
SIZES = re.compile(r"(size|dim|ids?|tokens?|positions?|width|length)$", re.IGNORECASE)
#: keys that lead to other files of the repository, past what is looked at here
POINTERS = ("configuration_files", "transformers_weights")
ADAPTER = "adapter_config.json"


def vet_config(source: str, path: Path, trusted: bool) -> None:
    """Look at config.json, beside which weight files may lie. No code runs where it is not trusted.

    Raises:
        InputError: transformers should not be handed it.
    """
    named, folder = f"model {source!r}: {path.name}", path.parent
    try:
        fields = parse_json(read_bytes(path, MAX_BYTES, path.name), MAX_NODES)
        if not isinstance(fields, dict):
            raise HostileError("it is no JSON object")
        for key in fields:
            if key in POINTERS or key.startswith("__"):
                raise HostileError(f"the key {shown(key)} is not read; remove it")
            if callable(getattr(PreTrainedConfig, key, None)):
                raise HostileError(f"{shown(key)} is a method of configs, and no key; remove it")
        for key, number in _numbers("", fields):
            _check_number(key, number, folder)
        _check_experts(fields, folder)
        if not trusted:
            _check_code(fields)
            _check_kernels(fields)
        _check_patterns(fields.get("quantization_config"))
    except OSError as error:
        raise InputError(f"{named}: {error.strerror}.") from error
    except HostileError as error:
        raise InputError(f"{named}: {error}.") from error
    if (folder / ADAPTER).exists():
        raise InputError(
            f"model {source!r} holds an adapter ({ADAPTER}), which would be loaded unseen; merge "
            f"it into the model (peft: merge_and_unload), or remove it."
        )


def _numbers(key: str, value: Any) -> Iterator[tuple[str, int]]:
    """All whole numbers of a config, each with the nearest name above it."""
    left = [(key, value)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, inner) for inner in value)
        elif isinstance(value, int):
            yield key, value


def _check_number(key: str, number: int, folder: Path) -> None:
    most, parts = MAX_SIZE, bool(PARTS.search(key) and not SIZES.search(key))
    if key == "num_labels":
        most = MAX_LABELS
    elif parts and abs(number) > MAX_PARTS:  # no more than there are tensors
        most = max(MAX_PARTS, len(tensors(folder)))
    if abs(number) > most:
        raise HostileError(f"{shown(key)} is {number}, and more than {most} can't be meant")


def _check_experts(fields: dict[str, Any], folder: Path) -> None:
    """Refuse layers with more experts in all than any model has, or than there are tensors."""
    numbers = [(key, abs(n)) for key, n in _numbers("", fields) if not SIZES.search(key)]
    layers, experts = (
        max((n for key, n in numbers if what.search(key)), default=0) for what in (LAYERS, EXPERTS)
    )
    if layers * experts > MAX_EXPERTS and layers * experts > len(tensors(folder)):
        raise HostileError(
            f"{layers} layers with {experts} experts each, and more than {MAX_EXPERTS} experts in "
            f"all can't be meant"
        )


def _check_code(fields: dict[str, Any]) -> None:
    """Refuse a model that only code beside it could make; of others that code is left alone."""
    model_type = fields.get("model_type")
    if "auto_map" in fields and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        raise HostileError(
            f"the model_type {shown(model_type)} is known to code of its own alone, which runs "
            f"only where you trust who wrote it: look at its files, and add --trust-remote-code"
        )


def _check_kernels(fields: dict[str, Any]) -> None:
    """Refuse names of repositories whose code would be fetched to compute attention or experts."""
    left: list[tuple[str, Any]] = list(fields.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += ((key if "implementation" in key else k, v) for k, v in value.items())
        elif "implementation" in key and isinstance(value, str) and "/" in value:
            raise HostileError(
                f"{shown(key)} names code to be fetched, {shown(value)}; add --trust-remote-code "
                f"if you trust who wrote it, or remove the key"
            )


def _check_patterns(value: Any) -> None:
    """Refuse patterns for names of layers that could take for ever."""
    left, count = [value], 0
    while left:
        found = left.pop()
        if isinstance(found, dict):
            left += [*found, *found.values()]
        elif isinstance(found, list):
            left += found
        elif isinstance(found, str):
            count += 1
            bare = re.sub(r"\\.|\[[^\]]*\]", "x", found)
            endless = len(re.findall(r"[*+{]", bare))
            if len(found) > MAX_PATTERN or endless > 3 or bare.count("?") > 8:
                raise HostileError(f"quantization_config: the pattern {shown(found)} is too long")
            if re.search(r"\)[*+{]", bare):
                raise HostileError(
                    f"quantization_config: the pattern {shown(found)} repeats a group"
                )
    if count > MAX_PATTERNS:
        raise HostileError(f"quantization_config: more than {MAX_PATTERNS} texts")


def vet_shapes(source: str, folder: Path, module: nn.Module) -> None:
    """Refuse a config that asks for far more numbers than the weight files of a folder hold.

    ``module`` is the model without storage. Exact shapes are compared when tensors are loaded.

    Raises:
        InputError: it does, or a weight file is damaged.
    """
    there = tensors(folder).values()
    if not there:
        return
    held = sum(map(_numbers_in, there))
    wanted = sum(parameter.numel() for parameter in module.parameters())
    if wanted > 4 * held + SLACK:
        raise InputError(
            f"model {source!r}: config.json asks for {wanted} numbers, and the weight files hold "
            f"{held}; they are not from the same model."
        )
    buffers = sum(buffer.numel() for buffer in module.buffers())
    if buffers > 4 * held + MAX_BUFFERS:
        raise InputError(
            f"model {source!r}: config.json asks for tables of {buffers} numbers, for a model of "
            f"{held}; they are not from the same model."
        )


def _numbers_in(entry: Entry) -> int:
    """At most so many numbers of a weight; bytes and whole numbers may be packed."""
    size = entry.end - entry.start
    if entry.dtype in ("F64", "F32", "F16", "BF16"):
        return size // {"F64": 8, "F32": 4}.get(entry.dtype, 2)
    return 8 * size
