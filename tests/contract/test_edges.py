"""Shapes, numbers and formats at the edge of what a method may meet."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from secateur import InputError, Method, MoDeGPT, Model, Store, calibrate, open_model
from secateur.apply.save import store_block, store_rest
from secateur.apply.surgery import narrow_block
from secateur.data.tokens import sample
from secateur.io.safetensors_writer import Writer
from secateur.linalg.least_squares import decoder, roots
from secateur.models.model import Settings
from tests.support import families


def narrowed(model: Model, method: Method, keep: float) -> None:
    tokens = sample(families.stream(6 * 32), 6, 32, 0)
    store = Store()
    calibrate(model, tokens, method.needs, store)
    for block in model.blocks:
        units = block.units(4)
        sizes = {
            u.name: max(s for s in u.sizes() if s <= max(keep * u.size, u.step)) for u in units
        }
        narrow_block(block, units, sizes, method, store.get(block.index, method.needs))
    return model


def test_an_odd_head_width_keeps_its_queries_and_keys(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=families.VOCAB,
        hidden_size=33,
        word_embed_proj_dim=33,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    folder = families.save(AutoModelForCausalLM.from_config(config), tmp_path / "odd")
    model = open_model(folder)
    assert {unit.kind for block in model.blocks for unit in block.units(4)} == {
        "mlp",
        "value_output",
    }
    assert all("odd" in str(block.attention.views["query_key"].obstacle) for block in model.blocks)
    narrowed(model, MoDeGPT(), 0.5)


def test_silent_values_and_no_ridge_stay_finite(opened) -> None:
    model = opened("llama")
    for block in model.blocks:
        block.attention.module.v_proj.weight[0] = 0  # one value dim without energy
        block.attention.module.v_proj.weight[3] = block.attention.module.v_proj.weight[2]
    narrowed(model, replace(MoDeGPT(), value_ridge=0.0), 0.5)
    assert all(bool(torch.isfinite(p).all()) for p in model.module.parameters())


def test_roots_of_a_singular_gram_are_pseudo_inverses() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    root, inverse = roots(gram, 0.0)
    assert torch.allclose(root @ inverse, torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()))


def test_kept_channels_that_were_silent_keep_their_rows() -> None:
    gram = torch.zeros(4, 4, dtype=torch.float64)
    keep = torch.tensor([1, 3])
    assert torch.allclose(decoder(gram, keep, 1e-6), torch.eye(4, dtype=torch.float64)[keep])
    gram[0, 0] = 1.0
    assert torch.allclose(decoder(gram, keep, 1e-6), torch.eye(4, dtype=torch.float64)[keep])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_neither_overflows_nor_loses_the_gram(opened, dtype: str) -> None:
    method, tokens = MoDeGPT(), sample(families.stream(6 * 32), 6, 32, 0)
    grams = {}
    for name in ("float32", dtype):
        model, store = opened("llama", name), Store()
        for block in model.blocks:  # hidden channels whose squares float16 cannot hold
            for producer, _ in block.mlp.producers:
                producer.weight.mul_(30)
            block.mlp.consumer.weight.div_(900)
        calibrate(model, tokens, method.needs, store)
        grams[name] = {need: store.get(0, method.needs)[need].mean for need in method.needs}
    for need, exact in grams["float32"].items():
        assert torch.linalg.norm(grams[dtype][need] - exact) < 0.05 * torch.linalg.norm(exact), need


def test_a_store_on_disk_gives_what_it_took(opened, tmp_path: Path) -> None:
    method, tokens = MoDeGPT(), sample(families.stream(6 * 32), 6, 32, 0)
    memory, disk = Store(), Store(tmp_path / "statistics")
    for store in (memory, disk):
        calibrate(opened("llama"), tokens, method.needs, store)
    for need in method.needs:
        one, other = (store.get(1, method.needs)[need] for store in (memory, disk))
        assert torch.equal(one.mean, other.mean)
        assert one.tokens == other.tokens == tokens.count
    assert 0 in disk
    (tmp_path / "statistics" / "block-00000.safetensors").write_bytes(b"damaged")
    assert 0 not in disk


def test_a_config_with_fewer_blocks_than_the_weights_is_refused(dense, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(dense("llama"), folder)
    text = (folder / "config.json").read_text()
    assert f'"num_hidden_layers": {families.BLOCKS}' in text
    short = text.replace(f'"num_hidden_layers": {families.BLOCKS}', '"num_hidden_layers": 2')
    (folder / "config.json").write_text(short)
    with pytest.raises(InputError, match="no place for"):
        open_model(folder, Settings(device="cpu"))


def test_what_overflows_on_rounding_is_refused_by_name(opened, tmp_path: Path) -> None:
    """The mistake: a model that computes in float32 is written as infinite float16 numbers."""
    for name, tensor in (
        ("model.layers.0.mlp.down_proj.weight", lambda m: m.blocks[0].mlp.consumer.weight),
        (
            "model.layers.0.self_attn.o_proj.weight",
            lambda m: m.blocks[0].attention.module.o_proj.weight,
        ),
        ("model.norm.weight", lambda m: m.module.model.norm.weight),
    ):
        model = opened("llama")
        model.stored, writer = torch.float16, Writer(tmp_path)
        tensor(model)[0] = 1e5

        def store(model: Model = model, writer: Writer = writer) -> None:
            store_block(model, model.blocks[0], writer)
            store_rest(model, writer)

        with pytest.raises(InputError, match=rf"^{name} .*1e\+05.*float16.*6\.55e\+04"):
            store()
