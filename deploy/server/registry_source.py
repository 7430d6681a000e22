"""Joins the two sides of a seam: `ml.registry` as the source of champions that `ml.serving` asks for."""

from pathlib import Path

from ml.registry.versions import CHAMPION, ONNX_FILE, Registry, checksum_tag
from ml.serving.hot_swap import Champion


class RegistrySource:
    """The MLflow registry as a `ChampionSource`. Fetches the ONNX file alone, verified by its checksum."""

    def __init__(self, tracking_uri: str, cache_dir: Path) -> None:
        self._registry = Registry(tracking_uri)
        self._cache_dir = cache_dir

    def champion(self) -> Champion | None:
        """Who bears the alias; None where the registry answers that nobody does."""
        version = self._registry.by_alias(CHAMPION)
        if version is None:
            return None
        return Champion(
            name=version.name,
            version=version.version,
            data=version.data,
            architecture=version.architecture,
            weights=version.weights,
            fingerprint=version.tags.get(checksum_tag(ONNX_FILE), ""),
        )

    def fetch(self, champion: Champion) -> Path:
        """Path of its ONNX file under the cache folder."""
        return self._registry.fetch(champion.version, self._cache_dir, (ONNX_FILE,)) / "artifacts" / ONNX_FILE
