"""Fields of methods and allocators: what values they take, and what is said of others."""

import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import ClassVar

import pytest

from secateur.utils.errors import InputError
from secateur.utils.options import checked, option


@dataclass(frozen=True)
class Options:
    name: ClassVar[str] = "options"
    count: int = option(3, "a number", 1)
    share: float = option(0.5, "a share", 0.0, 1.0)
    bits: str = option("4", "text")

    def __post_init__(self):
        checked(self)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 0}, "options: count=0 should be at least 1."),
        ({"count": 2.0}, "count=2.0 should be a whole number"),
        ({"count": True}, "count=True should be a whole number"),
        ({"count": None}, "count=None should be a whole number"),
        ({"share": 1.5}, "share=1.5 should be between 0 and 1."),
        ({"share": -0.5}, "share=-0.5 should be between 0 and 1."),
        ({"share": float("nan")}, "share=nan should be finite"),
        ({"share": float("inf")}, "share=inf should be finite"),
        ({"share": True}, "share=True should be a number"),
        ({"share": 10**400}, "should be a number"),
        ({"share": "0.5"}, "share='0.5' should be a number"),
        ({"bits": 4}, "bits=4 should be text"),
        ({"bits": b"4"}, "bits=b'4' should be text"),
    ],
)
def test_what_does_not_fit_is_refused(given, said):
    with pytest.raises(InputError) as refusal:
        Options(**given)
    assert said in str(refusal.value)


def test_values_stay_as_they_are_given():
    """The mistake: 1 becomes 1.0, and a plan's options are no longer what was asked for."""
    kept = asdict(Options(count=10**400, share=1, bits=""))
    assert [(value, type(value)) for value in kept.values()] == [
        (10**400, int),
        (1, int),
        ("", str),
    ]


def test_help_needs_no_pydantic():
    code = "import sys, secateur.cli.main; print({'pydantic', 'torch'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"
