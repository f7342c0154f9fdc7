"""deploy/kubernetes with KEDA: it asks for what is printed, and decides alone."""

import ast
import re
from pathlib import Path

import pytest

from tests.manifests import Object, baked, container, engine, kustomize, name, of_kind, workloads


@pytest.fixture(scope="module")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked(template, tmp_path_factory.mktemp("keda"))


@pytest.fixture(scope="module")
def scaled(project: Path) -> list[Object]:
    return kustomize(project / "deploy/kubernetes/overlays/production-keda")


def test_keda_alone_sets_the_number_of_workers(scaled: list[Object]) -> None:
    targets = {}
    for found in of_kind(scaled, "ScaledObject"):
        spec = found["spec"]
        targets[spec["scaleTargetRef"]["name"]] = spec
        assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
        assert spec["minReplicaCount"] <= spec["fallback"]["replicas"] < spec["maxReplicaCount"]
        down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
        assert down["stabilizationWindowSeconds"] == 300
    assert targets.keys() == {"worker-default", "worker-high", "worker-low"}
    free = {each for each, found in workloads(scaled).items() if "replicas" not in found["spec"]}
    assert free == targets.keys() | {name(job) for job in of_kind(scaled, "Job")}


def test_keda_asks_for_a_metric_and_labels_that_are_printed(
    project: Path, scaled: list[Object]
) -> None:
    source = (engine(project, "queue_probes") / "metrics.py").read_text()
    names, lists = re.search(r"^(QUEUE, .*) = (.*)$", source, re.MULTILINE).groups()
    labels = dict(zip(names.split(", "), ast.literal_eval(lists), strict=True))
    attempt = (engine(project, "durable_jobs") / "attempt.py").read_text()
    states = set(re.findall(r"[A-Z]+ = \"(\w+)\"", attempt))
    for found in of_kind(scaled, "ScaledObject"):
        counted = []
        for trigger in found["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            (metric,) = set(re.findall(r"\w+(?={)", query))
            printed = re.search(rf'"{metric}": \(Gauge, (\w+),', source)
            matchers = dict(re.findall(r'(\w+)=~?"([^"]*)"', query))
            assert matchers.keys() <= set(labels[printed[1]])
            assert found["spec"]["scaleTargetRef"]["name"] == f"worker-{matchers['queue']}"
            counted.append(set(matchers["state"].split("|")))
            # when jobs cannot be counted the metric is missing: an error, and not zero jobs
            assert trigger["metadata"]["ignoreNullValues"] == "false"
            assert trigger["metadata"]["serverAddress"] == "http://prometheus.monitoring.svc:9090"
        assert counted == [{"queued", "running"}, {"running"}]
        assert {"queued", "running"} <= states
        # as many workers as what runs needs
        processes = container(workloads(scaled)[name(found)])["args"][3]
        assert found["spec"]["triggers"][1]["metadata"]["threshold"] == processes


def test_control_is_not_scaled_and_outlives_a_node(scaled: list[Object]) -> None:
    assert workloads(scaled)["worker-control"]["spec"]["replicas"] == 2
