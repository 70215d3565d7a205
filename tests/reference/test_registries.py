"""What every entry of METHODS and ALLOCATORS owes to its users."""

import pytest

import secateur
from secateur.allocate import ALLOCATORS, allocator_class
from secateur.methods import METHODS, method_class

CLASSES = [
    *(pytest.param(method_class, name, id=name) for name in METHODS),
    *(pytest.param(allocator_class, name, id=f"allocator {name}") for name in ALLOCATORS),
]


@pytest.mark.parametrize(("of", "name"), CLASSES)
def test_every_class_is_a_public_name(of, name):
    found = of(name)
    assert found.__name__ in secateur.__all__
    assert getattr(secateur, found.__name__) is found
    assert found.name == name


def test_every_public_name_is_there():
    assert len(set(secateur.__all__)) == len(secateur.__all__)
    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
    with pytest.raises(AttributeError, match="Autoo"):
        _ = secateur.Autoo
