"""Third-party noise, silenced."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Any


def prepare_environment() -> None:
    """Before the heavy libraries are imported: no messages that help nobody, no sums that depend on threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # the same products on any number of threads, at no cost
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    _grow_segments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level at import; a filter stays
    logging.getLogger("DeepSpeed").addFilter(_only_errors)


def _grow_segments() -> None:
    """Let a GPU's allocator grow its segments: scoring and training ask for other sizes, and what one has freed is else
    no use to the other. Whoever has set the variable decides."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is what releases before 2.9 know
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def quiet_libraries() -> Any:
    """Silence what libraries print while a model loads; errors still raise."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("DeepSpeed", "accelerate", "bitsandbytes", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers_logging.set_verbosity(verbosity)
