#!/usr/bin/env python3
"""See tsqlora_scale.cli.train; ``python launch/train.py --help``."""

import sys

from tsqlora_scale.cli import train

if __name__ == "__main__":
    sys.exit(train())
