"""deploy/kubernetes: the manifests are valid to the letter, and true to the code that they run.

No cluster is needed: `kubectl kustomize` renders, and the schemas come with packages. KEDA's
objects are checked against tests/schemas, a strict subset of the ScaledObject of KEDA 2.18.
"""

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import yaml

from hardened_celery.heartbeat_file import ready
from tests.manifests import (
    PRODUCTION,
    Object,
    assigned,
    baked,
    check,
    component,
    container,
    copy,
    declared_queues,
    engine,
    environment,
    kubectl,
    kustomize,
    name,
    of_kind,
    pod,
    ports,
    replace,
    selected,
    validate,
    with_flower,
    workloads,
)

# The oldest that knows all fields we use, and the newest whose schemas there are.
VERSIONS = ("1.30", "1.37")
KEDA = "overlays/production-keda"
VARIANTS = (PRODUCTION, KEDA, "flower")
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.fixture(scope="module")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked(template, tmp_path_factory.mktemp("kubernetes"))


@pytest.fixture(scope="module")
def variants(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Object]]:
    """Return the objects of each variant; `flower` is production with that component on."""
    folders = {variant: project / "deploy" / "kubernetes" / variant for variant in VARIANTS}
    copied = copy(project, tmp_path_factory.mktemp("flower"))
    folders["flower"] = with_flower(copied / PRODUCTION)
    return {variant: kustomize(folder) for variant, folder in folders.items()}


@pytest.fixture(params=VARIANTS)
def objects(variants: dict[str, list[Object]], request: pytest.FixtureRequest) -> list[Object]:
    return variants[request.param]


@pytest.fixture
def production(variants: dict[str, list[Object]]) -> list[Object]:
    return variants[PRODUCTION]


# --- Valid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_has_only_fields_that_exist(objects: list[Object], version: str) -> None:
    assert len(objects) > 10
    validate(objects, version)


def test_base_is_valid_without_an_overlay(project: Path) -> None:
    base = kustomize(project / "deploy/kubernetes/base")
    validate(base, VERSIONS[0])
    # what an overlay has to add, or nothing starts
    assert {container(each)["image"] for each in workloads(base).values()} == {"app:unset"}
    assert not list(of_kind(base, "ConfigMap", "Secret"))


WRONG = [
    ("base/web.yaml", "terminationGracePeriodSeconds", "terminationGracePeriodSecond"),
    ("base/workers/worker/worker.yaml", "maxUnavailable", "maxUnavailabe"),
    ("components/every-pod/pod.yaml", "readOnlyRootFilesystem", "readOnlyRootFileSystem"),
    ("base/network.yaml", "policyTypes", "policyType"),
    ("components/keda/kustomization.yaml", "stabilizationWindow", "stabilisationWindow"),
    ("components/keda/high.yaml", "scaleTargetRef", "scaleTarget"),
    ("components/keda/low.yaml", "ignoreNullValues", "ignoreNulls"),
]


@pytest.mark.parametrize(("file", "right", "wrong"), WRONG, ids=[case[2] for case in WRONG])
def test_a_typing_error_is_refused(
    project: Path, tmp_path: Path, file: str, right: str, wrong: str
) -> None:
    manifests = copy(project, tmp_path)
    replace(manifests / file, right, wrong)
    objects = kustomize(manifests / KEDA)
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        validate(objects, VERSIONS[-1])


def test_an_unknown_key_of_kustomize_is_refused(project: Path, tmp_path: Path) -> None:
    overlay = copy(project, tmp_path) / PRODUCTION
    replace(overlay / "kustomization.yaml", "replicas:", "replica:")
    done = subprocess.run([kubectl(), "kustomize", overlay], capture_output=True, text=True)
    assert done.returncode != 0
    assert 'unknown field "replica"' in done.stderr


def test_each_selector_meets_the_pods_of_one_deployment(objects: list[Object]) -> None:
    for found in of_kind(objects, "Deployment"):
        assert selected(objects, found["spec"]["selector"]["matchLabels"]) == [name(found)]
    (service,) = of_kind(objects, "Service")
    assert selected(objects, service["spec"]["selector"]) == ["web"]


def test_the_project_reads_every_variable_that_is_set(project: Path, objects: list[Object]) -> None:
    readers = [*project.glob("config/*.py"), *project.glob("packages/*/src/*/*.py")]
    readers += [*project.glob("**/README.md"), project / ".env.example"]
    text = " ".join(path.read_text() for path in readers)
    (settings,) = of_kind(objects, "ConfigMap")
    used = set(settings["data"]).union(*map(environment, workloads(objects).values()))
    unknown = {variable for variable in used if not re.search(rf"\b{variable}\b", text)}
    assert unknown == set()


def test_the_host_of_the_ingress_is_allowed(production: list[Object]) -> None:
    (settings,) = of_kind(production, "ConfigMap")
    (ingress,) = of_kind(production, "Ingress")
    hosts = [rule["host"] for rule in ingress["spec"]["rules"]]
    assert hosts == settings["data"]["DJANGO_ALLOWED_HOSTS"].split(",")
    assert hosts == ingress["spec"]["tls"][0]["hosts"]
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    (service,) = of_kind(production, "Service")
    port = service["spec"]["ports"][0]["name"]
    assert path["backend"]["service"] == {"name": name(service), "port": {"name": port}}


# --- A release ------------------------------------------------------------------------------------


def test_one_line_sets_tag_release_and_job_of_everything(project: Path, tmp_path: Path) -> None:
    overlay = with_flower(copy(project, tmp_path) / PRODUCTION)
    (overlay / "settings/release.env").write_text("RELEASE=2.0-rc1\n")
    # a port in the registry's name must not be taken for a tag
    replace(overlay / "kustomization.yaml", "images.example.com", "images:5000")
    objects = kustomize(overlay)
    found = workloads(objects)
    assert {container(each)["image"] for each in found.values()} == {"images:5000/my_shop:2.0-rc1"}
    assert len(found) == 8
    assert [name(job) for job in of_kind(objects, "Job")] == ["migrate-2.0-rc1"]


def test_every_container_gets_the_release_of_its_image(objects: list[Object]) -> None:
    (settings,) = of_kind(objects, "ConfigMap")
    assert re.search(r"-\w{10}$", name(settings)), "without a hash a change restarts nothing"
    for each in workloads(objects).values():
        assert container(each)["image"].rpartition(":")[2] == settings["data"]["RELEASE"]
        # the last wins over the Secret, and `env` would win over both
        secret, last = container(each)["envFrom"]
        assert secret == {"secretRef": {"name": "secrets"}}
        assert last == {"configMapRef": {"name": name(settings)}}
        assert "RELEASE" not in environment(each)


def test_steps_of_a_deploy_come_in_order_and_miss_nothing(
    project: Path, production: list[Object]
) -> None:
    readme = (project / "deploy/kubernetes/README.md").read_text()
    apply = re.compile(r'kubectl apply -k \$O(?: -l "?\$C(?:=| in )\(?([\w, ]*\w))?')
    forth, _, back = readme.partition("**Back**")
    steps = apply.findall(forth)
    assert steps == ["shared, migrate", "worker", "beat", ""]  # the last one applies everything
    # What the newer web has sent only its workers know; and the settings of that release are a
    # ConfigMap that may be gone.
    assert apply.findall(back.partition("In a hurry")[0]) == ["shared, web", "beat", "worker"]
    first = {o["kind"] for o in production if component(o) in steps[0].split(", ")}
    assert first == {"ConfigMap", "Job", "NetworkPolicy"}
    assert {o["metadata"]["namespace"] for o in production} == {"my-shop"}
    assert "NS=my-shop;" in readme


def test_migration_waits_for_no_lock_and_ends(objects: list[Object]) -> None:
    (job,) = of_kind(objects, "Job")
    assert container(job)["command"] == ["python", "-m", "rollout.release", "migrate"]
    assert 0 < job["spec"]["backoffLimit"] <= 5
    assert 0 < job["spec"]["activeDeadlineSeconds"] < job["spec"]["ttlSecondsAfterFinished"]


def test_new_pods_work_before_old_ones_go(objects: list[Object]) -> None:
    replaced = workloads(objects, "worker") | workloads(objects, "web")
    assert len(replaced) == 5
    for each in replaced.values():
        assert each["spec"]["strategy"] == {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        # without them a container counts as available before it has loaded the code, or takes work
        assert {"startupProbe", "readinessProbe"} <= container(each).keys()


def test_graces_are_longer_than_what_ends_within_them(project: Path, objects: list[Object]) -> None:
    web = workloads(objects)["web"]
    gunicorn = ast.literal_eval(assigned(project / "config/gunicorn.conf.py", "graceful_timeout"))
    before = container(web)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before >= 5
    assert pod(web)["terminationGracePeriodSeconds"] >= before + gunicorn + 5
    for worker in workloads(objects, "worker").values():
        own = int(environment(worker)["WORKER_GRACE_SECONDS"])
        assert pod(worker)["terminationGracePeriodSeconds"] >= own + 15


# --- Processes ------------------------------------------------------------------------------------


def test_each_queue_has_one_deployment_that_consumes_it(
    project: Path, objects: list[Object]
) -> None:
    consumed: Counter[str] = Counter()
    for each, worker in workloads(objects, "worker").items():
        assert container(worker)["command"] == ["hardened-celery", "worker", "-A", "config"]
        arguments = container(worker)["args"]
        assert arguments[::2] == ["-Q", "-c", "-n"]
        queue, concurrency, node = arguments[1::2]
        consumed.update(queue.split(","))
        assert (each, node) == (f"worker-{queue}", f"{queue}@%h")
        assert int(concurrency) > 0
    assert consumed == Counter(declared_queues(project))


def test_commands_are_those_of_compose(project: Path, variants: dict[str, list[Object]]) -> None:
    services = yaml.safe_load((project / "compose.yaml").read_text())["services"]
    found = workloads(variants["flower"])
    for each in ("beat", "flower"):
        assert container(found[each])["command"] == services[each]["command"]
    check = container(found["beat"])["livenessProbe"]["exec"]["command"]
    assert ["CMD", *check] == services["beat"]["healthcheck"]["test"]


def test_there_is_one_beat_and_nothing_starts_a_second(objects: list[Object]) -> None:
    beats = [each for each in workloads(objects).values() if "beat" in container(each)["command"]]
    (beat,) = beats
    assert (beat["spec"]["replicas"], beat["spec"]["strategy"]) == (1, {"type": "Recreate"})
    assert [each["tolerationSeconds"] for each in pod(beat)["tolerations"]] == [60, 60]
    scaled = {o["spec"]["scaleTargetRef"]["name"] for o in of_kind(objects, "ScaledObject")}
    assert name(beat) not in scaled


def test_probes_of_web_ask_paths_that_exist_and_none_the_queues(
    project: Path, objects: list[Object]
) -> None:
    web = container(workloads(objects)["web"])
    paths = [web[probe]["httpGet"]["path"] for probe in PROBES]
    assert paths == ["/healthz/live", "/healthz/live", "/healthz/ready?only=database"]
    probes = engine(project, "queue_probes")
    views = assigned(probes / "middleware.py", "VIEWS")
    assert {ast.literal_eval(path) for path in views.keys} > {p.partition("?")[0] for p in paths}
    timeout = re.search(r'"TIMEOUT": ([\d.]+)', (probes / "conf.py").read_text())
    assert web["readinessProbe"]["timeoutSeconds"] > float(timeout[1])


def test_liveness_of_workers_and_beat_is_the_heartbeat_of_their_process(
    project: Path, production: list[Object], tmp_path: Path
) -> None:
    for each in (workloads(production, "worker") | workloads(production, "beat")).values():
        for probe in ("startupProbe", "livenessProbe"):
            assert check(project, each, probe, tmp_path / "heartbeat", age=5) == 0
            assert check(project, each, probe, tmp_path / "heartbeat", age=150) == 1
        mounts = {m["mountPath"]: m["name"] for m in container(each)["volumeMounts"]}
        volumes = {v["name"]: v["emptyDir"] for v in pod(each)["volumes"]}
        assert volumes[mounts["/tmp"]]["medium"] == "Memory"


def test_every_container_is_hardened(project: Path, objects: list[Object]) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", (project / "Dockerfile").read_text(), re.M)
    for each in workloads(objects).values():
        spec = pod(each)
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": int(user[1]),
            "runAsGroup": int(user[2]),
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container(each)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        # what a read-only image has to be able to write
        mounted = {mount["name"] for mount in container(each)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        assert all(volume["emptyDir"].get("sizeLimit") for volume in spec["volumes"])


def test_memory_has_a_limit_and_the_processor_none(objects: list[Object]) -> None:
    for each in workloads(objects).values():
        resources = container(each)["resources"]
        assert resources["limits"].keys() == {"memory"}
        assert resources["requests"].keys() == {"cpu", "memory"}


# --- Around them ----------------------------------------------------------------------------------


def test_no_budget_blocks_the_drain_of_a_node(objects: list[Object]) -> None:
    guarded: list[str] = []
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == 1
        assert "minAvailable" not in budget["spec"]
        guarded += selected(objects, budget["spec"]["selector"]["matchLabels"])
    expected = [*workloads(objects, "web"), *workloads(objects, "worker")]
    assert sorted(guarded) == sorted(expected)


def test_pods_of_web_and_of_each_queue_are_spread(objects: list[Object]) -> None:
    spread = workloads(objects, "web") | workloads(objects, "worker")
    for each, found in spread.items():
        assert len(pod(found)["topologySpreadConstraints"]) == 2
        for constraint in pod(found)["topologySpreadConstraints"]:
            assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"
            assert selected(objects, constraint["labelSelector"]["matchLabels"]) == [each]


def test_a_worker_is_ready_by_the_file_that_its_launcher_removes(
    project: Path, objects: list[Object]
) -> None:
    ours = engine(project, "hardened_celery")
    assert "heartbeat_file.remove(heartbeat)" in (ours / "worker.py").read_text()
    for worker in workloads(objects, "worker").values():
        file = ready(Path(environment(worker)["WORKER_HEARTBEAT_FILE"]))
        assert container(worker)["readinessProbe"]["exec"]["command"] == ["test", "-e", str(file)]


def test_no_file_of_secrets_gets_into_git_or_an_image(project: Path) -> None:
    secrets = "deploy/kubernetes/secrets.env"
    assert (
        f"--from-env-file={Path(secrets).name}"
        in (project / "deploy/kubernetes/README.md").read_text()
    )
    subprocess.run(["git", "init", "-q", project], check=True)
    ignored = subprocess.run(["git", "-C", project, "check-ignore", "-q", secrets])
    assert ignored.returncode == 0
    assert (project / ".dockerignore").read_text().rstrip().endswith("**/*.env")


def test_policies_refuse_all_but_what_web_is_asked(objects: list[Object]) -> None:
    policies = {name(policy): policy["spec"] for policy in of_kind(objects, "NetworkPolicy")}
    everybody = selected(objects, policies["default"]["podSelector"]["matchLabels"])
    assert everybody == list(workloads(objects))
    assert policies["default"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policies["default"]
    assert selected(objects, policies["web"]["podSelector"]["matchLabels"]) == ["web"]
    web = container(workloads(objects)["web"])
    numbers = {port["name"]: port["containerPort"] for port in web["ports"]}
    probed = {numbers[web[probe]["httpGet"]["port"]] for probe in PROBES}
    assert ports(policies["web"]["ingress"]) == probed == {8000}
    assert policies.keys() == {"default", "web"}


@pytest.mark.parametrize(("broker", "port"), [("valkey", 6379), ("rabbitmq", 5672)])
def test_policies_let_out_what_the_project_calls(
    template: Path, tmp_path: Path, broker: str, port: int
) -> None:
    project = baked(template, tmp_path, broker=broker)
    compose = yaml.safe_load((project / "compose.yaml").read_text())
    assert f":{port}/" in compose["services"]["web"]["environment"]["CELERY_BROKER_URL"]
    objects = kustomize(project / "deploy/kubernetes" / PRODUCTION)
    (egress,) = (o["spec"]["egress"] for o in of_kind(objects, "NetworkPolicy") if name(o) != "web")
    assert ports(egress) == {53, 5432, port, 443}
