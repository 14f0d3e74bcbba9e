"""`python -m training.pretrain.wallpapers FOLDER`: get the photos in the wallpaper packages of Ubuntu 24.04.

The community's wallpapers are good photos under open licences: CC BY-SA, CC BY, CC0 and GPL, named in the `copyright`
file of each package, which is saved beside its photos. Packages of a release do not change, and are checked by their
SHA-256. Drawn wallpapers, dark ones and second copies are left out. Requires `dpkg-deb`.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from recipes import PhotoError, load_photo, shrink
from training.data.bundled import bundled_photos
from training.data.sources import photo_files
from training.pretrain.image_facts import to_lab
from training.pretrain.photos import difference_hash, is_copy

ARCHIVE = "https://archive.ubuntu.com/ubuntu"
INDEXES = tuple(f"dists/noble/{component}/binary-amd64/Packages.xz" for component in ("main", "universe"))
PACKAGES = re.compile(
    r"(budgie|lomiri|ubuntu(-gnome|-mate|cinnamon|kylin|studio)?|xubuntu-community)-wallpapers(-[\w.]+)?"
)
LONG_SIDE = 640  # px
QUALITY = 92  # of JPEG
MEASURED_SIDE = 400  # px: long side at which photos are measured
FLAT = 0.25  # L* units: absolute Laplacian of a flat pixel
MAX_FLAT_SHARE = 0.35  # a picture with more flat pixels is drawn
MIN_LIGHTNESS = 15.0  # mean L*


def packages(client: httpx.Client) -> Iterator[tuple[str, str, str]]:
    """Read the release's indexes. Yields name, path in the archive and SHA-256 of each wallpaper package."""
    for index in INDEXES:
        text = lzma.decompress(client.get(index).raise_for_status().content).decode()
        for paragraph in text.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if re.match(r"[A-Z][\w-]*: ", line))
            if PACKAGES.fullmatch(fields.get("Package", "")):
                yield fields["Package"], fields["Filename"], fields["SHA256"]


def is_usable(photo: np.ndarray) -> bool:
    """Return whether a wallpaper (uint8 RGB) is a photo of things that can be seen, rather than drawn or dark."""
    light = to_lab(shrink(photo, MEASURED_SIDE))[..., 0]
    flat_share = (np.abs(cv2.Laplacian(light, cv2.CV_32F)) < FLAT).mean()
    return bool(flat_share <= MAX_FLAT_SHARE and light.mean() >= MIN_LIGHTNESS)


def save_photos(package: Path, folder: Path, hashes: list[np.ndarray]) -> int:
    """Unpack a package and save its usable photos, at most LONG_SIDE px, with the copyright file.

    Args:
        package: The .deb file.
        folder: The folder to create.
        hashes: Difference hashes of the photos that exist already, one or more; those of the saved ones are appended.

    Returns:
        The number of saved photos.
    """
    saved = 0
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
        for file in photo_files(Path(unpacked)):
            if file.is_symlink():
                continue
            try:
                photo = load_photo(file)
            except PhotoError:
                continue
            digest = difference_hash(photo)
            if is_copy(digest, np.array(hashes)) or not is_usable(photo):
                continue
            hashes.append(digest)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shrink(photo, LONG_SIDE)).save(folder / f"{file.stem}.jpg", quality=QUALITY)
            saved += 1
        for notice in Path(unpacked).glob("usr/share/doc/*/copyright") if saved else ():
            shutil.copy(notice, folder / "copyright")
    return saved


def download(folder: Path, archive: str = ARCHIVE) -> int:
    """Save the photos of all packages, one folder each. Returns their number.

    Raises:
        httpx.HTTPError: The archive cannot be reached.
        ValueError: A package is not the one of the index.
    """
    hashes = [difference_hash(load_photo(info.path)) for info in bundled_photos("train")]
    saved = 0
    with (
        httpx.Client(base_url=archive, timeout=120, follow_redirects=True) as client,
        tempfile.TemporaryDirectory() as temporary,
    ):
        for name, path, sha256 in tqdm(sorted(packages(client)), unit="package"):
            data = client.get(path).raise_for_status().content
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ValueError(f"{name} has another SHA-256 than the index says.")
            package = Path(temporary) / "package.deb"
            package.write_bytes(data)
            saved += save_photos(package, folder / name, hashes)
    return saved


def main() -> None:
    """Download the packages and save their photos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if not shutil.which("dpkg-deb"):
        sys.exit("dpkg-deb is missing. Install dpkg.")
    try:
        print(f"{download(args.folder)} photos in {args.folder}")
    except (httpx.HTTPError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
