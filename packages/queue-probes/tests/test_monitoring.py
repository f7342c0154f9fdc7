"""The template's deploy/monitoring: its rules fire when they should, and name metrics that exist.

The rules are checked by Prometheus's own `promtool`. Where it is not installed, it is fetched into
the repository's .tools from the Debian or Ubuntu package; without apt-get these tests are skipped.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from django.db.models.functions import Now
from django.test import Client
from prometheus_client.parser import text_string_to_metric_families

from durable_jobs.models import Job
from queue_probes.models import Finished, Node, Queue

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "{{cookiecutter.project_slug}}" / "deploy" / "monitoring"
RULES = FOLDER / "alerts.yml"
FIRING = Path(__file__).with_name("alerts_test.yml")
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
# What Prometheus adds to each sample, and to each bucket.
ADDED = {"job", "instance"}
NAME = re.compile(r"\b(?:queue|jobs|worker)_[a-z_]+")


@pytest.fixture(scope="session")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> str:
    fetched = ROOT / ".tools" / "promtool"
    if found := shutil.which("promtool") or (fetched.exists() and str(fetched)):
        return found
    if not shutil.which("apt-get"):
        pytest.skip("needs promtool of Prometheus, or apt-get to fetch it")
    folder = tmp_path_factory.mktemp("prometheus")
    fetch = ["apt-get", "download", "prometheus"]
    ended = subprocess.run(fetch, cwd=folder, capture_output=True, text=True)
    packages = list(folder.glob("prometheus_*.deb"))
    if ended.returncode or not packages:
        pytest.skip(f"needs promtool of Prometheus; {' '.join(fetch)}: {ended.stderr[-300:]}")
    subprocess.run(["dpkg", "-x", packages[0], folder], check=True)
    fetched.parent.mkdir(exist_ok=True)
    shutil.move(folder / "usr" / "bin" / "promtool", fetched)
    return str(fetched)


def check(*command: str) -> None:
    ended = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_rules_fire_when_they_should(promtool: str) -> None:
    check(promtool, "check", "rules", "alerts.yml")
    check(promtool, "test", "rules", str(FIRING))


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tests = FIRING.read_text()
    alerts = re.findall(r"alert: (\w+)", RULES.read_text())
    assert len(alerts) == 6
    for alert in alerts:
        assert re.search(rf"alertname: {alert}\s+exp_alerts:\s+- exp_labels", tests), alert


def test_prometheus_understands_every_query_of_the_dashboard(promtool: str, tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(QUERIES)]
    file = tmp_path / "queries.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    check(promtool, "check", "rules", str(file))


@pytest.fixture
def printed(client: Client, transactional_db: None) -> dict[str, set[str]]:
    """Return the labels of every sample that /metrics prints, by name."""
    Queue.objects.create(name="default", depth=1, answered_at=Now())
    Node.objects.create(name="work@host", pid=1)
    ended = {"task": "app.one", "queue": "default", "state": "dead"}
    Finished.objects.create(**ended, count=1, buckets=[1] + [0] * 13)
    Job.objects.create(**ended, finished_at=Now())
    Job.objects.create(task="app.one", queue="default", due_at=Now())
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name: {*sample.labels, *ADDED} for family in families for sample in family.samples
    }


def test_rules_and_dashboard_name_only_what_is_printed(printed: dict[str, set[str]]) -> None:
    texts = [*re.split(r"- alert:", RULES.read_text())[1:], *QUERIES]
    tests = re.findall(r"series: '(.+?)'", FIRING.read_text())
    for text in [*texts, *tests]:
        used = set(NAME.findall(text))
        assert used <= printed.keys(), text
        for name, selector in re.findall(rf"({NAME.pattern}){{(.*?)}}", text):
            labels = set(re.findall(r"(\w+)=", selector))
            assert labels <= printed[name], text
        known = set.union(*(printed[name] for name in used))
        for labels in re.findall(r"\b(?:by|on) ?\((.*?)\)", text):
            assert set(labels.split(", ")) <= known, text
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= known, text


def test_no_metric_is_without_a_panel(printed: dict[str, set[str]]) -> None:
    shown = {re.sub(r"_bucket$", "", name) for query in QUERIES for name in NAME.findall(query)}
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in printed}
    assert names == shown


def test_dashboard_can_be_imported() -> None:
    assert re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 36
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert all(panel["datasource"] == source and panel["title"] for panel in panels)
    # what a query or a legend refers to
    assert set(re.findall(r"\$(\w+)", " ".join(QUERIES))) <= variables.keys()
    for panel in panels:
        for target in panel["targets"]:
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            grouped = re.match(r".*?\bby \((.*?)\)", target["expr"])
            assert grouped
            assert legend <= set(grouped[1].split(", ")), panel["title"]


def test_no_panel_covers_another() -> None:
    taken: dict[tuple[int, int], Any] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"]
