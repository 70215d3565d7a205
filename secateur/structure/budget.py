"""What to spend on a model, and the constraints on the sizes of its units."""

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
    """What the command line and files know of a field.

    ``more`` may have ``key``, its name in files and of its option where that is another;
    ``flag``, its flag where that is another; ``choices``, all that it may be; ``low``, the least
    of a whole number; ``usual``, its default in words where the method decides it.
    """
    return {"help": help, **more}


@dataclass(frozen=True)
class Budget:
    """How much of a model stays, what that counts, and the constraints on sizes.

    The command line, recipes and sweeps have these fields under the same names, and take them from
    here.

    Attributes:
        keep: the share of ``target`` that stays, above 0 and at most 1; "least" for as little as
            the forms of a method allow; None for the method's usual.
        target: what ``keep`` is a share of: "parameters", "bytes" or "flops" of what can shrink,
            "cache" (bytes of KV cache), or "latency" of the whole forward pass on this machine;
            None for the method's usual.
        tier: "plain" keeps the shape of attention and gives every MLP one width, so that stock
            classes load the result; "per-layer" lets every unit have its own size.
        multiple_of: MLP widths become multiples of this.
        batch: sequences in the forward pass that "latency" is measured on.
        length: tokens in each of them, none before them.
        runtime: what will read the result; sizes are such as it reads.

    Raises:
        InputError: a value is not one of these.
    """

    keep: Keep | None = field(
        default=None,
        metadata=_told(
            "Share of the target that stays, above 0 and at most 1, or `least` for as little as "
            "the forms of a method allow",
            usual="0.8; least for a method that keeps widths",
        ),
    )
    target: Target | None = field(
        default=None,
        metadata=_told(
            "What --keep is a share of: parameters, bytes or flops of what can shrink, cache "
            "(bytes of KV cache), or latency of a forward pass on this machine",
            choices=get_args(Target),
            usual="parameters; bytes for a method that keeps widths",
        ),
    )
    tier: Tier = field(
        default="per-layer",
        metadata=_told(
            "per-layer: every unit its own size; plain: attention keeps its shape, one MLP width, "
            "so that stock classes load the result.",
            choices=get_args(Tier),
        ),
    )
    multiple_of: int = field(
        default=8,
        metadata=_told("MLP widths become multiples of this, so that kernels stay fast.", low=1),
    )
    batch: int = field(
        default=1,
        metadata=_told(
            "Sequences in the forward pass that latency is measured on.",
            low=1,
            key="latency_batch",
        ),
    )
    length: int = field(
        default=256, metadata=_told("Tokens in each of them.", low=1, key="latency_length")
    )
    runtime: Runtime = field(
        default="transformers",
        metadata=_told(
            "What will read the result, so that sizes are such as it reads: transformers, vllm "
            "(prunes with --tier plain only), gguf (llama.cpp), or gguf-q4 (llama.cpp with blocks "
            "of 4 bits).",
            choices=get_args(Runtime),
            flag="for",
        ),
    )

    def __post_init__(self) -> None:
        if self.target in get_args(Runtime):
            raise InputError(
                f"--target says what --keep is a share of, and {self.target!r} is what reads the "
                f"result: ask for it by --for {self.target}, beside a --target or without."
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
        """The budget of a method: what is left to it has the method's usual value.

        Raises:
            InputError: "least" of a method that prunes, which would leave next to nothing.
        """
        keep = method.usual_keep if self.keep is None else self.keep
        if keep == LEAST != method.usual_keep:
            raise InputError(
                f"keep 'least' is for methods that give matrices another form, and {method.name} "
                f"prunes; name a share above 0, e.g. 0.8."
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
