"""The score store."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.quality.scores.score_table import ScoreTable, pool_fingerprint

COLUMNS = [
    "sample_id", "loss", "grad_norm", "delta_loss", "convergence", "quality", "probability", "selected",
    "scoring_pass",
]  # fmt: skip


def table(scoring_pass: int = 0) -> ScoreTable:
    generator = np.random.default_rng(scoring_pass)
    values = {name: generator.normal(size=4) for name in COLUMNS[1:6]}
    probability = np.array([0.1, 0.2, 0.3, 0.4])
    selected = np.array([True, False, True, True])
    return ScoreTable(
        **values, probability=probability, selected=selected, scoring_pass=np.full(4, scoring_pass, np.int64)
    )


def test_files_round_trip_one_per_pass_the_last_is_read(tmp_path):
    ids = ["a", "b", "ü", "d"]
    for scoring_pass in (0, 2, 1000):
        path = table(scoring_pass).write(tmp_path / "scores", ids)
        assert pq.read_schema(path).names == COLUMNS
    assert len(list((tmp_path / "scores").iterdir())) == 3, "no temporary file stays"
    found, found_ids = ScoreTable.read(tmp_path / "scores")
    assert found_ids == ids
    for name, column in table(1000).state_dict().items():
        np.testing.assert_array_equal(getattr(found, name), column.numpy())
        assert getattr(found, name).dtype == column.numpy().dtype
        getattr(found, name)[:] = 0  # writable


def test_numbers_over_the_subset():
    scores = table()
    inside = scores.quality[[0, 2, 3]]
    assert scores.mean_quality() == pytest.approx(np.mean(1 / (1 + np.exp(-inside))))
    weights = np.array([0.1, 0.3, 0.4]) / 0.8
    assert scores.effective_sample_size() == pytest.approx(1 / (weights**2).sum())
    scores.probability[:] = 0.25
    assert scores.effective_sample_size() == pytest.approx(3)


def test_mean_quality_of_hopeless_samples_is_a_number():
    scores = table()
    scores.quality[:] = [-1e4, 0, 1e4, 0]
    assert scores.mean_quality() == pytest.approx(0.5)


def test_a_folder_without_scores_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no score file"):
        ScoreTable.read(tmp_path)
    (tmp_path / "pass-000.parquet").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"pass-000\.parquet: not a score file"):
        ScoreTable.read(tmp_path)
    pq.write_table(pa.table({"sample_id": ["a"], "loss": [1.0]}), tmp_path / "pass-001.parquet")
    with pytest.raises(
        UserError, match=r"pass-001\.parquet: not a score file \(without grad_norm, .*scoring_pass\); score"
    ):
        ScoreTable.read(tmp_path)
    with pytest.raises(UserError, match=r"missing\.parquet"):
        ScoreTable.read(tmp_path / "missing.parquet")


def test_files_that_another_program_has_written(tmp_path):
    path = table().write(tmp_path, ["a", "b", "c", "d"])
    written = pq.read_table(path)
    other = written.select(COLUMNS[::-1]).append_column("note", pa.array(["x"] * 4))
    kinds = {pa.string(): pa.large_string(), pa.int64(): pa.int32()}
    other = other.cast(pa.schema([(f.name, kinds.get(f.type, f.type)) for f in other.schema]))
    pq.write_table(other, tmp_path / "other.parquet")
    found, ids = ScoreTable.read(tmp_path / "other.parquet")
    assert ids == ["a", "b", "c", "d"]
    for name, column in table().state_dict().items():
        np.testing.assert_array_equal(getattr(found, name), column.numpy())
        assert getattr(found, name).dtype == column.numpy().dtype
    for column, reason in ((["x"] * 4, "not a score file"), ([1, 2, None, 4], "scoring_pass has gaps")):
        pq.write_table(written.set_column(8, "scoring_pass", pa.array(column)), tmp_path / "bad.parquet")
        with pytest.raises(UserError, match=reason) as caught:
            ScoreTable.read(tmp_path / "bad.parquet")
        assert "\n" not in str(caught.value)


def test_fingerprints_tell_pools_apart():
    assert pool_fingerprint(["a", "b"]) == pool_fingerprint(("a", "b"))
    assert len({pool_fingerprint(ids) for ids in (["ab"], ["a", "b"], ["b", "a"], ["a"])}) == 4
