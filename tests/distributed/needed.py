"""``worker.py`` with logits of needed places alone, however little that saves: ``launch … needed.py CONFIG…``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.distributed import worker
from tsqlora_scale.tasks import needed_logits

if __name__ == "__main__":
    needed_logits.WORTH = 1
    sys.exit(worker.main())
