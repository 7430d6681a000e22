"""Settings: one frozen object, read from the environment at an entry point and handed down from there.

Order of precedence: environment, `.env` in the project's root, then what the running local stack wrote
(`var/stack/stack.env`: the address and password of its PostgreSQL), then the defaults below.
Nothing else in `ml` reads the environment.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ml.errors import ConfigurationError

PROJECT_ROOT = Path(__file__).resolve().parent.parent

_WORDS = {"", "auto", "synthetic", "imagenet", "random"}

Address = Annotated[str, Field(pattern=r"^https?://[^\s/]\S*$"), AfterValidator(lambda url: url.rstrip("/"))]
"""Of a web service, without the slash at its end."""
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"), AfterValidator(str.lower)]
"""As it stands in a request's `Host`, without the port."""


def _on_this_machine(port: str) -> Any:
    """A default: loopback, at the port of that setting."""
    return Field(default_factory=lambda settings: f"http://127.0.0.1:{settings[port]}")


class Settings(BaseSettings):
    """What an operator can set. Each field is the environment variable of the same name in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, validate_default=True)

    mlops_env: Literal["development", "production"] = "development"
    """In production nothing is served without a key but to the machine itself."""

    # Where things come from and are kept.
    mlops_var_dir: Path = PROJECT_ROOT / "var"
    cifar10_source: str = "auto"
    vgg16_weights: str = "auto"
    mlops_allow_stand_in: bool = False
    """Set for a demo's runs alone: lets `auto` fall back to generated data and random weights, labelled as such."""
    mlops_data_url: str = ""
    mlops_database_url: SecretStr | None = None
    mlflow_tracking_uri: str = ""
    mlops_git_sha: str = ""
    """The commit of an image's code; it is asked only where the code lies in no repository."""

    # Training.
    keras_backend: Literal["tensorflow", "jax"] = "tensorflow"
    """What Keras trains with: JAX where TensorFlow has no build for the accelerator."""
    feature_cache_gib: float = Field(8, gt=0)
    """Room on disk for outputs of frozen layers; the least recently used go first."""
    int8_calibration_images: int = Field(512, ge=0)
    """Training images by which each model's int8 form is made; 0 makes none. 512 take VGG16 six seconds."""

    # Who may call the prediction server, and where everything listens.
    prediction_api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Each the key itself, or `sha256:` and its hash."""
    prediction_api_keys_file: Path | None = None
    """Names and hashes of further keys (`cifar10 keys`); read again when it changes."""
    prediction_rate_limit: float = Field(0, ge=0, allow_inf_nan=False)
    """Images per second that one caller gets; 0: as many as it asks for. A key's own limit stands above it."""
    api_keyless_hosts: Annotated[tuple[HostName, ...], NoDecode] = ()
    """Names under which a server whose port is published on loopback alone answers its neighbours without a key;
    see `deploy.server.exposure`."""
    api_host: str = "127.0.0.1"
    airflow_port: int = Field(8080, ge=1, le=65535)
    mlflow_port: int = Field(5000, ge=1, le=65535)
    api_port: int = Field(8000, ge=1, le=65535)
    reports_port: int = Field(8001, ge=1, le=65535)
    postgres_port: int = Field(5433, ge=1, le=65535)

    # Where services reach each other, and what a browser opens.
    predictions_url: Address = _on_this_machine("api_port")
    reports_url: Address = _on_this_machine("reports_port")
    mlflow_public_url: Address = _on_this_machine("mlflow_port")
    predictions_public_url: Address = _on_this_machine("api_port")
    reports_public_url: Address = _on_this_machine("reports_port")

    # Predicting.
    prediction_cores: int = Field(2, ge=1)
    """Cores that the prediction server predicts with: all of them a request that is alone, else each a batch. With as
    many the gate times a model."""
    prediction_deadline_seconds: float = Field(5, gt=0)
    """What cannot be answered within that time is refused with 503, at once where it can be told."""

    # The gate.
    gate_policy: Path = PROJECT_ROOT / "policies" / "gate.toml"
    """What a model must show before it serves."""

    # The prediction log.
    prediction_spool_mb: int = Field(1024, ge=1)
    """Room on disk for predictions that the database has not taken yet; what does not fit is dropped, and alarmed."""
    prediction_retention_days: int = Field(90, ge=1)
    """Older days of predictions are removed, with their feedback."""

    # Monitoring.
    monitor_min_predictions: int = Field(100, ge=2)
    monitor_max_predictions: int = Field(2000, ge=2)
    monitor_false_alarm_rate: float = Field(0.01, gt=0, lt=1)
    """Per window and over all columns together."""
    retrain_cooldown_minutes: float = Field(360, ge=0)
    alert_webhook_url: SecretStr | None = None
    otel_exporter_otlp_endpoint: Address | None = None
    """Where the prediction server sends its spans (OTLP over HTTP); without it there are none."""

    @field_validator("prediction_api_keys", "api_keyless_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("mlops_var_dir", "gate_policy", "prediction_api_keys_file")
    @classmethod
    def _make_path_absolute(cls, value: Path | None) -> Path | None:
        return value and value.expanduser().absolute()

    @field_validator("cifar10_source", "vgg16_weights", "mlops_data_url")
    @classmethod
    def _make_absolute(cls, value: str) -> str:
        # A relative path means the folder where the command was typed; Airflow's tasks run elsewhere.
        is_path = value not in _WORDS and "://" not in value
        return str(Path(value).expanduser().absolute()) if is_path else value

    @property
    def own_api_key(self) -> str | None:
        """The key with which parts of this system call the server: the first that is set and not hashed."""
        keys = (key.get_secret_value() for key in self.prediction_api_keys)
        return next((key for key in keys if not key.startswith("sha256:")), None)

    @property
    def data_url(self) -> str:
        """fsspec URL under which datasets are kept."""
        return self.mlops_data_url or (self.mlops_var_dir / "data").as_uri()

    @property
    def tracking_uri(self) -> str:
        """Address of the MLflow server."""
        return self.mlflow_tracking_uri or f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def reports_dir(self) -> Path:
        """Evidently's workspace, which its UI shows."""
        return self.mlops_var_dir / "reports"

    @property
    def cache_dir(self) -> Path:
        """Downloads and models fetched from the registry; safe to delete."""
        return self.mlops_var_dir / "cache"

    @property
    def spool_dir(self) -> Path:
        """Predictions on their way to the database; not safe to delete."""
        return self.mlops_var_dir / "spool"

    @property
    def checkpoints_dir(self) -> Path:
        """Where trainings stand that are under way or were cut off; `--resume` goes on from them."""
        return self.mlops_var_dir / "checkpoints"

    @property
    def database_url(self) -> str:
        """Address of the predictions database.

        Raises:
            ConfigurationError: where none is set and no local stack has run.
        """
        if self.mlops_database_url is None:
            raise ConfigurationError(
                "No predictions database is known: MLOPS_DATABASE_URL is not set and no local stack has been started.",
                fix="run `make up` (it writes the address into var/stack/stack.env) or set MLOPS_DATABASE_URL to "
                "postgresql://user:password@host:port/database.",
            )
        return self.mlops_database_url.get_secret_value()


def stack_env_file(var_dir: Path) -> Path:
    """Where the local stack writes the addresses that other shells need."""
    return var_dir / "stack" / "stack.env"


def load_settings(**overrides: object) -> Settings:
    """Reads the settings. Call it at an entry point (command, task, server), never on import.

    Raises:
        ConfigurationError: names each setting that has a wrong value, and what was expected.
    """
    try:
        # The stack's file lies under the var folder, which is itself a setting: read that one first.
        var_dir = Settings(_env_file=PROJECT_ROOT / ".env", **overrides).mlops_var_dir  # type: ignore[arg-type, call-arg]
        return Settings(_env_file=(stack_env_file(var_dir), PROJECT_ROOT / ".env"), **overrides)  # type: ignore[arg-type, call-arg]
    except ValidationError as error:
        wrong = "; ".join(
            f"{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}"
            for e in error.errors()
            if e["type"] != "default_factory_not_called"  # of a default that depends on what is wrong
        )
        raise ConfigurationError(
            f"Settings that cannot be used: {wrong}.", fix="correct them in the environment or in .env."
        ) from error
