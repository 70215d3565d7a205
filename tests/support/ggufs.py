"""What a GGUF file computes, written down from llama.cpp's graphs, in float64."""

import math

import gguf
import torch


class File:
    """A file's metadata and tensors; matrices as (outputs, inputs)."""

    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.architecture = self.field("general.architecture")
        self.types = {t.name: t.tensor_type.name for t in self.reader.tensors}
        self.tensors = {
            t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).double()
            for t in self.reader.tensors
        }

    def field(self, name, default=None):
        """A value, by its whole name or by that behind the architecture's."""
        for key in (name, f"{getattr(self, 'architecture', '')}.{name}"):
            if key in self.reader.fields:
                return self.reader.fields[key].contents()
        return default

    def of_layer(self, name, layer):
        found = self.field(name)
        return found[layer] if isinstance(found, list) else found


def logits(path, ids):
    """Of every token, as the graphs of llama, deci, qwen2, qwen3 and openelm make them."""
    file = File(path)
    t, length = file.tensors, len(ids)
    head = file.field("attention.key_length")
    assert head == file.field("attention.value_length") == file.field("rope.dimension_count")
    x = t["token_embd.weight"][ids]
    base = file.field("rope.freq_base")
    frequencies = base ** (-2 * torch.arange(head // 2).double() / head)
    frequencies = frequencies / t.get("rope_freqs.weight", torch.ones(head // 2))
    angles = torch.arange(length).double().unsqueeze(1) * frequencies
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    epsilon = file.field("attention.layer_norm_rms_epsilon")
    mask = torch.full((length, length), -torch.inf).triu(1).double()

    def norm(states, weight):
        return states * (states.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight

    def linear(states, name):
        made = states @ t[f"{name}.weight"].t()
        return made + t[f"{name}.bias"] if f"{name}.bias" in t else made

    def turn(states):
        if file.architecture in ("llama", "deci"):
            a, b = states[..., ::2], states[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        a, b = states.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    for layer in range(file.field("block_count")):
        heads, kv = (file.of_layer(f"attention.head_count{n}", layer) for n in ("", "_kv"))
        width, at = file.of_layer("feed_forward_length", layer), f"blk.{layer}."
        assert width, "llama.cpp leaves out the attention of a layer without an MLP"
        assert heads or layer, "llama.cpp takes the width of heads from the first layer"
        if heads:
            read = norm(x, t[f"{at}attn_norm.weight"])
            if f"{at}attn_qkv.weight" in t:
                parts = linear(read, f"{at}attn_qkv").split((heads * head, kv * head, kv * head), 1)
            else:
                parts = [linear(read, f"{at}attn_{n}") for n in "qkv"]
            q, k, v = (part.unflatten(1, (-1, head)) for part in parts)
            if f"{at}attn_q_norm.weight" in t:
                q = norm(q, t[f"{at}attn_q_norm.weight"])
                k = norm(k, t[f"{at}attn_k_norm.weight"])
            q, k = turn(q), turn(k).repeat_interleave(heads // kv, 1)
            v = v.repeat_interleave(heads // kv, 1)
            scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(head) + mask
            mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
            x = x + linear(mixed, f"{at}attn_output")
        read = norm(x, t[f"{at}ffn_norm.weight"])
        gate = torch.nn.functional.silu(linear(read, f"{at}ffn_gate"))
        x = x + linear(gate * linear(read, f"{at}ffn_up"), f"{at}ffn_down")
    output = t.get("output.weight", t["token_embd.weight"])
    return norm(x, t["output_norm.weight"]) @ output.t()
