"""What is compared: every arm is a change of the config and, where it needs one, a file made from the pool.

An arm sees of a pool's folder (see pools.py) what it could see in life; ``oracle`` arms and sizes that are given to
other selectors see the truth, too, and say so. What is known of wrong labels comes from ``audit.csv`` in that folder: a
table with columns ``sample_id`` (or ``id``), ``probability_wrong`` (or as the package's audits have it) and
``suggested_label``, all rows or the suspects alone; ``audit_seconds.txt`` beside it says what it cost.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.pools import read_rows, write_rows

LATE = Path(__file__).with_name("late_weights.py")
VISITED = Path(__file__).with_name("visited_losses.py")
#: Steps before late weights count, share of a pool that is held out with its noisy labels, and a row's least weight.
LATE_FROM, HELD_OUT, LEAST = 50, 0.2, 0.01
#: Columns of an audit, of which one is there: ours, of a fix list, of the package's table.
PROBABILITIES = ("probability_wrong", "probability", "audit_probability")
#: The part of a pool that every selector of the table of selectors keeps.
KEPT = 0.3
#: As the papers have it: the best of the pool, whatever their labels are.
ALL_TOGETHER = "sampling.stratify=false"
#: Selectors of others that choose by the query.
_OF_A_QUERY = ("less", "rds", "dsir", "rho")


class Unavailable(Exception):
    """An arm cannot be run on this pool, and why."""


@dataclass(frozen=True)
class Site:
    """Where an arm is prepared.

    Attributes:
        pool: the folder of pools.py.
        work: a folder for the files of this arm alone.
        meta: ``meta.json`` of the pool.
        size: rows that our choice has kept on this pool and seed, where an arm asks for it.
    """

    pool: Path
    work: Path
    meta: dict[str, Any]
    seed: int
    size: int | None = None

    def write_ids(self, ids: list[str]) -> list[str]:
        """Overrides that leave ids out."""
        if not ids:
            return []
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / "left_out.txt"
        path.write_text("\n".join(ids) + "\n", encoding="utf-8")
        return [f"task.dataset.exclude={path}"]

    def write_pool(self, rows: list[dict[str, Any]]) -> list[str]:
        """Overrides that train on other rows."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_rows(self.work / "train.jsonl", rows)
        return train_on(self.work / "train.jsonl")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The pool."""
        return read_rows(self.pool / "train.jsonl")

    @property
    def truth(self) -> list[dict[str, Any]]:
        """What nobody knows in life."""
        return read_rows(self.pool / "truth.jsonl")


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        prepare: the overrides of a run.
        is_selected: whether a selector of the package chooses, whose scores are judged.
        needs: ``query``, ``wrong`` (labels), ``audit``: what the pool must have.
        judged_by: the held-out set that chooses a run's step: ``tune``, or a part of the pool's own rows.
        is_baseline: trained longer, so that its equal in wall time can be seen.
        sized_by: an arm whose choice's size it needs.
    """

    prepare: Callable[[Site], list[str]]
    is_selected: bool = False
    needs: tuple[str, ...] = ()
    judged_by: str = "tune"
    is_baseline: bool = False
    sized_by: str | None = None


def train_on(*paths: Path) -> list[str]:
    """Overrides that name the files of the pool."""
    return [f"task.dataset.train_file=[{','.join(str(path) for path in paths)}]"]


def even(site: Site) -> list[str]:
    """The pool, evenly."""
    return train_on(site.pool / "train.jsonl")


def with_query(site: Site) -> list[str]:
    """The pool and the query's rows, evenly."""
    return train_on(site.pool / "train.jsonl", site.pool / "query.jsonl")


def query_alone(site: Site) -> list[str]:
    """The query's rows, evenly."""
    return train_on(site.pool / "query.jsonl")


def oracle_with_query(site: Site) -> list[str]:
    """The rows on target, and the query's."""
    return [*with_query(site), *site.write_ids([row["id"] for row in site.truth if not row["on_target"]])]


def random_with_query(site: Site) -> list[str]:
    """As many rows as our choice keeps, at random, and the query's."""
    if site.size is None:
        raise Unavailable("the size of our choice is not known")
    ids = [row["id"] for row in site.rows]
    order = np.random.default_rng([site.seed, *b"random rows"]).permutation(len(ids)).tolist()
    return [*with_query(site), *site.write_ids([ids[i] for i in order[site.size :]])]


def chosen_by(selector: str, *overrides: str, share: str = "true") -> Callable[[Site], list[str]]:
    """A selector of the package that looks at the query, whose rows are trained on, too.

    Args:
        share: of the pool that it keeps: ``auto``, as it finds out, or ``true``, as nobody knows in life.
    """

    def prepare(site: Site) -> list[str]:
        keep = "auto" if share == "auto" else f"{site.meta['on_target'] / site.meta['rows']:.6g}"
        query = [f"task.query={site.pool / 'query.jsonl'}", "task.train_on_query=true"]
        chosen = [f"sampling.selector={selector}", f"sampling.keep_fraction={keep}"]
        return [*train_on(site.pool / "train.jsonl"), *query, *chosen, *overrides]

    return prepare


def kept_by(selector: str, *overrides: str, query: bool = False) -> Callable[[Site], list[str]]:
    """A selector of the package at the one size of the table of selectors; no row of the query is trained on."""

    def prepare(site: Site) -> list[str]:
        target = [f"task.query={site.pool / 'query.jsonl'}", "task.train_on_query=false"] if query else []
        chosen = [f"sampling.selector={selector}", f"sampling.keep_fraction={KEPT}"]
        return [*even(site), *target, *chosen, *overrides]

    return prepare


def by_quality(*overrides: str) -> Callable[[Site], list[str]]:
    """Eq. 1 and 2 as they are by default."""
    return lambda site: [*even(site), "sampling.selector=quality", *overrides]


def without_wrong(site: Site) -> list[str]:
    """Wrong labels left out."""
    return [*even(site), *site.write_ids([row["id"] for row in site.truth if row["wrong"]])]


def put_right(site: Site) -> list[str]:
    """Wrong labels put right."""
    wrong = {row["id"] for row in site.truth if row["wrong"]}
    return site.write_pool([{**row, "label": 1 - row["label"]} if row["id"] in wrong else row for row in site.rows])


@dataclass(frozen=True)
class Suspicion:
    """What an audit says of a row."""

    probability: float = 0.0
    suggested: int | None = None
    agreed: bool = True


def read_audit(pool: Path) -> dict[str, Suspicion]:
    """By the id of a row.

    Raises:
        Unavailable: there is no audit of this pool.
    """
    path = pool / "audit.csv"
    if not path.exists():
        raise Unavailable(f"{path} is not there")
    found = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            probability = next((line[key] for key in PROBABILITIES if key in line), None)
            if probability is None:
                raise Unavailable(f"{path} has none of the columns {', '.join(PROBABILITIES)}")
            suggested = line.get("suggested_label") or line.get("audit_suggested")
            agreed = line.get("agree", "true").lower() not in ("false", "0", "")
            suspicion = Suspicion(float(probability), int(float(suggested)) if suggested else None, agreed)
            found[line.get("sample_id") or line["id"]] = suspicion
    return found


def suspects_dropped(site: Site) -> list[str]:
    """Rows that are rather wrong than right, left out."""
    return [*even(site), *site.write_ids([name for name, s in read_audit(site.pool).items() if s.probability > 0.5])]


def suspects_weighed(site: Site) -> list[str]:
    """Drawn in proportion to the probability of being right."""
    audit = read_audit(site.pool)
    rows = [{**row, "weight": max(1 - audit.get(row["id"], Suspicion()).probability, LEAST)} for row in site.rows]
    return [*site.write_pool(rows), "task.dataset.weight=weight"]


def suspects_corrected(site: Site) -> list[str]:
    """Rows that are rather wrong than right get the suggested label, where the folds agree on it."""
    audit = read_audit(site.pool)
    rows = []
    for row in site.rows:
        found = audit.get(row["id"], Suspicion())
        is_changed = found.probability > 0.5 and found.suggested is not None and found.agreed
        rows.append({**row, "label": found.suggested if is_changed else row["label"]})
    return site.write_pool(rows)


def labels_softened(site: Site) -> list[str]:
    """Each row once with its label and once with the other of two, in proportion to the probability of either: the
    loss is in expectation that of soft labels."""
    audit = read_audit(site.pool)
    rows = []
    for row in site.rows:
        wrong = min(max(audit.get(row["id"], Suspicion()).probability, LEAST), 1 - LEAST)
        rows.append({**row, "weight": 1 - wrong})
        rows.append({**row, "id": f"{row['id']}-other", "label": 1 - row["label"], "weight": wrong})
    return [*site.write_pool(rows), "task.dataset.weight=weight"]


def suspects_dropped_late(site: Site) -> list[str]:
    """Rows that are rather wrong than right are left out after some steps on all."""
    suspects = {name for name, found in read_audit(site.pool).items() if found.probability > 0.5}
    rows = [{**row, "weight": 1e-9 if row["id"] in suspects else 1.0} for row in site.rows]
    return [*site.write_pool(rows), *_late()]


def suspects_weighed_late(site: Site) -> list[str]:
    """Drawn in proportion to the probability of being right after some steps on all."""
    return [*suspects_weighed(site), *_late()]


def _late() -> list[str]:
    chosen = [f"sampling.selector={LATE}:LateWeights", f"scoring.warmup_steps={LATE_FROM}"]
    return ["task.dataset.weight=weight", *chosen]


def costly_dropped_late(site: Site) -> list[str]:
    """Rows whose loss was large at their visits are left out after some steps on all: no audit, no pass."""
    return [*even(site), f"sampling.selector={VISITED}:SmallLosses", f"scoring.warmup_steps={LATE_FROM}"]


def stopped_by_own_rows(site: Site) -> list[str]:
    """A fifth of the pool, with its labels as they are, is held out: the step at which its loss is least."""
    rows = site.rows
    order = np.random.default_rng([site.seed, *b"held out"]).permutation(len(rows)).tolist()
    held_out = set(order[: round(HELD_OUT * len(rows))])
    overrides = site.write_pool([row for i, row in enumerate(rows) if i not in held_out])
    write_rows(site.work / "own.jsonl", [row for i, row in enumerate(rows) if i in held_out])
    return [*overrides, f"task.dataset.dev_file.own={site.work / 'own.jsonl'}"]


ARMS: dict[str, Arm] = {
    "uniform": Arm(even, is_baseline=True),
    "uniform+q": Arm(with_query, needs=("query",), is_baseline=True),
    "query": Arm(query_alone, needs=("query",), is_baseline=True),
    "oracle+q": Arm(oracle_with_query, needs=("query",)),
    "ours": Arm(chosen_by("query", share="auto"), is_selected=True, needs=("query",)),
    "ours, soft": Arm(
        chosen_by("query", "sampling.keep_fraction=1.0", "sampling.soft=true", share="auto"),
        is_selected=True,
        needs=("query",),
    ),
    "ours, even": Arm(chosen_by("query", "sampling.soft=false", share="auto"), is_selected=True, needs=("query",)),
    "ours, true share": Arm(chosen_by("query"), is_selected=True, needs=("query",)),
    "random+q": Arm(random_with_query, needs=("query",), sized_by="ours"),
    **{name: Arm(chosen_by(name, ALL_TOGETHER), is_selected=True, needs=("query",)) for name in _OF_A_QUERY},
    "less, in turn": Arm(
        chosen_by("less", "sampling.less=round_robin", ALL_TOGETHER), is_selected=True, needs=("query",)
    ),
    "oracle": Arm(without_wrong, needs=("wrong",)),
    "oracle, put right": Arm(put_right, needs=("wrong",)),
    "drop": Arm(suspects_dropped, needs=("audit",)),
    "weigh": Arm(suspects_weighed, needs=("audit",)),
    "soften": Arm(labels_softened, needs=("audit",)),
    "correct": Arm(suspects_corrected, needs=("audit",)),
    "drop late": Arm(suspects_dropped_late, needs=("audit",)),
    "weigh late": Arm(suspects_weighed_late, needs=("audit",)),
    "drop by visits": Arm(costly_dropped_late),
    "own stop": Arm(stopped_by_own_rows, judged_by="own"),
    "quality": Arm(by_quality(), is_selected=True),
    "quality, 0.7": Arm(by_quality("sampling.keep_fraction=0.7"), is_selected=True),
    "redundancy": Arm(by_quality("sampling.redundancy=1"), is_selected=True),
    "kept: random": Arm(kept_by("random")),
    **{
        f"kept: {name}": Arm(kept_by(name, ALL_TOGETHER), is_selected=True)
        for name in ("grad_norm", "el2n", "k_center", "ts_dshapley", "instruction_mining")
    },
    **{f"kept: {name}": Arm(kept_by(name), is_selected=True) for name in ("quality", "rs2")},
    "kept: query": Arm(kept_by("query", query=True), is_selected=True, needs=("query",)),
    **{
        f"kept: {name}": Arm(kept_by(name, ALL_TOGETHER, query=True), is_selected=True, needs=("query",))
        for name in _OF_A_QUERY
    },
    "kept: paper": Arm(kept_by("quality", "scoring.preset=paper"), is_selected=True),
    **{
        f"kept: less, {form}": Arm(
            kept_by("less", f"sampling.less={key}", ALL_TOGETHER, query=True), is_selected=True, needs=("query",)
        )
        for form, key in (("max", "max"), ("in turn", "round_robin"), ("subspace", "subspace"))
    },
    **{
        f"kept: less, {form}": Arm(
            kept_by("less", f"sampling.less={key}", "sampling.less_gradients=adam", ALL_TOGETHER, query=True),
            is_selected=True,
            needs=("query",),
        )
        for form, key in (("as published", "mean"), ("as published, in turn", "round_robin"))
    },
    "kept: quality as weights": Arm(kept_by("quality", "sampling.use=weight"), is_selected=True),
    "infobatch": Arm(lambda site: [*even(site), "sampling.selector=infobatch"]),
    **{
        f"kept by class: {name}": Arm(kept_by(name, "sampling.stratify=true"), is_selected=True)
        for name in ("grad_norm", "el2n")
    },
    **{
        f"kept by class: {name}": Arm(
            kept_by(name, "sampling.stratify=true", query=True), is_selected=True, needs=("query",)
        )
        for name in ("less", "rho")
    },
    "kept by class: paper": Arm(kept_by("quality", "scoring.preset=paper", "sampling.stratify=true"), is_selected=True),
}


def lacks(arm: Arm, pool: Path) -> str | None:
    """What the pool does not have of what the arm needs."""
    meta = json.loads((pool / "meta.json").read_text(encoding="utf-8"))
    there = {"query": meta["query"] > 0, "wrong": meta["wrong"] > 0, "audit": (pool / "audit.csv").exists()}
    return next((need for need in arm.needs if not there[need]), None)
