"""Settings: strict, frozen, and clear about what is wrong."""

import pytest
from pydantic import ValidationError

from ml.errors import ConfigurationError
from ml.settings import Settings, load_settings, stack_env_file


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("MLOPS_VAR_DIR", str(tmp_path))
    return tmp_path


def test_a_wrong_value_is_named_with_what_was_expected(monkeypatch):
    monkeypatch.setenv("API_PORT", "eight thousand")
    monkeypatch.setenv("MONITOR_FALSE_ALARM_RATE", "2")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "API_PORT='eight thousand'" in caught.value.message
    assert "MONITOR_FALSE_ALARM_RATE='2'" in caught.value.message
    assert "less than 1" in caught.value.message


def test_without_a_database_the_error_says_how_to_get_one():
    with pytest.raises(ConfigurationError, match="make up"):
        _ = load_settings().database_url


def test_another_shell_finds_the_running_stack(clean_environment):
    path = stack_env_file(clean_environment)
    path.parent.mkdir()
    path.write_text("MLOPS_DATABASE_URL=postgresql://u:p@127.0.0.1:1/d\nMLFLOW_PORT=5050\n")
    settings = load_settings()
    assert settings.database_url == "postgresql://u:p@127.0.0.1:1/d"
    assert settings.tracking_uri == "http://127.0.0.1:5050"


def test_the_environment_wins_over_the_stacks_file(clean_environment, monkeypatch):
    path = stack_env_file(clean_environment)
    path.parent.mkdir()
    path.write_text("MLFLOW_PORT=5050\n")
    monkeypatch.setenv("MLFLOW_PORT", "6060")
    assert load_settings().mlflow_port == 6060


def test_keys_are_a_list_and_are_never_shown(monkeypatch):
    monkeypatch.setenv("PREDICTION_API_KEYS", "first-key, second-key,")
    settings = load_settings()
    assert [key.get_secret_value() for key in settings.prediction_api_keys] == ["first-key", "second-key"]
    assert "first-key" not in repr(settings)


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError):
        load_settings().api_port = 1


def test_an_empty_variable_is_as_good_as_none(monkeypatch):
    monkeypatch.setenv("API_PORT", "")
    assert load_settings().api_port == 8000


def test_a_relative_source_means_the_folder_of_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for given, kept in [
        ("data/cifar.tar.gz", str(tmp_path / "data" / "cifar.tar.gz")),
        ("synthetic", "synthetic"),
        ("https://example.org/cifar.tar.gz", "https://example.org/cifar.tar.gz"),
    ]:
        monkeypatch.setenv("CIFAR10_SOURCE", given)
        assert load_settings().cifar10_source == kept


def test_the_var_folder_may_be_relative_and_its_names_odd(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLOPS_VAR_DIR", "my var #1")
    settings = load_settings()
    assert settings.mlops_var_dir == tmp_path / "my var #1"
    assert settings.data_url == (tmp_path / "my var #1" / "data").as_uri()
