"""Pretraining on plain text before the task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tsqlora_scale.config.fields import PositiveFloat, PositiveInt, Section
from tsqlora_scale.config.task_section import TaskConfig

#: The objectives' classes, by ``pretrain.objective``, and the type of task that their models are of.
OBJECTIVES = {
    "mlm": ("MaskedText", "causal"),
    "span": ("CorruptedText", "seq2seq"),
    "causal": ("PlainText", "causal"),
}
#: The column of a corpus's text where it is the task's own.
OWN_TEXT = "text"


class PretrainConfig(Section):
    """Task- or domain-adaptive pretraining first: the same adapter, on plain text, in the run folder ``NAME-pretrain``;
    then the task goes on with it, and with a new head."""

    #: Masked tokens (encoders), corrupted spans (encoder-decoders), or the next token (decoders); none: no pretraining.
    objective: Literal["mlm", "span", "causal"] | None = None
    #: The corpus: csv, tsv, jsonl or parquet, with a text in every row; none: the task's own training texts.
    file: Annotated[str, Field(min_length=1)] | None = None
    #: The column of the file's text.
    text: Annotated[str, Field(min_length=1)] = OWN_TEXT
    #: Length of the pretraining in optimizer steps.
    max_steps: PositiveInt = 1000
    #: Samples of one optimizer step; none: as many as ``train.batch_size``.
    batch_size: PositiveInt | None = None
    #: The learning rate at its highest; none: ``train.lr``. The schedule is that of ``train``, and the
    #: warm-up, too, of at most a tenth of the steps where it is given in steps.
    lr: PositiveFloat | None = None
    #: Most tokens of a text; none: ``task.max_length``.
    max_length: PositiveInt | None = None

    @model_validator(mode="after")
    def _file_is_read(self) -> PretrainConfig:
        if self.objective is None and self.file is not None:
            raise ValueError("'file' is a corpus to pretrain on, and there is no 'objective'; set it, or remove 'file'")
        if self.file is None and self.text != OWN_TEXT:
            raise ValueError("'text' names a column of 'file', which is not set; name the file, or remove 'text'")
        return self

    def task(self, *, max_length: int, language: str | None = None) -> dict[str, Any]:
        """The task section of the pretraining's own run.

        Args:
            language: of the texts, for models that are told it (mBART).
        """
        assert self.objective is not None
        name, kind = OBJECTIVES[self.objective]
        length = self.max_length or max_length
        # of the task's own texts nothing is read again: they have been
        file = self.file or "the task's own texts"
        return {
            "type": kind,
            "objective": f"tsqlora_scale.tasks.objectives.corpus:{name}",
            "source": self.text,
            "target": self.text,
            "dataset": {"path": ".", "train_file": file, "dev_file": file, "drop_empty": True},
            "max_length": length,
            "max_target_length": length,
            "metrics": ["loss"],
            "num_beams": 1,  # nothing is written
            **({"source_lang": language, "target_lang": language} if language and kind == "seq2seq" else {}),
        }


def pretraining_sections(config: Any, nothing_else: Any) -> dict[str, Section]:
    """The sections of a pretraining's run that are not those of an audit's.

    Args:
        config: of the run that goes on with its adapter.
        nothing_else: the same as an audit takes it.
    """
    own, train = config.pretrain, config.train
    # steps of the run's warm-up may be more than there are here; and its length may change while this goes on
    warmup = min(train.lr_warmup, own.max_steps // 10) if isinstance(train.lr_warmup, int) else train.lr_warmup
    length: dict[str, Any] = {"max_steps": own.max_steps, "epochs": None, "lr": own.lr or train.lr}
    length |= {"lr_warmup": warmup, "packing": False}
    if own.batch_size is not None:
        length |= {"batch_size": own.batch_size, "micro_batch_size": None}
    by_file = config.allocation.policy == "file"  # its ranks are those of the start
    return {
        "run": config.run.model_copy(update={"name": f"{config.run.name}-pretrain"}),
        "allocation": config.allocation if by_file else nothing_else.allocation,
        "task": TaskConfig.model_validate(
            own.task(max_length=config.task.max_length, language=config.task.source_lang)
        ),
        "scoring": config.scoring.model_copy(update={"proxy_model": None, "max_length": None}),
        "train": nothing_else.train.model_copy(update={**length, "checkpoint_every": train.checkpoint_every}),
    }
