"""Loading and saving photos: every valid format becomes RGB, every invalid file a message that says what to do."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from recipes import (
    MAX_BYTES,
    MAX_PIXELS,
    PhotoError,
    Recipe,
    data_url_content,
    encode_jpeg,
    jpeg_data_url,
    load_photo,
    read_recipe,
    render,
    save_picture,
)

ADVICE = ("Choose", "choose", "Export", "Save", "Check", "Copy")


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """Create a picture of 40 x 60: a red-to-blue gradient with a white corner at the top left."""
    x = np.linspace(0, 1, 60)[None, :].repeat(40, axis=0)
    picture = np.stack([255 * (1 - x), 90 + 0 * x, 255 * x], axis=-1).astype(np.uint8)
    picture[:10, :10] = 255
    return picture


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def close(actual: np.ndarray, expected: np.ndarray, limit: float = 3.0) -> bool:
    return actual.shape == expected.shape and np.abs(actual.astype(int) - expected).mean() < limit


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_supported_formats_load(scene: np.ndarray, kind: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(scene), kind)
    path = tmp_path / "photo"
    path.write_bytes(data)
    for source in (data, path, str(path), Image.open(path)):
        assert close(load_photo(source), scene, 8.0)


def test_exif_orientation_is_applied(scene: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be displayed rotated by 90 degrees clockwise
    loaded = load_photo(encoded(Image.fromarray(scene), "JPEG", exif=exif, quality=95, subsampling=0))
    assert close(loaded, np.rot90(scene, -1))


def test_a_damaged_exif_block_is_ignored(scene: np.ndarray) -> None:
    data = encoded(Image.fromarray(scene), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40, quality=95, subsampling=0)
    assert close(load_photo(data), scene)


def test_transparency_is_composited_over_white(scene: np.ndarray) -> None:
    alpha = np.full((*scene.shape[:2], 1), 255, np.uint8)
    alpha[20:, :] = 0
    loaded = load_photo(encoded(Image.fromarray(np.concatenate([scene, alpha], axis=2)), "PNG"))
    assert np.array_equal(loaded[:20], scene[:20]) and (loaded[20:] == 255).all()


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 10, 20))
    loaded = load_photo(encoded(image, "PNG", transparency=0))
    assert (loaded[:, :10] == 255).all() and (loaded[:, 10:] == (0, 255, 0)).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"])
def test_opened_images_of_any_mode_load(scene: np.ndarray, mode: str) -> None:
    image = Image.fromarray(scene)
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        image = image.convert(mode)
    loaded = load_photo(image)
    assert loaded.dtype == np.uint8 and loaded.shape == scene.shape
    assert loaded[2, 2].min() > 240  # the white corner


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_high_bit_depth_grey_is_scaled(mode: str) -> None:
    ramp = np.linspace(0, 65535, 64).round()[None, :].repeat(32, axis=0)
    values = {"I;16": ramp.astype("<u2"), "I;16B": ramp.astype(">u2"), "I": ramp.astype("<i4"), "F": ramp / 65535}[mode]
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (64, 32), values.tobytes())
    else:
        image = Image.fromarray(values.astype(np.float32) if mode == "F" else values)
    assert image.mode == mode
    expected = np.linspace(0, 255, 64)[None, :, None]
    assert np.abs(load_photo(image) - expected).max() <= 1.5


def test_a_16_bit_png_is_scaled() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None, :].repeat(32, axis=0)
    loaded = load_photo(encoded(Image.fromarray(ramp), "PNG"))
    assert np.abs(loaded - np.linspace(0, 255, 64)[None, :, None]).max() <= 1.5


def test_a_cmyk_jpeg_loads(scene: np.ndarray) -> None:
    loaded = load_photo(encoded(Image.fromarray(scene).convert("CMYK"), "JPEG", quality=95))
    assert close(loaded, scene, 12.0)


def swapped_profile() -> bytes:
    """Return a valid ICC profile with red and blue primaries swapped and another description."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_an_embedded_profile_is_converted_to_srgb(scene: np.ndarray) -> None:
    loaded = load_photo(encoded(Image.fromarray(scene), "PNG", icc_profile=swapped_profile()))
    assert close(loaded, scene[..., ::-1], 6.0)


@pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_an_unusable_profile_is_ignored(scene: np.ndarray, profile: bytes) -> None:
    assert np.array_equal(load_photo(encoded(Image.fromarray(scene), "PNG", icc_profile=profile)), scene)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_loaded(scene: np.ndarray, kind: str) -> None:
    frames = [Image.fromarray(scene), Image.new("RGB", (60, 40), "black")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert close(load_photo(data), scene, 12.0)


def decompression_bomb(width: int, height: int) -> bytes:
    """Return a small PNG file whose header declares width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


def invalid_files() -> dict[str, tuple[bytes, str]]:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    corrupt = bytearray(png)
    corrupt[200:400] = bytes(200)
    return {
        "empty": (b"", "empty"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "damaged"),
        "truncated png": (png[: len(png) // 2], "damaged"),
        "header only": (jpeg[:20], "damaged"),
        "corrupt png": (bytes(corrupt), "damaged"),
        "one pixel": (encoded(photo.resize((1, 1)), "PNG"), "1 x 1"),
        "two rows": (encoded(photo.resize((300, 2)), "PNG"), "300 x 2"),
        "100 megapixels": (decompression_bomb(10_000, 10_000), "megapixels"),
        "4,000 megapixels": (decompression_bomb(65_000, 65_000), "megapixels"),
        "declares 9 megapixels": (decompression_bomb(3_000, 3_000), "damaged"),
        "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        "heic": (HEIC, "HEIC"),
        "text": (b"Dear diary, today I renamed a text file to .jpg.\n" * 20, "text"),
        "utf-8": ("Ein schöner Tag\n".encode() * 20, "text"),
        "pdf": (b"%PDF-1.7\n" + bytes(range(256)), "document"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "document"),
        "noise": (np.random.default_rng(1).integers(0, 256, 3000, dtype=np.uint8).tobytes(), "not a photo format"),
        "too many bytes": (jpeg + bytes(MAX_BYTES), "MB"),
    }


@pytest.mark.parametrize("name", list(invalid_files()))
def test_invalid_files_raise_with_advice(name: str, tmp_path: Path) -> None:
    data, word = invalid_files()[name]
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(PhotoError) as caught:
            load_photo(source)
        message = str(caught.value)
        assert word.lower() in message.lower(), message
        assert any(advice in message for advice in ADVICE) and len(message) < 300 and str(tmp_path) not in message


@pytest.mark.parametrize("source", ["/no/such/file.jpg", "/", "a\0b", 7])
def test_unreadable_sources_raise(source: object) -> None:
    with pytest.raises(PhotoError):
        load_photo(source)  # type: ignore[arg-type]


def test_the_size_of_an_opened_image_is_checked() -> None:
    with pytest.raises(PhotoError, match="megapixels"):
        load_photo(Image.new("L", (MAX_PIXELS // 1000 + 1, 1000)))


@pytest.mark.parametrize("length", range(0, 3000, 97))
def test_truncated_files_load_or_raise_photo_error(length: int) -> None:
    """A truncated file never raises another exception."""
    whole = encoded(Image.fromarray(np.zeros((64, 64, 3), np.uint8) + 99), "TIFF", compression="tiff_lzw")
    for data in (whole[:length], encoded(Image.effect_noise((64, 64), 60), "WEBP")[:length]):
        try:
            assert load_photo(data).ndim == 3
        except PhotoError as error:
            assert str(error)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".PNG"])
def test_a_saved_picture_contains_its_recipe(scene: np.ndarray, suffix: str, tmp_path: Path) -> None:
    recipe = Recipe((10, 0, 90, 100), exposure=20, warmth=-30, sharpening=40, look="fade")
    path = tmp_path / f"result{suffix}"
    picture = render(scene, recipe)
    save_picture(picture, recipe, path)
    assert read_recipe(path) == recipe
    assert close(load_photo(path), picture)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_read_recipe_returns_none_for_other_pictures(scene: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "plain.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("Description", "a photo with exposure +20 as its caption")
    Image.fromarray(scene).save(path, pnginfo=info)
    assert read_recipe(path) is None
    with pytest.raises(PhotoError):
        read_recipe(tmp_path / "missing.png")


def test_unsupported_suffixes_are_rejected(scene: np.ndarray, tmp_path: Path) -> None:
    for name in ("result.gif", "result"):
        with pytest.raises(PhotoError, match="jpg or .png"):
            save_picture(scene, Recipe(), tmp_path / name)


def test_a_failed_write_keeps_the_existing_file(
    scene: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.png"
    path.write_bytes(b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(PhotoError, match="No space left"):
        save_picture(scene, Recipe(), path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["result.png"]


def test_saving_into_a_missing_folder_raises(scene: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="could not be saved"):
        save_picture(scene, Recipe(), tmp_path / "nowhere" / "result.png")


def test_data_url_is_decoded_and_other_text_is_none(scene: np.ndarray) -> None:
    assert data_url_content(jpeg_data_url(scene)) == encode_jpeg(scene)
    assert data_url_content("DATA:image/PNG;base64,AAEC") == b"\x00\x01\x02"
    for text in (
        "https://example.org/a.jpg",
        "data:image/svg+xml;base64,AAEC",
        "data:image/png,AAEC",
        "/etc/passwd",
        "",
    ):
        assert data_url_content(text) is None
    with pytest.raises(PhotoError, match="not valid base64"):
        data_url_content("data:image/jpeg;base64,!!!")
