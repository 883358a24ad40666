"""AdaLoRA and ElaLoRA in whole runs: beside PEFT's own AdaLoRA, killed and resumed, saved and opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.runs import go, losses_of, ranks_of, read_lines, run_tree
from tests.steps import Killed, killed_in_step
from tsqlora_scale import api
from tsqlora_scale import training as loop
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.adapters.lora import short_name
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.ranks.install import diagonal_name, factor_names
from tsqlora_scale.run import preflight
from tsqlora_scale.run.adapted_model import load_adapted
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import optimizer_step


def tree_of(method: str, tmp_path: Path, models_dir: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A run with events after steps 4, 6, 8, 10 and 12, of 13."""
    tree = run_tree("bert", tmp_path, models_dir, name, **sections)
    tree["adapter"] = {"method": method, "r": 6, "alpha": 12, **sections.get("adapter", {})}
    tree["schedule"] = {"start": 4, "end": 12, "every": 2}
    return {key: values for key, values in tree.items() if key not in ("scoring", "sampling", "sensitivity")}


def pefts_twin(run: Run, base: str) -> Any:
    """PEFT's AdaLoRA on the same base with the same values, its scaling ours."""
    names = [short_name(layer) for layer in current_ranks(run.engine.module)]
    config = AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=2 * (6 + 1e-5), tinit=4, tfinal=4, total_step=16, deltaT=2,
        orth_reg_weight=0.1, target_modules=names, modules_to_save=["classifier"], task_type="SEQ_CLS",
    )  # fmt: skip
    model: Any = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    ours = {name.replace(".default.weight", ".default") if ".lora_" in name else name: value
            for name, value in run.engine.module.state_dict().items()}  # fmt: skip
    ours = {name: value[:, None] if ".lora_E." in name else value for name, value in ours.items()}
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected
    assert all(".ranknum." in name for name in missing)
    return model.train()


def test_adalora_keeps_what_pefts_masks_keep(tmp_path: Path, models_dir: Path) -> None:
    """Step by step: the same losses, with the penalty, as long as nothing is dropped, and then the same triplets."""
    train = {"micro_batch_size": 6, "max_grad_norm": None}
    tree = tree_of("adalora", tmp_path, models_dir, "run", train=train)
    run = build_run(preflight.check(parse_config(tree)))
    twin = pefts_twin(run, tree["model"]["name_or_path"])
    trained = [param for param in twin.parameters() if param.requires_grad]
    betas = (run.config.train.betas[0], run.config.train.betas[1])
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=betas, eps=run.config.train.eps, weight_decay=0.0)
    for step in range(6):
        rows = np.arange(12) + 12 * (step % 4)
        result = optimizer_step(
            run.engine, run.task, rows, listener=run.ranks, step=step, lr=1e-2, micro_batch_size=6, seed=1
        )
        batch = run.task.batch(rows)
        outputs = twin(**batch.inputs, labels=batch.targets)  # with PEFT's penalty
        sums, _ = run.task.loss_sums(outputs, batch)
        assert result.loss == pytest.approx(float(sums.detach().mean()), abs=1e-5)
        assert float(outputs.loss.detach()) > result.loss + 0.01
        outputs.loss.backward()
        twin.base_model.update_and_allocate(step + 1)
        optimizer.step()
        optimizer.zero_grad()
        if run.ranks.due(step + 1):
            event = run.ranks.adapt(run.engine, None, step + 1)
    assert (event.plan.budget, sum(event.plan.ranks.values())) == (58, 58)
    masks = twin.peft_config["default"].rank_pattern
    assert len(masks) == len(event.plan.keep) == 12
    for layer, keep in event.plan.keep.items():
        mask = masks[f"{short_name(layer)}.lora_E.default"]
        assert keep == tuple(k for k, stays in enumerate(mask) if stays)


@pytest.mark.parametrize("method", ["adalora", "elalora"])
def test_killed_and_resumed(method: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint between two events: importances go on with those of before."""
    go(tree_of(method, tmp_path, models_dir, "whole", train={"checkpoint_every": 7}))
    killed = tree_of(method, tmp_path, models_dir, "killed", train={"checkpoint_every": 7})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(9))
        with pytest.raises(Killed):
            go(killed)
    go(killed, resume="auto")
    runs = tmp_path / "runs"
    assert losses_of(runs / "killed") == losses_of(runs / "whole")
    assert ranks_of(runs / "killed") == ranks_of(runs / "whole")
    files = [load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("killed", "whole")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    totals = [sum(ranks.values()) for ranks in ranks_of(runs / "whole")]
    assert totals == ([72, 58, 51, 48, 48] if method == "adalora" else [72] * 5)
    assert len({tuple(ranks.values()) for ranks in ranks_of(runs / "whole")}) > 2
    dropped = [reason[0] for line in read_lines(runs / "whole" / "ranks.jsonl") for reason in line["reasons"].values()]
    assert len(dropped) == 60
    if method == "elalora":
        assert [sum(map(int, dropped[i : i + 12])) for i in range(0, 60, 12)] == [4, 4, 4, 2, 0], "round(4 (1 - p^3))"


def test_the_saved_adapter_is_a_lora_adapter_of_the_same_function(tmp_path: Path, models_dir: Path) -> None:
    tree = tree_of("adalora", tmp_path, models_dir, "run", allocation={"target_r": 1})
    run = go(tree)
    assert 0 in current_ranks(run.engine.module).values(), "a layer without a triplet is none in the file either"
    adapter = tmp_path / "runs" / "run" / "adapter"
    batch = run.task.batch(range(4))
    with torch.no_grad():
        trained = run.engine.module.eval()(**batch.inputs).logits
        base = AutoModelForSequenceClassification.from_pretrained(tree["model"]["name_or_path"])
        opened = PeftModel.from_pretrained(base, str(adapter)).eval()(**batch.inputs).logits
        checked = preflight.check(parse_config(tree))
        ours = load_adapted(checked, adapter, device=torch.device("cpu"))(**batch.inputs).logits
    assert torch.allclose(opened, trained, atol=1e-6)
    assert torch.allclose(ours, trained, atol=1e-6)
    # … and taken apart again: the same triplets
    again = build_run(checked, adapter=str(adapter), writes=False)
    states = [one.engine.gather().params for one in (run, again)]
    assert states[0].keys() == states[1].keys()
    for layer, rank in current_ranks(run.engine.module).items():
        for name in (*factor_names(layer), diagonal_name(layer)) if rank else ():
            assert torch.allclose(states[0][name].value, states[1][name].value, rtol=1e-6, atol=1e-7), name


def test_what_a_run_wrote_is_evaluated(tmp_path: Path, models_dir: Path) -> None:
    config = parse_config(tree_of("elalora", tmp_path, models_dir, "run"))
    result = api.train(config)
    assert api.evaluate(config, result.adapter) == pytest.approx(result.metrics, abs=1e-6)


def test_triplets_start_from_a_lora_adapter_and_are_scored(tmp_path: Path, models_dir: Path) -> None:
    """Scores are those of A and B; Eq. 6 allots ranks, and whole triplets come and go."""
    lora = run_tree("bert", tmp_path, models_dir, "lora")
    lora["adapter"] = {"method": "lora", "r": 4, "alpha": 8}
    lora = {
        key: values for key, values in lora.items() if key not in ("scoring", "sampling", "sensitivity", "schedule")
    }
    go(lora)
    start = tmp_path / "runs" / "lora" / "adapter"
    tree = run_tree("bert", tmp_path, models_dir, "svd", resize={"shrink": "importance"})
    tree["adapter"] |= {"type": "svd", "init_from": str(start), "orthogonality": 0.1}
    run = build_run(preflight.check(parse_config(tree)))
    written = load_file(start / "adapter_model.safetensors")
    for name in current_ranks(run.engine.module):
        a, b = (written[factor.replace(".default", "")] for factor in factor_names(name))
        parts = dict(run.engine.module.named_parameters())
        triplet = [parts[part].detach() for part in (*factor_names(name), diagonal_name(name))]
        assert torch.allclose(triplet[1] @ triplet[2].diag() @ triplet[0], b @ a, atol=1e-6)
    run.engine.close()
    go(tree | {"run": {**tree["run"], "name": "svd-2"}})
    folder = tmp_path / "runs" / "svd-2"
    assert len(ranks_of(folder)) == 2
    assert any(len(set(ranks.values())) > 1 for ranks in ranks_of(folder))
    assert len(losses_of(folder)) == 13
