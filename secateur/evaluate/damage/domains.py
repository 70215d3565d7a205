"""Is the damage the same on every text? Rise of the log-perplexity, text by text."""

import math
from collections.abc import Mapping
from typing import Any


def domains(dense: Mapping[str, float], small: Mapping[str, float]) -> dict[str, Any]:
    """ln of the ratio of perplexities for each of several texts, and greatest less least of them.

    Nothing of a single text. ln, since a token's loss in nats can be compared where perplexities of
    10 and of 100 can't.
    """
    if len(dense) < 2:
        return {}
    rise = {name: math.log(small[name] / value) for name, value in dense.items()}
    return {"rise": rise, "spread": max(rise.values()) - min(rise.values())}
