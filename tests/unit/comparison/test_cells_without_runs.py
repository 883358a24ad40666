"""What a report says of cells that have no run to report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.comparison.fakes import FakeLaunch, accuracy_of, comparison, result_of
from tsqlora_scale.config.schema import Config


def test_a_task_whose_name_begins_anothers_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rate of the one can be chosen, as no metric is finite; a run of the other one has failed."""

    def results(config: Config) -> dict[str, Any] | None:
        if Path(config.run.output_dir).parent.name == "words":
            return result_of(config, float("nan"))
        return None if config.run.seed == 1 else result_of(config, accuracy_of(config))

    monkeypatch.setattr("tsqlora_scale.comparison.crew.LOOK", 0.01)
    found = comparison(
        tmp_path,
        tasks={"words": {}, "words-long": {}},
        arms={"lora": {"adapter.method": "lora"}},
        lrs=[1e-3, 2e-3],
        tuning={"seeds": [100]},
    )
    found.run(FakeLaunch(scratch=tmp_path / "scratch", results=results))
    report = found.report()
    assert list(report.failed) == ["lora on words-long, lr 0.002, seed 1"]
    assert "lora on words" in report.missing
