"""The base that a saved adapter is of, without a task's data: checked by its config alone, then loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsqlora_scale.common.random_streams import generator_for
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.base_model import load_base
from tsqlora_scale.model.describe import check_adapter_fits, check_architecture, check_weights, load_descriptions
from tsqlora_scale.model.stored_quantization import check_can_unpack
from tsqlora_scale.tasks import auto_class_of, objective_class
from tsqlora_scale.tasks.objectives.prompted import prompt_base


@dataclass(frozen=True)
class AdaptedBase:
    """What is known of a base before it is loaded.

    Attributes:
        config: of the run that has trained the adapter, with the kind of base that a prompt is for.
        path: of the model.
        unquantised: modules that a 4-bit base keeps in floating point.
    """

    config: Config
    path: str
    model_config: Any
    tokenizer: Any
    unquantised: list[str]

    @classmethod
    def checked(cls, config: Config, adapter: Path) -> AdaptedBase:
        """Describe the base of ``config``, and check it and the adapter against each other.

        Raises:
            UserError: naming the key or the file.
        """
        check_can_unpack(config.model)
        path = resolve(config.model.name_or_path, key="model.name_or_path")
        check_weights(config, path)
        model_config, tokenizer = load_descriptions(config, path)
        config = config.with_task(prompt_base=prompt_base(config.task, model_config))
        unquantised = check_architecture(config, model_config, tokenizer)
        check_adapter_fits(config, model_config, adapter)
        return cls(config, path, model_config, tokenizer, unquantised)

    def load(self, *, device: torch.device | None = None) -> Any:
        """The base itself, its new layers as the run has drawn them."""
        base, _ = load_base(
            self.path,
            self.config.model,
            auto_class=auto_class_of(self.config.task),
            model_config=self.model_config,
            unquantised=self.unquantised,
            generator=generator_for(self.config.run.seed, "head"),
            device=device,
            peft_task_type=objective_class(self.config.task).peft_task_type,
            train_head=self.config.adapter.train_head,
            says=False,
        )
        return base
