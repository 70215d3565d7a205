"""What is seen inside a block while its states pass."""

import pytest
import torch

from secateur.apply.sequential import watched
from secateur.calibration.layer_stream import Stream
from tests.support.streams import look, windows


def hooks(block):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in block.module.modules()
    )


@pytest.mark.parametrize("name", ["llama", "opt", "opt_norm_after", "gpt2", "gpt_neox", "falcon"])
def test_watching_sees_every_part_by_window(opened, name):
    model, tokens = opened(name, "float64"), windows(3)
    block, walking = model.blocks[0], Stream(model, tokens)
    before = walking.at(slice(None))
    with torch.no_grad(), watched(block) as seen:
        after = walking.through(block, before)
    assert seen.inputs.shape == seen.attention.shape == seen.mlp.shape == before.shape
    with torch.no_grad():
        torch.testing.assert_close(block.attention.module.o_proj(seen.mixed), seen.attention)
        torch.testing.assert_close(block.mlp.consumer(seen.hidden), seen.mlp)
        torch.testing.assert_close(block.mlp.channels(block.mlp.produced(seen.inputs)), seen.hidden)
    if name != "opt_norm_after":
        torch.testing.assert_close(before + seen.attention + seen.mlp, after)
    assert hooks(block) == 0


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox"])
def test_watching_ends_the_forward_where_it_was_told(opened, name):
    model, tokens = opened(name, "float64"), windows(3)
    block, walking, called = model.blocks[0], Stream(model, tokens), []
    places = {"o": block.attention.module.o_proj, "consumer": block.mlp.consumer}
    handles = [
        module.register_forward_hook(lambda *_, key=key: called.append(key))
        for key, module in places.items()
    ]
    full, _ = look(model, tokens, block, walking.at(slice(None)))
    assert called == ["o", "consumer"]
    for until, seen_before, ran in (("o", ["mixed"], []), ("consumer", ["hidden"], ["o"])):
        called.clear()
        with torch.no_grad(), watched(block, until=places[until]) as seen:
            walking.through(block, walking.at(slice(None)))
            pytest.fail("the forward went on")
        assert called == ran
        for part in seen_before:
            assert torch.equal(getattr(seen, part), getattr(full, part))
        assert not hasattr(seen, "mlp")
        assert hasattr(seen, "attention") is (until == "consumer")
    assert hooks(block) == len(handles)


@pytest.mark.parametrize("early", [False, True])
def test_an_error_gets_through_and_leaves_no_hook(opened, early):
    """The mistake: to take any error for the end that was wanted."""
    model, tokens = opened("llama", "float64"), windows(3)
    block, walking = model.blocks[0], Stream(model, tokens)

    def broken(*_):
        raise ValueError("broken")

    handle = block.attention.module.q_proj.register_forward_hook(broken)
    until = block.attention.module.o_proj if early else None
    with pytest.raises(ValueError, match="broken"), torch.no_grad(), watched(block, until=until):
        walking.through(block, walking.at(slice(None)))
    handle.remove()
    assert hooks(block) == 0
    seen, _ = look(model, tokens, block, walking.at(slice(None)))
    assert bool(seen.mlp.isfinite().all())
