#!/usr/bin/env python3
"""See tsqlora_scale.commands.compare; ``python launch/compare.py --help``."""

import sys
from pathlib import Path

# The repository in the place of this folder, whose evaluate.py would hide the library of that name from others.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from tsqlora_scale.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
