"""Images and label maps as files store them: bit depths, channels, orientation, and resizing."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taskray.data.readers.images import (
    check_shape,
    nearest,
    open_image,
    read_ids,
    read_uint16,
    resize_area,
    resize_image,
)
from taskray.data.storage.codec import decode_row
from taskray.schema import IGNORE

GREY = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) % 200


def saved(file: Path, values: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(file)
    return file


def png(file: Path, values: np.ndarray, bits: int) -> Path:
    """A PNG of grey or RGB as its standard defines it, at bit depths that Pillow does not write."""
    height, width, *channels = values.shape
    if bits == 16:
        lines = values.astype(">u2").tobytes()
        size = len(lines) // height
        lines = b"".join(b"\0" + lines[k * size : (k + 1) * size] for k in range(height))
    else:
        each = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -bits:]
        lines = b"".join(b"\0" + np.packbits(line).tobytes() for line in each)
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if channels else 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        data += struct.pack(">I", len(body)) + kind + body + checksum
    file.write_bytes(data)
    return file


# ---- images -------------------------------------------------------------------------------------


def test_an_image_of_16_bits_is_refused_and_not_made_white(tmp_path: Path) -> None:
    grey = saved(tmp_path / "grey.png", GREY * 257)
    colour = png(tmp_path / "colour.png", np.stack([GREY] * 3, axis=-1), 16)
    for file in (grey, colour, saved(tmp_path / "grey.tif", GREY)):
        with pytest.raises(ValueError, match=rf"^{file.name}: got 16 bits a channel, expected 8"):
            open_image(file)
    with pytest.raises(ValueError, match=r"^float.tif: got 32 bits a channel, expected 8"):
        open_image(saved(tmp_path / "float.tif", GREY.astype(np.float32)))


def test_a_stored_image_of_16_bits_is_refused_as_well() -> None:
    data = io.BytesIO()
    Image.fromarray(GREY).save(data, format="PNG")
    with pytest.raises(ValueError, match="got 16 bits a channel"):
        decode_row({"image": data.getvalue()})


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_and_less_are_read_as_rgb(tmp_path: Path, mode: str) -> None:
    values = np.zeros((20, 30, 3), np.uint8)
    values[:, 15:] = 255
    file = saved(tmp_path / ("image.tif" if mode == "CMYK" else "image.png"), values, mode)
    np.testing.assert_array_equal(np.asarray(open_image(file)), values)


def test_grey_of_4_bits_is_scaled_to_its_range(tmp_path: Path) -> None:
    image = open_image(png(tmp_path / "four.png", GREY % 16, 4))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], GREY % 16 * 17)


def test_transparent_pixels_are_refused(tmp_path: Path) -> None:
    values = np.full((20, 30, 4), 90, np.uint8)
    values[..., 3] = 255
    assert np.asarray(open_image(saved(tmp_path / "opaque.png", values))).max() == 90
    values[3, 4, 3] = 254
    with pytest.raises(ValueError, match=r"^clear.png: got transparent pixels, expected an opaque"):
        open_image(saved(tmp_path / "clear.png", values))
    palette = Image.fromarray(values[..., :3]).convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    with pytest.raises(ValueError, match=r"palette.png: got transparent"):
        open_image(tmp_path / "palette.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_maps_are_upright_in_every_exif_orientation(
    tmp_path: Path, orientation: int
) -> None:
    T = Image.Transpose
    stored = {
        2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
        6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270,
    }  # fmt: skip
    upright = Image.fromarray(GREY.astype(np.uint8))
    image = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "turned.png"))[..., 0], GREY)
    np.testing.assert_array_equal(read_ids(tmp_path / "turned.png"), GREY)


def test_a_map_of_another_shape_than_its_image_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.png"
    check_shape(file, (1024, 2048), (64, 128))
    check_shape(file, (341, 455), (375, 500))  # rounded
    with pytest.raises(ValueError, match=r"^labels.png: got 48x64 pixels, .* image, 48x60$"):
        check_shape(file, (48, 64), (48, 60))
    with pytest.raises(ValueError, match="64x48; images are turned by their EXIF orientation"):
        check_shape(file, (48, 64), (64, 48))


# ---- label maps ---------------------------------------------------------------------------------


def test_ids_are_read_as_they_are_stored(tmp_path: Path) -> None:
    ids = (GREY % 12).astype(np.uint8)
    ids[0, 0] = IGNORE
    palette = Image.fromarray(ids)
    palette.putpalette(bytes(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    for file in (saved(tmp_path / "8.png", ids), tmp_path / "palette.png",
                 saved(tmp_path / "16.png", ids.astype(np.uint16))):  # fmt: skip
        found = read_ids(file)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, ids)
    np.testing.assert_array_equal(read_ids(png(tmp_path / "1.png", GREY % 2, 1)), GREY % 2)


def test_ids_that_are_none_are_refused(tmp_path: Path) -> None:
    wide = saved(tmp_path / "wide.png", GREY + 256)
    with pytest.raises(ValueError, match=r"wide.png: got label id 256, expected 0 to 254, or 255"):
        read_ids(wide)
    with pytest.raises(ValueError, match="got label id 34, expected 0 to 33, or 255"):
        read_ids(saved(tmp_path / "more.png", np.full((20, 30), 34, np.uint8)), 33)
    with pytest.raises(ValueError, match="got channels R G B of 8 bits, expected one channel of"):
        read_ids(saved(tmp_path / "colours.png", np.zeros((20, 30, 3), np.uint8)))
    with pytest.raises(
        ValueError, match=r"four.png: got ids of 4 bits, expected 8 bits or a palet"
    ):
        read_ids(png(tmp_path / "four.png", GREY % 16, 4))  # Pillow makes 17 of 1


def test_measured_values_have_16_bits(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_uint16(saved(tmp_path / "d.png", GREY * 300)), GREY * 300)
    for values in (GREY.astype(np.uint8), np.zeros((20, 30, 3), np.uint8)):
        with pytest.raises(ValueError, match="of 8 bits, expected one channel of 16 bits"):
            read_uint16(saved(tmp_path / "8.png", values))


# ---- resizing -----------------------------------------------------------------------------------

SIZES = [(192, 128), (320, 128), (512, 320), (240, 96), (1241, 208), (512, 160), (30, 100)]


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_a_ramp_stays_where_it_was_at_any_ratio(old: int, new: int) -> None:
    """A new pixel is the integral of the pixels (each of one value) between its edges."""
    ramp = np.arange(old, dtype=np.float32)
    edges = np.arange(new + 1) * old / new
    whole = np.floor(edges)
    integral = whole * (whole - 1) / 2 + whole * (edges - whole)
    expected = np.diff(integral) * new / old
    across, along = np.tile(ramp[None, :, None], (6, 1, 1)), np.tile(ramp[:, None, None], (1, 6, 1))
    for found in (resize_area(across, (4, new))[0, :, 0], resize_area(along, (new, 4))[:, 0, 0]):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if new < old:
        beside = (expected + 0.5) * new / old - (np.arange(new) + 0.5)
        assert np.abs(beside).max() < 0.06  # pixels; 0.17 with Pillow's BOX
        assert beside.mean() == pytest.approx(0, abs=1e-3)


def test_each_new_pixel_is_the_mean_of_the_area_that_it_covers() -> None:
    values = np.array([[0, 10, 20], [30, 40, 50]], np.float32)[..., None]
    found = resize_area(values, (1, 2))[0, :, 0]
    np.testing.assert_allclose(found, [(15 + 25 / 2) / 1.5, (25 / 2 + 35) / 1.5])
    part = resize_area(values, (1, 1), (0.5, 0.25, 2.5, 1.25))[0, 0, 0]
    weights = np.outer([0.75, 0.25], [0.5, 1, 0.5]) / 2
    assert part == pytest.approx((weights * values[..., 0]).sum())
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    halves = noise.reshape(32, 2, 48, 2, 3).mean(axis=(1, 3))
    found = resize_image(Image.fromarray(noise), (32, 48))
    assert np.abs(found - halves).max() <= 0.5


def test_a_map_at_an_even_ratio_takes_the_later_pixel_of_the_middle() -> None:
    assert nearest(np.arange(8)[None], (1, 4)).tolist() == [[1, 3, 5, 7]]
    assert nearest(np.arange(9)[None], (1, 3)).tolist() == [[1, 4, 7]]
