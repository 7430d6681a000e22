"""The whole system in containers, from nothing to nothing: each test is a step, and goes on where the last one ended.

`make compose-test` runs all of them (`-x`: a step that failed ends the scenario), shows how long each took and writes
var/compose-test.json. Set CIFAR10_ARCHIVE to the tar.gz of CIFAR-10; without it the data are generated, and the figures
say so.
"""

import re
import shutil
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from deploy.compose import preflight
from ml.client import CifarClient
from ml.datasets.labels import CLASS_NAMES
from ml.datasets.store import list_datasets, load_split
from ml.evaluation.corruptions import corrupt
from tests.compose.stack import ROOT, MemoryPeak, Project, docker, image_details
from tests.compose.traffic import Traffic
from tests.compose.user import (
    DAG_IDS,
    DEVELOPMENT_PASSWORD,
    INGEST,
    MONITOR,
    PROMOTE,
    TRAINERS,
    User,
    png,
    wait_for,
)

pytestmark = pytest.mark.timeout(3600)

START_UP_S, MEMORY_MB, SERVER_IMAGE_MB, REBUILD_S = 180, 5000, 600, 30
RECIPE, TEST_LIMIT, WINDOW = "demo", 2000, 300
CORRUPTION, SEVERITY = "fog", 4
TRAINING_S = 1500
SERVER, DATA = "prediction-server", "/var/lib/mlops/data"
# What a client of a single server may see while it restarts: nobody listens, a connection ends, or it says "not yet".
WHILE_IT_RESTARTS = {"ConnectError", "ReadError", "WriteError", "RemoteProtocolError", "503"}
SECRETS = (*preflight.SECRETS, preflight.API_KEYS)


def images(project):
    """{image: a service that is built as that image}."""
    version = project.settings["MLOPS_VERSION"]
    return {
        service["image"].replace("${MLOPS_VERSION:-dev}", version): name
        for name, service in project.services(of_all_profiles=True).items()
        if "build" in service
    }


def secrets_of(project):
    return {name: project.settings[name] for name in SECRETS if name in project.settings}


# --- images -----------------------------------------------------------------------------------------------------------


def test_all_images_are_built_and_the_servers_is_small(project, record):
    for image, service in images(project).items():
        name = image.split(":")[0].removeprefix("cifar10/")
        began = time.monotonic()
        output = project.compose("build", service).stdout
        reused = len(re.findall(r"Using cache|CACHED", output))
        record.took(f"build {name} ({reused} steps from the cache)", time.monotonic() - began)
        details = image_details(image)
        assert details["Config"]["Labels"]["org.opencontainers.image.revision"] == project.settings["GIT_SHA"]
        record.figure(f"image {name}, MB", round(details["Size"] / 1e6))
    record.target("server image, MB", record.figures["image server, MB"], "<=", SERVER_IMAGE_MB)
    assert record.figures["image server, MB"] < SERVER_IMAGE_MB


def test_no_image_holds_a_secret(project):
    for image in images(project):
        told = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image) + str(
            image_details(image)["Config"]
        )
        assert preflight.DEVELOPMENT_ONLY not in told
        assert [name for name in SECRETS if f"{name}=" in told] == []


@pytest.fixture
def scratch():
    """A folder for hundreds of megabytes; pytest would keep one of its own for a while."""
    with tempfile.TemporaryDirectory(prefix="compose-test-") as folder:
        yield Path(folder)


def test_a_change_of_code_is_built_in_seconds(project, record, scratch):
    for name in ("requirements", "ml", "dags", "plugins", "recipes", "policies", "deploy"):
        shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("docker-compose.yml", ".dockerignore"):
        shutil.copy(ROOT / name, scratch / name)
    with (scratch / "ml" / "__init__.py").open("a") as file:
        file.write("# a change\n")
    before = project.settings["MLOPS_VERSION"]
    project.configure({"MLOPS_VERSION": f"{before}-changed"})
    changed = {image: service for image, service in images(project).items() if re.search("pipeline|server", image)}
    try:
        for image, service in changed.items():
            name = image.split(":")[0].removeprefix("cifar10/")
            with record.step(f"build {name} again after a change of code"):
                project.compose("build", service, file=scratch / "docker-compose.yml")
            built_of = docker("run", "--rm", "--network=none", image, "tail", "-n", "1", "ml/__init__.py")
            assert built_of == "# a change\n"
            record.target(f"{name} built again after a change of code, s", record.seconds[-1], "<=", REBUILD_S)
    finally:
        docker("image", "rm", *changed, check=False)
        project.configure({"MLOPS_VERSION": before})


# --- the start --------------------------------------------------------------------------------------------------------


def test_production_starts_nothing_on_the_development_secrets(project):
    project.configure({"MLOPS_ENV": "production"})
    try:
        assert project.compose("up", "--detach", check=False).returncode != 0
        [ran] = [container for container in project.containers() if container.ever_started]
        assert (ran.service, ran.state) == ("preflight", "exited 1")
        said = "\n".join(project.logs(ran))
        assert [name for name in SECRETS if f"  {name} " not in said] == []
        assert "make env" in said
    finally:
        project.remove()
        project.configure({"MLOPS_ENV": "development"})


def test_it_starts_from_nothing_without_any_secret_set(project, record):
    assert secrets_of(project) == {}
    with record.step("up from nothing until all services are healthy"):
        project.compose("up", "--detach")
        project.wait_until_well(600)
    record.target("start-up, s", record.seconds[-1], "<=", START_UP_S)
    memory = project.memory_mb()
    record.figure("memory of each service once healthy, MB", memory)
    record.figure("memory once healthy, MB", sum(memory.values()))
    record.target("memory once healthy, MB", sum(memory.values()), "<=", MEMORY_MB)

    user = User(project)
    assert user.airflow.import_errors() == []
    address = project.address("API_PORT")
    waits = httpx.get(f"{address}/readyz", trust_env=False)
    assert (waits.status_code, "promote" in waits.json()["detail"]) == (503, True)
    # Without keys: programs of this machine, and no web page that resolves a name of its own to 127.0.0.1.
    assert httpx.get(f"{address}/v1/model", trust_env=False).status_code == 503
    assert httpx.get(f"{address}/v1/model", headers={"Host": "evil.example"}, trust_env=False).status_code == 401
    mlflow = project.address("MLFLOW_PORT")
    assert (
        httpx.get(
            f"{mlflow}/api/2.0/mlflow/registered-models/search", headers={"Host": "evil.example"}, trust_env=False
        ).status_code
        == 403
    )


def test_random_secrets_take_over_and_the_known_ones_open_nothing(project, record):
    project.script("write-env", str(project.env_file))
    project.configure({"MLOPS_ENV": "production"})
    assert secrets_of(project).keys() == set(SECRETS)
    with record.step("production on random secrets, on the same volumes, until all are healthy"):
        project.compose("up", "--detach")
        project.wait_until_well(600)

    user = User(project)
    assert set(DAG_IDS) <= user.airflow.dag_ids().keys()
    known = {"username": "admin", "password": DEVELOPMENT_PASSWORD}
    refused = httpx.post(f"{project.address('AIRFLOW_PORT')}/auth/token", json=known, trust_env=False)
    assert refused.status_code == 401
    address = project.address("API_PORT")
    assert httpx.get(f"{address}/v1/model", trust_env=False).status_code == 401
    assert httpx.get(f"{address}/v1/model", headers={"X-API-Key": user.key}, trust_env=False).status_code == 503
    [postgres] = project.containers("postgres")
    for role in ("postgres", "airflow", "mlflow", "predictions"):
        login = f"postgresql://{role}:development-only-{role}@127.0.0.1/{'postgres' if role == 'postgres' else role}"
        with pytest.raises(RuntimeError, match="password authentication failed"):
            docker("exec", postgres.id, "psql", login, "-c", "SELECT 1")


def test_what_runs_is_contained(project):
    secrets = secrets_of(project).values()
    services = project.services()
    for container in project.containers():
        details, host, service = container.details, container.host, container.service
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert not host["CapAdd"], service
        assert not host["Privileged"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["Memory"] > 0, service
        assert host["LogConfig"]["Config"].keys() >= {"max-size", "max-file"}, service
        assert details["Config"]["User"].split(":")[0] not in ("", "0", "root"), service
        bindings = [binding for bound in (host["PortBindings"] or {}).values() for binding in bound]
        assert {binding["HostIp"] for binding in bindings} <= {"127.0.0.1"}, service
        assert not [secret for secret in secrets if secret in str(details["Args"])], service
        if "healthcheck" in services[service]:
            assert host["RestartPolicy"]["Name"] == "unless-stopped", service
            assert details["State"]["Health"]["Status"] == "healthy", service
            assert docker("exec", container.id, "id", "-u").strip() != "0", service
            shown = docker("top", container.id, "-eo", "pid,user,args")
            assert "root" not in {line.split()[1] for line in shown.splitlines()[1:]}, shown
            assert not [secret for secret in secrets if secret in shown], service
            root = docker("exec", container.id, "sh", "-c", "touch /opt/x /usr/x /etc/x 2>&1", check=False)
            assert root.count("Read-only file system") == 3, root


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_an_ingestion_leads_to_a_champion_that_is_served(project, user, record):
    known = user.runs()
    is_real = "CIFAR10_ARCHIVE" in project.settings
    has_weights = "VGG16_WEIGHTS_FILE" in project.settings
    record.figure("data", "CIFAR-10" if is_real else "SYNTHETIC: generated images, not CIFAR-10")
    conf = {
        "recipe": RECIPE,
        "test_limit": TEST_LIMIT,
        "weights": "/srv/vgg16_notop.h5" if has_weights else "random",
        **({} if is_real else {"source": "synthetic"}),
    }
    with MemoryPeak(project) as memory, record.step("from the trigger to the champion on the server"):
        ingestion = user.airflow.trigger(INGEST, conf)
        trainings = {name: user.new_run(dag_id, known[dag_id], seconds=300) for name, dag_id in TRAINERS.items()}
        record.took(INGEST, user.finish(ingestion, seconds=300).seconds)
        for run in trainings.values():
            record.took(run.dag_id, user.finish(run, seconds=TRAINING_S).seconds)
        trained = {name: user.airflow.result(run, "train") for name, run in trainings.items()}
        versions = {model["version"] for model in trained.values()}

        def judged():
            runs = [run for run in user.airflow.runs(PROMOTE) if run.run_id not in known[PROMOTE] and run.ended]
            for run in runs:
                user.airflow.require_success(run)
            return {one["version"] for run in runs for one in user.airflow.result(run, "promote")["candidates"]}

        wait_for(lambda: versions <= judged(), seconds=300, what="the gate's verdicts")
        champion = user.aliases()["champion"]
        wait_for(user.predictions.ready, seconds=60, what="the server to find a champion")
        wait_for(lambda: user.predictions.model()["version"] == champion, seconds=60, what="the server to follow it")
    record.figure("memory at its highest, both trainings included, MB", memory.megabytes)
    record.figure("test accuracy", {name: round(model["test_accuracy"], 4) for name, model in trained.items()})
    model = user.predictions.model()
    assert champion in versions
    assert model["data"] == ("cifar-10" if is_real else "SYNTHETIC")
    assert trained["baseline"]["test_accuracy"] > 0.45
    commit = user.training_runs("baseline")[trained["baseline"]["run_id"]].data.tags["git.sha"]
    assert commit == project.settings["GIT_SHA"]


@pytest.fixture(scope="module")
def held_out(project):
    """Images of the test split and their labels, from where the pipeline keeps them."""
    [scheduler] = project.containers("airflow-scheduler")
    with tempfile.TemporaryDirectory(prefix="compose-test-") as folder:
        docker("cp", f"{scheduler.id}:{DATA}", f"{folder}/data")
        data_url = (Path(folder) / "data").as_uri()
        [dataset] = list_datasets(data_url)
        split = load_split(data_url, dataset.dataset_id, "test", limit=2 * WINDOW, seed=1)
    order = np.random.default_rng(1).permutation(len(split.labels))
    return split.images[order], split.labels[order]


def test_predictions_and_feedback_over_http(project, user, held_out):
    images, labels = held_out
    with httpx.Client(base_url=project.address("API_PORT"), trust_env=False) as http:
        assert http.post("/v1/predict", content=png(images[0])).status_code == 401
        http.headers["Authorization"] = f"Bearer {user.key}"
        raw = http.post("/v1/predict", content=png(images[0]), headers={"Content-Type": "image/png"})
        parts = http.post("/v1/predict", files=[("image", (f"{i}.png", png(images[i]))) for i in range(3)])
        assert raw.status_code == parts.status_code == 200, (raw.text, parts.text)
        first, three = raw.json(), parts.json()
        assert first["predictions"][0]["probabilities"] == pytest.approx(
            three["predictions"][0]["probabilities"], abs=1e-5
        )
        assert len(three["predictions"]) == 3
        assert first["model"]["version"] == user.predictions.model()["version"]
        said = {"request_id": first["request_id"], "label": CLASS_NAMES[labels[0]]}
        assert http.post("/v1/feedback", json=said).status_code == 201
        assert http.post("/v1/predict", content=b"no image", headers={"Content-Type": "image/png"}).status_code == 400
    rows = project.psql("predictions", f"SELECT label FROM feedback WHERE request_id = '{first['request_id']}'")
    assert rows == [str(labels[0])]


def watch(user, images, labels):
    """Sends a window with its true labels; returns what the monitor says of it."""
    known = user.runs()[MONITOR]
    for prediction, label in zip(user.predictions.predict(images), labels, strict=True):
        user.predictions.feedback(prediction, CLASS_NAMES[label])
    asked = user.airflow.trigger(MONITOR, {"min_predictions": WINDOW // 2, "recipe": RECIPE})
    user.finish(asked, seconds=300)
    # At a full hour the scheduled run may have come first and judged these predictions.
    runs = [run for run in user.airflow.runs(MONITOR) if run.run_id not in known and run.state == "success"]
    return max((user.airflow.result(run, "monitor") for run in runs), key=lambda found: found["n"])


def require_report(address, url, verdict):
    """A window's page answers at `address` under the monitor's path, and says which window it was and what came out."""
    path = httpx.URL(url).path
    page = httpx.get(f"{address}{path}", trust_env=False)
    assert page.is_success
    assert "text/html" in page.headers["Content-Type"]
    _, _, project_id, _, run_id = path.split("/")
    report = f"{address}/api/projects/{project_id}/{run_id}"
    metadata = httpx.get(f"{report}/metadata", trust_env=False).raise_for_status().json()
    assert int(metadata["metadata"]["last_id"]) > int(metadata["metadata"]["first_id"])
    assert any(verdict in tag for tag in metadata["tags"])
    html = httpx.get(f"{report}/download", params={"report_format": "html"}, trust_env=False).raise_for_status().text
    assert "family-wise" in html


def test_clean_traffic_is_stable_and_fog_is_drift(project, user, record, held_out):
    images, labels = held_out
    with record.step(f"{WINDOW} clean images and the monitor's verdict"):
        clean = watch(user, images[:WINDOW], labels[:WINDOW])
    fog = corrupt(images[WINDOW:], CORRUPTION, SEVERITY, seed=1)
    with record.step(f"{WINDOW} images in {CORRUPTION} {SEVERITY} and the monitor's verdict"):
        shifted = watch(user, fog, labels[WINDOW:])
    record.figure("p-value, clean", clean["p_value"])
    record.figure("p-value, shifted", shifted["p_value"])
    assert (clean["verdict"], shifted["verdict"]) == ("stable", "drift")
    assert clean["n"] >= WINDOW
    assert shifted["n"] == WINDOW
    assert shifted["live_accuracy"] < clean["live_accuracy"]
    for window in (clean, shifted):
        address, url = project.address("REPORTS_PORT"), window["report"]["url"]
        assert url.startswith(f"{address}/")
        require_report(address, url, window["verdict"])
    alerts = project.psql("predictions", f"SELECT message FROM alerts WHERE window_id = {shifted['window_id']}")
    assert any(shifted["report"]["url"] in message for message in alerts)


def test_the_drift_leads_to_a_retraining_that_the_gate_judges(project, user, record):
    [asked] = project.psql("predictions", "SELECT id, architecture FROM retrainings")
    retraining_id, architecture = asked.split("|")
    wanted = f"retraining__{retraining_id}"

    def started():
        return [run for run in user.airflow.runs(TRAINERS[architecture]) if run.run_id == wanted]

    [run] = wait_for(started, seconds=120, what="the retraining")
    with record.step("what is left of the retraining, with the gate's verdict"):
        user.finish(run, seconds=TRAINING_S)

        def outcome():
            return project.psql("predictions", "SELECT outcome FROM retrainings WHERE finished_at IS NOT NULL")

        [said] = wait_for(outcome, seconds=300, what="the gate's verdict on the retraining")
    record.figure("the retraining", said)
    assert re.match("promoted|refused", said)


def test_the_status_page_says_ready_for_all_to_those_who_are_logged_in(project, user):
    with httpx.Client(base_url=project.address("AIRFLOW_PORT"), trust_env=False, timeout=30) as http:
        assert http.get("/cifar10/").status_code == 401
        token = http.post("/auth/token", json={"username": "admin", "password": user.password}).json()["access_token"]
        page = http.get("/cifar10/", headers={"Authorization": f"Bearer {token}"})
    assert page.is_success
    assert len(re.findall("<td>ready</td>", page.text)) == 3, page.text
    assert "cifar10-classifier version" in page.text
    links = set(re.findall('href="(http[^"/]*//[^"/]*)', page.text))
    assert links == {project.address(port) for port in ("MLFLOW_PORT", "API_PORT", "REPORTS_PORT")}


# --- what operators do to it ------------------------------------------------------------------------------------------


def test_each_service_is_restarted_while_clients_go_on(project, user, record, held_out):
    address, version = project.address("API_PORT"), user.predictions.model()["version"]
    services = [name for name, service in project.services().items() if "healthcheck" in service]
    with Traffic(address, user.key, [png(image) for image in held_out[0][:WINDOW]]) as traffic:
        time.sleep(3)
        for service in services:
            traffic.during = service
            with record.step(f"restart {service} under load until all are healthy"):
                project.compose("restart", service)
                project.wait_until_well(300)
        traffic.during = "afterwards"
        time.sleep(3)

    failures = {service: traffic.failures(service) for service in ("nothing", *services, "afterwards")}
    failed = {service: sum(kinds.values()) for service, kinds in failures.items()}
    record.figure("predictions asked for while services restarted", len(traffic.asked))
    record.figure("of these failed", {service: dict(kinds) for service, kinds in failures.items() if kinds})
    record.figure("longest answer meanwhile, s", round(max(one.seconds for one in traffic.asked), 2))
    record.target("failed predictions while another service restarted", sum(failed.values()) - failed[SERVER], "<=", 0)
    assert {service for service, count in failed.items() if count} <= {SERVER}
    assert failures[SERVER].keys() <= WHILE_IT_RESTARTS
    assert len(traffic.answered) == len(traffic.asked) - failed[SERVER]
    assert user.predictions.model()["version"] == version

    def lost():
        return traffic.answered - set(project.psql("predictions", "SELECT request_id FROM predictions"))

    # PostgreSQL's restart loses no row: the server keeps them and writes them when it is back.
    wait_for(lambda: not lost(), seconds=30, what="every answered prediction in the log")
    record.target("answered predictions that the log has lost", len(lost()), "<=", 0)


def test_no_log_shows_a_secret(project):
    secrets = secrets_of(project)
    for container in project.containers():
        log = "\n".join(project.logs(container))
        assert [name for name, secret in secrets.items() if secret in log] == [], container.service


def kept(project, user):
    """What must outlive the containers."""
    query = "SELECT count(*), md5(string_agg(request_id::text || item_index || probabilities::text, ',' ORDER BY id))"
    [scheduler] = project.containers("airflow-scheduler")
    return {
        "served": user.predictions.model()["version"],
        "versions": user.versions(),
        "aliases": user.aliases(),
        "predictions": project.psql("predictions", f"{query} FROM predictions"),
        "feedback": project.psql("predictions", "SELECT count(*), sum(label) FROM feedback"),
        "alerts": project.psql("predictions", "SELECT id, message, delivered_at FROM alerts ORDER BY id"),
        "retrainings": project.psql("predictions", "SELECT * FROM retrainings ORDER BY id"),
        "data": docker("exec", scheduler.id, "sh", "-c", f"cd {DATA} && find . -type f | sort | xargs cksum"),
    }


def require_kept(project, user, before, runs):
    assert kept(project, user) == before
    # The hourly run of the monitor may have come in between.
    now = user.runs()
    assert {dag_id: {run_id: now[dag_id].get(run_id) for run_id in known} for dag_id, known in runs.items()} == runs
    judged = [run for run in user.airflow.runs(MONITOR) if run.state == "success"]
    windows = [user.airflow.result(run, "monitor") for run in judged]
    reports = [(window["report"]["url"], window["verdict"]) for window in windows if window["report"]["url"]]
    assert len(reports) >= 2
    for url, verdict in reports:
        require_report(project.address("REPORTS_PORT"), url, verdict)


def test_down_and_up_again_finds_everything(project, user, record):
    before, runs = kept(project, user), user.runs()
    with record.step("down"):
        project.compose("down")
    assert project.left("container") == project.left("network") == []
    with record.step("up again until all are healthy"):
        project.compose("up", "--detach")
        project.wait_until_well(600)
    wait_for(user.predictions.ready, seconds=60, what="the server to serve its champion again")
    require_kept(project, user, before, runs)


@pytest.fixture
def restored(project, scratch):
    """Another project, on the same images and secrets and on ports of its own."""
    restored = Project(f"{project.name}-restored", scratch / "restored")
    restored.configure(project.settings)
    restored.choose_ports()
    yield restored
    restored.remove()


def test_a_backup_comes_back_in_an_empty_stack(project, user, restored, record, scratch):
    before, runs = kept(project, user), user.runs()
    with record.step("backup of the running stack"):
        project.script("backup", str(scratch / "backup"))
    size = sum(path.stat().st_size for path in (scratch / "backup").rglob("*"))
    record.figure("backup, MB", round(size / 1e6))
    with record.step("restore into an empty stack until all are healthy"):
        restored.script("restore", str(scratch / "backup"))
        restored.wait_until_well(600)
    of_restored = User(restored)
    wait_for(of_restored.predictions.ready, seconds=60, what="the restored server to serve its champion")
    require_kept(restored, of_restored, before, runs)
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    here, there = (one.predictions.predict(noise)[0].probabilities for one in (user, of_restored))
    assert here == there
    refused = restored.script("restore", str(scratch / "backup"), check=False)
    assert refused.returncode != 0
    assert "not empty" in refused.stdout


# --- several workers --------------------------------------------------------------------------------------------------


def test_a_training_whose_worker_is_killed_ends_well_on_the_other(project, user, record):
    project.configure({"COMPOSE_PROFILES": "celery", "AIRFLOW_EXECUTOR": "CeleryExecutor"})
    with record.step("the same stack on Celery with two workers until all are healthy"):
        project.compose("up", "--detach", "--scale", "airflow-worker=2")
        project.wait_until_well(600)
    record.figure("memory with Celery and two workers, MB", sum(project.memory_mb().values()))
    workers = {worker.hostname: worker for worker in project.containers("airflow-worker")}
    assert len(workers) == 2

    def attempt():
        [train] = [task for task in user.airflow._task_instances(run) if task["task_id"] == "train"]
        return train["hostname"].split(".")[0], train["try_number"]

    known = user.training_runs("baseline")
    began = time.monotonic()
    run = user.airflow.trigger(TRAINERS["baseline"], {"recipe": RECIPE, "test_limit": TEST_LIMIT})

    def in_mid_training():
        new = [one for run_id, one in user.training_runs("baseline").items() if run_id not in known]
        return [one for one in new if any("loss" in name for name in one.data.metrics)]

    [cut_off] = wait_for(in_mid_training, seconds=300, what="the first epoch")
    host, number = attempt()
    assert number == 1
    docker("kill", workers[host].id)
    killed = time.monotonic()
    user.finish(run, seconds=TRAINING_S)
    record.took(
        "a training whose worker is killed after its first epoch, from trigger to green", time.monotonic() - began
    )
    record.took("  of this since the kill", time.monotonic() - killed)

    other, number = attempt()
    assert number == 2
    assert other in workers.keys() - {host}
    [dead] = [worker for worker in project.containers("airflow-worker") if worker.hostname == host]
    assert dead.state == "exited 137"
    attempts = {run_id: one for run_id, one in user.training_runs("baseline").items() if run_id not in known}
    assert attempts.pop(cut_off.info.run_id).info.status == "KILLED"
    assert [one.info.status for one in attempts.values()] == ["FINISHED"]
    assert CifarClient(project.address("API_PORT"), user.key).ready()


# --- the end ----------------------------------------------------------------------------------------------------------


def test_down_with_volumes_leaves_nothing(project, record):
    with record.step("down with volumes"):
        project.compose("down", "--volumes")
    assert [project.left("container"), project.left("volume"), project.left("network")] == [[], [], []]


def test_every_target_holds(record):
    assert [target for target in record.targets if not target["holds"]] == []
