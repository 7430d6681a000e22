"""What must hold of docker-compose.yml, its secrets and its Dockerfiles. Read from the files: no engine is asked."""

import ast
import base64
import contextlib
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.compose import preflight
from ml.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
PUBLISH = COMPOSE / "publish.yml"
"""Changes services of docker-compose.yml and has none of its own."""
COMPOSE_FILES = [ROOT / "docker-compose.yml", ROOT / "deploy" / "compose" / "remote-worker.yml"]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*/Dockerfile"))
WRITE_ENV = ROOT / "deploy" / "compose" / "write-env"
LOOPBACK_PORT = re.compile(r"127\.0\.0\.1:(\$\{\w+:-\d+\}|\d+):\d+")
# An address that the operator must name: there is no default, and so no 0.0.0.0 by oversight.
PRIVATE_PORT = re.compile(r"\$\{MLOPS_(PRIVATE|WORKER)_ADDRESS:\?\}:\d+:\d+")
# ${NAME}, ${NAME:-default} and their like; $$ is a dollar for the container's own shell.
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)([^}]*)\}")

FILES = {path.relative_to(ROOT).as_posix(): yaml.safe_load(path.read_text()) for path in COMPOSE_FILES}
SERVICES = FILES["docker-compose.yml"]["services"]
ALL_SERVICES = [(file, name) for file, content in FILES.items() for name in content["services"]]
SECRETS = (*preflight.SECRETS, preflight.API_KEYS)

every_service = pytest.mark.parametrize(
    "service", [pytest.param(FILES[file]["services"][name], id=f"{file}:{name}") for file, name in ALL_SERVICES]
)
every_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)


def stays(service):
    return service.get("restart") == "unless-stopped"


def variables():
    """Each variable of the Compose files with every default that it has there: {"NAME": {":-default"}}."""
    found = {}
    for path in COMPOSE_FILES:
        text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        for name, form in VARIABLE.findall(text):
            if not form.startswith(":?"):
                found.setdefault(name, set()).add(form)
    return found


def is_known_to_all(default):
    # A Fernet key has to be base64, and can say what it is only inside.
    with contextlib.suppress(ValueError):
        default += base64.urlsafe_b64decode(default).decode("ascii", "replace")
    return "development-only" in default


def written_env(path):
    subprocess.run([WRITE_ENV, path], check=True, capture_output=True)
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def random_secrets(tmp_path_factory):
    return written_env(tmp_path_factory.mktemp("env") / ".env")


def instructions(path):
    """The Dockerfile's instructions, a line each, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


# --- services ---------------------------------------------------------------------------------------------------------


@every_service
def test_a_service_is_contained(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["logging"]["driver"] == "json-file"
    assert service["logging"]["options"].keys() >= {"max-size", "max-file"}
    assert service.keys().isdisjoint({"privileged", "cap_add", "devices", "pid", "ipc"})
    assert service.get("network_mode") in (None, "none")
    assert "docker.sock" not in str(service.get("volumes"))


@every_service
def test_a_service_is_kept_and_watched_or_does_one_thing_and_ends(service):
    if stays(service):
        assert service["healthcheck"]["test"]
        assert service["healthcheck"]["start_period"]
    else:
        assert service["restart"] in ("no", "on-failure")
        assert "healthcheck" not in service


def test_a_port_is_published_on_loopback_alone():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert [port for port in ports if not LOOPBACK_PORT.fullmatch(port)] == []


def test_other_hosts_are_let_in_at_an_address_that_was_named():
    published = yaml.safe_load(PUBLISH.read_text())["services"]
    assert published.keys() <= SERVICES.keys()
    assert {key for change in published.values() for key in change} <= {"ports", "environment", "command"}
    assert published["preflight"] == {"environment": {"MLOPS_ENV": "production"}}
    worker = FILES["deploy/compose/remote-worker.yml"]["services"].values()
    ports = [port for service in (*published.values(), *worker) for port in service.get("ports", [])]
    assert [port for port in ports if not PRIVATE_PORT.fullmatch(port)] == []


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_waited_for_can_come_true(name):
    service = SERVICES[name]
    for other, condition in service.get("depends_on", {}).items():
        stays_on = {"service_healthy": True, "service_started": True, "service_completed_successfully": False}
        assert stays(SERVICES[other]) == stays_on[condition["condition"]], (name, other)
        # A service of a profile is not there for those who start without it.
        assert set(SERVICES[other].get("profiles", [])) <= set(service.get("profiles", [])), (name, other)


def test_nothing_starts_before_the_secrets_were_looked_at():
    def after(name):
        direct = SERVICES[name].get("depends_on", {})
        return set(direct).union(*map(after, direct))

    assert [name for name in SERVICES if name != "preflight" and "preflight" not in after(name)] == []


def test_no_older_server_is_left_when_its_tables_change():
    assert SERVICES["migrations"]["depends_on"]["prediction-server"] == {"condition": "service_started"}
    # It spools meanwhile, so it waits for nothing that an upgrade makes anew.
    assert SERVICES["prediction-server"]["depends_on"].keys() == {"preflight"}


def test_every_setting_of_the_prediction_server_reaches_it():
    others = {"PREDICTION_RETENTION_DAYS"}  # the monitor's
    own = {name.upper() for name in Settings.model_fields if name.startswith(("prediction_", "otel_"))} - others
    assert own - SERVICES["prediction-server"]["environment"].keys() == set()


def test_the_prediction_server_may_take_as_long_to_end_as_it_does():
    supervisor = ast.parse((ROOT / "deploy" / "server" / "__main__.py").read_text())
    [seconds] = [
        ast.literal_eval(statement.value)
        for statement in supervisor.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "END_SECONDS"
    ]
    assert int(SERVICES["prediction-server"]["stop_grace_period"].removesuffix("s")) > seconds + 5


def test_what_a_backup_holds_is_what_a_restore_brings_and_volumes_that_there_are():
    backed_up = set(re.findall(r"^\s*archive (\w+)", (COMPOSE / "backup").read_text(), re.MULTILINE))
    restore = (COMPOSE / "restore").read_text()
    [always] = re.findall(r'^VOLUMES="([a-z ]+)"', restore, re.MULTILINE)
    [where_there] = re.findall(r"^for name in ([a-z0-9 ]+); do\n.*\.tar", restore, re.MULTILINE)
    assert backed_up == {*always.split(), *where_there.split()}
    assert backed_up <= FILES["docker-compose.yml"]["volumes"].keys()


def test_every_volume_is_declared_and_used():
    for content in FILES.values():
        mounted = [volume for service in content["services"].values() for volume in service.get("volumes", [])]
        files = [volume for volume in mounted if isinstance(volume, dict)]
        assert {volume.split(":")[0] for volume in mounted if volume not in files} == set(content.get("volumes", {}))
        # Of the host there is nothing but single files, which nobody here writes.
        assert [file for file in files if not (file["type"] == "bind" and file["read_only"])] == []


def test_each_image_is_built_by_one_service_and_says_of_which_commit():
    built = [service for service in SERVICES.values() if "build" in service]
    images = [service["image"] for service in built]
    assert sorted(images) == sorted(f"cifar10/{path.parent.name}:${{MLOPS_VERSION:-dev}}" for path in DOCKERFILES)
    for service in built:
        assert service["build"]["args"] == {"GIT_SHA": "${GIT_SHA:-unknown}"}
        assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    # Compose would look for any other image of this name in a registry.
    assert {service["image"] for service in SERVICES.values() if service["image"].startswith("cifar10/")} == set(images)


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_variable_has_one_default_wherever_it_stands():
    assert {name: forms for name, forms in variables().items() if len(forms) > 1} == {}


def test_every_default_that_is_known_to_all_is_looked_at_before_anything_starts():
    defaults = {name: form.removeprefix(":-") for name, [form] in variables().items()}
    assert {name for name, default in defaults.items() if is_known_to_all(default)} == set(preflight.SECRETS)
    asked = SERVICES["preflight"]["environment"]
    for name in SECRETS:
        assert asked[name] == f"${{{name}:-{defaults[name]}}}", name
    assert asked["MLOPS_ENV"] == "${MLOPS_ENV:-development}"
    assert {line.split()[0] for line in preflight.unfit({name: defaults[name] for name in SECRETS})} == set(SECRETS)


def test_write_env_sets_every_secret_and_is_fit_for_production(tmp_path):
    written = written_env(tmp_path / ".env")
    assert written.keys() == {"MLOPS_ENV", *SECRETS}
    assert preflight.unfit(written) == []
    assert len(set(written.values())) == len(written)  # each its own
    # They stand in URLs, where other characters mean something.
    assert [name for name, value in written.items() if not re.fullmatch(r"[A-Za-z0-9_=-]+", value)] == []
    assert len(base64.urlsafe_b64decode(written["AIRFLOW_FERNET_KEY"])) == 32
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert written_env(tmp_path / "other").items().isdisjoint({name: written[name] for name in SECRETS}.items())


def test_write_env_keeps_what_is_there_and_fills_what_is_missing(tmp_path):
    env = tmp_path / ".env"
    env.write_text("AIRFLOW_PORT=8181\nREDIS_PASSWORD=chosen-by-an-operator\nS3_SECRET_KEY=\n")
    first = written_env(env)
    assert (first["AIRFLOW_PORT"], first["REDIS_PASSWORD"]) == ("8181", "chosen-by-an-operator")
    assert first["S3_SECRET_KEY"]
    assert env.read_text().count("S3_SECRET_KEY=") == 1  # of two lines, readers differ in which they take
    assert first.keys() >= set(SECRETS)
    assert written_env(env) == first


@pytest.mark.parametrize("name", SECRETS)
def test_production_refuses_each_secret_that_is_missing_known_or_short(name, random_secrets, capsys):
    environment = random_secrets | {"MLOPS_ENV": "production"}
    assert preflight.main(environment) == 0
    for value in ("", "development-only-guess-me", "short"):
        assert preflight.main(environment | {name: value}) == 1
        assert f"  {name} " in capsys.readouterr().err


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    "value", ["has@sign-and-more-of-it", "has a space and more", 'has"quote-and-more', "has$dollar-and-more"]
)
def test_a_secret_that_an_address_or_json_reads_otherwise_is_refused_anywhere(name, value, capsys):
    for environment in preflight.ENVIRONMENTS:
        assert preflight.main({"MLOPS_ENV": environment, name: value}) == 2
        said = capsys.readouterr().err
        assert name in said
        assert value not in said


def test_keys_may_be_hashed_or_stand_in_a_file_of_their_own(random_secrets):
    hashed = f"sha256:{'0' * 64},sha256:{'a' * 64}"
    assert preflight.main(random_secrets | {"PREDICTION_API_KEYS": hashed}) == 0
    assert preflight.main(random_secrets | {"PREDICTION_API_KEYS": "sha256:0123456789abcdef0123"}) == 2
    production = random_secrets | {"MLOPS_ENV": "production", "PREDICTION_API_KEYS": ""}
    assert preflight.main(production) == 1
    assert preflight.main(production | {"PREDICTION_API_KEYS_FILE": "/var/lib/mlops/keys.json"}) == 0


def test_only_the_lists_may_hold_several(random_secrets):
    several = "0123456789abcdef0123,fedcba9876543210fedc"
    refused = {name for name in SECRETS if preflight.main(random_secrets | {name: several})}
    assert set(SECRETS) - refused == {"AIRFLOW_FERNET_KEY", "PREDICTION_API_KEYS"}


def test_a_path_of_the_host_is_refused_and_the_one_it_is_mounted_at_is_named(capsys):
    binds = {
        volume["target"]: volume["source"]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if isinstance(volume, dict)
    }
    # The gate's policy is mounted wherever it lies: there is no setting beside it to get wrong.
    assert binds.pop("/opt/cifar10/policies/gate.toml") == "${GATE_POLICY_FILE:-./policies/gate.toml}"
    assert (ROOT / "policies/gate.toml").is_file()
    assert binds == {path: f"${{{variable}:-/dev/null}}" for variable, path in preflight.MOUNTED.values()}
    for name, (variable, path) in preflight.MOUNTED.items():
        assert re.fullmatch(rf"\$\{{{name}:-\w+\}}", SERVICES["preflight"]["environment"][name])
        assert preflight.main({name: path}) == preflight.main({name: "auto"}) == 0
        for theirs in ("/data/of/theirs", "./theirs", "~/theirs"):
            assert preflight.main({name: theirs}) == 2
            assert f"{variable}={theirs} and {name}={path}" in capsys.readouterr().err


def test_development_goes_on_and_says_so_and_another_word_is_refused(capsys):
    assert preflight.main({}) == 0
    assert "DEVELOPMENT ONLY" in capsys.readouterr().out
    assert preflight.main({"MLOPS_ENV": "prod"}) == 2
    assert "production" in capsys.readouterr().err


def test_no_secret_stands_on_a_command_line():
    said = [str(service.get(key)) for service in SERVICES.values() for key in ("command", "entrypoint", "healthcheck")]
    assert [(name, text) for text in said for name in SECRETS if f"${{{name}" in text] == []


# --- images -----------------------------------------------------------------------------------------------------------


@every_dockerfile
def test_a_dockerfile_builds_without_buildkit(path):
    assert "# syntax" not in path.read_text()
    for line in instructions(path):
        assert not re.match(r"(RUN|COPY|ADD)\s+--(mount|network|security|link|chmod|parents|exclude|checksum)", line), (
            line
        )
        assert not re.match(r"(RUN|COPY|ADD)\b.*<<-?['\"]?\w", line), line


@every_dockerfile
def test_an_image_is_labelled_and_runs_as_nobody_of_importance(path):
    lines = instructions(path)
    labels = " ".join(line for line in lines if line.startswith("LABEL "))
    for label in ("title", "description", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    base = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert f'base.name="{base[-1]}"' in labels
    assert all(":" in name for name in base)
    users = [
        line.split()[1]
        for line in lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
        if line.startswith("USER ")
    ]
    assert users
    assert users[-1].split(":")[0] not in ("0", "root")


@every_dockerfile
def test_a_change_of_code_keeps_the_layers_of_the_requirements(path):
    lines = instructions(path)
    requirements = [i for i, line in enumerate(lines) if "requirements/" in line or "pip " in line]
    code = [i for i, line in enumerate(lines) if re.match(r"COPY (ml|dags|plugins|recipes|deploy/(?!docker))", line)]
    assert max(requirements, default=-1) < min(code, default=len(lines))
    # The commit changes with every build: whatever comes after it is built anew.
    layers = [i for i, line in enumerate(lines) if re.match(r"(RUN|COPY|ADD)\b", line)]
    assert lines.index("ARG GIT_SHA=unknown") > max(layers)


@every_dockerfile
def test_what_is_copied_as_a_command_can_be_run(path):
    copied = [line.split()[1:-1] for line in instructions(path) if re.fullmatch(r"COPY .* /usr/local/bin/?", line)]
    sources = [ROOT / source for sources in copied for source in sources]
    commands = [file for source in sources for file in (source.iterdir() if source.is_dir() else [source])]
    assert [file.name for file in commands if not os.access(file, os.X_OK)] == []


@every_dockerfile
def test_requirements_are_hashed(path):
    installing = [line for line in instructions(path) if re.search(r"\bpip (install|sync)\b", line)]
    for line in installing:
        for command in re.findall(r"\bpip (?:install|sync)\b.*?(?:&&|$)", line):
            assert "--require-hashes" in command, command


def test_the_build_context_is_a_list_of_what_is_copied():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    allowed = {pattern[1:].split("/")[0] for pattern in patterns if pattern.startswith("!")}
    assert allowed == {"requirements", "ml", "dags", "plugins", "recipes", "policies", "deploy"}


# --- documentation ----------------------------------------------------------------------------------------------------


def test_every_variable_is_documented():
    text = "".join((ROOT / page).read_text() for page in ("docs/operations.md", "README.md"))
    assert [name for name in sorted(variables()) if not re.search(rf"\b{name}\b", text)] == []
