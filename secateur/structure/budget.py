"""The budget of a compression: how much may remain, of what, and in which shapes."""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from secateur.utils.errors import InputError, nearest, shown

if TYPE_CHECKING:
    from secateur.methods.base import Method

MAX_PASS = 2**24  # tokens whose time is measured
Target = Literal["parameters", "bytes", "flops", "cache", "latency"]
Runtime = Literal["transformers", "vllm", "gguf", "gguf-q4"]
Tier = Literal["plain", "per-layer"]  #: what may be asked for
Written = Literal["plain", "per-layer", "factored"]  #: what a plan may need
Keep = float | Literal["least"]
LEAST: Literal["least"] = "least"


def _told(help: str, **more: Any) -> dict[str, Any]:
    """Metadata of a field, from which its option and its key in files are made.

    ``more`` can have ``key``, the name in files and of the option if it differs from the field's;
    ``flag``, the option's name if it differs from the key; ``choices``, the allowed values;
    ``low``, the minimum of an integer; ``usual``, the default in words if the method decides it.
    """
    return {"help": help, **more}


@dataclass(frozen=True)
class Budget:
    """How much of a model may remain, of which cost, and with which constraints on shapes.

    Command-line options and the keys of recipes and sweeps are made from these fields.

    Attributes:
        keep: the share of ``target`` that remains, above 0 and at most 1; "least" for as little as
            the forms of a method allow; None for the method's default.
        target: the cost that ``keep`` refers to: "parameters", "bytes" or "flops" of compressible
            weights, "cache" (bytes of KV cache), or "latency" of a forward pass on this machine;
            None for the method's default.
        tier: "plain" keeps the shape of attention and gives all MLPs the same width, so that stock
            classes load the result; "per-layer" gives every unit its own size.
        multiple_of: MLP widths become multiples of this.
        batch: sequences in the forward pass whose "latency" is measured.
        length: tokens in each sequence; the cache is empty before.
        runtime: the software that will load the result; sizes are restricted to those it supports.

    Raises:
        InputError: a value is not one of these.
    """

    keep: Keep | None = field(
        default=None,
        metadata=_told(
            "Share of the target that remains, above 0 and at most 1, or `least` for as little as "
            "the forms of the method allow",
            usual="0.8; least for methods of forms",
        ),
    )
    target: Target | None = field(
        default=None,
        metadata=_told(
            "Cost that --keep refers to: parameters, bytes or flops of the attention and MLP "
            "matrices, cache (bytes of the KV cache), or latency of a forward pass on this machine",
            choices=get_args(Target),
            usual="parameters; bytes for methods of forms",
        ),
    )
    tier: Tier = field(
        default="per-layer",
        metadata=_told(
            "per-layer: every unit gets its own size; plain: attention keeps its shape and all "
            "MLPs get the same width, so that stock classes load the result.",
            choices=get_args(Tier),
        ),
    )
    multiple_of: int = field(
        default=8,
        metadata=_told(
            "MLP widths become multiples of this number, so that kernels stay fast.", low=1
        ),
    )
    batch: int = field(
        default=1,
        metadata=_told(
            "Batch size of the forward pass whose latency is measured.",
            low=1,
            key="latency_batch",
        ),
    )
    length: int = field(
        default=256,
        metadata=_told("Tokens per sequence of that forward pass.", low=1, key="latency_length"),
    )
    runtime: Runtime = field(
        default="transformers",
        metadata=_told(
            "Software that will load the result; sizes are restricted to those it supports: "
            "transformers, vllm (prunes with --tier plain only), gguf (llama.cpp), or gguf-q4 "
            "(llama.cpp with 4-bit blocks).",
            choices=get_args(Runtime),
            flag="for",
        ),
    )

    def __post_init__(self) -> None:
        if self.target in get_args(Runtime):
            raise InputError(
                f"--target is the cost that --keep refers to, and {self.target!r} is software that "
                f"loads the result: use --for {self.target}, with or without a --target."
            )
        object.__setattr__(self, "keep", _share(self.keep))
        for f in fields(self):
            _check(f, getattr(self, f.name))
        if self.batch * self.length > MAX_PASS:
            raise InputError(
                f"latency of {self.batch} × {self.length} tokens: a forward pass has at most "
                f"{MAX_PASS}; ask for fewer with --latency-batch or --latency-length."
            )

    def of(self, method: "Method | type[Method]") -> "Budget":
        """The budget with the defaults of a method in place of None.

        Raises:
            InputError: "least" for a method that prunes, which would remove almost everything.
        """
        keep = method.usual_keep if self.keep is None else self.keep
        if keep == LEAST != method.usual_keep:
            raise InputError(
                f"keep 'least' is for methods of forms, and {method.name} prunes; give a share "
                f"above 0, e.g. 0.8."
            )
        return replace(self, keep=keep, target=self.target or method.target)

    @property
    def share(self) -> Keep:
        """``keep``, where it is known.

        Raises:
            ValueError: it is still left to the method; :meth:`of` fills it in.
        """
        if self.keep is None:
            raise ValueError("Budget.of(method) says what a method keeps.")
        return self.keep

    @property
    def counts(self) -> Target:
        """``target``, where it is known.

        Raises:
            ValueError: it is still left to the method; :meth:`of` fills it in.
        """
        if self.target is None:
            raise ValueError("Budget.of(method) says what a method's budget counts.")
        return self.target

    def as_dict(self) -> dict[str, Any]:
        """Its fields under the names that files have for them."""
        return {key_of(f): getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Budget":
        """The budget of :meth:`as_dict`; a field that is missing has its default.

        Raises:
            InputError: a name or a value is wrong.
        """
        names = {key_of(f): f.name for f in fields(cls)}
        for name in content:
            if name not in names:
                raise InputError(f"budget: unknown {shown(name)}. {nearest(str(name), names)}")
        return cls(**{names[name]: value for name, value in content.items()})


def key_of(f: "Field[Any]") -> str:
    """What files and options call a field of a budget."""
    return str(f.metadata.get("key", f.name))


def flag_of(f: "Field[Any]") -> str:
    """The flag of a field of a budget, without its dashes."""
    return str(f.metadata.get("flag", key_of(f).replace("_", "-")))


KEYS = tuple(key_of(f) for f in fields(Budget))  #: names of the fields in files


def _share(keep: Any) -> Keep | None:
    """A ``keep`` as it is stored.

    Raises:
        InputError: it is no share.
    """
    if keep is None or keep == LEAST:
        return LEAST if keep == LEAST else None
    number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
    if not number or not math.isfinite(keep) or not 0 < keep <= 1:
        raise InputError(
            f"keep {shown(keep)} should be above 0 and at most 1, e.g. 0.8, or 'least' for as "
            f"little as the forms of a method allow."
        )
    return float(keep)


def _check(f: "Field[Any]", value: Any) -> None:
    """Hold a value against what its field allows.

    Raises:
        InputError: it is something else; the message names the nearest choice.
    """
    choices, low = f.metadata.get("choices"), f.metadata.get("low")
    if choices is not None and value not in (*choices, f.default):
        raise InputError(f"unknown --{flag_of(f)} {shown(value)}. {nearest(str(value), choices)}")
    if low is not None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{f.name} {shown(value)} should be a whole number.")
        if value < low:
            raise InputError(f"{f.name} {value!r} should be at least {low}.")
