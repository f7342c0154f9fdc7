"""`deploy/deploy` and `deploy/rollback` on a server with systemd, under a steady load."""

from typing import Any

import pytest

from tests.deploys import run

KINDS = ["changed", "killed", "undone", "broken", "rolled back", "refused"]
TICK = 5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six deploys, one of each kind; see `python -m tests.deploys` for twenty."""
    return run(tmp_path_factory.mktemp("deploy"), len(KINDS), 7, KINDS)


def test_each_deploy_ends_as_it_should(found: dict[str, Any]) -> None:
    assert [row["deploy"] for row in found["deploys"]] == KINDS


def test_no_request_fails_while_releases_change(found: dict[str, Any]) -> None:
    assert found["load"]["failed"] == 0
    assert found["load"]["requests"] > 2_000


def test_no_job_is_lost_or_takes_effect_twice(found: dict[str, Any]) -> None:
    load = found["load"]
    assert load["wanted"] > 500
    assert (load["kept"], load["lost"], load["twice"]) == (load["wanted"], 0, 0)


def test_no_job_starts_later_than_a_tick_after_it_is_due(found: dict[str, Any]) -> None:
    assert found["load"]["latest"] < TICK


def test_units_are_valid_and_hardened(found: dict[str, Any]) -> None:
    assert len(found["units"]) == 7
    assert max(found["units"].values()) < 2.0
