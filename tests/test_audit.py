"""An outside opinion on the generated Celery settings: celery-audit, from PyPI."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import run

# Values that depend on the environment are beyond a static audit; what we do about each:
UNDECIDABLE = {
    "CEL012": "the broker URL comes from the environment, never from code",
    "CEL014": "queues are declared in one expression; `manage.py check` compares routes with them",
    "CEL016": "tasks are found by autodiscovery; `manage.py check` looks up those of beat",
    "CEL020": "eager mode is one environment variable, and a check warns when it is on",
    "CEL021": "as CEL014",
}


def test_audit_finds_nothing(bake: Callable[..., Path]) -> None:
    modules = ("--config", "config/celery_settings.py", "--config", "config/celery.py")
    audit = Path(sys.executable).with_name("celery-audit")
    options = ("--settings-namespace", "CELERY", "--fail-on", "low", "--format", "json")
    report = json.loads(run(str(audit), *modules, *options, "notes", cwd=bake()))
    rules = {finding["rule_id"]: finding["severity"] for finding in report["findings"]}
    assert {rule for rule, severity in rules.items() if severity != "unknown"} == set()
    assert set(rules) <= set(UNDECIDABLE)
