"""Unpack wheels into a folder, without pip: ``python unpack.py WHEELS FOLDER``.

A wheel is a zip of what belongs into ``site-packages``; files of its ``.data/purelib`` and
``.data/platlib`` belong there too, and its scripts are not needed.
"""

import sys
import zipfile
from pathlib import Path, PurePosixPath


def target(name: str) -> str | None:
    """Where a wheel's member goes below the folder, or ``None``."""
    parts = PurePosixPath(name).parts
    if not parts[0].endswith(".data"):
        return name
    if len(parts) > 2 and parts[1] in ("purelib", "platlib"):
        return str(PurePosixPath(*parts[2:]))
    return None


def main(wheels: Path, folder: Path) -> None:
    """Unpack all."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                path = target(member.filename)
                if path is not None and not member.is_dir():
                    member.filename = path
                    archive.extract(member, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
