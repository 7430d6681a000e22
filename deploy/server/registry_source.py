"""Joins the two sides of a seam: `ml.registry` as the source of champions that `ml.serving` asks for."""

from datetime import datetime
from pathlib import Path

from ml.errors import ModelNotFound
from ml.registry import traffic
from ml.registry.connection import BULK, QUICK
from ml.registry.versions import CHALLENGER, CHAMPION, ONNX_FILE, ModelVersion, RegisteredModel, Registry, checksum_tag
from ml.serving.hot_swap import Champion
from ml.traffic import Traffic


class RegistrySource:
    """The MLflow registry as a `ChampionSource`. Fetches the ONNX file alone, verified by its checksum.

    A look is one question, for aliases and tags of the registered model; a version is asked for when it first bears an
    alias, since what a version is does not change. One thread asks.
    """

    def __init__(self, tracking_uri: str, cache_dir: Path) -> None:
        self._registry = Registry(tracking_uri)
        self._cache_dir = cache_dir
        self._model: RegisteredModel | None = None
        self._known: dict[tuple[datetime, int], Champion] = {}

    def champion(self) -> Champion | None:
        """Who bears the alias; None where the registry answers that nobody does."""
        self._model = self._registry.model()
        return self._bearer(CHAMPION)

    def challenger(self) -> tuple[Champion, Traffic] | None:
        """Who bears that alias, and the traffic that is set, as the registry answered `champion` last."""
        if self._model is None or (wanted := traffic.of_tags(self._model.tags)) is None:
            return None
        challenger = self._bearer(CHALLENGER)
        return None if challenger is None else (challenger, wanted)

    def fetch(self, champion: Champion) -> Path:
        """Path of its ONNX file under the cache folder."""
        crowned = self._model is not None and self._model.aliases.get(CHAMPION) == champion.version
        # A change of champion must not wait behind a challenger's file that does not come.
        limits = BULK if crowned else QUICK
        folder = self._registry.fetch(champion.version, self._cache_dir, (ONNX_FILE,), limits=limits)
        return folder / "artifacts" / ONNX_FILE

    def _bearer(self, alias: str) -> Champion | None:
        if self._model is None or (number := self._model.aliases.get(alias)) is None:
            return None
        key = (self._model.created_at, number)
        if key not in self._known:
            try:
                self._known[key] = _described(self._registry.by_version(number))
            except ModelNotFound:
                return None  # deleted between the two questions, and its alias with it
        return self._known[key]


def _described(version: ModelVersion) -> Champion:
    return Champion(
        name=version.name,
        version=version.version,
        data=version.data,
        architecture=version.architecture,
        weights=version.weights,
        fingerprint=version.tags.get(checksum_tag(ONNX_FILE), ""),
    )
