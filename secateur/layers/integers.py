"""Linear layers of whole numbers times scales, stored as the library compressed-tensors packs them.

A checkpoint with such layers has a ``quantization_config``, by which transformers and vLLM unpack
them; nothing of ours is needed there. What runs on packed numbers are kernels of those libraries.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

INTEGERS = "integers"  # as the form of a plan's row
LIBRARY = "compressed-tensors"
FORMAT = "pack-quantized"
BITS = range(3, 9)
WORD = 32
SHAPE_BYTES = 2 * 8  # of ``weight_shape``


class Integers(nn.Linear):
    """y = x (q s)ᵀ + b with whole numbers q of few bits, and a scale s for every group of inputs.

    It computes with the dense weight, rounded as the library rounds it. Its state dict holds

        weight_packed   int32 (outputs, ⌈inputs · bits / 32⌉)
        weight_scale    (outputs, groups), of the checkpoint's own format
        weight_shape    int64 (2): outputs, inputs

    in place of ``weight``, which must not be changed.

    Attributes:
        bits: of a number.
        group: inputs that share a scale; 0 where a whole row does.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor

    def __init__(
        self,
        bits: int,
        group: int,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        outputs, inputs = codes.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.bits, self.group = bits, group
        made = weight_of(codes, scale).to(dtype)
        self.weight = nn.Parameter(made, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("weight_packed", packed(codes, bits))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_shape", torch.tensor([outputs, inputs]))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]


def weight_of(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (outputs, inputs) times their scales (outputs, groups), in the format of the scales."""
    groups = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    weight: Tensor = (groups * scale.unsqueeze(-1)).flatten(1)
    return weight


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns) as int32 words.

    To a code 2^(bits−1) is added, so that none is negative; those of a row follow each other bit by
    bit, the lowest first, across words.
    """
    rows, columns = codes.shape
    raised = codes.long() + 2 ** (bits - 1)
    runs = nn.functional.pad(raised, (0, -columns % WORD)).unflatten(1, (-1, WORD))
    words = runs.new_zeros(rows, runs.shape[1], bits)  # so many for 32 codes
    for i in range(WORD):
        word, low = divmod(i * bits, WORD)
        words[..., word] |= (runs[..., i] << low) & (2**WORD - 1)
        if low + bits > WORD:
            words[..., word + 1] |= runs[..., i] >> (WORD - low)
    signed: Tensor = words - ((words >> (WORD - 1)) << WORD)
    return signed.flatten(1)[:, : words_of(columns, bits)].int().contiguous()


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes (rows, columns) of the words that :func:`packed` makes."""
    runs = nn.functional.pad(words.long() & (2**WORD - 1), (0, 1))
    at = bits * torch.arange(columns, device=words.device)
    word, low = at // WORD, at % WORD
    raised = (runs[:, word] >> low) | (runs[:, word + 1] << (WORD - low))
    codes: Tensor = (raised & (2**bits - 1)) - 2 ** (bits - 1)
    return codes


def words_of(inputs: int, bits: int) -> int:
    """Words that a row takes."""
    return -(-inputs * bits // WORD)


def missing_library() -> str | None:
    """That the library which reads such layers is not there, and how to get it; or None."""
    if find_spec("compressed_tensors") is not None:
        return None
    return (
        f"its checkpoints are read by {LIBRARY}, which is not installed "
        f"(pip install 'secateur[integers]')"
    )


def quantization_config(layers: Mapping[str, nn.Module], prefix: str) -> dict[str, Any] | None:
    """What config.json says of the integer layers among all linear ones, by name; or None.

    ``prefix`` is what stands before the names of the base model's layers. A pattern takes both
    names of a layer, as whoever opens the base model alone would find its weights made up. Those
    that are dense are to be ignored, or vLLM asks for their scheme.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    ignored = []
    for name, layer in layers.items():
        if isinstance(layer, Integers):
            path = re.escape(name.removeprefix(prefix))
            target = f"re:({re.escape(prefix)})?{path}$"
            groups.setdefault((layer.bits, layer.group), []).append(target)
        else:
            ignored.append(name)
    if not groups:
        return None
    schemes = {
        f"group_{index}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if group else "channel",
                "group_size": group or None,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for index, ((bits, group), names) in enumerate(sorted(groups.items()))
    }
    return {
        "quant_method": LIBRARY,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": schemes,
        "ignore": ignored,
    }


def packed_in(config: Any) -> bool:
    """Whether a checkpoint's config says that the library reads some of its weights."""
    said = getattr(config, "quantization_config", None)
    return isinstance(said, dict) and said.get("quant_method") == LIBRARY


def unpack(model: Any) -> None:
    """Give the layers that the library has loaded packed their dense weights, for good.

    The model is then as if it had been stored dense, but for its rounding.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != LIBRARY:
        return
    from compressed_tensors.compressors import decompress_module

    for layer in model.modules():
        decompress_module(layer, leave_decompressed=False)
    quantizer.compressor.remove_decompression_hook(model)
    quantizer.remove_quantization_config(model)
