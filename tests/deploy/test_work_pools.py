"""Base job templates: rendered as Prefect's workers do, and checked as their targets do."""

import asyncio
import json
import os
import re
import subprocess
import uuid
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from docker import DockerClient
from docker.models.containers import _create_container_args
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from tasks.prices import read_prices

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
POOLS = ("cpu", "gpu")
VERSIONS = ("1.30", "1.37")  # the oldest and the newest that are checked


def template(kind: str, pool: str) -> dict[str, Any]:
    return json.loads((DEPLOY / "pools" / f"{kind}-{pool}.json").read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text()))


def configured(cls: Any, base: dict[str, Any], **values: Any) -> Any:
    """What the worker hands to its infrastructure for a flow run with these job variables."""

    async def render() -> Any:
        async with get_client() as client:
            kind = "docker" if cls is DockerWorkerJobConfiguration else "kubernetes"
            pool = WorkPoolCreate(
                name=f"pool-{uuid.uuid4()}", type=kind, base_job_template=base
            )  # the server checks the template
            await client.create_work_pool(pool)
            configuration = await cls.from_template_and_values(base, values, client=client)
        run = FlowRun(id=uuid.uuid4(), name="infer (0, 1) s3://a/b.zarr", flow_id=uuid.uuid4())
        configuration.prepare_for_flow_run(run)
        return configuration

    return asyncio.run(render())


def kubernetes_job(base: dict[str, Any], **values: Any) -> dict[str, Any]:
    return configured(KubernetesWorkerJobConfiguration, base, **values).job_manifest


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest, prefect_server: None) -> str:
    return str(request.param)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_the_jobs_to_the_letter(pool, version):
    job = kubernetes_job(template("kubernetes", pool), image="i:1")
    kubernetes_validate.validate(job, version, strict=True)
    assert re.fullmatch("[a-z][a-z0-9-]*-", job["metadata"]["generateName"])


@pytest.mark.parametrize(("where", "key"), [("spec", "toleration"), ("securityContext", "sudo")])
def test_a_mistake_in_a_template_is_found(pool, where, key):
    base = template("kubernetes", pool)
    spec = base["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (spec if where == "spec" else spec[where])[key] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(kubernetes_job(base), VERSIONS[-1], strict=True)


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_every_variable_is_used_and_every_placeholder_is_a_variable(kind, pool):
    base = template(kind, pool)
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(base["job_configuration"])))
    assert used == set(base["variables"]["properties"])
    worker = KubernetesWorker if kind == "kubernetes" else DockerWorker
    known = worker.get_default_base_job_template()["job_configuration"]
    assert set(base["job_configuration"]) <= set(known)


def test_pods_may_do_nothing_but_compute(pool):
    pod = kubernetes_job(template("kubernetes", pool))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert pod["automountServiceAccountToken"] is False
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/cache", "/tmp"}
    assert all(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"])


def test_disk_that_a_pod_asks_for_holds_its_volumes(pool):
    pod = kubernetes_job(template("kubernetes", pool))["spec"]["template"]["spec"]
    sizes = [gibibytes(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"]]
    asked = pod["containers"][0]["resources"]["requests"]["ephemeral-storage"]
    assert gibibytes(asked) > sum(sizes)


def test_a_job_that_is_told_to_go_has_two_minutes_and_is_scheduled_again(pool):
    job = kubernetes_job(template("kubernetes", pool))
    pod = job["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120  # the notice of a spot machine
    environment = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"
    assert job["spec"]["backoffLimit"] == 0
    notes = job["spec"]["template"]["metadata"]["annotations"]
    assert "karpenter.sh/do-not-disrupt" not in notes  # a drain evicts no pod that has it


def test_job_variables_of_a_deployment_keep_the_settings_of_the_pool(pool):
    job = kubernetes_job(template("kubernetes", pool), image="mine:2", env={"A": "b"}, cpu="7")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "mine:2"
    assert container["resources"]["requests"]["cpu"] == "7"
    names = {e["name"] for e in container["env"]}
    assert {"A", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "PREFECT_API_URL"} <= names


def test_only_the_gpu_pool_asks_for_a_gpu(prefect_server):
    limits = {
        pool: kubernetes_job(template("kubernetes", pool))["spec"]["template"]["spec"][
            "containers"
        ][0]["resources"]["limits"].get("nvidia.com/gpu")
        for pool in POOLS
    }
    assert limits == {"cpu": None, "gpu": "1"}


def node_pools() -> dict[str, tuple[dict[str, str], list[dict[str, str]]]]:
    """Labels and taints of the nodes that Karpenter and the cluster-autoscaler would start."""
    found = {}
    for document in documents("karpenter"):
        if document["kind"] == "NodePool":
            node = document["spec"]["template"]
            found["karpenter " + document["metadata"]["name"]] = (
                node["metadata"]["labels"],
                node["spec"]["taints"],
            )
    (cluster,) = documents("eks-node-groups")
    for group in cluster["managedNodeGroups"]:
        found["eks " + group["name"]] = (group["labels"], group["taints"])
    return found


def runs_on(pod: dict[str, Any], labels: dict[str, str], taints: list[dict[str, str]]) -> bool:
    """Whether Kubernetes' scheduler would put the pod on such a node."""
    tolerated = all(
        any(
            t["key"] == taint["key"]
            and t["effect"] == taint["effect"]
            and (t["operator"] == "Exists" or t["value"] == taint["value"])
            for t in pod["tolerations"]
        )
        for taint in taints
    )
    return tolerated and pod["nodeSelector"].items() <= labels.items()


@pytest.mark.parametrize("mechanism", ["karpenter", "eks"])
def test_each_pool_has_nodes_of_its_own_from_either_mechanism(pool, mechanism):
    pod = kubernetes_job(template("kubernetes", pool))["spec"]["template"]["spec"]
    homes = [
        name
        for name, (labels, taints) in node_pools().items()
        if name.startswith(mechanism) and runs_on(pod, labels, taints)
    ]
    assert homes == [f"{mechanism} ttt3r-{pool}"]


def test_nodes_come_and_go_with_the_work_and_never_exceed_a_limit():
    for document in documents("karpenter"):
        if document["kind"] == "NodePool":
            spec = document["spec"]
            assert document["apiVersion"] == "karpenter.sh/v1"
            assert spec["disruption"]["consolidationPolicy"] == "WhenEmpty"
            assert spec["limits"]
            assert spec["template"]["spec"]["nodeClassRef"]["name"] == "ttt3r"
            keys = [r["key"] for r in spec["template"]["spec"]["requirements"]]
            assert "karpenter.sh/capacity-type" in keys
    (cluster,) = documents("eks-node-groups")
    for group in cluster["managedNodeGroups"]:
        assert group["minSize"] == group["desiredCapacity"] == 0 < group["maxSize"]
        assert group["propagateASGTags"]  # else an empty group's labels are unknown
        assert group["spot"]


def test_karpenter_disrupts_no_node_that_is_at_work():
    for document in documents("karpenter"):
        if document["kind"] == "NodePool":
            spec = document["spec"]
            assert spec["template"]["spec"]["expireAfter"] == "Never"
            assert spec["disruption"]["consolidationPolicy"] == "WhenEmpty"
            budgets = spec["disruption"]["budgets"]
            at_once = {r: budget["nodes"] for budget in budgets for r in budget["reasons"]}
            assert at_once == {"Drifted": "0", "Empty": "100%"}


def gibibytes(size: str) -> int:
    return int(size.removesuffix("Gi"))


def test_an_empty_group_of_nodes_is_known_to_have_the_disk_that_a_job_asks_for(pool):
    """The cluster-autoscaler starts no node from zero for a resource that it does not know of."""
    (cluster,) = documents("eks-node-groups")
    (group,) = (g for g in cluster["managedNodeGroups"] if g["labels"]["ttt3r/pool"] == pool)
    disk = group["tags"]["k8s.io/cluster-autoscaler/node-template/resources/ephemeral-storage"]
    pod = kubernetes_job(template("kubernetes", pool))["spec"]["template"]["spec"]
    asked = pod["containers"][0]["resources"]["requests"]["ephemeral-storage"]
    assert gibibytes(asked) <= gibibytes(disk) < group["volumeSize"]


def jobs_on(vcpus: int, gib: int, disk_gib: int, pod: dict[str, Any]) -> int:
    """Jobs of the pool that a node holds beside what Kubernetes takes of it."""
    asked = pod["containers"][0]["resources"]["requests"]
    sizes = {"memory": gib - 1, "ephemeral-storage": 0.85 * disk_gib}
    fits = [int(room / gibibytes(asked[name])) for name, room in sizes.items()]
    return min(*fits, int((vcpus - 0.3) / int(asked["cpu"])))


def test_parents_that_wait_leave_nodes_for_the_tiles_they_wait_for(prefect_server):
    found = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["deployments"]
    (scheduled,) = (d for d in found if d["name"] == "scheduled")
    # Two nights may overlap, each with a collection's run and drives of its own; and tiles.
    needed = 2 * (scheduled["parameters"]["drives_at_once"] + 1) + 3
    pod = kubernetes_job(template("kubernetes", "cpu"))["spec"]["template"]["spec"]

    by_name = {d["metadata"]["name"]: d["spec"] for d in documents("karpenter")}
    spec = by_name["ttt3r-cpu"]
    (disk,) = by_name["ttt3r"]["blockDeviceMappings"]
    disk_gib = gibibytes(disk["ebs"]["volumeSize"])
    wanted = {r["key"]: r["values"] for r in spec["template"]["spec"]["requirements"]}
    vcpus = [int(n) for n in wanted["karpenter.k8s.aws/instance-cpu"]]
    gib_per_vcpu = {"c": 2, "m": 4}
    categories = wanted["karpenter.k8s.aws/instance-category"]
    kinds = [(n, n * gib_per_vcpu[category]) for n in vcpus for category in categories]
    jobs = {(n, gib): jobs_on(n, gib, disk_gib, pod) for n, gib in kinds}
    worst = max(n / fitting for (n, _), fitting in jobs.items() if fitting)  # vCPU for a job
    assert worst == 8  # as docs/cluster.md says
    assert int(spec["limits"]["cpu"]) / worst >= needed

    (cluster,) = documents("eks-node-groups")
    (group,) = (g for g in cluster["managedNodeGroups"] if g["name"] == "ttt3r-cpu")
    assert jobs_on(4, 16, group["volumeSize"], pod) == 1  # an xlarge, the least of them
    assert group["maxSize"] >= needed


# The GPU of an instance family, as torch names it and so ledgers and prices do.
GPU_OF_FAMILY = {"g5": "NVIDIA A10G", "g6": "NVIDIA L4", "g6e": "NVIDIA L40S"}


def gpus_started() -> set[str]:
    """Kinds of device that either mechanism may start, as the price table names them."""
    asked = [
        requirement
        for document in documents("karpenter")
        if document["kind"] == "NodePool"
        for requirement in document["spec"]["template"]["spec"]["requirements"]
        if requirement["key"] == "karpenter.k8s.aws/instance-gpu-name"
    ]
    names = {f"NVIDIA {name.upper()}" for requirement in asked for name in requirement["values"]}
    (cluster,) = documents("eks-node-groups")
    for group in cluster["managedNodeGroups"]:
        if group["name"] == "ttt3r-gpu":
            families = {instance.partition(".")[0] for instance in group["instanceTypes"]}
            names |= {GPU_OF_FAMILY[family] for family in families}
    return names


def test_every_gpu_that_nodes_bring_has_a_price():
    prices = read_prices(str(DEPLOY / "prices.toml"))
    assert gpus_started() == set(GPU_OF_FAMILY.values()) <= set(prices.per_gpu_hour)


def container_settings(pool: str) -> dict[str, Any]:
    """What docker-py would send to the engine; no engine is asked."""
    elsewhere = {"PREFECT_API_URL": "http://prefect:4200/api"}  # else the engine is asked
    base = template("docker", pool)
    configuration = configured(DockerWorkerJobConfiguration, base, env=elsewhere)
    client = DockerClient(base_url="tcp://127.0.0.1:1", version="1.43")
    try:
        settings = DockerWorker._build_container_settings(None, client, configuration)
    finally:
        client.close()
    return _create_container_args(
        {**settings, "detach": True, "version": "1.43", "network_mode": None}
    )


def test_docker_containers_are_as_locked_down(pool):
    settings = container_settings(pool)
    host = settings["host_config"]
    assert settings["user"] == "10001:10001"
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Tmpfs"] == {"/tmp": "size=8g,mode=1777"}
    assert host["Memory"] == host["MemorySwap"]
    assert "/etc/ttt3r:/run/ttt3r:ro" in host["Binds"]
    assert settings["environment"]["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"


def test_the_guide_makes_credentials_that_a_docker_container_can_read(pool):
    settings = container_settings(pool)
    at = settings["environment"]["AWS_SHARED_CREDENTIALS_FILE"].replace("/run/", "/etc/")
    guide = (DEPLOY.parent / "docs" / "cluster.md").read_text()
    (owner,) = re.findall(rf"sudo install -o (\d+) -g \1 -m 400 \S+ {at}", guide)
    assert settings["user"] == f"{owner}:{owner}"


def test_a_docker_container_has_the_one_gpu_of_its_machine_and_the_guide_says_one_run(pool):
    gpus = container_settings(pool)["host_config"].get("DeviceRequests") or []
    asked = [(gpu["Count"], gpu["Capabilities"]) for gpu in gpus]
    assert asked == ([(1, [["gpu"]])] if pool == "gpu" else [])
    guide = (DEPLOY.parent / "docs" / "cluster.md").read_text()
    (command,) = re.findall(rf"prefect worker start --pool {pool} --type docker.*", guide)
    assert ("--limit 1 " in command) == (pool == "gpu")


def test_the_guide_gives_every_pool_the_image_of_the_registry(tmp_path):
    """Its loops are run with a stand-in for prefect and helm."""
    guide = (DEPLOY.parent / "docs" / "cluster.md").read_text()
    loops = re.findall(r"^for pool in cpu gpu; do\n.*?^done$", guide, re.DOTALL | re.MULTILINE)
    for kind, loop in zip(("kubernetes", "docker"), loops, strict=True):
        script = f"set -e\nln -sfn {DEPLOY} deploy\nprefect() {{ :; }}\nhelm() {{ :; }}\n{loop}"
        environment = {**os.environ, "REGISTRY": "registry.example"}
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
        for pool in POOLS:
            made = json.loads((tmp_path / f"{pool}.json").read_text())
            ours = template(kind, pool)
            image = ours["variables"]["properties"]["image"]
            image["default"] = f"registry.example/{image['default']}"
            assert made == ours
