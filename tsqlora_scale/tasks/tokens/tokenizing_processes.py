"""Rows made into tokens, here or in other processes; the same tokens in the same order either way."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objective_names import objective_class
from tsqlora_scale.tasks.tokens.token_store import Packed, packed

#: A block of rows on its way: its size before it.
_SIZE = struct.Struct("<Q")
_PROGRAM = "from tsqlora_scale.tasks.tokens.tokenizing_processes import serve; serve()"
Block = dict[str, Packed]
Answer = tuple[Block | None, Exception | None]


@dataclass(frozen=True)
class Tokenizing:
    """What makes tokens of rows. It can be pickled, and another process then makes the same.

    Attributes:
        limit: tokens of a row, at most.
    """

    cfg: TaskConfig
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    limit: int

    def started(self) -> Callable[[pa.Table], Block]:
        """What makes tokens of tables; it raises a UserError of a row that cannot be tokenized."""
        objective = objective_class(self.cfg)(self.cfg, self.tokenizer, self.model_config)
        vocabulary = max(self.tokenizer.get_vocab().values(), default=0) + 1
        return lambda table: packed(objective.tokens(table.to_pydict(), self.limit), vocabulary=vocabulary)


def tokenized(tables: Iterator[pa.Table], tokenizing: Tokenizing, workers: int) -> Iterator[Block]:
    """The tokens of tables, in their order; no more than two tables a worker are in memory at once.

    Args:
        workers: processes that tokenize; 1: this one.

    Raises:
        UserError: a row cannot be tokenized, or a process ends before its work does.
    """
    if workers == 1:
        yield from map(tokenizing.started(), tables)
        return
    processes = _Processes(tokenizing)
    waiting: deque[Future[Block]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenizing") as threads:
        try:
            for table in tables:
                waiting.append(threads.submit(processes.tokens, table))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            processes.end()


class _Processes:
    """A process for every thread that asks; they speak over pipes, so that no ``__main__`` is imported again."""

    def __init__(self, tokenizing: Tokenizing) -> None:
        try:
            self._start = pickle.dumps(tokenizing)
        except Exception as error:  # a tokenizer of somebody's own
            raise UserError(
                f"task.tokenize_workers: another process cannot have this tokenizer ({error}); set it to 1"
            ) from None
        self._own = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []
        self._ends = False

    def tokens(self, table: pa.Table) -> Block:
        """What the thread's process makes of a table."""
        process = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = self._started()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        block, error = self._ask(process, sink.getvalue())
        if error is not None:
            raise error
        assert block is not None, "an answer is a block or an error"
        return block

    def end(self) -> None:
        """End all of them, whatever they are at."""
        self._ends = True
        for process in self._all:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was on its way to a process that has ended
                    if pipe is not None:
                        pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[3])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._all.append(process)
        if self._ends:
            process.kill()
        _, error = self._ask(process, self._start)
        if error is not None:
            raise UserError(f"task.tokenize_workers: another process cannot have this tokenizer ({error}); set it to 1")
        return process

    def _ask(self, process: subprocess.Popen[bytes], data: Any) -> Answer:
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, data)
            answer = _receive(process.stdout)
        except OSError:
            answer = None
        if answer is None:
            raise UserError(
                f"task.tokenize_workers: a process that tokenizes has ended by itself (exit code {process.wait()}); "
                "is there too little memory? Set fewer"
            )
        found: Answer = pickle.loads(answer)
        return found


def serve() -> None:
    """A process that tokenizes: what it is to do comes first, then tables, until there are no more."""
    asks, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    make: Callable[[pa.Table], Block] | None = None
    while (data := _receive(asks)) is not None:
        answer: Answer = None, None
        try:
            if make is None:
                make = pickle.loads(data).started()
            else:
                answer = make(pa.ipc.open_stream(data).read_all()), None
        except UserError as error:
            answer = None, error
        except Exception as error:  # of a library's own, which another process may not be able to read
            answer = None, RuntimeError(f"{type(error).__name__}: {error}")
        _send(answers, pickle.dumps(answer))


def _send(pipe: IO[bytes], data: Any) -> None:
    pipe.write(_SIZE.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    """The next block; None at the end."""
    header = pipe.read(_SIZE.size)
    if len(header) < _SIZE.size:
        return None
    (size,) = _SIZE.unpack(header)
    data = pipe.read(size)
    return data if len(data) == size else None
