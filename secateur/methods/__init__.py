"""Compression methods; one paper, one file.

Names serve the command line; in Python, pass the object. May import the rooms from ``utils`` to
``allocate``.
"""

from typing import TYPE_CHECKING

from secateur.methods.base import Method
from secateur.utils.errors import InputError
from secateur.utils.registry import Registry

if TYPE_CHECKING:
    from secateur.models.model import Model

#: name → "module:class" of the project's own. Imported only when asked for, as that imports torch.
METHODS = {
    "auto": "secateur.methods.auto:Auto",
    "modegpt": "secateur.methods.modegpt:MoDeGPT",
    "flap": "secateur.methods.flap:FLAP",
    "wanda-sp": "secateur.methods.wanda_sp:WandaSP",
    "slicegpt": "secateur.methods.slicegpt:SliceGPT",
    "ziplm": "secateur.methods.ziplm:ZipLM",
    "obspa": "secateur.methods.obspa:OBSPA",
    "fisher": "secateur.methods.fisher:FisherMask",
    "ispasp": "secateur.methods.ispasp:ISpaSP",
    "cfsp": "secateur.methods.cfsp:CFSP",
    "llm-pruner": "secateur.methods.llm_pruner:LLMPruner",
    "nirvana": "secateur.methods.nirvana:Nirvana",
    "shortgpt": "secateur.methods.shortgpt:ShortGPT",
    "sleb": "secateur.methods.sleb:SLEB",
    "replace": "secateur.methods.replace:Replace",
    "svd": "secateur.methods.svd:SVD",
    "svd-llm": "secateur.methods.svd_llm:SVDLLM",
    "welore": "secateur.methods.welore:LowRankWeLore",
    "forms": "secateur.methods.forms:Forms",
    "magnitude": "secateur.methods.magnitude:Magnitude",
    "wanda": "secateur.methods.wanda:Wanda",
    "sparsegpt": "secateur.methods.sparsegpt:SparseGPT",
    "armor": "secateur.methods.armor:Armor",
    "rtn": "secateur.methods.rtn:RTN",
    "gptq": "secateur.methods.gptq:GPTQ",
    "ptqtp": "secateur.methods.ptqtp:PTQTP",
    "monarch": "secateur.methods.monarch:MonarchProjection",
    "block-dense": "secateur.methods.block_dense:BlockDenseProjection",
    "block-shuffle": "secateur.methods.block_shuffle:BlockShuffleProjection",
    "compot": "secateur.methods.compot:COMPOT",
    "cospadi": "secateur.methods.cospadi:CoSpaDi",
    "dsformer": "secateur.methods.dsformer:DSFormer",
}


REGISTRY = Registry("method", "secateur.methods", METHODS, Method)


def method_class(name: str, package: str | None = None) -> type[Method]:
    """The method class of a name; ``package`` is what a plan says that declares it.

    Raises:
        InputError: no package here declares the name, several do, or its class can't be used.
    """
    found: type[Method] = REGISTRY.get(name, package)
    return found


def method_classes() -> dict[str, type[Method]]:
    """All methods that can be used, by name: the project's own and those of installed packages."""
    return REGISTRY.survey()[0]


def check_served(method: Method, model: "Model") -> None:
    """Refuse a model on which a method can change nothing; needs no weights.

    Raises:
        InputError: what stands in the way, and which methods can serve it.
    """
    obstacle = method.obstacle(model)
    if obstacle is not None:
        able = [n for n, kind in method_classes().items() if kind().obstacle(model) is None]
        raise InputError(
            f"method {method.name!r} can't serve a model of type {model.config.model_type!r}: "
            f"{obstacle}. Methods that can: {', '.join(able)}."
        )
