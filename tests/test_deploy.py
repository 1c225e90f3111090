"""What is in deploy/: the container, the systemd unit and the dashboard name what the server really has."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from conftest import ROOT
from mkdocs_hooks import command_problem
from servers import in_thread

DEPLOY = ROOT / "deploy"
DOCKERFILE, UNIT, DASHBOARD = (DEPLOY / name for name in ("Dockerfile", "deltamem.service", "grafana-dashboard.json"))


def lines_of(path: Path) -> list[str]:
    """The lines of a file, with those that a backslash continues, without comments."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def in_container() -> dict[str, str]:
    """What the last stage of the Dockerfile says, by instruction; the last of each kind."""
    lines = lines_of(DOCKERFILE)
    last = max(i for i, line in enumerate(lines) if line.startswith("FROM "))
    return {kind: rest for kind, _, rest in (line.partition(" ") for line in lines[last:])}


def unit() -> dict[str, str]:
    """The settings of the unit."""
    pairs = (line.partition("=") for line in lines_of(UNIT) if "=" in line)
    return {key: value for key, _, value in pairs}


def test_the_container_starts_a_server():
    said = in_container()
    command = [*json.loads(said["ENTRYPOINT"]), *json.loads(said["CMD"])]
    assert command_problem(shlex.join(command)) is None
    options = dict(itertools.pairwise(command))
    assert options["--port"] == said["EXPOSE"] and f":{said['EXPOSE']}/health" in said["HEALTHCHECK"]
    assert options["--store"].startswith(f"sqlite:///{said['VOLUME']}/")
    pulled = re.search(r"^RUN (deltamem pull .*)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert command_problem(pulled) is None
    assert said["ARG"] == f"MODEL={options['-m']}"  # what the image holds is what it serves
    assert "--api-key-file" in options  # it listens to all


def test_the_container_runs_as_an_ordinary_user():
    lines = lines_of(DOCKERFILE)
    user = in_container()["USER"]
    assert user not in ("root", "0") and any(line.startswith("RUN useradd") and user in line for line in lines)


def test_the_container_is_built_from_what_is_there():
    kept = [line[1:] for line in lines_of(DEPLOY / "Dockerfile.dockerignore") if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    packaged = ("pyproject.toml", "README.md", "LICENSE", "pydeltamem.pth", "_pydeltamem_startup.py")
    assert set(kept) >= {*packaged, "CMakeLists.txt", "pydeltamem", "convert", "native", "cmake", "licenses"}


def test_the_container_is_built_with_what_the_build_calls():
    """The slim images of Python have no compiler, and no git."""
    installed = {word for line in lines_of(DOCKERFILE) if "apt-get install" in line for word in line.split()}
    assert installed >= {"build-essential", "git"}


def test_the_unit_starts_a_server():
    said = unit()
    for key in ("ExecStart", "ExecStartPre"):
        program, _, rest = said[key].partition(" ")
        assert program.endswith("/bin/deltamem") and command_problem(f"deltamem {rest}") is None
    options = dict(itertools.pairwise(shlex.split(said["ExecStart"])))
    assert options["--store"].startswith(f"sqlite:////var/lib/{said['StateDirectory']}/")
    assert options["--api-key-file"] == "%d/" + said["LoadCredential"].partition(":")[0]
    assert said["ExecStartPre"].split()[-1] == options["-m"]
    assert said["DynamicUser"] == "yes" and "User" not in said


def test_the_dashboard_shows_what_the_server_measures():
    with in_thread() as api:
        body = {"messages": [{"role": "user", "content": "My name is Anna."}], "max_tokens": 8}
        assert api.http.post("/sessions/ada/v1/chat/completions", json=body).status_code == 200
        assert api.http.get("/v1/memories/nobody").status_code == 404
        scraped = api.http.get("/metrics").text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scraped):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    queries = re.findall(r'"(?:expr|query)": "([^"]*(?:\\.[^"]*)*)"', DASHBOARD.read_text(encoding="utf-8"))
    named: set[str] = set()
    for query in queries:
        names = re.findall(r"\bdeltamem_\w+", query)
        named.update(names)
        for name in names:
            assert name in labels, f"{query}: the server has no {name}"
        for by in re.findall(r"\bby \(([^)]*)\)", query):
            assert {label.strip() for label in by.split(",")} <= labels[names[0]], query
    shown = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in labels if name.startswith("deltamem_")}
    shown = {name.removesuffix("_total") for name in shown}
    assert {re.sub(r"_(bucket|total)$", "", name) for name in named} == shown  # and nothing is left out
    layout = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in layout}) == len(layout) and all(panel["targets"] for panel in layout)
