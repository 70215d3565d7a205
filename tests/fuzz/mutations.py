"""Valid files made invalid: plain data, its text and the bytes of that, each changed at random."""

import copy
import json
import math
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

RAW = "\ue000"  # stands around text that goes into a file as it is
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 1024, 1025, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**53 + 1),
    *(2**63 - 1, 2**63, -(2**63), 2**64, 10**9, 10**12, 10**18, 10**30),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-320, 1e308, 1e22, 3.0000000000000004),
)
TEXTS = (
    *("", " ", "a", "none", "true", "0", "1", "1e999", "nan", "inf", "-", "#", "*", "&a", "!!str"),
    *("../../outside", "/etc/passwd", "..", ".", "a/b", "a\\b", "a\0b", "C:\\a", "~", "$HOME"),
    *("\x1b[2J\x07", "\r\n", "\u2028", "\u202e", "é" * 300, "\U0001f600", "\ufffe", "x" * 50_000),
    *("{{7*7}}", "%s%n", "<script>alert(1)</script>", "'; DROP", "__class__", "__import__('os')"),
    *("os/repo", "someone/kernels:attention", "re:(a+)+$", "re:" + ".*" * 20, "bundled", "demo"),
    *("auto", "svd", "flap", "uniform", "knapsack", "latency", "plain", "bfloat16", "F64", "I4"),
    *("layers.0.mlp", "layers.99.mlp", "model.embed_tokens.weight", "lm_head.weight"),
)
NAMES = (
    *("", "version", "keep", "steps", "name", "options", "dtype", "shape", "data_offsets", "form"),
    *("num_hidden_layers", "vocab_size", "hidden_size", "num_labels", "layer_types", "auto_map"),
    *("attn_implementation", "quantization_config", "configuration_files", "transformers_weights"),
    *("__class__", "__dict__", "to_dict", "from_pretrained", "_name_or_path", "attribute_map"),
    *("rope_parameters", "id2label", "text_config", "torch_dtype", "architectures", "model_type"),
    *("__metadata__", "weight_map", "<<", "a\0b", "../x", "\ud7ff", "n" * 5000),
)
#: what no encoder of plain data writes
PIECES = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "-" + "9" * 60, "0x7f", "01"),
    *("1" * 400 + ".5", "1e-99999", r'"\ud800"', r'"\udfff\ud800"', r'"\u0000"', '"\x01"', "'a'"),
    *("[" * 40, "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "[" + "0," * 3000 + "0]", "", ","),
    *("[[[[[[[[]]]]]]]]", '{"a":1,"a":2}', "// a", "/* */", "\ufeff", "undefined", "1 2"),
)
YAML_PIECES = (
    *("*a", "&a [*a]", "&a {<<: *a}", "!!python/object/apply:os.system [id]", "!!binary a=b=c"),
    *("!!python/name:os.system", "2001-99-99", "1:99:99:99:99", "0b" + "1" * 5000, ".nan", ".inf"),
    *("? [a]\n: b", "{[a]: b}", "{{a: b}: c}", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp x"),
    *("[" * 500, "{a: " * 300, "%YAML 9.9", "---\n---", "!<tag:x> 1", "!!int 1_0:9", "9" * 5000),
    *("&a [x, x]\nb: [*a, *a]", "|\n a", ">-\n a", "'", '"\\x"', "\t- a", "!!float a", "~"),
)


def nodes(data: Any) -> list[tuple[Any, Any]]:
    """Every place inside plain data: the dict or list that it is in, and its key there."""
    found: list[tuple[Any, Any]] = []
    left = [data]
    while left and len(found) < 20_000:
        here = left.pop()
        keys: Any = ()
        if isinstance(here, dict):
            keys = list(here)
        elif isinstance(here, list):
            keys = range(len(here))
        found += [(here, key) for key in keys]
        left += [here[key] for key in keys]
    return found


def any_value(chance: Random, donors: list[Any]) -> Any:
    """A number, a text, something empty or deep, or part of another file."""
    kind = chance.randrange(9)
    if kind < 3:
        return chance.choice(NUMBERS)
    if kind < 5:
        return chance.choice(TEXTS)
    if kind == 5:
        return f"{RAW}{chance.choice(PIECES)}{RAW}"
    if kind == 6:
        return chance.choice((None, True, False, [], {}, [[]], [None], {"": {}}, [0] * 2000))
    donor = chance.choice(donors)
    places = nodes(donor)
    if not places:
        return copy.deepcopy(donor)
    inside, key = chance.choice(places)
    return copy.deepcopy(inside[key])


def changed(data: Any, chance: Random, donors: list[Any]) -> Any:
    """A copy of plain data with one thing changed."""
    made = copy.deepcopy(data)
    places = nodes(made)
    if not places or chance.random() < 0.01:
        return any_value(chance, donors)
    inside, key = chance.choice(places)
    kind = chance.randrange(10)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):  # another name, or one that is there
        names = [*NAMES, *(n for place, n in places[:50] if isinstance(place, dict))]
        inside[chance.choice(names)] = inside.pop(key)
    elif kind == 2 and isinstance(inside, dict):
        inside[chance.choice(NAMES)] = any_value(chance, donors)
    elif kind == 2:
        inside.insert(key, any_value(chance, donors))
    elif kind == 3:
        other, place = chance.choice(places)
        inside[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(inside[key])
    elif kind == 4 and isinstance(inside, list):
        times = chance.choice((0, 2, 100))
        inside[key : key + 1] = [copy.deepcopy(inside[key]) for _ in range(times)]
    elif kind == 5:
        inside[key] = nested(inside[key], chance.choice((1, 2, 30, 70)), chance)
    elif kind == 6 and isinstance(inside[key], int | float):
        near = chance.choice((1, -1, 8, -8, 64, 0.5))
        inside[key] = chance.choice((inside[key] + near, inside[key] * 2, -inside[key]))
    else:
        inside[key] = any_value(chance, donors)
    return made


def nested(value: Any, depth: int, chance: Random) -> Any:
    for _ in range(depth):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


def as_json(data: Any, chance: Random) -> bytes:
    """Its text, in which raw pieces stand as they are and some name may be there twice."""
    text = json.dumps(
        data, indent=chance.choice((None, None, 1)), ensure_ascii=chance.random() < 0.5
    )
    text = text.replace("\\ue000", RAW)
    parts = text.split(RAW)
    for i in range(1, len(parts) - 1, 2):  # without the quotes around them
        parts[i] = json.loads(f'"{parts[i]}"')
        parts[i - 1], parts[i + 1] = parts[i - 1].removesuffix('"'), parts[i + 1].removeprefix('"')
    text = "".join(parts)
    if chance.random() < 0.05 and text.startswith("{"):
        text = text[:-1].rstrip() + ',"version":1,' + text[1:].lstrip()
    return text.encode("utf-8", "surrogatepass")


def as_yaml(data: Any, chance: Random) -> bytes:
    """The same as YAML, with pieces that only YAML knows."""
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    text = re.sub(rf"""["']?{RAW}([^{RAW}]*){RAW}["']?""", r"\1", text)
    if chance.random() < 0.25:
        lines = text.splitlines()
        place = chance.randrange(len(lines) or 1)
        before = lines[place].partition(":")[0] if lines else ""
        lines[place : place + 1] = [f"{before}: {chance.choice(YAML_PIECES)}"]
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def damaged(raw: bytes, chance: Random) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    kind, size = chance.randrange(8), len(raw)
    at = chance.randrange(size + 1)
    to = min(size, at + chance.choice((1, 2, 8, 200)))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + raw[to:]
    if kind == 2:
        return raw[:at] + raw[at:to] * chance.choice((2, 50)) + raw[to:]
    if kind == 3:
        return raw[:at] + chance.randbytes(chance.choice((1, 4, 64))) + raw[to:]
    if kind == 4:
        return (
            raw[:at] + chance.choice((*PIECES, *YAML_PIECES)).encode("utf-8", "replace") + raw[to:]
        )
    if kind == 5:
        return raw.decode("utf-8", "replace").encode(
            chance.choice(("utf-16", "utf-8-sig", "utf-32"))
        )
    if kind == 6 and size:
        flipped = bytearray(raw)
        for _ in range(chance.choice((1, 3, 20))):
            flipped[chance.randrange(size)] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    return raw[:at] + b" " * chance.choice((1, 100_000)) + raw[at:]


def mutated(
    seeds: list[Any], chance: Random, written: Callable[[Any, Random], bytes] = as_json
) -> bytes:
    """A file made of one of the seeds, changed once to four times and perhaps damaged as bytes."""
    data = chance.choice(seeds)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        data = changed(data, chance, seeds)
    raw = written(data, chance)
    while chance.random() < 0.2:
        raw = damaged(raw, chance)
    return raw


def weight_file(seeds: list[tuple[Any, bytes]], chance: Random) -> bytes:
    """A safetensors file: the length of its header, the header, tensors."""
    header, data = chance.choice(seeds)
    raw = mutated([header], chance) if chance.random() < 0.9 else json.dumps(header).encode()
    length = len(raw)
    if chance.random() < 0.15:
        length = chance.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8 + 1))
    if chance.random() < 0.15:
        data = chance.choice((b"", data[:-1], data + b"\0", data * 2, data[: len(data) // 2]))
    made = max(0, length).to_bytes(8, "little") + raw + data
    return damaged(made, chance) if chance.random() < 0.1 else made


def numbers(raw: bytes, chance: Random) -> bytes:
    """A safetensors file of float64 with some of its numbers changed."""
    made, behind = bytearray(raw), 8 + int.from_bytes(raw[:8], "little")
    for _ in range(chance.choice((0, 1, 3, 100))):
        at = behind + 8 * chance.randrange((len(raw) - behind) // 8)
        odd = chance.choice((math.nan, math.inf, -1.0, -1e-300, 0.0, 1e-320, 1e150, 1e308, 3.0))
        made[at : at + 8] = struct.pack("<d", odd)
    return bytes(made)
