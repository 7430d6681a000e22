"""Joins the two sides of a seam: `ml.registry` as the source of champions that `ml.serving` asks for."""

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ml.errors import ModelNotFound
from ml.registry import traffic
from ml.registry.connection import BULK, QUICK
from ml.registry.versions import (
    CHALLENGER,
    CHAMPION,
    ModelVersion,
    RegisteredModel,
    Registry,
    checksum_tag,
    form_of,
)
from ml.serving.hot_swap import Champion
from ml.traffic import Traffic

ASK_AGAIN_SECONDS = 20.0
"""How long what is known of a version is believed: a person may have it serve in another form (`cifar10 engine`)."""


@dataclass(frozen=True)
class _Known:
    key: tuple[datetime, int, Traffic | None]
    champion: Champion
    asked_at: float


class RegistrySource:
    """The MLflow registry as a `ChampionSource`. Fetches the ONNX file of the form that serves alone, verified by its
    checksum.

    A look is one question, for aliases and tags of the registered model. A version is asked for when it begins to bear
    an alias, when other traffic is set for it (the gate may have chosen its form in between), and every
    `ask_again_seconds`. One thread asks.
    """

    def __init__(self, tracking_uri: str, cache_dir: Path, ask_again_seconds: float = ASK_AGAIN_SECONDS) -> None:
        self._registry = Registry(tracking_uri)
        self._cache_dir = cache_dir
        self._ask_again_seconds = ask_again_seconds
        self._model: RegisteredModel | None = None
        self._known: dict[str, _Known] = {}

    def champion(self) -> Champion | None:
        """Who bears the alias; None where the registry answers that nobody does."""
        self._model = self._registry.model()
        return self._bearer(CHAMPION, None)

    def challenger(self) -> tuple[Champion, Traffic] | None:
        """Who bears that alias, and the traffic that is set, as the registry answered `champion` last."""
        if self._model is None or (wanted := traffic.of_tags(self._model.tags)) is None:
            return None
        challenger = self._bearer(CHALLENGER, wanted)
        return None if challenger is None else (challenger, wanted)

    def fetch(self, champion: Champion) -> Path:
        """Path of the ONNX file of its form under the cache folder."""
        crowned = self._model is not None and self._model.aliases.get(CHAMPION) == champion.version
        # A change of champion must not wait behind a challenger's file that does not come.
        limits = BULK if crowned else QUICK
        file = form_of(champion.engine).onnx
        folder = self._registry.fetch(champion.version, self._cache_dir, (file,), limits=limits)
        return folder / "artifacts" / file

    def _bearer(self, alias: str, wanted: Traffic | None) -> Champion | None:
        if self._model is None or (number := self._model.aliases.get(alias)) is None:
            return None
        key, now = (self._model.created_at, number, wanted), time.monotonic()
        known = self._known.get(alias)
        if known is None or known.key != key or now - known.asked_at >= self._ask_again_seconds:
            try:
                known = _Known(key, _described(self._registry.by_version(number)), now)
            except ModelNotFound:
                return None  # deleted between the two questions, and its alias with it
            self._known[alias] = known
        return known.champion


def _described(version: ModelVersion) -> Champion:
    form = version.form
    return Champion(
        name=version.name,
        version=version.version,
        data=version.data,
        architecture=version.architecture,
        weights=version.weights,
        fingerprint=version.tags.get(checksum_tag(form.onnx), ""),
        engine=form.engine,
    )
