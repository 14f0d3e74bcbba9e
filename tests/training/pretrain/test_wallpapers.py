"""Photos of wallpaper packages: a simulated archive over HTTP with real packages."""

import hashlib
import lzma
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import pytest
from PIL import Image

from recipes import load_photo
from training.data.bundled import bundled_photos
from training.pretrain.wallpapers import INDEXES, LONG_SIDE, download, is_usable

pytestmark = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is missing")
SCENE = "Files: *\nLicense: CC0\n"


def build_package(root: Path, name: str, pictures: dict[str, np.ndarray]) -> dict[str, str]:
    """Build a package of pictures in the archive `root`. Returns its fields in the index."""
    tree = root / f"tree-{name}"
    backgrounds, doc = tree / "usr/share/backgrounds", tree / "usr/share/doc" / name
    for folder in (tree / "DEBIAN", backgrounds, doc):
        folder.mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: Test <test@example.org>\nDescription: x\n"
    (tree / "DEBIAN/control").write_text(control, encoding="utf-8")
    (doc / "copyright").write_text(SCENE, encoding="utf-8")
    for file, picture in pictures.items():
        Image.fromarray(picture).save(backgrounds / file, quality=95)
    (backgrounds / "broken.jpg").write_bytes(b"no photo")
    path = f"pool/{name}_1_all.deb"
    (root / "pool").mkdir(exist_ok=True)
    subprocess.run(["dpkg-deb", "-Znone", "-b", tree, root / path], check=True, capture_output=True)
    return {"Package": name, "Filename": path, "SHA256": hashlib.sha256((root / path).read_bytes()).hexdigest()}


def write_indexes(root: Path, packages: list[dict[str, str]]) -> None:
    """Write the package indexes of the archive, all packages in the first."""
    for index in INDEXES:
        (root / index).parent.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join("\n".join(f"{key}: {value}" for key, value in fields.items()) for fields in packages)
        (root / index).write_bytes(lzma.compress(text.encode()))
        packages = []


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    root = tmp_path / "archive"
    root.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=root)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def scene(seed: int) -> np.ndarray:
    """Create a textured picture that looks like no other seed's."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    picture = cv2.resize(noise, (800, 600), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(picture + np.random.default_rng(0).normal(0, 12, picture.shape), 0, 255).astype(np.uint8)


def test_photos_are_saved_small_once_and_with_their_licence(archive: tuple[Path, str], tmp_path: Path) -> None:
    root, url = archive
    drawn = np.zeros((600, 800, 3), np.uint8) + np.array([40, 120, 200], np.uint8)
    bundled = load_photo(bundled_photos("train")[0].path)
    community = build_package(
        root,
        "ubuntu-wallpapers-noble",
        {"scene.jpg": scene(1), "drawn.png": drawn, "dark.jpg": scene(2) // 16, "bundled.jpg": bundled},
    )
    second = build_package(root, "ubuntukylin-wallpapers", {"again.jpg": scene(1)[::2, ::2], "other.jpg": scene(3)})
    unrelated = build_package(root, "gnome-backgrounds", {"unrelated.jpg": scene(4)})
    write_indexes(root, [unrelated, second, community])
    folder = tmp_path / "photos"
    assert download(folder, url) == 2
    saved = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert saved == [
        "ubuntu-wallpapers-noble/copyright",
        "ubuntu-wallpapers-noble/scene.jpg",
        "ubuntukylin-wallpapers/copyright",
        "ubuntukylin-wallpapers/other.jpg",
    ]
    assert max(load_photo(folder / saved[1]).shape) == LONG_SIDE
    assert (folder / saved[0]).read_text(encoding="utf-8") == SCENE


def test_another_package_than_that_of_the_index_is_refused(archive: tuple[Path, str], tmp_path: Path) -> None:
    root, url = archive
    fields = build_package(root, "ubuntu-wallpapers", {"scene.jpg": scene(1)})
    write_indexes(root, [{**fields, "SHA256": "0" * 64}])
    with pytest.raises(ValueError, match="ubuntu-wallpapers has another SHA-256"):
        download(tmp_path / "photos", url)
    assert not (tmp_path / "photos").exists()


def test_bundled_photos_are_usable_but_drawings_are_not() -> None:
    usable = [is_usable(load_photo(info.path)) for info in bundled_photos("train")[::8]]
    assert sum(usable) >= len(usable) - 2
    assert not is_usable(np.full((300, 400, 3), 180, np.uint8))
