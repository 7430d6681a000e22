"""What must hold of the repository itself: pins, imports of the plugins, no machine's path."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.name)
def test_every_requirement_is_pinned_and_hashed_and_names_no_index(path):
    text = path.read_text().replace("\\\n", " ")
    requirements = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert requirements
    for line in requirements:
        assert re.match(r"^[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==\S+", line), line
        assert "--hash=sha256:" in line, line
    assert "://" not in text


def test_the_servers_set_has_none_of_the_pipelines_libraries():
    names = {line.split("==")[0] for line in (ROOT / "requirements" / "server.txt").read_text().splitlines()}
    assert {"flask", "onnxruntime", "psycopg2-binary"} <= names
    assert names.isdisjoint({"tensorflow", "keras", "pandas", "apache-airflow", "mlflow", "evidently", "pyarrow"})


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_has_no_ml_in_it_and_shadows_no_library(path):
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= {"airflow", "fastapi", "httpx", *sys.stdlib_module_names}
    # Airflow imports a plugin under its bare file name.
    assert importlib.util.find_spec(path.stem) is None


def test_no_committed_file_names_a_path_of_one_machine():
    home = str(Path.home()) + "/"
    private = {str(ROOT) + "/", home if home != "//" else str(ROOT) + "/"}
    found = [
        (path.relative_to(ROOT), name)
        for path in tracked()
        if path.suffix not in {".png", ".ico"}
        for name in private
        if name in path.read_text(errors="replace")
    ]
    assert found == []


def test_no_committed_file_is_large():
    assert [path for path in tracked() if path.stat().st_size > 2**20] == []
