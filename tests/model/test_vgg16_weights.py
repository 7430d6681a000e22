"""VGG16's weights: where they come from, that they arrive, and what is refused."""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import keras
import numpy as np
import pytest

from ml.errors import ConfigurationError, SourceCorrupt, SourceNotFound, SourceUnreachable
from ml.models import vgg16_weights
from ml.models.catalog import build
from ml.models.specs import BaselineSpec, Vgg16Spec
from ml.models.vgg16_weights import IMAGENET_FILE, Weights, load_into, resolve_weights
from tests.model.conftest import published_layout

NOBODY = "http://127.0.0.1:9/weights.h5"
Layers = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def base() -> keras.Model:
    return keras.applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))


@pytest.fixture
def server() -> Iterator[str]:
    """Answers with 200 and the wrong bytes, of which the first request gets no more than three; 404 at /none."""
    cut = [True]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            self.send_response(404 if self.path == "/none" else 206 if start else 200)
            if start:
                self.send_header("content-range", f"bytes {start}-8/9")
            self.send_header("content-length", str(9 - start))
            self.end_headers()
            self.wfile.write(b"not these"[start : 3 if cut else None])
            cut.clear()

        def log_message(self, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/weights.h5"
    http.shutdown()
    http.server_close()


def _content(folder: Path) -> list[str]:
    """Files that hold something: a download's lock stays, and is empty."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_notop_file_arrives_in_the_model(notop_file: Path, notop_weights: Layers) -> None:
    """The whole real path: setting -> resolved file -> checked layout -> layers of the model."""
    weights = resolve_weights(str(notop_file), False, Path("unused"))
    assert (weights.kind, weights.path) == ("file", notop_file)
    assert weights.sha256 == hashlib.sha256(notop_file.read_bytes()).hexdigest()
    assert "RANDOM" not in weights.label
    model = build(Vgg16Spec(dense_units=8), weights)
    for name, (kernel, bias) in notop_weights.items():
        loaded = model.get_layer(name).get_weights()
        assert np.array_equal(loaded[0], kernel), name
        assert np.array_equal(loaded[1], bias), name


def test_keras_own_format_is_read_too(base: keras.Model, tmp_path: Path) -> None:
    path = tmp_path / "base.weights.h5"
    base.save_weights(path)
    model = build(Vgg16Spec(dense_units=8), resolve_weights(str(path), False, tmp_path))
    assert np.array_equal(
        model.get_layer("block5_conv3").get_weights()[0], base.get_layer("block5_conv3").get_weights()[0]
    )


def _without(layers: Layers, name: str) -> Layers:
    return {key: value for key, value in layers.items() if key != name}


def test_wrong_files_are_refused_naming_the_expected_layers(
    base: keras.Model, notop_weights: Layers, tmp_path: Path
) -> None:
    top = (np.zeros((512, 4096), np.float32), np.zeros(4096, np.float32))
    narrow = (np.zeros((3, 3, 128, 100), np.float32), np.zeros(100, np.float32))
    spoilt = (np.full_like(notop_weights["block2_conv2"][0], np.nan), notop_weights["block2_conv2"][1])
    cases = {
        "fc1": {**notop_weights, "fc1": top},
        "block4_conv2": _without(notop_weights, "block4_conv2"),
        "block2_conv2 should": {**notop_weights, "block2_conv2": narrow},
        "not finite": {**notop_weights, "block2_conv2": spoilt},
    }
    for says, layers in cases.items():
        path = published_layout(tmp_path / "wrong.h5", layers)
        with pytest.raises(SourceCorrupt) as caught:
            load_into(base, path)
        assert says in caught.value.message
        assert "block1_conv1, block1_conv2, block2_conv1" in caught.value.message
        assert IMAGENET_FILE in caught.value.fix


def test_files_that_are_no_weights_at_all(base: keras.Model, tmp_path: Path) -> None:
    for name in ("text.h5", "text.weights.h5"):
        (tmp_path / name).write_text("<html>404</html>")
        with pytest.raises(SourceCorrupt, match="block5_conv3"):
            load_into(base, tmp_path / name)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(SourceCorrupt, match="block5_conv3"):
        load_into(base, tmp_path / "other.weights.h5")
    with pytest.raises(SourceNotFound):
        resolve_weights(str(tmp_path / "absent.h5"), False, tmp_path)
    with pytest.raises(ConfigurationError):
        resolve_weights("imagnet", False, tmp_path)


def test_no_network_is_said_soon_and_leaves_nothing(tmp_path: Path) -> None:
    began = time.monotonic()
    for setting, stand_in in (("imagenet", True), ("auto", False)):
        with pytest.raises(SourceUnreachable) as caught:
            resolve_weights(setting, stand_in, tmp_path, keras_home=tmp_path / "keras", url=NOBODY)
        assert "VGG16_WEIGHTS" in caught.value.fix
    assert _content(tmp_path) == []
    assert time.monotonic() - began < 60  # not a measurement: urllib without a timeout would hang for minutes


def test_auto_ends_in_random_weights_only_where_allowed_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        weights = resolve_weights("auto", True, tmp_path, keras_home=tmp_path / "keras", url=NOBODY)
    assert (weights.kind, weights.label) == ("random", "RANDOM WEIGHTS")
    assert "RANDOM WEIGHTS" in caplog.text


def test_an_address_without_the_file_is_no_network_either(server: str, tmp_path: Path) -> None:
    url = server.replace("weights.h5", "none")
    with pytest.raises(SourceNotFound, match="404") as caught:
        resolve_weights("auto", False, tmp_path, keras_home=tmp_path / "keras", url=url)
    assert "VGG16_WEIGHTS" in caught.value.fix
    assert resolve_weights("auto", True, tmp_path, keras_home=tmp_path / "keras", url=url).kind == "random"


def test_a_download_of_something_else_is_refused_and_removed(server: str, tmp_path: Path) -> None:
    for stand_in in (False, True):  # corrupt is not unreachable: no stand-in for it
        with pytest.raises(SourceCorrupt, match="md5"):
            resolve_weights("auto", stand_in, tmp_path, keras_home=tmp_path / "keras", url=server)
    assert _content(tmp_path) == []


def test_keras_cache_is_used_if_it_is_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    cached = tmp_path / "keras" / "models" / IMAGENET_FILE
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    with pytest.raises(SourceUnreachable):
        resolve_weights("imagenet", False, tmp_path, keras_home=tmp_path / "keras", url=NOBODY)
    # The published file cannot be had here: its digest is put in the place of this one's.
    monkeypatch.setattr(vgg16_weights, "IMAGENET_MD5", hashlib.md5(b"half a download").hexdigest())
    found = resolve_weights("imagenet", False, tmp_path, keras_home=tmp_path / "keras", url=NOBODY)
    assert (found.kind, found.path) == ("imagenet", cached)
    monkeypatch.setattr(vgg16_weights, "IMAGENET_MD5", hashlib.md5(b"not these").hexdigest())
    fetched = resolve_weights("imagenet", False, tmp_path / "cache", keras_home=tmp_path / "none", url=server)
    assert fetched.path is not None
    assert fetched.path.read_bytes() == b"not these"
    assert _content(tmp_path / "cache") == [IMAGENET_FILE]


def test_the_catalog_refuses_what_does_not_go_together() -> None:
    with pytest.raises(ConfigurationError):
        build(BaselineSpec(), Weights("random"))
    with pytest.raises(ConfigurationError):
        build(Vgg16Spec())


def test_preprocessing_is_keras_own_and_inside_the_model() -> None:
    keras.utils.set_random_seed(0)
    model = build(Vgg16Spec(dense_units=8), Weights("random"))
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.float32)
    inside = keras.ops.convert_to_numpy(model.get_layer("rgb_to_centred_bgr")(images))
    assert np.allclose(inside, keras.applications.vgg16.preprocess_input(images.copy()), atol=1e-4)
    assert not model.get_layer("rgb_to_centred_bgr").trainable
    # He: the signal neither dies nor explodes through thirteen layers.
    features = keras.Model(model.inputs, model.get_layer("flatten").output)
    spread = features.predict_on_batch(images).std()
    assert 0.05 < spread < 20
