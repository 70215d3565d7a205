"""A tokenizer as GGUF metadata."""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.utils.errors import InputError

NO_TOKENIZER = "--no-tokenizer writes the file without one; its users then need token numbers."
SPACE = "▁"  # of SentencePiece
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
DIGIT = "a digit"  # stands for a split into digits
#: how a byte-level BPE cuts text before it merges, and llama.cpp's name of that
PRE_TOKENIZERS = {
    (WORDS,): "gpt-2",
    (DIGIT, WORDS): "smollm",
    (_HEAD + r"\p{N}{1,3}|" + _TAIL,): "llama-bpe",
    (_HEAD + r"\p{N}|" + _TAIL,): "qwen2",
}
#: texts on which llama.cpp and the tokenizer have to agree
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "He said: \"It's 12345 degrees, isn't it?\"  I'LL ask… (3.14)",
    "def f(x):\n    return x ** 2\n\n\tprint(f(10))",
    "  two spaces, trailing space ",
    "Grüße, naïve café — 東京 2024年 🙂 привет",
)
#: of GGUF's token types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know about a tokenizer.

    Attributes:
        model: "llama", a SentencePiece BPE with scores, or "gpt2", a byte-level BPE with merges.
        pre: how text is cut before merging, by llama.cpp's name.
        tokens: by number, one for every row of the embedding.
        types: of each.
        scores: of each, of a SentencePiece BPE: the earlier a merge, the higher.
        space_prefix: whether a space is put before a text.
        added: tokens put before and behind a text, as (beginning, end).
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    space_prefix: bool | None
    added: tuple[bool, bool]

    def add_to(self, writer: Any, tokenizer: Any) -> None:
        """Add the vocabulary to a file, with merges, special tokens and chat template."""
        import gguf

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            merges = self.model == "gpt2"
            logging.getLogger("gguf.vocab").setLevel(
                logging.ERROR
            )  # of templates for pairs of texts
            special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=len(self.tokens))
        for name, put in zip(("bos", "eos"), self.added, strict=True):
            special.add_special_token[name] = put
        special.add_to_gguf(writer, quiet=True)


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Convert a tokenizer for llama.cpp, for an embedding with so many rows.

    Raises:
        InputError: llama.cpp has none like it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        raise InputError(f"the tokenizer, a {kind}, has no tokenizer.json. {NO_TOKENIZER}")
    content = json.loads(backend.to_str())
    kind = content["model"]["type"]
    if kind != "BPE":
        raise InputError(
            f"a {kind} tokenizer is none that a language model of llama.cpp has here; BPE is. "
            f"{NO_TOKENIZER}"
        )
    spaced = content["model"].get("byte_fallback", False)
    return (_sentencepiece if spaced else _byte_level)(content, tokenizer, rows)


def _sentencepiece(content: Mapping[str, Any], tokenizer: Any, rows: int) -> Vocabulary:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    unknown = content["model"].get("unk_token")

    def type_of(token: str) -> int:
        if token == unknown:
            return UNKNOWN
        return BYTE if len(token) == 6 and token.startswith("<0x") else NORMAL

    tokens, types = _tokens(content, tokenizer, rows, type_of)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    prefix = _puts_space(content)
    added = _added(tokenizer)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=(*tokens,),
        types=(*types,),
        scores=(*scores,),
        space_prefix=prefix,
        added=added,
    )


def _byte_level(content: Mapping[str, Any], tokenizer: Any, rows: int) -> Vocabulary:
    cuts = _cuts(content)
    pre = PRE_TOKENIZERS.get(cuts)
    if pre is None:
        raise InputError(
            f"the tokenizer cuts text by {' then '.join(cuts)!r}, of which this package knows no "
            f"name in llama.cpp. {NO_TOKENIZER}"
        )
    normalizer = content["normalizer"] or {"type": "NFC"}
    if normalizer["type"] != "NFC":  # which llama.cpp leaves out; well-formed text has it
        raise InputError(
            f"the tokenizer has a normalizer {normalizer['type']!r}, which llama.cpp does not "
            f"apply. {NO_TOKENIZER}"
        )
    tokens, types = _tokens(content, tokenizer, rows, lambda _: NORMAL)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=(*tokens,),
        types=(*types,),
        scores=None,
        space_prefix=None,
        added=_added(tokenizer),
    )


def _cuts(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The regular expressions of the pre-tokenizer, in order.

    Raises:
        InputError: it is cut otherwise, or not on bytes.
    """
    whole = content["pre_tokenizer"] or {"type": "nothing"}
    parts = whole.get("pretokenizers", [whole])
    found, bytes_seen = [], False
    for part in parts:
        kind = part["type"]
        if kind == "Split" and "Regex" in part["pattern"] and part["behavior"] == "Isolated":
            found.append(part["pattern"]["Regex"])
        elif kind == "Digits" and part["individual_digits"]:
            found.append(DIGIT)
        elif kind == "ByteLevel" and not part["add_prefix_space"]:
            bytes_seen = True
            found += [WORDS] if part["use_regex"] else []
        else:
            break
    else:
        if bytes_seen:
            return tuple(found)
    names = ", ".join(part["type"] for part in parts)
    raise InputError(
        f"the tokenizer cuts text by {names}, which this package has no name for in llama.cpp. "
        f"{NO_TOKENIZER}"
    )


def _tokens(
    content: Mapping[str, Any], tokenizer: Any, rows: int, type_of: Callable[[str], int]
) -> tuple[list[str], list[int]]:
    """Token and type of every row; rows without a token are padding."""
    names = [f"[PAD{row}]" for row in range(rows)]
    types = [UNUSED] * rows
    for token, number in tokenizer.get_vocab().items():
        names[number], types[number] = token, type_of(token)
    for entry in content["added_tokens"]:
        number = entry["id"]
        if types[number] != UNKNOWN:
            types[number] = CONTROL if entry["special"] else USER_DEFINED
    return names, types


def _puts_space(content: Mapping[str, Any]) -> bool:
    normalizer = content["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    cutter = content["pre_tokenizer"] or {}
    scheme = cutter.get("prepend_scheme", "never") if cutter.get("type") == "Metaspace" else "never"
    return scheme != "never" or any(step.get("prepend") == SPACE for step in steps)


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets a begin token, and an end token."""
    ids = tokenizer("a")["input_ids"]
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    bare = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    several = len(ids) > bare
    return several and ids[0] == first, several and ids[-1] == last


def asked(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Texts with their token ids, without begin and end tokens."""
    return [(t, tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]


def check_said(expected: list[tuple[str, list[int]]], said: list[list[int]]) -> None:
    """Refuse a vocabulary with which llama.cpp tokenizes differently.

    Raises:
        InputError: a text that it reads otherwise.
    """
    for (text, wanted), found in zip(expected, said, strict=True):
        if wanted != found:
            raise InputError(
                f"the tokenizer's text {text!r} is {found} in llama.cpp and {wanted} in "
                f"transformers. {NO_TOKENIZER}"
            )
