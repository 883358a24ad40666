"""Run configs as ``worker.py`` does, with losses and gradients that are not finite in some steps."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.distributed.worker import main
from tests.poison import poisoned

#: (step, place of the micro-batch): of one rank alone, and before, in and after the first pass and the first event.
LOSS = {(0, 2), (3, 0), (9, 5), (9, 4)}
GRADIENT = {(5, 1)}

if __name__ == "__main__":
    with poisoned(loss=LOSS, gradient=GRADIENT):
        sys.exit(main())
