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


def test_the_system_calls_itself_with_a_key_that_is_not_hashed(monkeypatch):
    assert load_settings().own_api_key is None
    monkeypatch.setenv("PREDICTION_API_KEYS", f"sha256:{'0' * 64},plain")
    assert load_settings().own_api_key == "plain"


def test_the_file_of_keys_is_found_from_anywhere(monkeypatch, tmp_path):
    assert load_settings().prediction_api_keys_file is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREDICTION_API_KEYS_FILE", "keys.json")
    assert load_settings().prediction_api_keys_file == tmp_path / "keys.json"


def test_addresses_follow_the_ports_unless_they_are_given(monkeypatch):
    monkeypatch.setenv("REPORTS_PORT", "9001")
    monkeypatch.setenv("PREDICTIONS_URL", "http://prediction-server:8000/")
    settings = load_settings()
    assert settings.reports_url == settings.reports_public_url == "http://127.0.0.1:9001"
    assert settings.predictions_url == "http://prediction-server:8000"
    assert settings.predictions_public_url == "http://127.0.0.1:8000"
    assert settings.mlflow_public_url == "http://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("MLFLOW_PUBLIC_URL", "mlflow.example"),
        ("REPORTS_URL", "https://"),
        ("API_KEYLESS_HOSTS", "prediction-server:8000"),
        ("API_KEYLESS_HOSTS", "*"),
        ("MLOPS_ENV", "prod"),
        ("PREDICTION_RATE_LIMIT", "-1"),
        ("PREDICTION_RATE_LIMIT", "inf"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
    ],
)
def test_what_is_no_address_no_host_and_no_environment_is_refused(monkeypatch, name, wrong):
    monkeypatch.setenv(name, wrong)
    with pytest.raises(ConfigurationError, match=f"^Settings that cannot be used: {name}="):
        load_settings()


def test_a_wrong_port_is_one_error_not_one_for_each_address_that_names_it(monkeypatch):
    monkeypatch.setenv("API_PORT", "none")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "URL" not in caught.value.message


def test_host_names_are_a_list_in_lower_case(monkeypatch):
    monkeypatch.setenv("API_KEYLESS_HOSTS", "Prediction-Server, 10.0.0.7,")
    assert load_settings().api_keyless_hosts == ("prediction-server", "10.0.0.7")


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
