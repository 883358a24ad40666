"""Forms that cannot hold an adapter, ranks that it cannot be cut to, and tasks that its model cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.bad_input.place import Case, Place, edit_json


def _export(*arguments: str, **described: Any) -> Callable[[Place], None]:
    """An export of an adapter whose description says so; ``{}`` stands for the folder of the case."""

    def prepare(place: Place) -> None:
        edit_json(place.own_adapter() / "adapter_config.json", **described)
        place.arguments += [argument.format(place.folder) for argument in (*arguments, "--out", "{}/out")]

    return prepare


def _form(name: str, arguments: str, *words: str, **described: Any) -> Case:
    return Case(name, words, _export(*arguments.split(), **described), "export")


def _tasks(name: str, arguments: str, *words: str) -> Case:
    def prepare(place: Place) -> None:
        place.own_adapter()
        place.arguments += arguments.split()

    return Case(name, words, prepare, "evaluate")


FORMS = [
    _form("vllm: a head", "--format vllm", "--format vllm", "modules_to_save=", "head", "export it as merged"),
    _form("vllm: DoRA", "--format vllm", "use_dora=True", "export it as merged", use_dora=True, modules_to_save=None),
    _form("vllm: biases", "--format vllm", "bias='all'", "merged", bias="all", modules_to_save=None),
    _form("vllm: encoder and decoder", "--format vllm", "encoder and decoder", "merged", task_type="SEQ_2_SEQ_LM",
          modules_to_save=None),
    _form("gguf: a classifier", "--format gguf", "--format gguf", "bert model for classification", "llama", "merged"),
    _form("gguf: an unknown type", "--format gguf --gguf-type q2", "--gguf-type", "'q2'", "--help"),
    _form("gguf: a type of another form", "--format merged --gguf-type f32", "--gguf-type f32", "--format gguf"),
    _form("ranks: no number", "--ranks 8,many", "--ranks '8,many'", "whole numbers, as 8,16,32"),
    _form("ranks: none", "--ranks 0", "--ranks 0", "1 or more"),
    _form("ranks: above", "--ranks 2,64", "--ranks 64", "largest rank is", "down alone"),
    _form("ranks: DoRA", "--ranks 2", "DoRA", "plain LoRA", use_dora=True),
    _form("ranks: and a form", "--ranks 2 --format peft", "--ranks", "--format", "--help"),
    _form("ranks: on a hub", "--ranks 2 --push a/b", "--push", "--format"),
    _form("neither a form nor ranks", "", "--format", "--ranks", "--help"),
    _form("a way to cut without ranks", "--format peft --cut-by total", "--cut-by total", "--ranks"),
]  # fmt: skip
TASKS = [
    _tasks("tasks for a classifier", "--lm-eval hellaswag", "--lm-eval", "task.type=causal", "classification"),
    _tasks("an option of tasks alone", "--lm-eval-limit 3", "--lm-eval-limit", "--lm-eval TASKS"),
    _tasks("numbers into nowhere", "--json no/such/file.json", "--json 'no/such/file.json'", "folder"),
]
CASES = [*FORMS, *TASKS]
