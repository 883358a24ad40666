"""Checkpoints: a directory that is complete or absent, of safetensors, JSON and parquet, with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tsqlora_scale.engine.state import ParamState, TrainState
from tsqlora_scale.errors import UserError

MANIFEST = "manifest.json"


def checkpoint_dir(root: Path, step: int) -> Path:
    """``checkpoints/step-00000500``."""
    return root / f"step-{step:08d}"


def write_checkpoint(
    folder: Path, state: TrainState, tree: dict[str, Any], extra: Callable[[Path], None] | None = None
) -> None:
    """Write parameters, moments and a JSON tree; called by one process.

    Everything is written beside the target, flushed to disk, and renamed: a folder of that name is complete.

    Args:
        extra: writes further files into the unfinished folder.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in state.params.items():
        for part in ("value", "exp_avg", "exp_avg_sq"):
            tensors[f"{part}/{name}"] = getattr(entry, part).contiguous()
    save_file(tensors, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps({"optimizer_steps": state.optimizer_steps, **tree}, indent=1))
    if extra is not None:
        extra(partial)
    digests = {p.relative_to(partial).as_posix(): _sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
    (partial / MANIFEST).write_text(json.dumps(digests, indent=1))
    for path in [*partial.rglob("*"), partial]:
        _fsync(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _fsync(folder.parent)


def read_checkpoint(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Read a checkpoint after checking every file against the manifest.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(f"checkpoint {str(folder)!r} has no readable {MANIFEST}; resume from another one") from None
    for name, digest in digests.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"checkpoint {str(folder)!r}: {name!r} lies outside of it; resume from another one")
        if not path.is_file() or _sha256(path) != digest:
            raise UserError(f"checkpoint file {str(path)!r} is missing or damaged; resume from another checkpoint")
    tree = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "state.safetensors")
    names = [key.removeprefix("value/") for key in tensors if key.startswith("value/")]
    params = {
        n: ParamState(tensors[f"value/{n}"], tensors[f"exp_avg/{n}"], tensors[f"exp_avg_sq/{n}"]) for n in names
    }
    return TrainState(params, tree.pop("optimizer_steps")), tree


def complete_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir() and not p.name.endswith(".partial"))


def prune(root: Path, *, keep: int, protect: set[str]) -> None:
    """Delete all but the newest ``keep`` checkpoints and those named in ``protect``."""
    for path in complete_checkpoints(root)[:-keep]:
        if path.name not in protect:
            shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
