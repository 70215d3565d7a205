"""What a model is for: what opens it, what it reads, and what its output is judged by."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.tokens import UNLABELLED, Calibration, Text, Tokens, read_documents
from secateur.utils.errors import InputError


@dataclass(frozen=True)
class Use(ABC):
    """One kind of head on a body, of those that transformers has auto classes for.

    A ``reader`` is what turns raw input into numbers: a tokenizer, or an image processor.
    """

    auto: ClassVar[str]  #: its auto class in transformers
    what: ClassVar[str]  #: what a model of it is called
    #: whether it writes, token by token
    writes: ClassVar[bool] = False
    #: whether it reads text, and not images
    reads_text: ClassVar[bool] = True
    #: what its outputs that count are of
    counts: ClassVar[str] = "tokens"
    #: what the share of right answers is called, where there is one
    share: ClassVar[str | None] = None

    @property
    def opener(self) -> Any:
        """The auto class."""
        import transformers

        return getattr(transformers, self.auto)

    def open_reader(self, source: str, **options: Any) -> Any:
        """The reader of a local folder or hub id; ``options`` are those of ``from_pretrained``.

        Raises:
            InputError: it is empty.
            OSError, ValueError, KeyError, TypeError: it is missing or damaged.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if not tokenizer.get_vocab():
            raise InputError(f"model {source!r}: its tokenizer is empty or missing.")
        return tokenizer

    def check(self, source: str) -> None:
        """Look into a source before anything is measured.

        Raises:
            InputError: it is missing, unreadable or empty.
        """
        read_documents(source)

    @abstractmethod
    def calibration(self, calibration: Calibration, reader: Any) -> Tokens:
        """The windows or images that a :class:`~secateur.data.tokens.Calibration` means.

        Raises:
            InputError: the source is missing, unreadable, empty or too short.
        """

    @abstractmethod
    def held(self, text: Text, reader: Any, length: int, limit: int) -> Tokens:
        """What to judge on: at most ``limit`` windows of ``length`` tokens, or images.

        Raises:
            InputError: the source is missing, unreadable, empty or too short.
        """

    @property
    def lacking(self) -> str:
        """What is wrong where no output has a label, and what to do."""
        return "no token is there that others predict; give more text."

    def example(self, rows: int, length: int) -> Tokens:
        """Any input of a shape, to be timed; of text one token, again and again."""
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    @abstractmethod
    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """The arguments of the model's forward."""

    def beginning(self, tokens: Tokens, count: int) -> Tokens:
        """A short row: the first, and of text no more than ``count`` tokens of it."""
        first = tokens[:1]
        labels = first.labels
        if self.reads_text:
            first = Tokens(first.ids[:, :count], first.mask[:, :count])
            labels = None if labels is None else labels[:, :count]
        return Tokens(first.ids.clone(), first.mask.clone(), labels)

    def generated(self, module: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
        """At most so many new tokens for a prompt, greedily, of one that writes."""
        out: Tensor = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            **options,
        )
        return out[:, 1 if module.config.is_encoder_decoder else ids.shape[1] :]

    def going_on(self, last: Tensor, state: Any) -> dict[str, Any]:
        """The arguments of forward for one more token behind an output with a cache."""
        return {"input_ids": last, "past_key_values": state.past_key_values, "use_cache": True}

    def counted(self, tokens: Tokens) -> Tensor:
        """Which outputs count, bool: the shape of the logits without their last axis."""
        assert tokens.labels is not None
        return tokens.labels != UNLABELLED

    def amount(self, tokens: Tokens) -> int:
        """How many outputs the figures are of."""
        return int(self.counted(tokens).sum())

    def seen(self, tokens: Tokens) -> int:
        """How many tokens the blocks see, at least."""
        return tokens.count

    def answers(self, logits: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The outputs that should be something, (n, classes), and what they should be, (n)."""
        assert tokens.labels is not None
        labelled = tokens.labels != UNLABELLED
        return logits[labelled], tokens.labels[labelled]

    def loss(self, logits: Tensor, tokens: Tokens) -> tuple[Tensor, int]:
        """Cross-entropy summed over the answers, and their number."""
        given, right = self.answers(logits, tokens)
        return nn.functional.cross_entropy(given, right, reduction="sum"), len(right)
