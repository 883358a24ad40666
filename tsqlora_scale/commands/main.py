"""``tsqlora COMMAND …``: the commands under one name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from tsqlora_scale.commands.advise import main as advise
from tsqlora_scale.commands.compare import main as compare
from tsqlora_scale.commands.evaluate import main as evaluate
from tsqlora_scale.commands.export import main as export
from tsqlora_scale.commands.plan_memory import main as plan
from tsqlora_scale.commands.predict import main as predict
from tsqlora_scale.commands.score import main as score
from tsqlora_scale.commands.train import main as train

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "score": score,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "advise": advise,
    "plan": plan,
    "compare": compare,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command that is named first; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: tsqlora {{{','.join(COMMANDS)}}} --config FILE [section.key=value ...]", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    return COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
