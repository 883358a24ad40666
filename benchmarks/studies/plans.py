"""Which arms a study has, on which pools, and what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.studies.arms import ARMS


@dataclass(frozen=True)
class Study:
    """What is run and compared with what.

    Attributes:
        arms: in the order of the queue and the tables.
        pools: in the order of the queue.
        baselines: ours has to beat the better of them.
        oracle: what can be had.
    """

    arms: tuple[str, ...]
    pools: tuple[str, ...]
    baselines: tuple[str, ...]
    oracle: str | None = None


_BY_QUERY = (
    *("uniform", "uniform+q", "query", "oracle+q", "ours", "random+q"),
    *("less", "less, in turn", "rds", "dsir", "rho"),
)

STUDIES: dict[str, Study] = {
    "query": Study(_BY_QUERY, ("mixed", "length", "noise", "clean"), ("uniform+q", "query"), "oracle+q"),
    "summaries": Study(_BY_QUERY, ("summaries",), ("uniform+q", "query"), "oracle+q"),
    "noise": Study(
        (
            *(
                "uniform",
                "oracle",
                "oracle, put right",
                "drop",
                "weigh",
                "soften",
                "correct",
                "drop late",
                "weigh late",
            ),
            *("drop by visits", "own stop"),
        ),
        ("flips",),
        ("uniform",),
        "oracle",
    ),
    "selectors": Study(
        ("uniform", "infobatch", *(name for name in ARMS if name.startswith("kept"))),
        ("clean", "rte"),
        ("kept: random",),
    ),
    "settings": Study(
        (
            "uniform",
            "uniform+q",
            "query",
            "ours",
            "quality",
            "quality, 0.7",
            "redundancy",
            "drop",
            "oracle",
            "oracle+q",
        ),
        (),
        ("uniform", "uniform+q"),
    ),
}
