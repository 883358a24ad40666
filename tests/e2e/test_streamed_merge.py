"""A merge layer by layer is the merge of the whole model to the bit, and needs no memory for the model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from tests import zoo
from tests.runs import write_config
from tests.tiny import tiny_tokenizer
from tsqlora_scale.api import export
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model import export_formats, tensor_stream
from tsqlora_scale.model.streamed_merge import NotLayerByLayer, StreamedMerge
from tsqlora_scale.model.weight_files import PREFIX


def adapter_on(kind: str, task: str, folder: Path, models: Path, **options: Any) -> Path:
    """An adapter of large effect, with ranks and scalings of their own, and a head where the task has one."""
    base = zoo.auto_of(kind, task).from_pretrained(zoo.saved(kind, models, task))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pattern = {"rank_pattern": {".*0.*": 5}, "alpha_pattern": {".*0.*": 7.5}}
        model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, **pattern, **copy.deepcopy(options)))
        for name, param in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                torch.nn.init.normal_(param, std=0.3)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


HEAD = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("llama", "causal", {"target_modules": "all-linear"}, {}),
    ("llama", "causal", {"target_modules": ["q_proj"]}, {"dtype": "bf16"}),
    ("llama", "causal", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}, {}),
    ("llama", "causal", {"target_modules": ["down_proj"], "use_rslora": True}, {}),
    ("llama", "causal", {"target_modules": ["q_proj", "up_proj"]}, {"quantization": "nf4"}),
    ("qwen2-tied", "causal", {"target_modules": ["k_proj"]}, {}),
    ("gpt2", "causal", {"target_modules": ["c_attn", "c_fc"]}, {}),
    ("gpt2", "causal", {"target_modules": ["c_attn", "c_fc"]}, {"quantization": "nf4"}),
    ("mixtral", "causal", {"target_modules": ["q_proj"]}, {}),
    ("gemma3", "causal", {"target_modules": "model.language_model.*q_proj"}, {}),
    ("bert", "classification", {"target_modules": ["query", "intermediate.dense"], **HEAD}, {}),
    ("roberta", "classification", {"target_modules": ["query"], **HEAD}, {"quantization": "nf4"}),
]


def merges(adapter: Path, tree: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """The folders of the two merges."""
    config = parse_config(tree)
    folders = folder / "streamed", folder / "whole"
    with pytest.MonkeyPatch.context() as patch:
        for out in folders:
            out.mkdir()
            notes = export_formats.merge(adapter, out, export_formats.described(adapter, config))
            assert any("as a whole" in note for note in notes) == (out.name == "whole"), notes
            patch.setattr(export_formats, "StreamedMerge", refuse)
    return folders


def refuse(*_: Any, **__: Any) -> StreamedMerge:
    raise NotLayerByLayer("the test wants the other way")


def same_values(first: Any, second: Any) -> None:
    """Two models are the same to the bit."""
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize(("kind", "task", "options", "model"), CASES, ids=lambda value: str(value))
def test_the_same_to_the_bit(
    kind: str, task: str, options: dict[str, Any], model: dict[str, Any], tmp_path: Path, models_dir: Path
) -> None:
    adapter = adapter_on(kind, task, tmp_path, models_dir, **options)
    streamed, whole = merges(adapter, zoo.tree_of(kind, tmp_path, models_dir, task, model=model), tmp_path)
    auto = zoo.auto_of(kind, task)
    same_values(auto.from_pretrained(streamed), auto.from_pretrained(whole))
    for name in ("config.json", "generation_config.json"):
        there = [(folder / name).read_text() if (folder / name).exists() else None for folder in (streamed, whole)]
        assert there[0] == there[1], name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_files_that_are_4_bit_already(kind: str, tmp_path: Path, models_dir: Path) -> None:
    """By bitsandbytes, with statistics that are quantised again; GPT-2's weights lie the other way round."""
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[kind]
    adapter = adapter_on(kind, "causal", tmp_path, models_dir, target_modules=targets)
    source = zoo.saved(kind, models_dir, "causal")
    how = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    zoo.auto_of(kind).from_pretrained(source, quantization_config=how).save_pretrained(tmp_path / "packed")
    t.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "packed")
    tree = zoo.tree_of(kind, tmp_path, models_dir, model={"quantization": "nf4"})
    tree["model"]["name_or_path"] = str(tmp_path / "packed")
    streamed, whole = merges(adapter, tree, tmp_path)
    auto = zoo.auto_of(kind)
    same_values(auto.from_pretrained(streamed), auto.from_pretrained(whole))
    assert (streamed / "config.json").read_text() == (whole / "config.json").read_text()


MEASURED = """
import json, sys
from pathlib import Path
from tsqlora_scale.api import export
from tsqlora_scale.commands.main import main
from tsqlora_scale.config.load import load_config

def size(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

place = Path(sys.argv[1])
config = load_config(place / "config.yaml")
export(place / "adapter", "merged", place / "first", config=load_config(place / "small.yaml"))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = size("VmRSS")
export(place / "adapter", "merged", place / "out", config=config)
print(json.dumps(size("VmHWM") - before))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path, models_dir: Path) -> None:
    """A model of 300 MB in a process that has merged a small one: its peak is that of a tensor, 17 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 1024, "max_position_embeddings": 64}
    written = 0
    for name, layers in (("small", 1), ("large", 7)):
        model_config = t.LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=8, pad_token_id=0)
        folder = tmp_path / name
        model_config.architectures = ["LlamaForCausalLM"]
        model_config.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        with torch.device("meta"):
            bare = t.LlamaForCausalLM(model_config)
        entries = [
            tensor_stream.StreamedTensor(key, tuple(value.shape), torch.float32, partial(torch.zeros, value.shape))
            for key, value in bare.state_dict().items()
        ]
        written = sum(entry.nbytes for entry in entries)
        tensor_stream.write_shards(entries, folder, shard_bytes=100 * 10**6)
    adapter_of_zeros(tmp_path / "adapter")
    for name, file in (("small", "small.yaml"), ("large", "config.yaml")):
        tree = zoo.tree_of("llama", tmp_path, models_dir)
        tree["model"]["name_or_path"] = str(tmp_path / name)
        write_config(tmp_path / file, tree)
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = int(json.loads(done.stdout.splitlines()[-1]))
    assert written > 280 * 10**6
    assert grown < 120 * 10**6, grown


def adapter_of_zeros(folder: Path) -> None:
    """One that fits any of the two models: of the first layer."""
    layer = f"{PREFIX}model.layers.0.self_attn.q_proj"
    folder.mkdir()
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 1024), f"{layer}.lora_B.weight": torch.zeros(1024, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    LoraConfig(r=2, target_modules=["model.layers.0.self_attn.q_proj"], task_type="CAUSAL_LM").save_pretrained(folder)


def test_several_files(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the size that is asked for, and their index."""
    adapter = adapter_on("llama", "causal", tmp_path, models_dir, target_modules=["q_proj", "down_proj"])
    base = zoo.auto_of("llama").from_pretrained(zoo.saved("llama", models_dir, "causal"))
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.arange(5, 32).reshape(3, 9)
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
    monkeypatch.setattr(tensor_stream, "SHARD_BYTES", 20_000)
    out = tmp_path / "out"
    export(adapter, "merged", out, config=parse_config(zoo.tree_of("llama", tmp_path, models_dir)))
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 25_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    opened = zoo.auto_of("llama").from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
