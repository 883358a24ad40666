"""The data, and what is learned from it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tsqlora_scale.config.dataset_section import DatasetConfig
from tsqlora_scale.config.fields import (
    LARGEST,
    IsoDate,
    KeptOrNot,
    PositiveFloat,
    PositiveInt,
    Section,
    name_or_extension,
)
from tsqlora_scale.config.prompt_template import check_prompt_keys

#: The metrics of a task that names none.
DEFAULT_METRICS = {"classification": "accuracy", "regression": "pearson", "seq2seq": "rougeL", "causal": "rougeL"}


#: Keys of a set of a mixture that name columns, as the task's own do.
SET_COLUMNS = ("text", "label", "source", "target", "input", "messages", "tools", "completion", "system")
#: Those of which only the sets that name them have any.
_OWN_COLUMNS = ("input", "tools", "completion", "system")

#: Columns of ours in the pool of a mixture.
OUR_COLUMNS = {"sample_id", "data_set", "row_weight"}


class MixedSetConfig(Section):
    """One data set of several: its rows, its share of the draws, and its columns where they are not the task's."""

    #: Goes before the ids of its samples and the names of its metrics: letters, digits, ``_``, ``-``, ``.``.
    name: str
    dataset: DatasetConfig
    #: Its share of the draws beside those of the other sets, all of which then need one; they need not add up to 1.
    weight: PositiveFloat | None = None
    #: As the task's key: its one or two columns of text.
    text: list[str] = []
    #: Its column of classes or numbers.
    label: str | None = None
    #: Its column of the text that is given. Beside sets of conversations such rows are conversations of one exchange.
    source: str | None = None
    #: Its column of the text that is to be written.
    target: str | None = None
    #: Its column whose text follows the source after a blank line.
    input: str | None = None
    #: Its column of conversations.
    messages: str | None = None
    #: Its column of tools.
    tools: str | None = None
    #: Its column of the messages that follow and are learned.
    completion: str | None = None
    #: Its column of system prompts.
    system: str | None = None
    #: Text put before every source of it, behind the task's own prefix.
    prefix: str = ""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, tree: Any) -> Any:
        return (
            {**tree, "text": [tree["text"]]} if isinstance(tree, dict) and isinstance(tree.get("text"), str) else tree
        )

    @model_validator(mode="after")
    def _named_well(self) -> MixedSetConfig:
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name == "query":
            raise ValueError(f"{self.name!r} is no name of a data set: use letters, digits, '_', '-', '.', not 'query'")
        if not self.dataset.is_named:
            raise ValueError(f"'dataset' of {self.name!r} names no data: set 'train_file', or 'name' of a hub dataset")
        if self.messages is not None and (self.source or self.target or self.input or self.prefix):
            raise ValueError(f"{self.name!r} names whole conversations by 'messages', and columns of texts; remove one")
        beside = next((key for key in SET_COLUMNS[6:] if getattr(self, key)), None)
        if self.messages is None and beside is not None:
            raise ValueError(f"'{beside}' of {self.name!r} goes with 'messages', a column of conversations; name it")
        return self


class TaskConfig(Section):
    """What the model learns: columns, lengths, metrics."""

    #: What the answers are: classes, a number, or a text, written by an encoder-decoder or by a decoder alone.
    type: Literal["classification", "regression", "seq2seq", "causal"]
    #: An objective of one's own in the place of the type's: ``FILE.py:NAME`` or ``package.module:NAME``.
    objective: name_or_extension() | None = None  # type: ignore[valid-type]
    dataset: DatasetConfig = DatasetConfig()
    #: Several data sets in the place of ``task.dataset``: a list of sets with ``name``, ``dataset`` (its keys are those
    #: above), ``weight``, ``prefix``, and the names of its columns: of ``text``, ``label``, ``source``, ``target`` and
    #: ``messages`` where they are not the task's, of ``input``, ``tools``, ``completion`` and ``system`` where it has
    #: them.
    mixture: list[MixedSetConfig] = []
    #: Shares of the draws are as the sets' sizes to the power of 1 / temperature: 1 is as many as there are, more makes
    #: them more alike. In the place of the sets' weights.
    temperature: PositiveFloat | None = None
    #: A file of 10 to 500 rows of the wanted task, with the columns of the pool, none of them in a held-out set: what
    #: ``sampling.selector: query`` (and others that look for a target) chooses the pool's samples by.
    query: str | list[str] | None = None
    #: Whether the query's rows are trained on, too: they join the pool, and every selector's S.
    train_on_query: bool = True
    #: One or two text columns (classification, regression); a single one needs no list.
    text: list[str] = []
    #: The column of classes or numbers (classification, regression).
    label: str | None = None
    #: Class names in label order, or their number; none: the classes that the pool's label column holds, sorted.
    labels: list[str] | PositiveInt | None = None
    #: A prompt in the place of a new head (classification): a text with ``{COLUMN}`` for every column of ``text`` and
    #: one slot for the class's word, ``{mask}`` of a masked language model or, at the end, ``{answer}`` of another.
    prompt: str | None = None
    #: What the base of a prompt is; none: what its slot and its ``config.json`` say.
    prompt_base: Literal["masked", "causal", "seq2seq"] | None = None
    #: The word at the slot for every class, in the order of ``labels`` or by their names; or ``auto``: those that the
    #: base itself puts there for the training data, found once before the first step. At an ``{answer}`` a word of
    #: several tokens is told by its first.
    label_words: list[str] | dict[str, str] | str | None = None
    #: Training rows of every class that stand, answered, before each prompt; drawn by ``run.seed``.
    demonstrations: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    #: Those rows, texts and then the class's number: a run writes them here.
    demonstrated: list[list[str]] = []
    #: Column of the text that is given (seq2seq, causal).
    source: str | None = None
    #: Column of the text that is to be written.
    target: str | None = None
    #: A column whose text, where there is one, follows the source after a blank line, such as alpaca's ``input``
    #: (causal).
    input: str | None = None
    #: A column of whole conversations in the place of source and target (causal): lists of messages with ``role`` and
    #: ``content``, or ``from`` and ``value`` (ShareGPT), put through the tokenizer's chat template.
    messages: str | None = None
    #: A column of the tools that a conversation's template is told of, lists of JSON schemas; a row may have none.
    tools: str | None = None
    #: A column of the messages that follow those of ``messages``, and of which alone something is learned, as TRL's
    #: ``completion`` follows its ``prompt``.
    completion: str | None = None
    #: A column of system prompts, put before conversations that do not begin with one; a row may have none.
    system: str | None = None
    #: What of a conversation is learned: all that the ``assistant`` says, its ``last`` answer, or ``all`` of it.
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    #: Text put before every source (T5-style).
    prefix: str = ""
    #: Language of the source, as the tokenizer names it; models of many languages (mBART, NLLB, M2M100) need both
    #: languages, others take none.
    source_lang: str | None = None
    #: Language of the target, with which it begins.
    target_lang: str | None = None
    #: A jinja file in the place of the tokenizer's own chat template (causal).
    chat_template: str | None = None
    #: What a chat template is told that the date is; none is 2025-01-01, on every day.
    chat_date: IsoDate | None = None
    #: Most tokens of an input, special ones included; of a causal task's source and answer together.
    max_length: PositiveInt = 128
    #: Most tokens of a target, learned or generated.
    max_target_length: PositiveInt = 64
    #: Metric names; the first is the one that decides which checkpoint is best. By default accuracy
    #: (classification), pearson (regression) or rougeL.
    metrics: Annotated[list[str], Field(min_length=1)]
    #: Beams of the search by which texts are generated; 1 takes the likeliest token every time.
    num_beams: PositiveInt = 4
    #: Where texts are kept as tokens, which are made once, before the first step: a folder; ``auto``, in the cache of
    #: ``datasets`` where a set has 16 MB of text and more, and the run reads it more than once; or ``off``.
    token_cache: KeptOrNot = "auto"
    #: Processes that make them; none: as many as there are cores, up to 8, one for every 32 MB of text.
    tokenize_workers: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _lists_and_defaults(cls, tree: Any) -> Any:
        """Single texts as lists, and the metric of the type where none is named."""
        if not isinstance(tree, dict):
            return tree
        tree = {**tree, **{key: [tree[key]] for key in ("text", "metrics") if isinstance(tree.get(key), str)}}
        kind = tree.get("type")
        default = DEFAULT_METRICS.get(kind) if isinstance(kind, str) else None
        if default is not None and tree.get("metrics") is None:
            tree["metrics"] = [default]
        return _with_columns_of_sets(tree)

    @model_validator(mode="after")
    def _columns_of_the_type(self) -> TaskConfig:
        if self.type in ("classification", "regression"):
            if not 1 <= len(self.text) <= 2:
                raise ValueError(f"'text' must name one or two columns for a {self.type} task, got {self.text!r}")
            if self.label is None:
                raise ValueError(f"'label' must name the label column of a {self.type} task")
        elif self.messages is None and (self.source is None or self.target is None):
            or_messages = ", or 'messages' one of conversations" if self.type == "causal" else ""
            raise ValueError(
                f"'source' and 'target' must name the input and output columns of a {self.type} task{or_messages}"
            )
        if self.query in ("", []) or (isinstance(self.query, list) and "" in self.query):
            raise ValueError("'query' names no file: give one, or leave it out")
        of_causal = [(key, "causal") for key in ("chat_date", "chat_template", *SET_COLUMNS[4:])]
        for key, type_ in [("source_lang", "seq2seq"), ("target_lang", "seq2seq"), *of_causal]:
            if getattr(self, key) is not None and self.type != type_:
                raise ValueError(f"'{key}' is for {type_} tasks, and 'type' is {self.type!r}; remove it")
        return self

    @model_validator(mode="after")
    def _prompt_agrees(self) -> TaskConfig:
        check_prompt_keys(self)
        return self

    @model_validator(mode="after")
    def _conversations_or_texts(self) -> TaskConfig:
        if self.messages is not None:
            given = [key for key in ("source", "input", "target", "prefix") if getattr(self, key)]
            if given:
                raise ValueError(f"'{given[0]}' goes with texts, and 'messages' names whole conversations; remove one")
            return self
        key = next((key for key in SET_COLUMNS[6:] if getattr(self, key) is not None), "loss_on")
        if key != "loss_on" or self.loss_on != "assistant":
            raise ValueError(f"'{key}' is for tasks with 'messages', a column of conversations; name it, or remove it")
        return self

    @model_validator(mode="after")
    def _one_set_or_many(self) -> TaskConfig:
        if not self.mixture:
            if not self.dataset.is_named:
                raise ValueError("'dataset' names no data: set 'train_file', 'name' of a hub dataset, or 'mixture'")
            if self.temperature is not None:
                raise ValueError("'temperature' is of the sets of 'mixture', which is not set; remove it")
            return self
        if self.dataset.is_named:
            raise ValueError("'dataset' and 'mixture' both name data: every set of a mixture has its own 'dataset'")
        names = [each.name for each in self.mixture]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"'mixture' has two sets called {twice!r}; give each its own name")
        titles = [_title(each, name) for each in self.mixture for name in each.dataset.dev_sets]
        twice = next((title for title in titles if titles.count(title) > 1), None)
        if twice is not None:
            raise ValueError(f"'mixture' has two held-out sets that would be called {twice!r}; rename one")
        weighted = [each.name for each in self.mixture if each.weight is not None]
        if weighted and self.temperature is not None:
            raise ValueError("'temperature' and the 'weight' of sets both say what is drawn; remove one")
        if weighted and len(weighted) < len(names):
            lacks = next(name for name in names if name not in weighted)
            raise ValueError(
                f"'weight' is given for {weighted[0]!r} and not for {lacks!r}; give every set one, or none"
            )
        taken = {self.label, *self.text, *(getattr(self, key) for key in SET_COLUMNS[2:])} & OUR_COLUMNS
        if taken:
            raise ValueError(f"{min(map(str, taken))!r} is a column of ours in a mixture; give the task another name")
        for each in self.mixture:
            self._check_set(each)
        for key in _OWN_COLUMNS:
            if getattr(self, key) is not None and all(getattr(each, key) is None for each in self.mixture):
                raise ValueError(f"'{key}' is named by no set of 'mixture'; name it in those that have the column")
        return self

    def _check_set(self, each: MixedSetConfig) -> None:
        """The columns of a set of the mixture are of the task's kind."""
        chats = each.messages is not None or (self.messages is not None and each.source is None)
        fits = {"classification": ("text", "label"), "regression": ("text", "label")}.get(self.type)
        allowed = fits or (*SET_COLUMNS[2:], "prefix")
        wrong = [key for key in (*SET_COLUMNS, "prefix") if getattr(each, key) and key not in allowed]
        if wrong:
            raise ValueError(f"'{wrong[0]}' of {each.name!r} is of another kind of task than {self.type!r}; remove it")
        own = self.of_set(each)
        if len(own.text) != len(self.text):
            raise ValueError(f"{each.name!r} has {len(own.text)} columns of text, and the task {len(self.text)}")
        if fits is None and not chats and (own.source is None or own.target is None):
            raise ValueError(f"{each.name!r} needs 'source' and 'target', or 'messages', the names of its columns")
        named = [*own.text, *(getattr(own, key) for key in SET_COLUMNS[1:])]
        twice = next((name for name in named if name is not None and named.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{each.name!r} names the column {twice!r} twice; a column has one meaning")

    def of_set(self, each: MixedSetConfig) -> TaskConfig:
        """The task on one data set of the mixture alone, with its columns: ``input``, ``tools``, ``completion`` and
        ``system`` only where it names them, for others may have none."""
        named = {key: getattr(each, key) for key in SET_COLUMNS if getattr(each, key)}
        others = ("messages",) if each.source is not None else ("source", "target") if each.messages else ()
        columns = {**dict.fromkeys((*_OWN_COLUMNS, *others)), **named}
        half = self.dataset.dev_half or each.dataset.dev_half
        dataset = each.dataset.model_copy(update={"dev_half": half})
        return self.model_copy(update={**columns, "dataset": dataset, "mixture": [], "temperature": None})

    @property
    def dev_sets(self) -> dict[str, tuple[MixedSetConfig | None, str]]:
        """Every held-out set by its name: the set of the mixture that it belongs to, and its name there. The deciding
        one comes first."""
        if not self.mixture:
            return {name: (None, name) for name in self.dataset.dev_sets}
        return {_title(each, name): (each, name) for each in self.mixture for name in each.dataset.dev_sets}

    @property
    def datasets(self) -> list[DatasetConfig]:
        """The data set, or those of the mixture."""
        return [each.dataset for each in self.mixture] or [self.dataset]

    @property
    def has_dev(self) -> bool:
        """Whether there is a held-out set."""
        return bool(self.dev_sets)

    @property
    def asks_for_shares(self) -> bool:
        """Whether the sets of a mixture are to have other shares of the draws than of the pool."""
        return self.temperature is not None or any(each.weight is not None for each in self.mixture)

    @property
    def is_weighted(self) -> bool:
        """Whether some rows of the pool are drawn more often than others, whatever selects."""
        return self.asks_for_shares or any(dataset.weight is not None for dataset in self.datasets)

    @property
    def num_labels(self) -> int:
        """Size of the head: classes, or 1 for regression. 0 where there is no head."""
        if self.type == "regression":
            return 1
        if self.labels is None:
            return 0
        return self.labels if isinstance(self.labels, int) else len(self.labels)


def _title(each: MixedSetConfig, name: str) -> str:
    """Of a held-out set of a set of a mixture."""
    return f"{each.name}.{name}" if name else each.name


def _with_columns_of_sets(tree: dict[str, Any]) -> dict[str, Any]:
    """The names of columns that the task itself does not give: those of the first set that has them.

    Where one set has conversations, so has the task: rows of source and target can be read as such.
    """
    sets = [each for each in tree.get("mixture") or () if isinstance(each, dict)]
    own = {key: tree.get(key) for key in SET_COLUMNS}
    chats = bool(own["messages"]) or (not own["source"] and any(each.get("messages") for each in sets))
    labelled = tree.get("type") in ("classification", "regression")
    texts = SET_COLUMNS[5:7] if chats else SET_COLUMNS[2:7]
    for key in SET_COLUMNS[:2] if labelled else texts:
        found = next((each[key] for each in sets if each.get(key)), None)
        if found is not None and not own[key]:
            tree = {**tree, key: [found] if key == "text" and isinstance(found, str) else found}
    return tree
