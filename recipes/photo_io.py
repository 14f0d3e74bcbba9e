"""Load photos of any common format as RGB arrays, and save pictures with their recipe in the metadata."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from recipes.parsing import parse
from recipes.recipe import Recipe

MAX_PIXELS = 50_000_000
MAX_BYTES = 50_000_000
MIN_SIDE = 16
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
_DATA_URL = re.compile(r"data:image/(jpeg|jpg|png|webp);base64,", re.IGNORECASE)
_IMAGE_DESCRIPTION = 0x010E  # the EXIF tag
_SOFTWARE = 0x0131
_DAMAGED = "This file is damaged or incomplete ({reason}). Copy or export the photo again and choose the new file."
_TOO_LARGE = "This photo has {size} megapixels; the limit is {limit}. Save a smaller version."


class PhotoError(ValueError):
    """Raised when a photo cannot be read or written. The message tells the user what to do."""


def load_photo(source: str | os.PathLike[str] | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Load a photo as uint8 [H, W, 3] sRGB.

    Applies the EXIF orientation, composites transparency over white, converts embedded colour profiles and reduces 16
    bits to 8. Of an animation, the first frame is loaded.

    Args:
        source: A path, the bytes of a file, or an opened image.
        max_pixels: Largest width times height that is decoded.

    Raises:
        PhotoError: If the source is too large, too small, damaged, or not a photo.
    """
    picture = source if isinstance(source, Image.Image) else _open(_read(source))
    _check_size(*picture.size, max_pixels)
    try:
        return _to_rgb(picture)
    except PhotoError:
        raise
    except (Exception, MemoryError) as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise PhotoError(_DAMAGED.format(reason=error or type(error).__name__)) from error


def _read(source: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        try:
            size = os.stat(source).st_size
            data = Path(source).read_bytes() if size <= MAX_BYTES else b"." * (MAX_BYTES + 1)
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PhotoError(
                f"The photo could not be opened ({reason}). Check the file and choose it again."
            ) from error
    if len(data) > MAX_BYTES:
        raise PhotoError(f"This file is over {MAX_BYTES // 1_000_000} MB. Save a smaller version and choose that file.")
    if not data:
        raise PhotoError("This file is empty. Choose the photo again.")
    return data


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise PhotoError(_TOO_LARGE.format(size="too many", limit=MAX_PIXELS // 1_000_000)) from None
    except Exception as error:
        raise PhotoError(_not_a_photo(data)) from error


def _not_a_photo(data: bytes) -> str:
    """Return a message for bytes that Pillow does not recognise as a photo."""
    head = data[:2048].lower()
    if data[4:8] == b"ftyp":
        return "HEIC photos and videos are not supported. Export the photo as JPEG or PNG and choose that file."
    if b"<svg" in head:
        return "SVG is a drawing, not a photo. Export it as PNG and choose that file."
    if head.startswith((b"%pdf", b"%!ps")):
        return "This is a document, not a photo. Export the page as JPEG or PNG and choose that file."
    if head.startswith((b"\xff\xd8\xff", b"\x89png", b"gif8", b"riff", b"ii*\0", b"mm\0*", b"bm")):
        return _DAMAGED.format(reason="its header cannot be read")
    if not any(byte < 9 for byte in head):
        return "This file contains text, not a photo. Choose a JPEG, PNG or WebP photo."
    return "This is not a photo format that is supported. Choose a JPEG, PNG or WebP photo."


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise PhotoError(_TOO_LARGE.format(size=round(width * height / 1e6), limit=max_pixels // 1_000_000))
    if min(width, height) < MIN_SIDE:
        raise PhotoError(f"This photo is {width} x {height} pixels. Choose one of at least {MIN_SIDE} x {MIN_SIDE}.")


def _to_rgb(picture: Image.Image) -> np.ndarray:
    picture.seek(0)
    picture.load()
    with contextlib.suppress(Exception):  # the pixels may be intact although the EXIF block is damaged
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        return _high_bit_depth_to_rgb(np.asarray(picture))
    picture = _to_srgb(picture)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(picture.convert("RGB"), dtype=np.uint8)


def _high_bit_depth_to_rgb(values: np.ndarray) -> np.ndarray:
    """Convert 16-bit, 32-bit or float grey [H, W] to uint8 [H, W, 3]; the white level depends on type and values."""
    if values.dtype.itemsize == 2:
        white = 65535.0
    else:
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        maximum = max(float(values.max()), 1e-6)
        whites = (255.0, 65535.0) if np.array_equal(values, np.rint(values)) else (1.0, 255.0, 65535.0)
        white = next((level for level in whites if maximum <= level), maximum)
    grey = np.clip(values * (255 / white) + 0.5, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Convert from an embedded colour profile to sRGB. An unusable profile is ignored."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return picture
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(embedded).lower():
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(picture, embedded, ImageCms.createProfile("sRGB"), outputMode=mode)
        return converted or picture
    except (ImageCms.PyCMSError, ValueError, OSError):
        return picture


def save_picture(picture: np.ndarray, recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Save a picture as JPEG (quality 95) or PNG with its recipe in the metadata.

    The recipe's text is stored in EXIF ImageDescription (JPEG) or in the text chunk `Description` (PNG), where
    `read_recipe` finds it. The write is atomic.

    Args:
        picture: uint8 [H, W, 3] RGB.
        recipe: The recipe that produced the picture.
        path: Destination; the suffix selects the format.

    Raises:
        PhotoError: If the suffix is not supported or the file cannot be written.
    """
    path = Path(path)
    options = _save_options(path.suffix.lower(), str(recipe))
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(data, **options)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        reason = error.strerror or error
        raise PhotoError(
            f"The picture could not be saved ({reason}). Free some space or choose another folder."
        ) from error


def _save_options(suffix: str, text: str) -> dict[str, Any]:
    if suffix in (".jpg", ".jpeg"):
        exif = Image.Exif()
        exif[_IMAGE_DESCRIPTION] = text
        exif[_SOFTWARE] = "moondream-playground"
        return {"format": "JPEG", "quality": 95, "subsampling": 0, "exif": exif}
    if suffix == ".png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("Description", text)
        chunks.add_text("Software", "moondream-playground")
        return {"format": "PNG", "pnginfo": chunks}
    raise PhotoError(f"Pictures are saved as .jpg or .png, not as {suffix or 'a file without a suffix'}.")


def read_recipe(path: str | os.PathLike[str]) -> Recipe | None:
    """Return the recipe that `save_picture` stored in a file, or None. Raises PhotoError if the file is not a photo."""
    picture = _open(_read(path))
    text = picture.getexif().get(_IMAGE_DESCRIPTION) or picture.info.get("Description") or ""
    parsed = parse(text)
    return parsed.recipe if str(parsed.recipe) == text else None


def encode_jpeg(photo: np.ndarray, quality: int = 92) -> bytes:
    """Encode a photo as a JPEG file.

    Args:
        photo: RGB image, uint8 [height, width, 3].
        quality: JPEG quality, 0..100.

    Raises:
        PhotoError: If the photo cannot be encoded.
    """
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not encoded:
        raise PhotoError("The photo could not be encoded as a JPEG. Choose another one.")
    return data.tobytes()


def jpeg_data_url(photo: np.ndarray, quality: int = 92) -> str:
    """Encode a photo as a JPEG data URL; arguments and exceptions are as for `encode_jpeg`."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(photo, quality)).decode("ascii")


def data_url_content(text: str) -> bytes | None:
    """Return the file in a data URL of a JPEG, PNG or WebP photo, or None if the text is something else.

    Raises:
        PhotoError: If the content is not valid base64.
    """
    prefix = _DATA_URL.match(text)
    if prefix is None:
        return None
    try:
        return base64.b64decode(text[prefix.end() :], validate=True)
    except ValueError:
        raise PhotoError("The data URL is not valid base64.") from None
