#!/usr/bin/env python3
"""See tsqlora_scale.cli.evaluate; ``python launch/evaluate.py --help``."""

import sys

from tsqlora_scale.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
