"""Which code has made a result."""

from __future__ import annotations

from pathlib import Path

from tsqlora_scale.common.code_version import SOURCE, UNKNOWN, source_digest
from tsqlora_scale.report.record import RunRecord


def test_it_is_that_of_the_modules_and_their_places(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(text, encoding="utf-8")
        return source_digest(folder)

    found = [digest(a="x"), digest(a="x", b=""), digest(b="x"), digest(a="y"), digest(c__a="x"), digest(a="x")]
    assert len(set(found[:5])) == 5
    assert found[5] == found[0]
    assert len(source_digest()) == 16


def test_the_code_of_a_checkpoint_is_said_and_so_is_that_it_does_not_say(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, writes=False)
    assert record.state_dict() == {"seconds": {}, "code": [SOURCE]}
    record.load_state_dict({"seconds": {"load": 1.0}})
    assert record.state_dict() == {"seconds": {"load": 1.0}, "code": [UNKNOWN, SOURCE]}
