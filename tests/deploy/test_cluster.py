"""What is applied to a cluster: each file is valid, and all name each other rightly."""

import importlib.metadata
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from prefect.settings import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
POOLS = ("cpu", "gpu")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text()))


def helm(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "helm" / f"{name}.yaml").read_text())


def job(pool: str) -> dict[str, Any]:
    base = json.loads((DEPLOY / "pools" / f"kubernetes-{pool}.json").read_text())
    return base["job_configuration"]["job_manifest"]["spec"]["template"]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("name", ["fleet", "network-policy"])
def test_kubernetes_accepts_the_manifests_to_the_letter(name, version):
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


def labels_of(role: str) -> dict[str, str]:
    """Labels that the pods of a role carry, from where they are given."""
    if role == "job":
        return job("gpu")["metadata"]["labels"]
    values = helm("prefect-server" if role == "server" else "worker-gpu")
    return values["server" if role == "server" else "worker"]["podLabels"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether Kubernetes' label selector takes a pod with these labels."""
    plain = selector.get("matchLabels", {}).items() <= labels.items()
    return plain and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


def rules(role: str, direction: str) -> Iterator[dict[str, Any]]:
    """Rules of all policies that are about the pods of a role."""
    for policy in documents("network-policy"):
        spec = policy["spec"]
        if direction in spec["policyTypes"] and selects(spec["podSelector"], labels_of(role)):
            yield from spec.get(direction.lower(), [])


def reached_ports(role: str) -> set[int]:
    return {port["port"] for rule in rules(role, "Egress") for port in rule["ports"]}


@pytest.mark.parametrize(
    ("role", "ports"),
    [
        ("job", {53, 80, 443, 4200, 9090}),  # names, object store, server, metrics (service, pod)
        ("worker", {53, 443, 4200, 6443}),  # names, the cluster's API, server
        ("server", {53, 5432}),  # names, database
    ],
)
def test_pods_reach_what_they_need_and_nothing_else(role, ports):
    assert reached_ports(role) == ports
    assert not [rule for rule in rules(role, "Egress") if not rule.get("to")]


def test_the_job_that_migrates_the_database_reaches_it_and_what_it_runs_on_is_pinned():
    labels = helm("prefect-server")["migrations"]["podLabels"]
    egress = [
        rule
        for policy in documents("network-policy")
        if selects(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get("egress", [])
    ]
    assert {port["port"] for rule in egress for port in rule["ports"]} == reached_ports("server")
    guide = (DEPLOY.parent / "docs" / "cluster.md").read_text()
    installed = [c.replace("\\\n", "") for c in guide.split("helm upgrade --install")[1:]]
    commands = [command for command in installed if " prefect/" in command.splitlines()[0]]
    versions = [re.findall(r"--version (\S+)", command.splitlines()[0]) for command in commands]
    assert len(commands) == 2  # server, workers
    assert versions[0] == versions[1] != []


def test_metrics_are_sent_to_the_port_of_a_service_that_jobs_reach():
    (settings,) = (d["data"] for d in documents("fleet") if d["kind"] == "ConfigMap")
    address = urlsplit(settings["OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"])
    assert address.port in (None, 80)  # of prometheus-community's chart
    _, namespace = str(address.hostname).split(".")
    (rule,) = (r for r in rules("job", "Egress") if {"protocol": "TCP", "port": 80} in r["ports"])
    (peer,) = rule["to"]
    assert selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})


def test_no_pod_reaches_the_credentials_of_its_node():
    for role in ("job", "worker", "server"):
        for rule in rules(role, "Egress"):
            for peer in rule["to"]:
                if "ipBlock" in peer:
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"]


def test_only_the_server_is_reached():
    assert not [*rules("job", "Ingress"), *rules("worker", "Ingress")]
    (rule,) = rules("server", "Ingress")
    pods, ingress = rule["from"]
    assert all(selects(pods["podSelector"], labels_of(role)) for role in ("job", "worker"))
    assert "namespaceSelector" in ingress


def test_identities_exist_and_jobs_have_no_rights():
    found = documents("fleet")
    accounts = {d["metadata"]["name"] for d in found if d["kind"] == "ServiceAccount"}
    used = {job(pool)["spec"]["serviceAccountName"] for pool in POOLS}
    used |= {helm(f"worker-{pool}")["serviceAccount"]["name"] for pool in POOLS}
    assert used == accounts
    bound = {s["name"] for d in found if d["kind"] == "RoleBinding" for s in d["subjects"]}
    assert bound == {"ttt3r-worker"}
    (role,) = (d for d in found if d["kind"] == "Role")
    assert not [r for rule in role["rules"] for r in rule["resources"] if "secret" in r]


def test_names_agree_between_files():
    settings = [d["metadata"]["name"] for d in documents("fleet") if d["kind"] == "ConfigMap"]
    for pool in POOLS:
        references = job(pool)["spec"]["containers"][0]["envFrom"]
        assert [r["configMapRef"]["name"] for r in references if "configMapRef" in r] == settings
        values = helm(f"worker-{pool}")["worker"]
        assert values["config"]["workPool"] == pool
        assert (
            values["selfHostedServerApiConfig"]["apiUrl"] == "http://prefect-server.ttt3r:4200/api"
        )
    namespaces = {d["metadata"].get("namespace", "ttt3r") for d in documents("fleet")}
    assert namespaces == {"ttt3r"}


def test_jobs_give_signs_of_life_often_enough_for_the_automation():
    found = yaml.safe_load((DEPLOY / "automations.yaml").read_text())["automations"]
    (automation,) = (entry for entry in found if entry["name"] == "lost-runs")
    for kind in ("docker", "kubernetes"):
        for pool in POOLS:
            base = json.loads((DEPLOY / "pools" / f"{kind}-{pool}.json").read_text())
            settings = base["variables"]["properties"]["env"]["default"]
            every = int(settings["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
            assert 3 * every <= automation["trigger"]["within"]


def test_server_and_workers_run_the_pinned_prefect():
    version = importlib.metadata.version("prefect")
    images = [helm("prefect-server")["global"]["prefect"]["image"]]
    images += [helm(f"worker-{pool}")["worker"]["image"] for pool in POOLS]
    assert {image["prefectTag"].split("-")[0] for image in images} == {version}


def test_the_server_deletes_old_runs(monkeypatch):
    for variable in helm("prefect-server")["global"]["prefect"]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    vacuum = Settings().server.services.db_vacuum
    assert "flow_runs" in vacuum.enabled_vacuum_types
    assert vacuum.retention_period == timedelta(days=14)


def test_credentials_are_named_never_given():
    """Every secret is a reference, and the guide says how each is made."""
    guide = (DEPLOY.parent / "docs" / "cluster.md").read_text()
    server = helm("prefect-server")
    secrets = {server["server"]["basicAuth"]["existingSecret"], server["secret"]["name"]}
    assert server["secret"]["create"] is False
    for pool in POOLS:
        for entry in job(pool)["spec"]["containers"][0]["envFrom"]:
            secrets |= {entry["secretRef"]["name"]} if "secretRef" in entry else set()
        for variable in helm(f"worker-{pool}")["worker"]["extraEnvVars"]:
            if "valueFrom" in variable:
                secrets.add(variable["valueFrom"]["secretKeyRef"]["name"])
            else:
                assert not variable["name"].endswith(("AUTH_STRING", "API_KEY", "PASSWORD"))
    assert secrets == {"prefect-auth", "prefect-database", "ttt3r-s3"}
    for secret in secrets:
        assert f"create secret generic {secret}" in guide
    for file in re.findall(r"--from-file=(\S+)", guide):
        assert f'printf %s "$line" > {file}' in guide  # no newline becomes part of a password
