"""Statistics against numpy's own, and a page that stands on its own and says what it shows."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml.datasets.explore import Exploration, explore_dataset, first_of_each_class, summarise
from ml.datasets.explore_page import PAGE, copy_exploration, pngs, render, write_exploration
from ml.datasets.explore_plots import strip
from ml.datasets.labels import CLASS_NAMES
from ml.datasets.manifest import Split
from ml.datasets.store import write_dataset
from ml.datasets.synthetic import generate

RAW = generate(300, 50)
PIECES = [
    Split(RAW.train_images[rows], RAW.train_labels[rows], ())
    for rows in (slice(0, 7), slice(7, 150), slice(150, 300))
]  # fmt: skip


def test_statistics_are_numpys() -> None:
    summary = summarise(PIECES)
    pixels = RAW.train_images.astype(np.float64)
    assert summary.count == 300
    np.testing.assert_array_equal(summary.class_counts, np.bincount(RAW.train_labels))
    np.testing.assert_allclose(summary.channel_mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(summary.channel_std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)
    for channel in range(3):
        expected = np.histogram(RAW.train_images[..., channel], bins=np.arange(257))[0]
        np.testing.assert_array_equal(summary.channel_histogram[channel], expected)
    for label in range(10):
        expected = np.rint(pixels[RAW.train_labels == label].mean(axis=0))
        np.testing.assert_array_equal(summary.mean_images[label], expected)


def test_a_class_without_images_is_black() -> None:
    summary = summarise([Split(RAW.train_images[:1], RAW.train_labels[:1], ())])
    missing = [label for label in range(10) if label != RAW.train_labels[0]]
    assert not summary.mean_images[missing].any()


def test_previews_are_the_first_of_their_class() -> None:
    previews = first_of_each_class(PIECES, count=4)
    for label, images in enumerate(previews):
        np.testing.assert_array_equal(images, RAW.train_images[RAW.train_labels == label][:4])
    few = first_of_each_class(PIECES[:1], count=4)
    assert sum(len(images) for images in few) == 7
    assert all(images.shape[1:] == (32, 32, 3) for images in few)


def test_a_strip_holds_its_images() -> None:
    row = strip(RAW.train_images[:3])
    assert row.shape == (32, 100, 3)
    np.testing.assert_array_equal(row[:, 68:], RAW.train_images[2])
    assert strip(RAW.train_images[:0]).shape == (32, 1, 3)


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("explored"))


@pytest.fixture(scope="module")
def exploration(data_url: str) -> Exploration:
    return explore_dataset(data_url, write_dataset(RAW, data_url).dataset_id)


@pytest.fixture(scope="module")
def page(exploration: Exploration) -> str:
    return render(exploration)


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def test_the_page_needs_nothing_else(page: str) -> None:
    elements = Elements(page)
    attributes = [pair for _, each in elements.seen for pair in each.items()]
    addresses = [str(value) for name, value in attributes if name in ("src", "srcset", "href")]
    assert len(addresses) > 100
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not elements.all("script")
    assert not elements.all("link")
    assert "url(" not in page


def test_every_picture_has_a_text_of_its_own(page: str) -> None:
    texts = [image.get("alt") for image in Elements(page).all("img")]
    assert all(texts)
    assert len(set(texts)) == len(texts)


def test_the_page_says_what_it_shows(page: str, exploration: Exploration) -> None:
    text = re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<style>.*?</style>", "", page))
    for word in ("SYNTHETIC data.", exploration.manifest.dataset_id, *CLASS_NAMES):
        assert word in text
    mean = exploration.statistics["train"].channel_mean[0]
    assert f"{mean:.1f} ±" in text


def test_real_data_is_not_called_synthetic(exploration: Exploration) -> None:
    manifest = exploration.manifest.model_copy(update={"data": "cifar-10", "source": "<b>a & b</b>"})
    page = render(replace(exploration, manifest=manifest))
    assert "SYNTHETIC" not in page
    assert "<b>a" not in page
    assert "&lt;b&gt;a &amp; b" in page


def test_pictures_show_something(exploration: Exploration) -> None:
    files = pngs(exploration)
    assert sorted(files) == ["channel_histograms.png", "class_distribution.png", "mean_images.png", "preview_grid.png"]
    for content in files.values():
        with Image.open(io.BytesIO(content)) as picture:
            assert min(picture.size) >= 400
            assert picture.convert("L").getextrema()[0] < 100, "nothing dark was drawn on the white"


def test_it_is_written_once(data_url: str, exploration: Exploration, page: str, tmp_path: Path) -> None:
    dataset_id = exploration.manifest.dataset_id
    target, created = write_exploration(data_url, dataset_id)
    assert (created, write_exploration(data_url, dataset_id)) == (True, (target, False))
    copy_exploration(data_url, dataset_id, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "channel_histograms.png",
        "class_distribution.png",
        PAGE,
        "mean_images.png",
        "preview_grid.png",
    ]
    assert (tmp_path / PAGE).read_text("utf-8") == page
