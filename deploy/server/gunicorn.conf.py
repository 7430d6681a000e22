"""gunicorn's settings. One worker: the model, its queue and its figures live once, and threads share them.

Runs in the parent process. It must not import ONNX Runtime, not even indirectly: that starts a thread, which a fork
does not copy, and the worker would wait for it for ever when it exits.
"""
# ruff: noqa: N999 - the name that gunicorn looks for by itself

from deploy.server.access import check_exposure
from deploy.server.json_logging import logging_config
from ml.errors import ConfigurationError
from ml.settings import load_settings

try:
    _settings = load_settings()
    check_exposure(_settings)
    _settings.database_url  # noqa: B018 - asks for it here, where the reason is shown without a trace
except ConfigurationError as error:
    raise SystemExit(f"The prediction server cannot start. {error}") from None

_host = f"[{_settings.api_host}]" if ":" in _settings.api_host else _settings.api_host
bind = f"{_host}:{_settings.api_port}"
workers = 1
worker_class = "gthread"
threads = 8
preload_app = False  # threads and connections do not survive a fork
timeout = 60
graceful_timeout = 20  # requests in flight are answered; then the log is written out
keepalive = 30
worker_tmp_dir = "/dev/shm"  # noqa: S108 - memory: the heartbeat must not wait for a busy disk
raw_env = [
    "MLFLOW_DISABLE_TELEMETRY=true"
]  # what this server does is told to nobody; offline it would also hang at exit
control_socket_disable = True  # nobody is meant to steer it, and two servers would fight for the file
logconfig_dict = logging_config()
