"""Tiny random T5 models, and what is asked of them and done to them."""

import torch
import transformers

from secateur import Settings, open_model
from secateur.data.tasks import use_of
from secateur.data.tokens import Tokens
from secateur.evaluate.verify import attend_by
from secateur.structure.narrowing import Narrowing
from tests.contract.conftest import logits, spread
from tests.support import families
from tests.support.families import HEADS, HIDDEN, VOCAB, WIDTH

DECODER = 2  # the first block of it
READ, WRITTEN = 17, 9  # tokens of either side
D_KV = HIDDEN // HEADS


def config(gated=False, **more):
    return transformers.T5Config(
        **{
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": D_KV,
            "d_ff": WIDTH,
            "num_layers": DECODER,
            "num_decoder_layers": 3,
            "num_heads": HEADS,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "feed_forward_proj": "gated-gelu" if gated else "relu",
            "tie_word_embeddings": not gated,  # v1.1 has a head of its own
            "decoder_start_token_id": 0,
            "eos_token_id": 2,
        }
        | more
    )


def made(gated, folder):
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config(gated)).eval().requires_grad_(False)
    for module in model.modules():
        families._randomise(module)
    if gated:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN))
    model.save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    return folder


def opened(folder):
    return open_model(folder, Settings(device="cpu", dtype="float64"))


def stock_of(folder):
    found = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    return found.double().requires_grad_(False)


def rows(count, seed=0):
    ids = families.stream(count * READ, seed).view(count, READ)
    labels = families.stream(count * WRITTEN, seed + 1).view(count, WRITTEN)
    return Tokens(ids, torch.ones(count, READ + WRITTEN, dtype=torch.bool), labels)


def layer_of(stock, index):
    """The block of a stock model that stands at a place of the model."""
    stack = stock.encoder.block if index < DECODER else stock.decoder.block
    return stack[index - (index >= DECODER) * DECODER]


def own_part(index):
    return slice(READ) if index < DECODER else slice(READ, None)


def written(module, tokens, cached):
    use = use_of(module.config)
    return use.generated(module, tokens.ids, 7, min_new_tokens=7, use_cache=cached)


def same(found, stock, tokens):
    """Whether two models say the same, by either attention, and write the same, cached or not."""
    for kind in ("eager", "sdpa"):
        attend_by(found, kind)
        attend_by(stock, kind)
        assert spread(logits(found, tokens), logits(stock, tokens)) < 1e-5
        for cached in (True, False):
            assert torch.equal(written(found, tokens, cached), written(stock, tokens, cached))
    return True


def narrowings(block, size):
    """Any narrowing of each kind: the first coordinates, and a random basis of values."""
    generator = torch.Generator().manual_seed(block.index)
    half = torch.arange(size // 2)
    basis = torch.randn(HEADS, D_KV, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis).Q if size else basis
    consumer = (basis.mT @ block.attention.output_rows).flatten(0, 1)
    return {
        "mlp": Narrowing(keep=torch.arange(7 * size)),
        "query_key": Narrowing(keep=torch.cat((half, half + D_KV // 2)).expand(HEADS, -1)),
        "value_output": Narrowing(encode=basis, consumer=consumer),
    }
