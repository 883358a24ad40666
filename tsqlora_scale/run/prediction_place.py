"""Where a prediction's adapter and config are, and what its files may be; before anything is read of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.run.trained_adapter import config_beside

#: What an answer can be written as.
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def find_adapter(run: str | Path | None, adapter: str | Path | None) -> Path:
    """The adapter's folder.

    Raises:
        UserError: neither is given, or the run folder is none.
    """
    if adapter is not None:
        return Path(adapter)
    if run is None:
        raise UserError("--run or --adapter is needed: the run folder, or the adapter folder that a run wrote")
    if not Path(run).is_dir():
        raise UserError(f"--run {str(run)!r} is no folder; give the folder that a run wrote")
    found = Path(run) / "adapter"
    if not found.is_dir():
        raise UserError(f"--run {str(run)!r} holds no adapter/; has the run finished? Else name one by --adapter")
    return found


def find_config(run: str | Path | None, adapter: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of the run that an adapter is of.

    Args:
        run: its folder, where that is known.
        overrides: ``section.key=value`` that win over it.

    Raises:
        UserError: there is none, or it is not valid.
    """
    found = config_beside(adapter if run is None else run)
    if found is not None:
        return load_config(found, list(overrides))
    where = f"--run {str(run)!r} holds" if run is not None else f"--adapter {str(adapter)!r} lies beside"
    raise UserError(f"{where} no config.yaml; give the run's config by --config")


def check_files(data: Path, out: Path, *, overwrite: bool) -> None:
    """Check that ``out`` can be written, and is none of what is there.

    Raises:
        UserError: naming the option.
    """
    key = f"--out {str(out)!r}"
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"{key}: unknown format; end it in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if launched_rank() != 0:  # rank 0 alone writes, and a folder need not be on every machine
        return
    if not out.parent.is_dir():
        raise UserError(f"{key}: there is no folder {str(out.parent)!r}; make it, or choose another place")
    if out.is_dir():
        raise UserError(f"{key}: is a folder; name a file in it")
    if out.exists() and data.exists() and out.samefile(data):
        raise UserError(f"{key}: is --data itself; choose another file")
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"{key}: is there already; choose another file, or give --overwrite")
    try:
        with tempfile.TemporaryFile(dir=out.parent):  # permission bits do not say what a disk takes
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot be written ({error.strerror}); choose another place") from None
