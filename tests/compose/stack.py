"""A Compose project of the test's own: started, watched, asked and removed.

Compose is told what to do; what came of it is asked of the engine: Compose 1 and Compose 2 print different things.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"
SCRIPTS = ROOT / "deploy" / "compose"
PORTS = ("AIRFLOW_PORT", "MLFLOW_PORT", "API_PORT", "REPORTS_PORT")
LABEL = "com.docker.compose"
# All that the commands get of the shell's environment: a variable of the stack that happens to be set there would win
# over the file that the test writes.
FROM_SHELL = re.compile(r"PATH|HOME|DOCKER_.*")
MEGABYTES = {"B": 1e-6, "KiB": 2**10 / 1e6, "MiB": 2**20 / 1e6, "GiB": 2**30 / 1e6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}


def docker(*arguments: str, timeout: float = 120, check: bool = True) -> str:
    """What a docker command prints."""
    done = subprocess.run(
        ["docker", *arguments], env=_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def compose_command() -> list[str]:
    """`docker compose` where it is installed, else `docker-compose`."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            known = subprocess.run([*command, "version"], env=_environment(), capture_output=True, check=False)
            if known.returncode == 0:
                return command
    raise RuntimeError("Neither `docker compose` nor `docker-compose` is here. Fix: install Docker with Compose.")


def image_details(image: str) -> dict[str, Any]:
    """What `docker image inspect` says."""
    return dict(json.loads(docker("image", "inspect", image))[0])


def remove(project: str) -> None:
    """Removes the containers, volumes and networks of a project by that name, if there are any."""
    for kind, options in (("container", ("--force", "--volumes")), ("volume", ("--force",)), ("network", ())):
        if found := _ids(project, kind):
            docker(kind, "rm", *options, *found, timeout=300)


@dataclass(frozen=True)
class Container:
    """What `docker inspect` says of one."""

    details: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.details["Id"])

    @property
    def service(self) -> str:
        return str(self.details["Config"]["Labels"][f"{LABEL}.service"])

    @property
    def host(self) -> dict[str, Any]:
        return dict(self.details["HostConfig"])

    @property
    def hostname(self) -> str:
        return str(self.details["Config"]["Hostname"])

    @property
    def ever_started(self) -> bool:
        return not str(self.details["State"]["StartedAt"]).startswith("0001")

    @property
    def state(self) -> str:
        """`healthy`, `starting` or `unhealthy` while it runs; `exited 0`; or as Docker names it."""
        state = self.details["State"]
        if state["Status"] == "exited":
            return f"exited {state['ExitCode']}"
        if state["Status"] == "running" and "Health" in state:
            return str(state["Health"]["Status"])
        return str(state["Status"])


class Project:
    """One project: containers, networks and volumes under `name`, settings in `folder`/env.

    Args:
        name: Compose's project name.
        folder: keeps the settings from one run to the next.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.env_file = folder / "env"
        self._compose = compose_command()
        folder.mkdir(parents=True, exist_ok=True)
        self.env_file.touch(mode=0o600)

    # --- settings --------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, str]:
        lines = self.env_file.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    def configure(self, settings: Mapping[str, object]) -> None:
        """Adds to the settings, or replaces."""
        merged = self.settings | {name: str(value) for name, value in settings.items()}
        self.env_file.write_text("".join(f"{name}={value}\n" for name, value in merged.items()))

    def choose_ports(self) -> None:
        """Sets ports that are free at this moment."""
        self.configure({name: free_port() for name in PORTS})

    def address(self, port: str) -> str:
        return f"http://127.0.0.1:{self.settings[port]}"

    # --- commands --------------------------------------------------------------------------------------------------

    def compose(
        self, *arguments: str, file: Path = COMPOSE_FILE, check: bool = True, timeout: float = 1800
    ) -> subprocess.CompletedProcess[str]:
        """Runs a Compose command; its output, both streams of it, is the result's `stdout`."""
        command = [*self._compose, "--project-name", self.name, "--file", str(file), "--env-file", str(self.env_file)]
        # As variables too: Compose 1 looks for its own settings there alone.
        own = {name: value for name, value in self.settings.items() if name.startswith("COMPOSE_")}
        return self._run([*command, *arguments], own, check=check, timeout=timeout)

    def script(self, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs one of deploy/compose on this project; its output is the result's `stdout`."""
        which = {"COMPOSE_PROJECT_NAME": self.name, "COMPOSE_ENV_FILES": str(self.env_file)}
        return self._run([str(SCRIPTS / name), *arguments], which, check=check)

    def _run(
        self, command: list[str], variables: Mapping[str, str], *, check: bool, timeout: float = 1800
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            env=_environment() | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{self.report()}")
        return done

    def psql(self, database: str, query: str) -> list[str]:
        """The rows of a query, as lines with | between the columns."""
        command = ("psql", "-U", "postgres", "-d", database, "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", query)
        [postgres] = self.containers("postgres")
        return docker("exec", postgres.id, *command).splitlines()

    def remove(self) -> None:
        """Removes whatever bears the project's name, of whichever profile."""
        remove(self.name)

    # --- what there is ---------------------------------------------------------------------------------------------

    def left(self, kind: str) -> list[str]:
        """The ids of the project's containers, of those that ended too, its volumes or networks."""
        return _ids(self.name, kind)

    def containers(self, service: str | None = None) -> list[Container]:
        """All of the project, those that have ended too."""
        ids = self.left("container")
        # One may go between the two questions.
        found = json.loads(docker("inspect", "--type", "container", *ids, check=False)) if ids else []
        every = [Container(details) for details in found]
        return [one for one in every if service in (None, one.service)]

    def services(self, *, of_all_profiles: bool = False) -> dict[str, dict[str, Any]]:
        """Those of the Compose file that start with the profiles that are set."""
        profiles = set(self.settings.get("COMPOSE_PROFILES", "").split(","))
        every = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
        return {
            name: service
            for name, service in every.items()
            if of_all_profiles or not service.get("profiles") or profiles.intersection(service["profiles"])
        }

    def not_well(self) -> dict[str, str]:
        """The services that are not what they should be: healthy, or done with exit code 0."""
        states: dict[str, set[str]] = {}
        for container in self.containers():
            states.setdefault(container.service, set()).add(container.state)
        wanted = {name: "healthy" if "healthcheck" in s else "exited 0" for name, s in self.services().items()}
        return {
            name: ", ".join(sorted(states.get(name, {"not there"})))
            for name, state in wanted.items()
            if states.get(name) != {state}
        }

    def wait_until_well(self, seconds: float) -> float:
        """Waits for all services; returns for how long."""
        began = time.monotonic()
        while left := self.not_well():
            if time.monotonic() - began > seconds:
                raise AssertionError(f"After {seconds:.0f} s not well: {left}\n{self.report()}")
            time.sleep(1)
        return time.monotonic() - began

    def report(self) -> str:
        """State and last words of every service that is not well."""
        told = []
        for service, state in self.not_well().items():
            told.append(f"--- {service}: {state}")
            for container in self.containers(service):
                told += self.logs(container, tail=40)
        return "\n".join(told) or "All services are well."

    def logs(self, container: Container, tail: int | str = "all") -> list[str]:
        command = ["docker", "logs", "--tail", str(tail), container.id]
        both = subprocess.run(
            command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False
        )
        return both.stdout.decode(errors="replace").splitlines()

    def memory_mb(self) -> dict[str, float]:
        """What each service holds now, page cache aside; several containers of one service together."""
        running = {c.id: c.service for c in self.containers() if c.details["State"]["Running"]}
        used: dict[str, float] = {}
        for line in docker("stats", "--no-stream", "--no-trunc", "--format", "{{json .}}", *running).splitlines():
            said = json.loads(line)
            number, unit = re.match(r"([\d.]+)(\w+)", said["MemUsage"]).groups()  # type: ignore[union-attr]
            service = running[said["ID"]]
            used[service] = used.get(service, 0) + float(number) * MEGABYTES[unit]
        return {service: round(megabytes) for service, megabytes in sorted(used.items())}


def _ids(project: str, kind: str) -> list[str]:
    options = ("--all",) if kind == "container" else ()
    return docker(kind, "ls", "--quiet", *options, "--filter", f"label={LABEL}.project={project}").split()


class MemoryPeak:
    """Samples the project's memory until the block ends; `megabytes` is the highest sum seen."""

    def __init__(self, project: Project, every: float = 5.0) -> None:
        self._project = project
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.megabytes = 0.0

    def __enter__(self) -> "MemoryPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            self.megabytes = max(self.megabytes, sum(self._project.memory_mb().values()))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if FROM_SHELL.fullmatch(name)}
