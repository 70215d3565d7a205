"""Rise of the log-perplexity on each text."""

import math
from collections.abc import Mapping
from typing import Any


def domains(dense: Mapping[str, float], small: Mapping[str, float]) -> dict[str, Any]:
    """ln of the ratio of perplexities for each text, and the largest minus the smallest.

    The result is empty for a single text. Logarithms are losses in nats per token, which can be
    compared between texts with perplexities of 10 and of 100.
    """
    if len(dense) < 2:
        return {}
    rise = {name: math.log(small[name] / value) for name, value in dense.items()}
    return {"rise": rise, "spread": max(rise.values()) - min(rise.values())}
