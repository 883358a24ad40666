"""Checkpoints: a directory that is complete or absent, of safetensors, JSON and parquet, with a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import WRITE_ERRORS, fsync
from tsqlora_scale.common.launcher import speaks_for_machine
from tsqlora_scale.engine.train_state import ParamState, TrainState

log = logging.getLogger("tsqlora_scale")

MANIFEST = "manifest.json"
FILES = {"parameters.safetensors", "state.safetensors", "state.json"}
#: Behind the name of a checkpoint in whose place a new one of the same step is just put.
REPLACED = ".replaced.partial"
#: Key of a reference to a tensor in ``state.safetensors``.
TENSOR = "tensor"


def checkpoint_dir(root: Path, step: int) -> Path:
    """``checkpoints/step-00000500``."""
    return root / f"step-{step:08d}"


def write_checkpoint(folder: Path, state: TrainState, tree: dict[str, Any]) -> None:
    """Write parameters, moments and the rest of a run's state; called by one process.

    Everything is written beside the target, flushed to disk, and renamed: a folder of that name is complete.

    Args:
        tree: nested dictionaries of JSON values and tensors.

    Raises:
        OSError, SafetensorError: :data:`~tsqlora_scale.common.files.WRITE_ERRORS`; nothing half written is left.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, state, tree)
        old = _replace(folder, partial)
    except WRITE_ERRORS:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        fsync(folder.parent)
        if old is not None:
            shutil.rmtree(old)
    except OSError as error:  # the checkpoint is complete all the same
        log.warning("%s is written, but %s cannot be tidied (%s)", folder, folder.parent, error)


def _write(partial: Path, state: TrainState, tree: dict[str, Any]) -> None:
    partial.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in state.params.items():
        for part in ("value", "exp_avg", "exp_avg_sq"):
            tensors[f"{part}/{name}"] = getattr(entry, part).contiguous()
    save_file(tensors, partial / "parameters.safetensors")
    arrays: dict[str, torch.Tensor] = {}
    plain = _without_tensors({"optimizer_steps": state.optimizer_steps, **tree}, "", arrays)
    save_file(arrays, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    digests = {p.relative_to(partial).as_posix(): _sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
    (partial / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in [*partial.rglob("*"), partial]:
        fsync(path)


def verify_checkpoint(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        UserError: naming the file that is missing, damaged, or not of the checkpoint.
    """
    otherwise = "resume from another checkpoint"
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        digests = None
    unnamed = f"checkpoint {str(folder)!r} has no {MANIFEST} that names its files; {otherwise}"
    if not isinstance(digests, dict):
        raise UserError(unnamed)
    for name, digest in digests.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"checkpoint {str(folder)!r}: {name!r} lies outside of it; {otherwise}")
        try:
            found = _sha256(path)
        except OSError:
            found = None
        if found != digest:
            raise UserError(f"checkpoint file {str(path)!r} is missing or damaged; {otherwise}")
    if not digests.keys() >= FILES:
        raise UserError(unnamed)
    for path in sorted(folder.rglob("[!.]*")):  # file systems have hidden files of their own
        if path.is_file() and path.relative_to(folder).as_posix() not in {*digests, MANIFEST}:
            raise UserError(f"checkpoint file {str(path)!r} is not of that checkpoint; {otherwise}")


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that is undamaged; damaged ones that are newer are named in warnings. None without any.

    Raises:
        UserError: when there are checkpoints, and all of them are damaged.
    """
    problem: UserError | None = None
    _restore(root)
    for folder in reversed(complete_checkpoints(root)):
        try:
            verify_checkpoint(folder)
        except UserError as error:
            if speaks_for_machine():
                log.warning("%s", str(error).replace("resume from another checkpoint", "trying the one before it"))
            problem = error
        else:
            return folder
    if problem is not None:
        raise UserError(f"no checkpoint in {str(root)!r} is undamaged ({problem}); or start anew with --overwrite")
    return None


def read_checkpoint(folder: Path, *, verified: bool = False) -> tuple[TrainState, dict[str, Any]]:
    """Read a checkpoint after checking every file against the manifest, which :func:`newest_checkpoint` has done.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    if not verified:
        verify_checkpoint(folder)
    tree = _with_tensors(
        json.loads((folder / "state.json").read_text(encoding="utf-8")), load_file(folder / "state.safetensors")
    )
    tensors = load_file(folder / "parameters.safetensors")
    names = [key.removeprefix("value/") for key in tensors if key.startswith("value/")]
    params = {n: ParamState(tensors[f"value/{n}"], tensors[f"exp_avg/{n}"], tensors[f"exp_avg_sq/{n}"]) for n in names}
    return TrainState(params, tree.pop("optimizer_steps")), tree


def read_values(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A checkpoint's state, tensors aside, and all values of its adapter, after checking every file.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    verify_checkpoint(folder)
    with safe_open(folder / "parameters.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith("value/")]  # noqa: SIM118
        values = {key.removeprefix("value/"): file.get_tensor(key) for key in keys}
    tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    untrained = tree.get("adapter", {}).get("untrained", {})
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        values |= {name: file.get_tensor(reference[TENSOR]) for name, reference in untrained.items()}
    return tree, values


def complete_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir() and not p.name.endswith(".partial"))


def has_checkpoints(root: Path) -> bool:
    """Whether there is any, damaged or not."""
    return bool(complete_checkpoints(root)) or any(root.glob(f"step-*{REPLACED}"))


def drop_after(root: Path, step: int) -> None:
    """Delete checkpoints of later steps: a run that goes on from ``step`` will not pass through them."""
    for path in root.glob(f"step-*{REPLACED}"):
        shutil.rmtree(path)
    for path in complete_checkpoints(root):
        if path.name > checkpoint_dir(root, step).name:
            _remove(path)


def prune(root: Path, *, keep: int, protect: set[str]) -> None:
    """Delete all but the newest ``keep`` checkpoints and those named in ``protect``, and what a killed run left half
    written or half deleted."""
    for path in complete_checkpoints(root)[:-keep]:
        if path.name not in protect:
            _remove(path)
    for path in root.glob("step-*.partial"):
        shutil.rmtree(path)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that a deletion cut short leaves nothing that looks complete."""
    shutil.rmtree(_renamed(folder, ".deleted.partial"))


def _restore(root: Path) -> None:
    """Give checkpoints their name back whose replacement was cut short. Every rank may do so, one will."""
    for path in root.glob(f"step-*{REPLACED}"):
        folder = path.with_name(path.name.removesuffix(REPLACED))
        if not folder.exists():
            with contextlib.suppress(OSError):
                path.rename(folder)


def _replace(folder: Path, partial: Path) -> Path | None:
    """Let ``partial`` be the checkpoint; where one of that name was, its new name, under which to delete it."""
    old = _renamed(folder, REPLACED) if folder.exists() else None
    try:
        partial.rename(folder)
    except OSError:
        if old is not None:
            old.rename(folder)
        raise
    return old


def _renamed(folder: Path, suffix: str) -> Path:
    other = folder.with_name(folder.name + suffix)
    shutil.rmtree(other, ignore_errors=True)
    return folder.rename(other)


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` with every tensor replaced by a reference, the tensors put into ``tensors`` by path."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.contiguous()
        return {TENSOR: path}
    if isinstance(value, dict):
        return {key: _without_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    return value


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    return value


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
