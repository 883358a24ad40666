"""What has become of a run: its result, or why it has none."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import written_whole
from tsqlora_scale.common.printing import printable, shortened
from tsqlora_scale.comparison.comparison_file import LENGTHS
from tsqlora_scale.comparison.trials import Trial, TrialPlan, same_config
from tsqlora_scale.config.load import load_config
from tsqlora_scale.run.checkpoint import has_checkpoints

#: Lines at the end of a log in which its reason is looked for, and characters of it.
LAST_LINES, REASON = 200, 300


@dataclass(frozen=True)
class Outcome:
    """A run as far as it has come.

    Attributes:
        result: ``result.json`` of a finished run.
        failure: why the last try has failed, if it has.
    """

    trial: Trial
    result: dict[str, Any] | None
    failure: str | None = None

    def value(self, metric: str) -> float:
        """Of a finished run."""
        assert self.result is not None
        return float(self.result["metrics"][metric])


def outcome_of(trials: TrialPlan, trial: Trial) -> Outcome:
    """What is there of a run.

    Raises:
        UserError: a finished run is there that another config has made, or one that would go on, or has, with another
            length than it began with; or its files cannot be read.
    """
    folder = trials.folder(trial)
    result, written = read_result(folder), folder / "config.yaml"
    remedy = "remove that folder to run it again, or give another --out"
    if result is None:
        if written.is_file() and has_checkpoints(folder / "checkpoints"):  # it goes on from there
            longer = same_config(trials.config(trial), load_config(written), keys=LENGTHS)
            if longer is not None:
                raise UserError(f"{folder}: was begun with {longer}; {remedy}")
        return Outcome(trial, None, _noted(trials.log(trial)))
    differs = same_config(trials.config(trial), load_config(written))
    if differs is not None:
        raise UserError(f"{folder}: was run with {differs}; {remedy}")
    if result.get("lengths"):  # its learning rates and events are those of no run that was so long from the start
        before = result["lengths"][0]["before"]
        raise UserError(f"{folder}: was begun with {before} steps and then made longer or shorter; {remedy}")
    return Outcome(trial, result)


def read_result(folder: Path) -> dict[str, Any] | None:
    """``result.json`` of a run folder; None where it has none.

    Raises:
        UserError: it is no JSON.
    """
    path = folder / "result.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and the run goes on") from None
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict):
        raise UserError(f"{path}: is no result of a run; remove it, and the run goes on")
    return found


def note_failure(log: Path, code: int) -> str:
    """Write down why a run has failed, beside its log; the reason, in one line."""
    reason = _reason(log) or f"ended with code {code}"
    if code < 0:
        reason = f"killed by signal {-code}" + (f" ({reason})" if not reason.startswith("ended") else "")
    with written_whole(_note(log)) as partial:
        partial.write_text(reason + "\n", encoding="utf-8")
    return reason


def forget_failure(log: Path) -> None:
    """A run has been started again, or is finished."""
    _note(log).unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what a finished run, and those before it, keep for going on: checkpoints."""
    for before in ("", "-pretrain", "-proxy"):
        shutil.rmtree(folder.with_name(folder.name + before) / "checkpoints", ignore_errors=True)


def _note(log: Path) -> Path:
    return log.with_suffix(".failed")


def _noted(log: Path) -> str | None:
    try:
        return _note(log).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _reason(log: Path) -> str:
    """The last line that says what is wrong: an error of ours, or the end of a traceback."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        return ""
    ours = [line for line in lines if line.startswith("error: ")]
    traced = [line for line in lines if line[:1].isalpha() and "Error" in line.partition(":")[0]]
    for found in (ours, traced, [line for line in lines if line.strip()]):
        if found:
            return shortened(printable(found[-1].strip().removeprefix("error: ")), REASON)
    return ""
