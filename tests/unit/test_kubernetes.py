"""The Kubernetes manifests fit Kubernetes' own schemas, and together keep to what the product promises.

No cluster is asked. Each rule is a function that names what breaks it; each is also shown a copy that does.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from deploy.server.app import create_app
from deploy.server.exposure import check_exposure
from deploy.server.testing import MemoryLog
from ml.errors import ConfigurationError, ServiceUnavailable
from ml.monitoring.prediction_log import PredictionLog
from ml.serving.batcher import Batcher
from ml.serving.router import Router
from ml.settings import Settings
from tests.kubernetes_manifests import (
    FOLDER,
    KUSTOMIZATION,
    ROOT,
    VERSION,
    Manifests,
    containers,
    documented_secrets,
    name_of,
    referred_secrets,
    schema_errors,
    selects,
)

MANIFESTS = Manifests()
SERVER = "prediction-server"

Rule = Callable[[Manifests], Iterator[str]]


# --- Rules ------------------------------------------------------------------------------------------------------------


def fits_the_schema(m: Manifests) -> Iterator[str]:
    for document in m.documents:
        yield from schema_errors(document)


def no_pod_can_more_than_it_must(m: Manifests) -> Iterator[str]:
    for workload in m.workloads():
        name, pod = name_of(workload), workload["spec"]["template"]["spec"]
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{name}: holds a token of the Kubernetes API"
        if {"hostNetwork", "hostPID", "hostIPC"} & pod.keys():
            yield f"{name}: shares a namespace with its node"
        of_pod = pod["securityContext"]
        if (of_pod.get("runAsNonRoot"), of_pod.get("runAsUser"), of_pod.get("runAsGroup")) != (True, 50000, 0):
            yield f"{name}: is not the user that owns the image's folders"
        if of_pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: may make any system call"
        for container in containers(pod):
            expected = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if container.get("securityContext") != expected:
                yield f"{name}/{container['name']}: its security context is not {expected}"


def every_container_has_its_size(m: Manifests) -> Iterator[str]:
    for workload in m.workloads():
        for container in containers(workload["spec"]["template"]["spec"]):
            size = container.get("resources", {})
            if not {"cpu", "memory"} <= size.get("requests", {}).keys() or "memory" not in size.get("limits", {}):
                yield f"{name_of(workload)}/{container['name']}: {size}"
            elif _bytes(size["requests"]["memory"]) > _bytes(size["limits"]["memory"]):
                yield f"{name_of(workload)}/{container['name']}: requests more memory than its limit"


def images_are_of_this_version(m: Manifests) -> Iterator[str]:
    for workload in m.workloads():
        for container in containers(workload["spec"]["template"]["spec"]):
            repository, _, tag = container["image"].rpartition(":")
            if tag != VERSION:
                yield f"{name_of(workload)}/{container['name']}: {container['image']} is not of version {VERSION}"
            if not (ROOT / "deploy" / "docker" / repository.removeprefix("cifar10/") / "Dockerfile").is_file():
                yield f"{name_of(workload)}/{container['name']}: {repository} is none of our images"


def volumes_and_mounts_match(m: Manifests) -> Iterator[str]:
    claims = {name_of(claim) for claim in m.of("PersistentVolumeClaim")}
    for claim in m.of("PersistentVolumeClaim"):
        if claim["spec"]["accessModes"] != ["ReadWriteMany"]:
            yield f"{name_of(claim)}: pods on different nodes could not share it"
    for workload in m.workloads():
        name, pod = name_of(workload), workload["spec"]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            if volume.get("persistentVolumeClaim", {}).get("claimName", next(iter(claims))) not in claims:
                yield f"{name}: {volume} is no claim of ours"
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{name}: {volume['name']} could fill the node's disk"
        mounted = [mount for container in containers(pod) for mount in container.get("volumeMounts", [])]
        if {mount["name"] for mount in mounted} != volumes.keys():
            yield f"{name}: volumes {sorted(volumes)} and mounts {mounted} differ"
        for container in containers(pod):
            if "/tmp" not in {mount["mountPath"] for mount in container.get("volumeMounts", [])}:
                yield f"{name}/{container['name']}: nothing can be written to /tmp"


def deployments_are_probed(m: Manifests) -> Iterator[str]:
    for deployment in m.of("Deployment"):
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        ports = {port["name"] for port in container["ports"]}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            if probe.get("httpGet", {}).get("port") not in ports:
                yield f"{name_of(deployment)}: its {kind} asks none of its ports"


def the_server_is_probed_as_it_answers(m: Manifests) -> Iterator[str]:
    container = m.container(SERVER)
    path = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    waiting, ready = _server(None).test_client(), _server(_MODEL).test_client()
    for kind in ("startup", "liveness"):
        if (answer := waiting.get(path[kind])).status_code != 200:
            yield f"{kind}: {path[kind]} answers {answer.status_code} while there is no champion"
    if (answer := waiting.get(path["readiness"])).status_code != 503:
        yield f"readiness: {path['readiness']} answers {answer.status_code} while there is no champion"
    if (answer := ready.get(path["readiness"])).status_code != 200:
        yield f"readiness: {path['readiness']} answers {answer.status_code} with a champion"
    if container["ports"] != [{"name": "http", "containerPort": Settings.model_fields["api_port"].default}]:
        yield f"{container['ports']}: the server listens elsewhere"


def the_server_has_time_to_end(m: Manifests) -> Iterator[str]:
    pod = m.pod("Deployment", SERVER)
    command = (
        pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    )
    pause = int(command[1])
    if command[0] != "sleep" or not 3 <= pause <= 15:
        yield f"preStop is {command}: the Service still sends requests to a server that has closed its port"
    follower, shadows = 1, 2  # to join the one's thread; to write the other, and to join its thread
    flush = 2 * _timeout(PredictionLog.close) + _timeout(Router.close) + _timeout(Batcher.close) + follower + shadows
    needed = pause + _supervisor("END_SECONDS") + flush
    if pod.get("terminationGracePeriodSeconds", 30) <= needed:
        yield f"killed before the {needed:.0f} s are over that ending in order may take"


def the_server_predicts_with_the_cores_it_requests(m: Manifests) -> Iterator[str]:
    container = m.container(SERVER)
    [cores] = [variable for variable in container["env"] if variable["name"] == "PREDICTION_CORES"] or [{}]
    if cores.get("valueFrom") != {"resourceFieldRef": {"resource": "requests.cpu"}}:
        yield f"{cores}: another number than it requests"
    if "cpu" in container["resources"]["limits"]:
        yield "a limit of CPU holds it up in the middle of a prediction"


def changed_keys_reach_a_running_server(m: Manifests) -> Iterator[str]:
    container = m.container(SERVER)
    [volume] = [v for v in m.pod("Deployment", SERVER)["volumes"] if "secret" in v] or [{}]
    mounts = [mount for mount in container["volumeMounts"] if mount["name"] == volume.get("name")]
    if not volume.get("secret", {}).get("optional"):
        yield "a server without the file of keys does not start"
    if [mount for mount in mounts if "subPath" in mount]:
        yield "what is mounted by subPath never changes"
    named = re.search(r"# PREDICTION_API_KEYS_FILE: (\S+)/([\w.]+)", (FOLDER / "settings.yaml").read_text())
    assert named is not None
    if [mount["mountPath"] for mount in mounts] != [named[1]]:
        yield f"the keys lie in {mounts}, and settings.yaml says {named[1]}"
    if {named[2]} != documented_secrets().get(volume.get("secret", {}).get("secretName")):
        yield f"README.md does not make the file {named[2]}"


def the_tables_can_be_left_for_the_end_of_an_upgrade(m: Manifests) -> Iterator[str]:
    key, value = re.search(r"--selector '([^']+)!=([^']+)'", (FOLDER / "README.md").read_text()).groups()  # type: ignore[union-attr]
    left = [f"{d['kind']} {name_of(d)}" for d in m.documents if d["metadata"].get("labels", {}).get(key) == value]
    if left != ["Job predictions-migrations"]:
        yield f"README.md's first apply leaves out {left}"


def a_rollout_never_has_fewer_servers(m: Manifests) -> Iterator[str]:
    spec = m.get("Deployment", SERVER)["spec"]
    strategy = spec.get("strategy", {})
    if strategy.get("type") != "RollingUpdate" or strategy.get("rollingUpdate", {}).get("maxUnavailable") != 0:
        yield f"{strategy}: takes a server away before the next is ready"
    if "replicas" in spec:
        yield "replicas is set: applying the manifest again undoes what the autoscaler did"


def the_autoscaler_scales_the_server(m: Manifests) -> Iterator[str]:
    [scaler] = [hpa["spec"] for hpa in m.of("HorizontalPodAutoscaler")]
    if scaler["scaleTargetRef"] != {"apiVersion": "apps/v1", "kind": "Deployment", "name": SERVER}:
        yield f"it scales {scaler['scaleTargetRef']}"
    if not 2 <= scaler["minReplicas"] < scaler["maxReplicas"]:
        yield f"{scaler['minReplicas']} to {scaler['maxReplicas']} replicas"
    [metric] = scaler["metrics"]
    if metric["resource"]["name"] not in m.container(SERVER)["resources"]["requests"]:
        yield "utilisation is measured against a request that there is not"
    if scaler.get("behavior", {}).get("scaleDown", {}).get("stabilizationWindowSeconds", 0) < 60:
        yield "a short lull takes servers away"


def a_drained_node_leaves_a_server(m: Manifests) -> Iterator[str]:
    [budget] = [pdb["spec"] for pdb in m.of("PodDisruptionBudget")]
    chosen = [name_of(w) for w in m.workloads() if selects(budget["selector"], m.pod_labels(name_of(w)))]
    if chosen != [SERVER]:
        yield f"the budget is of {chosen}"
    [scaler] = m.of("HorizontalPodAutoscaler")
    if not 1 <= budget.get("maxUnavailable", 0) < scaler["spec"]["minReplicas"]:
        yield f"{budget}: either no node can be drained, or no server need be left"
    if budget.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
        yield "without a champion no node could be drained"


def servers_spread_over_nodes(m: Manifests) -> Iterator[str]:
    spread = m.pod("Deployment", SERVER).get("topologySpreadConstraints", [])
    if "kubernetes.io/hostname" not in {constraint["topologyKey"] for constraint in spread}:
        yield "one node may hold all servers"
    for constraint in spread:
        if not selects(constraint["labelSelector"], m.pod_labels(SERVER)):
            yield f"{constraint['topologyKey']}: spreads other pods"


def selectors_match_their_own_pods(m: Manifests) -> Iterator[str]:
    for deployment in m.of("Deployment"):
        chosen = [
            name_of(w) for w in m.workloads() if selects(deployment["spec"]["selector"], m.pod_labels(name_of(w)))
        ]
        if chosen != [name_of(deployment)]:
            yield f"Deployment {name_of(deployment)} selects {chosen}"
    for service in m.of("Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        chosen = [d for d in m.of("Deployment") if selects(selector, m.pod_labels(name_of(d)))]
        if [name_of(d) for d in chosen] != [name_of(service)]:
            yield f"Service {name_of(service)} leads to {[name_of(d) for d in chosen]}"
            continue
        ports = {port["name"]: port["containerPort"] for port in m.container(name_of(service))["ports"]}
        for port in service["spec"]["ports"]:
            if ports.get(port["targetPort"]) != port["port"]:
                yield f"Service {name_of(service)}: {port} is none of {ports}"


def only_these_connections_are_open(m: Manifests) -> Iterator[str]:
    pod = {
        name: _Pod(m.pod_labels(name)) for name in (SERVER, "mlflow-server", "evidently-ui", "predictions-migrations")
    }
    task = _Pod({"tier": "airflow", "component": "worker"})
    airflow_api = _Pod({"tier": "airflow", "component": "api-server"})
    stranger, outside = _Pod({"app": "stranger"}), _Pod({}, namespace="elsewhere")
    collector = _Pod({"app.kubernetes.io/name": "opentelemetry-collector"}, namespace="elsewhere")
    resolver = _Pod({"k8s-app": "kube-dns"}, namespace="kube-system")
    server, mlflow, reports, migrations = pod.values()
    opened = [
        *((each, resolver, 53) for each in (*pod.values(), task, airflow_api)),
        (server, outside, 5432),
        (server, mlflow, 5000),
        (server, collector, 4318),
        (outside, server, 8000),
        (mlflow, outside, 5432),
        (mlflow, outside, 443),
        (migrations, outside, 5432),
        *(
            (task, target, port)
            for target, port in ((mlflow, 5000), (outside, 5432), (outside, 443), (airflow_api, 8080))
        ),
        *((airflow_api, target, port) for target, port in ((mlflow, 5000), (server, 8000), (reports, 8001))),
        (outside, airflow_api, 8080),
    ]
    # Each side must refuse by itself, whatever the other side's policies are.
    no_caller = [
        *((mlflow, source, 5000) for source in (stranger, outside, reports, migrations)),
        (mlflow, server, 22),
        *((reports, source, 8001) for source in (stranger, outside, server)),
        *((server, outside, port) for port in (22, 5432)),
        *((pod_, outside, 80) for pod_ in (migrations, stranger)),
        *((task, source, 8793) for source in (stranger, outside, server)),
    ]
    no_callee = [
        *((server, outside, port) for port in (22, 80, 443, 4318, 5000, 8080)),
        *((server, collector, port) for port in (22, 443, 8000)),
        *(
            (server, target, port)
            for target, port in ((reports, 8001), (airflow_api, 8080), (mlflow, 22), (server, 8000))
        ),
        *((reports, target, port) for target, port in ((mlflow, 5000), (outside, 443), (outside, 5432))),
        *((source, outside, 443) for source in (migrations, stranger)),
        (mlflow, outside, 80),
    ]
    for source, target, port in opened:
        if not (_passes(m, "Egress", source, target, port) and _passes(m, "Ingress", target, source, port)):
            yield f"{source} must reach {target} on {port}"
    for target, source, port in no_caller:
        if _passes(m, "Ingress", target, source, port):
            yield f"{target} must not be called by {source} on {port}"
    for source, target, port in no_callee:
        if _passes(m, "Egress", source, target, port):
            yield f"{source} must not call {target} on {port}"


def settings_are_known_and_lead_somewhere(m: Manifests) -> Iterator[str]:
    settings = m.get("ConfigMap", "cifar10-settings")["data"]
    if settings.get("MLOPS_ENV") != "production":
        yield "MLOPS_ENV is not production"
    services = {name_of(service): service["spec"]["ports"][0]["port"] for service in m.of("Service")}
    for name, value in settings.items():
        if name.lower() not in Settings.model_fields:
            yield f"{name} is no setting"
        url = urlsplit(value)
        if url.scheme in ("http", "https") and services.get(url.hostname or "") != url.port:
            yield f"{name}={value} leads to none of {services}"


def service_names_set_no_setting(m: Manifests) -> Iterator[str]:
    # Kubernetes sets NAME_PORT=tcp://... for each Service, unless a pod says enableServiceLinks: false.
    for service in m.of("Service"):
        prefix = name_of(service).replace("-", "_")
        for variable in (f"{prefix}_port", f"{prefix}_service_host", f"{prefix}_service_port"):
            if variable in Settings.model_fields:
                yield f"a Service called {name_of(service)} sets {variable.upper()}"
    for workload in m.workloads():
        if workload["spec"]["template"]["spec"].get("enableServiceLinks") is not False:
            yield f"{name_of(workload)}: has variables of every Service in its environment"


def secrets_are_made_by_hand_and_told_of(m: Manifests) -> Iterator[str]:
    if m.of("Secret"):
        yield "a Secret is committed"
    told = documented_secrets()
    for workload in m.workloads():
        pod = workload["spec"]["template"]["spec"]
        for name, key in referred_secrets(containers(pod), pod.get("volumes", [])):
            if name not in told or not {key} - {None} <= told[name]:
                yield f"{name_of(workload)} wants {name} {key or ''}, which README.md does not tell how to make"


RULES: list[Rule] = [
    fits_the_schema,
    no_pod_can_more_than_it_must,
    every_container_has_its_size,
    images_are_of_this_version,
    volumes_and_mounts_match,
    deployments_are_probed,
    the_server_is_probed_as_it_answers,
    the_server_has_time_to_end,
    the_server_predicts_with_the_cores_it_requests,
    changed_keys_reach_a_running_server,
    the_tables_can_be_left_for_the_end_of_an_upgrade,
    a_rollout_never_has_fewer_servers,
    the_autoscaler_scales_the_server,
    a_drained_node_leaves_a_server,
    servers_spread_over_nodes,
    selectors_match_their_own_pods,
    only_these_connections_are_open,
    settings_are_known_and_lead_somewhere,
    service_names_set_no_setting,
    secrets_are_made_by_hand_and_told_of,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_manifests_keep_to(rule):
    assert list(rule(MANIFESTS)) == []


# --- Copies that break a rule -----------------------------------------------------------------------------------------


def _change(kind: str, name: str, path: str, value: Any) -> Callable[[Manifests], None]:
    """Sets what lies under a dotted path; `...` removes it."""

    def spoil(m: Manifests) -> None:
        place: Any = m.get(kind, name)
        *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
        for step in way:
            place = place[step]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return spoil


def _server_pod(path: str, value: Any) -> Callable[[Manifests], None]:
    return _change("Deployment", SERVER, f"spec/template/spec/{path}", value)


def _server_container(path: str, value: Any) -> Callable[[Manifests], None]:
    return _server_pod(f"containers/0/{path}", value)


def _policy(name: str, path: str, value: Any) -> Callable[[Manifests], None]:
    return _change("NetworkPolicy", name, f"spec/{path}", value)


def _without(kind: str, name: str) -> Callable[[Manifests], None]:
    return lambda m: m.documents.remove(m.get(kind, name))


SPOILED: list[tuple[Rule, Callable[[Manifests], None]]] = [
    (fits_the_schema, _server_container("readynessProbe", {"periodSeconds": 5})),
    (fits_the_schema, _change("HorizontalPodAutoscaler", SERVER, "spec/minReplicas", "two")),
    (fits_the_schema, _change("Service", SERVER, "spec/ports/0/targetport", "http")),
    (fits_the_schema, _change("PodDisruptionBudget", SERVER, "spec/maxUnvailable", 1)),
    (no_pod_can_more_than_it_must, _server_pod("automountServiceAccountToken", ...)),
    (no_pod_can_more_than_it_must, _server_pod("hostNetwork", True)),
    (no_pod_can_more_than_it_must, _server_pod("securityContext/runAsUser", 0)),
    (no_pod_can_more_than_it_must, _server_pod("securityContext/seccompProfile", ...)),
    (no_pod_can_more_than_it_must, _server_container("securityContext/readOnlyRootFilesystem", False)),
    (
        no_pod_can_more_than_it_must,
        _change("Deployment", "mlflow-server", "spec/template/spec/initContainers/0/securityContext", ...),
    ),
    (every_container_has_its_size, _server_container("resources/limits", ...)),
    (every_container_has_its_size, _server_container("resources/requests/memory", "2Gi")),
    (images_are_of_this_version, _server_container("image", "cifar10/server:latest")),
    (images_are_of_this_version, _server_container("image", "cifar10/server")),
    (images_are_of_this_version, _server_container("image", f"cifar10/serving:{VERSION}")),
    (volumes_and_mounts_match, _server_pod("volumes/0/name", "temporary")),
    (volumes_and_mounts_match, _server_container("volumeMounts/0/mountPath", "/temporary")),
    (volumes_and_mounts_match, _server_pod("volumes/0/emptyDir", {})),
    (volumes_and_mounts_match, _without("PersistentVolumeClaim", "cifar10-reports")),
    (
        volumes_and_mounts_match,
        _change("PersistentVolumeClaim", "cifar10-cache", "spec/accessModes", ["ReadWriteOnce"]),
    ),
    (deployments_are_probed, _server_container("livenessProbe/httpGet/port", "web")),
    (
        deployments_are_probed,
        _change("Deployment", "mlflow-server", "spec/template/spec/containers/0/readinessProbe", ...),
    ),
    (the_server_is_probed_as_it_answers, _server_container("livenessProbe/httpGet/path", "/readyz")),
    (the_server_is_probed_as_it_answers, _server_container("readinessProbe/httpGet/path", "/healthz")),
    (the_server_is_probed_as_it_answers, _server_container("readinessProbe/httpGet/path", "/ready")),
    (the_server_is_probed_as_it_answers, _server_container("ports/0/containerPort", 8080)),
    (the_server_has_time_to_end, _server_pod("terminationGracePeriodSeconds", ...)),
    (the_server_has_time_to_end, _server_container("lifecycle", ...)),
    (the_server_predicts_with_the_cores_it_requests, _server_container("env/2/valueFrom", ...)),
    (the_server_predicts_with_the_cores_it_requests, _server_container("env/2/name", "PREDICTION_CORE")),
    (the_server_predicts_with_the_cores_it_requests, _server_container("resources/limits/cpu", "2")),
    (changed_keys_reach_a_running_server, _server_pod("volumes/2/secret/optional", False)),
    (changed_keys_reach_a_running_server, _server_pod("volumes/2/secret/secretName", "cifar10-keys")),
    (changed_keys_reach_a_running_server, _server_container("volumeMounts/2/subPath", "keys.json")),
    (changed_keys_reach_a_running_server, _server_container("volumeMounts/2/mountPath", "/etc/keys")),
    (
        the_tables_can_be_left_for_the_end_of_an_upgrade,
        _change("Job", "predictions-migrations", "metadata/labels", {"app": "migrations"}),
    ),
    (a_rollout_never_has_fewer_servers, _change("Deployment", SERVER, "spec/strategy/rollingUpdate/maxUnavailable", 1)),
    (a_rollout_never_has_fewer_servers, _change("Deployment", SERVER, "spec/replicas", 2)),
    (the_autoscaler_scales_the_server, _change("HorizontalPodAutoscaler", SERVER, "spec/minReplicas", 1)),
    (
        the_autoscaler_scales_the_server,
        _change("HorizontalPodAutoscaler", SERVER, "spec/scaleTargetRef/name", "server"),
    ),
    (the_autoscaler_scales_the_server, _change("HorizontalPodAutoscaler", SERVER, "spec/behavior", ...)),
    (the_autoscaler_scales_the_server, _server_container("resources/requests/cpu", ...)),
    (a_drained_node_leaves_a_server, _change("PodDisruptionBudget", SERVER, "spec/selector/matchLabels", {"app": "x"})),
    (a_drained_node_leaves_a_server, _change("PodDisruptionBudget", SERVER, "spec/maxUnavailable", 2)),
    (a_drained_node_leaves_a_server, _change("PodDisruptionBudget", SERVER, "spec/unhealthyPodEvictionPolicy", ...)),
    (servers_spread_over_nodes, _server_pod("topologySpreadConstraints", ...)),
    (servers_spread_over_nodes, _server_pod("topologySpreadConstraints/1/labelSelector/matchLabels", {"app": "x"})),
    (selectors_match_their_own_pods, _change("Service", SERVER, "spec/selector", {"app.kubernetes.io/name": "server"})),
    (selectors_match_their_own_pods, _change("Service", SERVER, "spec/ports/0/targetPort", "web")),
    (
        selectors_match_their_own_pods,
        _change("Deployment", SERVER, "spec/template/metadata/labels", {"app.kubernetes.io/name": "mlflow-server"}),
    ),
    (only_these_connections_are_open, _without("NetworkPolicy", "default-deny")),
    (only_these_connections_are_open, _without("NetworkPolicy", "dns")),
    (only_these_connections_are_open, _policy("default-deny", "policyTypes", ["Egress"])),
    (only_these_connections_are_open, _policy(SERVER, "podSelector/matchLabels", {"app": SERVER})),
    (only_these_connections_are_open, _policy(SERVER, "ingress/0/ports/0/port", 80)),
    (only_these_connections_are_open, _policy(SERVER, "egress/0/ports", ...)),
    (only_these_connections_are_open, _policy(SERVER, "egress/1/to", ...)),
    (only_these_connections_are_open, _policy(SERVER, "egress/2/to", ...)),
    (only_these_connections_are_open, _policy(SERVER, "egress/2/ports", ...)),
    (only_these_connections_are_open, _policy(SERVER, "egress/2/to/0/namespaceSelector", ...)),
    (only_these_connections_are_open, _policy("mlflow-server", "ingress/0/from", ...)),
    (only_these_connections_are_open, _policy("mlflow-server", "ingress/0/from/0/podSelector", {})),
    (only_these_connections_are_open, _policy("airflow", "podSelector/matchLabels/tier", "flow")),
    (settings_are_known_and_lead_somewhere, _change("ConfigMap", "cifar10-settings", "data/MLOPS_DATAURL", "s3://x")),
    (settings_are_known_and_lead_somewhere, _change("ConfigMap", "cifar10-settings", "data/MLOPS_ENV", "development")),
    (
        settings_are_known_and_lead_somewhere,
        _change("ConfigMap", "cifar10-settings", "data/MLFLOW_TRACKING_URI", "http://mlflow:5000"),
    ),
    (service_names_set_no_setting, _change("Service", "mlflow-server", "metadata/name", "mlflow")),
    (service_names_set_no_setting, _server_pod("enableServiceLinks", ...)),
    (secrets_are_made_by_hand_and_told_of, _server_container("envFrom/1/secretRef/name", "database")),
    (
        secrets_are_made_by_hand_and_told_of,
        lambda m: m.documents.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}),
    ),
]


@pytest.mark.parametrize(
    ("rule", "spoil"), SPOILED, ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(SPOILED)]
)
def test_a_copy_that_breaks_a_rule_is_noticed(rule, spoil):
    copy = MANIFESTS.copy()
    spoil(copy)
    assert copy.documents != MANIFESTS.documents
    assert list(rule(copy)) != []


def test_every_rule_has_been_seen_to_fail():
    assert {rule for rule, _ in SPOILED} == set(RULES)


# --- The rest ---------------------------------------------------------------------------------------------------------


def test_the_kustomization_names_every_manifest_and_every_image():
    beside = {"kustomization.yaml", "airflow-values.yaml"}
    assert sorted(KUSTOMIZATION["resources"]) == sorted({path.name for path in FOLDER.glob("*.yaml")} - beside)
    used = {
        container["image"].rpartition(":")[0]
        for workload in MANIFESTS.workloads()
        for container in containers(workload["spec"]["template"]["spec"])
    }
    assert {image["name"]: image["newTag"] for image in KUSTOMIZATION["images"]} == dict.fromkeys(used, VERSION)


def test_the_server_starts_with_this_environment_and_not_without_keys(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    database = "postgresql://predictions:secret@db.example:5432/predictions"
    for name, value in _environment(SERVER, MLOPS_DATABASE_URL=database, PREDICTION_API_KEYS="a-key").items():
        monkeypatch.setenv(name, value)
    settings = Settings(_env_file=None)
    check_exposure(settings)
    assert settings.prediction_cores == int(MANIFESTS.container(SERVER)["resources"]["requests"]["cpu"])
    assert (settings.mlops_env, settings.api_host, settings.database_url) == ("production", "0.0.0.0", database)
    mounts = {mount["mountPath"] for mount in MANIFESTS.container(SERVER)["volumeMounts"]}
    assert str(settings.mlops_var_dir) in mounts
    # A Secret that was made of the commands in README.md with nothing filled in.
    monkeypatch.setenv("PREDICTION_API_KEYS", "")
    with pytest.raises(ConfigurationError, match="PREDICTION_API_KEYS"):
        check_exposure(Settings(_env_file=None))


def test_the_commands_are_the_images_own():
    from ml.cli import app

    scripts = {path.name for path in (ROOT / "deploy" / "docker" / "pipeline" / "bin").iterdir()}
    [migrate] = MANIFESTS.pod("Job", "predictions-migrations")["containers"]
    assert migrate["command"] == ["cifar10", "migrate"]
    assert "migrate" in {command.callback.__name__ for command in app.registered_commands}
    assert {"cifar10", *MANIFESTS.container("evidently-ui")["command"]} <= scripts
    # The server, as its image starts it.
    assert not {"command", "args"} & MANIFESTS.container(SERVER).keys()


# --- Helpers ----------------------------------------------------------------------------------------------------------


class _Pod:
    def __init__(self, labels: dict[str, str], namespace: str = "cifar10") -> None:
        self.labels, self.namespace = labels, namespace

    def __repr__(self) -> str:
        return f"{self.namespace}{sorted(self.labels.values())}"


def _passes(m: Manifests, direction: str, pod: _Pod, other: _Pod, port: int) -> bool:
    """NetworkPolicy's rule: what no policy of a direction selects is open, else one rule of one policy must match."""
    if pod.namespace != KUSTOMIZATION["namespace"]:
        return True
    policies = [
        policy["spec"]
        for policy in m.of("NetworkPolicy")
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
    return not policies or any(_matches(rule, direction, other, port) for rule in rules)


def _matches(rule: dict[str, Any], direction: str, other: _Pod, port: int) -> bool:
    peers = rule.get("to" if direction == "Egress" else "from")
    ports = rule.get("ports")
    return (peers is None or any(_is_peer(peer, other) for peer in peers)) and (
        ports is None or port in {entry["port"] for entry in ports}
    )


def _is_peer(peer: dict[str, Any], pod: _Pod) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}, peer
    if "namespaceSelector" in peer:
        in_namespace = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace})
    else:
        in_namespace = pod.namespace == KUSTOMIZATION["namespace"]
    return in_namespace and selects(peer.get("podSelector", {}), pod.labels)


_MODEL = SimpleNamespace(name="cifar10-classifier", version=1, alias="champion", data="cifar-10", weights="imagenet")


def _server(model: SimpleNamespace | None) -> Any:
    class Follower:
        def current(self) -> Any:
            if model is None:
                raise ServiceUnavailable("No champion yet.", fix="promote one.")
            return model

        def state(self) -> Any:
            raise NotImplementedError

    settings = Settings(_env_file=None, prediction_api_keys="a-key", api_host="0.0.0.0")
    return create_app(settings, follower=Follower(), log=MemoryLog())


def _environment(deployment: str, **secrets: str) -> dict[str, str]:
    container = MANIFESTS.container(deployment)
    from_maps = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
    merged = {name: value for map_ in from_maps for name, value in MANIFESTS.get("ConfigMap", map_)["data"].items()}
    of_pod = {"requests.cpu": container["resources"]["requests"]["cpu"]}
    told = {
        variable["name"]: variable["value"]
        if "value" in variable
        else of_pod[variable["valueFrom"]["resourceFieldRef"]["resource"]]
        for variable in container.get("env", [])
    }
    return merged | secrets | told


def _supervisor(name: str) -> float:
    """A setting of the server's supervisor, read without importing it: this needs none of its packages."""
    for statement in ast.parse((ROOT / "deploy" / "server" / "__main__.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return float(ast.literal_eval(statement.value))
    raise AssertionError(f"deploy/server/__main__.py sets no {name}")


def _timeout(close: Callable[..., None]) -> float:
    return inspect.signature(close).parameters["timeout"].default


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * 1024 ** (1 + ["Ki", "Mi", "Gi"].index(quantity[-2:]))
