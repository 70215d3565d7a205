"""Units of any size, made by hand."""

from secateur.structure.units import MLP, Heads, QueryKey, ValueOutput


def mlp(block, size=32, step=8, hidden=16, biased=0):
    return MLP(
        name=f"{block}.mlp",
        block=block,
        size=size,
        step=step,
        hidden=hidden,
        least=0,
        producers=2,
        biased_producers=biased,
        part="mlp",
        matrices=(4, 7),
    )


def query_key(block, size, hidden=16, biased=False, rotary=True):
    return QueryKey(
        name=f"{block}.qk",
        block=block,
        size=size,
        step=2,
        hidden=hidden,
        least=0,
        heads=4,
        kv_heads=2,
        query_bias=biased,
        key_bias=biased,
        rotary=rotary,
        part="attention",
        matrices=(0, 2),
    )


def value_output(block, size, hidden=16, biased=False, output_biased=False, least=0):
    return ValueOutput(
        name=f"{block}.vo",
        block=block,
        size=size,
        step=1,
        hidden=hidden,
        least=least,
        heads=4,
        kv_heads=2,
        value_bias=biased,
        output_bias=output_biased,
        part="attention",
        matrices=(2, 4),
    )


def heads(block, size=4, hidden=16, group=2, width=4):
    return Heads(
        name=f"{block}.heads",
        block=block,
        size=size,
        step=1,
        hidden=hidden,
        group=group,
        query_key=width,
        value=width,
        query_bias=False,
        key_bias=False,
        value_bias=False,
        part="attention",
        matrices=(0, 4),
    )
