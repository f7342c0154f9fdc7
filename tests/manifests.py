"""The manifests of a baked project: rendered as by `kubectl apply -k`, and strictly validated."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.conftest import TEMPLATE, cookiecutter, run

Object = dict[str, Any]
PRODUCTION = "overlays/production"
COMPONENT = "app.kubernetes.io/component"
SCHEMA = json.loads((TEMPLATE / "tests/schemas/keda-2.18-scaledobject.json").read_text())


def baked(template: Path, folder: Path, **answers: Any) -> Path:
    """Bake into a folder with a name that has an underscore; return the project's folder."""
    done = cookiecutter(template, folder, project_slug="my_shop", **answers)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "my_shop"


def kubectl() -> str:
    """Return the kubectl of this environment, or of the machine; skip without one."""
    if not (found := shutil.which("kubectl", path=Path(sys.executable).parent)):
        found = shutil.which("kubectl")
    return found or pytest.skip("needs kubectl")


def kustomize(folder: Path) -> list[Object]:
    """Return the objects that `kubectl apply -k` would send."""
    return list(yaml.safe_load_all(run(kubectl(), "kustomize", str(folder), cwd=folder)))


def validate(objects: list[Object], version: str) -> None:
    """Raise jsonschema.ValidationError for what the API server would refuse or drop in silence."""
    for found in objects:
        if found["apiVersion"].startswith("keda.sh/"):
            jsonschema.Draft202012Validator(SCHEMA).validate(found)
        else:
            kubernetes_validate.validate(found, version, strict=True)


def replace(path: Path, old: str, new: str) -> None:
    """Change a file as its user would; the text has to be there."""
    text = path.read_text()
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new))


def copy(project: Path, folder: Path) -> Path:
    """Copy the manifests, to change them; return their folder."""
    return shutil.copytree(project / "deploy" / "kubernetes", folder / "kubernetes")


def with_flower(overlay: Path) -> Path:
    """Switch the commented component on."""
    line = "- ../../components/flower"
    replace(overlay / "kustomization.yaml", f"# {line}", line)
    return overlay


def of_kind(objects: list[Object], *kinds: str) -> Iterator[Object]:
    return (found for found in objects if found["kind"] in kinds)


def name(found: Object) -> str:
    return found["metadata"]["name"]


def component(found: Object) -> str:
    return found["metadata"]["labels"][COMPONENT]


def workloads(objects: list[Object], part: str = "") -> dict[str, Object]:
    """Return Deployments and Jobs by name: all, or those of one component."""
    found = of_kind(objects, "Deployment", "Job")
    return {name(each): each for each in found if part in ("", component(each))}


def pod(workload: Object) -> Object:
    return workload["spec"]["template"]["spec"]


def container(workload: Object) -> Object:
    (only,) = pod(workload)["containers"]
    return only


def environment(workload: Object) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(workload).get("env", [])}


def selected(objects: list[Object], selector: dict[str, str]) -> list[str]:
    """Return the names of the workloads whose pods carry these labels."""
    return [
        each
        for each, workload in workloads(objects).items()
        if selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    ]


def ports(rules: list[Object]) -> set[int]:
    """Return the ports of the rules of a NetworkPolicy."""
    return {port["port"] for rule in rules for port in rule["ports"]}


def assigned(source: Path, variable: str) -> ast.expr:
    """Return the expression that a module assigns to a variable; the module is not run."""
    (value,) = (
        node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable
    )
    return value


def engine(project: Path, module: str) -> Path:
    """Return the folder of the source of an engine in a bake."""
    (found,) = project.glob(f"packages/*/src/{module}")
    return found


def declared_queues(project: Path) -> list[str]:
    """Return the names in CELERY_TASK_QUEUES."""
    value = assigned(project / "config/celery_settings.py", "CELERY_TASK_QUEUES")
    (names,) = (node for node in ast.walk(value) if isinstance(node, ast.comprehension))
    return list(ast.literal_eval(names.iter))


def check(project: Path, workload: Object, probe: str, heartbeat: Path, age: float) -> int:
    """Run the probe of a workload beside a heartbeat of that age; return its exit code."""
    (variable, file), *_ = (v for v in environment(workload).items() if v[0].endswith("_FILE"))
    program, *arguments = container(workload)[probe]["exec"]["command"]
    assert program == "hardened-celery"
    heartbeat.touch()
    os.utime(heartbeat, (time.time() - age,) * 2)
    given = [str(heartbeat) if argument == file else argument for argument in arguments]
    command = [sys.executable, "-m", "hardened_celery", *given]
    env = {variable: str(heartbeat)}  # and nothing else: no broker, no database
    return subprocess.run(command, cwd=project, env=env, capture_output=True).returncode
