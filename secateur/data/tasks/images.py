"""Image classifiers."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.data.tasks.base import Use
from secateur.data.tokens import BUNDLED, SET_ASIDE, UNLABELLED, Calibration, Text, Tokens, expanded
from secateur.utils.errors import InputError

NEEDED = 'reading images takes Pillow: pip install "secateur[images]".'
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageClassification(Use):
    """Images of a folder whose subfolders are named after the classes or their numbers.

    They are evaluated by accuracy. Calibration draws from the first four fifths, in a fixed random
    order, and never uses the rest.

    Attributes:
        positions: tokens that the blocks see of an image.
        shape: of an image: channels (3, or 1 where it is grey), height, width.
        classes: name of a class → its number.
    """

    positions: int
    shape: tuple[int, int, int]
    classes: dict[str, int]

    auto: ClassVar[str] = "AutoModelForImageClassification"
    what: ClassVar[str] = "image classifier"
    reads_text: ClassVar[bool] = False
    counts: ClassVar[str] = "images"
    share: ClassVar[str | None] = "accuracy"

    def open_reader(self, source: str, **options: Any) -> Any:
        """The image processor, in the implementation that needs only Pillow.

        Raises:
            InputError: Pillow is missing.
        """
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(source, backend="pil", **options)
        except ImportError as error:
            raise InputError(NEEDED) from error

    def check(self, source: str) -> None:
        """List the folder, and check that some images have known classes."""
        if all(label == UNLABELLED for _, label in self._files(source)):
            raise InputError(f"image folder {source!r}: {self.lacking}")

    def calibration(self, calibration: Calibration, reader: Any) -> Tokens:
        """Images that the calibration's seed draws from those that are not held out."""
        files = self._files(calibration.source)
        files = files[: int(SET_ASIDE * len(files))]
        order = torch.randperm(
            len(files), generator=torch.Generator().manual_seed(calibration.seed)
        )
        return self._read([files[int(i)] for i in order[: calibration.samples]], reader)

    def held(self, text: Text, reader: Any, length: int, limit: int) -> Tokens:
        """The first images after the share ``start`` of the folder."""
        files = self._files(text.source)
        return self._read(files[int(text.start * len(files)) :][:limit], reader)

    def example(self, rows: int, length: int) -> Tokens:
        """Grey images."""
        labels = torch.zeros(rows, dtype=torch.int64)
        return self._tokens(torch.zeros(rows, *self.shape), labels)

    def inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Pixel values."""
        return {"pixel_values": tokens.ids}

    def counted(self, tokens: Tokens) -> Tensor:
        """The single output of every image."""
        return torch.ones_like(tokens.mask[:, 0])

    def amount(self, tokens: Tokens) -> int:
        """Number of images with a known class."""
        assert tokens.labels is not None
        return int((tokens.labels != UNLABELLED).sum())

    @property
    def lacking(self) -> str:
        """How to give images their classes."""
        return (
            "no image says its class; put them in subfolders named after the classes, e.g. "
            f"{', '.join(list(self.classes)[:3])}."
        )

    def _tokens(self, pixels: Tensor, labels: Tensor) -> Tokens:
        return Tokens(pixels, torch.ones(len(pixels), self.positions, dtype=torch.bool), labels)

    def _files(self, source: str) -> list[tuple[Path, int]]:
        """All images of a folder with their classes, in a fixed order."""
        folder = expanded(source)
        if source == BUNDLED or not folder.is_dir():
            what = "the bundled text" if source == BUNDLED else f"{source!r}"
            raise InputError(
                f"{what} is no folder of images, which an image classifier calibrates on and is "
                "judged on; name one with --calibration or --eval (subfolders are classes)."
            )
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(
                f"image folder {source!r} holds no {', '.join(sorted(SUFFIXES))} file."
            )
        labels = {parent: self._label(parent, folder) for parent in {f.parent for f in files}}
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
        return [(files[int(i)], labels[files[int(i)].parent]) for i in order]

    def _label(self, parent: Path, folder: Path) -> int:
        if parent == folder:
            return UNLABELLED
        name = parent.relative_to(folder).parts[0]
        if name in self.classes:
            return self.classes[name]
        if name.isdecimal() and int(name) in self.classes.values():
            return int(name)
        known = get_close_matches(name, self.classes, 1) or list(self.classes)[:1]
        raise InputError(
            f"image folder {str(folder)!r}: the model has no class {name!r}; name subfolders after "
            f"its {len(self.classes)} classes, e.g. {known[0]!r}, or their numbers."
        )

    def _read(self, files: list[tuple[Path, int]], reader: Any) -> Tokens:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError as error:
            raise InputError(NEEDED) from error
        if not files:
            raise InputError("no image is left: of a folder with only one; give more.")
        pixels = []
        refused = (UnidentifiedImageError, Image.DecompressionBombError)
        for path, _ in files:
            try:
                with Image.open(path) as image:
                    shown = image.convert("L" if self.shape[0] == 1 else "RGB")
                made = reader(shown, return_tensors="pt")["pixel_values"]
            except (OSError, ValueError, SyntaxError, *refused) as error:
                raise InputError(f"image {str(path)!r} cannot be read: {error}.") from error
            if made.shape[1:] != self.shape:
                raise InputError(
                    f"image {str(path)!r}: the image processor makes it {tuple(made.shape[1:])} "
                    f"(channels, height, width), and the model reads {self.shape}; they are not of "
                    f"the same model."
                )
            pixels.append(made)
        labels = torch.tensor([label for _, label in files])
        return self._tokens(torch.cat(pixels).float(), labels)
