"""What a pass through a copy of random weights shows is what the model itself does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from tests import zoo
from tests.bad_input.models import edit
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model import probe as probe_module
from tsqlora_scale.model.linear_layers import in_blocks, linear_layers, resolve_targets
from tsqlora_scale.model.probe import Probe, run_probe
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run

SEE_AHEAD = [
    "roberta", "bert", "xlm-roberta", "camembert", "electra", "ernie", "data2vec", "megatron-bert", "rembert",
    "roformer", "big_bird", "xlnet", "xlm",
]  # fmt: skip
CAUSAL = [
    "roberta-decoder", "bert-decoder", "llama", "gpt2", "openai-gpt", "bloom", "opt", "mixtral", "qwen2_moe", "mamba",
    "mamba2", "rwkv", "jamba", "gemma3", "bart-decoder", "phimoe",
]  # fmt: skip


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 2]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, :7]} if kind in zoo.SEQ2SEQ else {})


def probed(kind: str) -> Probe:
    return run_probe(zoo.auto_of(kind), zoo.CONFIGS[kind](), inputs_of(kind))


@pytest.mark.parametrize("kind", SEE_AHEAD)
def test_encoders_see_ahead(kind: str) -> None:
    assert probed(kind).sees_ahead is True


@pytest.mark.parametrize("kind", CAUSAL + sorted(zoo.SEQ2SEQ))
def test_decoders_do_not(kind: str) -> None:
    assert probed(kind).sees_ahead is False


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("led", ("self_attn.query", "self_attn.key", "self_attn.value")), ("xlnet", ("ff.layer_1", "ff.layer_2")),
     ("opt", ("fc1", "fc2")), ("llama", ()), ("bart", ()), ("mixtral", ()), ("roberta", ()), ("gemma3", ())],
)  # fmt: skip
def test_layers_that_do_not_get_the_batch_first(kind: str, layers: tuple[str, ...]) -> None:
    found = probed(kind).without_batch
    assert all(name.endswith(layers) for name in found)
    assert len(found) == 2 * len(layers)


@pytest.mark.parametrize(
    "kind", ["llama", "mixtral", "mamba", "rwkv", "bart-decoder", "opt", "jamba", "led", "t5", "bart"]
)
def test_models_that_write_do_not_read_padding(
    kind: str, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    described = preflight.check(parse_config(zoo.tree_of(kind, tmp_path, models_dir)))
    padded = probe_module.padded_rows(described.task)
    assert padded is not None
    auto, inputs = described.task.auto_class, probe_module.probe_inputs(described.task)
    assert run_probe(auto, described.model_config, inputs, padded=padded).reads_pads is False
    assert "padding beside it" not in caplog.text


@pytest.mark.parametrize("kind", ["roberta", "llama", "mixtral", "gemma3", "led", "bart-decoder", "jamba"])
def test_windows_and_low_ranks_show_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large models get in the place of weights of their own."""
    expected = probed(kind)
    monkeypatch.setattr(probe_module, "SMALL_MODEL", 0)
    monkeypatch.setattr(probe_module, "SMALL_WEIGHT", 16)
    assert probed(kind) == expected


def test_a_large_model_takes_little_memory() -> None:
    """7 billion weights of one vector."""
    model, _ = probe_module.random_copy(AutoModelForCausalLM, LlamaConfig(), False)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(p.numel() for p in model.parameters()) > 6e9
    assert sum(storages.values()) < 100e6


@pytest.mark.parametrize("kind", ["gemma3", "led", "bart-decoder", "bart", "llama", "mamba2", "xlnet"])
def test_unreached_layers_are_those_that_get_no_gradient(kind: str, models_dir: Path) -> None:
    """Every linear layer of the model itself is adapted; a loss and a backward pass."""
    model = zoo.auto_of(kind).from_pretrained(zoo.saved(kind, models_dir)).train()
    layers = [name for name in linear_layers(model) if in_blocks(name) and "mixer.out_proj" not in name]
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=layers))
    adapted(**inputs_of(kind)).logits.float().logsumexp(-1).sum().backward()
    idle = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]
        for name, param in adapted.named_parameters()
        if ".lora_A." in name and param.grad is None
    }
    assert idle == probed(kind).unreached & set(layers)


def test_the_probe_changes_nothing_outside(models_dir: Path) -> None:
    state, config = torch.get_rng_state(), zoo.CONFIGS["bart-layerdrop"]()
    before = config.to_dict()
    run_probe(zoo.auto_of("bart"), config, inputs_of("bart"))
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before


def test_what_cannot_be_run_tells_only_why() -> None:
    found = run_probe(zoo.auto_of("llama"), zoo.CONFIGS["llama"](), {"nonsense": torch.zeros(1, 3)})
    assert found.failure is not None
    assert found.failure.startswith("KeyError: ")
    assert found == Probe(failure=found.failure, is_sure=True)


def test_a_model_whose_code_fails_is_one_line(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused where a run's own forward would do the same; else it is said."""

    def fails(*_: Any, **__: Any) -> None:
        raise AttributeError("'tuple' object\n has no attribute 'dtype'")

    config = parse_config(zoo.tree_of("llama", tmp_path, models_dir))
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", fails)
    told = r"LlamaForCausalLM fails in the model's own code \(AttributeError: 'tuple' object has no attribute 'dtype'\)"
    with pytest.raises(UserError, match=rf"model\.name_or_path=.*{told}; take another release of transformers"):
        preflight.check(config)
    monkeypatch.setattr(probe_module, "is_small", lambda _: False)
    with caplog.at_level("WARNING"):
        preflight.check(config)
    assert "LlamaForCausalLM fails in the model's own code" in caplog.text


def test_a_router_that_gives_several_things_gets_no_adapter() -> None:
    found = probed("phimoe")
    assert {name.rpartition(".")[2] for name in found.unreached} == {"router"}


@pytest.mark.parametrize("kind", ["roberta", "electra", "xlm-roberta", "xlm"])
def test_an_encoder_is_no_causal_model(kind: str, tmp_path: Path, models_dir: Path) -> None:
    with pytest.raises(UserError, match=r"model\.name_or_path=.*see those after them.*task\.type='causal'"):
        preflight.check(parse_config(zoo.tree_of(kind, tmp_path, models_dir)))
    preflight.check(parse_config(zoo.tree_of(kind, tmp_path, models_dir, "classification")))


def test_an_encoder_that_cannot_be_run_is_refused_by_rule(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqlora_scale.model.pass_check.run_probe", lambda *_, **__: Probe())
    with pytest.raises(UserError, match="see those after them"):
        preflight.check(parse_config(zoo.tree_of("roberta", tmp_path, models_dir)))
    for kind in ("roberta-decoder", "llama", "bart"):
        preflight.check(parse_config(zoo.tree_of(kind, tmp_path, models_dir)))


@pytest.mark.parametrize("kind", ["gemma3", "led", "bart-decoder", "bart-layerdrop", "mamba", "mamba2", "jamba"])
def test_all_that_is_adapted_trains(kind: str, tmp_path: Path, models_dir: Path) -> None:
    run = build_run(preflight.check(parse_config(zoo.tree_of(kind, tmp_path, models_dir))))
    run.engine.module.train()
    for _ in range(3):  # LayerDrop would leave some out
        run.task.losses(run.engine.module, run.task.batch([0, 1])).sum().backward()
        trained = {name: param for name, param in run.engine.module.named_parameters() if param.requires_grad}
        assert trained
        assert [name for name, param in trained.items() if param.grad is None] == []
        run.engine.module.zero_grad(set_to_none=True)


def test_a_pooler_that_the_head_leaves_out_stays_frozen(tmp_path: Path, models_dir: Path) -> None:
    """A checkpoint without it: it is new, as a head is, and would never train."""
    tree = zoo.tree_of("big_bird", tmp_path, models_dir, "classification")
    folder = tmp_path / "model"
    shutil.copytree(tree["model"]["name_or_path"], folder)
    edit(folder / "model.safetensors", lambda t: [t.pop(n) for n in list(t) if "pooler" in n or "classifier" in n])
    tree["model"]["name_or_path"] = str(folder)
    run = build_run(preflight.check(parse_config(tree)))
    trained = [name for name, param in run.engine.module.named_parameters() if param.requires_grad]
    assert any(".classifier." in name for name in trained)
    assert not any("pooler" in name for name in trained)


def test_targets_that_never_train_are_named(tmp_path: Path, models_dir: Path) -> None:
    def check(kind: str, *targets: str) -> list[str]:
        found = preflight.check(
            parse_config(zoo.tree_of(kind, tmp_path, models_dir, adapter={"target_modules": list(targets)}))
        )
        bare = zoo.auto_of(kind).from_config(found.model_config)
        return resolve_targets(bare, list(targets), unreached=found.findings.unreached)

    with pytest.raises(UserError, match=r"target_modules: 'fc1' would never train: model\.vision_tower.*fc1"):
        check("gemma3", "q_proj", "fc1")
    assert all("language_model" in name for name in check("gemma3", "q_proj"))
    with pytest.raises(UserError, match="'query_global' would never train"):
        check("led", "query_global")
    for target in ("out_proj", "x_proj", "dt_proj"):
        with pytest.raises(UserError, match=f"'{target}' would never train"):
            check("mamba", target)


def test_mamba_under_zero_3_ends_before_loading(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqlora_scale.run.build.shards_parameters", lambda _: True)
    monkeypatch.setattr("tsqlora_scale.run.build.build_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for kind in ("mamba", "mamba2"):
        with pytest.raises(UserError, match=f"a {kind} model, whose layers read .* use DDP or ZeRO-2"):
            build_run(preflight.check(parse_config(zoo.tree_of(kind, tmp_path, models_dir))))
    assert not preflight.check(parse_config(zoo.tree_of("llama", tmp_path, models_dir))).findings.reads_past


def test_beams_of_a_recurrent_model(tmp_path: Path, models_dir: Path) -> None:
    with pytest.raises(UserError, match=r"task\.num_beams=2: a rwkv model.*set it to 1"):
        preflight.check(parse_config(zoo.tree_of("rwkv", tmp_path, models_dir, task={"num_beams": 2})))
    for kind in ("rwkv", "mamba"):
        preflight.check(parse_config(zoo.tree_of(kind, tmp_path, models_dir)))


def test_experts_are_said_to_stay_as_they_are(
    tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    preflight.check(parse_config(zoo.tree_of("mixtral", tmp_path, models_dir)))
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("85% of the model's weights (49,408 in ")
    assert "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj)" in line
    assert "4 bits" not in line
    caplog.clear()
    preflight.check(parse_config(zoo.tree_of("mixtral", tmp_path, models_dir, model={"quantization": "nf4"})))
    assert "in 4 bits neither" in caplog.text
    caplog.clear()
    preflight.check(parse_config(zoo.tree_of("llama", tmp_path, models_dir)))
    assert not caplog.records


@pytest.mark.parametrize("kind", ["bart-layerdrop", "m2m_100", "opt"])
def test_layer_drop_is_off_and_said_once(
    kind: str, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = build_run(preflight.check(parse_config(zoo.tree_of(kind, tmp_path, models_dir))))
    assert len([record for record in caplog.records if "LayerDrop" in record.getMessage()]) == 1
    held = [getattr(m, "layerdrop", 0.0) for m in run.engine.module.modules()]
    assert not any(held)
