"""The adapter that a folder means: an adapter's own, a run's, or a checkpoint's."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import WRITE_ERRORS
from tsqlora_scale.model.adapters.adapter_files import write_adapter
from tsqlora_scale.model.weight_files import DESCRIPTION, WEIGHTS
from tsqlora_scale.run.checkpoint import complete_checkpoints, read_values


@contextmanager
def adapter_folder(place: str | Path, *, option: str = "--adapter") -> Iterator[Path]:
    """The folder of a plain PEFT adapter that ``place`` means, for as long as it is needed.

    Args:
        place: an adapter's folder, as it is; a run folder, for its ``adapter/``; or a checkpoint, whose adapter is
            written to a temporary folder. Anything else is left to whoever reads it.
        option: by which the place was given.

    Raises:
        UserError: a damaged checkpoint, one of a release before 0.3, or a run that has not written its adapter yet.
    """
    folder = Path(place)
    if (folder / DESCRIPTION).is_file():
        yield folder
    elif (folder / "state.json").is_file():
        with tempfile.TemporaryDirectory(prefix="adapter-") as temporary:
            write_from_checkpoint(folder, Path(temporary))
            yield Path(temporary)
    elif (folder / "checkpoints").is_dir() or (folder / "adapter").is_dir():
        if not (folder / "adapter" / DESCRIPTION).is_file():
            newest = complete_checkpoints(folder / "checkpoints")[-1:]
            hint = f"give a checkpoint of it ({str(newest[0])!r} is the newest)" if newest else "resume it first"
            raise UserError(f"{option} {str(place)!r} is a run folder without an adapter: the run is not over; {hint}")
        yield folder / "adapter"
    else:
        yield folder


def write_from_checkpoint(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Write a checkpoint's adapter as PEFT does.

    Returns:
        The state of the run in it, tensors aside.

    Raises:
        UserError: the checkpoint is damaged or of an older release, or the folder cannot be written.
    """
    tree, values = read_values(checkpoint)
    if "adapter" not in tree:
        raise UserError(
            f"checkpoint {str(checkpoint)!r} is of a release whose checkpoints do not describe their adapter; resume "
            "from it, and take the adapter of the run"
        )
    try:
        write_adapter(folder, tree["adapter"], values)
    except WRITE_ERRORS as error:
        raise UserError(f"the adapter of {str(checkpoint)!r} cannot be written to {str(folder)!r} ({error})") from None
    return tree


def digest_of(folder: Path) -> str:
    """A digest of an adapter's values."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]


def config_beside(place: str | Path) -> Path | None:
    """The resolved config of the run that a folder belongs to, itself, its ``adapter/`` or a checkpoint, if any."""
    folder = Path(place).resolve()
    above = [folder, *([folder.parent] if folder.name == "adapter" else [])]
    above += [folder.parent.parent] if folder.parent.name == "checkpoints" else []
    found = (run / "config.yaml" for run in above if folder.is_dir())
    return next((path for path in found if path.is_file()), None)


def config_of(place: str | Path, *, option: str = "--run") -> Path:
    """:func:`config_beside`, where there must be one.

    Raises:
        UserError: there is none.
    """
    found = config_beside(place)
    if found is None:
        raise UserError(f"{option} {str(place)!r} belongs to no run folder with a config.yaml; give --config FILE")
    return found
