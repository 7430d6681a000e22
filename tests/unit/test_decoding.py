"""Images and JSON as clients send them, good and bad."""

import base64
import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ml.errors import ImageTooLarge, ImageTypeUnsupported, ImageUndecodable, InputInvalid, RequestError
from ml.serving.decoding import (
    MAX_IMAGES,
    EncodedImage,
    decode_images,
    images_from_arrays,
    images_from_json,
    images_from_mlflow,
    parse_json,
)

PIXELS = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def decode(data, content_type=None):
    return decode_images([EncodedImage(data, content_type)])[0]


def b64(data):
    return base64.b64encode(data).decode()


def png_of_size(width, height):
    """A small file whose header says that it is enormous."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 100, "subsampling": 0}, 2)],
)
def test_32x32_keeps_its_pixels(kind, options, tolerance):
    got = decode(encoded(PIXELS, kind, **options), f"image/{kind.lower()}")
    assert (got.dtype, got.shape) == (np.uint8, (32, 32, 3))
    assert np.abs(got.astype(int) - PIXELS).mean() <= tolerance


def test_a_large_image_is_averaged_not_sampled():
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255  # nearest-neighbour sampling would see only black
    assert np.abs(decode(encoded(stripes))[8:24, 8:24].astype(int) - 127).max() <= 8


def test_a_small_image_is_enlarged():
    assert decode(encoded(np.full((5, 7, 3), 9, np.uint8))).tolist() == np.full((32, 32, 3), 9).tolist()


def test_grey_is_the_same_in_three_channels():
    grey = decode(encoded(PIXELS[:, :, 0]))
    for channel in range(3):
        np.testing.assert_array_equal(grey[:, :, channel], PIXELS[:, :, 0])


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    got = decode(encoded(Image.fromarray(deep)))
    np.testing.assert_array_equal(got[:, :, 0], deep >> 8)


def test_transparency_lies_on_white():
    rgba = np.dstack([PIXELS, np.zeros((32, 32), np.uint8)])
    rgba[16:, :, 3] = 255
    got = decode(encoded(rgba))
    assert (got[:16] == 255).all()
    np.testing.assert_array_equal(got[16:], PIXELS[16:])


def test_a_palette_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (32, 32), 0)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.paste(1, (0, 0, 32, 16))
    got = decode(encoded(image, transparency=0))
    assert got[0, 0].tolist() == [200, 0, 0]
    assert got[31, 0].tolist() == [255, 255, 255]


def test_cmyk_is_converted():
    got = decode(encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"))
    assert got[16, 16].tolist() == pytest.approx([255, 0, 0], abs=6)


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_followed(orientation, turn):
    image = Image.fromarray(np.ascontiguousarray(PIXELS))
    exif = image.getexif()
    exif[0x0112] = orientation
    got = decode(encoded(image, "PNG", exif=exif))
    np.testing.assert_array_equal(got, np.rot90(PIXELS, turn))


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    got = decode(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert got[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP"])
def test_what_is_no_image_is_undecodable(data):
    with pytest.raises(ImageUndecodable, match="PNG, JPEG or WebP"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_undecodable(kind):
    whole = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    with pytest.raises(ImageUndecodable):
        decode(whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_give_pixels_or_a_request_error_and_nothing_else(kind):
    draw = np.random.default_rng(11)
    whole = np.frombuffer(encoded(PIXELS, kind), np.uint8)
    refused = 0
    for _ in range(400):
        damaged = whole.copy()
        damaged[draw.integers(0, len(damaged), draw.integers(1, 12))] = draw.integers(0, 256)
        try:
            assert decode(damaged.tobytes()).shape == (32, 32, 3)
        except RequestError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_named(kind):
    with pytest.raises(ImageTypeUnsupported, match=kind):
        decode(encoded(PIXELS, kind))


def test_a_wrong_declaration_is_refused_with_the_right_one():
    with pytest.raises(ImageTypeUnsupported, match="declare it as image/png"):
        decode(encoded(PIXELS), "image/jpeg")


@pytest.mark.parametrize("size", [(10_000, 10_000), (2_001, 2_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_from_the_header(size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises((ImageTooLarge, ImageUndecodable), match=r"megapixels|PNG"):
            decode(png_of_size(*size))


def test_a_hundred_megapixels_are_too_large():
    with pytest.raises(ImageTooLarge, match="10000x10000"), pytest.warns(Image.DecompressionBombWarning):
        decode(png_of_size(10_000, 10_000))


def test_a_webp_of_enormous_canvas_is_too_large():
    canvas = struct.pack("<I", 16_382)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + canvas + encoded(PIXELS, "WEBP")[12:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(RequestError):
            decode(b"RIFF" + struct.pack("<I", len(body)) + body)


def test_many_large_images_together_are_too_large():
    big = EncodedImage(encoded(np.zeros((1500, 2000, 3), np.uint8)))
    decode_images([big] * 5)
    with pytest.raises(ImageTooLarge, match=r"18\.0 megapixels together"):
        decode_images([big] * 6)


def test_an_error_in_a_batch_says_which_image():
    good = EncodedImage(encoded(PIXELS))
    with pytest.raises(ImageUndecodable, match="Image 2: "):
        decode_images([good, good, EncodedImage(b"x"), good])


@pytest.mark.parametrize("count", [0, MAX_IMAGES + 1])
def test_the_number_of_images_is_bounded(count):
    with pytest.raises((InputInvalid, ImageTooLarge), match=r"at least one|at most 128"):
        images_from_arrays([PIXELS.tolist()] * count)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"])
def test_what_is_no_json_is_undecodable(body):
    with pytest.raises(ImageUndecodable, match="not JSON"):
        parse_json(body)


@pytest.mark.parametrize(("body", "word"), [(b"[]", "list"), (b"3", "number"), (b"null", "null"), (b'"x"', "string")])
def test_json_that_is_no_object_is_invalid(body, word):
    with pytest.raises(InputInvalid, match=word):
        parse_json(body)


def test_base64_forms_give_the_pixels():
    one = {"image": b64(encoded(PIXELS))}
    many = {"images": [b64(encoded(PIXELS)), "data:image/webp;base64," + b64(encoded(PIXELS, "WEBP", lossless=True))]}
    np.testing.assert_array_equal(images_from_json(one), [PIXELS])
    np.testing.assert_array_equal(images_from_json(many), [PIXELS, PIXELS])


@pytest.mark.parametrize(
    ("payload", "error", "said"),
    [
        ({}, InputInvalid, "nothing"),
        ({"img": "x"}, InputInvalid, "'img'"),
        ({"image": "x", "images": []}, InputInvalid, "exactly one"),
        ({"image": 3}, InputInvalid, "number"),
        ({"images": "x"}, InputInvalid, "string"),
        ({"images": []}, InputInvalid, "no image"),
        ({"images": [None]}, InputInvalid, "null"),
        ({"image": "a b"}, ImageUndecodable, "base64"),
        ({"image": "é"}, ImageUndecodable, "base64"),
        ({"image": "AAAA"}, ImageUndecodable, "not an image"),
        ({"image": "data:text/html;base64,AAAA"}, ImageTypeUnsupported, "text/html"),
        ({"image": "data:image/png;base64," + b64(encoded(PIXELS, "JPEG"))}, ImageTypeUnsupported, "declared"),
        ({"images": ["AAAA"] * (MAX_IMAGES + 1)}, ImageTooLarge, "129 images"),
    ],
)
def test_other_json_is_refused_with_the_reason(payload, error, said):
    with pytest.raises(error, match=said):
        images_from_json(payload)


def test_instances_give_the_pixels_and_are_resized():
    small = np.full((4, 6, 3), 77.4)
    got = images_from_json({"instances": [PIXELS.tolist(), small.tolist()]})
    np.testing.assert_array_equal(got[0], PIXELS)
    assert (got[1] == 77).all()


@pytest.mark.parametrize("key", ["instances", "inputs"])
def test_mlflows_forms_give_the_pixels(key):
    np.testing.assert_array_equal(images_from_mlflow({key: [PIXELS.tolist()], "params": {}}), [PIXELS])


@pytest.mark.parametrize("payload", [{"dataframe_split": {}}, {"instances": [], "inputs": []}, {"inputs": {}}])
def test_mlflows_other_forms_are_refused(payload):
    with pytest.raises(InputInvalid):
        images_from_mlflow(payload)


def test_mlflows_params_are_refused_where_they_would_be_ignored():
    with pytest.raises(InputInvalid, match="params"):
        images_from_mlflow({"inputs": [PIXELS.tolist()], "params": {"top": 3}})


@pytest.mark.parametrize(
    "instance",
    [
        [[[1, 2, 3], [1, 2]]],
        [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]],
        [[1, 2, 3]],
        [[[1, 2, 3, 4]]],
        [],
        [[]],
        5,
        None,
        "text",
        {"r": 1},
        [[["1", "2", "3"]]],
        [[[True, False, True]]],
        [[[None, 1, 2]]],
        [[[-1, 0, 0]]],
        [[[0, 0, 255.5]]],
        [[[0, 0, 10**30]]],
    ],
    ids=repr,
)
def test_a_wrong_instance_is_invalid(instance):
    with pytest.raises(InputInvalid, match="0-255"):
        images_from_arrays([instance])


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_invalid(word):
    payload = json.loads(f'{{"instances": [[[[0, {word}, 0]]]]}}')
    with pytest.raises(InputInvalid, match="0-255"):
        images_from_json(payload)
