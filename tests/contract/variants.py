"""Options with which methods that reshape matrices fit models as small as those of the tests."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "svd": {"rank_step": 2},
    "svd-llm": {"rank_step": 2},
    "welore": {"rank_step": 2},
    "rtn": {"bits": "3,4,8", "group": "8"},
    "gptq": {"bits": "3,4,8", "group": "8"},
    "ptqtp": {"groups": "8"},
    "forms": {"of": "svd-llm,svd"},
    "armor": {"block": 4, "rounds": 5},
    "monarch": {"blocks": 2, "rank_step": 1},
    "block-dense": {"blocks": 2, "rank_step": 1},
    "compot": {"grain": 4, "sweeps": 3},
    "cospadi": {"grain": 3, "sweeps": 2},
    "cospadi shared": {"grain": 3, "sweeps": 2, "share": 1},
    "dsformer": {"grain": 3, "sweeps": 2, "blocks": 2},
}
