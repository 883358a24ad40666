"""What the model learns from: sources and their checks, batches, per-sample losses, metrics.

``load_data`` checks every row before anything heavy is loaded; ``build_task`` joins the data with a tokenizer.
"""

from tsqlora_scale.tasks.batch import IGNORED, Batch
from tsqlora_scale.tasks.objective_names import auto_class_of, objective_class
from tsqlora_scale.tasks.objectives.positions import check_lengths
from tsqlora_scale.tasks.rows.data import Data
from tsqlora_scale.tasks.rows.loading import load_data, load_dev
from tsqlora_scale.tasks.rows.token_checks import with_tokens
from tsqlora_scale.tasks.task import Task, build_task

__all__ = [
    "IGNORED",
    "Batch",
    "Data",
    "Task",
    "auto_class_of",
    "build_task",
    "check_lengths",
    "load_data",
    "load_dev",
    "objective_class",
    "with_tokens",
]
