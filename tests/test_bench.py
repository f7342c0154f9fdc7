"""`make bench`: that it measures, not what; the figures depend on the machine."""

import math
import re
import shutil
from pathlib import Path

from tests.conftest import run
from tests.test_demo import processes_below


def test_bench_prints_a_ratio_to_plain_celery_and_leaves_no_process(
    tmp_path: Path, template: Path
) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(template, clone)
    output = run("make", "bench", cwd=clone, ARGS="--quick --no-peers enqueue", NO_COLOR="1")
    rows = [line for line in output.splitlines() if "enqueue one job" in line and "│" in line]
    assert len(rows) == 1, output
    ours, plain = (cell.strip() for cell in rows[0].split("│")[2:4])
    ratio = re.match(r"[\d.]+", ours)
    assert ratio, output
    assert math.isfinite(float(ratio[0]))
    assert float(ratio[0]) > 0
    assert plain == "1"
    assert processes_below(clone) == []
