"""One writer per run folder: a lock that names its holder, and is free again however that one ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import WRITE_ERRORS
from tsqlora_scale.common.printing import shown
from tsqlora_scale.engine.collectives import World

log = logging.getLogger("tsqlora_scale")

#: The file in a run folder. ``flock`` holds it where the file system can; its contents say by whom.
LOCK = ".lock"
#: Seconds between two signs of life of a holder …
BEAT = 3.0
#: … and for how long one is waited for where ``flock`` cannot tell: it is missing, or may not reach the other machine.
WATCH = 10.0
#: What a file system without ``flock`` says.
MISSING = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
#: What ``flock`` says of a lock that another process has.
TAKEN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


class RunLock:
    """The right to write into run folders: a context manager, given back at its end.

    Args:
        folders: all that the run writes into.
        check: called on rank 0 once they are held: what was right before may not be so any more.
    """

    def __init__(self, folders: Sequence[Path], check: Callable[[], None]) -> None:
        self._folders = list(folders)
        self._check = check
        self._held: list[FolderLock] = []
        self._taken = False

    def take(self, world: World) -> None:
        """Take the locks on rank 0, once. A collective.

        Raises:
            UserError: on every rank, when another run writes into a folder, or it cannot be written.
        """
        if self._taken:
            return
        with world.together():
            if world.is_main:
                for folder in self._folders:
                    self._held.append(FolderLock(folder))
                self._check()
        self._taken = True

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._held:
            self._held.pop().release()


class FolderLock:
    """The lock of one folder, held from its making on.

    The kernel frees a ``flock`` when its process ends, of SIGKILL too. A file system without it, or one that keeps it
    to one machine, leaves the file's time: a holder renews it every :data:`BEAT` seconds, and one that has not for
    :data:`WATCH` seconds is gone.

    Args:
        what: is written there, for messages; in what is no run's folder another one is chosen by ``--out``.

    Raises:
        UserError: another process has it, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, what: str = "run") -> None:
        self._folder, self._what = folder, what
        self.path = folder / LOCK
        self._made: list[Path] = []
        self._end = threading.Event()
        try:
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            self._descriptor = self._open()
        except WRITE_ERRORS as error:
            self._unmake()
            raise UserError(
                f"{what} folder {str(folder)!r}: its lock {LOCK} cannot be written ({error}); make room, or choose "
                f"another {'run.output_dir' if what == 'run' else '--out'}"
            ) from None
        except UserError:
            self._unmake()
            raise
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back; one that is empty, and was not there before, goes."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_ours():  # unlinked while it is held: whoever waits for it sees that it has no name
                self.path.unlink()
        os.close(self._descriptor)
        self._unmake()

    def _open(self) -> int:
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # its holder has just removed an empty folder
                continue
            try:
                enforced = self._flock(descriptor)
                if os.path.samestat(os.fstat(descriptor), self.path.stat()):  # or its holder has just removed it
                    self._take_over(descriptor, enforced)
                    return descriptor
            except FileNotFoundError:
                pass
            except OSError:
                self.path.unlink(missing_ok=True)  # we hold it, and cannot say so
                os.close(descriptor)
                raise
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _flock(self, descriptor: int) -> bool:
        """Lock the file; whether the file system can.

        Raises:
            UserError: another process has the lock.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise self._refusal(self._holder(patience=1.0)) from None
            if error.errno in MISSING:
                return False
            raise
        return True

    def _take_over(self, descriptor: int, enforced: bool) -> None:
        """Write our name into the file, unless whoever left one there is alive after all.

        Raises:
            UserError: it is.
        """
        holder = self._holder()
        if holder and (not enforced or holder.get("host") != platform.node()):
            log.warning(
                "%s was left by %s; waiting for %g s whether it shows a sign of life", self.path, _named(holder), WATCH
            )
            if self._shows_life():
                raise self._refusal(holder)
        mine = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
        os.fsync(descriptor)
        if not enforced:  # of two that take it at once the later one stays
            time.sleep(BEAT)
            if self._holder() != mine:
                raise self._refusal(self._holder())

    def _shows_life(self) -> bool:
        before = self._time()
        end = time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(WATCH / 20)
            if self._time() != before:
                return True
        return False

    def _time(self) -> int:
        """When the file was renewed last; opened for it, because network file systems remember old answers."""
        with self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _holder(self, patience: float = 0.0) -> dict[str, Any]:
        """What the file says of its holder; empty where it says nothing, after so many seconds."""
        end = time.monotonic() + patience
        while True:
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found = None
            if isinstance(found, dict) and found:
                return found
            if time.monotonic() >= end:
                return {}
            time.sleep(0.05)

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"{self._what} folder {str(self._folder)!r} is being written by another {self._what} ({_named(holder)}); "
            f"wait for it or end it, or choose another {'run.name' if self._what == 'run' else '--out'}; if its "
            f"machine is gone and this stays, remove {str(self.path)!r}"
        )

    def _is_ours(self) -> bool:
        return os.path.samestat(os.fstat(self._descriptor), self.path.stat())

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def _unmake(self) -> None:
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                return


def _named(holder: dict[str, Any]) -> str:
    """``host a, pid 5, since …``."""
    host, pid, since = (shown(holder[key]) if key in holder else "unknown" for key in ("host", "pid", "since"))
    return f"host {host}, pid {pid}, since {since}"
