"""What the model is fed: a sample as it is tokenised, how long the texts are, and what is cut from them."""

from __future__ import annotations

import itertools

import numpy as np

from tsqlora_scale.common.printing import printable, shortened
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.tasks import IGNORED, Task

#: Rows whose lengths are counted.
ROWS = 200
#: Characters of the sample that are shown.
SHOWN = 400


def input_preview(task: Task, *, seed: int) -> list[str]:
    """A few lines about the pool, from at most :data:`ROWS` of its rows, drawn by the seed."""
    drawn = philox(seed, "input preview").choice(len(task), min(ROWS, len(task)), replace=False)
    rows = np.sort(drawn)
    lines = [f"a sample, what is learned in [[ ]]: {shortened(printable(_marked(task, int(drawn[0]))), SHOWN)}"]
    for text in task.measured(rows):
        lengths = np.array(text.lengths)
        least, middle, high, most = np.percentile(lengths, [0, 50, 95, 100], method="nearest")
        cut = f"{np.mean(lengths > text.limit):.0%} lose their {text.side}"
        lines.append(
            f"{printable(text.what)}: {least} / {middle} / {high} / {most} tokens (least / median / 95 % / most of "
            f"{len(rows)} rows), {text.limit} are kept: {cut}"
        )
    return lines


def _marked(task: Task, row: int) -> str:
    """The tokens of a row as text, special ones too, with what is supervised in brackets."""
    batch = task.batch([row])
    decode, targets = task.tokenizer.decode, batch.targets[0]
    if "input_ids" not in batch.inputs or (targets.dim() and targets.is_floating_point()):
        return task.preview(row)  # an objective of a user's own, whose targets are no tokens
    ids, mask = batch.inputs["input_ids"][0], batch.inputs.get("attention_mask")
    if mask is not None:
        ids = ids[mask[0].bool()]
    if targets.dim() == 0:
        return f"{decode(ids)} [[{task.answer(row)}]]"
    learned = decode(targets[targets != IGNORED])
    if len(targets) != len(batch.inputs["input_ids"][0]) or "decoder_input_ids" in batch.inputs:
        return f"{decode(ids)} -> [[{learned}]]"
    ends = np.flatnonzero(np.diff((targets != IGNORED).numpy(), prepend=False, append=False)).tolist()
    parts = [0, *ends, len(ids)]
    texts = [str(decode(ids[begin:end])) for begin, end in itertools.pairwise(parts)]
    return "".join(f"[[{text}]]" if place % 2 else text for place, text in enumerate(texts))
