"""A small pool with a query, and a model to look at it: what selectors are tried on."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.runs import run_tree, write_data
from tests.tiny import WORDS
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.train_state import TrainState
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.quality.selectors.selector import SelectorContext
from tsqlora_scale.quality.selectors.selector_names import selector_class
from tsqlora_scale.run import preflight
from tsqlora_scale.run.adapted_model import build_model
from tsqlora_scale.tasks import Task

ROWS, QUERY, KEPT = 18, 10, 0.5


@dataclass
class Site:
    """A small pool with a query, and a model with an adapter whose factors have moved.

    Attributes:
        tree: of a config.
        task: the pool.
        module: the model.
        state: of the model's optimizer; None: there is none.
    """

    tree: dict[str, Any]
    task: Task
    module: torch.nn.Module
    state: TrainState | None = None

    def selector(self, name: str, world: World | None = None, **sampling: Any) -> Any:
        """A selector of the site's pool, keeping :data:`KEPT` of it."""
        tree = self.tree | {"sampling": {"selector": name, "keep_fraction": KEPT} | sampling}
        config = parse_config(tree)
        return selector_class(name)(
            SelectorContext(
                config=config,
                pool=self.task,
                theta=adapter_type(config.adapter.type).theta,
                world=world or World(),
                scoring_step=0,
                train_state=None if self.state is None else lambda: self.state,  # type: ignore[arg-type, return-value]
            )
        )

    def scored(self, name: str, world: World | None = None, **sampling: Any) -> Any:
        """The same after its look at the pool."""
        selector = self.selector(name, world, **sampling)
        selector.score(self.module, 0)
        return selector


def make_site(kind: str, folder: Path, models: Path, *, with_query: bool = True, **keys: Any) -> Site:
    """Rows of random words, and a query of them; further ``keys`` are the task's."""
    tree = run_tree(kind, folder, models, "run", allocation={"policy": "fixed"}, train={"max_steps": 4})
    task = tree["task"] = write_data(folder / f"data-{kind}", tree["task"]["type"], ROWS) | keys
    if with_query:
        rng = random.Random(1)
        rows = [
            {"text": " ".join(rng.choices(WORDS[:12], k=rng.randint(5, 9))), "label": "yes", "summary": "the film"}
            for _ in range(QUERY)
        ]
        (folder / "query.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task["query"] = str(folder / "query.jsonl")
    tree["sampling"] = {"selector": "full"}
    checked = preflight.check(parse_config(tree))
    module = build_model(checked, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return Site(tree, checked.task, module)
