"""The file of a comparison: arms, tasks, seeds, a grid of learning rates, a budget."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from math import ceil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.fields import LARGEST, PositiveFloat, PositiveInt, Section
from tsqlora_scale.config.yaml_tree import check_strings, read_tree

Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*$", max_length=40)]

#: Keys of a run's length.
LENGTHS = ("train.max_steps", "train.epochs")
#: Keys under ``task.`` that are the choice of data itself.
ARMS_OWN_TASK_KEYS = ("task.query", "task.train_on_query")


class Changed(Section):
    """Something with values of config keys, which are the keys with a dot."""

    #: ``section.key`` and value.
    changes: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _dotted(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return {} if tree is None else tree
        changes = {key: value for key, value in tree.items() if "." in str(key)}
        others = {key: value for key, value in tree.items() if "." not in str(key)}
        return {**others, "changes": {**others.get("changes", {}), **changes}}


class ComparedTask(Changed):
    """A task: a config file, and values that win over it."""

    config: Annotated[str, Field(min_length=1)]
    #: For tables; the task's name by default.
    title: str | None = None
    #: The only variants that it is run in; none: all.
    variants: list[str] | None = None


class Arm(Changed):
    """A method: values that win over every task's."""

    #: Its own learning rates in the place of the comparison's.
    lrs: list[PositiveFloat] | None = None
    #: Values on single tasks, by the task's name.
    by_task: dict[str, dict[str, Any]] = {}
    #: Values in single variants, by the variant's name.
    by_variant: dict[str, dict[str, Any]] = {}
    #: The only variants that it has; none: all.
    variants: list[str] | None = None


class Tuning(Section):
    """How learning rates are chosen."""

    #: Seeds of the runs that choose; none of them is reported.
    seeds: list[Seed] = [100, 101]
    #: Choose on one half of the held-out rows and report the other. Without, only the seeds differ.
    half: bool = True


class Budget(Section):
    """What every run may spend, alike for all arms; one of these."""

    #: Optimizer steps.
    steps: PositiveInt | None = None
    #: Samples drawn, with repetition.
    samples: PositiveInt | None = None
    #: Tokens, by the mean length of the pool's rows as the arm cuts them.
    tokens: PositiveInt | None = None
    #: Seconds of training, scoring and resizing, by a short pilot run of every arm on every task.
    seconds: PositiveFloat | None = None
    #: Steps of a pilot.
    pilot_steps: PositiveInt = 20

    def steps_of(self, batch_size: int) -> int | None:
        """Optimizer steps, as far as they follow from the budget alone."""
        return self.steps if self.samples is None else ceil(self.samples / batch_size)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("steps", "samples", "tokens", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of steps, samples, tokens and seconds, and has {given or 'none'}")
        return self


class Comparison(Section):
    """What is compared."""

    #: Of the folder below ``runs/compare``, where the command line names no other; the file's name by default.
    name: Name = "comparison"
    #: Above the tables.
    title: str = ""
    #: Said under it: which models and data stand for which.
    stand_ins: str = ""
    tasks: Annotated[dict[Name, ComparedTask], Field(min_length=1)]
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    #: Every arm in each of these, such as ranks; an arm's name is then ``ARM-VARIANT``.
    variants: dict[Name, dict[str, Any]] = {}
    #: The arm that the others are tested against, within each variant.
    baseline: str | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2]
    #: Learning rates to choose from; empty: each task's or arm's own, and no tuning.
    lrs: list[PositiveFloat] = []
    tuning: Tuning = Tuning()
    #: None: each task's own length.
    budget: Budget | None = None
    #: Values of config keys for all runs.
    common: dict[str, Any] = {}
    #: Published numbers, printed beside ours and compared with nothing: arm -> task -> number or text.
    published: dict[str, dict[str, float | str]] = {}
    #: Checkpoints of finished runs stay.
    keep_checkpoints: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Comparison:
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"'baseline: {self.baseline}' is none of the arms: {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            for task in arm.by_task:
                if task not in self.tasks:
                    raise ValueError(f"'arms.{name}.by_task' has {task!r}, which is no task: {_list(self.tasks)}")
            tuned, budgeted = bool(self.rates(arm)), self.budget is not None
            single = (*arm.by_task.values(), *arm.by_variant.values())
            for key in (*arm.changes, *(key for changes in single for key in changes)):
                reason = _why_not(key, tuned=tuned, budgeted=budgeted)
                if reason is not None:
                    raise ValueError(f"'arms.{name}' sets {key!r}, which is alike for all arms ({reason}); remove it")
        limited: dict[str, Iterable[str] | None] = {f"arms.{n}.variants": arm.variants for n, arm in self.arms.items()}
        limited |= {f"arms.{name}.by_variant": arm.by_variant for name, arm in self.arms.items()}
        limited |= {f"tasks.{name}.variants": task.variants for name, task in self.tasks.items()}
        for place, variants in limited.items():
            wrong = next((each for each in variants or () if each not in self.variants), None)
            if wrong is not None:
                raise ValueError(f"'{place}' has {wrong!r}, which is none: {_list(self.variants)}")
        names = [name for variant in self.variants for name in self._named(variant)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two arms with their variants are called {twice!r}; rename an arm or a variant")
        places = {"common": self.common, **{f"variants.{name}": each for name, each in self.variants.items()}}
        places |= {f"tasks.{name}": task.changes for name, task in self.tasks.items()}
        for place, changes in places.items():
            wrong = next((key for key in changes if key.startswith("run.")), None)
            if wrong is not None:
                raise ValueError(f"'{place}' sets {wrong!r}, and folders and seeds are the comparison's; remove it")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"'seeds' has one twice: {self.seeds}")
        both = set(self.seeds) & set(self.tuning.seeds)
        if both and any(self.rates(arm) for arm in self.arms.values()):
            raise ValueError(f"seed {min(both)} is in 'seeds' and in 'tuning.seeds': what is reported is not tuned on")
        if not self.tuning.seeds and any(self.rates(arm) for arm in self.arms.values()):
            raise ValueError("'tuning.seeds' is empty, and there are learning rates to choose from")
        return self

    def rates(self, arm: Arm) -> list[float]:
        """Learning rates that are tried for an arm; none where there is no choice."""
        return self.lrs if arm.lrs is None else arm.lrs

    @property
    def methods(self) -> dict[str, tuple[Arm, str, str]]:
        """Every arm in every variant by its whole name, in order: the arm, its own name, and the variant's."""
        if not self.variants:
            return {name: (arm, name, "") for name, arm in self.arms.items()}
        return {
            whole: (self.arms[name], name, variant)
            for variant in self.variants
            for whole, name in self._named(variant).items()
        }

    def _named(self, variant: str) -> dict[str, str]:
        """The arms of a variant by their whole names."""
        arms = (name for name, arm in self.arms.items() if arm.variants is None or variant in arm.variants)
        return {f"{name}-{variant}": name for name in arms}


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "there are none"


def _why_not(key: str, *, tuned: bool, budgeted: bool) -> str | None:
    """Why an arm may not set a key: it is a method, and does not bring its own model, data, length or seed."""
    if key == "train.lr":
        return "'lrs' choose it" if tuned else None
    if key in LENGTHS:
        return "'budget' sets it" if budgeted else None
    if key.startswith("pretrain.") and budgeted:
        return "'budget' does not count its steps"
    if key.startswith("run."):
        return "folders and seeds are the comparison's"
    if key in ("model.name_or_path", "model.revision"):
        return "a task brings its model"
    return "a task brings its data" if key.startswith("task.") and key not in ARMS_OWN_TASK_KEYS else None


def read_comparison(path: str | Path, *, small: bool = False) -> Comparison:
    """Read the file of a comparison.

    Args:
        small: with the values of its section ``small``, which takes the place of others: its ``arms`` are merged into
            the arms (an arm or a key of one that is null goes), every other key replaces. ``published`` goes.

    Raises:
        UserError: naming the file, the key, the value and the remedy.
    """
    path = Path(path)
    known = [*Comparison.model_fields, "small"]
    tree = read_tree(path, [], sections=known)
    check_strings(tree)
    smaller = tree.pop("small", None)
    if small:
        if not isinstance(smaller, dict):
            raise UserError(f"{path}: has no section 'small', which --small asks for")
        tree = _smaller(tree, smaller)
    tree = {"name": path.stem, **tree}
    for name, changes in (("common", tree.get("common")), *_mappings(tree)):
        wrong = next((key for key in changes or {} if "." not in str(key)), None) if isinstance(changes, dict) else None
        if wrong is not None:
            raise UserError(f"{path}: {name}: {shown(wrong)} is not of the form section.key: value")
    try:
        return Comparison.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(dict.fromkeys(map(_described, error.errors())))}") from None


def _mappings(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """Sections whose keys are all config keys."""
    variants = tree.get("variants")
    found = [(f"variants.{name}", each) for name, each in variants.items()] if isinstance(variants, dict) else []
    arms = tree.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        for key in ("by_task", "by_variant"):
            own = arm.get(key) if isinstance(arm, dict) else None
            found += [(f"arms.{name}.{key}.{one}", each) for one, each in own.items()] if isinstance(own, dict) else []
    return found


def _smaller(tree: dict[str, Any], smaller: dict[str, Any]) -> dict[str, Any]:
    merged = {**tree, **{key: value for key, value in smaller.items() if key != "arms"}}
    merged.pop("published", None)
    arms, changed = tree.get("arms"), smaller.get("arms") or {}
    if not isinstance(arms, dict) or not isinstance(changed, dict):
        return {**merged, "arms": changed or arms}
    arms = dict(arms)
    for name, arm in changed.items():
        before = arms.get(name)
        if arm is None:
            arms.pop(name, None)
        elif isinstance(arm, dict) and isinstance(before, dict):
            arms[name] = {key: value for key, value in {**before, **arm}.items() if arm.get(key, "") is not None}
        else:
            arms[name] = arm
    for name, arm in arms.items():  # of tasks and variants that the small one does not have
        if not isinstance(arm, dict):
            continue
        tasks, variants = merged.get("tasks"), merged.get("variants")
        for key, known in (("by_task", tasks), ("by_variant", variants), ("variants", variants)):
            own = arm.get(key)
            if isinstance(own, dict):
                arm = {**arm, key: {each: value for each, value in own.items() if each in (known or {})}}
            elif isinstance(own, list):
                arm = {**arm, key: [each for each in own if each in (known or {})] or None}
        arms[name] = arm
    return {**merged, "arms": arms}


def _described(error: Any) -> str:
    """A mistake in one line."""
    place = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        known = _known(place)
        near = difflib.get_close_matches(place[-1], known, 1)
        return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}")
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"missing key {key!r}; set it"
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={shown(error['input'])}: {message[0].lower()}{message[1:]}"


def _known(place: list[str]) -> list[str]:
    """Keys where an unknown one stands."""
    kinds: dict[str, type[Section]] = {"tasks": ComparedTask, "arms": Arm, "tuning": Tuning, "budget": Budget}
    kind = kinds.get(place[0], Comparison) if len(place) > 1 else Comparison
    dotted = ["section.key"] if kind in (ComparedTask, Arm) else []
    return [*(name for name in kind.model_fields if name != "changes"), *dotted]


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """Values of config keys as a command line has them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]
