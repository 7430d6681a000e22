"""The values for Airflow's Helm chart: names that the chart knows, and what it makes of them fits this product.

Neither Helm nor the chart is asked, so `CHART` below stands for the chart's schema: the names were read from
chart/values.yaml of apache/airflow at d6ba4817823e (Airflow 3.1.3, the code that became chart 1.19.0); what later
versions added was read from their release notes, and is marked. What lies below `None` is Kubernetes' or free-form, and
is checked as such.
"""

import ast
import configparser
import copy
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml.settings import Settings
from ml.stack.components import TRAINING_POOL
from tests.kubernetes_manifests import (
    FOLDER,
    ROOT,
    VERSION,
    Manifests,
    documented_secrets,
    name_of,
    referred_secrets,
    schema_errors,
    selects,
)

Values = dict[str, Any]
Rule = Callable[[Values], Iterator[str]]

VALUES: Values = yaml.safe_load((FOLDER / "airflow-values.yaml").read_text())
MANIFESTS = Manifests()
IMAGE = ROOT / "deploy" / "docker" / "pipeline"


def _names(words: str, **nested: Any) -> Values:
    return dict.fromkeys(words.split()) | nested


_CONTEXTS = _names("pod container")
_ACCOUNT = _names("automountServiceAccountToken create name annotations")
_PROBE = _names("initialDelaySeconds timeoutSeconds failureThreshold periodSeconds")
_GROOMER = _names(
    "enabled command args retentionDays frequencyMinutes resources securityContexts containerLifecycleHooks env"
)
_BUDGET = {"enabled": None, "config": None}
_COMPONENT = (
    "replicas revisionHistoryLimit command args strategy resources env extraContainers extraInitContainers "
    "extraVolumes extraVolumeMounts nodeSelector affinity tolerations topologySpreadConstraints priorityClassName "
    "annotations podAnnotations labels containerLifecycleHooks waitForMigrations enabled"
)
CHART: Values = _names(
    "airflowVersion defaultAirflowRepository defaultAirflowTag executor volumes volumeMounts extraEnv extraEnvFrom "
    "fernetKeySecretName apiSecretKeySecretName jwtSecretName config "
    "enableServiceLinks",  # 1.22.0
    images=_names("migrationsWaitTimeout useDefaultImageForMigration airflow pod_template"),
    securityContexts=_names("pod containers"),
    data=_names("metadataSecretName resultBackendSecretName brokerUrlSecretName metadataConnection"),
    enableBuiltInSecretEnvVars=_names(
        "AIRFLOW__CORE__FERNET_KEY AIRFLOW__CORE__SQL_ALCHEMY_CONN AIRFLOW__DATABASE__SQL_ALCHEMY_CONN "
        "AIRFLOW_CONN_AIRFLOW_DB AIRFLOW__API__SECRET_KEY AIRFLOW__API_AUTH__JWT_SECRET"
    ),
    postgresql=_names("enabled image auth"),
    redis=_names("enabled"),
    statsd=_names("enabled"),
    pgbouncer=_names("enabled"),
    flower=_names("enabled"),
    createUserJob=_names("enabled"),
    dags={
        "mountPath": None,
        "gitSync": _names("enabled"),
        "persistence": _names("annotations enabled size storageClassName accessMode existingClaim subPath"),
    },
    logs={"persistence": _names("enabled size annotations storageClassName existingClaim subPath")},
    workers={
        "kubernetes": _names(
            "command securityContexts terminationGracePeriodSeconds nodeSelector resources "  # 1.20.0
            "safeToEvict extraContainers extraInitContainers extraVolumes extraVolumeMounts affinity",  # 1.21.0
            serviceAccount=_ACCOUNT,
        )
    },
    scheduler=_names(
        f"{_COMPONENT} hostAliases terminationGracePeriodSeconds safeToEvict",
        livenessProbe=_PROBE | {"command": None},
        startupProbe=_PROBE | {"command": None},
        serviceAccount=_ACCOUNT,
        podDisruptionBudget=_BUDGET,
        logGroomerSidecar=_GROOMER,
        securityContexts=_CONTEXTS,
    ),
    dagProcessor=_names(
        f"{_COMPONENT} terminationGracePeriodSeconds safeToEvict",
        livenessProbe=_PROBE | {"command": None},
        serviceAccount=_ACCOUNT,
        logGroomerSidecar=_GROOMER,
        securityContexts=_CONTEXTS,
    ),
    triggerer=_names(
        f"{_COMPONENT} hostAliases terminationGracePeriodSeconds safeToEvict",
        livenessProbe=_PROBE | {"command": None},
        serviceAccount=_ACCOUNT,
        persistence=_names("enabled size storageClassName fixPermissions annotations"),
        logGroomerSidecar=_GROOMER,
        securityContexts=_CONTEXTS,
    ),
    apiServer=_names(
        f"{_COMPONENT} hostAliases allowPodLogReading hpa service networkPolicy",
        livenessProbe=_PROBE | {"scheme": None},
        readinessProbe=_PROBE | {"scheme": None},
        startupProbe=_PROBE | {"scheme": None},
        serviceAccount=_ACCOUNT,
        podDisruptionBudget=_BUDGET,
        securityContexts=_CONTEXTS,
    ),
    migrateDatabaseJob=_names(
        "enabled ttlSecondsAfterFinished command args annotations jobAnnotations restartPolicy labels resources "
        "extraContainers extraInitContainers extraVolumes extraVolumeMounts useHelmHooks applyCustomEnv env",
        serviceAccount=_ACCOUNT,
        securityContexts=_CONTEXTS,
    ),
)
COMPONENTS = ("scheduler", "dagProcessor", "triggerer", "apiServer", "migrateDatabaseJob")


# --- Rules ------------------------------------------------------------------------------------------------------------


def the_chart_knows_every_name(values: Values) -> Iterator[str]:
    def unknown(given: Values, known: Values, path: str) -> Iterator[str]:
        for name, value in given.items():
            if name not in known:
                yield f"{path}{name} is no value of the chart"
            elif known[name] is not None:
                yield from unknown(value, known[name], f"{path}{name}.")

    yield from unknown(values, CHART, "")


def its_pods_fit_the_schema(values: Values) -> Iterator[str]:
    for name, pod in _pods(values).items():
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, "spec": pod}
        yield from schema_errors(document)


def its_pods_are_contained_and_sized(values: Values) -> Iterator[str]:
    server = MANIFESTS.pod("Deployment", "prediction-server")
    for name, pod in _pods(values).items():
        if not server["securityContext"].items() <= pod["securityContext"].items():
            yield f"{name}: {pod['securityContext']}"
        for container in pod["containers"]:
            if container["securityContext"] != server["containers"][0]["securityContext"]:
                yield f"{name}: {container['securityContext']}"
            size = container["resources"]
            if not {"cpu", "memory"} <= size.get("requests", {}).keys() or "memory" not in size.get("limits", {}):
                yield f"{name}/{container['name']}: {size}"
            if "/tmp" not in {mount["mountPath"] for mount in container["volumeMounts"]}:
                yield f"{name}: nothing can be written to /tmp"


def tasks_have_what_they_need(values: Values) -> Iterator[str]:
    tasks = values["workers"]["kubernetes"]
    if (
        not tasks["resources"]["requests"]["memory"].endswith("Gi")
        or int(tasks["resources"]["requests"]["memory"][:-2]) < 4
    ):
        yield "a training needs 4 GiB"
    if tasks["serviceAccount"]["automountServiceAccountToken"] is not False:
        yield "a task holds a token of the Kubernetes API"
    mounts = {mount["mountPath"]: mount["name"] for mount in tasks["extraVolumeMounts"]}
    volumes = {volume["name"]: volume for volume in tasks["extraVolumes"]}
    claims = {name_of(claim) for claim in MANIFESTS.of("PersistentVolumeClaim")}
    settings = Settings(_env_file=None, mlops_var_dir=_image_environment()["MLOPS_VAR_DIR"])
    for folder, claim in (
        (settings.mlops_var_dir, None),
        (settings.cache_dir, "cifar10-cache"),
        (settings.reports_dir, "cifar10-reports"),
    ):
        volume = volumes.get(mounts.get(str(folder)), {})
        if not volume or volume.get("persistentVolumeClaim", {}).get("claimName") != claim:
            yield f"{folder} is {volume or 'not mounted'}"
    asked = {
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    }
    if not asked | {values["logs"]["persistence"]["existingClaim"]} <= claims:
        yield f"{asked} are not all claims of ours"
    if values["logs"]["persistence"]["enabled"] is not True:
        yield "a task's log goes with its pod"


def versions_are_this_products(values: Values) -> Iterator[str]:
    if values["airflowVersion"] != version("apache-airflow"):
        yield f"the image holds Airflow {version('apache-airflow')}"
    if (values["defaultAirflowRepository"], values["defaultAirflowTag"]) != ("cifar10/pipeline", VERSION):
        yield f"{values['defaultAirflowRepository']}:{values['defaultAirflowTag']} is not this version's image"
    if values["executor"] != "KubernetesExecutor":
        yield f"{values['executor']} runs tasks elsewhere"


def airflow_knows_every_option(values: Values) -> Iterator[str]:
    known = _airflow_options()
    for section, options in values["config"].items():
        for option, value in options.items():
            if option not in known.get(section, {}).get("options", {}):
                yield f"[{section}] {option} is no option of Airflow's"
            if not isinstance(value, str):
                yield f"[{section}] {option} is {value!r}: the chart expects text"
    if not values["config"]["core"]["auth_manager"].endswith(".SimpleAuthManager"):
        yield f"the image holds no {values['config']['core']['auth_manager']}"


def what_the_image_configures_is_kept(values: Values) -> Iterator[str]:
    # The chart mounts its airflow.cfg over the image's.
    own = configparser.ConfigParser()
    own.read(IMAGE / "airflow.cfg")
    for section in own.sections():
        for option, value in own[section].items():
            if values["config"].get(section, {}).get(option) != value:
                yield f"[{section}] {option} is {value} in the image"


def nothing_of_airflows_own_image_is_called(values: Values) -> Iterator[str]:
    # The chart's defaults: probes through /entrypoint, log groomers that are /clean-logs.
    for name in ("scheduler", "dagProcessor", "triggerer"):
        for probe in ("livenessProbe", "startupProbe") if name == "scheduler" else ("livenessProbe",):
            if values[name].get(probe, {}).get("command", ["/entrypoint"])[0] not in ("airflow", *_scripts()):
                yield f"{name}: its {probe} calls what the image has not"
        groomer = values[name].get("logGroomerSidecar", {})
        if groomer.get("enabled", True) and groomer.get("args", ["bash", "/clean-logs"])[-1].endswith("/clean-logs"):
            yield f"{name}: its log groomer is not in the image"
    for name in ("apiServer", "migrateDatabaseJob"):
        if values[name]["args"][0] not in _scripts():
            yield f"{name}: {values[name]['args']} is not in the image"
    if values["createUserJob"]["enabled"] is not False:
        yield "users are created in a manager that the image does not hold"


def the_training_pool_is_made(values: Values) -> Iterator[str]:
    script = IMAGE / "bin" / values["migrateDatabaseJob"]["args"][0]
    if not script.is_file() or f"airflow pools set {TRAINING_POOL} 1 " not in script.read_text():
        yield f"nothing makes the pool {TRAINING_POOL}"


def secrets_and_settings_exist(values: Values) -> Iterator[str]:
    told = documented_secrets()
    wanted: list[tuple[str, str | None]] = [
        (values["data"]["metadataSecretName"], "connection"),
        (values["fernetKeySecretName"], "fernet-key"),
        (values["apiSecretKeySecretName"], "api-secret-key"),
        (values["jwtSecretName"], "jwt-secret"),
    ]
    for pod in _pods(values).values():
        wanted.extend(referred_secrets(pod["containers"], pod["volumes"]))
    for name, key in wanted:
        if name not in told or not {key} - {None} <= told[name]:
            yield f"{name} {key or ''} is wanted, and README.md does not tell how to make it"
    shared = yaml.safe_load(values["extraEnvFrom"])
    maps = {source["configMapRef"]["name"] for source in shared if "configMapRef" in source}
    if not {"cifar10-settings"} <= maps <= {name_of(map_) for map_ in MANIFESTS.of("ConfigMap")}:
        yield f"settings are read from {maps}"
    if values["enableServiceLinks"] is not False:
        yield "variables of Services overlay settings"


RULES: list[Rule] = [
    the_chart_knows_every_name,
    its_pods_fit_the_schema,
    its_pods_are_contained_and_sized,
    tasks_have_what_they_need,
    versions_are_this_products,
    airflow_knows_every_option,
    what_the_image_configures_is_kept,
    nothing_of_airflows_own_image_is_called,
    the_training_pool_is_made,
    secrets_and_settings_exist,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_values_keep_to(rule):
    assert list(rule(VALUES)) == []


SPOILED: list[tuple[Rule, str, Any]] = [
    (the_chart_knows_every_name, "webserver", {"replicas": 1}),
    (the_chart_knows_every_name, "scheduler/livenesProbe", {}),
    (the_chart_knows_every_name, "workers/kubernetes/resource", {}),
    (the_chart_knows_every_name, "triggerer/podDisruptionBudget", {"enabled": True}),
    (its_pods_fit_the_schema, "workers/kubernetes/resources/request", {}),
    (its_pods_fit_the_schema, "workers/kubernetes/extraVolumes/0/emptydir", {}),
    (its_pods_fit_the_schema, "securityContexts/pod/runAsNonroot", True),
    (its_pods_fit_the_schema, "apiServer/env/1/valueFrom/secretKeyRef/secret", "x"),
    (its_pods_are_contained_and_sized, "securityContexts/pod/runAsUser", 0),
    (its_pods_are_contained_and_sized, "securityContexts/containers/readOnlyRootFilesystem", False),
    (its_pods_are_contained_and_sized, "triggerer/resources/limits", {}),
    (its_pods_are_contained_and_sized, "volumeMounts/0/mountPath", "/temporary"),
    (tasks_have_what_they_need, "workers/kubernetes/resources/requests/memory", "2Gi"),
    (tasks_have_what_they_need, "workers/kubernetes/serviceAccount/automountServiceAccountToken", True),
    (tasks_have_what_they_need, "workers/kubernetes/extraVolumeMounts/2/mountPath", "/var/lib/mlops/report"),
    (tasks_have_what_they_need, "workers/kubernetes/extraVolumes/1/persistentVolumeClaim/claimName", "cache"),
    (tasks_have_what_they_need, "logs/persistence/existingClaim", "logs"),
    (tasks_have_what_they_need, "logs/persistence/enabled", False),
    (versions_are_this_products, "airflowVersion", "3.2.2"),
    (versions_are_this_products, "defaultAirflowTag", "latest"),
    (versions_are_this_products, "executor", "LocalExecutor"),
    (airflow_knows_every_option, "config/core/dag_folder", "/opt/cifar10/dags"),
    (airflow_knows_every_option, "config/kubernetes_executor/delete_pods_on_failure", "True"),
    (airflow_knows_every_option, "config/core/parallelism", 8),
    (airflow_knows_every_option, "config/core/auth_manager", "airflow.providers.fab.FabAuthManager"),
    (what_the_image_configures_is_kept, "config/core/dags_folder", "/opt/airflow/dags"),
    (what_the_image_configures_is_kept, "config/dag_processor", {}),
    (nothing_of_airflows_own_image_is_called, "scheduler/startupProbe", {}),
    (nothing_of_airflows_own_image_is_called, "triggerer/livenessProbe/command", ["sh", "-c", "exec /entrypoint"]),
    (nothing_of_airflows_own_image_is_called, "dagProcessor/logGroomerSidecar", {}),
    (nothing_of_airflows_own_image_is_called, "apiServer/args", ["bash", "-c", "exec airflow api-server"]),
    (nothing_of_airflows_own_image_is_called, "createUserJob/enabled", True),
    (the_training_pool_is_made, "migrateDatabaseJob/args", ["airflow", "db", "migrate"]),
    (secrets_and_settings_exist, "jwtSecretName", "airflow-jwt"),
    (secrets_and_settings_exist, "apiServer/env/1/valueFrom/secretKeyRef/key", "password"),
    (secrets_and_settings_exist, "extraEnvFrom", "- configMapRef: {name: settings}"),
    (secrets_and_settings_exist, "enableServiceLinks", True),
]


@pytest.mark.parametrize(
    ("rule", "path", "value"), SPOILED, ids=[f"{rule.__name__}-{path}" for rule, path, _ in SPOILED]
)
def test_a_copy_that_breaks_a_rule_is_noticed(rule, path, value):
    spoiled = copy.deepcopy(VALUES)
    place: Any = spoiled
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    for step in way:
        place = place[step]
    place[last] = value
    assert list(rule(spoiled)) != []


def test_every_rule_has_been_seen_to_fail():
    assert {rule for rule, _, _ in SPOILED} == set(RULES)


def test_the_network_policies_mean_the_charts_pods():
    # The labels of the chart's templates: scheduler-deployment.yaml, api-server-deployment.yaml, the pod template.
    for component in ("scheduler", "api-server", "dag-processor", "triggerer", "worker", "run-airflow-migrations"):
        labels = {"tier": "airflow", "component": component, "release": "airflow"}
        named = {name_of(p) for p in MANIFESTS.of("NetworkPolicy") if selects(p["spec"]["podSelector"], labels)}
        expected = {"default-deny", "dns", "airflow"} | ({"airflow-api-server"} if component == "api-server" else set())
        assert named == expected


def test_the_image_has_no_entry_point():
    # The chart gives `args` alone: what an entry point would make of them is nobody's intention.
    assert "ENTRYPOINT" not in (IMAGE / "Dockerfile").read_text()


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _pods(values: Values) -> dict[str, Values]:
    """Of each component, the part of its pod that the chart's templates take from these values."""
    pods = {}
    for name in (*COMPONENTS, "tasks"):
        of_its_own = values["workers"]["kubernetes"] if name == "tasks" else values[name]
        common = {
            "image": f"{values['defaultAirflowRepository']}:{values['defaultAirflowTag']}",
            "securityContext": values["securityContexts"]["containers"],
            "envFrom": yaml.safe_load(values["extraEnvFrom"]),
        }
        mounts = [*values["volumeMounts"], *of_its_own.get("extraVolumeMounts", [])]
        main = {"name": "base", "resources": of_its_own["resources"], "env": of_its_own.get("env", [])}
        containers = [common | main | {"volumeMounts": mounts}]
        groomer = of_its_own.get("logGroomerSidecar", {})
        if groomer.get("enabled", True) and groomer:
            sidecar = {"name": "groomer", "args": groomer["args"], "resources": groomer["resources"]}
            containers.append(common | sidecar | {"volumeMounts": values["volumeMounts"]})
        pods[name] = {
            "securityContext": values["securityContexts"]["pod"],
            "volumes": [*values["volumes"], *of_its_own.get("extraVolumes", [])],
            "containers": containers,
        }
    return pods


@cache
def _airflow_options() -> Values:
    """Airflow's options and those of the executor, by section; read without importing Airflow, which takes seconds."""
    own = distribution("apache-airflow-core").locate_file("airflow/config_templates/config.yml")
    provider = distribution("apache-airflow-providers-cncf-kubernetes").locate_file(
        "airflow/providers/cncf/kubernetes/get_provider_info.py"
    )
    [returned] = [n for n in ast.walk(ast.parse(Path(provider).read_text())) if isinstance(n, ast.Return)]
    return yaml.load(Path(own).read_text(), Loader=yaml.CSafeLoader) | ast.literal_eval(returned.value)["config"]


def _image_environment() -> dict[str, str]:
    return dict(re.findall(r"^(?:ENV)? +([A-Z_]+)=(\S+)", (IMAGE / "Dockerfile").read_text(), re.MULTILINE))


def _scripts() -> set[str]:
    """Commands that the image brings beside Airflow's own."""
    return {path.name for path in (*(IMAGE / "bin").iterdir(), IMAGE.parent / "healthy")}
