"""`deploy/deploy` and `deploy/rollback` under a steady load, with systemd and with containers."""

from typing import Any

import pytest

from tests.deploys import run
from tests.sites import compose_site, systemd_site

# `python -m tests.deploys` does twenty.
SYSTEMD = ["changed", "killed", "undone", "broken", "rolled back", "refused"]
SYSTEMD += ["drops a column", "drops a default"]
COMPOSE = ["changed", "killed"]
TICK = 5


@pytest.fixture(scope="module", params=["systemd", "compose"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of some deploys; `units` with systemd only."""
    folder = tmp_path_factory.mktemp("deploy")
    if request.param == "compose":
        with compose_site(folder, 7) as site:
            return run(site, len(COMPOSE), COMPOSE)
    with systemd_site(folder, 7) as site:
        return run(site, len(SYSTEMD), SYSTEMD) | {"units": site.audit(), "loop": site.end_loop()}


def test_each_deploy_ends_as_it_should_and_no_request_fails(found: dict[str, Any]) -> None:
    assert [row["deploy"] for row in found["deploys"]] in (SYSTEMD, COMPOSE)
    assert found["load"]["requests"] > 1_000
    assert found["load"]["failed"] == 0


def test_no_job_is_lost_or_takes_effect_twice(found: dict[str, Any]) -> None:
    load = found["load"]
    assert load["wanted"] > 200
    assert (load["kept"], load["lost"], load["twice"]) == (load["wanted"], 0, 0)


def test_no_job_is_delayed_by_more_than_a_tick(found: dict[str, Any]) -> None:
    assert found["load"]["latest"] < TICK


def test_units_are_valid_and_hardened(found: dict[str, Any]) -> None:
    if "units" not in found:
        return
    assert len(found["units"]) >= 7
    assert max(found["units"].values()) < 2.0


def test_the_loop_of_a_deploy_ends_for_good(found: dict[str, Any]) -> None:
    assert found.get("loop", "inactive") == "inactive"
