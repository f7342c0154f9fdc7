"""The README says what the code does."""

import ast
import re
from pathlib import Path

from queue_probes.conf import DEFAULTS
from queue_probes.diagnosis import WORDS

APP = Path(__file__).resolve().parent.parent
README = (APP / "README.md").read_text()


def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"`(test_\w+)`", README))
    tests = "".join(path.read_text() for path in APP.glob("tests/test_*.py"))
    assert named - set(re.findall(r"^def (test_\w+)\(", tests, re.M)) == set()
    assert len(named) > 10


def test_the_settings_of_the_readme_have_the_defaults_of_the_code():
    table = re.findall(r"^\| `([A-Z_]+)` \| `(.+?)` \|", README, re.M)
    assert len(table) >= 6
    assert {name: ast.literal_eval(default) for name, default in table} == {
        name: DEFAULTS[name] for name, _ in table
    }


def test_every_state_is_in_the_readme():
    assert set(WORDS) <= set(re.findall(r"^\| `([a-z_]+)` \|", README, re.M))
