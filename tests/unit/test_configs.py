"""The packaged configs say what they mean to, and a wrong config is one clear error."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.config_trees import MINIMAL, message, tree
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import load_config, parse_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.run.plan import plan_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))
COMPARISONS = sorted((CONFIGS / "compare").glob("*.yaml"))
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(ACCELERATE) - set(COMPARISONS))

#: Rows of the training splits.
TRAIN_ROWS = {
    "mnli": 392_702,
    "sst2": 67_349,
    "cola": 8_551,
    "qqp": 363_846,
    "qnli": 104_743,
    "rte": 2_490,
    "mrpc": 3_668,
    "stsb": 5_749,
    "EdinburghNLP/xsum": 204_045,
    "databricks/databricks-dolly-15k": 15_011,
}
#: Metrics of the paper's table; the first decides which checkpoint is best.
GLUE_METRICS = {
    "mnli": ["accuracy"],
    "sst2": ["accuracy"],
    "cola": ["matthews_correlation"],
    "qqp": ["accuracy", "f1"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "mrpc": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


# --- the files under configs/ -------------------------------------------------------------------------------------


def test_every_expected_config_is_there() -> None:
    names = {path.relative_to(CONFIGS).as_posix() for path in RUNS}
    assert {f"glue/{task}.yaml" for task in GLUE_METRICS} <= names
    assert {"quickstart.yaml", "xsum_r2.yaml", "xsum_r6.yaml", "llm/qlora_zero3.yaml"} <= names
    assert {path.stem for path in ACCELERATE} == {"ddp", "fsdp2", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_run_configs_plan(path: Path, world_size: int) -> None:
    config = load_config(path)
    dataset = config.task.dataset
    rows = dataset.max_train_samples or TRAIN_ROWS.get(dataset.subset or dataset.name or "")
    assert rows is not None, "add the dataset to TRAIN_ROWS"
    plan = plan_run(config, rows, world_size)
    assert plan.micro_batch_size * plan.accumulation * plan.world_size == config.train.batch_size
    assert plan.schedule is not None
    assert plan.scoring_step is not None
    assert len(plan.schedule.events) > 2
    # phi is relative to the first scores: rank events before them would not follow the data's quality
    assert plan.scoring_step <= plan.schedule.events[0]


@pytest.mark.parametrize("task", GLUE_METRICS)
def test_glue_configs_hold_the_papers_values(task: str) -> None:
    config = load_config(CONFIGS / "glue" / f"{task}.yaml")
    assert config.model.name_or_path == "microsoft/deberta-v3-base"
    assert (config.task.dataset.name, config.task.dataset.subset) == ("nyu-mll/glue", task)
    assert config.task.metrics == GLUE_METRICS[task]
    assert config.task.num_labels == {"mnli": 3, "stsb": 1}.get(task, 2)
    assert (config.train.batch_size, config.train.epochs, config.sampling.tau) == (64, 50, 0.7)
    assert (config.adapter.r, config.scoring.preset) == (10, "paper")
    assert config.train.micro_batch_size is not None


@pytest.mark.parametrize("task", GLUE_METRICS)
def test_glue_schedules_end_where_their_comment_says(task: str) -> None:
    path = CONFIGS / "glue" / f"{task}.yaml"
    config = load_config(path)
    total = plan_run(config, TRAIN_ROWS[task], 1).total_steps
    (comment,) = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("  end:"))
    end, rest = comment.removeprefix("  end: ").split("  # ")
    stated_total, stabilise = rest.split(" steps")[0].split(" - ")
    assert int(stated_total) == total
    assert int(end) == total - int(stabilise) == config.schedule.end


@pytest.mark.parametrize("rank", [2, 6])
def test_xsum_configs_hold_the_papers_values(rank: int) -> None:
    config = load_config(CONFIGS / f"xsum_r{rank}.yaml")
    assert (config.model.name_or_path, config.adapter.r) == ("facebook/bart-base", rank)
    assert (config.train.epochs, config.train.batch_size, config.train.lr) == (10, 32, 5e-4)
    assert (config.train.lr_schedule, config.train.weight_decay) == ("linear", 0)
    assert (config.task.max_length, config.task.max_target_length, config.task.num_beams) == (1024, 160, 8)
    assert config.task.metrics == ["rouge1", "rouge2", "rougeL"]
    end = plan_run(config, TRAIN_ROWS["EdinburghNLP/xsum"], 1).total_steps - 10_000
    assert (config.schedule.start, config.schedule.end, config.schedule.every) == (8000, end, 200)


def test_xsum_configs_differ_in_rank_alone() -> None:
    r2, r6 = (load_config(CONFIGS / f"xsum_r{rank}.yaml").model_dump() for rank in (2, 6))
    r2["adapter"]["r"], r2["run"]["name"] = 6, "xsum-r6"
    assert r2 == r6


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_configs_are_what_they_are_called(path: Path) -> None:
    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == "no"  # a YAML `no` without quotes would be False
    assert loaded.use_cpu is False
    if path.stem == "ddp":
        assert loaded.distributed_type == DistributedType.MULTI_GPU
        return
    if path.stem == "fsdp2":
        assert loaded.distributed_type == DistributedType.FSDP and loaded.fsdp_config["fsdp_version"] == 2
        return
    assert loaded.distributed_type == DistributedType.DEEPSPEED
    assert loaded.deepspeed_config["zero_stage"] == int(path.stem.removeprefix("zero")[0])
    device = "cpu" if path.stem.endswith("offload") else "none"
    for kind in ("param", "optimizer"):
        assert loaded.deepspeed_config[f"offload_{kind}_device"] == device


# --- the checks of config.py --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("scheduel", "schedule"),
        ("schedule.strat", "schedule.start"),
        ("task.dataset.trian_file", "task.dataset.train_file"),
        ("train.quantization", "model.quantization"),
        ("train.tau", "sampling.tau"),
        ("tau", "sampling.tau"),
        ("adapter.lora_dropout", "adapter.dropout"),
    ],
)
def test_unknown_key_names_the_nearest(unknown: str, nearest: str) -> None:
    assert f"unknown key {unknown!r}; did you mean {nearest!r}?" in message(tree(**{unknown.replace(".", "__"): 1}))


def test_unknown_key_like_no_other_lists_the_section() -> None:
    text = message(tree(sampling__xyzzyplugh=1))
    assert text.endswith(
        "unknown key 'sampling.xyzzyplugh'; known here: selector, tau, keep_fraction, soft, replacement, "
        "stratify, redundancy, similarity, unbiased, max_weight, use, less, less_gradients, file"
    )


@pytest.mark.parametrize("key", ["model", "task", "train", "model.name_or_path", "task.type"])
def test_missing_key(key: str) -> None:
    config = tree()
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    del node[last]
    assert f"missing key {key!r}" in message(config)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.lr", "fast", "train.lr='fast': input should be a valid number"),
        ("train.lr", 0, "train.lr=0: input should be greater than 0"),
        ("train.lr", float("nan"), "train.lr=nan: input should be a finite number"),
        ("train.max_steps", 1.5, "train.max_steps=1.5: input should be a valid integer"),
        ("train.lr_warmup", -1, "train.lr_warmup=-1: input should be greater than or equal to 0"),
        ("train.betas", [0.9], "train.betas=[0.9]: list should have at least 2 items"),
        ("train", None, "train=None: input should be a valid dictionary"),
        ("model.dtype", "float32", "model.dtype='float32': input should be 'fp32', 'bf16' or 'fp16'"),
        ("task.text", 5, "task.text=5: input should be a valid list"),
        ("task.labels", ["a", 5], "task.labels.1=5: input should be a valid string"),
        ("task.metrics", [], "task.metrics=[]: list should have at least 1 item"),
        ("adapter.target_modules", "all", "adapter.target_modules='all': input should be 'auto'"),
        ("sampling.keep_fraction", 1.5, "sampling.keep_fraction=1.5: input should be less than or equal to 1"),
        ("scoring.weights", [1, 2], "scoring.weights=[1, 2]: list should have at least 3 items"),
        ("schedule.every", 0, "schedule.every=0: input should be greater than or equal to 1"),
        ("run.name", "a/b", "run.name='a/b': string should match pattern"),
    ],
)
def test_wrong_value_names_key_value_and_remedy(key: str, value: Any, words: str) -> None:
    assert words in message(tree(**{key.replace(".", "__"): value}))


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"task__dataset": {}}, "task: 'dataset' names no data"),
    ({"task__dataset__name": "hub/name"}, "task.dataset: needs exactly one of 'path'"),
    ({"task__dataset": {"path": "data"}}, "task.dataset: 'path' needs 'train_file'"),
    ({"task__text": []}, "task: 'text' must name one or two columns"),
    ({"task__text": ["a", "b", "c"]}, "task: 'text' must name one or two columns"),
    ({"task__label": None}, "task: 'label' must name the label column"),
    ({"task__type": "regression", "task__label": None}, "task: 'label' must name the label column"),
    ({"task__dataset": {"name": "x", "dev_file": "y"}}, "'dev_file' is of local files"),
    ({"task__dataset": {"train_file": []}}, "'train_file' names no file"),
    ({"task__dataset": {"train_file": ["a.tsv", ""]}}, "'train_file' names no file"),
    ({"task__dataset": {"train_file": "a.tsv", "dev_file": {}}}, "'dev_file' names nothing"),
    ({"task__dataset": {"train_file": "a.tsv", "dev_file": {"a/b": "x.tsv"}}}, "'a/b' is no name of a held-out set"),
    ({"task__type": "seq2seq", "task__source": "document"}, "task: 'source' and 'target' must name"),
    ({"task__type": "causal", "task__target": "response"}, "task: 'source' and 'target' must name"),
    ({"allocation__r_min": 5, "allocation__r_max": 4}, "allocation: 'r_max' (4) must not be below 'r_min' (5)"),
    ({"allocation__phi_max": 0.4}, "allocation: 'phi_max' (0.4) must not be below 'phi_min' (0.5)"),
    ({"train": {}}, "train: needs exactly one of 'max_steps' and 'epochs'"),
    ({"train__epochs": 1}, "train: needs exactly one of 'max_steps' and 'epochs'"),
    ({"train__micro_batch_size": 5}, "train: 'batch_size' (32) must be a multiple of 'micro_batch_size' (5)"),
    ({"allocation__r_min": 9}, "'adapter.r' (8) must lie between 'allocation.r_min' (9)"),
    ({"allocation__r_max": 7}, "'adapter.r' (8) must lie between 'allocation.r_min' (1) and 'allocation.r_max' (7)"),
    (
        {"resize__grow_init": "gradient", "sensitivity__estimator": "adapter"},
        "'resize.grow_init: gradient' needs the gradients of the base's weights",
    ),
    ({"scoring__enabled": False}, "'sampling.selector: quality' needs scores"),
]


@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS, ids=[words for _, words in CONTRADICTIONS])
def test_contradictions(changes: dict[str, Any], words: str) -> None:
    text = message(tree(**changes))
    assert words in text
    for remedy in ("needs scores; to switch", "does not see; choose"):
        text = text.replace(remedy, "")
    assert ";" not in text  # one fault, one message


def test_bounds_do_not_bind_methods_of_fixed_rank() -> None:
    assert parse_config(tree(adapter__method="lora", allocation__r_max=4)).adapter.r == 8
    assert parse_config(tree(adapter__method="lora", scoring__enabled=False)).scores_data is False


def test_a_pool_is_scored_with_the_ranks_that_a_file_gives() -> None:
    """Training starts with them; ranks that move have not moved yet."""
    config = parse_config(tree(allocation__policy="file", allocation__file="ranks.yaml"))
    assert config.for_scoring().allocation == config.allocation
    assert parse_config(tree(allocation__policy="gain")).for_scoring().allocation.policy == "fixed"


def test_several_faults_are_all_named() -> None:
    text = message(tree(train__lr=-1, model__dtyp="fp32", sampling__tau=0))
    assert "\n" not in text
    assert all(key in text for key in ("train.lr=-1", "model.dtyp", "sampling.tau=0"))


# --- reading ------------------------------------------------------------------------------------------------------


def test_overrides_win_and_the_last_wins(file: Path) -> None:
    config = load_config(file, ["train.max_steps=20", "train.lr=1e-3", "task.text=[a,b]", "train.max_steps=30"])
    assert (config.train.max_steps, config.train.lr, config.task.text) == (30, 1e-3, ["a", "b"])
    assert config.task.label == "label"  # what they do not name stays


def test_override_can_unset(file: Path) -> None:
    config = load_config(file, ["train.max_steps=null", "train.epochs=2", "task.prefix=a=b"])
    assert (config.train.max_steps, config.train.epochs, config.task.prefix) == (None, 2, "a=b")


@pytest.mark.parametrize("override", ["train.lr", "=5", " =5", "--train.lr=1", "train.lr=[", "train.lr={a"])
def test_override_syntax(file: Path, override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(file, [override])
    assert str(caught.value).startswith(f"override {override!r}")


def test_override_of_an_unknown_key(file: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'train.lrr'; did you mean 'train.lr'\?"):
        load_config(file, ["train.lrr=1"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: caf\xe9\n", "not UTF-8 text"),
        (b"train: [\n", "not valid YAML"),
        (b"train: {lr: 1}\ntrain: {lr: 2}\n", "duplicate key train"),
        (b"train: {lr: 1, lr: 2}\n", "duplicate key lr"),
        (b"a: 1\n---\nb: 2\n", "expected a single document"),
        (b"- train\n- model\n", "must be a mapping of sections (run, model, task"),
        (b"5\n", "must be a mapping of sections (run, model, task"),
        (b"train: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"train: {lr: '${nowhere}'}\n", "Interpolation key 'nowhere' not found"),
        (b"", "missing key 'model'"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert words in str(caught.value)
    assert "broken.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml' does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


def test_configs_are_immutable(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(file).train.lr = 1.0  # type: ignore[misc]


# --- round trip and fuzz ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(written) == config


YAML_TRAPS = [
    "1e3",
    "on",
    "0x1",
    "1_000",
    "2020-01-01",
    "~",
    "null",
    "1:30",
    "",
    " a",
    "- a",
    "a: b",
    "${a}",
    "\\${",
    "é",
]
names = st.sampled_from(YAML_TRAPS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8
)
names |= st.text("${}\\ab", max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(names, min_size=1, max_size=2), prefix=names, lr=st.floats(1e-300, 1e300), end=st.floats(0.01, 0.99)
)
def test_round_trip_of_any_text_and_number(
    tmp_path_factory: pytest.TempPathFactory, text: list[str], prefix: str, lr: float, end: float
) -> None:
    config = parse_config(tree(task__text=text, task__prefix=prefix, train__lr=lr, schedule__end=end))
    written = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    written.write_text(config.to_yaml(), encoding="utf-8", newline="")
    assert load_config(written) == config


@settings(max_examples=100, deadline=None)
@given(content=st.text(max_size=60) | st.text("[]{}:,-?!&*#|>'\"%@`$ \n\tab10", max_size=60))
def test_any_text_is_a_config_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError):  # no text this short names a model, a task and a length
        load_config(path)


SECTIONS = sorted(Config.model_fields)
KEYS = sorted({key for field in Config.model_fields.values() for key in field.annotation.model_fields})  # type: ignore[union-attr]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), v)
)
sections = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), values, max_size=4)


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=5), sections | values, max_size=3))
def test_any_mapping_is_a_config_or_one_error(changes: dict[str, Any]) -> None:
    config = copy.deepcopy(tree())
    for section, value in changes.items():
        both = isinstance(config.get(section), dict) and isinstance(value, dict)
        config[section] = config[section] | value if both else value
    with contextlib.suppress(UserError):
        assert isinstance(parse_config(config), Config)


def test_config_does_not_import_torch() -> None:
    code = "import sys, tsqlora_scale.config.schema; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_need_not_be_written() -> None:
    """Text and metrics as single texts, the metric of the type, classes that the data will give."""
    config = parse_config(tree(task__text="text", task__metrics="f1", task__labels=None))
    assert (config.task.text, config.task.metrics, config.task.labels) == (["text"], ["f1"], None)
    texts = {"task__source": "a", "task__target": "b"}
    types = {"classification": "accuracy", "regression": "pearson", "seq2seq": "rougeL", "causal": "rougeL"}
    for kind, metric in types.items():
        assert parse_config(tree(task__type=kind, task__metrics=None, **texts)).task.metrics == [metric]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("labels: [no, yes]", ("task.labels.0=False", "quote it: 'no'", "task.labels.1=True", "quote it: 'yes'")),
        ("labels: [1, 2.5]", ("task.labels.0=1", "quote it: '1'", "task.labels.1=2.5", "quote it: '2.5'")),
        ("labels: [a, null]", ("task.labels.1=None", "quote it: 'null'")),
        ("labels: [a, ~]", ("task.labels.1=None", "quote it")),
        ("labels: [12:30]", ("task.labels.0=750", "quote it")),
        ("label: no", ("task.label=False", "quote it: 'no'")),
        ("text: [yes]", ("task.text.0=True", "quote it: 'yes'")),
        ("text: off", ("task.text=False", "quote it: 'no'")),
        ("prefix: 5", ("task.prefix=5", "quote it: '5'")),
        ("metrics: [on]", ("task.metrics.0=True", "quote it")),
    ],
)
def test_what_yaml_has_made_of_a_text(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    """It is said in one line that quotes are missing, also on the command line."""
    (tmp_path / "a.yaml").write_text(f"task: {{{line}}}\n")
    (tmp_path / "b.yaml").write_text("{}\n")
    key, _, value = line.partition(": ")
    for name, overrides in (("a.yaml", []), ("b.yaml", [f"task.{key}={value}"])):
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / name, overrides)
        assert all(word in str(caught.value) for word in words), caught.value
        assert "integer" not in str(caught.value).replace("task.seed", "")


def test_what_has_been_quoted_stays_so(tmp_path: Path) -> None:
    labels = ["no", "yes", "1", "null", "12:30", "2020-01-01"]
    config = parse_config(tree(task__labels=labels))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "c.yaml").task.labels == labels
