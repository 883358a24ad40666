"""Folds keep copies together and labels even."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora_scale.audit.fold_plan import plan_folds
from tsqlora_scale.common.copies import copy_groups, same_texts, text_groups


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=20),
    labels=st.lists(st.integers(0, 2), min_size=30, max_size=30),
    folds=st.integers(2, 6),
)
def test_groups_stay_together(pairs: list[tuple[int, int]], labels: list[int], folds: int) -> None:
    groups = copy_groups(np.array(pairs, dtype=np.int64).reshape(-1, 2), 30)
    linked = {i: {i} for i in range(30)}  # the slow way: sets that are joined until nothing changes
    for one, other in pairs:
        joined = linked[one] | linked[other]
        for member in joined:
            linked[member] = joined
    assert groups.tolist() == [min(linked[i]) for i in range(30)]
    found = plan_folds(groups, np.array(labels), folds, seed=1)
    for group in set(groups.tolist()):
        members = found[groups == group]
        assert len(set(members)) == 1 or len(members) > -(-30 // folds)
    assert len(set(found.tolist())) == folds
    assert (found == plan_folds(groups, np.array(labels), folds, seed=1)).all()


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=60), folds=st.integers(2, 7), seed=st.integers(0, 9))
def test_labels_are_even(labels: list[int], folds: int, seed: int) -> None:
    strata = np.array(labels)
    found = plan_folds(np.arange(len(labels)), strata, folds, seed=seed)
    for label in set(labels):
        counts = np.bincount(found[strata == label], minlength=folds)
        assert counts.max() - counts.min() <= 1
    counts = np.bincount(found, minlength=folds)
    assert counts.max() - counts.min() <= len(set(labels))
    if len(labels) >= folds:
        assert counts.min() >= 1 or len(set(labels)) > 1


def test_one_text_that_most_rows_have_is_in_all_folds() -> None:
    groups = np.where(np.arange(30) < 27, 0, np.arange(30))
    counts = np.bincount(plan_folds(groups, None, 3, seed=0), minlength=3)
    assert counts.tolist() == [10, 10, 10]


def test_copies_of_a_large_group_stay_together() -> None:
    """Of a chain of nearly the same the copies to the letter must not vouch for one another."""
    copies = np.where(np.arange(30) < 20, np.arange(30) // 2 * 2, np.arange(30))
    groups = np.where(np.arange(30) < 25, 0, np.arange(30))
    found = plan_folds(groups, None, 3, seed=0, copies=copies)
    assert (found[0:20:2] == found[1:20:2]).all()
    assert np.bincount(found).tolist() == [10, 10, 10]
    many = np.where(np.arange(30) < 25, 0, np.arange(30))  # 25 of one text
    assert np.bincount(plan_folds(groups, None, 3, seed=0, copies=many)).tolist() == [10, 10, 10]


def test_texts_that_are_the_same() -> None:
    texts = ["A film.", "other", "a  film.", "A FILM.\n", "\ud800 lone", "Other!"]
    assert same_texts(texts).tolist() == [[0, 2], [0, 3]]
    assert same_texts([]).shape == (0, 2)
    groups = text_groups([[text] for text in texts])
    assert [groups.tolist().index(group) for group in groups] == [0, 1, 0, 0, 4, 5]
    pairs = text_groups([["a", "b"], ["a b", ""], ["A", " b"]])
    assert pairs[0] == pairs[2] != pairs[1]
    assert text_groups([]).shape == (0,)
    exact = text_groups([["a", "b"], ["A", "b"], ["a", "b"], ["a", "b "], ["ab", ""]], exact=True)
    assert exact[0] == exact[2]
    assert len(set(exact.tolist())) == 4
