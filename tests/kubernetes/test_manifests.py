"""The manifests in `kubernetes/`: against schemas, against our configuration, and against each other."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from atom_cluster.config.accelerators import ACCELERATORS, Accelerator
from atom_cluster.config.serve_file import ServeApplication, ServeFile
from atom_cluster.gang.placement import bundles, strategy
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.runner.memory_plan import RankMemory, RankShape
from atom_cluster.tools.check_config import resolve_for
from atom_cluster.tools.memory_table import plan_groups
from atom_cluster.tools.model_source import find_model
from atom_cluster.units import GiB
from tests.kubernetes.kustomize import files_of, load_all, render
from tests.kubernetes.schemas import problems, templates

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "kubernetes"
DIRECTORIES = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
ALONE = {KUBERNETES / "fetch-model.yaml"}
"""Files that are applied by themselves."""
TESTS = {KUBERNETES / "monitoring" / "rules_test.yaml"}
"""Files that are never applied."""

SEVERAL_NODES = {
    "applications.0.deployments",
    "applications.0.args.prefill.resources_per_rank",
    "applications.0.args.decode.resources_per_rank",
    "applications.0.args.decode.replicas",
    "applications.0.args.kv_transfer",
    "applications.0.args.serving",
}
"""In what the manifest of several nodes differs from its file in `configs/`."""
SERVED = {
    "cpu-trial": ("smollm2_cpu", {"http_options.host"}),
    "mi300x-node": ("deepseek_r1_unified", set()),
    "deepseek-r1-pd": ("deepseek_r1_mtp", SEVERAL_NODES),
    "overlays/h200-node": ("deepseek_r1_unified", set()),
    "overlays/deepseek-r1-pd-h200": ("deepseek_r1_mtp", SEVERAL_NODES),
    "overlays/deepseek-r1-pd-monitored": ("deepseek_r1_mtp", SEVERAL_NODES),
}
"""By directory: the file in `configs/` that its cluster serves, and the keys in which it differs."""


def name_of(path: Path) -> str:
    return str(path.relative_to(KUBERNETES))


@cache
def rendered(name: str) -> list[dict[str, Any]]:
    return render(KUBERNETES / name)


def ray_service(name: str) -> dict[str, Any]:
    (service,) = [document for document in rendered(name) if document["kind"] == "RayService"]
    return service


def serve_file(name: str) -> ServeFile:
    return ServeFile.model_validate(yaml.safe_load(ray_service(name)["spec"]["serveConfigV2"]))


def application(name: str) -> ServeApplication:
    (only,) = serve_file(name).applications
    return only


def worker_groups(name: str) -> list[dict[str, Any]]:
    return ray_service(name)["spec"]["rayClusterConfig"]["workerGroupSpecs"]


def containers(name: str) -> list[dict[str, Any]]:
    return [container for template in templates(ray_service(name)) for container in template["spec"]["containers"]]


def num_gpus(group: dict[str, Any]) -> int:
    """GPUs of one of its pods."""
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    return sum(int(amount) for resource, amount in limits.items() if resource.endswith("/gpu"))


def custom_resources(group: dict[str, Any]) -> dict[str, float]:
    """Ray resources that one of its pods declares."""
    stated = group["rayStartParams"].get("resources", '"{}"')
    return json.loads(json.loads(stated))  # a JSON string: `ray start` gets it through a shell


def differences(given: Any, other: Any, where: str = "") -> set[str]:
    """Dotted keys in which two configurations differ, the outermost that only one of them has."""
    if isinstance(given, dict) and isinstance(other, dict):
        missing = {f"{where}{key}" for key in given.keys() ^ other.keys()}
        both = (differences(given[key], other[key], f"{where}{key}.") for key in given.keys() & other.keys())
        return missing.union(*both)
    if isinstance(given, list) and isinstance(other, list) and len(given) == len(other):
        return set().union(*(differences(a, b, f"{where}{i}.") for i, (a, b) in enumerate(zip(given, other))))
    return set() if given == other else {where.removesuffix(".")}


# --- schemas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", DIRECTORIES, ids=name_of)
def test_every_document_is_what_its_kind_allows(directory: Path) -> None:
    documents = rendered(name_of(directory))
    assert documents
    assert {document["metadata"]["name"]: found for document in documents if (found := problems(document))} == {}


@pytest.mark.parametrize("path", sorted(ALONE), ids=name_of)
def test_every_file_that_is_applied_alone_is_what_its_kind_allows(path: Path) -> None:
    assert [problems(document) for document in load_all(path)] == [[]]


def test_the_job_fetches_what_a_cluster_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = load_all(KUBERNETES / "fetch-model.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    interpreter, flag, program = container["command"]
    assert (interpreter, flag) == ("python", "-c")
    monkeypatch.setenv("MODEL", str(KUBERNETES))
    exec(program)  # the job's own command, of a model that is on this machine already
    assert capsys.readouterr().out == f"{KUBERNETES}\n"
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    for one in containers("deepseek-r1-pd"):
        assert {"name": "HF_HOME", "value": values["HF_HOME"]} in one["env"]
    assert values["MODEL"] == application("deepseek-r1-pd").args.model == application("mi300x-node").args.model


def test_every_yaml_is_part_of_a_kustomization_or_applied_alone() -> None:
    covered = set().union(*map(files_of, DIRECTORIES)) | ALONE | TESTS
    assert set(KUBERNETES.rglob("*.yaml")) == covered


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda service: service["spec"].update(serveConfig="x"), "'serveConfig' was unexpected"),
        (lambda service: worker(service).pop("groupName"), "'groupName' is a required property"),
        (lambda service: worker(service).update(replicas="two"), "'two' is not of type 'integer'"),
        (lambda service: pod(service).update(priority_class="x"), "'priority_class' was unexpected"),
        (lambda service: pod(service)["containers"][0].update(livenesProbe={}), "'livenesProbe' was unexpected"),
        (lambda service: service["spec"].update(upgradeStrategy={"clusterUpgradeOptions": {}}), "required property"),
    ],
)
def test_mistakes_are_found(change: Any, complaint: str) -> None:
    service = copy.deepcopy(ray_service("deepseek-r1-pd"))
    change(service)
    assert any(complaint in problem for problem in problems(service))


def worker(service: dict[str, Any]) -> dict[str, Any]:
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


def pod(service: dict[str, Any]) -> dict[str, Any]:
    return worker(service)["template"]["spec"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("directory", DIRECTORIES, ids=name_of)
def test_kustomize_agrees(directory: Path) -> None:
    found = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=True, timeout=60)
    theirs = [document for document in yaml.safe_load_all(found.stdout) if document is not None]
    ours = rendered(name_of(directory))
    assert sorted(map(_sortable, theirs)) == sorted(map(_sortable, ours))


def _sortable(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)


# --- what is served -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_is_a_file_of_configs_but_for_what_is_listed(name: str) -> None:
    source, listed = SERVED[name]
    given = yaml.safe_load(ray_service(name)["spec"]["serveConfigV2"])
    assert differences(given, yaml.safe_load((ROOT / "configs" / f"{source}.yaml").read_text())) == listed


def test_every_cluster_is_compared_with_its_configuration() -> None:
    with_service = {
        name_of(path) for path in DIRECTORIES if any(d["kind"] == "RayService" for d in rendered(name_of(path)))
    }
    assert with_service == set(SERVED)


@pytest.mark.parametrize("name", SERVED)
def test_serve_and_our_own_configuration_take_it(name: str) -> None:
    served = yaml.safe_load(ray_service(name)["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(served)
    assert serve_file(name).http_options.host == "0.0.0.0"  # KubeRay's probes and service come from outside


@pytest.mark.parametrize(("name", "transport"), [("deepseek-r1-pd", "mori"), ("overlays/deepseek-r1-pd-h200", "nixl")])
def test_kv_goes_over_the_rdma_library_of_the_vendor(name: str, transport: str) -> None:
    assert application(name).args.kv_transfer.transport == transport


# --- placement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_every_gang_finds_its_pods_and_no_others(name: str) -> None:
    """Each rank's bundle fits on pods of exactly one group, with all the GPUs that replicas of a role need."""
    for role, group in application(name).args.groups().items():
        device = "cuda" if group.device == "cuda" else "cpu"
        (_, *ranks) = bundles(group.parallel, device, group.resources_per_rank)
        wanted = {key: sum(rank.get(key, 0) for rank in ranks) for key in ranks[0] if key != "CPU"}
        takers = [
            pods
            for pods in worker_groups(name)
            if all({"GPU": num_gpus(pods), **custom_resources(pods)}.get(key, 0) > 0 for key in wanted)
        ]
        assert len(takers) == 1, role
        offered = {"GPU": num_gpus(takers[0]), **custom_resources(takers[0])}
        if strategy(group.parallel, device) == "STRICT_PACK":
            assert all(offered[key] >= amount for key, amount in wanted.items()), role
        num_pods = takers[0]["replicas"]
        assert all(offered[key] * num_pods >= amount * group.replicas for key, amount in wanted.items()), role


@pytest.mark.parametrize("name", SERVED)
def test_pods_declare_to_ray_what_they_have(name: str) -> None:
    for group in worker_groups(name):
        (container,) = group["template"]["spec"]["containers"]
        start, limits = group["rayStartParams"], container["resources"]["limits"]
        assert int(start["num-cpus"]) == int(limits["cpu"])
        assert int(start.get("num-gpus", 0)) == num_gpus(group)
        assert container["resources"]["requests"] == limits
        for role in ("prefill", "decode"):
            assert custom_resources(group).get(role, 0) in (0, num_gpus(group))
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", SERVED)
def test_rays_object_store_fits_the_shared_memory_beside_that_of_ranks(name: str) -> None:
    """Left to itself, Ray takes 30 % of a pod's memory: in /tmp where /dev/shm has less, else nearly all of that."""
    head = ray_service(name)["spec"]["rayClusterConfig"]["headGroupSpec"]
    for group in [head, *worker_groups(name)]:
        (volume,) = [volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shm"]
        size, unit = volume["emptyDir"]["sizeLimit"][:-2], volume["emptyDir"]["sizeLimit"][-2:]
        assert (volume["emptyDir"]["medium"], unit) == ("Memory", "Gi")
        assert 2 * int(group["rayStartParams"]["object-store-memory"]) <= int(size) * GiB


def test_ingress_and_router_are_on_pods_without_gpus() -> None:
    for deployment in application("deepseek-r1-pd").deployments:
        (resource,) = deployment.ray_actor_options.resources
        takers = [group for group in worker_groups("deepseek-r1-pd") if resource in custom_resources(group)]
        assert [num_gpus(group) for group in takers] == [0]
    # A rolling update starts as many ingresses again before it stops any.
    (frontend,) = takers
    needed = 2 * application("deepseek-r1-pd").args.serving.ingress_replicas + 0.01
    assert custom_resources(frontend)["frontend"] * frontend["replicas"] >= needed


@pytest.mark.parametrize("name", [name for name in SERVED if name != "cpu-trial"])
def test_the_model_fits_the_gpus_that_pods_are_placed_on(name: str) -> None:
    selectors = {str(group["template"]["spec"].get("nodeSelector")) for group in worker_groups(name) if num_gpus(group)}
    assert len(selectors) == 1
    (accelerator,) = [one for key, one in ACCELERATORS.items() if key in next(iter(selectors))]
    assert num_tokens(name, accelerator) >= 8 * 65536


@cache
def measured(model: str) -> dict[RankShape, RankMemory]:
    return {}


def num_tokens(name: str, accelerator: Accelerator) -> int:
    config = application(name).args
    model = find_model(config.model)
    resolved, planned = resolve_for(config, model, accelerator)
    groups = plan_groups(resolved.config, HfConfig(model.values), planned, measured=measured(config.model))
    return min(group.num_tokens for group in groups)


@pytest.mark.parametrize("name", [name for name in SERVED if "pd" in name])
def test_engines_of_one_node_are_one_and_have_rdma(name: str) -> None:
    for group in worker_groups(name):
        if not num_gpus(group):
            continue
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert container["resources"]["limits"]["rdma/hca"] == 1
        assert "IPC_LOCK" in container["securityContext"]["capabilities"]["add"]
        (term,) = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (expression,) = term["labelSelector"]["matchExpressions"]
        assert group["template"]["metadata"]["labels"][expression["key"]] in expression["values"]
        assert (term["topologyKey"], spec["hostNetwork"]) == ("kubernetes.io/hostname", True)
        taints = {toleration["key"] for toleration in spec["tolerations"]}
        assert {resource for resource in container["resources"]["limits"] if resource.endswith("/gpu")} < taints


# --- life of a pod --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_grace_is_as_long_as_what_is_configured_takes(name: str) -> None:
    serving = application(name).args.serving
    assert ray_service(name)["spec"]["rayClusterDeletionDelaySeconds"] >= serving.request_timeout_s
    for group in worker_groups(name):
        grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= serving.drain_timeout_s + 30


@pytest.mark.parametrize("name", SERVED)
def test_every_container_is_probed_bounded_and_unprivileged(name: str) -> None:
    for container in containers(name):
        assert container["livenessProbe"]["httpGet"]["port"] == 52365
        assert "readinessProbe" in container
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False and "privileged" not in security
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    for template in templates(ray_service(name)):
        has_rdma = any("rdma/hca" in one["resources"]["limits"] for one in template["spec"]["containers"])
        assert template["spec"]["securityContext"].get("runAsNonRoot", False) or has_rdma


@pytest.mark.parametrize("name", SERVED)
def test_secrets_come_from_secrets(name: str) -> None:
    spec = ray_service(name)["spec"]["rayClusterConfig"]
    assert spec["authOptions"] == {"mode": "token"}
    for container in containers(name):
        for variable in container["env"]:
            if re.search("SECRET|TOKEN|PASSWORD|KEY", variable["name"]):
                assert "secretKeyRef" in variable.get("valueFrom", {}) or variable["name"].endswith("_FILE")
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        for variable in ("ATOM_CLUSTER_SECRET_FILE", "ATOM_CLUSTER_API_KEYS_FILE"):
            if variable in values:
                assert mounts[str(Path(values[variable]).parent)] in ("secret", "api-keys")
        assert "ATOM_CLUSTER_SECRET_FILE" in values


@pytest.mark.parametrize("name", SERVED)
def test_what_pods_name_is_there(name: str) -> None:
    """Volumes that containers mount, claims, priority classes; and what budgets select."""
    documents = rendered(name)
    named = {(document["kind"], document["metadata"]["name"]) for document in documents}
    pods = templates(ray_service(name))
    for template in pods:
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounts == volumes.keys()
        claims = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in volumes.values()
            if "persistentVolumeClaim" in volume
        }
        assert {("PersistentVolumeClaim", claim) for claim in claims} <= named
        if "priorityClassName" in spec:
            assert ("PriorityClass", spec["priorityClassName"]) in named
    for document in documents:
        if document["kind"] == "PodDisruptionBudget":
            labels = document["spec"]["selector"]["matchLabels"].items()
            groups = [one for one in worker_groups(name) if labels <= one["template"]["metadata"]["labels"].items()]
            # An integer, as no controller with a scale owns these pods; and one that lets a node be drained.
            (group,) = groups
            assert document["spec"].keys() == {"minAvailable", "selector"}
            assert 1 <= document["spec"]["minAvailable"] < group["replicas"]


@pytest.mark.parametrize("name", SERVED)
def test_the_version_of_ray_is_that_of_the_images(name: str) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints-dev.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert ray_service(name)["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]


def test_the_readme_tells_of_every_manifest() -> None:
    text = (KUBERNETES / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (KUBERNETES / link).exists()] == []
    for path in [*DIRECTORIES, *ALONE]:
        assert f"`kubernetes/{name_of(path)}`" in text
    manifests = "\n".join(path.read_text() for path in KUBERNETES.rglob("*.yaml"))
    secrets = set(re.findall(r"secretName: ([\w-]+)|secretKeyRef: \{name: ([\w-]+)", manifests))
    for first, second in secrets:
        assert f"create secret generic {first or second}" in text
