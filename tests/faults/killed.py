"""``killed.py POINT N RANKS TRAIN-ARGUMENTS``: the train command; the given ranks die at that crossing of theirs."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.faults.killer import Killer
from tests.faults.points import POINTS
from tsqlora_scale.commands.train import main

if __name__ == "__main__":
    point, number, ranks, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") in ranks.split(","):
        Killer(POINTS, (point, int(number)), Path("/")).install()
    sys.exit(main(arguments))
