"""Generation settings that a base comes with: none of them stops the loading or changes what an evaluation writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.runs import go, run_tree
from tests.tiny import tiny_model
from tsqlora_scale.api import export
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.model.generation_files import settings_that_load
from tsqlora_scale.run import preflight
from tsqlora_scale.run.adapted_model import build_base
from tsqlora_scale.tasks.evaluation import evaluate
from tsqlora_scale.tasks.objectives.generation import read_back

OWN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "several texts": {"num_return_sequences": 3},
    "more texts than beams": {"num_return_sequences": 3, "num_beams": 2},
    "an unknown cache": {"cache_implementation": "of its own"},
    "a wrong watermark": {"watermarking_config": {"greenlist_ratio": 7.0}},
    "a wrong limit": {"max_new_tokens": 0},
    "scores, groups, phrases, samples": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "num_beam_groups": 2,
        "num_beams": 4,
        "diversity_penalty": 0.3,
        "stop_strings": ["the"],
        "do_sample": True,
        "temperature": 0.2,
        "min_length": 56,
    },
}


def written(tree: dict[str, Any], metrics: list[str], *, adapted: bool = False) -> dict[str, float]:
    tree = {**tree, "task": {**tree["task"], "metrics": metrics}}
    described = preflight.check(parse_config(tree))
    base: Any
    base, _ = build_base(described, device=torch.device("cpu"))
    if adapted:
        kind = described.task.peft_task_type
        base = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type=kind))
    return evaluate(base, described.task, World(), batch_size=4)


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_none_of_them_changes_an_evaluation(kind: str, place: str, tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree(kind, tmp_path, models_dir, "run")
    folder = tmp_path / "own"
    shutil.copytree(tiny_model(kind, models_dir), folder)
    ids = json.loads((folder / "generation_config.json").read_text())
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    plain = (folder / place).read_text()
    tree["model"]["name_or_path"] = str(folder)
    expected = written(tree, ["rougeL", "exact_match"])
    for name, own in OWN.items():
        if place == "config.json" and name in ("an unknown cache", "a wrong watermark", "a wrong limit"):
            continue  # no model is built of such a config.json, and the message says so
        (folder / place).write_text(json.dumps(json.loads(plain) | {"eos_token_id": ids["eos_token_id"]} | own))
        assert written(tree, ["rougeL", "exact_match"], adapted=name == "several texts") == expected, name


def test_what_loads_is_left_to_the_library(tmp_path: Path, models_dir: Path) -> None:
    folder = tiny_model("t5", models_dir)
    assert settings_that_load(str(folder)) == {}
    assert settings_that_load(str(tmp_path)) == {}
    settings = {"num_return_sequences": 3, "forced_bos_token_id": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    found = settings_that_load(str(tmp_path))["generation_config"]
    assert (found.num_return_sequences, found.forced_bos_token_id) == (None, 7)


@pytest.mark.parametrize("form", ["merged", "whole"])
def test_a_base_that_loads_with_a_warning_is_exported_too(form: str, tmp_path: Path, models_dir: Path) -> None:
    """``temperature`` without ``do_sample``, and another pad token than is used, as old bases have them."""
    tree = run_tree("llama", tmp_path, models_dir, "run", train={"max_steps": 1}, adapter={"method": "lora"})
    del tree["scoring"]
    if form == "whole":
        tree["adapter"] = {"method": "full"}
    folder = tmp_path / "own"
    shutil.copytree(tiny_model("llama", models_dir), folder)
    path = folder / "generation_config.json"
    own = json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6, "pad_token_id": None}
    path.write_text(json.dumps(own))
    tree["model"]["name_or_path"] = str(folder)
    go(tree)
    export(tmp_path / "runs" / "run", "merged", tmp_path / "out", config=parse_config(tree))
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (found["temperature"], found["top_p"], found.get("do_sample", False)) == (0.9, 0.6, False)
    assert found["pad_token_id"] is not None
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_blanks_before_signs_are_read_back() -> None:
    """A tokenizer may be set to take them away, which an answer's reference does not do."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -1.0) for piece in ("▁Bonjour", "▁!", "▁a", "▁,", "▁b"))]
    inner = Tokenizer(Unigram(pieces, unk_id=0))
    inner.pre_tokenizer, inner.decoder = Metaspace(), MetaspaceDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", clean_up_tokenization_spaces=True)
    for text in ("Bonjour !", "a , b"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) != text
        assert read_back(tokenizer, [*ids, 1]) == text
