"""Script for the separate process that runs llama.cpp, which may crash on invalid files.

It imports nothing except llama.cpp and numpy.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

FLOAT32 = 0  # of ggml's types; keys and values are float16 unless told
NO_FLASH = 0


def quantize(request: dict[str, Any]) -> None:
    """Let llama.cpp quantize a file to its few-bit formats."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = request["ftype"], request["threads"]
    code = llama_cpp.llama_model_quantize(
        request["file"].encode(), request["out"].encode(), ctypes.byref(params)
    )
    if code:
        raise SystemExit(f"llama_model_quantize gave {code}")


def run(request: dict[str, Any]) -> tuple[list[Any], list[list[int]]]:
    """Logits of all given tokens, the prompt in one batch and then one by one; tokens of texts.

    Keys and values are float32, and attention is not fused, which would round them to float16.
    """
    model = llama_cpp.llama_model_load_from_file(
        request["file"].encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit("the file could not be loaded")
    vocab = llama_cpp.llama_model_get_vocab(model)
    said = [_tokens(vocab, text) for text in request["texts"]]
    prompt, following = request["prompt"], request["following"]
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(prompt) + len(following)
    params.n_threads = params.n_threads_batch = request["threads"]
    params.type_k = params.type_v = FLOAT32
    params.flash_attn_type = NO_FLASH
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("there is no room for a context")
    rows, place = [], 0
    for ids in (prompt, *([token] for token in following)):
        rows += _decoded(context, ids, place, request["vocabulary"])
        place += len(ids)
    return rows, said


def _decoded(context: Any, ids: list[int], place: int, vocabulary: int) -> list[Any]:
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, place + i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    if code := llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"llama_decode gave {code}")
    pointers = (llama_cpp.llama_get_logits_ith(context, i) for i in range(len(ids)))
    return [np.ctypeslib.as_array(p, (vocabulary,)).copy() for p in pointers]


def _tokens(vocab: Any, text: str) -> list[int]:
    raw = text.encode()
    room = len(raw) + 8
    found = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(
        vocab, raw, len(raw), found, room, add_special=False, parse_special=False
    )
    return list(found[:count])


def main(folder: Path) -> None:
    """Execute the request in ``request.json``."""
    request = json.loads((folder / "request.json").read_text())
    llama_cpp.llama_backend_init()
    if "out" in request:
        quantize(request)
    else:
        rows, said = run(request)
        np.save(folder / "logits.npy", np.stack(rows))
        (folder / "said.json").write_text(json.dumps(said))
    (folder / "done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
