"""Does a reloaded checkpoint say what the model in memory said?"""

from typing import Any

import torch
from torch import Tensor

from secateur.model import Model
from secateur.opening import cast
from secateur.text import Tokens

IMPLEMENTATIONS = ("eager", "sdpa")
GREEDY_TOKENS = 16
#: Largest difference of a logit, relative to the spread of all logits, taken for the same model.
#: Narrowed and stock attention add in different orders; a wrong or missing tensor moves a logit by
#: a large part of the spread.
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 0.05,
    torch.bfloat16: 0.15,
}


def testimony(model: Model, tokens: Tokens) -> dict[str, Tensor]:
    """What a model says about one row of ``tokens``: logits and, if it writes, continuations.

    Logits under eager attention, and sdpa where the family has it, in the module's dtype, then in
    bfloat16, to which the module's parameters are left converted. Greedy tokens with and without a
    cache, unless the dtype is so coarse that two tokens are often tied.
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


def attend_by(module: Any, implementation: str) -> None:
    """Choose eager or sdpa attention, also where a class is too old to be told (Falcon's)."""
    if module._can_set_attn_implementation():
        module.set_attn_implementation(implementation)
    else:
        module.config._attn_implementation = implementation


def disagreement(memory: dict[str, Tensor], reloaded: dict[str, Tensor]) -> str | None:
    """What differs between two testimonies, or None.

    Greedy continuations must be the same token by token, each with and without a cache.
    """
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
