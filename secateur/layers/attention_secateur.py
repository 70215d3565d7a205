"""Attention whose heads are narrower than the stock model's.

This file is written beside the weights of every checkpoint whose layers differ in shape, so it
stands alone: it imports torch and transformers.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over (batch, heads, tokens, dim); key and value may differ in width."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def one_step(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Softmax attention of one token a row, (batch, 1, heads, width), over keys of any width.

    Where key and value differ in width, fused kernels would be handed a copy of the whole cache for
    every query head, at every token; here all query heads of a KV head read it where it is.
    """
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # batch, kv heads, group, width
    scores = grouped @ key.mT * scaling
    if mask is not None:
        mask = mask if mask.shape[1] == 1 else mask.squeeze(2).unflatten(1, (key.shape[1], -1))
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    mixed: Tensor = weights @ value
    return mixed.flatten(1, 2).unsqueeze(1)


class NarrowAttention(nn.Module):
    """Attention with its own query/key width, value width and set of rotary pairs per KV head.

    ``shape`` holds ``heads``, ``kv_heads``, ``query_key`` (width of a query and of a key),
    ``value`` (width of a value), ``bias`` (which of "qkvo" have one) and ``rotary``. Everything
    else, the softmax scale of the dense model above all, is taken from ``stock``, the module that
    this one replaces. Queries and keys are laid out as first halves, then second halves of their
    rotary pairs. Where ``rotary`` is "chosen", ``rope_pairs`` (kv_heads, query_key / 2) says which
    column of the model's cos and sin tables a pair turns by; the first index past the tables means
    that the pair does not turn. "all" means every column in order, "none" no rotation.

    Four keys are there only where needed: ``doubled``, that the tables hold every number twice in
    a row; ``soft_cap``, the bound on scores; ``head_norms``, how queries and keys are normalised
    where one norm does not serve every head: "own" (a row of weights a head), "list" (a list of
    norms, heads on axis 1) or "joint" (all heads as one vector); and ``hidden``, the width of a
    sliced residual stream.
    """

    def __init__(self, stock: Any, shape: dict[str, Any]) -> None:
        nn.Module.__init__(self)  # not super(): `narrow` mixes this class into the stock one
        self.shape = dict(shape)
        self.output = _joining(stock)
        stock = _computing(stock)
        self.config: Any = stock.config
        self.layer_idx: Any = getattr(stock, "layer_idx", None)
        self.scaling: Any = getattr(stock, "scaling", None) or stock.inv_norm_factor
        self.soft_cap: float | None = shape.get("soft_cap")
        self.is_causal: bool = getattr(stock, "is_causal", True)
        self.sliding_window: Any = getattr(
            stock, "sliding_window", getattr(self.config, "sliding_window", None)
        )
        self.dropout = _dropout(stock)
        self.heads, self.kv_heads = int(shape["heads"]), int(shape["kv_heads"])
        self.query_key, self.value = int(shape["query_key"]), int(shape["value"])
        self.num_key_value_groups = self.heads // self.kv_heads
        hidden, bias = shape.get("hidden", self.config.hidden_size), shape["bias"]
        self.q_proj = linear(hidden, self.heads * self.query_key, bias="q" in bias)
        self.k_proj = linear(hidden, self.kv_heads * self.query_key, bias="k" in bias)
        self.v_proj = linear(hidden, self.kv_heads * self.value, bias="v" in bias)
        self.o_proj = linear(self.heads * self.value, hidden, bias="o" in bias)
        self.q_norm, self.k_norm = (_norm_of(stock, name) for name in "qk")
        dropped = nn.Dropout(getattr(stock, "residual_dropout", 0.0))
        self.resid_dropout: Any = getattr(stock, "resid_dropout", dropped)
        self.rotary: str = shape["rotary"]
        if self.rotary == "chosen":
            pairs = torch.zeros(self.kv_heads, self.query_key // 2, dtype=torch.int64)
            self.rope_pairs = nn.Buffer(pairs)

    def rotary_tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """From (batch, tokens, rotary dim) to (batch, kv heads or 1, tokens, pairs)."""
        half = cos.shape[-1] // 2
        if self.shape.get("doubled"):  # those families turn in float32, whatever the format
            cos, sin = cos[..., ::2].float(), sin[..., ::2].float()
        still = 1 if self.rotary == "chosen" else self.query_key // 2 - half
        cos, sin = cos[..., :half], sin[..., :half]
        if still:
            cos = nn.functional.pad(cos, (0, still), value=1.0)
            sin = nn.functional.pad(sin, (0, still))
        if self.rotary == "all":
            return cos.unsqueeze(1), sin.unsqueeze(1)
        tables = torch.stack((cos, sin)).index_select(-1, self.rope_pairs.flatten())
        cos, sin = tables.unflatten(-1, self.rope_pairs.shape).transpose(2, 3)
        return cos, sin

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both turned) and values, as (batch, heads, tokens, width)."""
        tokens = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*tokens, self.heads, self.query_key)
        key = self.k_proj(hidden_states).view(*tokens, self.kv_heads, self.query_key)
        value = self.v_proj(hidden_states).view(*tokens, self.kv_heads, self.value).transpose(1, 2)
        query, key = self.normed(self.q_norm, query), self.normed(self.k_norm, key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.rotary != "none" and position_embeddings is not None:
            cos, sin = self.rotary_tables(*position_embeddings)
            key = rotate(key, cos, sin)
            # Every query head turns like the KV head that it reads.
            grouped = query.unflatten(1, (self.kv_heads, self.num_key_value_groups))
            query = rotate(grouped, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(1, 2)
        return query, key, value

    def normed(self, norm: nn.Module | None, states: Tensor) -> Tensor:
        """Queries or keys (batch, tokens, heads, width) behind the norm inside them, if any."""
        if norm is None or self.query_key == 0:
            return states
        how = self.shape.get("head_norms")
        if how == "list":
            made: Tensor = norm(states.transpose(1, 2)).transpose(1, 2)
        elif how == "joint":
            made = norm(states.flatten(2)).view_as(states)
        else:
            made = norm(states)
        return made

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = hidden_states.shape[:-1]
        query, key, value = self.project(hidden_states, position_embeddings)
        cache = layer_past if past_key_values is None else past_key_values
        implementation = self.config._attn_implementation
        if self.value == 0:  # nothing is read
            if cache is not None:  # it counts tokens by the numbers in its keys
                cache.update(
                    value.new_zeros(len(value), 1, tokens[1], 1), value[:, :1], self.layer_idx
                )
            output = self.given(hidden_states, value.new_zeros(*tokens, 0))
            if implementation != "eager":
                return output, None
            length = tokens[1] if cache is None else cache.get_seq_length(self.layer_idx)
            return output, value.new_zeros(len(value), self.heads, tokens[1], length)
        if cache is not None and self.query_key:
            key, value = cache.update(key, value, self.layer_idx)
        elif cache is not None:  # likewise
            value, key = cache.update(value, key, self.layer_idx)
        several = query.shape[2] > 1 or self.query_key == 0 or "flash" in implementation
        bare = self.soft_cap is None and kwargs.get("position_bias") is None and not self.training
        if implementation == "sdpa" and bare and not several and self.query_key != self.value:
            output = one_step(query, key, value, attention_mask, self.scaling)
            return self.given(hidden_states, output.flatten(2)), None
        if implementation != "eager" and several:
            # Fused kernels want one width, and none forget the mask at width zero; zeros change
            # neither the scores nor the kept columns. The cache stays narrow.
            width = max(self.query_key, self.value)
            query, key, value = (_pad(t, width) for t in (query, key, value))
        if self.soft_cap is not None:
            kwargs["softcap"] = self.soft_cap
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output[..., : self.value].reshape(*tokens, -1).contiguous()
        return self.given(hidden_states, output), weights

    def given(self, hidden_states: Tensor, values: Tensor) -> Tensor:
        """What is made of mixed values; where a norm of the sum stands inside, that sum, too."""
        output: Tensor = self.resid_dropout(self.o_proj(values))
        return output if self.output is None else self.output(output, hidden_states)


class RelativeAttention(NarrowAttention):
    """A NarrowAttention whose scores get a bias by the distance of two tokens (T5's).

    The first of a stack has the table that it is looked up in, keeps it whatever becomes of its own
    widths, and makes the bias for all heads; it gives it, and the others are handed it.
    """

    def __init__(self, stock: Any, shape: dict[str, Any]) -> None:
        NarrowAttention.__init__(self, stock, shape)
        for name in ("is_decoder", "has_relative_attention_bias"):
            setattr(self, name, getattr(stock, name))
        for name in ("relative_attention_num_buckets", "relative_attention_max_distance"):
            setattr(self, name, getattr(stock, name))
        if stock.has_relative_attention_bias:
            self.relative_attention_bias = stock.relative_attention_bias
        self._is_hf_initialized = True  # stock code would look for its own names in it

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        if position_bias is None:
            past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
            position_bias = self.bias_of(hidden_states.shape[1], past, mask)
        output, weights = NarrowAttention.forward(
            self,
            hidden_states,
            attention_mask=mask,
            past_key_values=cache,
            position_bias=position_bias,
            **kwargs,
        )
        return output, position_bias, weights

    def bias_of(self, tokens: int, past: Any = 0, mask: Tensor | None = None) -> Tensor:
        """The bias of so many tokens behind so many, (1, heads, tokens, keys); only of the first.

        A mask says how many keys a cache of fixed size holds.
        """
        keys = past + tokens if mask is None else mask.shape[-1]
        stock: Any = self
        made: Tensor = stock.compute_bias(tokens, keys, past_seen_tokens=past)
        return made


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (first half, second half) by its angle."""
    first, second = states.chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(states.dtype)  # tables may be wider


def _pad(states: Tensor, width: int) -> Tensor:
    missing = width - states.shape[-1]
    return nn.functional.pad(states, (0, missing)) if missing else states


def _norm_of(stock: Any, which: str) -> nn.Module | None:
    """The norm inside a stock attention's queries or keys, under whichever name it has there."""
    for name in (f"{which}_norm", f"{which}_layernorm"):
        found = getattr(stock, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _computing(stock: Any) -> Any:
    """What computes in a stock attention: itself, or what it holds beside its output (BERT's)."""
    return getattr(stock, "self", stock)


def _joining(stock: Any) -> nn.Module | None:
    """What a stock attention does behind its output projection, with everything shared but that."""
    output = getattr(stock, "output", None)
    if output is None:
        return None
    made = copy.copy(output)
    made._modules = {**output._modules, "dense": nn.Identity()}
    return made  # type: ignore[no-any-return]


def _dropout(stock: Any) -> float:
    """Attention dropout of a stock module, under whichever name its family keeps it."""
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        found = getattr(stock, name, None)
        if found is not None:
            return float(getattr(found, "p", found))  # a number, or a Dropout that holds it
    return 0.0


def narrow_attention(stock: nn.Module, shape: dict[str, Any]) -> NarrowAttention:
    """An uninitialised NarrowAttention that is also an instance of the stock class.

    transformers finds the modules whose attention maps it records by their class.
    """
    own = type(_computing(stock))
    base = RelativeAttention if hasattr(own, "compute_bias") else NarrowAttention
    kind: Any = type("Narrow" + own.__name__, (base, own), {})
    made: NarrowAttention = kind(stock, shape)
    return made


def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A linear, which may be empty; torch warns of those, as there is nothing to initialise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return nn.Linear(inputs, outputs, bias=bias)
