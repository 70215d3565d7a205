"""Make transformers' auto classes know the per-layer checkpoints of every family."""

from typing import Any

from secateur.families import FAMILIES
from secateur.layers import modeling_secateur


def register() -> None:
    """Register one config and its models per served ``model_type``; doing it again is harmless."""
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    heads = [
        (modeling_auto.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        (modeling_auto.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING),
        (
            modeling_auto.AutoModelForSeq2SeqLM,
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        ),
        (
            modeling_auto.AutoModelForImageClassification,
            modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        ),
    ]
    for model_type in (name for family in FAMILIES for name in family.model_types):
        stock = CONFIG_MAPPING[model_type]
        config = _narrow(stock)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, _narrow(modeling_auto.MODEL_MAPPING[stock]), exist_ok=True)
        for auto, mapping in heads:
            if stock in mapping:
                auto.register(config, _narrow(mapping[stock]), exist_ok=True)


def _narrow(stock: Any) -> Any:
    made: Any = getattr(modeling_secateur, modeling_secateur.PREFIX + stock.__name__)
    return made
