"""`make demo`: what the README promises on a fresh machine."""

import re
import shutil
from pathlib import Path

from tests.conftest import run


def test_demo_loses_nothing_and_leaves_no_process(tmp_path: Path, template: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(template, clone)
    output = run("make", "demo", cwd=clone, timeout=900, DEMO_SEED="7", NO_COLOR="1", COLUMNS="100")
    rows = [line for line in output.splitlines() if "SIGKILL of" in line]
    assert len(rows) == 1, output
    wanted, done, lost, seed = (int(cell) for cell in re.findall(r"(\d+) *(?=[│|])", rows[0])[-4:])
    assert (wanted, done, lost, seed) == (40, 40, 0, 7)
    assert processes_below(clone) == []


def processes_below(folder: Path) -> list[str]:
    """Return the command lines of the processes that were started from this folder."""
    lines = [
        command.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for command in Path("/proc").glob("[0-9]*/cmdline")
        if command.exists()
    ]
    return [line for line in lines if str(folder) in line]
