"""Make transformers' auto classes know the per-layer checkpoints of every family."""

from typing import Any

from secateur.anatomy import FAMILIES
from secateur.layers import modeling_secateur


def register() -> None:
    """Register one config and its models per served ``model_type``; doing it again is harmless."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for model_type in (name for family in FAMILIES for name in family.model_types):
        stock = CONFIG_MAPPING[model_type]
        config = _narrow(stock)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, _narrow(MODEL_MAPPING[stock]), exist_ok=True)
        AutoModelForCausalLM.register(
            config, _narrow(MODEL_FOR_CAUSAL_LM_MAPPING[stock]), exist_ok=True
        )


def _narrow(stock: Any) -> Any:
    made: Any = getattr(modeling_secateur, modeling_secateur.PREFIX + stock.__name__)
    return made
