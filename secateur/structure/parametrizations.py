"""The forms that a method offers for a matrix, with their exact price."""

from collections.abc import Iterable

from secateur.layers.factored_secateur import Spec
from secateur.layers.forms_secateur import layer_class
from secateur.layers.integers import INTEGERS, SHAPE_BYTES, words_of
from secateur.structure.form import Form


def form_of(spec: Spec, label: str) -> Form:
    """A form with a run-time layer, priced by the tensors that the layer holds."""
    layer = layer_class(spec)
    numbers = packed = 0
    for shape, dtype in layer.tensors(spec).values():
        count = 1
        for size in shape:
            count *= size
        if dtype is None:
            numbers += count
        else:
            packed += count * dtype.itemsize
    return Form(
        spec=spec,
        label=label,
        numbers=numbers,
        packed=packed,
        multiplications=layer.multiplications(spec),
        parameters=numbers,
    )


def smaller(forms: Iterable[Form], outputs: int, inputs: int, itemsize: int) -> tuple[Form, ...]:
    """Those that take fewer bytes than the dense weight, ascending."""
    whole = outputs * inputs * itemsize
    found = [form for form in forms if form.bytes(itemsize) < whole]
    return tuple(sorted(found, key=lambda form: form.bytes(itemsize)))


def nearest_divisors(inputs: Iterable[int], group: int) -> str:
    """Of all these numbers of inputs the divisor that is nearest to a size of groups, in words."""
    found = []
    for count in sorted(set(inputs)):
        divisors = (size for size in range(1, count + 1) if count % size == 0)
        near = min(divisors, key=lambda size: (abs(size - group), size))
        found.append(f"{near} for {count} inputs")
    return ", ".join(found)


def integer_form(outputs: int, inputs: int, bias: bool, bits: int, group: int) -> Form:
    """A matrix of numbers of so many bits, with its exact price."""
    spec = {"form": INTEGERS, "outputs": outputs, "inputs": inputs, "bias": bias}
    return Form(
        spec={**spec, "bits": bits, "group": group},
        label=f"int{bits}-g{group}" if group else f"int{bits}",
        numbers=outputs * (inputs // group if group else 1),
        packed=4 * outputs * words_of(inputs, bits) + SHAPE_BYTES,
        multiplications=outputs * inputs,
        parameters=outputs * inputs,
        stock=True,
    )
