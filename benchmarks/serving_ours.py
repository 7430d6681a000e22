"""The prediction server's own composition root, with the folder `BENCH_FOLDER` in the registry's place.

Everything else is as it is deployed: settings, engine, batching, the log into PostgreSQL, figures, access log.
"""

import os
from pathlib import Path

from deploy.server import registry_source
from ml.serving.testing import FolderSource


def _folder(*_: object, **__: object) -> FolderSource:
    return FolderSource(Path(os.environ["BENCH_FOLDER"]))


registry_source.RegistrySource = _folder  # type: ignore[assignment, misc]

from deploy.server.wsgi import app  # noqa: E402, F401 - it makes its source when it is imported
