"""Blocks of other parts than one attention and one MLP: none without the other, or more of one."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from secateur import Auto, MoDeGPT, Model, Store, calibrate, score
from secateur.apply.save import finish, store_block, writer_for
from secateur.apply.sequential import narrow_blocks
from secateur.apply.surgery import narrowed
from secateur.calibration.needs import Needs, of_unit
from secateur.families import FAMILIES, FeedForward
from secateur.families.llama_like import LLAMA
from secateur.methods.nystrom import Nystrom
from secateur.methods.wanda_sp import WandaSP
from secateur.structure.narrowing import Narrowing
from secateur.structure.sites import Site
from secateur.structure.units import Heads, QueryKey
from secateur.utils.errors import InputError
from tests.support.families import HIDDEN, POSITIONS, VOCAB, WIDTH, read


class MixlessConfig(LlamaConfig):
    model_type = "mixless_test"


class MixlessLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_states, **_):
        return hidden_states + self.mlp(self.norm(hidden_states))


class MixlessForCausalLM(LlamaForCausalLM):
    """Blocks without attention: every token is by itself."""

    config_class = MixlessConfig

    def __init__(self, config):
        super().__init__(config)
        count = config.num_hidden_layers
        self.model.layers = nn.ModuleList(self.made(config, i) for i in range(count))
        self.post_init()

    def made(self, config, index):
        return MixlessLayer(config)


class TwiceConfig(LlamaConfig):
    model_type = "twice_test"


class TwiceLayer(LlamaDecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.second = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.more = LlamaMLP(config)

    def forward(self, hidden_states, *given, **named):
        hidden_states = super().forward(hidden_states, *given, **named)
        return hidden_states + self.more(self.second(hidden_states))


class TwiceForCausalLM(MixlessForCausalLM):
    """Blocks with an attention and two MLPs, the second behind the first."""

    config_class = TwiceConfig

    def made(self, config, index):
        return TwiceLayer(config, index)


MIXLESS = replace(LLAMA, family="Mixless", model_types=("mixless_test",), attention=None)
MORE = FeedForward((("more.gate_proj", 1), ("more.up_proj", 1)), "more.act_fn", "more.down_proj")
TWICE = replace(LLAMA, family="Twice", model_types=("twice_test",), further_mlps=(MORE,))
KINDS = {
    "mixless": (MixlessForCausalLM, MIXLESS),
    "twice": (TwiceForCausalLM, TWICE),
}


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    families = (*FAMILIES, MIXLESS, TWICE)
    monkeypatch.setattr("secateur.families.FAMILIES", families)
    monkeypatch.setattr("secateur.models.model.FAMILIES", families)


def made(name):
    kind, family = KINDS[name]
    torch.manual_seed(5)
    config = kind.config_class(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=None,
    )
    module = kind(config).double().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, dtype=torch.float64)
    return Model(name, module, None, torch.float64, family)


def known(model, method, tokens):
    store = Store()
    calibrate(model, tokens, method.needs | method.allocator.needs, store)
    return store


def test_the_parts_of_a_block_are_what_its_family_says():
    mixless, twice = made("mixless").blocks[0], made("twice").blocks[0]
    assert [part.name for part in mixless.parts] == ["mlp"]
    assert [part.name for part in twice.parts] == ["attention", "mlp", "mlp2"]
    names = [unit.name for unit in made("twice").units(8) if unit.block == 0]
    assert names == [f"layers.0.{n}" for n in ("mlp", "mlp2", "query_key", "value_output")]
    assert [unit.kind for unit in made("mixless").units(8)] == ["mlp"] * 3
    with pytest.raises(InputError, match="one attention"):
        _ = mixless.attention
    with pytest.raises(InputError, match="one MLP"):
        _ = twice.mlp


def test_every_mlp_has_statistics_of_its_own():
    model, tokens = made("twice"), read("llama", 4, 24)
    method = Nystrom(0.1, 0.1)
    store = known(model, MoDeGPT(), tokens)
    block, seen = model.blocks[1], []
    consumer = block.feed_forwards[1].consumer
    handle = consumer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.module(tokens.ids)
    handle.remove()
    hidden = seen[0].flatten(0, 1)
    own = hidden.mT @ hidden / len(hidden)
    statistics = store.get(1, MoDeGPT().needs)
    second = Needs.HIDDEN_GRAM.at("mlp2")
    torch.testing.assert_close(statistics[second].mean, own, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(statistics[Needs.HIDDEN_GRAM].mean, own, rtol=0.1)
    (unit,) = (u for u in block.units(8) if u.name == "layers.1.mlp2")
    solution = method.solve(unit, block, of_unit(statistics, unit))
    keep, rows = solution.at(24).keep, solution.at(24).consumer
    ridge = 0.1 * own.diagonal().mean() * torch.eye(WIDTH).double()
    fitted = torch.linalg.solve((own + ridge)[keep][:, keep], own[keep] @ consumer.weight.mT)
    lost = [
        float((hidden[:, keep] @ r - hidden @ consumer.weight.mT).norm()) for r in (rows, fitted)
    ]
    assert lost[0] < 1.2 * lost[1]


def test_ids_of_first_parts_are_those_of_older_versions():
    assert Needs.HIDDEN_GRAM.id == "hidden.Gram"
    assert Needs.HIDDEN_GRAM.at("mlp2").id == "mlp2.hidden.Gram"
    assert Site("attention", "query").id == "query"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", [MoDeGPT(), Auto(), WandaSP()], ids=lambda m: m.name)
def test_from_calibration_to_a_narrow_model(name, method):
    model, tokens = made(name), read("llama", 6, 24)
    dense = model.module(tokens.ids).logits
    store = known(model, method, tokens)
    evidence = score(model, method, store, tokens)
    units = model.units(8, method.kinds)
    assert set(evidence.curves) >= {unit.name for unit in units if not unit.fixed}
    sizes = {unit.name: unit.size for unit in units}
    assert [b.index for b in narrow_blocks(model, method, units, sizes, tokens, store)] == [0, 1, 2]
    torch.testing.assert_close(model.module(tokens.ids).logits, dense)
    sizes |= {unit.name: 24 for unit in units if unit.kind == "mlp"}
    list(narrow_blocks(model, method, units, sizes, tokens, store))
    widths = {mlp.width for block in model.blocks for mlp in block.feed_forwards}
    assert widths == {24}
    ours = float((model.module(tokens.ids).logits - dense).norm())
    worst = made(name)
    for block in worst.blocks:
        for unit in block.units(8, ("mlp",)):
            block.view(unit).narrow(Narrowing(keep=torch.arange(24)))
    assert ours < float((worst.module(tokens.ids).logits - dense).norm())


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_loaded_again(name, tmp_path):
    model, tokens, method = made(name), read("llama", 6, 24), MoDeGPT()
    store, units = known(model, method, tokens), model.units(8)
    sizes = {u.name: 32 if u.kind == "mlp" else u.size for u in units}
    writer = writer_for(model, "plain", tmp_path)
    for block in narrow_blocks(model, method, units, sizes, tokens, store):
        store_block(model, block, writer)

    class Nothing:
        def save_pretrained(self, folder):
            """There is no tokenizer."""

    model.tokenizer = Nothing()
    finish(model, "plain", writer)
    again = KINDS[name][0].from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.intermediate_size == 32
    torch.testing.assert_close(again(tokens.ids).logits, model.module(tokens.ids).logits)


@pytest.mark.parametrize("name", KINDS)
def test_a_unit_that_was_narrowed_for_a_moment_is_back(name):
    model, tokens = made(name), read("llama", 2, 24)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    block = model.blocks[1]
    for unit in block.units(8, ("mlp", "heads", "query_key", "block")):
        view = block.view(unit)
        with narrowed(block, unit, view.arbitrary(0 if unit.size < 8 else 8)):
            assert not torch.equal(
                model.module(tokens.ids).logits, model.module(tokens.ids * 0).logits
            )
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_only_attention_has_units_of_attention():
    kinds = (QueryKey, Heads)
    units = made("mixless").units(8, ("mlp", "query_key", "heads", "block"))
    assert not [unit for unit in units if isinstance(unit, kinds)]
    assert [unit.kind for unit in units] == ["mlp", "block"] * 3


def test_blocks_without_attention_can_go_too():
    block = made("mixless").blocks[2]
    (unit,) = block.units(8, ("block",))
    assert unit.cached(1) == 0
    states = torch.randn(1, 4, HIDDEN).double()
    with narrowed(block, unit, Narrowing()):
        assert torch.equal(block.module(states), states)
    assert not torch.equal(block.module(states), states)
