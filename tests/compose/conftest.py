"""The project under test and the record of its figures, both for the whole scenario.

`COMPOSE_TEST_KEEP=1` leaves the stack running at the end, and the next run goes on with it:
`COMPOSE_TEST_KEEP=1 pytest tests/compose -k drift` repeats a single step. Without it nothing is left but the images.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml.registry.provenance import code_state
from tests.compose.record import Record
from tests.compose.stack import ROOT, Project, compose_command, docker, remove
from tests.compose.user import User

NAME = "cifar10-compose-test"
FOLDER = ROOT / "var" / "compose-test"
KEEP = bool(os.environ.get("COMPOSE_TEST_KEEP"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Half an hour of containers is for those who ask for it by name, not for a bare `pytest`."""
    here = Path(__file__).parent
    asked = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(here) for path in asked) else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and "project" in item.funcargs:
        report.sections.append(("Services that are not well", item.funcargs["project"].report()))
    return report


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    versions = {
        "docker": docker("version", "--format", "{{.Server.Version}}").strip(),
        "compose": " ".join(compose_command()),
    }
    record = Record(ROOT / "var" / "compose-test.json", versions=versions, goes_on=KEEP)
    yield record
    record.write()
    record.show()


@pytest.fixture(scope="session")
def project(record: Record) -> Iterator[Project]:
    project = Project(NAME, FOLDER)
    if not KEEP:
        for leftover in (NAME, f"{NAME}-restored"):
            remove(leftover)  # of a run that was killed
        project.env_file.write_text("")
    if not project.settings:
        files = {
            "CIFAR10_ARCHIVE": os.environ.get("CIFAR10_ARCHIVE") or os.environ.get("CIFAR10_SOURCE", ""),
            "VGG16_WEIGHTS_FILE": os.environ.get("VGG16_WEIGHTS_FILE", ""),
        }
        given = {name: Path(path).resolve() for name, path in files.items() if Path(path).is_file()}
        project.choose_ports()
        project.configure({**given, "MLOPS_VERSION": "compose-test", "GIT_SHA": code_state(ROOT).sha})
    yield project
    if not KEEP:
        project.remove()
        project.env_file.unlink()


@pytest.fixture
def user(project: Project) -> User:
    """With the passwords of this moment: the scenario changes them."""
    return User(project)
