"""Puts the folder `BENCH_FOLDER` in the registry's place, in every Python that starts with this folder in PYTHONPATH.

So the benchmark starts the prediction server by its own command, untouched: its supervisor, composition root, settings,
engine, batching, log and figures are those of a deployment. Python imports a module of this name by itself.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

MODULE = "deploy.server.registry_source"


class _FolderForRegistry(MetaPathFinder):
    """Finds that one module, and changes it once it is loaded: what it imports is paid for as in a deployment."""

    def find_spec(self, fullname: str, path: object = None, _target: object = None) -> ModuleSpec | None:
        """As `MetaPathFinder` says."""
        if fullname != MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            from ml.serving.testing import FolderSource  # noqa: PLC0415 - the server's own process alone has it

            module.RegistrySource = lambda *_, **__: FolderSource(Path(os.environ["BENCH_FOLDER"]))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _FolderForRegistry())
