"""Attention of one token over a cache whose keys and values differ in width."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.layers import attention_secateur
from secateur.layers.attention_secateur import eager_attention, one_step
from tests.support.families import read
from tests.support.shaped import shaped

HEADS, KV_HEADS, KEYS = 6, 2, 9
IDS = read("llama", 2, 12, seed=4).ids


@pytest.fixture
def states():
    torch.manual_seed(0)
    query = torch.randn(2, HEADS, 1, 4, dtype=torch.float64)
    key = torch.randn(2, KV_HEADS, KEYS, 4, dtype=torch.float64)
    return query, key, torch.randn(2, KV_HEADS, KEYS, 3, dtype=torch.float64)


def masks():
    seen = torch.ones(2, 1, 1, KEYS, dtype=torch.bool)
    seen[0, ..., :4] = False
    added = torch.zeros(2, 1, 1, KEYS, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    by_head = torch.randn(2, HEADS, 1, KEYS, dtype=torch.float64)
    return {"none": None, "seen": seen, "added": added, "by head": by_head}


@pytest.mark.parametrize("kind", masks())
def test_it_is_eager_attention(states, kind):
    mask = masks()[kind]
    added = masks()["added"] if kind == "seen" else mask
    expected, _ = eager_attention(torch.nn.Module().eval(), *states, added, 0.3)
    torch.testing.assert_close(one_step(*states, mask, 0.3), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_serves_steps_and_only_those(opened, tmp_path, monkeypatch, name):
    """Left-padded rows of a batch are written as they are alone."""
    folder = shaped(opened(name), tmp_path / "narrow", {"query_key": 4, "layers.1.value_output": 3})
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    lengths = []

    def noted(query, *rest):
        lengths.append((query.shape[2], len(query)))
        return one_step(query, *rest)

    monkeypatch.setattr(attention_secateur, "one_step", noted)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    both = model.generate(IDS * mask, attention_mask=mask, **options)[:, 12:]
    assert set(lengths) == {(1, 2)}
    for row, start in ((0, 5), (1, 0)):
        own = IDS[row : row + 1, start:]
        model.set_attn_implementation("eager")
        alone = model.generate(own, attention_mask=torch.ones_like(own), **options)
        assert torch.equal(alone[0, own.shape[1] :], both[row])
