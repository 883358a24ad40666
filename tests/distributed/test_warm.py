"""A fork of the warm process ends, speaks and is stopped as a process that was started anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import run_launched
from tests.warm import warm

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

#: What a script does; how it ends is what Python itself says.
ENDS = {
    "nothing": "print('said')",
    "a code": "import sys; print('said'); sys.exit(3)",
    "words": "import sys; sys.exit('no shelf')",
    "an error": "raise KeyError('no shelf')",
    "at once": "import os; os._exit(5)",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "what is left to do": "import atexit; atexit.register(print, 'last words')",
    "arguments": "import os, sys; print(sys.argv[1:], os.getcwd(), sys.path[0], __name__, os.environ['SHELF'])",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELF", "3")
    script = tmp_path / "script.py"
    script.write_text(ENDS[name])
    command = [str(script), "one", "two"]
    wanted = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=tmp_path)
    found = warm().run(command, cwd=tmp_path, timeout=60)
    assert (found.returncode, found.stdout) == (wanted.returncode, wanted.stdout)
    assert found.stderr.splitlines()[-1:] == wanted.stderr.splitlines()[-1:]  # a traceback has other frames above


def test_one_that_hangs_is_stopped(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time; print('said'); time.sleep(10_000)")
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        warm().run([str(script)], timeout=2)
    assert raised.value.stdout == "said\n"
    script.write_text("print('the next one')")
    assert warm().run([str(script)], timeout=60).stdout == "the next one\n"


@pytest.mark.parametrize("cold", [False, True])
def test_a_failing_rank_fails_the_launch(tmp_path: Path, cold: bool) -> None:
    script = tmp_path / "script.py"
    # in one piece, or two ranks' pieces may lie between one another
    script.write_text(
        "import os, sys; rank = int(os.environ['RANK']); print(f'rank {rank}\\n', end=''); sys.exit(7 * rank)"
    )
    done = run_launched("ddp-2", script, [], tmp_path, timeout=60, cold=cold)
    assert done.returncode == 1
    assert "exitcode  : 7 " in done.stdout
    assert {"rank 0", "rank 1"} <= set(done.stdout.splitlines())
