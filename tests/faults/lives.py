"""``lives.py PLAN.json``: runs that are killed and resumed, each life a fork of one warm process.

PLAN holds ``config``, ``out`` and ``cases``: name -> kills, a list of ``[point, crossing]``. A case runs in
``out/NAME``, life after life, until it has been killed at each of its kills, and then to its end. It leaves what it has
drawn in ``draws.jsonl``, the points that its lives have crossed in ``crossings-LIFE.json``, and what it has said in
``said.txt``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

# imported now, once for all
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch

from tests.faults.killer import Killer, replace
from tests.faults.points import POINTS
from tsqlora_scale.commands import main as cli
from tsqlora_scale.quality.selectors.full import FullSelector

#: Cases at a time.
JOBS = 2


def live(config: str, folder: Path, life: int, target: tuple[str, int] | None) -> int:
    """One life, in a process of its own; the exit code."""
    output = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    killer = Killer(POINTS, target, folder)
    killer.install()
    draw = FullSelector.draw

    def noted(selector: FullSelector, step: int) -> Any:
        rows = draw(selector, step)
        line = {"life": life, "run": selector.config.run.name, "step": step, "indices": rows.tolist()}
        with (folder / "draws.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return rows

    replace(draw, noted)
    resume = ["--resume", "auto"] if life else []
    code = cli.main(["train", "--config", config, f"run.output_dir={folder}", *resume])
    (folder / f"crossings-{life}.json").write_text(json.dumps(killer.counts))
    return code


def start(config: str, folder: Path, life: int, target: tuple[str, int] | None) -> int:
    """Fork; the child's process id."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = live(config, folder, life, target)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    os._exit(code)


def main() -> int:
    """All cases; 1 when one did not live or die as planned."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    gc.freeze()  # or every collection in a child copies all that this process holds
    failed = 0
    waiting = [(name, 0) for name in plan["cases"]]
    running: dict[int, tuple[str, int]] = {}
    while waiting or running:
        while waiting and len(running) < JOBS:
            name, life = waiting.pop(0)
            kills = plan["cases"][name]
            target = tuple(kills[life]) if life < len(kills) else None
            running[start(plan["config"], Path(plan["out"]) / name, life, target)] = (name, life)
        child, status = os.wait()
        name, life = running.pop(child)
        kills = plan["cases"][name]
        wanted = -signal.SIGKILL if life < len(kills) else 0
        if os.waitstatus_to_exitcode(status) != wanted:
            print(f"{name}, life {life}: ended with {os.waitstatus_to_exitcode(status)}, not {wanted}")
            failed = 1
        elif life < len(kills):
            waiting.insert(0, (name, life + 1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
