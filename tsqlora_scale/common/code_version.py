"""Which code has made a result."""

from __future__ import annotations

import hashlib
from pathlib import Path

#: The package's folder.
PACKAGE = Path(__file__).resolve().parents[1]


def source_digest(folder: Path = PACKAGE) -> str:
    """16 hexadecimal digits of the package's modules, their places and contents: a release has one, and so has every
    state in between, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


#: Of the code that this process runs: taken when it starts, as files may change under a run that takes hours.
SOURCE = source_digest()
#: In the place of a digest where a checkpoint of an earlier version has none.
UNKNOWN = "unknown"
