"""A virtual environment with chosen packages of this one and what they require, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(*roots: str) -> set[str]:
    """Return the names of installed distributions and of everything that they require, without extras.

    Raises:
        PackageNotFoundError: A requirement is not installed.
    """
    names: set[str] = set()
    pending = [canonicalize_name(root) for root in roots]
    while pending:
        name = pending.pop()
        if name in names:
            continue
        names.add(name)
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(canonicalize_name(requirement.name))
    return names


def create_environment(folder: Path, *roots: str) -> Path:
    """Create a virtual environment whose packages are links to those of this one; return its Python.

    Args:
        folder: The folder to create.
        *roots: Names of the distributions; what they require is added.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", variables))
    for name in required(*roots):
        installed = distribution(name)
        tops = {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(installed.locate_file(top))).resolve())
    return folder / "bin" / "python"
