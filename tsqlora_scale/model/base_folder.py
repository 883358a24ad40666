"""What lies in a base's folder: which of it is the base, and what is none."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.common.printing import shown
from tsqlora_scale.model.weight_files import DESCRIPTION

log = logging.getLogger("tsqlora_scale")

#: For ``from_pretrained``: look for an adapter where there is none. Beside full weights it would be put on the base.
NO_ADAPTER = {"adapter_kwargs": {"subfolder": "no-adapter-is-looked-for"}}


def check_folder(folder: Path, *, key: str) -> None:
    """See that a folder is a base's, and say what in it is left aside.

    Args:
        key: ``key=value`` of the config that names the folder.

    Raises:
        UserError: it holds an adapter alone, or a model in a folder below.
    """
    if (folder / "config.json").is_file():
        if (folder / DESCRIPTION).is_file() and launched_rank() == 0:
            log.warning("%s: the adapter in its %s is left aside; the base alone is loaded", key, DESCRIPTION)
        return
    if (folder / DESCRIPTION).is_file():
        base = _read(folder / DESCRIPTION).get("base_model_name_or_path")
        raise UserError(
            f"{key}: is an adapter, not a base (it has {DESCRIPTION} and no config.json); give the base that it is "
            f"for, {shown(base)}, or merge it into that first (export --format merged)"
        )
    below = _transformer_below(folder)
    if below is not None:
        raise UserError(
            f"{key}: is a folder of sentence-transformers, whose model lies below it; set model.name_or_path to "
            f"{str(below)!r}"
        )


def _transformer_below(folder: Path) -> Path | None:
    """Where a folder of sentence-transformers has its transformer, if not in itself."""
    modules = _read(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and path and (folder / path / "config.json").is_file():
            return folder / path
    return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
