#!/usr/bin/env python3
"""See tsqlora_scale.commands.score; ``python launch/score.py --help``."""

import sys
from pathlib import Path

# This folder would come first on the path, and its evaluate.py before the library of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from tsqlora_scale.commands.score import main

if __name__ == "__main__":
    sys.exit(main())
