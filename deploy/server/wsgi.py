"""The composition root: reads the settings, makes the real parts, starts them.

Importing it starts the server's threads, which is what a WSGI server imports it for; nothing else may import it.
"""

import atexit
import logging.config
from functools import partial

from deploy.server.app import create_app
from deploy.server.json_logging import logging_config
from deploy.server.registry_source import RegistrySource
from ml.monitoring.prediction_log import PredictionLog
from ml.serving.engine import SERVER_THREADS, Engine
from ml.serving.hot_swap import ChampionFollower
from ml.settings import load_settings

logging.config.dictConfig(logging_config())
logging.captureWarnings(True)
_settings = load_settings()
_log = PredictionLog(_settings.database_url)
_follower = ChampionFollower(
    RegistrySource(_settings.tracking_uri, _settings.cache_dir),
    _settings.cache_dir,
    load=partial(Engine, threads=SERVER_THREADS),
)
app = create_app(_settings, follower=_follower, log=_log)
_log.start()
_follower.start()
# Runs when a worker ends in order, on SIGTERM too: what is still queued reaches the database.
atexit.register(_log.close)
atexit.register(_follower.close)
