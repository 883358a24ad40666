"""Config files and values on the command line that are wrong."""

from __future__ import annotations

import math

from tests.bad_input.place import Case, Place, config_file, overrides, settings

NEST = 3000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name}\n  <<: [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)


def _keys_twice(place: Place) -> None:
    place.config.write_text("train: {lr: 1}\nmodel: {}\ntrain: {lr: 2}\n")


FILES = [
    config_file("empty", "", "missing key 'model'", "missing key 'train'", "set it in the file"),
    config_file("comments alone", "# nothing\n", "missing key 'model'"),
    config_file("a list", "- train\n- model\n", "must be a mapping of sections", "train"),
    config_file("a number", "5\n", "must be a mapping of sections"),
    config_file("a word", "hello\n", "must be a mapping of sections"),
    config_file("null", "null\n", "missing key 'model'"),
    config_file("not YAML", "train: [\n", "not valid YAML", "line 2"),
    config_file("JSON cut short", '{"train": {"lr": 1', "not valid YAML", "line 1"),
    config_file("a tab as indentation", "train:\n\tlr: 1\n", "not valid YAML", "line 2", "tab"),
    config_file("key twice", "train: {lr: 1, lr: 2}\n", "duplicate key", "lr", "line 1"),
    config_file("section twice", "train: {lr: 1}\nmodel: {}\ntrain: {lr: 2}\n", "duplicate key", "train", "line 3"),
    config_file("two documents", "train: {}\n---\ntrain: {}\n", "single document"),
    config_file("Latin-1", "run: {name: caf\xe9}\n".encode("latin-1"), "not UTF-8 text", "save it as UTF-8"),
    config_file("UTF-16", "run: {name: x}\n".encode("utf-16"), "not UTF-8 text"),
    config_file("NUL bytes", b"run: {name: 'a\x00b'}\n", "not valid YAML", "#x0000"),
    config_file("a picture", b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8 text"),
    config_file("a Python object", "train: !!python/object/apply:os.getcwd []\n", "not valid YAML", "tag"),
    config_file("an unknown anchor", "train: *nowhere\n", "line 1", "*nowhere has no anchor"),
    config_file("an anchor inside itself", "train: &t {again: *t}\n", "alias *t is inside itself"),
    config_file("a bomb of anchors", BOMB, "line", "anchors"),
    config_file("a bomb of merge keys", MERGES, "anchors"),
    config_file("deep nesting", "[" * NEST + "]" * NEST, "nested"),
    config_file("deep nesting of mappings", "a: {" * NEST + "}" * NEST, "nested"),
    config_file("a megabyte", "# " + "x" * 2**21, "larger than"),
    config_file("a section is a list", "train: [1, 2]\n", "train=[1, 2]", "dictionary"),
    config_file("a section is a number", "train: 5\n", "train=5", "dictionary"),
    config_file("a key is a number", "5: {}\n", "unknown key '5'"),
    config_file("a key is null", "train: {null: 1}\n", "train", "None"),
    config_file("a key is a list", "train: {[1, 2]: 3}\n", "unhashable key", "line 1"),
    config_file("an interpolation to nowhere", "train: {lr: '${nowhere}'}\n", "nowhere", "train.lr"),
    config_file("an interpolation in a circle", "train: {lr: '${train.eps}', eps: '${train.lr}'}\n", "train."),
    config_file("an interpolation without an end", "train: {lr: '${model'}\n", "train.lr"),
    config_file("an interpolation by no resolver", "train: {lr: '${exec:ls}'}\n", "exec"),
    config_file("an environment variable that is not set", "train: {lr: '${oc.env:NO_SUCH_NAME}'}\n", "NO_SUCH_NAME"),
    config_file("no and yes as labels", "task: {labels: [no, yes]}\n", "task.labels.0=False", "quote it: 'no'"),
    config_file("numbers as labels", "task: {labels: [1, 2]}\n", "task.labels.0=1", "quote it: '1'"),
    config_file("nothing as a label", "task: {labels: [a, null]}\n", "task.labels.1=None", "quote it: 'null'"),
    config_file("a truth value for a column", "task: {label: on}\n", "task.label=True", "quote it: 'yes'"),
    config_file("a truth value for texts", "task: {text: no}\n", "task.text=False", "quote it: 'no'"),
    config_file("a time as a label", "task: {labels: [12:30, 9:15]}\n", "task.labels.0=750", "quote it"),
    Case(
        "no such file", ("nowhere.yaml", "does not exist"), lambda p: p.arguments.extend(["--config", "nowhere.yaml"])
    ),
    Case("a folder", ("cannot be read", "give a YAML file"), lambda p: p.config.mkdir()),
    Case("a link to itself", ("cannot be read",), lambda p: p.config.symlink_to(p.config)),
    Case("a file without an end", ("larger than",), lambda p: p.arguments.extend(["--config", "/dev/zero"])),
    Case("a name with a line end", ("does not exist",), lambda p: p.arguments.extend(["--config", "no\nwhere\x1b[1m"])),
    Case("a name with NUL", ("cannot be read",), lambda p: p.arguments.extend(["--config", "no\0where"])),
]

VALUES = [
    settings("unknown section", "unknown key 'scheduel'; did you mean 'schedule'?", scheduel={"start": 1}),
    settings("unknown key", "unknown key 'train.leraning_rate'", train={"leraning_rate": 1}),
    settings("known key elsewhere", "'train.tau'; did you mean 'sampling.tau'?", train={"tau": 1}),
    settings("truth for an integer", "train.batch_size=True", "integer", train={"batch_size": True}),
    settings("truth for a number", "train.lr=True", "number", train={"lr": True}),
    settings("truth for steps", "schedule.start=True", "integer", schedule={"start": True}),
    settings("truth for labels", "task.labels=True", task={"labels": True}),
    settings("truth for a text", "run.name=True", "string", run={"name": True}),
    settings("truth for a size or auto", "scoring.batch_size=False", scoring={"batch_size": False}),
    settings("truth for a weight", "scoring.weights.0=True", scoring={"weights": [True, 1, 1]}),
    settings("an integer for truth", "scoring.keep_sketches=1", "boolean", scoring={"keep_sketches": 1}),
    settings("an integer for truth or auto", "sampling.stratify=1", "auto", sampling={"stratify": 1}),
    settings("a word for truth", "model.gradient_checkpointing='yes'", model={"gradient_checkpointing": "yes"}),
    settings("a word for a number", "train.lr='fast'", "number", train={"lr": "fast"}),
    settings("a number in quotes", "train.lr='0.1'", "number", train={"lr": "0.1"}),
    settings("an integer in quotes", "train.max_steps='5'", "integer", train={"max_steps": "5"}),
    settings("NaN", "train.lr=nan", "finite", train={"lr": math.nan}),
    settings("infinite", "train.lr=inf", "finite", train={"lr": math.inf}),
    settings("infinite fraction", "sampling.keep_fraction=inf", sampling={"keep_fraction": math.inf}),
    settings("NaN fraction", "sampling.keep_fraction=nan", sampling={"keep_fraction": math.nan}),
    settings("NaN dropout", "adapter.dropout=nan", adapter={"dropout": math.nan}),
    settings("NaN steps", "schedule.start=nan", schedule={"start": math.nan}),
    settings("NaN weight", "scoring.weights.1=nan", scoring={"weights": [1, math.nan, 1]}),
    settings("negative", "train.lr=-0.1", "greater than 0", train={"lr": -0.1}),
    settings("negative steps", "scoring.warmup_steps=-3", scoring={"warmup_steps": -3}),
    settings("no steps", "train.max_steps=0", train={"max_steps": 0}),
    settings("a fraction of a step", "train.max_steps=1.5", "integer", train={"max_steps": 1.5}),
    settings("more steps than a number holds", "train.max_steps", train={"max_steps": 10**30}),
    settings("a batch larger than memory", "train.batch_size", train={"batch_size": 10**30, "micro_batch_size": 1}),
    settings("a rank larger than any matrix", "adapter.r", adapter={"r": 10**9}, allocation={"r_max": 10**9}),
    settings("an infinite number of epochs", "train.epochs", train={"max_steps": None, "epochs": 1e300}),
    settings("a huge seed", "run.seed", run={"seed": 2**40}),
    settings("a text for a list", "target_modules", "list", adapter={"target_modules": 5}),
    settings("a number for a text or a list", "task.text=5", "list", task={"text": 5}),
    settings("a list for a text", "task.label=['label']", "string", task={"label": ["label"]}),
    settings("not one of the values", "model.dtype='float32'", "'fp32', 'bf16' or 'fp16'", model={"dtype": "float32"}),
    settings("a run's name that leaves the folder", "run.name='../x'", run={"name": "../x"}),
    settings(
        "data chosen by the development set",
        "scoring.convergence",
        "'target' is gone",
        "development set",
        "set 'alignment'",
        scoring={"convergence": "target"},
    ),
    settings("both lengths", "exactly one of 'max_steps' and 'epochs'", train={"epochs": 2}),
    settings("no length", "exactly one of 'max_steps' and 'epochs'", train={"max_steps": None}),
    settings("a schedule that never fires", "schedule", "50", "60", schedule={"start": 50, "end": 60}),
    settings("a schedule that ends before it starts", "schedule", schedule={"start": 9, "end": 4}),
    settings("quality without scores", "scoring.enabled", "selector: full", scoring={"enabled": False}),
    settings("bounds of ranks", "allocation.r_min", allocation={"r_min": 9}, sensitivity={"enabled": True}),
    settings("a micro batch that does not divide", "micro_batch_size", train={"micro_batch_size": 5}),
    settings(
        "both sources of data", "'path'", "'name'", task={"dataset": {"path": "x", "train_file": "y", "name": "z"}}
    ),
    settings("no label column", "'label' must name", task={"label": None}),
    settings("no metrics", "task.metrics=[]", task={"metrics": []}),
    settings("NUL in a path", "run.output_dir", "NUL", run={"output_dir": "a\0b"}),
    settings("a path that no disk takes", "run.output_dir", run={"output_dir": "x" * 5000}),
    settings("a run's name that no disk takes", "run.name", run={"name": "x" * 300}),
    settings("NUL in a model's name", "model.name_or_path", model={"name_or_path": "./a\0b"}),
    settings("a long value", "train.lr='xxx", train={"lr": "x" * 10**6}),
    settings("a value with line ends and escapes", "train.lr='\\n\\x1b", train={"lr": "\n\x1b[31m"}),
    settings("a key with line ends and escapes", "unknown key", train={"a\n\x1b[31mb": 1}),
    settings("a key with a right-to-left mark", "unknown key", train={"a\u202eb": 1}),
]

OVERRIDES = [
    overrides("no value", ["train.lr"], "override 'train.lr'", "section.key=value"),
    overrides("no key", ["=5"], "override '=5'", "section.key=value"),
    overrides("a value that is no YAML", ["train.lr=["], "override 'train.lr=['"),
    overrides("a value of many lines", ["train.lr=[\n\n"], "override"),
    overrides(
        "an unknown key on the command line", ["train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'?"
    ),
    overrides("an unknown section on the command line", ["trian.lr=1"], "unknown key 'trian'; did you mean 'train'?"),
    overrides("a key below a value", ["train.lr.x=1"], "train.lr"),
    overrides("a section turned into a number", ["train=5"], "train=5"),
    overrides("an empty part", ["train..lr=1"], "train"),
    overrides("a place in a list", ["train.betas[0]=0.5"], "train.betas"),
    overrides("a text for a number on the command line", ["train.lr=abc"], "train.lr='abc'"),
    overrides("empty for a number", ["train.lr="], "train.lr"),
    overrides("truth on the command line", ["train.batch_size=true"], "train.batch_size=True"),
    overrides("an interpolation on the command line", ["train.lr=${nowhere}"], "train.lr", "nowhere"),
    overrides("half an interpolation on the command line", ["train.lr=${"], "train.lr"),
    overrides(
        "a bomb on the command line",
        [
            "train.betas={a: &a [1,1,1,1,1,1,1,1,1],"
            + "".join(f"{n}: &{n} [{','.join([f'*{b}'] * 9)}]," for b, n in zip("abcdefghi", "bcdefghij", strict=True))
            + "}"
        ],
        "anchors",
    ),
    overrides("nesting on the command line", ["train.lr=" + "[" * NEST + "]" * NEST], "nested"),
    overrides("bytes that are no text", ["task.prefix=\udcff"], "task.prefix", "UTF-8"),
    Case("an option that ends in nothing", ("--resume", "auto"), lambda p: p.arguments.extend(["--resume", ""])),
]

CASES = [*FILES, *VALUES, *OVERRIDES]
