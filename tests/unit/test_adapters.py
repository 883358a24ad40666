"""Which layers are adapted in each architecture, and that the exported scaling is the trained one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from tests.runs import run_tree
from tests.tiny import AUTO, tiny_model
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import ModelConfig
from tsqlora_scale.model.base_model import (
    _new_module,
    initialise_new,
    load_base,
    skeleton,
)
from tsqlora_scale.model.linear_layers import heads_of, resolve_targets
from tsqlora_scale.model.weight_files import check_base_weights
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run

#: kind -> (adapted layers of its two blocks each, linear layers outside the blocks)
EXPECTED = {
    "bert": (12, ["bert.pooler.dense", "classifier"]),
    "mpnet": (12, ["classifier.dense", "classifier.out_proj"]),
    "deberta": (12, ["pooler.dense", "classifier"]),
    "bart": (2 * 6 + 2 * 10, ["lm_head"]),
    "t5": (2 * 7 + 2 * 11, ["lm_head"]),
    "llama": (14, ["lm_head"]),
    "gpt2": (8, ["lm_head"]),
}


def bare(kind: str, models: Path) -> nn.Module:
    auto = AUTO.get(kind, AutoModelForSequenceClassification)
    return skeleton(auto, AutoConfig.from_pretrained(tiny_model(kind, models), num_labels=2))


@pytest.mark.parametrize("kind", EXPECTED)
def test_blocks_are_adapted_and_heads_are_not(models_dir: Path, kind: str) -> None:
    model = bare(kind, models_dir)
    count, heads = EXPECTED[kind]
    targets = resolve_targets(model, "auto")
    assert len(targets) == len(set(targets)) == count
    assert sorted(heads_of(model)) == sorted(heads)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert set(targets) | set(heads) == linears, "every linear layer is one or the other"
    assert all(p.is_meta for p in model.parameters()), "nothing was loaded to find out"


def test_names_suffixes_and_mistakes(models_dir: Path) -> None:
    model = bare("bert", models_dir)
    assert resolve_targets(model, ["query"]) == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert resolve_targets(model, ["query", "self.query"]) == resolve_targets(model, ["query"])
    assert resolve_targets(model, ["bert.pooler.dense"]) == ["bert.pooler.dense"], "a full name outside is heeded"
    assert not any("attention.output" in n for n in resolve_targets(model, ["intermediate.dense"]))
    for wrong in ("uery", "layer", "LayerNorm"):
        with pytest.raises(UserError, match=rf"adapter\.target_modules: '{wrong}'.*known: .*query"):
            resolve_targets(model, [wrong])


def test_auto_needs_blocks() -> None:
    with pytest.raises(UserError, match=r"adapter\.target_modules='auto'.*name the layers"):
        resolve_targets(nn.ModuleDict({"only": nn.Linear(2, 2)}), "auto")


@settings(max_examples=60)
@given(r0=st.integers(1, 64), alpha=st.floats(0.5, 256), rank=st.integers(1, 256))
def test_alpha_pattern_gives_the_trained_scaling_back(r0: int, alpha: float, rank: int) -> None:
    """What an exported layer's ``alpha / r`` is in PEFT, to the last place of a double."""
    scaling = alpha / r0
    config = LoraConfig(r=r0, lora_alpha=alpha, target_modules=["0"], rank_pattern={"0": rank},  # type: ignore[arg-type]
                        alpha_pattern={"0": scaling * rank})  # fmt: skip
    layer = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config).base_model.model[0]  # type: ignore[arg-type]
    assert layer.r["default"] == rank
    assert layer.scaling["default"] == pytest.approx(scaling, rel=2**-52, abs=0)


def test_a_missing_pooler_trains_and_missing_layers_are_an_error(models_dir: Path) -> None:
    model = bare("bert", models_dir)
    assert _new_module(model, "classifier.weight") == "classifier"
    assert _new_module(model, "bert.pooler.dense.bias") == "bert.pooler"
    for key in ("bert.encoder.layer.1.output.dense.weight", "bert.embeddings.word_embeddings.weight"):
        with pytest.raises(UserError, match="not a new head"):
            _new_module(model, key)


def test_a_model_without_its_pooler(tmp_path: Path, models_dir: Path) -> None:
    """As saved from a masked language model."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("bert", models_dir), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"})
    tree = run_tree("bert", tmp_path, models_dir, "run")
    tree["model"]["name_or_path"] = str(folder)
    run = build_run(preflight.check(parse_config(tree)))
    trained = {
        n.replace(".modules_to_save.default", "") for n, p in run.engine.module.named_parameters() if p.requires_grad
    }
    assert {"base_model.model.bert.pooler.dense.weight", "base_model.model.classifier.weight"} < trained


@pytest.mark.parametrize("sharded", [True, False])
def test_a_4_bit_base_on_a_gpu_under_zero_3(models_dir: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    """Transformers refuses a device_map there."""
    seen: dict[str, object] = {}

    class Loader:
        @staticmethod
        def from_pretrained(*_: object, **kwargs: object) -> None:
            seen.update(kwargs)
            raise OSError("enough")

    monkeypatch.setattr("tsqlora_scale.model.base_model.shards_while_loading", lambda: sharded)
    path = str(tiny_model("bert", models_dir))
    with pytest.raises(UserError, match="enough"):
        load_base(path, ModelConfig(name_or_path=path, quantization="nf4"), auto_class=Loader,
                  model_config=AutoConfig.from_pretrained(path), unquantised=[], generator=torch.Generator(),
                  device=torch.device("cuda", 0))  # fmt: skip
    assert ("device_map" in seen) != sharded


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what a process has mapped")
@pytest.mark.parametrize(
    ("kind", "quantization", "kept"), [("llama", "none", True), ("llama", "nf4", False), ("bart", "nf4", False)]
)
def test_a_4_bit_base_leaves_its_file(
    kind: str, tmp_path: Path, models_dir: Path, quantization: str, kept: bool
) -> None:
    """Else the weights stay resident that were packed. A buffer of BART's is a view of the file."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(kind, models_dir), folder)
    tree = run_tree(kind, tmp_path, models_dir, "run")
    tree["model"] |= {"name_or_path": str(folder), "quantization": quantization}
    run = build_run(preflight.check(parse_config(tree)))
    mapped = str(folder / "model.safetensors") in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert mapped is kept, run.engine.name


def test_new_parameters_follow_names_not_order() -> None:
    def drawn(order: list[str]) -> dict[str, torch.Tensor]:
        model = nn.ModuleDict({"b": nn.Linear(3, 2), "a": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
        initialise_new(model, order, std=0.5, generator=torch.Generator().manual_seed(0))
        return {name: param.detach() for name, param in model.named_parameters()}

    names = ["a.weight", "a.bias", "b.weight", "b.bias", "norm.weight", "not.there"]
    first, second = drawn(names), drawn(names[::-1])
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["a.weight"], first["b.weight"])
    assert first["a.bias"].abs().sum() == 0
    assert torch.equal(first["norm.weight"], torch.ones(3))


def load_bert(folder: Path) -> nn.Module:
    loaded, _ = load_base(
        str(folder),
        ModelConfig(name_or_path=str(folder)),
        auto_class=AutoModelForSequenceClassification,
        model_config=AutoConfig.from_pretrained(folder),
        unquantised=[],
        generator=torch.Generator().manual_seed(0),
    )
    return loaded


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.place, "run")


def test_a_base_in_the_older_format_is_read_and_its_code_is_not_run(tmp_path: Path, models_dir: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("bert", models_dir), folder)
    safe = load_bert(folder).state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    check_base_weights(folder, key="model.name_or_path")
    for name, value in load_bert(folder).state_dict().items():
        torch.testing.assert_close(value, safe[name], rtol=0, atol=0)
    torch.save(weights | {"trap": Trap(tmp_path / "trapped")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        load_bert(folder)
    assert not (tmp_path / "trapped").exists()
