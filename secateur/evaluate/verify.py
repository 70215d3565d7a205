"""Compares a reloaded checkpoint with the model in memory."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.calibration.layer_stream import Stream
from secateur.data.tokens import Tokens
from secateur.io.run_directory import whole
from secateur.models.block import Block
from secateur.models.loading import cast
from secateur.models.model import Model
from secateur.utils.errors import InputError, shown

IMPLEMENTATIONS = ("eager", "sdpa")
GREEDY_TOKENS = 16
PASSING = "passing"  #: logits that were taken while blocks passed by
LOGITS = re.compile(rf"(?:logits|{PASSING})\.(?:float64|float32|float16|bfloat16)\.\w+")
GREEDY = re.compile(r"greedy\.(?:un)?cached")
FEW_TOKENS = 3  # where each takes a pass over the weight files
#: Largest difference of a logit, relative to the spread of all logits, taken for the same model.
#: Narrowed and stock attention add in different orders; a wrong or missing tensor moves a logit by
#: a large part of the spread.
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.15,
}


class ReferenceOutputs(NamedTuple):
    """A model's logits and greedy continuations for one row of tokens, by name."""

    said: dict[str, Tensor]
    tokens: Tokens

    @property
    def streamed(self) -> bool:
        """Whether the model was never in memory as a whole."""
        return any(name.startswith(PASSING) for name in self.said)

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        tokens = {"ids": self.tokens.ids, "mask": self.tokens.mask}
        if self.tokens.labels is not None:
            tokens["labels"] = self.tokens.labels
        with whole(path) as partial:
            save_file(self.said | tokens, partial)

    @classmethod
    def load(cls, path: Path) -> "ReferenceOutputs":
        """Read a file that :meth:`save` wrote.

        Raises:
            InputError: something else is in it.
            SafetensorError: it is damaged.
        """
        said, named = load_file(path), f"reference_outputs {str(path)!r}"
        if not {"ids", "mask"} <= said.keys():
            raise InputError(f"{named}: it does not say of which tokens it is.")
        tokens = Tokens(said.pop("ids"), said.pop("mask"), said.pop("labels", None))
        if not _is_row(tokens):
            raise InputError(f"{named}: it is not of one row of tokens.")
        if not any(map(LOGITS.fullmatch, said)):
            raise InputError(f"{named}: no logits are in it.")
        for name, tensor in said.items():
            kind = torch.float32 if LOGITS.fullmatch(name) else torch.int64
            if not (LOGITS.fullmatch(name) or GREEDY.fullmatch(name)) or tensor.dtype != kind:
                raise InputError(f"{named}: {shown(name)} is nothing that a model says.")
        return cls(said, tokens)


def _is_row(tokens: Tokens) -> bool:
    """Whether a tensor is one window of token ids, or one image."""
    ids, mask, labels = tokens.ids, tokens.mask, tokens.labels
    if ids.dtype == torch.int64:
        known = ids.dim() == 2 and ids.numel() > 0 and int(ids.min()) >= 0
    else:
        known = ids.dim() == 4 and ids.dtype == torch.float32
    whole_row = mask.dim() == 2 and mask.dtype == torch.bool and len(mask) == len(ids) == 1
    return known and whole_row and (labels is None or labels.dtype == torch.int64)


def reference_outputs(model: Model, tokens: Tokens) -> dict[str, Tensor]:
    """Logits and, if the model generates, greedy continuations for one row of ``tokens``.

    Logits are computed with eager attention, and with sdpa if the family supports it, first in the
    module's dtype and then in bfloat16; afterwards the module's parameters are bfloat16. Greedy
    tokens are computed with and without a cache, unless the dtype is so coarse that ties are
    frequent.
    """
    module: Any = model.module
    tokens, said = tokens.to(model.device), {}
    with torch.inference_mode():
        exact = module.dtype in (torch.float32, torch.float64)
        for cached in (True, False) if exact and model.use.writes else ():
            options = {"use_cache": cached, "min_new_tokens": GREEDY_TOKENS}
            new = model.use.generated(module, tokens.ids, GREEDY_TOKENS, **options)
            said[f"greedy.{'cached' if cached else 'uncached'}"] = new[0].cpu()
        for dtype in dict.fromkeys((module.dtype, torch.bfloat16)):
            cast(module, dtype)
            for implementation in IMPLEMENTATIONS:
                if implementation == "sdpa" and not module._supports_sdpa:
                    continue
                attend_by(module, implementation)
                name = f"logits.{str(dtype).removeprefix('torch.')}.{implementation}"
                said[name] = module(**model.use.inputs(tokens)).logits[0].float().cpu()
    return said


class Passage:
    """Logits of a model whose blocks are loaded one after the other.

    They are for one row of ``tokens``, with the attention that the model runs with.
    """

    def __init__(self, model: Model, tokens: Tokens) -> None:
        self._model = model
        with torch.no_grad():
            self.line = Stream(model, tokens, len(tokens))

    @torch.no_grad()
    def follow(self, block: Block) -> None:
        """Run the next block as it is now."""
        self.line.advance(block)

    @torch.no_grad()
    def reference_outputs(self) -> dict[str, Tensor]:
        """Logits and, if the model generates, greedy continuations for one row of ``tokens``.

        Logits are computed with eager attention, and with sdpa if the family supports it, first in
        the module's dtype and then in bfloat16; afterwards the module's parameters are bfloat16.
        Greedy tokens are computed with and without a cache, unless the dtype is so coarse that ties
        are frequent.
        """
        (batch,) = self.line.batches
        logits = self.line.logits(batch, self.line.at(batch))
        module: Any = self._model.module
        dtype = str(module.dtype).removeprefix("torch.")
        name = f"{PASSING}.{dtype}.{module.config._attn_implementation}"
        return {name: logits[0].float().cpu()}


def streamed_reference_outputs(model: Model, tokens: Tokens) -> dict[str, Tensor]:
    """The same for a model that is read block by block, in one pass over its blocks."""
    passage = Passage(model, tokens)
    for block in model.in_turn():
        passage.follow(block)
    return passage.reference_outputs()


def forgetful(model: Model, tokens: Tokens) -> str | None:
    """How the model's continuation differs with and without a cache, or None."""
    said = []
    for cached in (True, False):
        options = {"use_cache": cached, "min_new_tokens": FEW_TOKENS}
        ids = tokens.to(model.device).ids
        said.append(model.use.generated(model.module, ids, FEW_TOKENS, **options)[0].tolist())
    same = said[0] == said[1]
    return None if same else f"with a cache it writes {said[0]}, and without one {said[1]}"


def attend_by(module: Any, implementation: str) -> None:
    """Choose eager or sdpa attention, also for old classes without that option (Falcon)."""
    if module._can_set_attn_implementation():
        module.set_attn_implementation(implementation)
    else:
        module.config._attn_implementation = implementation


def disagreement(memory: dict[str, Tensor], reloaded: dict[str, Tensor]) -> str | None:
    """What differs between two testimonies, or None.

    Greedy continuations must have equal tokens, each with and without a cache.
    """
    if not memory:
        return "nothing was said to compare it with"
    for name, expected in memory.items():
        found = reloaded.get(name)
        if found is None or found.shape != expected.shape:
            return f"{name} is missing or has another shape"
        if name.startswith("greedy"):
            if not torch.equal(found, expected):
                return f"{name}: {found.tolist()} instead of {expected.tolist()}"
            continue
        dtype = getattr(torch, name.split(".")[1])
        difference = float((found - expected).abs().max() / expected.std().clamp_min(1e-12))
        if not difference <= TOLERANCE[dtype]:
            return f"{name} differs by {difference:.2g} of the logits' spread"
    return None
