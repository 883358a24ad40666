"""What others find: an adapter that names its base, a card, and a push to a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from tests.classifiers import class_logits, tiny_classifier
from tests.hub_stub import Hub, hub_here
from tests.runs import go, run_tree, write_config
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.locations import lasting
from tsqlora_scale.model.model_card import model_card, result_beside
from tsqlora_scale.run.training_run import Run

FRESH = """
import json, sys
sys.modules["tsqlora_scale"] = None  # as if it were not installed
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import pipeline
names = {0: "no", 1: "yes", 2: "perhaps"}
model = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1], id2label=names).eval()
ids = torch.arange(5, 32).reshape(3, 9)
ids[:, -1] = 2
logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
merged = pipeline("text-classification", model=sys.argv[2])("a good film")[0]
print(json.dumps([logits.tolist(), merged["label"]]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> tuple[Run, Path]:
    """A run of three classes on a base without a head, named by a path from the working directory; its config."""
    place = tmp_path_factory.mktemp("place")
    tree = run_tree(
        "bert", place, models_dir, "run", train={"max_steps": 3},
        allocation={"policy": "fixed"}, sampling={"selector": "full"},
    )  # fmt: skip
    tree["task"]["labels"] = ["no", "yes", "perhaps"]
    tree["model"]["name_or_path"] = os.path.relpath(tree["model"]["name_or_path"])
    return go(tree), write_config(place / "config.yaml", tree)


def export(run: Run, config: Path, form: str, out: Path, *more: str) -> int:
    adapter = str(run.record.folder / "adapter")
    return cli.main(
        ["export", "--adapter", adapter, "--format", form, "--out", str(out), "--config", str(config), *more]
    )


def test_adapter_and_merged_model_open_elsewhere(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, config = trained
    assert export(run, config, "merged", tmp_path / "merged") == 0
    adapter = run.record.folder.absolute() / "adapter"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(adapter), "merged"],
        capture_output=True, text=True, cwd=tmp_path, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    logits, label = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(logits), class_logits(run.engine.module), rtol=0, atol=1e-5)
    assert label in ("no", "yes", "perhaps")


def test_a_pipeline_opens_the_adapter(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base that has the classes."""
    from transformers import pipeline

    base = tiny_classifier("bert", tmp_path / "base", ["no", "yes"])
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"max_steps": 3}, allocation={"policy": "fixed"})
    tree["model"]["name_or_path"], tree["sampling"] = os.path.relpath(base), {"selector": "full"}
    run = go(tree)
    adapter = run.record.folder.absolute() / "adapter"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    answer = pipeline("text-classification", model=str(adapter), top_k=None)(["a good film"])[0]
    text = run.task.tokenizer("a good film", return_tensors="pt")
    expected = run.engine.module.eval()(**text).logits.softmax(-1)[0]
    found = {one["label"]: one["score"] for one in answer}
    assert found["no"] == pytest.approx(expected[0].item(), abs=1e-4)


def test_places_that_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lasting("base", key="k") == lasting("./x/../base", key="k") == str(tmp_path.resolve() / "base")
    assert lasting("owner/name", key="k") == "owner/name"
    assert lasting("package:tests/e2e", key="k") == str(Path(__file__).parent)
    with pytest.raises(UserError, match="not installed"):
        lasting("package:no_such_package/x", key="k")


def test_the_revision_is_kept(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = trained
    kept = run.config
    try:
        run.config = kept.model_copy(update={"model": kept.model.model_copy(update={"revision": "abc123"})})
        folder = run.save_adapter(run.kept["metrics"])
        assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "abc123"
    finally:
        run.config = kept
        run.save_adapter(run.kept["metrics"])


def test_the_card(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, config = trained
    exported = {form: tmp_path / form for form in ("padded", "merged")}
    run_dir = run.record.folder
    base = str(Path(str(run.config.model.name_or_path)).resolve())
    from tsqlora_scale.model.model_card import write_card

    result = json.loads((run_dir / "result.json").read_text())
    write_card(run_dir / "adapter", run.config, result)  # another test may have saved the adapter again
    for form, out in exported.items():
        assert export(run, config, form, out) == 0
    for folder in (run_dir / "adapter", *exported.values()):
        card = ModelCard.load(folder / "README.md")
        merged = folder == exported["merged"]
        data: Any = card.data
        assert data.base_model == base
        assert data.library_name == ("transformers" if merged else "peft")
        assert (data.license, data.pipeline_tag, data.metrics) == ("unknown", "text-classification", ["accuracy"])
        train = Path(run.config.task.dataset.path or "") / "train.jsonl"
        assert f"`train.jsonl`, {train.stat().st_size:,} bytes" in card.text
        assert "`dev.jsonl`" in card.text
        assert "48 samples" in card.text
        assert f"{result['metrics']['accuracy']:.4f} |" in card.text
        assert "12 layers: 12 of rank 4" in card.text
        assert "python launch/train.py --config config.yaml" in card.text
        (code,) = [part.split("```")[0] for part in card.text.split("```python\n")[1:]]
        opened: dict[str, Any] = {}
        exec(code.replace('"."', repr(str(folder))), opened)
        torch.testing.assert_close(class_logits(opened["model"]), class_logits(run.engine.module), rtol=0, atol=1e-5)
    assert "every layer has rank 4" in (exported["padded"] / "README.md").read_text()


def test_files_of_a_held_out_set_are_named_one_by_one(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = trained
    shards = [f"dev-{number:05}-of-00020.jsonl" for number in range(20)]  # one name of all would be too long for a path
    dataset = run.config.task.dataset.model_copy(update={"dev_file": {"news": shards, "mail": "mail.jsonl"}})
    card = model_card(run.config.with_task(dataset=dataset), {}, merged=False)
    assert all(f"`{name}`" in card for name in [*shards, "mail.jsonl"])


def test_a_card_tells_the_result_of_the_adapters_own_run(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"steps": 3}')
    assert result_beside(tmp_path / "adapter") == {"steps": 3}
    assert result_beside(tmp_path / "adapter-x1y2") == {}, "written out for a checkpoint, among other files"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_here() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_push(
    form: str, trained: tuple[Run, Path], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = trained
    out = tmp_path / "out"
    assert export(run, config, form, out, "--push", "me/films") == 0
    repo = hub.repos["me/films"]
    assert repo["private"] is True
    assert repo["files"].keys() == {path.name for path in out.iterdir()}
    assert "Bearer hf_secret" in hub.tokens
    for name, content in repo["files"].items():
        assert name == "README.md" or content == (out / name).read_bytes()
    card: Any = ModelCard(repo["files"]["README.md"].decode()).data
    assert card.base_model is None, "a folder of this machine, which hubs refuse"
    assert "base_model" in (out / "README.md").read_text()
    printed = capsys.readouterr().out
    assert f"pushed: {hub.url}/me/films (private)" in printed
    assert ("names a folder of this machine" in printed) == (form == "peft")


def test_pushes_that_are_public(
    trained: tuple[Run, Path], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = trained
    assert export(run, config, "peft", tmp_path / "one", "--push", "me/open", "--public") == 0
    assert hub.repos["me/open"]["private"] is False
    files = dict(hub.repos["me/open"]["files"])
    assert export(run, config, "padded", tmp_path / "two", "--push", "me/open") == 2
    assert "open to everybody; give --public" in capsys.readouterr().err
    assert hub.repos["me/open"]["files"] == files
    assert export(run, config, "padded", tmp_path / "three", "--push", "me/open", "--public") == 0


def fails(run: Run, config: Path, out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert export(run, config, "peft", out, "--overwrite", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_pushes_that_fail(
    trained: tuple[Run, Path], hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, config = trained
    out = tmp_path / "out"
    for status in (401, 403, 500):
        hub.refuses = status
        assert f"'me/films': {hub.url} refuses" in fails(run, config, out, capsys, "--push", "me/films")
    assert "--push 'a b/c/d'" in fails(run, config, out, capsys, "--push", "a b/c/d")
    assert "give --push REPO" in fails(run, config, out, capsys, "--public")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in fails(run, config, out, capsys, "--push", "me/films")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails(run, config, out, capsys, "--push", "me/films")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("tsqlora_scale.model.hub_push.get_token", lambda: None)
    assert "no token is there" in fails(run, config, out, capsys, "--push", "me/films")


def test_other_ranks_export_nothing(
    trained: tuple[Run, Path], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = trained
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert export(run, config, "peft", tmp_path / "out", "--push", "me/films") == 0
    assert not (tmp_path / "out").exists()
    assert hub.repos == {}


def test_merged_model_is_the_base_with_its_labels(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, config = trained
    assert export(run, config, "merged", tmp_path / "merged") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
