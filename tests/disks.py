"""A disk without room."""

from __future__ import annotations

import errno
import os
from typing import Any


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
