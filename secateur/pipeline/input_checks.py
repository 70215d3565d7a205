"""What a run reads: defaults, and checks that cost little and come before anything is measured."""

from dataclasses import replace
from pathlib import Path

from secateur.data.tasks import Use, use_of
from secateur.data.tokens import BUNDLED, SET_ASIDE, Calibration, Text, Tokens, expanded
from secateur.models.loading import locate, open_reader, read_config
from secateur.models.model import Settings, anatomy_of, not_served, positions
from secateur.scoring.calibration_selection import check_choice
from secateur.structure.units import Unit
from secateur.utils.errors import InputError

TOKENS_PER_CHANNEL = 8


def default_texts(calibration: Calibration, use: Use) -> tuple[Text, ...]:
    """What calibration never sees: the end of its own source and, of texts, the bundled one."""
    bundled = Text("Python docs (bundled)", BUNDLED)
    if calibration.source == BUNDLED:
        return (bundled,)
    own = Text(f"rest of {Path(calibration.source).name}", calibration.source, SET_ASIDE)
    return (own, bundled) if use.reads_text else (own,)


def unseen(texts: tuple[Text, ...], calibration: Calibration) -> tuple[Text, ...]:
    """The texts without what calibration may have seen of them."""
    return tuple(
        replace(text, name=f"rest of {text.name}", start=SET_ASIDE)
        if calibration.source != BUNDLED
        and expanded(text.source).resolve() == expanded(calibration.source).resolve()
        and text.start < SET_ASIDE
        else text
        for text in texts
    )


def overlaps(texts: tuple[Text, ...], calibration: Calibration) -> list[str]:
    """Notes about texts that lie inside the calibration folder, or the other way round."""
    own = expanded(calibration.source).resolve()
    found = [
        text.source
        for text in texts
        if (path := expanded(text.source).resolve()) != own
        and own.exists()
        and path.exists()
        and (path.is_relative_to(own) or own.is_relative_to(path))
    ]
    return [f"{name!r} shares files with the calibration text: too good a figure" for name in found]


def text_notes(calibration: Calibration, tokens: Tokens, units: list[Unit], use: Use) -> list[str]:
    """What a user should know about the amount of calibration text."""
    notes, samples, widest = [], len(tokens), max(unit.size for unit in units)
    if samples < calibration.samples:
        notes.append(f"there are {samples} of the {calibration.samples} samples asked for")
    if (seen := use.seen(tokens)) < TOKENS_PER_CHANNEL * widest:
        notes.append(
            f"{seen} tokens are few for {widest} channels, whose statistics will be noisy; "
            f"{TOKENS_PER_CHANNEL * widest} or more would be better"
        )
    return notes


def read_calibration(source: str, calibration: Calibration, settings: Settings) -> Tokens:
    """The calibration windows of a model, before its weights are opened.

    Raises:
        InputError: the model or its family is unknown, or the text does not do.
    """
    config = read_config(source, settings)
    if anatomy_of(config) is None:
        raise InputError(not_served(config))
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"model {source!r} is quantised, and narrowing needs its numbers; start from the "
            f"unquantised model."
        )
    room = positions(config)
    if room is not None and calibration.length > room:
        raise InputError(
            f"--length {calibration.length} is more than the model's {room} positions."
        )
    use = use_of(config)
    check_choice(calibration, use)
    return use.calibration(calibration, open_reader(source, settings, use))


def stamps(sources: list[str], own: tuple[Path, ...]) -> dict[str, list[int]]:
    """Size and time of change of every local file that the sources name or hold.

    What lies under ``own``, the run's folders, is left out.
    """
    paths = [Path(locate(source)) for source in dict.fromkeys(sources)]
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
    return {
        str(f): [f.stat().st_size, f.stat().st_mtime_ns]
        for f in files
        if f.is_file() and not any(f.is_relative_to(folder) for folder in own)
    }
