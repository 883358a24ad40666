"""Third-party noise, silenced."""

from __future__ import annotations

import contextlib
from typing import Any


@contextlib.contextmanager
def quiet_libraries() -> Any:
    """Silence what libraries print while a model loads; errors still raise."""
    import logging
    import warnings

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
