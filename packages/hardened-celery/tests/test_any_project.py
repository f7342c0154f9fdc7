"""The launcher with a Celery project that knows nothing of it: no Django, no line added."""

import os
import signal
from pathlib import Path

import pytest

from tests.processes import LAUNCHER, launcher, start, wait_until

SHOP = """
import sys
from celery import Celery
app = Celery("shop")
app.conf.update(worker_redirect_stdouts=False)
assert not {name for name in sys.modules if name.partition(".")[0] == "django"}
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment without Django: importing it fails."""
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "without" / "django").mkdir(parents=True)
    (tmp_path / "without" / "django" / "__init__.py").write_text("raise ImportError('none here')")
    others = {name: value for name, value in os.environ.items() if not name.startswith("DJANGO_")}
    return others | {"PYTHONPATH": str(tmp_path / "without")}


@pytest.mark.parametrize(("quiet", "banner"), [([], True), (["--quiet"], False)])
def test_a_worker_of_any_project_is_found_by_check_and_stops(
    tmp_path: Path, environment: dict[str, str], quiet: list[str], banner: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    name = "-A", "shop", "-n", f"{tmp_path.name}@here"
    check = [*LAUNCHER, "check", *name, "--max-age", "5"]
    assert launcher(*check, cwd=tmp_path, **environment)[0] == 1
    options = "--workdir", str(tmp_path), "-c", "1", "-l", "info", *quiet
    command = [*LAUNCHER, "worker", *name, *options]
    with start(tmp_path / "log", command, environment, cwd=elsewhere) as worker:
        worker.wait_ready()
        wait_until(lambda: launcher(*check, cwd=tmp_path, **environment)[0] == 0)
        # another project with this Python has a file of its own
        assert launcher(*check, cwd=elsewhere, **environment)[0] == 1
        there = "--workdir", ".."
        assert launcher(*check, *there, cwd=elsewhere, **environment)[0] == 0
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    assert ("[config]" in worker.text()) is banner
    assert launcher(*check, cwd=tmp_path, **environment)[0] == 1
