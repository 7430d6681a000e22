"""`cifar10 predict`: asks the server what files show, and prints it as a table or as CSV.

Owns what the command's arguments mean and the form of its answer. How the server is asked is `ml.client`'s.
"""

import asyncio
import csv
import logging
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ml.client import AsyncCifarClient, Image, Prediction
from ml.datasets.labels import CLASS_NAMES
from ml.errors import CifarError, ConfigurationError, RequestError
from ml.settings import Settings

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
"""What is taken for an image in a folder. A file that is named itself is asked for whatever its name."""
STDIN = "-"
_WIDE = 10_000
"""Characters in a line, at most, where no terminal says how many fit."""
_LINE_EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""


def predict(
    settings: Settings,
    arguments: Sequence[str],
    *,
    url: str | None = None,
    key_file: Path | None = None,
    patience: float = 30.0,
) -> dict[str, Any]:
    """Asks for every image.

    Args:
        settings: the server's address and key, where the next two are not given.
        arguments: files, folders of images, or "-" for one image on stdin.
        url: the server's.
        key_file: holds one of its keys.
        patience: seconds for which a server that is away or busy is asked again.

    Returns:
        {"url", "asked", "failed", "predictions": [{"file", ...}]}, a row for each image in their order: label,
        class_id, probability, runner_up, probabilities, model_version, alias, data, weights (null but for RANDOM
        WEIGHTS), and request_id and index for feedback; or `error` with type, message and fix.

    Raises:
        ConfigurationError: a folder without images, "-" twice, no http address, no such key file, or a wrong key.
        ServiceUnavailable: the server does not answer.
    """
    address = url or settings.predictions_url
    if not re.match(r"https?://[^\s/]", address):
        raise ConfigurationError(f"{address!r} is no web address.", fix="give --url http://host:port.")
    key = _key(settings, key_file)
    names = list(_named(arguments))
    images: list[Image] = [sys.stdin.buffer.read() if name == STDIN else name for name in names]

    async def ask() -> list[Prediction | RequestError]:
        async with AsyncCifarClient(address, key, patience=patience) as client:
            return [outcome async for outcome in _shown(client.predict_each(images), len(images))]

    rows = [_row(name, outcome) for name, outcome in zip(names, asyncio.run(ask()), strict=True)]
    failed = sum("error" in row for row in rows)
    return {"url": address, "asked": len(rows), "failed": failed, "predictions": rows}


def print_table(found: dict[str, Any]) -> None:
    """A row for each image; below, what was not answered and what must be known of the model."""
    table = Table("file", "label", "probability", "runner-up", "version", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].overflow = "fold"
    table.columns[2].justify = "right"
    failures, marks = [], set()
    for row in found["predictions"]:
        name = Text(_printable(row["file"]))
        if error := row.get("error"):
            table.add_row(name, Text("not answered", "red"))
            failures.append(f"{row['file']}: {error['message'].removeprefix(row['file'] + ': ')} Fix: {error['fix']}")
            continue
        second = f"{row['runner_up']} {row['probabilities'][row['runner_up']]:.1%}"
        version = f"{row['model_version']} ({row['alias']})"
        table.add_row(name, Text(row["label"], "bold"), f"{row['probability']:.1%}", second, version)
        if row["data"] == "SYNTHETIC":
            marks.add(f"Version {row['model_version']} learnt from SYNTHETIC data.")
        if row["weights"]:
            marks.add(f"Version {row['model_version']} started from {row['weights']}.")
    terminal = Console()
    # A program that reads lines must not find a name on two of them.
    console = terminal if terminal.is_terminal else Console(width=_WIDE)
    console.print(table)
    for line in failures:
        console.print(Text(_printable(line), "red"), soft_wrap=True)
    for line in sorted(marks):
        console.print(Text(line, "yellow"), soft_wrap=True)


def print_csv(found: dict[str, Any]) -> None:
    """A line for each image, with all ten probabilities."""
    said = ("label", "class_id", "probability", "model_version", "alias", "data", "weights", "request_id", "index")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("file", *said, *(f"p_{label}" for label in CLASS_NAMES), "error"))
    for row in found["predictions"]:
        probabilities = row.get("probabilities", {})
        error = row["error"]["message"] if "error" in row else ""
        cells = (*(row.get(key) for key in said), *(probabilities.get(label) for label in CLASS_NAMES))
        writer.writerow((_printable(row["file"]), *cells, _printable(error)))


def _key(settings: Settings, file: Path | None) -> str | None:
    if file is None:
        return settings.own_api_key
    try:
        key = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"The key file {file} cannot be read: {error}.", fix="give a text file that holds one key."
        ) from error
    if not key or not key.isascii() or len(key.split()) != 1:
        raise ConfigurationError(f"The key file {file} does not hold one key.", fix="write one key into it.")
    return key


def _named(arguments: Sequence[str]) -> Iterator[str]:
    """Each image's name: folders become their images, sorted."""
    if list(arguments).count(STDIN) > 1:
        raise ConfigurationError("Stdin is named twice.", fix="give - once; it is one image.")
    for argument in arguments:
        if argument == STDIN or not Path(argument).is_dir():
            yield argument
            continue
        inside = sorted(str(path) for path in Path(argument).iterdir() if path.suffix.lower() in SUFFIXES)
        if not inside:
            raise ConfigurationError(
                f"The folder {argument} holds no image.",
                fix=f"give one with files named {', '.join(sorted(SUFFIXES))}; folders within it are not searched.",
            )
        yield from inside


def _row(name: str, outcome: Prediction | RequestError) -> dict[str, Any]:
    if isinstance(outcome, CifarError):
        return {
            "file": name,
            "error": {"type": type(outcome).__name__, "message": outcome.message, "fix": outcome.fix},
        }
    by_probability = sorted(outcome.probabilities, key=outcome.probabilities.__getitem__, reverse=True)
    return {
        "file": name,
        "label": outcome.label,
        "class_id": outcome.class_id,
        "probability": outcome.probability,
        "runner_up": next(label for label in by_probability if label != outcome.label),
        "probabilities": outcome.probabilities,
        "model_version": outcome.model_version,
        "alias": outcome.alias,
        "data": outcome.data,
        "weights": outcome.weights,
        "request_id": outcome.request_id,
        "index": outcome.index,
    }


async def _shown(
    outcomes: AsyncIterator[Prediction | RequestError], total: int
) -> AsyncIterator[Prediction | RequestError]:
    """Passes them on, and shows on stderr how many there are: a bar on a terminal, now and then a line elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("Predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            async for outcome in outcomes:
                yield outcome
                bar.advance(task)
        return
    done, last = 0, time.monotonic()
    async for outcome in outcomes:
        yield outcome
        done += 1
        if done == total or time.monotonic() - last > _LINE_EVERY:
            last = time.monotonic()
            logger.info("%d of %d images answered", done, total)


def _printable(text: str) -> str:
    """A name of bytes that are no UTF-8 can be a file's, and cannot be printed."""
    return os.fsencode(text).decode(errors="replace")
