"""The average of a run's last parameters: what it is at the end, and as a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.reference.averages import mean_product, sample_gaps
from tests.runs import go, losses_of, read_lines, result_of, run_tree
from tests.steps import take_step
from tests.unit.config_trees import message, tree
from tsqlora_scale.api import evaluate
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.adapters.adapter_files import DIAGONALS
from tsqlora_scale.ranks.controller import FixedRanks
from tsqlora_scale.ranks.install import diagonal_name, factor_names
from tsqlora_scale.report.result_table import print_result
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.checkpoint import read_checkpoint
from tsqlora_scale.step import Teacher, optimizer_step
from tsqlora_scale.tasks.batch import IGNORED
from tsqlora_scale.tasks.logit_gaps import squared_gaps

AVERAGE = {"average_last": 3, "average_every": 2, "keep": "average"}


def test_adapter_holds_the_average_through_rank_events(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 8, 10 and 12, the event of step 8 before the first of them; checkpoints hold the parts."""
    train = {**AVERAGE, "checkpoint_every": 2, "checkpoint_keep": 20}
    made = run_tree("bert", tmp_path, models_dir, "run", train=train)
    run = go(made)
    result = result_of(run.record.folder)
    assert result["average"]["steps"] == [8, 10, 12]
    assert result["kept"]["which"] == "average" and result["metrics"] == result["average"]["metrics"]
    print_result(result)
    table = " ".join(capsys.readouterr().out.split())
    assert f"(the average of the last snapshots, to step {result['steps']})" in table
    assert f"of the last step │ {result['metrics_last']['accuracy']:.4f}" in table
    kept = load_file(run.record.folder / "adapter" / "adapter_model.safetensors")
    states = [read_checkpoint(run.record.folder / "checkpoints" / f"step-{s:08d}")[0].params for s in (8, 10, 12)]
    for layer, rank in run.kept["ranks"].items():
        names = factor_names(layer)
        pairs = [tuple(state[name].value.numpy() for name in names) for state in states]
        a, b = (kept[name.replace(".default", "")].double().numpy() for name in names)
        assert len(a) == rank
        np.testing.assert_allclose(b @ a, mean_product(pairs, rank), atol=1e-6)
    (head,) = [name for name in states[0] if name.endswith("classifier.modules_to_save.default.weight")]
    wanted = torch.stack([state[head].value for state in states]).mean(0)
    torch.testing.assert_close(kept["base_model.model.classifier.weight"], wanted)
    assert evaluate(parse_config(made), run.record.folder / "adapter") == pytest.approx(result["metrics"])
    (line,) = [line for line in read_lines(run.record.folder / "metrics.jsonl") if "eval_average" in line]
    assert line["eval_average"] == result["metrics"]


def test_what_trains_is_what_it_was(tmp_path: Path, models_dir: Path) -> None:
    """An average that nobody learns from changes no step, and the last step's adapter is kept where that is asked."""
    few = {"max_steps": 8, "micro_batch_size": 12}
    trees = [run_tree("bert", tmp_path, models_dir, name, train=few, sampling={"selector": "full"})
             for name in ("plain", "averaged")]  # fmt: skip
    trees[1]["train"] |= AVERAGE | {"keep": "last"}
    plain, averaged = map(go, trees)
    folders = [run.record.folder for run in (plain, averaged)]
    assert losses_of(folders[0]) == losses_of(folders[1])
    kept = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    assert result_of(folders[0])["average"] is None
    assert result_of(folders[1])["average"]["steps"] == [4, 6, 8]


def test_distilled_runs_resume_to_the_bit(tmp_path: Path, models_dir: Path) -> None:
    """From between two snapshots, with a rank event before and one after it."""
    train = {**AVERAGE, "distill": {"weight": 2.0}, "checkpoint_every": 5, "checkpoint_keep": 20, "micro_batch_size": 4}
    whole = go(run_tree("bert", tmp_path, models_dir, "whole", train=train))
    again = go(
        run_tree("bert", tmp_path, models_dir, "again", train=train),
        resume=str(whole.record.folder / "checkpoints" / "step-00000005"),
    )
    folders = [run.record.folder for run in (whole, again)]
    lines = [[line for line in read_lines(folder / "metrics.jsonl") if "loss" in line] for folder in folders]
    assert [line["loss"] for line in lines[1]] == [line["loss"] for line in lines[0]][5:]
    assert ["teacher_gap" in line for line in lines[0]] == [False] * 2 + [True] * 11
    assert max(line["teacher_gap"] for line in lines[0][2:]) > 0
    assert result_of(folders[0])["metrics"] == result_of(folders[1])["metrics"]
    kept = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_the_gradient_is_that_of_loss_and_gap(tmp_path: Path, models_dir: Path, kind: str) -> None:
    """Against autograd over the whole batch, weighted; and the parameters are as before where the rate is 0."""
    train = {"micro_batch_size": 4, "max_grad_norm": None}
    run = build_run(preflight.check(parse_config(run_tree(kind, tmp_path, models_dir, "run", train=train))))
    for _ in range(2):
        take_step(run)
    rows, weights = np.arange(12), np.linspace(0.5, 3, 12)
    before = {name: entry.value for name, entry in run.engine.gather().params.items()}
    teacher = Teacher({name: 1.1 * value for name, value in before.items()}, 0.7)
    module, batch = run.engine.module.train(), run.task.batch(rows)
    (others,) = teacher.logits(run.engine, run.task, [batch])
    outputs = module(**batch.inputs)
    sums, counts = run.task.loss_sums(outputs, batch)
    gaps = squared_gaps(run.task.needed(outputs, batch), others, batch.targets, batch.places)
    shares = torch.from_numpy(weights).float()
    terms = (counts * shares).sum().item()
    expected = ((sums + 0.7 * gaps) * shares).sum() / terms
    wanted = torch.autograd.grad(expected, [p for _, p in sorted(module.named_parameters()) if p.requires_grad])
    result = optimizer_step(
        run.engine, run.task, rows, listener=FixedRanks(), step=2, lr=0.0, micro_batch_size=4, seed=0,
        weights=weights, teacher=teacher,
    )  # fmt: skip
    assert result.loss == pytest.approx((sums * shares).sum().item() / terms, rel=1e-5)
    assert result.teacher_gap == pytest.approx((gaps * shares).sum().item() / terms, rel=1e-4)
    assert result.teacher_gap > 0
    assert result.grad_norm == pytest.approx(torch.cat([g.flatten() for g in wanted]).norm().item(), rel=1e-4)
    after = run.engine.gather().params
    assert all(torch.equal(value, after[name].value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_other_adapters_learn_from_their_average(tmp_path: Path, models_dir: Path, kind: str) -> None:
    """Magnitudes are averaged plainly; scalings stay; the adapter's file opens and is what was evaluated."""
    train = {"max_steps": 4, "micro_batch_size": 12, "lr_decay": 0.8, "average_last": 2, "average_every": 1}
    train |= {"keep": "average", "distill": {"weight": 1.0}, "checkpoint_every": 1, "checkpoint_keep": 9}
    made = run_tree("bert", tmp_path, models_dir, "run", train=train, adapter={"r": 4, "method": kind})
    made = {key: made[key] for key in ("run", "model", "task", "adapter", "train")}
    run = go(made)
    folder = run.record.folder
    assert result_of(folder)["average"]["steps"] == [3, 4]
    assert evaluate(parse_config(made), folder) == pytest.approx(result_of(folder)["metrics"])
    states = [read_checkpoint(folder / "checkpoints" / f"step-{s:08d}")[0].params for s in (3, 4)]
    plain = [name for name in states[0] if "magnitude" in name]
    assert bool(plain) == (kind == "dora")
    average = run.average.values(run.engine.module)
    for name in plain:
        torch.testing.assert_close(average[name], (states[0][name].value + states[1][name].value) / 2)


@pytest.mark.parametrize("kind", ["adalora", "elalora"])
def test_triplets_are_averaged_through_rank_events(tmp_path: Path, models_dir: Path, kind: str) -> None:
    """Snapshots of other ranks than those at the end (AdaLoRA's); the adapter's file holds the mean's products, and
    what takes them apart as triplets; the run learns from it."""
    train = {"average_last": 5, "average_every": 2, "keep": "average", "distill": {"weight": 1.0}}
    made = run_tree(
        "bert",
        tmp_path,
        models_dir,
        "run",
        train=train | {"checkpoint_every": 2, "checkpoint_keep": 20},
        adapter={"method": kind},
    )
    run = go(made)
    folder = run.record.folder
    result = result_of(folder)
    assert result["kept"]["which"] == "average" and result["average"]["steps"] == [4, 6, 8, 10, 12]
    assert max(line.get("teacher_gap", 0.0) for line in read_lines(folder / "metrics.jsonl")) > 0
    assert evaluate(parse_config(made), folder / "adapter") == pytest.approx(result["metrics"])
    states = [read_checkpoint(folder / "checkpoints" / f"step-{s:08d}")[0].params for s in result["average"]["steps"]]
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    diagonals = json.loads((folder / "adapter" / DIAGONALS).read_text(encoding="utf-8"))
    seen = set()
    for layer, rank in run.kept["ranks"].items():
        name_a, name_b = factor_names(layer)
        if not rank:
            continue
        parts = [[state[name].value.numpy() for name in (name_a, name_b, diagonal_name(layer))]
                 for state in states if name_a in state]  # fmt: skip
        seen |= {len(a) - rank for a, _, _ in parts}
        products = [(e[:, None] * a, b) for a, b, e in parts]
        nothing = [(0 * products[0][0], products[0][1])] * (len(states) - len(parts))
        a, b = (kept[name.replace(".default", "")].double().numpy() for name in (name_a, name_b))
        np.testing.assert_allclose(b @ a, mean_product([*products, *nothing], rank), atol=1e-6)
        assert len(diagonals[name_b.replace(".default", "")]) == rank
    assert len(seen) > 1 or kind == "elalora", "no snapshot has other ranks"


def test_gaps_against_the_slow_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, others = (torch.randn(3, 4, 6, generator=generator) for _ in range(2))
    targets = torch.randint(0, 6, (3, 4), generator=generator)
    targets[0, :2], targets[2, 3] = IGNORED, IGNORED
    wanted = sample_gaps(logits.numpy(), others.numpy(), targets.numpy(), IGNORED)
    assert squared_gaps(logits, others, targets).tolist() == pytest.approx(wanted, rel=1e-5)
    places = torch.nonzero(targets.flatten() != IGNORED).squeeze(1)
    at_places = [one.flatten(0, 1)[places] for one in (logits, others)]
    assert squared_gaps(*at_places, targets, places).tolist() == pytest.approx(wanted, rel=1e-5)
    classes = squared_gaps(logits[:, 0], others[:, 0], torch.zeros(3, dtype=torch.int64))
    assert classes.tolist() == pytest.approx((logits[:, 0] - others[:, 0]).square().mean(1).tolist())


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"average_last": 3}, "set 'average_every'"),
        ({"average_every": 3}, "does nothing without"),
        ({"keep": "average"}, "needs 'average_last'"),
        ({"distill": {"weight": 1.0}}, "learns from the average"),
        ({"average_last": 2, "average_every": 1, "distill": {"weight": 0}}, "train.distill.weight"),
    ],
)
def test_keys_that_make_no_average(keys: dict[str, Any], part: str) -> None:
    assert part in message(tree(train={"max_steps": 10, **keys}))


def test_snapshots_are_taken_with_the_evaluations_or_checkpoints() -> None:
    def every(**keys: Any) -> int | None:
        return parse_config(tree(train={"max_steps": 10, "average_last": 2, **keys})).train.average_every

    assert every(checkpoint_every=5) == 5
    assert every(checkpoint_every=5, average_every=2) == 2


def test_a_run_too_short_for_a_snapshot(tmp_path: Path, models_dir: Path) -> None:
    made = run_tree("bert", tmp_path, models_dir, "run", train={"average_last": 2, "average_every": 14})
    with pytest.raises(Exception, match="takes no snapshot in a run of 13 steps"):
        preflight.check(parse_config(made))
    made["train"]["average_every"] = 13
    preflight.check(parse_config(made))
    made["train"]["distill"] = {"weight": 1.0}
    with pytest.raises(Exception, match="takes the first one after the last of 13 steps; lower it"):
        preflight.check(parse_config(made))
