"""How much of a file is held at once; no file makes reading it costly."""

from __future__ import annotations

#: Rows and characters of an Arrow table, about: they bound the memory of a conversion, not the size of a file.
CHUNK_ROWS = 10_000
CHUNK_CHARACTERS = 2**26
#: Bytes of a line of a csv or tsv file, and of json, where a line may be a whole array.
MOST_IN_A_LINE = 2**26
MOST_IN_JSON = 2**30
