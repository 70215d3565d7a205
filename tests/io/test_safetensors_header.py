"""Headers of weight files, read by ourselves: as the library reads them, or refused."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.io.safe_parse import MAX_DEPTH, parse_json, read_bytes
from secateur.io.safetensors_header import MAX_HEADER, read_header, read_index, tensors
from secateur.utils.errors import InputError


def written(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(start, end, shape=None, dtype="U8"):
    shape = [end - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def test_it_says_where_the_numbers_of_every_tensor_are(file):
    kept = {
        "b": torch.arange(6, dtype=torch.float32).view(2, 3),
        "a": torch.arange(5, dtype=torch.uint8),
        "nothing": torch.zeros(0, 4),
        "one": torch.tensor(7),
        "größe": torch.ones(3, dtype=torch.bfloat16),
    }
    save_file(kept, file, metadata={"format": "pt"})
    found, raw = read_header(file), file.read_bytes()
    assert found.keys() == kept.keys()
    assert [e.start for e in found.values()] == sorted(e.start for e in found.values())
    for name, tensor in kept.items():
        at = found[name]
        assert at.shape == tuple(tensor.shape)
        assert raw[at.start : at.end] == bytes(tensor.flatten().view(torch.uint8).tolist())
    with safe_open(file, framework="pt") as other:
        assert {n: other.get_slice(n).get_dtype() for n in kept} == {
            n: e.dtype for n, e in found.items()
        }


BAD = {
    "another length": ({"a": entry(0, 3, [4])}, 4, "takes 4 bytes, and has 3"),
    "other items": ({"a": entry(0, 4, [4], "F32")}, 4, "takes 16 bytes"),
    "an overlap": ({"a": entry(0, 3), "b": entry(2, 5)}, 5, "overlaps"),
    "the same bytes twice": ({"a": entry(0, 3), "b": entry(0, 3)}, 3, "overlaps"),
    "a hole": ({"a": entry(0, 3), "b": entry(4, 5)}, 5, "hole"),
    "beyond the end": ({"a": entry(0, 9)}, 5, "and it has"),
    "bytes left": ({"a": entry(0, 3)}, 5, "and it has"),
    "backwards": ({"a": entry(3, 0, [0])}, 3, "has -3"),
    "below zero": ({"a": entry(-3, 0, [3])}, 3, "offsets"),
    "a shape below zero": ({"a": entry(0, 3, [-3])}, 3, "shape"),
    "two below zero": ({"a": entry(0, 4, [-2, -2])}, 4, "shape"),
    "a truth value": ({"a": entry(0, 1, [True])}, 1, "shape"),
    "a fraction": ({"a": entry(0, 1, [1.0])}, 1, "shape"),
    "a product that wraps around": ({"a": entry(0, 0, [2**32, 2**32])}, 0, "takes"),
    "many dims": ({"a": entry(0, 1, [1] * 99)}, 1, "shape"),
    "an unknown format": ({"a": entry(0, 1, [1], "F7")}, 1, "'F7'"),
    "a format that is none": ({"a": entry(0, 1, [1], ["U8"])}, 1, "format"),
    "three offsets": ({"a": {**entry(0, 1), "data_offsets": [0, 1, 1]}}, 1, "offsets"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, 1, "should have"),
    "something more": ({"a": {**entry(0, 1), "also": 1}}, 1, "should have"),
    "no entry": ({"a": 3}, 1, "should have"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "metadata"),
    "a list": ([], 0, "no JSON object"),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 1)).encode(),) * 2), 1, "twice"),
    "no JSON": (b"{{", 0, "not JSON"),
    "no UTF-8": (b'{"\xff":1}', 0, "UTF-8"),
    "half a character": (rb'{"\ud800":1}', 0, "surrogate"),
    "NaN": (b'{"a":NaN}', 0, "NaN"),
    "beyond floats": (b'{"a":1e999}', 0, "too large"),
    "a number of many digits": (b'{"a":' + b"9" * 5000 + b"}", 0, "5000 digits"),
    "nested deeply": (b"[" * 100_000, 0, "deeper"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), 0, "UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused(file, name):
    header, size, words = BAD[name]
    written(file, header, bytes(size))
    with pytest.raises(InputError, match=words) as refused:
        read_header(file)
    assert "model.safetensors' is corrupt or cut short" in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "0 bytes in a file of 0"),
        (b"\x08\0\0\0", "in a file of 4"),
        ((2**64 - 1).to_bytes(8, "little"), "18446744073709551615 bytes in a file of 8"),
        ((100).to_bytes(8, "little") + b"{}", "100 bytes in a file of 10"),
    ],
)
def test_a_length_beyond_the_file_is_refused(file, raw, words):
    file.write_bytes(raw)
    with pytest.raises(InputError, match=words):
        read_header(file)


def test_a_header_beyond_any_is_not_even_read(file):
    with file.open("wb") as sparse:  # takes no space
        sparse.write((MAX_HEADER + 1).to_bytes(8, "little"))
        sparse.truncate(MAX_HEADER + 100)
    with pytest.raises(InputError, match="none has more"):
        read_header(file)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "no file"), ("none", "No such file"), ("a\0b", "null")):
        with pytest.raises(InputError, match=words):
            read_header(tmp_path / name)


def test_room_is_made_for_what_a_file_holds_and_no_more(tmp_path):
    (tmp_path / "small").write_bytes(b"1")
    assert read_bytes(tmp_path / "small", 2**62) == b"1"


def test_many_values_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="more than"):
        parse_json(b"[" + b"[],".join([b""] * 5_000_000) + b"0]")


def test_brackets_and_escapes_in_names_are_only_letters(file):
    name = '"[' * MAX_DEPTH * 2 + "\\" + "\\ud800"
    written(file, {name: entry(0, 1)}, b"x")
    assert read_header(file).keys() == {name}
    assert parse_json(rb'"\ud83d\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize("end", [rb"\"" * 100_000, b'"' * 200_001, b"\\" * 200_001])
def test_quotes_without_end_take_no_time(end):
    with pytest.raises(ValueError, match="not JSON"):
        parse_json(b'"' + end)


def index(folder, content):
    path = folder / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", "..", "a.bin", "", 3]
)
def test_an_index_names_weight_files_beside_it_alone(tmp_path, name):
    index(tmp_path, {"weight_map": {"a": name}})
    with pytest.raises(InputError, match=r"beside the index"):
        read_index(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{"])
def test_a_damaged_index_is_refused(tmp_path, content):
    index(tmp_path, content)
    with pytest.raises(InputError, match="is damaged"):
        read_index(tmp_path)


def test_tensors_of_all_shards_and_of_no_other_file(tmp_path):
    for name in ("x", "y", "z"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index(tmp_path, {"weight_map": {"x": "x.safetensors", "y": "y.safetensors"}})
    assert tensors(tmp_path).keys() == {"x", "y"}
    (tmp_path / "y.safetensors").unlink()
    with pytest.raises(InputError, match=r"y\.safetensors, which is missing"):
        tensors(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(InputError, match="in another file"):
        tensors(tmp_path)
