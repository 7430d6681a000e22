"""Corruptions: their contract for every one, and the formula of each where it can be computed another way."""

import colorsys
import hashlib
import io
import math

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from ml.errors import InputInvalid
from ml.evaluation import corruptions as catalogue
from ml.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from ml.evaluation.corruptions.blur import _disk, smear, zoom_matrix
from ml.evaluation.corruptions.draws import Draws
from ml.evaluation.corruptions.weather import _frosted_panes, plasma

DRAWS_BY_BATCH = {"fog", "gaussian_noise"}
DRAWS_NOTHING = {"brightness", "contrast", "defocus_blur", "jpeg_compression", "pixelate", "zoom_blur"}
# Where the paper's own parameters do not make the distance to the clean image grow, and why.
NOT_MONOTONE = {
    "elastic_transform": "the whole image moves less as its parts move more",
    "frost": "the image is dimmed as the ice grows, so that the sum grows less bright again",
    "glass_blur": "a wider blur takes back some of what the displaced pixels add",
}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth colour gradients with edges and some grain, like photographs more than like noise."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:32, 0:32] / 31
    waves = rng.uniform(1, 6, (12, 3, 2))
    smooth = np.stack([np.stack([np.sin(a * x + b * y) for a, b in image], axis=-1) for image in waves])
    smooth[:, 8:20, 10:24] += rng.uniform(-0.8, 0.8, (12, 1, 1, 3))
    return np.clip(128 + 70 * smooth + rng.normal(scale=5, size=smooth.shape), 0, 255).astype(np.uint8)


def test_the_fifteen_of_the_paper_are_there() -> None:
    noise = {"gaussian_noise", "shot_noise", "impulse_noise"}
    blur = {"defocus_blur", "glass_blur", "motion_blur", "zoom_blur"}
    weather = {"snow", "frost", "fog", "brightness"}
    digital = {"contrast", "elastic_transform", "pixelate", "jpeg_compression"}
    assert set(CORRUPTIONS) == noise | blur | weather | digital
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_contract(name: str, images: np.ndarray) -> None:
    before = images.copy()
    first = corrupt(images, name, 3, seed=5)
    assert np.array_equal(first, corrupt(images, name, 3, seed=5))
    assert first.dtype == np.uint8
    assert first.shape == images.shape
    assert np.array_equal(images, before)
    assert corrupt(images[:0], name, 3, seed=5).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - set(NOT_MONOTONE)))
def test_each_severity_departs_further(name: str, images: np.ndarray) -> None:
    distance = _distances(name, images)
    assert distance[0] > 0
    assert distance == sorted(distance)
    assert distance[4] > 1.2 * distance[0]


@pytest.mark.parametrize("name", sorted(NOT_MONOTONE))
def test_the_others_differ_from_the_image_at_each_severity(name: str, images: np.ndarray) -> None:
    assert min(_distances(name, images)) > 5


def _distances(name: str, images: np.ndarray) -> list[float]:
    """Mean distance of a value to the clean one, in grey levels, by severity."""
    return [np.abs(corrupt(images, name, severity, seed=1).astype(float) - images).mean() for severity in SEVERITIES]


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - DRAWS_NOTHING))
def test_the_random_ones_follow_the_seed(name: str, images: np.ndarray) -> None:
    assert not np.array_equal(corrupt(images, name, 2, seed=1), corrupt(images, name, 2, seed=2))
    # Six, because two directions of motion can come to the same pixels.
    same = corrupt(np.repeat(images[:1], 6, axis=0), name, 2, seed=1)
    assert len(np.unique(same.reshape(6, -1), axis=0)) > 3, "every image has a draw of its own"


@pytest.mark.parametrize("name", sorted(DRAWS_NOTHING))
def test_the_others_draw_nothing(name: str, images: np.ndarray) -> None:
    assert np.array_equal(corrupt(images[::-1], name, 2, seed=1)[::-1], corrupt(images, name, 2, seed=2))


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - DRAWS_BY_BATCH))
def test_an_image_comes_out_the_same_whatever_stands_beside_it(
    name: str, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = corrupt(images, name, 5, seed=1)
    others = images.copy()
    others[[0, 2, 11]] = 255 - others[[0, 2, 11]]
    assert np.array_equal(
        np.delete(corrupt(others, name, 5, seed=1), [0, 2, 11], axis=0), np.delete(whole, [0, 2, 11], axis=0)
    )
    assert np.array_equal(corrupt(images[:3], name, 5, seed=1), whole[:3])
    monkeypatch.setattr(catalogue, "_CHUNK", 5)
    assert np.array_equal(corrupt(images, name, 5, seed=1), whole)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_need_not_be_square(name: str) -> None:
    tall = np.full((2, 24, 16, 3), 90, dtype=np.uint8)
    assert corrupt(tall, name, 5, seed=0).shape == tall.shape


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("brightness", "23f5738994b8fecb"),
        ("contrast", "b950a59c76f6eddd"),
        ("defocus_blur", "097d02b6ecf0bcfa"),
        ("fog", "1eb7b035b7ac7e9c"),
        ("gaussian_noise", "24a40a2d8d518ac5"),
    ],
)
def test_results_on_record_can_be_made_again(name: str, digest: str) -> None:
    rng = np.random.default_rng(11)
    noise = rng.integers(0, 256, (40, 32, 32, 3)).astype(np.uint8)
    every = b"".join(corrupt(noise, name, severity, seed=9).tobytes() for severity in SEVERITIES)
    assert hashlib.sha256(every).hexdigest()[:16] == digest


def test_noise_has_the_papers_scale() -> None:
    grey = np.full((40, 32, 32, 3), 128, dtype=np.uint8)
    spread = corrupt(grey, "gaussian_noise", 5, seed=0).astype(float).std() / 255
    assert spread == pytest.approx(0.10, rel=0.02)


def test_shot_noise_counts_photons() -> None:
    grey = np.full((60, 32, 32, 3), 102, dtype=np.uint8)  # 0.4 of white
    for severity, photons in ((1, 500), (5, 50)):
        counts = corrupt(grey, "shot_noise", severity, seed=0).astype(float) / 255 * photons
        assert counts.mean() == pytest.approx(0.4 * photons, rel=0.003)
        assert counts.var() == pytest.approx(0.4 * photons, rel=0.02), "a Poisson variance is its mean"
    assert not corrupt(np.zeros_like(grey), "shot_noise", 5, seed=0).any()


def test_impulse_noise_turns_its_share_black_or_white() -> None:
    grey = np.full((60, 32, 32, 3), 102, dtype=np.uint8)
    found = corrupt(grey, "impulse_noise", 5, seed=0)
    assert set(np.unique(found)) == {0, 102, 255}
    for value in (0, 255):
        assert (found == value).mean() == pytest.approx(0.035, rel=0.03)
    hit = found != 102
    assert (hit[..., 0] & hit[..., 1]).mean() == pytest.approx(0.07**2, rel=0.15), "channels are hit independently"


@pytest.mark.parametrize(("severity", "sigma", "rounds"), [(1, 0.05, 1), (3, 0.4, 1), (4, 0.25, 2)])
def test_glass_is_the_original_walk_over_the_pixels(
    images: np.ndarray, severity: int, sigma: float, rounds: int
) -> None:
    draws = Draws(5, range(3))
    shifts = [draws.integers(2, 2, 32, 32) for _ in range(rounds)]
    for row in range(3):
        expected = gaussian_filter(images[row] / 255, (sigma, sigma, 0), mode="nearest")
        for shift in shifts:
            for h in range(31, 1, -1):
                for w in range(31, 1, -1):
                    dy, dx = -shift[row, :, h, w]
                    expected[h, w], expected[h + dy, w + dx] = expected[h + dy, w + dx], expected[h, w]
        expected = gaussian_filter(expected, (sigma, sigma, 0), mode="nearest") * 255
        assert np.abs(corrupt(images[:3], "glass_blur", severity, seed=5)[row] - expected).max() < 0.51


@pytest.mark.parametrize("degrees", [0.0, 30.0, -45.0, -90.0, 135.0])
def test_a_smear_is_half_a_bell_along_a_line(images: np.ndarray, degrees: float) -> None:
    image = images[0].astype(np.float32) / 255
    weights = [math.exp(-(step**2) / (2 * 2.5**2)) for step in range(19)]
    expected = np.zeros_like(image)
    for y in range(32):
        for x in range(32):
            for step, weight in enumerate(weights):
                right = math.ceil(step * math.cos(math.radians(degrees)) - 0.5)
                down = math.ceil(step * math.sin(math.radians(degrees)) - 0.5)
                from_y, from_x = min(max(y + down, 0), 31), min(max(x + right, 0), 31)
                expected[y, x] += weight / sum(weights) * image[from_y, from_x]
    found = smear(image[None], 9, 2.5, np.array([degrees]))[0]
    assert np.abs(found - expected).max() < 1e-4


def test_motion_blur_stays_within_45_degrees_of_the_horizontal() -> None:
    bar = np.zeros((40, 32, 32, 3), dtype=np.uint8)
    bar[:, 16] = 255
    assert not corrupt(bar, "motion_blur", 5, seed=0)[:, :8].any(), "tilted, but never upright"
    dot = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    dot[0, 16, 16] = 255
    assert corrupt(dot, "motion_blur", 5, seed=0)[0, :, 17:].max() == 0, "one side only"


def test_zoom_blur_is_the_mean_of_zoomed_images(images: np.ndarray) -> None:
    image = images[4] / 255
    factors = np.arange(1, 1.16, 0.01)
    total = image.copy()
    for factor in factors:
        crop = math.ceil(32 / factor)
        top = (32 - crop) // 2
        zoomed = zoom(image[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
        trim = (len(zoomed) - 32) // 2
        total += zoomed[trim : trim + 32, trim : trim + 32]
    found = corrupt(images, "zoom_blur", 3, seed=0)[4]
    assert np.abs(found - total / (len(factors) + 1) * 255).max() < 0.51


def test_zooming_keeps_flat_areas() -> None:
    for factor in (1.0, 1.25, 1.75, 2.25):
        assert np.allclose(zoom_matrix(32, factor).sum(axis=1), 1)
    assert np.allclose(zoom_matrix(32, 1.0), np.eye(32))


def test_snow_lies_on_a_black_image_twice_the_second_time_turned() -> None:
    black = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    found = corrupt(black, "snow", 5, seed=0)
    assert np.array_equal(found, found[:, ::-1, ::-1])
    assert (found == found[..., :1]).all(), "snow has no colour"
    # A black image is whitened by the clear image's missing weight times 0.5, and snow only adds.
    assert found.min() >= round(0.2 * 0.5 * 255) - 1
    assert (corrupt(black, "snow", 1, seed=0).mean(axis=(1, 2, 3)) < found.mean(axis=(1, 2, 3))).all()


def test_frost_adds_its_ice_to_the_dimmed_image() -> None:
    grey = np.full((30, 32, 32, 3), 100, dtype=np.uint8)
    ice = corrupt(np.zeros_like(grey), "frost", 5, seed=0).astype(float)
    assert np.abs(corrupt(grey, "frost", 5, seed=0) - (0.75 * 100 + ice)).max() <= 1
    assert ice.max() <= 0.45 * 255 + 0.5
    assert (ice[..., 2] >= ice[..., 0]).all(), "ice is bluish, or white"


def test_panes_are_textured_and_no_two_are_alike() -> None:
    panes = _frosted_panes()
    assert panes.shape == (5, 256, 256, 3)
    assert panes.min() >= 0
    assert panes.max() <= 1
    assert 0.3 < panes.mean() < 0.6
    assert (panes.std(axis=(1, 2)) > 0.15).all()
    assert all(np.abs(panes[i] - panes[j]).mean() > 0.1 for i in range(5) for j in range(i))


@pytest.mark.parametrize(
    ("severity", "size", "smoothness", "reach"), [(1, 0, 0, 2.56), (2, 1.6, 6.4, 2.24), (5, 3.2, 0.96, 0.96)]
)
def test_elastic_is_an_affine_map_and_a_smooth_field(
    images: np.ndarray, severity: int, size: float, smoothness: float, reach: float
) -> None:
    draws = Draws(7, range(3))
    moves, fields = draws.uniform(-reach, reach, 3, 2), draws.uniform(-1, 1, 2, 32, 32)
    y, x = np.mgrid[0:32, 0:32].astype(float)
    for row in range(3):
        image = images[row] / 255
        points = np.array([[26.0, 26], [26, 6], [6, 6]])  # x, y
        # Forward map, from three points to where they are moved; a pixel comes from where the map is undone.
        forward = np.linalg.solve(np.column_stack([points, np.ones(3)]), points + moves[row]).T
        undone = np.linalg.inv(forward[:, :2])
        from_x, from_y = np.einsum("ij,jhw->ihw", undone, np.stack([x - forward[0, 2], y - forward[1, 2]]))
        image = _looked_up(image, from_y, from_x, "mirror")
        if size:
            dy, dx = (size * gaussian_filter(field, smoothness, mode="reflect", truncate=3) for field in fields[row])
            image = _looked_up(image, y + dy, x + dx, "reflect")
        found = corrupt(images[:3], "elastic_transform", severity, seed=7)[row]
        assert np.abs(found - image * 255).max() < 0.52


def _looked_up(image: np.ndarray, y: np.ndarray, x: np.ndarray, mode: str) -> np.ndarray:
    return np.stack([map_coordinates(image[..., channel], (y, x), order=1, mode=mode) for channel in range(3)], axis=-1)


@pytest.mark.parametrize(("severity", "side"), [(1, 30), (3, 27), (5, 20)])
def test_pixelate_is_pillows_box_there_and_back(images: np.ndarray, severity: int, side: int) -> None:
    found = corrupt(images, "pixelate", severity, seed=0)
    for image, pixelated in zip(images, found, strict=True):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
        assert np.array_equal(pixelated, np.asarray(small.resize((32, 32), Image.Resampling.BOX)))
    assert np.abs(found.mean(axis=(1, 2)) - images.mean(axis=(1, 2))).max() < 4


@pytest.mark.parametrize(("severity", "quality"), [(1, 80), (5, 40)])
def test_jpeg_is_pillows(images: np.ndarray, severity: int, quality: int) -> None:
    for image, found in zip(images, corrupt(images, "jpeg_compression", severity, seed=0), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        assert np.array_equal(found, np.asarray(Image.open(file)))


def test_brightness_raises_v_of_hsv(images: np.ndarray) -> None:
    pixels = np.concatenate([images[0, 3], np.zeros((1, 3), np.uint8), np.full((1, 3), 250, np.uint8)])
    found = corrupt(np.broadcast_to(pixels, (1, 34, 34, 3)).copy(), "brightness", 4, seed=0)[0, 0]
    for pixel, new in zip(pixels, found, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        assert np.abs(np.array(colorsys.hsv_to_rgb(h, s, min(1, v + 0.2))) * 255 - new).max() <= 0.5 + 1e-9


def test_contrast_shrinks_around_the_mean(images: np.ndarray) -> None:
    changed = corrupt(images, "contrast", 2, seed=0)
    assert np.allclose(changed.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=0.5)
    assert np.allclose(changed.std(axis=(1, 2)), 0.5 * images.std(axis=(1, 2)), atol=0.5)


def test_blur_keeps_flat_areas_and_its_kernel_is_a_disk(images: np.ndarray) -> None:
    flat = np.full((1, 32, 32, 3), 77, dtype=np.uint8)
    assert np.array_equal(corrupt(flat, "defocus_blur", 5, seed=0), flat)
    kernel = _disk(1.5, 0.1)  # anti-aliasing of 0.1 pixels changes next to nothing: 3x3 of equal weights
    assert kernel.sum() == pytest.approx(1)
    assert np.allclose(kernel[2:5, 2:5], 1 / 9, atol=1e-6)
    assert np.allclose(kernel, kernel[::-1])
    assert np.allclose(kernel, kernel.T)


def test_fog_veils_without_darkening_to_nothing(images: np.ndarray) -> None:
    foggy = corrupt(images, "fog", 5, seed=0).astype(float)
    assert foggy.std(axis=(1, 2, 3)).mean() < images.std(axis=(1, 2, 3)).mean()
    assert (foggy.max(axis=(1, 2, 3)) <= images.max(axis=(1, 2, 3))).all()


def test_plasma_fills_its_range_and_is_smoother_with_more_decay() -> None:
    rough, smooth = (plasma(20, 32, decay, np.random.default_rng(0)) for decay in (1.75, 3.0))
    for maps in (rough, smooth):
        assert np.allclose(maps.min(axis=(1, 2)), 0)
        assert np.allclose(maps.max(axis=(1, 2)), 1)
    grain = [np.abs(np.diff(maps, n=2, axis=1)).mean() for maps in (rough, smooth)]
    assert grain[0] > 2 * grain[1]


@pytest.mark.parametrize(
    ("images", "name", "severity"),
    [
        (np.zeros((2, 32, 32, 3), np.uint8), "rain", 1),
        (np.zeros((2, 32, 32, 3), np.uint8), "fog", 0),
        (np.zeros((2, 32, 32, 3), np.uint8), "fog", 6),
        (np.zeros((2, 32, 32, 3), np.uint8), "snow", 6),
        (np.zeros((2, 32, 32, 3), np.float64), "frost", 1),
        (np.zeros((2, 32, 32, 3), np.float32), "fog", 1),
        (np.zeros((32, 32, 3), np.uint8), "fog", 1),
        (np.zeros((2, 32, 32, 1), np.uint8), "fog", 1),
    ],
)
def test_what_cannot_be_corrupted_is_refused(images: np.ndarray, name: str, severity: int) -> None:
    with pytest.raises(InputInvalid):
        corrupt(images, name, severity, seed=0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputInvalid, match="-1"):
        corrupt(np.zeros((1, 32, 32, 3), np.uint8), "snow", 1, seed=-1)
