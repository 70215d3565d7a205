"""Causal language models, which predict each token from those before it."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from secateur.data.tasks.base import Use
from secateur.data.tokens import Calibration, Text, Tokens, calibration_tokens, held_windows


@dataclass(frozen=True)
class CausalLM(Use):
    """Windows of text, evaluated by the perplexity of their tokens."""

    auto: ClassVar[str] = "AutoModelForCausalLM"
    what: ClassVar[str] = "causal language model"
    writes: ClassVar[bool] = True

    def calibration(self, calibration: Calibration, reader: Any) -> Tokens:
        """Windows of the text that is not held out."""
        return calibration_tokens(calibration, reader)

    def held(self, text: Text, reader: Any, length: int, limit: int) -> Tokens:
        """Consecutive windows."""
        return held_windows(text, reader, length, limit)

    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Token ids, without a cache."""
        return {"input_ids": tokens.ids, "use_cache": False}

    def counted(self, tokens: Tokens) -> Tensor:
        """The outputs of all tokens that are not padding."""
        return tokens.mask

    def answers(self, logits: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Predictions of all real tokens except the first of each window.

        Padding is at the end, so the tokens before a real token are real.
        """
        real = tokens.mask[:, 1:]
        return logits[:, :-1][real], tokens.ids[:, 1:][real]
