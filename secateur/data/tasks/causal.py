"""Causal language models: every token from those before it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from secateur.data.tasks.base import Use
from secateur.data.tokens import Calibration, Text, Tokens, calibration_tokens, held_windows


@dataclass(frozen=True)
class CausalLM(Use):
    """Windows of text, judged by the perplexity of their tokens."""

    auto: ClassVar[str] = "AutoModelForCausalLM"
    what: ClassVar[str] = "causal language model"
    writes: ClassVar[bool] = True

    def calibration(self, calibration: Calibration, reader: Any) -> Tokens:
        """Windows of the text that is not set aside."""
        return calibration_tokens(calibration, reader)

    def held(self, text: Text, reader: Any, length: int, limit: int) -> Tokens:
        """Consecutive windows."""
        return held_windows(text, reader, length, limit)

    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Ids; nothing is kept for tokens to come."""
        return {"input_ids": tokens.ids, "use_cache": False}

    def counted(self, tokens: Tokens) -> Tensor:
        """Every real token's output."""
        return tokens.mask

    def answers(self, logits: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What is said of every real token but a window's first.

        Padding stands at the end, so what is before a real token is real.
        """
        real = tokens.mask[:, 1:]
        return logits[:, :-1][real], tokens.ids[:, 1:][real]
