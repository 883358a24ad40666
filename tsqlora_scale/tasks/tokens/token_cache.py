"""Where tokens are kept: found by what they depend on, made once by whoever comes first, there whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.tokens.recipe import recipe, text_blocks, text_bytes, text_digest
from tsqlora_scale.tasks.tokens.token_store import DamagedStore, StoreWriter, TokenStore
from tsqlora_scale.tasks.tokens.tokenizing_processes import Tokenizing, tokenized

log = logging.getLogger("tsqlora_scale")

#: The folder in the cache of ``datasets``.
FOLDER = "tsqlora_tokens"
#: Bytes of text for which one more process is started unasked, and the most of such processes.
PER_WORKER, MOST_WORKERS = 2**25, 8
#: Seconds between two looks at what another process is at.
_WAIT = 0.1
#: Told how many rows of how many are done.
Report = Callable[[int, int], None]


class NoPlace(UserError):
    """Tokens cannot be written where they should be."""


def cache_root(setting: str) -> Path:
    """The folder of ``task.token_cache``, of ``auto`` the one beside the Arrow files of ``datasets``."""
    return Path(datasets.config.HF_DATASETS_CACHE) / FOLDER if setting == "auto" else Path(setting)


@dataclass(frozen=True)
class TokenCache:
    """A folder of stores.

    Several processes, of one run or of several, may use it at once. The one that takes a store's lock makes it, in a
    folder of its own, which it renames; the others wait. Where a file system has no locks each makes its own, and the
    first stays.

    Attributes:
        root: the folder; it is made where it is not there.
        workers: processes that tokenize; None: by how much text there is, and how many cores.
        setting: of ``task.token_cache``, for messages.
    """

    root: Path
    workers: int | None
    setting: str

    def store(
        self, view: datasets.Dataset, columns: list[str], tokenizing: Tokenizing, report: Report | None = None
    ) -> TokenStore:
        """The tokens of all rows of ``view``, found or made.

        Args:
            columns: of the texts.
            report: told of the progress where they are made.

        Raises:
            NoPlace: they cannot be written.
            UserError: a row cannot be tokenized.
        """
        made_by = recipe(tokenizing.cfg, tokenizing.tokenizer, tokenizing.model_config, tokenizing.limit)
        key = hashlib.sha256(f"{made_by} {text_digest(view, columns)}".encode()).hexdigest()[:32]
        folder = self.root / key
        try:
            found = self._found(folder, len(view), says=False)
            if found is not None:
                return found
            self.root.mkdir(parents=True, exist_ok=True)
            with self._alone(key):
                found = self._found(folder, len(view), says=True)
                return found or self._made(folder, view, columns, tokenizing, report)
        except OSError as error:
            raise NoPlace(
                f"task.token_cache={shown(self.setting)}: the tokens of {len(view)} rows cannot be written to "
                f"{str(self.root)!r} ({error.strerror or error}); make room, name another folder, or set it to off"
            ) from None

    def _found(self, folder: Path, rows: int, *, says: bool) -> TokenStore | None:
        if not folder.is_dir():
            return None
        try:
            return TokenStore(folder, rows=rows)
        except DamagedStore as error:
            if says:
                log.warning("the tokens in %s are damaged (%s) and are made anew", folder, error)
            return None

    def _made(
        self, folder: Path, view: datasets.Dataset, columns: list[str], tokenizing: Tokenizing, report: Report | None
    ) -> TokenStore:
        partial = folder.with_name(f".{folder.name}.{_here()}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        writer = StoreWriter(partial)
        try:
            done = 0
            for block in tokenized(text_blocks(view, columns), tokenizing, self._workers(view, columns)):
                writer.write(block)
                done += len(next(iter(block.values())).lengths)
                if report is not None:
                    report(done, len(view))
            writer.close({"limit": tokenizing.limit, "columns of text": columns})
            _put(partial, folder)
        finally:
            with contextlib.suppress(OSError):
                writer.abandon()
            shutil.rmtree(partial, ignore_errors=True)
        return TokenStore(folder, rows=len(view))

    def _workers(self, view: datasets.Dataset, columns: list[str]) -> int:
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(cores, MOST_WORKERS, text_bytes(view, columns) // PER_WORKER))

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Inside, no other process makes or looks at the store; where the file system has no locks some may."""
        path = self.root / f".{key}.lock"
        with path.open("ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # in small steps, so that signals are heard
                    time.sleep(_WAIT)
                    continue
                except OSError:  # no locks here
                    yield
                    return
                break
            for left in self.root.glob(f".{key}.{_here()}.*.partial"):  # of one that was killed
                shutil.rmtree(left, ignore_errors=True)
            yield


def _here() -> str:
    """This machine's name: another's processes may be at work on the same disk."""
    return platform.node().replace("*", "")


def _put(partial: Path, folder: Path) -> None:
    """Give a finished folder its name; what is there already goes."""
    aside = partial.with_suffix(".old")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise  # else another process was as fast, and has the same
    finally:
        shutil.rmtree(aside, ignore_errors=True)
