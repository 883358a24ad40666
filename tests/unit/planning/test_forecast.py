"""Engines' shares, what is proposed, phases of a run, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import run_tree, write_config
from tsqlora_scale.commands.main import main
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.planning.data_sizes import DataSizes
from tsqlora_scale.planning.engine_memory import (
    ENGINES,
    GIB,
    EngineMemory,
    SharedState,
    engine_memory,
    engines_for,
)
from tsqlora_scale.planning.exchange import received_bytes
from tsqlora_scale.planning.forecast import Forecast, forecast, micro_batch_sizes
from tsqlora_scale.planning.forecast_tables import print_forecast, proposal_told, remedies_told
from tsqlora_scale.planning.held_bytes import WHOLE, FrozenWeight, HeldWeights
from tsqlora_scale.planning.phantom_passes import PassNeeds
from tsqlora_scale.planning.remedies import find_remedies
from tsqlora_scale.planning.run_times import scored_samples
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.plan import plan_run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tree(tmp_path: Path, models_dir: Path) -> dict[str, Any]:
    return run_tree(
        "bert", tmp_path, models_dir, "run", train={"eval_every": 5, "batch_size": 16, "micro_batch_size": 2}
    )


def weights_of(sizes: list[int], trained: list[int]) -> HeldWeights:
    return HeldWeights([FrozenWeight(size, 2) for size in sizes], trained, max(sizes, default=0))


@given(
    st.lists(st.integers(1, 3 * WHOLE), min_size=1, max_size=8),
    st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    st.integers(2, 9),
)
def test_a_rank_of_zero3_holds_its_part_of_every_parameter(sizes: list[int], trained: list[int], ranks: int) -> None:
    """Against parts that are dealt element by element; the largest is what a plan says."""
    dealt = [0] * ranks
    for size in sizes:
        parts = [len(range(rank, size, ranks)) for rank in range(ranks)] if size > WHOLE else [size] * ranks
        dealt = [held + 2 * part for held, part in zip(dealt, parts, strict=True)]
    state = ENGINES["zero3"](weights_of(sizes, trained), ranks)
    assert state.base == max(dealt)
    assert state.moments == 8 * sum(max(len(range(rank, size, ranks)) for rank in range(ranks)) for size in trained)
    assert state.gathered + state.ahead <= 2 * 2 * sum(sizes) + 4 * sum(trained)


@given(st.lists(st.integers(1, 10**6), min_size=1), st.lists(st.integers(1, 10**6), min_size=1), st.integers(2, 64))
def test_sharing_more_never_takes_more(sizes: list[int], trained: list[int], ranks: int) -> None:
    weights = weights_of(sizes, trained)
    ddp, zero2, zero3 = (ENGINES[name](weights, ranks) for name in ("ddp", "zero2", "zero3"))
    slack = 8 * len(trained)
    assert zero3.base <= zero2.base == ddp.base
    assert zero3.moments - slack <= zero2.moments <= ddp.moments + slack
    one = ENGINES["plain"](weights, 1)
    assert one == SharedState(weights.base, 4 * sum(trained), 4 * sum(trained), 8 * sum(trained))


def test_engines_go_with_devices_and_config(tree: dict[str, Any]) -> None:
    assert engines_for(parse_config(tree), 1) == ["plain"]
    assert engines_for(parse_config(tree), 4) == ["ddp", "zero2", "fsdp2", "zero3"]
    packed = tree | {"model": tree["model"] | {"quantization": "nf4"}}
    assert engines_for(parse_config(packed), 4) == ["ddp", "zero2", "zero3"]
    assert "fsdp2" in engines_for(parse_config(packed | {"model": packed["model"] | {"quant_storage": "fp32"}}), 4)
    looks = {"allocation": {"policy": "fixed"}, "adapter": {"method": "lora", "init": "eva"}}
    assert engines_for(parse_config(tree | looks), 4) == ["ddp", "zero2"]


def test_micro_batches_hold_whole_groups(tree: dict[str, Any]) -> None:
    tree["train"] |= {"batch_size": 12, "micro_batch_size": 6}
    config = parse_config(tree | {"sensitivity": {"window": 3, "group_size": 3}})
    assert micro_batch_sizes(config, plan_run(config, 48, 1)) == [6, 3]
    config = parse_config(tree | {"sensitivity": {"window": 3, "group_size": "auto"}})
    assert micro_batch_sizes(config, plan_run(config, 48, 1)) == [6, 4, 3, 2, 1]


@given(st.integers(1, 400), st.integers(300, 600), st.integers(2, 9))
def test_fsdp2_shares_by_rows(rows: int, columns: int, ranks: int) -> None:
    """As torch cuts a tensor: the first rank has most."""
    weight = FrozenWeight(rows * columns, 4, rows=rows)
    expected = 4 * len(torch.empty(rows, columns, device="meta").chunk(ranks)[0]) * columns
    assert weight.held_rows(ranks) == (expected if rows * columns >= WHOLE else weight.whole)
    assert FrozenWeight(rows * columns, 4, rows=rows, alone=False).held_rows(ranks) == weight.whole


def test_phases_are_sums_of_parts(tree: dict[str, Any]) -> None:
    """Computed by hand: parts that lie beside one another, and the worst of what follows one another."""
    config = parse_config(tree)
    weights = HeldWeights([FrozenWeight(10**6, 1, scales=7, unpacked=11)], [100], 50)
    passes = {"step": PassNeeds(1000, 100, 10), "scoring": PassNeeds(passing=5000), "evaluation": PassNeeds()}
    found = engine_memory(
        "plain", config, weights, devices=1, micro_batch_size=2, checkpointing=False, passes=passes, machine="cpu"
    )
    held = 10**6 + 7 + 400 + 800
    assert found.phases["step"] == held + 11 + 400 + 1000 + 100 + 8 * 50  # more than the 10 that pass
    assert found.phases["scoring"] == held + 11 + 5000
    assert found.phases["evaluation"] == held
    assert found.total == found.phases["scoring"]


@pytest.mark.parametrize(("policy", "init", "copies"), [("gain", "orthogonal", 3), ("tsqlora", "gradient", 1)])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_sketches_are_counted(kind: str, policy: str, init: str, copies: int, tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree(kind, tmp_path, models_dir, "run")
    tree["allocation"], tree["resize"] = {"policy": policy}, {"grow_init": init}
    run = build_run(preflight.check(parse_config(tree)), writes=False)
    assert run.ranks.tracker is not None
    run.ranks.tracker.attach(run.engine.module)
    kept = [kept.values for kept in run.ranks.tracker._kept]
    assert len(kept) == copies
    held = sum(4 * value.numel() for values in kept for value in values.values())
    assert planned(tree).engines[0].parts["sketches of gradients"] == held > 0
    run.engine.close()


def planned(tree: dict[str, Any], **options: Any) -> Forecast:
    return forecast(parse_config(tree), sizes=DataSizes(48, held_out=8), **options)


def test_what_is_proposed_fits_and_is_the_first_that_does(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqlora_scale.planning.forecast.find_remedies", lambda *_, **__: [])
    free = planned(tree, devices=2, memory=100 * GIB, machine="cpu")
    assert free.proposal is not None
    assert free.proposal.engine == "ddp"
    assert free.proposal.micro_batch_size == free.plan.micro_batch_size == 2
    assert not free.proposal.checkpointing
    assert proposal_told(free).startswith("fits into 100.00 GiB: ddp (")
    tight = planned(tree, devices=2, memory=free.proposal.total - 1, machine="cpu")
    assert tight.proposal is None or tight.proposal.total < free.proposal.total
    nothing = planned(tree, devices=2, memory=1000, machine="cpu")
    assert nothing.proposal is None
    assert nothing.least is not None
    assert nothing.least.total <= min(engine.total for engine in nothing.engines)
    assert "nothing fits into 0.00 GiB: " in proposal_told(nothing)
    assert remedies_told(nothing) == ["no change of the keys that are tried makes it fit; take a smaller model"]
    assert planned(tree, devices=2, machine="cpu").proposal is None


def test_a_smaller_micro_batch_is_proposed_where_it_alone_fits(tree: dict[str, Any]) -> None:
    tree["train"] |= {"micro_batch_size": 16, "eval_batch_size": 1}
    tree["sampling"] = {"selector": "full"}
    tree["allocation"] = {"policy": "fixed"}
    whole = planned(tree, machine="cpu").engines[0]
    half = planned(tree | {"train": tree["train"] | {"micro_batch_size": 8}}, machine="cpu").engines[0]
    found = planned(tree, memory=(whole.total + half.total) // 2, machine="cpu")
    assert found.proposal is not None
    assert found.proposal.micro_batch_size == 8
    assert found.proposal.total == pytest.approx(half.total, rel=0.02)  # by a line between sizes
    assert "train.micro_batch_size=8" in proposal_told(found)


def test_what_would_make_it_fit_does(tree: dict[str, Any]) -> None:
    """Every change that is told of fits by a plan of its own, and only what is in the way is changed."""
    tree["train"] |= {"micro_batch_size": 1, "eval_batch_size": 8}
    tree["model"] |= {"gradient_checkpointing": True}
    tree["scoring"] |= {"batch_size": 8, "delta_loss": "first_order"}
    full = planned(tree, devices=2, machine="cpu").engines[0]
    worst = planned(tree, devices=2, memory=max(full.phases["step"], full.phases["evaluation"]), machine="cpu")
    assert worst.proposal is None
    kinds = {key for remedy in worst.remedies for key in remedy.changes}
    assert "scoring.batch_size" in kinds
    assert "train.eval_batch_size" not in kinds, "which is not what is in the way"
    for remedy in worst.remedies[:1]:
        changed = {section: dict(keys) for section, keys in tree.items()}
        for key, value in remedy.changes.items():
            if key != "devices":
                section, name = key.split(".")
                changed[section][name] = value
        again = planned(changed, devices=remedy.changes.get("devices", 2), memory=worst.memory, machine="cpu")
        assert remedy.fits
        assert again.proposal == remedy.memory
    told = remedies_told(worst)
    assert told[0].startswith("would fit with scoring.batch_size=2: ddp (")


def test_where_no_change_is_enough_all_are_taken_together() -> None:
    """Against a table of needs: the mildest of a kind that fits alone, or everything at once."""
    config = parse_config(
        {"model": {"name_or_path": "m"}, "task": {"type": "causal", "dataset": {"train_file": "f"}, "source": "a",
         "target": "b", "max_length": 256, "max_target_length": 200}, "adapter": {"r": 4, "alpha": 8},
         "train": {"max_steps": 20, "batch_size": 16}, "scoring": {"warmup_steps": 2},
         "schedule": {"start": 4, "end": 10, "every": 2}}
    )  # fmt: skip

    def needs(changed: Config, devices: int) -> EngineMemory:
        size = changed.task.max_length * (1 if changed.model.quantization == "nf4" else 2)
        return EngineMemory("ddp", devices, 1, False, {}, {"step": size, "scoring": 0, "evaluation": 0}, 0)

    def found(memory: int) -> list[dict[str, Any]]:
        plans = SimpleNamespace(least=needs, proposal=needs)
        remedies = find_remedies(config, devices=2, memory=memory, least=needs(config, 2), plans=plans)
        assert all(remedy.fits == (remedy.memory.total <= memory) for remedy in remedies)
        return [remedy.changes for remedy in remedies]

    nf4, half = {"model.quantization": "nf4", "model.dtype": "bf16"}, {"model.dtype": "bf16"}
    assert found(300) == [nf4, {"task.max_length": 128, "task.max_target_length": 64}]
    assert found(100) == [{"task.max_length": 32, "task.max_target_length": 16}]
    together = {**half, **nf4, "task.max_length": 32, "task.max_target_length": 16}
    assert found(40) == [together]
    assert found(1) == [together | {"devices": 16}]


def test_phases_in_steps(tree: dict[str, Any]) -> None:
    """A pass over as many samples as a step has costs about a step; hours are tokens over tokens a second."""
    tree["scoring"] |= {"refresh": "none", "delta_loss": "first_order"}
    found = planned(tree, tokens_per_second=100.0, machine="cpu")
    steps = found.times.steps
    assert steps["steps"] == found.plan.total_steps == 13
    assert steps["events"] == 2
    assert steps["scoring"] == pytest.approx(48 / 16, rel=0.25)
    assert 0 < steps["evaluation"] < 4 * 8 / 16
    assert steps["listening to sensitivities"] > 0
    assert found.times.tokens_per_step == 16 * 32
    assert found.hours is not None
    assert found.hours["steps"] == pytest.approx(13 * 16 * 32 / 100 / 3600)


def test_what_is_received_by_engine(tree: dict[str, Any]) -> None:
    """By hand: of two ranks each receives half of the base for every pass, and all exchange the adapter's gradients."""
    tree["model"] |= {"gradient_checkpointing": True}
    tree["scoring"] |= {"refresh": "none", "delta_loss": "first_order", "batch_size": 4}
    config = parse_config(tree)
    run = plan_run(config, 48, 2)
    weights = HeldWeights([FrozenWeight(2 * WHOLE, 2, rows=2), FrozenWeight(WHOLE // 2, 2)], [100, 60], 0)

    def received(engine: str) -> dict[str, int]:
        return received_bytes(engine, config, run, weights, look="gradients", scoring_rows=4, dev_size=9)

    adapter = 13 * 4 * 160  # 13 steps; sent and received once, of two ranks a half each time
    assert received("ddp") == {"steps": adapter, "scoring": 0, "evaluation": 0}
    half = 2 * WHOLE
    batches, judged = 48 // 8, -(-9 // (2 * config.train.eval_batch_size)) * (2 + 2)
    steps = 13 * run.accumulation * 3 * half + adapter
    assert received("zero3") == {"steps": steps, "scoring": batches * 2 * half, "evaluation": judged * half}
    assert received("fsdp2") == received("zero3")
    found = planned(tree, devices=2, tokens_per_second=100.0, link=3600.0, machine="cpu")
    assert found.hours is not None
    hours = found.hours_by_engine
    assert hours is not None
    assert hours["ddp"]["steps"] == pytest.approx(found.hours["steps"] + found.received["ddp"]["steps"] / 3600 / 3600)
    assert hours["ddp"]["events"] == found.hours["events"]


@pytest.mark.parametrize(
    ("scoring", "words"),
    [
        ({"proxy_model": "MODEL", "refresh": "none"}, "scoring.proxy_model, which is no part"),
        ({"source": "online", "refresh": "none"}, "scoring.source=online"),
    ],
)
def test_what_is_scored_elsewhere_is_said(tree: dict[str, Any], scoring: dict[str, Any], words: str) -> None:
    model = tree["model"]["name_or_path"]
    settings = {key: model if value == "MODEL" else value for key, value in scoring.items()}
    found = planned(tree | {"scoring": tree["scoring"] | settings}, machine="cpu")
    assert words in " ".join(found.notes)
    assert found.engines[0].parts["scoring batch"] == found.times.steps["scoring"] == 0


def test_samples_that_are_scored(tree: dict[str, Any]) -> None:
    def scored(**scoring: Any) -> int:
        config = parse_config(tree | {"scoring": tree["scoring"] | scoring})
        return scored_samples(config, plan_run(config, 48, 1))

    assert scored(refresh="none") == 48
    assert scored(refresh="none", max_samples=10) == 10
    assert scored() == 48 + 2 * 18  # half of S, 36 samples, at two events
    even: Config = parse_config(tree | {"sampling": {"selector": "full"}})
    assert scored_samples(even, plan_run(even, 48, 1)) == 0


def test_the_table_has_every_part(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tree, devices=2, memory=GIB, tokens_per_second=100.0, machine="gpu")
    print_forecast(replace(found, proposal=None, least=found.engines[-1]))
    shown = capsys.readouterr().out
    for word in (
        "base",
        "activations",
        "moments",
        "zero3",
        "at its most: step",
        "allowed for",
        "scoring",
        "hours",
        "received",
    ):
        assert word in shown
    assert "nothing fits into 1.00 GiB" in shown


def test_the_command_prints_json(tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pool's size is that of the data; nothing is written."""
    config = write_config(tmp_path / "config.yaml", tree)
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", "--config", str(config), "--json", "--devices", "2", "--memory", "4", "--on", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [engine["engine"] for engine in told["engines"]] == ["ddp", "zero2", "fsdp2", "zero3"]
    assert told["proposal"]["fits"] is True
    assert told["time"]["steps"]["steps"] == 13
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pool", "48", "model.name_or_path=./nowhere"], "no such folder"),
        (["--devices", "0"], "--devices 0"),
        (["--memory", "-1"], "--memory -1"),
        (["--tokens-per-second", "0"], "--tokens-per-second 0"),
        (["--link", "0"], "--link 0"),
        (["--pool", "0"], "--pool 0"),
        (["--dev", "3"], "--dev 3 (dev) goes with --pool"),
        (["--pool", "48", "--devices", "3"], "train.batch_size=16 must be a multiple"),
        (["--pool", "48", "adapter.target_modules=[nothing]"], "'nothing' matches no linear layer"),
        (["task.dataset.train_file=gone.jsonl"], "or give --pool N (pool), and no data are read"),
        (["--devices", "many"], "--devices"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", tree)
    try:
        code = main(["plan", "--config", str(config), *arguments])
    except SystemExit as leaving:
        code = int(str(leaving.code))
    shown = capsys.readouterr()
    assert code == 2
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert words in shown.err
    assert shown.out == ""


def test_only_the_description_of_a_model_is_read(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    described = Path(tree["model"]["name_or_path"]) / "config.json"
    (bare / "config.json").write_text(described.read_text(encoding="utf-8"), encoding="utf-8")
    config = write_config(tmp_path / "config.yaml", tree | {"model": {"name_or_path": str(bare)}})
    assert main(["plan", "--config", str(config), "--pool", "48", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_parameters"] > 0


LARGE = r"""
import re, sys
from pathlib import Path
from transformers import LlamaConfig
from tsqlora_scale.commands.main import main
LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=4096).save_pretrained(sys.argv[1])
code = main(["plan", "--config", sys.argv[2], "--pool", "50000", "--devices", "8", "--memory", "80", "--json"])
# not getrusage's peak: that one begins with the size of the process that this one was forked from
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
print("peak", int(peak[1]) // 1024, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_model_of_seven_billion_is_planned_in_little_memory(tmp_path: Path) -> None:
    tree = {
        "model": {"name_or_path": str(tmp_path / "model"), "dtype": "bf16", "gradient_checkpointing": True},
        "task": {"type": "causal", "dataset": {"train_file": "none.jsonl"}, "source": "a", "target": "b",
                 "max_length": 1024, "max_target_length": 256},
        "adapter": {"r": 16, "alpha": 32},
        "train": {"max_steps": 100, "batch_size": 32, "micro_batch_size": 4},
    }  # fmt: skip
    config = write_config(tmp_path / "config.yaml", tree)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "model"), str(config)], capture_output=True, text=True,
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split("peak ")[-1]) < 1000, "MiB"
    told = json.loads(done.stdout)
    # by hand: embeddings and head, and of every layer attention, three products of the MLP and two norms
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert told["base_elements"] == 2 * 32000 * 4096 + 32 * layer + 4096
    assert told["trained_parameters"] == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    ddp = told["engines"][0]
    assert ddp["parts"]["base"] == 2 * told["base_elements"]
    # of every layer its input, in bf16; and what else is kept is little
    assert ddp["parts"]["activations"] == pytest.approx(32 * 4 * 1024 * 4096 * 2, rel=0.1)
