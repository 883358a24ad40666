"""Models and adapters on disk that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import zoo
from tests.bad_input.place import Case, Place, edit_json, settings
from tests.runs import write_data
from tests.tiny import tiny_model

CODE = """
from transformers import PretrainedConfig
raise SystemExit("the model's code was run")
class Config(PretrainedConfig):
    model_type = "of_its_own"
"""


def model(name: str, damage: Callable[[Path], Any], *words: str) -> Case:
    """A copy of the model, damaged."""
    return Case(name, ("model.name_or_path=", *words), lambda place: damage(place.own_model()))


def settings_of(name: str, damage: Callable[[Path], Any], *words: str) -> Case:
    """The same, where the message is about what follows from it."""
    return Case(name, words, lambda place: damage(place.own_model()))


def weights(name: str, damage: Callable[[Path], Any], *words: str) -> Case:
    """A copy of the model with weights that are damaged."""
    return Case(name, words, lambda place: damage(place.own_model() / "model.safetensors"))


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def to_pickle(path: Path) -> None:
    """The same weights in the other format."""
    names = {"model.safetensors": "pytorch_model.bin", "adapter_model.safetensors": "adapter_model.bin"}
    torch.save(load_file(path), path.with_name(names[path.name]))
    path.unlink()


def shard(folder: Path) -> None:
    """Two files and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {name: f"model-{1 + number % 2:05d}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def a_shard_is_missing(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def a_shard_is_cut(folder: Path) -> None:
    shard(folder)
    cut(folder / "model-00002-of-00002.safetensors")


def a_tensor_is_in_no_shard(folder: Path) -> None:
    shard(folder)
    edit(folder / "model-00002-of-00002.safetensors", lambda tensors: tensors.pop(sorted(tensors)[0]))


def the_index_is_damaged(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')


def the_index_has_no_map(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def code_of_its_own(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="of_its_own", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text(CODE)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _other_task(place: Place) -> None:
    place.tree["model"]["name_or_path"] = str(tiny_model("llama", place.models))
    place.tree["task"] |= {"type": "seq2seq", "source": "text", "target": "label", "metrics": ["rouge1"]}


def generation(name: str, content: str | bytes, *words: str) -> Case:
    """A model that writes texts, with these contents of ``generation_config.json``."""

    def make(place: Place) -> None:
        place.tree["model"]["name_or_path"] = str(tiny_model("t5", place.models))
        file("generation_config.json", content)(place.own_model())
        texts = {"type": "seq2seq", "source": "text", "target": "label", "metrics": ["rouge1"]}
        place.tree["task"] = {**place.tree["task"], **texts}

    return Case(name, ("model.name_or_path=", "generation_config.json", *words), make)


def _of_kind(place: Place, kind: str, task: str, **keys: Any) -> None:
    """Another tiny model, with a task of its type."""
    place.tree["model"]["name_or_path"] = str(tiny_model(kind, place.models))
    place.tree["task"] |= {"type": task, "source": "text", "target": "label", "metrics": ["rouge1"], **keys}


def _chat_template(place: Place, template: str) -> None:
    _of_kind(place, "llama", "causal")
    (place.own_model() / "chat_template.jinja").write_text(template)


def config_json(**changes: Any) -> Callable[[Path], None]:
    """Keys of ``config.json``."""
    return lambda folder: edit_json(folder / "config.json", **changes)


def file(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """Another content of a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def quantised_by(method: str, **more: Any) -> Callable[[Path], None]:
    """A config that says how its weights were quantised."""
    return config_json(quantization_config={"quant_method": method, **more})


def an_adapter_alone(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')


def of_sentence_transformers(folder: Path) -> None:
    (folder / "0_Transformer").mkdir()
    for path in folder.glob("*.*"):
        path.rename(folder / "0_Transformer" / path.name)
    modules = [{"idx": 0, "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))


def packed(folder: Path) -> None:
    """As GPTQ's tools wrote it: another file says so."""
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    name = "encoder.layer.0.output.dense"
    edit(folder / "model.safetensors", lambda t: t.update({f"{name}.qweight": t.pop(f"{name}.weight").int()}))


def a_pickled_shard_is_missing(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    placed = dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


MODELS = [
    settings("no model", "model.name_or_path='./nowhere'", "no such folder", model={"name_or_path": "./nowhere"}),
    settings("no hub model", "model.name_or_path='no/such'", "hub name", model={"name_or_path": "no/such"}),
    settings("no name of a model", "model.name_or_path='a b c!'", model={"name_or_path": "a b c!"}),
    settings(
        "no package", "package:no_such_package", "not installed", model={"name_or_path": "package:no_such_package/x"}
    ),
    model("an empty folder", empty, "cannot be loaded", "config.json"),
    model("no config.json", lambda f: (f / "config.json").unlink(), "cannot be loaded", "config.json"),
    model("config.json cut short", lambda f: cut(f / "config.json"), "config.json"),
    model("config.json is a list", file("config.json", "[]"), "cannot be loaded"),
    model("config.json is no text", file("config.json", b"\xff\xfe\x00"), "cannot be loaded"),
    model("an unknown architecture", config_json(model_type="nosuch"), "nosuch"),
    model("no architecture", config_json(model_type=None), "cannot be loaded"),
    model("a text for a size", config_json(hidden_size="large"), "hidden_size"),
    model("a size that heads do not divide", config_json(hidden_size=33), "33"),
    settings_of("a negative size", config_json(num_hidden_layers=-1), "adapter.target_modules", "no linear layer"),
    model("an unknown activation", config_json(hidden_act="nosuch"), "nosuch"),
    model("weights of other sizes", config_json(intermediate_size=48), "weights cannot be loaded", "config.json"),
    settings_of("more layers than weights", config_json(num_hidden_layers=3), "layer.2", "complete checkpoint"),
    model("no tokenizer", no_tokenizer, "tokenizer knows no words"),
    model("a tokenizer of another model", config_json(vocab_size=20), "40 tokens", "the model knows 20"),
    model("a damaged tokenizer", file("tokenizer.json", "{"), "cannot be loaded"),
    model("a tokenizer of another kind", file("tokenizer.json", '{"model": 5}'), "cannot be loaded"),
    model("no weights", lambda f: (f / "model.safetensors").unlink(), "no model.safetensors", "complete model"),
    model("code of its own", code_of_its_own, "model.trust_remote_code=true", "read it first"),
    weights("weights cut short", cut, "model.safetensors", "damaged", "copy it again"),
    weights("weights of no bytes", lambda p: p.write_bytes(b""), "model.safetensors", "damaged"),
    weights(
        "weights that are text",
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"),
        "model.safetensors",
        "damaged",
    ),
    weights("a header of many bytes", lambda p: p.write_bytes(b"\xff" * 64), "model.safetensors", "damaged"),
    weights(
        "a layer without weights",
        lambda p: edit(p, lambda t: [t.pop(n) for n in list(t) if "layer.1.output" in n]),
        "layer.1.output",
        "complete checkpoint",
    ),
    Case(
        "a missing shard",
        ("model-00002-of-00002.safetensors", "copy it again"),
        lambda p: a_shard_is_missing(p.own_model()),
    ),
    Case("a shard cut short", ("model-00002-of-00002.safetensors", "damaged"), lambda p: a_shard_is_cut(p.own_model())),
    Case(
        "a tensor in no shard",
        ("model-00002-of-00002.safetensors", "is missing"),
        lambda p: a_tensor_is_in_no_shard(p.own_model()),
    ),
    Case("a damaged index", ("model.safetensors.index.json", "JSON"), lambda p: the_index_is_damaged(p.own_model())),
    Case(
        "an index without a map",
        ("model.safetensors.index.json", "weight_map"),
        lambda p: the_index_has_no_map(p.own_model()),
    ),
    generation("generation settings cut short", '{"num_beams": 4', "cannot be read as JSON", "remove it"),
    generation("generation settings that are no text", b"\xff\xfe\x00", "cannot be read as JSON"),
    generation("generation settings that are a list", "[]", "no object of settings"),
    generation("a text for a penalty", '{"length_penalty": "high"}', "length_penalty=high must be a number"),
    generation("an unknown way to stop", '{"early_stopping": "yes"}', "early_stopping=yes", "'never'"),
    generation("a first token that the model lacks", '{"forced_bos_token_id": 250004}', "must be a token of the model"),
    generation("barred words that are no lists", '{"bad_words_ids": [3]}', "bad_words_ids=[3]", "a list of lists"),
    generation(
        "a forced token that is barred", '{"forced_eos_token_id": 2, "suppress_tokens": [2]}', "suppress_tokens leaves"
    ),
    model(
        "a token without a row in the embeddings",
        lambda f: edit_json(f / "config.json", vocab_size=39),
        "token 'director' is number 39, and the model knows 39",
        "resized",
    ),
    Case(
        "a chat template that fails",
        ("chat template fails", "Roles must alternate", "mend chat_template"),
        lambda place: _chat_template(place, "{{ raise_exception('Roles must alternate') }}"),
    ),
    Case(
        "a chat template that loses the source",
        ("does not show the source once", "'Hello'", "mend chat_template"),
        lambda place: _chat_template(place, "Hello"),
    ),
    Case(
        "a language of a model without any",
        ("task.source_lang='de'", "'bart'", "remove it"),
        lambda place: _of_kind(place, "bart", "seq2seq", source_lang="de"),
    ),
    model("a pickled shard is missing", a_pickled_shard_is_missing, "lack pytorch_model-00001-of-00001.bin"),
    model(
        "weights of Mistral's program",
        lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        "no model.safetensors in it, but consolidated.safetensors",
        "complete model",
    ),
    model("an adapter alone", an_adapter_alone, "is an adapter", "some/base", "export --format merged"),
    model("a folder of sentence-transformers", of_sentence_transformers, "set model.name_or_path to", "0_Transformer"),
    *(
        model(f"quantised by {method}", quantised_by(method), f"quantised by '{method}'", "model.quantization=nf4")
        for method in ("gptq", "awq", "fp8", "hqq", "compressed-tensors", "no_such_method")
    ),
    model("quantised to 8 bits", quantised_by("bitsandbytes", load_in_8bit=True), "8-bit by bitsandbytes"),
    model("quantised to 4 bits", quantised_by("bitsandbytes", load_in_4bit=True), "set model.quantization=nf4"),
    model("packed weights", packed, "dense.qweight is packed", "model.quantization=nf4"),
    Case("a model without the task's form", ("llama", "no seq2seq form", "task.type"), _other_task),
]


def of_the_zoo(kind: str, form: str, **sections: dict[str, Any]) -> Callable[[Place], None]:
    """Another model and task; all else stays right."""

    def make(place: Place) -> None:
        place.tree["model"]["name_or_path"] = str(zoo.saved(kind, place.models, form))
        place.tree["task"] = write_data(place.folder / f"data-{form}", form) | {"num_beams": 1}
        place.set(**sections)

    return make


def _without(kind: str, form: str, *ends: str) -> Callable[[Place], None]:
    """A checkpoint of a class that has no such weights."""

    def make(place: Place) -> None:
        of_the_zoo(kind, form)(place)
        weights = place.own_model() / "model.safetensors"
        edit(weights, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(ends)])

    return make


LEAK = ("see those after them", "task.type='causal'", "every label")
NO_HEAD = ("its checkpoint has no", "a random one is no start", "task.type")
WRONG_CLASSES = [
    *(
        Case(f"causal: {kind}, an encoder", ("model.name_or_path=", *LEAK), of_the_zoo(kind, "causal"))
        for kind in ("roberta", "bert", "electra", "xlm")
    ),
    Case(
        "activations of XLM",
        ("model.gradient_checkpointing=true: XLM", "set it to false"),
        of_the_zoo("xlm", "classification", model={"gradient_checkpointing": True}),
    ),
    *(
        Case(
            f"{key} of XLM",
            (f"{key}: XLM", "(attentions, ffns, layer_norm1, layer_norm2)", "cannot be told"),
            of_the_zoo("xlm", "classification", **sections),
        )
        for key, sections in (
            ("train.lr_decay=0.9", {"train": {"lr_decay": 0.9}}),
            ("adapter.layers='top:1'", {"adapter": {"layers": "top:1"}}),
            ("adapter.type='loratrf'", {"adapter": {"method": "loratrf"}}),
        )
    ),
    Case("causal: no head", (*NO_HEAD, "lm_head.weight"), _without("llama", "causal", "lm_head")),
    Case("seq2seq: no head", (*NO_HEAD, "lm_head.weight"), _without("bart-untied", "seq2seq", "lm_head")),
    Case("seq2seq: an encoder alone", (*NO_HEAD, "decoder."), _without("t5", "seq2seq", "decoder")),
    Case("causal: nothing of the model", NO_HEAD, _without("llama", "causal", "model", "lm_head")),
    Case(
        "targets: an image tower",
        ("adapter.target_modules: 'fc1' would never train", "vision_tower", "leave it out"),
        of_the_zoo("gemma3", "causal", adapter={"target_modules": ["q_proj", "fc1"]}),
    ),
    Case(
        "targets: LED's global layers",
        ("adapter.target_modules: 'value_global' would never train",),
        of_the_zoo("led", "seq2seq", adapter={"target_modules": ["value_global"]}),
    ),
    Case(
        "targets: read by Mamba's kernel",
        ("adapter.target_modules: 'out_proj' would never train",),
        of_the_zoo("mamba", "causal", adapter={"target_modules": ["out_proj"]}),
    ),
    Case(
        "beams of a recurrent model",
        ("task.num_beams=2", "rwkv", "set it to 1"),
        lambda place: (of_the_zoo("rwkv", "causal")(place), place.tree["task"].update(num_beams=2)),
    ),
]


def evaluate(name: str, damage: Callable[[Path], Any], *words: str, command: str = "evaluate") -> Case:
    """A copy of the adapter, damaged."""
    return Case(name, words, lambda place: damage(place.own_adapter()), command)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Tensors of the adapter changed."""
    return lambda folder: edit(folder / "adapter_model.safetensors", change)


def described(**changes: Any) -> Callable[[Path], None]:
    """Keys of ``adapter_config.json``."""
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def one(tensors: dict[str, torch.Tensor], end: str) -> str:
    """The first tensor of that end."""
    return min(name for name in tensors if name.endswith(end))


def other_shape(end: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    """One tensor of another shape."""
    return tensors(lambda t: t.update({one(t, end): torch.zeros(shape)}))


def _of_another_base(place: Place) -> None:
    """An adapter of the same architecture in another size."""
    folder = place.own_adapter()

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in list(tensors.items()):
            if name.endswith("lora_A.weight"):
                tensors[name] = torch.cat([value, value], 1).contiguous()

    edit(folder / "adapter_model.safetensors", double)


def _other_architecture(place: Place) -> None:
    place.own_adapter()
    place.tree["model"]["name_or_path"] = str(tiny_model("deberta", place.models))


def _other_classes(place: Place) -> None:
    place.own_adapter()
    place.tree["task"]["labels"] = ["no", "yes", "perhaps"]


def _no_adapter(place: Place) -> None:
    place.arguments += ["--adapter", str(place.folder / "nowhere")]


def _export(form: str, damage: Callable[[Path], Any]) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        damage(place.own_adapter())
        place.arguments += ["--format", form, "--out", str(place.folder / "out")]

    return make


def _merge_onto(kind: str) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        _export("merged", lambda _: None)(place)
        place.tree["model"]["name_or_path"] = str(tiny_model(kind, place.models))

    return make


QUERY = "encoder.layer.0.attention.self.query"
DAMAGES: list[tuple[str, Callable[[Path], Any], tuple[str, ...]]] = [
    ("no description", lambda f: (f / "adapter_config.json").unlink(), ("holds no adapter_config.json", "a run wrote")),
    ("no weights", lambda f: (f / "adapter_model.safetensors").unlink(), ("holds no adapter_model.safetensors",)),
    ("pickled weights", lambda f: to_pickle(f / "adapter_model.safetensors"), ("adapter_model.bin", "can run code")),
    ("weights cut short", lambda f: cut(f / "adapter_model.safetensors"), ("adapter_model.safetensors", "damaged")),
    ("description cut short", lambda f: cut(f / "adapter_config.json"), ("adapter_config.json", "JSON")),
    ("description is a list", file("adapter_config.json", "[]"), ("adapter_config.json", "one JSON object")),
    ("another method", described(peft_type="IA3"), ("peft_type is 'IA3'; only ", " read")),
    ("a text for a rank", described(r="8"), ("adapter_config.json: r='8'",)),
    ("a list for ranks", described(rank_pattern=[1]), ("adapter_config.json: rank_pattern=[1]",)),
    ("another rank", described(r=3), ("do not make the rank 3",)),
    ("a rank that is no pattern", described(rank_pattern={"(": 3}), ("no pattern",)),
    ("half a layer", tensors(lambda t: t.pop(one(t, "query.lora_B.weight"))), (QUERY, "lora_B missing")),
    ("halves of other ranks", other_shape("query.lora_A.weight", (3, 32)), (QUERY, "lora_A (3, 32)")),
    ("a vector for a matrix", other_shape("query.lora_A.weight", (32,)), (QUERY, "lora_A (32,)")),
    ("no layers", tensors(lambda t: [t.pop(n) for n in list(t) if "lora" in n]), ("no LoRA layers",)),
]
ADAPTERS = [
    Case("adapter: nowhere", ("--adapter", "nowhere", "no folder"), _no_adapter, "evaluate"),
    Case("score, adapter: nowhere", ("--adapter", "nowhere", "no folder"), _no_adapter, "score"),
    *(evaluate(f"adapter: {name}", damage, *words) for name, damage, words in DAMAGES),
    evaluate(
        "adapter: a layer is missing",
        tensors(lambda t: [t.pop(n) for n in list(t) if f"{QUERY}.lora" in n]),
        QUERY,
        "is missing",
    ),
    evaluate(
        "adapter: the head is missing",
        tensors(lambda t: t.pop(one(t, "classifier.weight"))),
        "classifier.weight is missing",
    ),
    evaluate(
        "adapter: a tensor too many",
        tensors(lambda t: t.update({"base_model.model.bert.more": torch.zeros(2)})),
        "bert.more",
        "has none",
    ),
    evaluate(
        "adapter: a layer too many",
        tensors(lambda t: t.update({n.replace("layer.0", "layer.7"): t[n].clone() for n in list(t)})),
        "no layer",
        "layer.7",
    ),
    evaluate(
        "adapter: a head of other classes",
        other_shape("classifier.weight", (3, 32)),
        "classifier.weight is (3, 32)",
        "(2, 32)",
    ),
    Case(
        "adapter: of another size",
        ("(32, 64)", "the model's is (32, 32)", "trained with"),
        _of_another_base,
        "evaluate",
    ),
    evaluate(
        "score, adapter: of DoRA",
        described(use_dora=True),
        "is of adapter.type='dora'",
        "adapter.type='lora' would leave its magnitudes behind",
        "export --format merged",
        command="score",
    ),
    Case("score, adapter: of another size", ("(32, 64)", "trained with"), _of_another_base, "score"),
    Case("adapter: of another architecture", ("no layer", "trained with"), _other_architecture, "evaluate"),
    Case("adapter: of other classes", ("classifier", "trained with"), _other_classes, "evaluate"),
    *(Case(f"export, adapter: {name}", words, _export("padded", damage), "export") for name, damage, words in DAMAGES),
    Case("merge: another architecture", ("no layer", "trained with"), _merge_onto("deberta"), "export"),
    Case("merge: half a layer", (QUERY, "lora_B missing"), _export("merged", DAMAGES[11][1]), "export"),
    Case(
        "merge: a head of other classes",
        ("classifier.weight is (3, 32)",),
        _export("merged", other_shape("classifier.weight", (3, 32))),
        "export",
    ),
]

CASES = [*MODELS, *WRONG_CLASSES, *ADAPTERS]
