"""Where runs are killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pyarrow.parquet as pq
import transformers
from safetensors.torch import save_file

from tests.faults.killer import after, before, within
from tsqlora_scale.common.files import fsync
from tsqlora_scale.engine.ddp import DdpEngine
from tsqlora_scale.engine.zero import ZeroEngine
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.scores.measurer import Measurer
from tsqlora_scale.quality.scores.score_parts import Parts
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.ranks.controller import AdaptiveRanks
from tsqlora_scale.ranks.install import resize_model
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run.checkpoint import drop_after, prune, read_checkpoint, verify_checkpoint, write_checkpoint
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import optimizer_step

#: Crossed by the first life of a run: warm-up, first pass of four shards, two events with refreshes, evaluations,
#: checkpoints, and the end. The first and the last crossing of each is one to die in.
FIRST_LIFE = [
    after(RunRecord.prepare),
    before(Run.evaluate), after(Run.evaluate),
    after(FullSelector.draw),
    before(DdpEngine.backward), after(DdpEngine.backward), before(DdpEngine.step), after(DdpEngine.step),
    after(optimizer_step),
    before(RunRecord._append), within(RunRecord._append), after(RunRecord._append),
    before(QualitySelector.score), after(QualitySelector.score),
    after(Measurer.measure), after(Parts.append), within(pq.write_table),
    before(ScoreTable.write), after(Run.note_scores),
    before(AdaptiveRanks.adapt), before(DdpEngine.rebuild), after(resize_model), after(DdpEngine.rebuild),
    after(AdaptiveRanks.adapt), after(DdpEngine.gather),
    before(Run.save_checkpoint), after(Run.save_checkpoint),
    before(write_checkpoint), before(save_file), within(save_file), before(fsync),
    within(Path.write_text), before(Path.rename), after(Path.rename), before(Path.replace), after(Path.replace),
    within(shutil.rmtree), before(prune),
    before(Run.save_adapter), within(peft.PeftModel.save_pretrained),
    before(transformers.PreTrainedTokenizerBase.save_pretrained), after(Run.save_adapter),
    before(Parts.discard), before(RunRecord.result), after(RunRecord.result),
]  # fmt: skip
#: Crossed by the second life, which resumes from step 6 after a death in step 8.
SECOND_LIFE = [
    after(verify_checkpoint), after(read_checkpoint), before(Run.load_state_dict),
    before(RunRecord.rewind), within(Path.write_text), before(Path.replace), after(Path.replace),
    after(RunRecord.rewind), before(drop_after), after(drop_after), after(Run.load_state_dict), after(optimizer_step),
    after(QualitySelector.score),
]  # fmt: skip
FIRST_DEATH = (before(optimizer_step).name, 8)
#: Of runs under several engines.
OF_ENGINES = [after(optimizer_step), within(save_file), after(ZeroEngine.backward)]
#: Of a run with a proxy: in the proxy's warm-up, in its pass, between the two models, and before the first step of the
#: second.
WITH_A_PROXY = [
    (after(optimizer_step), 1), (after(Parts.append), 2), (before(DdpEngine.gather), 3), (after(RunRecord.prepare), 2),
    (after(RunRecord.prepare), 3), (after(Run.evaluate), 1), (after(Run.evaluate), 2), (after(FullSelector.draw), 3),
    (after(Run.save_checkpoint), 2),
]  # fmt: skip
POINTS = {*FIRST_LIFE, *SECOND_LIFE, *OF_ENGINES, before(optimizer_step), *(point for point, _ in WITH_A_PROXY)}
