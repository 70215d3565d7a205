"""What is special about single families, on the stock model that they have to be equal to."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers

from secateur import InputError, Settings, open_model
from secateur.apply.surgery import narrow_unit
from secateur.calibration.layer_stream import Stream
from secateur.cli.render import inspection
from secateur.data.tokens import Tokens
from secateur.evaluate.verify import attend_by
from secateur.models.model import anatomy_of
from secateur.structure.narrowing import Narrowing
from tests.support import families, met
from tests.support.families import FAMILIES

IDS = torch.arange(3, 23).unsqueeze(0) * 7 % 88 + 3
#: variants beside those of the contract tests: one that is like it, its config, and what differs
MORE = {
    "olmo": ("llama", "OlmoConfig", {}),
    "glm4": ("glm", "Glm4Config", {}),
    "stablelm_normed": (
        "stablelm",
        "StableLmConfig",
        {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False},
    ),
    "cohere_normed": ("cohere", "CohereConfig", {"use_qk_norm": True, "attention_bias": False}),
    "gemma2_uncapped": ("gemma2", "Gemma2Config", {"attn_logit_softcapping": None}),
    "falcon_one_norm": ("falcon", "FalconConfig", {"num_ln_in_parallel_attn": 1}),
    "falcon_all_heads": ("falcon_multi_query", "FalconConfig", {"multi_query": False}),
}


@pytest.fixture(scope="module", params=MORE)
def variant(request, tmp_path_factory):
    """Its name, a folder with its checkpoint, and the stock model in float64."""
    name = request.param
    like, config, options = MORE[name]
    own = FAMILIES[like]
    FAMILIES[name] = replace(own, config=config, options=own.options | options)
    try:
        folder = families.save(families.random_model(name), tmp_path_factory.mktemp(name))
    finally:
        del FAMILIES[name]
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().double()
    return name, folder, stock.requires_grad_(False)


def said(model, kind):
    """Logits, and what is generated with a cache."""
    attend_by(model, kind)
    with torch.inference_mode():
        logits = model(input_ids=IDS, use_cache=False).logits
        made = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return logits, made


def kinds(model):
    return ("eager", "sdpa") if model._supports_sdpa else ("eager",)


def close(found, expected):
    return float((found - expected).abs().max() / expected.std()) < 1e-5


def test_blocks_compute_what_the_stock_model_computes(variant):
    _, folder, stock = variant
    model = open_model(folder, Settings(device="cpu", dtype="float64"))
    assert len(model.blocks) == 3
    for kind in kinds(stock):
        (logits, made), (expected, wanted) = said(model.module, kind), said(stock, kind)
        assert close(logits, expected)
        assert torch.equal(made, wanted)
    met.note_family(model)


@pytest.mark.parametrize("variant", ["stablelm_normed", "cohere_normed"], indirect=True)
def test_narrower_values_leave_the_norms_inside_heads_alone(variant):
    """Values through E Eᵀ, in the stock weights and as narrower values.

    The mistake: a rebuilt attention takes the stock norms, whose dims are in another order.
    """
    _, folder, stock = variant
    model, stock = open_model(folder, Settings(device="cpu", dtype="float64")), deepcopy(stock)
    generator = torch.Generator().manual_seed(0)
    for block, layer in zip(model.blocks, stock.base_model.layers, strict=True):
        units = {unit.kind: unit for unit in block.units(4, ("value_output", "query_key", "heads"))}
        assert "query_key" not in units
        assert units["heads"].fixed
        basis = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(basis).Q
        rows = basis.mT.repeat_interleave(2, 0) @ block.attention.output_rows
        narrow_unit(
            block, units["value_output"], Narrowing(encode=basis, consumer=rows.flatten(0, 1))
        )
        both = torch.block_diag(*(basis @ basis.mT))
        value = layer.self_attn.v_proj
        value.weight.copy_(both @ value.weight)
    for kind in kinds(stock):
        (logits, made), (expected, wanted) = said(model.module, kind), said(stock, kind)
        assert close(logits, expected)
        assert torch.equal(made, wanted)


def config_of(name, **more):
    family = FAMILIES[name]
    return getattr(transformers, family.config)(**family.options | more)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of("falcon", alibi=True), "ALiBi"),
        (config_of("gemma3", use_bidirectional_attention=True), "both sides"),
        (transformers.OlmoConfig(**FAMILIES["llama"].options, clip_qkv=8.0), "clips"),
    ],
    ids=["falcon", "gemma3", "olmo"],
)
def test_what_no_block_computes_is_refused_by_name(tmp_path, config, reason):
    assert anatomy_of(config) is None
    folder = families.save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "m")
    assert reason in inspection(str(folder), Settings(), 8)["note"]
    with pytest.raises(InputError, match=reason):
        open_model(folder, Settings(device="cpu")).blocks  # noqa: B018


def test_blocks_that_give_tuples_are_followed_like_others(opened):
    """The mistake: the first element of a bypassed block's output was its first window."""
    model, ids = opened("falcon", "float64"), families.stream(60).view(3, 20)
    line = Stream(model, Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert line.states.shape == (3, 20, families.HIDDEN)
    for block in model.blocks:
        line.advance(block)
    expected = model.module(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(line.logits(slice(0, 3), line.states), expected)
