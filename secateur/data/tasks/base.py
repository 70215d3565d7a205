"""What a model is used for: its auto class, its input, and what its output is evaluated by."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.data.tokens import UNLABELLED, Calibration, Text, Tokens, read_documents
from secateur.utils.errors import InputError


@dataclass(frozen=True)
class Use(ABC):
    """One kind of model head that transformers has an auto class for.

    The ``reader`` converts raw input to tensors: a tokenizer or an image processor.
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
        """The auto class of transformers."""
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
        """Check a source before anything is measured.

        Raises:
            InputError: it is missing, unreadable or empty.
        """
        read_documents(source)

    @abstractmethod
    def calibration(self, calibration: Calibration, reader: Any) -> Tokens:
        """The calibration windows or images of a :class:`~secateur.data.tokens.Calibration`.

        Raises:
            InputError: the source is missing, unreadable, empty or too short.
        """

    @abstractmethod
    def held(self, text: Text, reader: Any, length: int, limit: int) -> Tokens:
        """Evaluation data: at most ``limit`` windows of ``length`` tokens, or images.

        Raises:
            InputError: the source is missing, unreadable, empty or too short.
        """

    @property
    def lacking(self) -> str:
        """Message for data in which no output has a label."""
        return "no token is there that others predict; give more text."

    def example(self, rows: int, length: int) -> Tokens:
        """Input of a given shape for timing; for text one token repeated."""
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    @abstractmethod
    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Arguments of the model's forward pass."""

    def beginning(self, tokens: Tokens, count: int) -> Tokens:
        """One short row: the first row, and for text at most ``count`` tokens of it."""
        first = tokens[:1]
        labels = first.labels
        if self.reads_text:
            first = Tokens(first.ids[:, :count], first.mask[:, :count])
            labels = None if labels is None else labels[:, :count]
        return Tokens(first.ids.clone(), first.mask.clone(), labels)

    def generated(self, module: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
        """Greedy continuation of a prompt by at most so many tokens, for models that generate."""
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
        """Arguments of the forward pass for one more token after an output with a cache."""
        return {"input_ids": last, "past_key_values": state.past_key_values, "use_cache": True}

    def counted(self, tokens: Tokens) -> Tensor:
        """Mask of the outputs that count, bool, shaped like the logits without the last axis."""
        assert tokens.labels is not None
        return tokens.labels != UNLABELLED

    def amount(self, tokens: Tokens) -> int:
        """Number of outputs that the figures refer to."""
        return int(self.counted(tokens).sum())

    def seen(self, tokens: Tokens) -> int:
        """Minimum number of tokens that the blocks process."""
        return tokens.count

    def answers(self, logits: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The outputs with labels, (n, classes), and their labels, (n)."""
        assert tokens.labels is not None
        labelled = tokens.labels != UNLABELLED
        return logits[labelled], tokens.labels[labelled]

    def loss(self, logits: Tensor, tokens: Tokens) -> tuple[Tensor, int]:
        """Sum of the cross-entropy over the labels, and their number."""
        given, right = self.answers(logits, tokens)
        return nn.functional.cross_entropy(given, right, reduction="sum"), len(right)
