"""Run several configs one after another in one process group: ``launch … worker.py CONFIG[=CHECKPOINT]…``."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.failures import leave_group
from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.load import load_config
from tsqlora_scale.run import preflight


def main() -> int:
    prepare_environment()
    places = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    # every check before the first process group exists, as in a run of its own
    checked = [(preflight.check(load_config(config)), checkpoint or None) for config, checkpoint in places]
    from tsqlora_scale.quality.scores import measurer
    from tsqlora_scale.run.build import build_run
    from tsqlora_scale.training import train_to_the_end

    measurer.CHECKED = 2  # of a tiny pool; under ZeRO-3 the eight of a real one cost as much as a pass
    for one, checkpoint in checked:
        try:
            run = build_run(one, resume=checkpoint)
            train_to_the_end(run)
            run.engine.close()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    leave_group(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
