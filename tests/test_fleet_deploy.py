"""What deploy/ has for a fleet: manifests that Kubernetes takes, a configuration that HAProxy takes."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from importlib.metadata import requires

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from starlette.testclient import TestClient

from conftest import ROOT
from fleet import CONFIGURATION, haproxy_program
from mkdocs_hooks import command_problem
from pydeltamem.server.application import application
from pydeltamem.server.metrics import Metrics
from pydeltamem.server.state import Settings
from test_deploy import DOCKERFILE, in_container

MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))


@pytest.fixture(scope="module")
def resources():
    """By kind."""
    read = [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    return {one["kind"]: one for one in read}


@pytest.fixture
def container(resources):
    return resources["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def test_kubernetes_takes_the_manifests(resources):
    wanted = {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    assert set(resources) == wanted
    for resource in resources.values():
        kubernetes_validate.validate(resource, "1.33", strict=True)
    wrong = {**resources["Service"], "spec": {"ports": [{"prt": 80}]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_they_belong_together(resources, container):
    labels = resources["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert resources["Service"]["spec"]["selector"] == labels
    assert resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    scaler = resources["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == resources["Deployment"]["metadata"]["name"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] in Metrics(lambda: None).text().decode()
    ports = {port["name"] for port in container["ports"]}
    assert resources["Service"]["spec"]["ports"][0]["targetPort"] in ports


def test_the_command_is_the_servers(container):
    command = [*container["command"], *container["args"]]
    assert command_problem(" ".join(command)) is None
    options = dict(itertools.pairwise(command))
    assert options["--port"] == str(container["ports"][0]["containerPort"])
    assert options["--api-key-file"].startswith(container["volumeMounts"][0]["mountPath"])
    assert options["--store"] == f"$({container['env'][0]['name']})"
    assert in_container()["CMD"].count("smollm2") == 2 and options["-m"] == "smollm2"  # what the image holds


def test_the_image_has_the_driver_of_the_database():
    extras = {
        name.strip()
        for names in re.findall(r"pip install [^\n]*'\.\[([^\]]*)\]'", DOCKERFILE.read_text(encoding="utf-8"))
        for name in names.split(",")
    }
    drivers = {
        driver for path in MANIFESTS for driver in re.findall(r"postgresql\+(\w+)://", path.read_text(encoding="utf-8"))
    }
    needs = [Requirement(one) for one in requires("pydeltamem")]
    installed = {one.name for one in needs for extra in extras if one.marker and one.marker.evaluate({"extra": extra})}
    assert drivers and drivers <= installed


def test_a_tab_of_the_page_stays_at_one_replica(resources, container):
    assert "--no-page" in container["args"] or resources["Service"]["spec"]["sessionAffinity"] == "ClientIP"


def test_the_probes_ask_what_is_there(container):
    probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    client = TestClient(application(Settings(load=lambda: None)))  # which does not begin to load
    assert {client.get(path).json()["status"] for path in probes.values()} == {"loading model"}
    assert probes["readiness"] == "/health" != probes["liveness"]  # no restart because the database is away


def test_a_pod_has_the_time_to_end(resources, container):
    pod = resources["Deployment"]["spec"]["template"]["spec"]
    options = dict(itertools.pairwise(container["args"]))
    ends = container["lifecycle"]["preStop"]["sleep"]["seconds"] + int(options["--drain"]) + 30
    assert pod["terminationGracePeriodSeconds"] > ends


@pytest.mark.skipif(haproxy_program() is None, reason="no PostgreSQL or HAProxy: `make fleet-tools` installs them")
def test_haproxy_takes_its_configuration():
    addresses = {
        "DELTAMEM_BIND": ":18080",
        "DELTAMEM_REPLICA_1": "10.0.0.2:8080",
        "DELTAMEM_REPLICA_2": "10.0.0.3:8080",
    }
    command = [haproxy_program(), "-c", "-f", str(CONFIGURATION)]
    done = subprocess.run(command, env={**os.environ, **addresses}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
