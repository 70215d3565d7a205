"""A model and a folder of statistics that all ranks work on."""

from dataclasses import replace
from pathlib import Path

from secateur.calibration.collect import Store
from secateur.distributed.collectives import Ranks
from secateur.models.model import Model, Settings
from secateur.models.streamed_loading import open_fitting
from secateur.utils.errors import InputError
from secateur.utils.precision import check_exact


def shared_store(store: Store, ranks: Ranks) -> Store:
    """The leader's folder of statistics, on every rank.

    Raises:
        InputError: a rank does not see it.
    """
    if ranks.alone:
        return store

    def made() -> str:
        if store.folder is None:
            raise InputError("several processes need a Store with a folder that all of them see.")
        store.folder.mkdir(parents=True, exist_ok=True)
        return str(store.folder.absolute())

    folder = Path(ranks.broadcast(made))
    if not folder.is_dir():
        raise InputError(
            f"rank {ranks.rank} does not see {str(folder)!r}; let OUT and --statistics be on a "
            f"disk that all machines share."
        )
    return Store(folder)


def open_shared(source: str, settings: Settings, folder: Path | None, ranks: Ranks) -> Model:
    """Open a model on every rank, each on its own device, and on all of them in the same way.

    The leader decides by its free memory whether the model is read block by block.

    Raises:
        InputError: see ``open_fitting``; or the device is one that several ranks can't share.
    """
    if not ranks.alone:
        settings = replace(settings, device=_device(settings, ranks))
    copies = 1 if settings.device.startswith("cuda") else ranks.local_world_size
    model = open_fitting(source, settings, folder, copies) if ranks.leader else None
    streamed = ranks.agree(model is not None and model.offload is not None)
    if model is not None:
        return model
    return open_fitting(source, replace(settings, stream="on" if streamed else "off"), folder)


def _device(settings: Settings, ranks: Ranks) -> str:
    if ":" in settings.device:
        raise InputError(
            f"--device {settings.device}: every rank takes the GPU of its own number. Say "
            f"{settings.device.partition(':')[0]}."
        )

    def kind() -> str:
        device = settings.torch_device()
        check_exact(device, "a run of several processes")
        return device.type

    return str(ranks.use_device(ranks.broadcast(kind)))
