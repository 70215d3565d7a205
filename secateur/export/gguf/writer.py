"""Write a GGUF file with the library gguf, one tensor in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from secateur.export.gguf.shapes import Layout
from secateur.export.gguf.tensors import tensors
from secateur.export.gguf.tokens import Vocabulary
from secateur.models.model import Model
from secateur.utils.errors import InputError

Written = Literal["f32", "f16", "bf16", "q8_0"]
#: name of a format in the file and its number among llama.cpp's file types
FORMATS: dict[Written, int] = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
#: what llama.cpp's own quantizer makes, by the number of the file type
QUANTIZED = {"q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
BLOCK = 32  # numbers that share a scale in Q8_0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored in the file.

    Attributes:
        kind: its format.
        data: its bytes, as numpy holds them.
        shape: of the numbers, the slow axis first.
    """

    kind: str
    data: Any
    shape: tuple[int, ...]


def part_of(name: str, tensor: Tensor, kind: Written) -> StoredTensor:
    """Convert a tensor to the requested format, or to one that can represent it.

    Norms, biases and factors are float32. Rows whose length is not a multiple of 32 become float16
    instead of Q8_0, as in llama.cpp.

    Raises:
        InputError: a number is beyond float16.
    """
    import gguf

    array = tensor.detach().cpu().float().contiguous().numpy()
    if tensor.dim() < 2:
        kind = "f32"
    elif kind == "q8_0" and tensor.shape[-1] % BLOCK:
        kind = "f16"
    if kind == "f16" and np.abs(array).max(initial=0) > float(np.finfo(np.float16).max):
        raise InputError(
            f"{name} holds numbers beyond float16's largest; export with --type bf16 or f32."
        )
    made = gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind.upper()])
    return StoredTensor(kind, made, tuple(tensor.shape))


def write(
    model: Model,
    layout: Layout,
    vocabulary: Vocabulary | None,
    kind: Written,
    path: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the file; every tensor is created twice, once for its metadata and once for its data.

    Raises:
        InputError: a number is beyond float16.
    """
    import gguf

    writer: Any = gguf.GGUFWriter(path, layout.architecture.name)
    metadata(writer, model, layout, kind)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary.add_to(writer, model.tokenizer)
    for name, tensor in tensors(model, layout):
        part = part_of(name, tensor, kind)
        number = gguf.GGMLQuantizationType[part.kind.upper()]
        writer.add_tensor_info(name, part.data.shape, part.data.dtype, part.data.nbytes, number)
        advance(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors(model, layout):
        writer.write_tensor_data(part_of(name, tensor, kind).data)
        advance(1)
    writer.close()


def metadata(writer: Any, model: Model, layout: Layout, kind: Written) -> None:
    """Sizes and constants of the model, with the names of its architecture."""
    import gguf

    config = model.config
    positions = config.max_position_embeddings
    writer.add_type("model")
    writer.add_name(Path(model.source).name)
    writer.add_file_type(FORMATS[kind])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    module: Any = model.module
    writer.add_vocab_size(len(module.get_input_embeddings().weight))
    # Without the bound, tokens would see each other from further away than the model has learned.
    writer.add_context_length(min(positions, layout.window or positions))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layout.layers))
    writer.add_feed_forward_length(_by_layer([layer.width for layer in layout.layers]))
    writer.add_head_count(_by_layer([layer.heads for layer in layout.layers]))
    writer.add_head_count_kv(_by_layer([layer.kv_heads for layer in layout.layers]))
    writer.add_key_length(layout.head)
    writer.add_value_length(layout.head)
    writer.add_rope_dimension_count(layout.head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _by_layer(sizes: list[int]) -> int | list[int]:
    """A single number if all are equal, which is what most readers expect."""
    return sizes if len(set(sizes)) > 1 else sizes[0]
