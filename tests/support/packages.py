"""Packages that declare a method or an allocator, as pip would install them."""

from pathlib import Path

ALLOCATOR = """
from dataclasses import dataclass
from typing import ClassVar
from secateur.extend import Uniform, option

@dataclass(frozen=True)
class Same(Uniform):
    {field}
    name: ClassVar[str] = "same"
    summary: ClassVar[str] = "the same"
    source: ClassVar[str] = "a test"
"""
GOOD = ALLOCATOR.format(field='much: float = option(0.5, "of it", 0.0, 1.0)')


def put(
    root: Path,
    package: str,
    code: str,
    value: str = "Same",
    name: str = "same",
    group: str = "secateur.allocators",
) -> Path:
    """Write a package of one module, with the metadata that pip writes, to a folder of its own."""
    module, site = package.replace("-", "_"), root / package
    metadata = site / f"{module}-2.1.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{module}.py").write_text(code)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.1\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{value}\n")
    return site
