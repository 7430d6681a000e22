"""The exploration as files: PNGs and one HTML page that needs nothing else, under `datasets/<id>/exploration/`.

The numbers come from `explore`, the pictures from `explore_plots`; this module puts them together and commits them.
"""

import base64
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np

from ml.datasets import explore_plots as plots
from ml.datasets.explore import CHANNELS, Exploration, explore_dataset
from ml.datasets.labels import CLASS_NAMES
from ml.datasets.splits import SPLIT_NAMES
from ml.datasets.storage import MARKER, Storage
from ml.datasets.store import DATASETS

logger = logging.getLogger(__name__)

PAGE = "index.html"


@dataclass(frozen=True)
class _Picture:
    title: str
    alt: str
    light: str
    dark: str


def write_exploration(data_url: str, dataset_id: str) -> tuple[str, bool]:
    """Explores a stored dataset and stores the page, unless that was done already.

    Returns:
        The folder under the data URL, and whether this call wrote it.

    Raises:
        DatasetNotFound, DatasetInvalid: there is no such dataset, or it was altered.
        StorageError: the disk or the store refused; nothing is left half-written.
    """
    storage = Storage(data_url)
    target = f"{DATASETS}/{dataset_id}/exploration"
    if storage.committed(target):
        logger.info("%s is explored already; nothing written", dataset_id)
        return target, False
    exploration = explore_dataset(data_url, dataset_id)
    logger.info("Drawing the exploration of %s", dataset_id)
    contents = {**pngs(exploration), PAGE: render(exploration).encode()}
    with storage.commit(target) as folder:
        for name, content in contents.items():
            with folder.open(name) as file:
                file.write(content)
        with folder.open(MARKER) as file:
            file.write(exploration.manifest.model_dump_json(include={"dataset_id", "data"}, indent=2).encode())
    return target, True


def copy_exploration(data_url: str, dataset_id: str, folder: Path) -> None:
    """Copies a stored exploration's page and pictures into a local folder.

    Raises:
        StorageError: the store could not be read.
    """
    storage = Storage(data_url)
    for name, content in storage.files(f"{DATASETS}/{dataset_id}/exploration"):
        if name != MARKER:
            (folder / name).write_bytes(content)


def pngs(exploration: Exploration) -> dict[str, bytes]:
    """The pictures as files of their own, on white: {file name: PNG}."""
    return {
        "class_distribution.png": plots.class_distribution(exploration),
        "channel_histograms.png": plots.channel_histograms(exploration),
        "preview_grid.png": plots.preview_grid(exploration),
        "mean_images.png": plots.mean_images(exploration),
    }


def render(exploration: Exploration) -> str:
    """The page: self-contained, for light and dark screens, readable without its pictures."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("ml.datasets").joinpath("explore_page.html.j2").read_text("utf-8"))
    statistics = exploration.statistics
    return template.render(
        manifest=exploration.manifest,
        splits=SPLIT_NAMES,
        statistics=statistics,
        channels=CHANNELS,
        pictures=_pictures(exploration),
        classes=list(_class_rows(exploration)),
        zip=zip,
        total=sum(each.count for each in statistics.values()),
    )


def _pictures(exploration: Exploration) -> dict[str, _Picture]:
    train = exploration.statistics["train"]
    spread = f"from {train.class_counts.min():,} to {train.class_counts.max():,}"
    means = ", ".join(f"{name} {mean:.0f}" for name, mean in zip(CHANNELS, train.channel_mean, strict=True))
    return {
        "distribution": _Picture(
            "Images per class",
            f"Bar chart of images per class in each split; a class of the train split has {spread} images.",
            _data_uri(plots.class_distribution(exploration, plots.LIGHT)),
            _data_uri(plots.class_distribution(exploration, plots.DARK)),
        ),
        "histograms": _Picture(
            "Pixel values by channel",
            f"Line chart of how often each pixel value occurs in the train split; the means are {means} of 255.",
            _data_uri(plots.channel_histograms(exploration, plots.LIGHT)),
            _data_uri(plots.channel_histograms(exploration, plots.DARK)),
        ),
    }


def _class_rows(exploration: Exploration) -> Iterator[dict[str, object]]:
    train = exploration.statistics["train"]
    for index, (name, previews, mean) in enumerate(
        zip(CLASS_NAMES, exploration.previews, train.mean_images, strict=True)
    ):
        colour = mean.reshape(-1, 3).mean(axis=0)
        brightest = CHANNELS[int(np.argmax(colour))]
        yield {
            "name": name,
            "counts": [int(exploration.statistics[split].class_counts[index]) for split in SPLIT_NAMES],
            "previews": [
                {"uri": _data_uri(plots.image_png(image)), "alt": f"{name}, example {number}"}
                for number, image in enumerate(previews, 1)
            ],
            "mean_uri": _data_uri(plots.image_png(mean)),
            "mean_alt": f"Mean of all {name} images: a blurred patch, {brightest} strongest, "
            f"average brightness {colour.mean():.0f} of 255",
        }


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
