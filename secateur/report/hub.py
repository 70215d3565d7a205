"""Upload a finished run to the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from secateur.data.tokens import expanded
from secateur.io.safetensors_header import SINGLE, read_index
from secateur.report.model_card import CARD
from secateur.report.run_records import read_run
from secateur.utils.errors import InputError
from secateur.utils.progress import Progress

#: what the hub's library raises, and the HTTP client below it, whichever that is
FAILURES: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__mro__[1])


def push(folder: Path, repo: str, private: bool = False, progress: Progress | None = None) -> str:
    """Upload a run's folder as a model to the hub, and return its address.

    The repository is created if necessary. Files in it that the run does not have are kept.

    Raises:
        InputError: the folder is no whole run, the name can't be one, nobody is logged in, the
            hub refuses or can't be reached, or a private upload would become public.
    """
    progress = progress or Progress()
    folder = expanded(folder)
    check_whole(folder)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"repository {repo!r}: {_first(error)} Give USER/NAME.") from error
    if get_token() is None:
        raise InputError(
            "nobody is logged in at the hub: type `hf auth login`, or set HF_TOKEN to a token that "
            "may write."
        )
    api = HfApi()
    try:
        made: Any = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        if private and not api.model_info(made.repo_id).private:
            raise InputError(
                f"repository {made.repo_id!r} exists and is public; make it private first, choose "
                f"another name, or leave --private out."
            )
        progress.say(f"uploading {folder.name} to {made.repo_id}")
        told = f"{folder.name}, compressed by Secateur"
        api.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message=told)
    except FAILURES as error:
        raise InputError(
            f"{repo!r} could not be uploaded: {_first(error)} Repeat the command; what has arrived "
            f"is not sent again."
        ) from error
    return str(made)


def check_whole(folder: Path) -> None:
    """Refuse a folder that is not a finished run.

    Raises:
        InputError: the report, the config, weights or the card are missing.
    """
    read_run(folder)
    named = f"run {str(folder)!r}"
    if (folder.resolve().parent / "fingerprint.json").exists():
        raise InputError(f"{named} is not finished; repeat its command, which goes on with it.")
    here = folder.resolve()
    for found in folder.rglob("*"):
        if found.is_symlink() and not found.resolve().is_relative_to(here):
            raise InputError(
                f"{named}: {str(found.relative_to(folder))!r} is a link that leads out of the "
                f"folder, and what it leads to would be uploaded; remove it."
            )
    for path in ("config.json", *_weights(folder)):
        if not (folder / path).is_file():
            raise InputError(f"{named}: {path} is missing; it is no whole checkpoint.")
    if not (folder / CARD).is_file():
        raise InputError(f"{named} has no model card; `secateur report {folder}` writes it.")


def _weights(folder: Path) -> list[str]:
    return sorted({*(read_index(folder) or {SINGLE: SINGLE}).values()})


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else type(error).__name__
    return told if told.endswith(".") else f"{told}."
