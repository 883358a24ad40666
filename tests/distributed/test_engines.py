"""The same run under every engine: equal losses, equal ranks, and the engine really is what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import ENGINES as ALL
from tests.distributed.launch import WORKER, launch
from tests.runs import losses_of, ranks_of, result_of, run_tree, write_config

# a test may have to make the runs of two engines first
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]

#: FSDP2 has runs of its own (test_fsdp), and one here.
ENGINES = {name: kind for name, kind in ALL.items() if not name.startswith("fsdp2")}
MODELS = ["deberta", "bart", "llama"]
#: dropout: its masks belong to the micro-batch, not to the rank
CASES = [*((kind, base) for kind in MODELS for base in ("fp32", "nf4")), ("bert", "dropout")]
#: Of a run: two after the second event.
STEPS = 10
#: Runs, but rounds differently: ZeRO-3 has a linear layer of its own.
BF16 = ("bert", "bf16")
#: The run of FSDP2: DeBERTa calls layers twice.
TWICE = ("deberta", "fp32")
#: One process has all models, ZeRO-3 most of them with two ranks and the others with three; other engines have one of
#: each kind of base and what is uneven there, FSDP2 one run.
COMMON = [("bart", "fp32"), ("llama", "fp32"), ("llama", "nf4"), ("bert", "dropout"), BF16]
FEWER = {
    "ddp-2": [TWICE, *COMMON], "zero2-2": COMMON[:4],
    "zero3-2": [TWICE, ("bart", "fp32"), ("llama", "fp32"), ("bert", "dropout"), BF16],
    "zero3-3": [("llama", "nf4")],
    "fsdp2-2": [TWICE],
}  # fmt: skip
PAIRS = [(engine, case) for engine in ENGINES for case in FEWER.get(engine, [*CASES, BF16])]


def named(part: object) -> str:
    """An engine's or a case's name."""
    return part if isinstance(part, str) else "-".join(part)  # type: ignore[arg-type]


class Finished(dict[str, dict[tuple[str, str], Path]]):
    """Run folders by engine and case. An engine's runs are made when they are first asked for, in one launch."""

    def __init__(self, factory: pytest.TempPathFactory, models: Path) -> None:
        super().__init__()
        self._factory, self._models = factory, models

    def __missing__(self, engine: str) -> dict[tuple[str, str], Path]:
        folder = self._factory.mktemp(engine)
        configs = []
        runs: dict[tuple[str, str], Path] = {}
        for kind, base in FEWER.get(engine, [*CASES, BF16]):
            name = f"{kind}-{base}"
            # a budget that does not grow: where one layer grows another one shrinks
            tree = run_tree(
                kind, folder, self._models, name, allocation={"phi_min": 0.9, "phi_max": 1.0},
                train={"max_steps": STEPS},
            )  # fmt: skip
            if base == "dropout":
                tree["adapter"]["dropout"] = 0.2
            else:
                tree["model"] |= {"quantization": "nf4"} if base == "nf4" else {"dtype": base}
            configs.append(str(write_config(folder / f"{name}.yaml", tree)))
            runs[kind, base] = folder / "runs" / name
        launch(engine, WORKER, configs, folder, timeout=1500)
        self[engine] = runs
        return runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Finished:
    return Finished(tmp_path_factory, models_dir)


@pytest.mark.parametrize(("engine", "case"), PAIRS, ids=named)
def test_engine_is_what_it_is_called(finished: Finished, engine: str, case: tuple[str, str]) -> None:
    processes, stage, distributed_type = ENGINES[engine]
    result = result_of(finished[engine][case])
    assert result["world_size"] == processes
    assert result["distributed_type"] == distributed_type
    assert result["engine"] == (f"zero{stage}" if stage else "plain" if processes == 1 else "ddp")
    sharded = result["frozen_parameters"]["sharded"]
    assert sharded == (result["frozen_parameters"]["all"] if stage == 3 else 0)
    assert len(result["peak_memory_bytes"]) == processes


@pytest.mark.parametrize(("engine", "case"), PAIRS, ids=named)
def test_a_rank_holds_its_share_of_the_base_in_its_type(finished: Finished, engine: str, case: tuple[str, str]) -> None:
    processes, stage, _ = ENGINES[engine]
    whole, held = (result_of(finished[e][case])["frozen_parameters"]["bytes"] for e in ("plain", engine))
    wanted = {"bf16": {"bfloat16"}, "nf4": {"uint8", "float32"}}.get(case[1], {"float32"})  # nf4: linear layers only
    assert set(held) == wanted
    for kind, size in whole.items():
        # a shard is rounded up to whole elements, and there are at most 60 parameters
        assert held[kind] == pytest.approx(size / (processes if stage == 3 else 1), abs=60 * 4)


@pytest.mark.parametrize(
    ("engine", "case"), [(e, case) for e, case in PAIRS if e != "plain" and case != BF16], ids=named
)
def test_same_trajectory(finished: Finished, engine: str, case: tuple[str, str]) -> None:
    reference, run = finished["plain"][case], finished[engine][case]
    expected = losses_of(reference)
    assert len(expected) == STEPS
    assert losses_of(run) == pytest.approx(expected, abs=1e-5)
    assert ranks_of(run) == ranks_of(reference)
    assert result_of(run)["metrics"] == pytest.approx(result_of(reference)["metrics"], abs=1e-6)


@pytest.mark.parametrize("engine", ["plain", "ddp-2", "zero3-2"])
def test_fsdp2_takes_the_same_way_as_others(finished: Finished, engine: str) -> None:
    """Each of them by itself, so that no two deviations add up."""
    reference, run = finished[engine][TWICE], finished["fsdp2-2"][TWICE]
    result = result_of(run)
    assert (result["engine"], result["world_size"]) == ("fsdp2", 2)
    frozen = result["frozen_parameters"]
    assert frozen["all"] - frozen["sharded"] == 2, "embeddings of positions"
    assert losses_of(run) == pytest.approx(losses_of(reference), abs=1e-5)
    assert ranks_of(run) == ranks_of(reference)
    assert result["metrics"] == pytest.approx(result_of(reference)["metrics"], abs=1e-6)


@pytest.mark.parametrize("case", [("bart", "fp32"), ("llama", "fp32"), ("bert", "dropout")], ids="-".join)
def test_zero_2_and_3_agree_to_the_bit(finished: Finished, case: tuple[str, str]) -> None:
    """See tsqlora_scale.engine.numerics; rounding that differs would part longer runs."""
    assert losses_of(finished["zero2-2"][case]) == losses_of(finished["zero3-2"][case])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_events_grow_and_shrink(finished: Finished, case: tuple[str, str]) -> None:
    """Otherwise equal trajectories would say little about resizing."""
    first, second = ranks_of(finished["plain"][case])
    start = dict.fromkeys(first, 4)
    for before, after in ((start, first), (first, second)):
        changes = {after[layer] - before[layer] for layer in after}
        assert min(changes) < 0 < max(changes)


@pytest.mark.parametrize("engine", ["plain", "ddp-2", "zero3-2"])
def test_bf16_runs(finished: Finished, engine: str) -> None:
    run = finished[engine][BF16]
    losses = losses_of(run)
    assert len(losses) == STEPS
    assert len(ranks_of(run)) == 2
    # until scores and ranks, which are decisions, amplify rounding
    assert losses[:3] == pytest.approx(losses_of(finished["plain"][BF16])[:3], abs=5e-3)
    assert losses[-1] < losses[0]
