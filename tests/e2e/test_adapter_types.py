"""Types that are not PEFT's through a run's life: trained, resumed, evaluated, predicted, opened, taken up, merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.runs import go, losses_of, read_lines, result_of, run_tree
from tests.tiny import tiny_model
from tsqlora_scale.api import evaluate, export, predict, score
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.adapters.adapter_type import load_adapter
from tsqlora_scale.model.block_depths import block_of, blocks_of
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.training import take_steps

#: type -> the tiny model; every type on an encoder or a decoder, with and without a head
KINDS = {
    "loratrf": "llama", "bitfit": "deberta", "houlsby": "t5", "pfeiffer": "bert", "prompt": "llama", "prefix": "t5",
    "full": "gpt2",
}  # fmt: skip


def tree_of(method: str, folder: Path, models: Path, name: str, **sections: Any) -> dict[str, Any]:
    short = {"max_steps": 6, "checkpoint_every": 3, "checkpoint_keep": 9}
    sections["train"] = short | sections.get("train", {})
    sections["adapter"] = {"method": method} | sections.get("adapter", {})
    return run_tree(KINDS[method], folder, models, name, **sections)


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in run.engine.module.named_parameters() if p.requires_grad}


def logits_of(model: Any, kind: str) -> torch.Tensor:
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return model.eval()(**inputs, **({"decoder_input_ids": ids[:, :3]} if kind == "t5" else {})).logits


def base_of(tree: dict[str, Any]) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    auto = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
    path = tree["model"]["name_or_path"]
    kind = Path(path).name
    return auto.get(kind, AutoModelForSequenceClassification).from_pretrained(path)


@pytest.mark.parametrize("method", KINDS)
def test_a_runs_life(tmp_path: Path, models_dir: Path, method: str) -> None:
    kind, tree = KINDS[method], tree_of(method, tmp_path, models_dir, "run")
    config = parse_config(tree)
    run = go(tree)
    folder, expected = tmp_path / "runs" / "run", logits_of(run.engine.module, kind)
    values, losses, metrics = trained(run), losses_of(tmp_path / "runs" / "run"), result_of(folder)["metrics"]
    assert losses[-1] < losses[0]

    # resumed from its middle, it is the same to the bit; and so is what is saved
    tree["run"]["name"] = "again"
    again = go(tree, resume=str(folder / "checkpoints" / "step-00000003"))
    assert losses_of(tmp_path / "runs" / "again") == losses[3:]
    assert_same(trained(again), values)

    # opened by itself, evaluated and asked, from the folder and from a checkpoint
    opened = load_adapter(base_of(tree), folder / "adapter")
    torch.testing.assert_close(logits_of(opened, kind), expected, atol=1e-5, rtol=0)
    for place in (folder, folder / "checkpoints" / "step-00000006"):
        assert evaluate(config, place) == pytest.approx(metrics)
    predicted = predict(tmp_path / f"data-{config.task.type}" / "dev.jsonl", tmp_path / "out.jsonl", run=folder)
    assert predicted.rows == len(read_lines(tmp_path / "out.jsonl")) == 8

    # another run begins with it
    second = tree_of(method, tmp_path, models_dir, "second", adapter={"init_from": str(folder)})
    assert_same(trained(build_run(preflight.check(parse_config(second)))), values)

    # merged where that is exact
    if method in ("bitfit", "full"):
        assert export(folder, "merged", tmp_path / "merged", config=config) != []
        merged = type(base_of(tree)).from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits_of(merged, kind), expected, atol=1e-5, rtol=0)
    else:
        with pytest.raises(UserError, match=f"of type {method} has no merge: its"):
            export(folder, "merged", tmp_path / "merged", config=config)
    with pytest.raises(UserError, match="--format padded"):
        export(folder, "padded", tmp_path / "padded")
    assert "load_adapter" in export(folder, "peft", tmp_path / "copied")[0]
    assert "load_adapter" in (folder / "adapter" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", [name for name in KINDS if name not in ("prompt", "prefix")])
def test_the_recipes_of_a_run(tmp_path: Path, models_dir: Path, method: str) -> None:
    """The uppermost block alone, at rates by depth, against the average of what it has been; and from there."""
    kind, keys = KINDS[method], {"average_last": 2, "average_every": 2, "distill": {"weight": 1.0}, "lr_decay": 0.5}
    tree = tree_of(method, tmp_path, models_dir, "run", adapter={"layers": "top:1"}, train=dict(keys))
    run = go(tree)
    folder, values = tmp_path / "runs" / "run", trained(run)
    inside = {name for name in values if block_of(name) is not None}
    assert {block_of(name) for name in inside} == {blocks_of(run.engine.module)[-1]}
    assert all("classifier" in name or "pooler" in name or "score" in name for name in values.keys() - inside)
    tree["run"]["name"] = "again"
    assert_same(trained(go(tree, resume=str(folder / "checkpoints" / "step-00000003"))), values)
    result = result_of(folder)
    assert result["average"]["metrics"].keys() == result["metrics"].keys()
    assert evaluate(parse_config(tree), folder) == pytest.approx(result["metrics"])
    opened = load_adapter(base_of(tree), folder / "adapter")
    torch.testing.assert_close(logits_of(opened, kind), logits_of(run.engine.module, kind), atol=1e-5, rtol=0)
    second = tree_of(method, tmp_path, models_dir, "second", adapter={"init_from": str(folder), "layers": "top:1"})
    assert_same(trained(build_run(preflight.check(parse_config(second)))), values)
    refusals = {
        "leaves out|filter behind|set adapter.target_modules": [0],
        "has no|filter behind|not adapted there": None,
    }
    for words, layers in refusals.items():
        second["adapter"]["layers"] = layers
        with pytest.raises(UserError, match=words):
            build_run(preflight.check(parse_config(second)))


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_what_lies_beside_the_blocks_is_not_forgotten(tmp_path: Path, models_dir: Path, method: str) -> None:
    """Embeddings, norms and biases that another run has trained; and blocks that there are not."""
    go(tree_of(method, tmp_path, models_dir, "whole"))
    adapter = {"init_from": str(tmp_path / "runs" / "whole"), "layers": [0, 1]}
    tree = tree_of(method, tmp_path, models_dir, "run", adapter=adapter)
    with pytest.raises(UserError, match=r"init_from.* has trained .*, too, which adapter.layers=\[0, 1\] leaves out"):
        preflight.check(parse_config(tree))
    tree["adapter"] = {"method": method, "layers": [2]}
    with pytest.raises(UserError, match=r"adapter.layers=\[2\].* has no block 2"):
        preflight.check(parse_config(tree))


def test_prefixes_train_in_eager_attention(tmp_path: Path, models_dir: Path) -> None:
    """As in the other, but for rounding."""
    losses = []
    for attention in ("sdpa", "eager"):
        go(tree_of("prefix", tmp_path, models_dir, attention, model={"attention": attention}))
        losses.append(losses_of(tmp_path / "runs" / attention))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def test_loratrf_is_scored_and_resized(tmp_path: Path, models_dir: Path) -> None:
    """Both halves of the method on LoRA's factors, filters untouched by rank events; and the ranks are in the file."""
    both = {"selector": "quality", "keep_fraction": 0.75}
    tree = tree_of(
        "loratrf", tmp_path, models_dir, "run", train={"max_steps": 10}, sampling=both,
        allocation={"policy": "tsqlora"}, adapter={"filter_rank": 2},
    )  # fmt: skip
    run = go(tree)
    folder = tmp_path / "runs" / "run"
    ranks = result_of(folder)["ranks_end"]
    assert len(set(ranks.values())) > 1
    opened = load_adapter(base_of(tree), folder / "adapter")
    expected = logits_of(run.engine.module, "llama")
    torch.testing.assert_close(logits_of(opened, "llama"), expected, atol=1e-5, rtol=0)
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (described["peft_type"], described["filter_rank"]) == ("LORATRF", 2)
    assert described["rank_pattern"] == ranks


def test_bottlenecks_are_scored(tmp_path: Path, models_dir: Path) -> None:
    tree = tree_of("pfeiffer", tmp_path, models_dir, "pool", sampling={"selector": "quality"})
    scored = score(parse_config(tree))
    assert scored.file is not None
    assert scored.file.is_file()


def test_on_a_4_bit_base(tmp_path: Path, models_dir: Path) -> None:
    """Where the base is packed, nothing of it trains."""
    for method in ("houlsby", "loratrf", "prompt", "prefix"):
        tree = tree_of(method, tmp_path, models_dir, method, model={"quantization": "nf4"}, train={"max_steps": 2})
        go(tree)
        folder = tmp_path / "runs" / method
        assert evaluate(parse_config(tree), folder) == pytest.approx(result_of(folder)["metrics"])


@pytest.mark.parametrize(
    ("method", "kind"), [("bitfit", "deberta"), ("houlsby", "t5"), ("lora", "t5"), ("prompt", "t5")]
)
def test_in_bf16(tmp_path: Path, models_dir: Path, method: str, kind: str) -> None:
    """Norms of two types; and an encoder that ``generate`` calls by itself."""
    sections: dict[str, Any] = {"model": {"dtype": "bf16"}, "train": {"max_steps": 2}, "adapter": {"method": method}}
    tree = run_tree(kind, tmp_path, models_dir, method, **sections)
    go(tree)
    folder = tmp_path / "runs" / method
    assert evaluate(parse_config(tree), folder) == pytest.approx(result_of(folder)["metrics"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> dict[str, Path]:
    """Adapters of some types on the same model, after a step."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for method in ("pfeiffer", "loratrf", "lora", "prompt"):
        go(run_tree("bert", folder, models_dir, method, adapter={"method": method}, train={"max_steps": 1}))
        found[method] = folder / "runs" / method / "adapter"
    return found


def refusal(tree: dict[str, Any], folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        preflight.check_evaluation(parse_config(tree), folder)
    return str(caught.value)


def test_a_saved_adapter_that_does_not_fit(tmp_path: Path, models_dir: Path, saved: dict[str, Path]) -> None:
    def tree(method: str, kind: str = "bert", **keys: Any) -> dict[str, Any]:
        return run_tree(kind, tmp_path, models_dir, "other", adapter={"method": method} | keys)

    for of, asked in (("pfeiffer", "lora"), ("lora", "pfeiffer"), ("loratrf", "lora"), ("lora", "loratrf")):
        told = refusal(tree(asked), saved[of])
        assert f"is of adapter.type='{of}', the config's is '{asked}'" in told
    assert "the model has none" in refusal(tree("pfeiffer", "deberta"), saved["pfeiffer"])
    with pytest.raises(UserError, match=r"adapter\.init_from=.*is of width 4, adapter\.r is 2; set adapter\.r=4"):
        preflight.check(parse_config(tree("pfeiffer", r=2, init_from=str(saved["pfeiffer"]))))
    with pytest.raises(UserError, match=r"is of width 20, adapter\.prompt_tokens is 9; set adapter\.prompt_tokens=20"):
        preflight.check(parse_config(tree("prompt", prompt_tokens=9, init_from=str(saved["prompt"]))))
    with pytest.raises(UserError, match=r"adapter\.init_from=.*is a pfeiffer adapter, adapter\.type is 'houlsby'"):
        preflight.check(parse_config(tree("houlsby", init_from=str(saved["pfeiffer"]))))
    with pytest.raises(
        UserError, match=r"its filters have rank 4, adapter\.filter_rank .* is 2; set adapter\.filter_rank=4"
    ):
        preflight.check(parse_config(tree("loratrf", filter_rank=2, init_from=str(saved["loratrf"]))))
    with pytest.raises(UserError, match=r"is of width 4, adapter\.r is 2; set adapter\.r=4"):
        score(parse_config(tree("pfeiffer", r=2) | {"sampling": {"selector": "quality"}}), adapter=saved["pfeiffer"])
    copy = tmp_path / "copy"
    shutil.copytree(saved["pfeiffer"], copy)
    described = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    described["parameters"].pop()
    (copy / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    assert "is not in both files" in refusal(tree("pfeiffer"), copy)
    described["parameters"] = "all"
    (copy / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    assert "parameters='all'" in refusal(tree("pfeiffer"), copy)
    shutil.rmtree(copy)
    shutil.copytree(saved["loratrf"], copy)
    described = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    (copy / "adapter_config.json").write_text(json.dumps(described | {"filter_rank": 3}), encoding="utf-8")
    assert "task_filter.down.weight is (4, 32), for this model it is (3, 32)" in refusal(tree("loratrf"), copy)


def test_a_base_of_another_shape_or_type(models_dir: Path, saved: dict[str, Path]) -> None:
    """Of other labels it is refused; of 16 bits it computes as a run on it does."""
    path, auto = tiny_model("bert", models_dir), AutoModelForSequenceClassification
    with pytest.raises(
        UserError, match=r"classifier.bias is \(2,\), the model's is \(3,\); give the base .* as many labels"
    ):
        load_adapter(auto.from_pretrained(path, num_labels=3), saved["pfeiffer"])
    whole = logits_of(load_adapter(auto.from_pretrained(path), saved["pfeiffer"]), "bert")
    narrow = logits_of(load_adapter(auto.from_pretrained(path, dtype=torch.bfloat16), saved["pfeiffer"]), "bert")
    torch.testing.assert_close(narrow.float(), whole, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_full_trains_weights_that_are_tied(
    tmp_path: Path, models_dir: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Embeddings that are the output layer, too, have one name of several. A rate for adapters is warned of."""
    tree = run_tree(kind, tmp_path, models_dir, "run", adapter={"method": "full"}, train={"max_steps": 2})
    run = build_run(preflight.check(parse_config(tree)))
    assert [name for name, param in run.engine.module.named_parameters() if not param.requires_grad] == []
    before = trained(run)
    take_steps(run)
    assert all(not torch.equal(value, before[name]) for name, value in trained(run).items() if "shared" in name)
    assert "train.lr=0.01 is for adapters" in caplog.text
    caplog.clear()
    tree["train"]["lr"] = 1e-4
    preflight.check(parse_config(tree))
    assert "is for adapters" not in caplog.text


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"adapter": {"init": "pissa"}}, "would cut away"),
        ({"adapter": {"method": "prompt", "layers": "top:1"}}, "sits in all blocks"),
        ({"adapter": {"method": "prefix", "layers": [0]}}, "sits in all blocks"),
        ({"adapter": {"method": "prompt"}, "train": {"packing": True}}, "trains stands before every one; set it to"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, models_dir: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_config(run_tree("llama", tmp_path, models_dir, "run", **sections))


def test_pissa_resumes_and_opens_on_the_base_as_it_was(tmp_path: Path, models_dir: Path) -> None:
    """What the weights have lost at the start is in the file."""
    sections: dict[str, Any] = {
        "adapter": {"method": "lora", "init": "pissa"},
        "train": {"max_steps": 6, "checkpoint_every": 3, "checkpoint_keep": 9},
        "schedule": {"start": 2, "end": 4, "every": 2},
    }
    tree = run_tree("llama", tmp_path, models_dir, "run", **sections)
    run = go(tree)
    folder, config = tmp_path / "runs" / "run", parse_config(tree)
    opened = load_adapter(base_of(tree), folder / "adapter")
    torch.testing.assert_close(logits_of(opened, ""), logits_of(run.engine.module, ""), atol=2e-5, rtol=0)
    for place in (folder, folder / "checkpoints" / "step-00000006"):
        assert evaluate(config, place) == pytest.approx(result_of(folder)["metrics"])
    tree["run"]["name"] = "again"
    assert_same(trained(go(tree, resume=str(folder / "checkpoints" / "step-00000003"))), trained(run))
    assert losses_of(tmp_path / "runs" / "again") == losses_of(folder)[3:]


def test_eva_starts_from_samples_and_resumes(tmp_path: Path, models_dir: Path) -> None:
    adapter = {"method": "lora", "init": "eva", "init_samples": 9}
    train = {"max_steps": 4, "checkpoint_every": 2, "checkpoint_keep": 9}
    tree = run_tree("deberta", tmp_path, models_dir, "run", adapter=adapter, train=train)
    start = trained(build_run(preflight.check(parse_config(tree))))
    a = [value for name, value in start.items() if ".lora_A." in name]
    assert all(torch.allclose(value @ value.T, torch.eye(4), atol=1e-5) for value in a)
    run = go(tree)
    tree["run"]["name"] = "again"
    again = go(tree, resume=str(tmp_path / "runs" / "run" / "checkpoints" / "step-00000002"))
    assert_same(trained(again), trained(run))
