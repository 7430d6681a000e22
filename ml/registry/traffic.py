"""Keeps what traffic the challenger is to get: one tag of the registered model, so that a change is one write.

What it means is `ml.traffic`'s; who acts by it is the prediction server.
"""

import json
from collections.abc import Mapping
from datetime import datetime

from ml.errors import ModelNotFound, RegistryError
from ml.registry.versions import Registry
from ml.traffic import Traffic

TRAFFIC_TAG = "challenger.traffic"


def read(registry: Registry) -> Traffic | None:
    """What is set; None where nothing is.

    Raises:
        RegistryUnavailable: MLflow could not be asked.
        RegistryError: the tag is there and cannot be read.
    """
    model = registry.model()
    return None if model is None else of_tags(model.tags)


def of_tags(tags: Mapping[str, str]) -> Traffic | None:
    """What the registered model's tags say, without asking for them.

    Raises:
        RegistryError: the tag is there and cannot be read.
    """
    written = tags.get(TRAFFIC_TAG)
    if not written:
        return None
    try:
        content = json.loads(written)
        return Traffic(
            version=content["version"],
            mode=content["mode"],
            share=content["share"],
            since=datetime.fromisoformat(content["since"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise RegistryError(
            f"The registered model's tag {TRAFFIC_TAG} cannot be read: {error}.",
            fix="take it away with `cifar10 challenge --off`, and set it anew with `cifar10 challenge`.",
        ) from error


def write(registry: Registry, traffic: Traffic) -> None:
    """Sets it, instead of what was set before.

    Raises:
        RegistryUnavailable: MLflow could not be asked.
        ModelNotFound: there is no registered model yet.
    """
    content = {
        "version": traffic.version,
        "mode": traffic.mode,
        "share": traffic.share,
        "since": traffic.since.isoformat(),
    }
    registry.set_model_tag(TRAFFIC_TAG, json.dumps(content))


def clear(registry: Registry) -> None:
    """Takes it away; no harm where nothing is set.

    Raises:
        RegistryUnavailable: MLflow could not be asked.
    """
    try:
        registry.delete_model_tag(TRAFFIC_TAG)
    except ModelNotFound:
        return  # no registered model has no tag
