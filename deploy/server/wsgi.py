"""The composition root: reads the settings, makes the real parts, starts them.

Importing it starts the server's threads, which is what the worker imports it for; nothing else may import it.
"""

import logging
import sys
from functools import partial

# Where it is installed, MLflow's client loads it: half a second and fifty megabytes that nothing here has a use for.
sys.modules["pandas"] = None  # type: ignore[assignment]

from deploy.server.app import FAST_PATH, METRICS, create_app
from deploy.server.bodies import MAX_BODY_BYTES
from deploy.server.bridge import BODY_SECONDS, Bridge
from deploy.server.json_logging import configure
from deploy.server.registry_source import RegistrySource
from ml.monitoring.prediction_log import PredictionLog
from ml.monitoring.shadow_log import ShadowLog
from ml.serving.batcher import Batcher
from ml.serving.engine import ServingEngine
from ml.serving.hot_swap import ChampionFollower
from ml.serving.router import Router
from ml.settings import load_settings

configure()
_settings = load_settings()
_spool_bytes = _settings.prediction_spool_mb << 20
_log = PredictionLog(_settings.database_url, _settings.spool_dir / "predictions", spool_bytes=_spool_bytes)
# A row of it is a sixteenth of the other's.
_shadows = ShadowLog(_settings.database_url, _settings.spool_dir / "shadows", spool_bytes=_spool_bytes // 16)
_follower = ChampionFollower(
    RegistrySource(_settings.tracking_uri, _settings.cache_dir),
    _settings.cache_dir,
    load=partial(ServingEngine, cores=_settings.prediction_cores),
)
_batcher = Batcher(lanes=_settings.prediction_cores, deadline=_settings.prediction_deadline_seconds)
_router = Router(_follower, _batcher, record=_shadows.append)
app = create_app(_settings, follower=_follower, log=_log, router=_router, shadows=_shadows)


def end() -> None:
    """In order: nothing new is loaded; the predictions are written out, which matter most; then what was mirrored."""
    _follower.close()
    _log.close()
    _router.close()
    _batcher.close()
    _shadows.close(timeout=1)
    logging.shutdown()


_log.start()
_shadows.start()
_router.start()
# Callers wait in the socket's backlog meanwhile: where a worker was replaced, they then get an answer and not a 503.
_follower.start(patience=2)


def bridge(body_seconds: float = BODY_SECONDS) -> Bridge:
    """The app behind its connections."""
    return Bridge(
        app,
        longest_body=MAX_BODY_BYTES,
        fast_path=app.extensions[FAST_PATH],
        body_seconds=body_seconds,
        on_refusal=app.extensions[METRICS].refused,
        on_end=end,
    )


server = bridge()
