"""Bytes that a process sends, whatever library sends them."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path


def bytes_sent() -> int:
    """That this process has sent over its TCP connections (gloo's), acknowledged by now (Linux)."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not str(link.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                    total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
        except OSError:
            continue  # closed meanwhile
    return total
