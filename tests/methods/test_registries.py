"""What every method and allocator owes to its users; those of installed extensions, too."""

import pytest

import secateur
from secateur.allocate import ALLOCATORS, REGISTRY, allocator_class
from secateur.cli.main import cli
from secateur.cli.options import field_options
from secateur.methods import METHODS, method_class, method_classes

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


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_no_option_has_two_meanings(command):
    """Any method may be asked for with any allocator, and both have their flags on the command."""

    def names(options):
        return {name for option in options for name in (option.name, *option.opts)}

    own = names(cli.commands[command].params)
    methods = {n: names(field_options(kind)) for n, kind in method_classes().items()}
    allocators = {n: names(field_options(kind)) for n, kind in REGISTRY.survey()[0].items()}
    for method, options in methods.items():
        assert not options & own, method
        for allocator, others in allocators.items():
            assert not others & own, allocator
            assert not options & others, (method, allocator)
