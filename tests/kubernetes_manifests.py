"""What lies in deploy/kubernetes, read for its tests."""

import copy
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
KUBERNETES_VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The oldest that README.md names, and the newest whose schemas are at hand."""
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())


class Manifests:
    """The documents of all files that the kustomization names."""

    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = [
            document
            for name in KUSTOMIZATION["resources"]
            for document in yaml.safe_load_all((FOLDER / name).read_text())
        ]

    def copy(self) -> "Manifests":
        """One to spoil, in which no two places are one object, as YAML's aliases make them."""
        spoiled = copy.copy(self)
        spoiled.documents = json.loads(json.dumps(self.documents))
        return spoiled

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [document for document in self.documents if document["kind"] == kind]

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return next(document for document in self.of(kind) if document["metadata"]["name"] == name)

    def workloads(self) -> list[dict[str, Any]]:
        return [*self.of("Deployment"), *self.of("Job")]

    def pod(self, kind: str, name: str) -> dict[str, Any]:
        """The pod's spec."""
        return self.get(kind, name)["spec"]["template"]["spec"]

    def container(self, name: str) -> dict[str, Any]:
        """The first container of a Deployment."""
        return self.pod("Deployment", name)["containers"][0]

    def pod_labels(self, name: str) -> dict[str, str]:
        """The labels of a Deployment's or Job's pods."""
        return next(w for w in self.workloads() if name_of(w) == name)["spec"]["template"]["metadata"]["labels"]


def schema_errors(document: dict[str, Any]) -> list[str]:
    """What Kubernetes' own schemas find wrong with it; a field that they do not know is wrong."""
    found = ((version, _schema_error(json.dumps(document), version)) for version in KUBERNETES_VERSIONS)
    return [
        f"{document['kind']} {name_of(document)}, Kubernetes {version}: {error}" for version, error in found if error
    ]


@cache
def _schema_error(document: str, version: str) -> str | None:
    try:
        kubernetes_validate.validate(json.loads(document), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return None


def name_of(document: dict[str, Any]) -> str:
    return document["metadata"]["name"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels alone) takes a pod with these labels."""
    assert selector.keys() <= {"matchLabels"}, selector
    return selector.get("matchLabels", {}).items() <= labels.items()


def referred_secrets(
    containers_: list[dict[str, Any]], volumes: list[dict[str, Any]]
) -> Iterator[tuple[str, str | None]]:
    """Name and key (None: all of them) of each Secret that containers or volumes ask for."""
    for container in containers_:
        for source in container.get("envFrom", []):
            if "secretRef" in source:
                yield source["secretRef"]["name"], None
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield reference["name"], reference["key"]
    for volume in volumes:
        if "secret" in volume:
            yield volume["secret"]["secretName"], None


def documented_secrets() -> dict[str, set[str]]:
    """The Secrets that README.md tells how to make, and the keys of each."""
    text = (FOLDER / "README.md").read_text()
    commands = re.findall(
        r"create secret generic ([a-z0-9-]+) --from-env-file=/dev/stdin <<END\n(.*?)\nEND$",
        text,
        re.DOTALL | re.MULTILINE,
    )
    of_files = re.findall(r"create secret generic ([a-z0-9-]+) --from-file=([a-z.]+)=\S+$", text, re.MULTILINE)
    of_lines = {name: {line.split("=", 1)[0] for line in body.splitlines()} for name, body in commands}
    return of_lines | {name: {key} for name, key in of_files}
