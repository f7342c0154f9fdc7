"""`make demo`: what the README promises on a fresh machine."""

import re
import shutil
from pathlib import Path

from tests.conftest import run


def test_demo_loses_nothing_and_leaves_no_process(tmp_path: Path, template: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(template, clone)
    output = run("make", "demo", cwd=clone, timeout=900, DEMO_SEED="7", NO_COLOR="1", COLUMNS="100")
    rows = [line for line in output.splitlines() if "SIGKILL and FLUSHALL" in line]
    assert len(rows) == 1, output
    figures = [int(cell) for cell in re.findall(r"(\d+) *(?=[│|])", rows[0])]
    wanted, done, lost, twice, seconds, seed = figures
    assert (wanted, done, lost, twice, seed) == (40, 40, 0, 0, 7)
    # a lease and a republish time, with the work itself: the faults were real, and not for ever
    assert 30 < seconds < 150
    assert re.search(r"FLUSHALL of the broker, which held [1-9]", output)
    assert re.search(r"took over the [12] interrupted jobs", output)
    assert processes_below(clone) == []


def processes_below(folder: Path) -> list[str]:
    """Return the command lines of the processes that were started from this folder."""
    lines = [
        command.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for command in Path("/proc").glob("[0-9]*/cmdline")
        if command.exists()
    ]
    return [line for line in lines if str(folder) in line]
