"""What a download leaves: the folder that has the files, and files that are not what they claim.

The hub's cache has ``models--org--name/{blobs,refs,snapshots}``; ``refs/main`` names the snapshot.
A download that failed leaves pointers of Git LFS, error pages, links to blobs that are gone, or
control files of a transfer that is not over.
"""

import os
from pathlib import Path

from megatron_k2.errors import UserError

_CACHED = "models--"
_UNFINISHED = (".aria2", ".part", ".partial", ".crdownload", ".incomplete")
_OTHER_CONTENT = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file; run 'git lfs pull' there"),
    (b"<", "is a page of HTML or XML, not the file; download it again, signed in if need be"),
    (b"gguf", "is a GGUF file; take the release's safetensors files"),
    (b"pk\x03\x04", "is a file of torch.save; take the release's safetensors files"),
)
"""How a file begins, in lower case, and what it is then; a text may be any but the first."""
_OTHER_FORMATS = ("*.gguf", "pytorch_model*.bin", "consolidated*.pth")


def find_release(directory: Path) -> Path:
    """The folder that has the files: ``directory``, or the snapshot of a hub cache folder.

    Raises:
        UserError: for a cache folder without a snapshot to take, and for the cache itself.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a Hugging Face checkpoint")
    if (directory / "config.json").exists():
        return directory
    if (directory / "snapshots").is_dir():
        return _snapshot(directory)
    if cached := sorted(path.name for path in directory.glob(f"{_CACHED}*")):
        raise UserError(
            f"{directory} is a cache of the hub; name one of its folders: {', '.join(cached[:5])}"
        )
    return directory


def _snapshot(cached: Path) -> Path:
    present = sorted(path.name for path in (cached / "snapshots").iterdir())
    reference = cached / "refs" / "main"
    if reference.is_file():
        named = reference.read_text(encoding="utf-8", errors="replace").strip()
    elif len(present) == 1:
        named = present[0]
    else:
        listed = ", ".join(present[:5]) or "none"
        raise UserError(f"{cached} has no refs/main; name one of its snapshots: {listed}")
    if named not in present:
        listed = ", ".join(present[:5]) or "none"
        raise UserError(
            f"{reference} names snapshot '{named}', which is not there; there are: {listed}"
        )
    return cached / "snapshots" / named


def require_file(path: Path, *, is_text: bool = False) -> None:
    """Refuse what stands in a file's place when a download went wrong.

    Args:
        path: the file.
        is_text: of any kind, as a chat template or a licence, which may begin in ``<``.

    Raises:
        UserError: naming the file and what it is instead.
    """
    try:
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link to {path.readlink()}, which is gone; download it again"
            )
        if path.is_dir():
            raise UserError(f"{path} is a directory, expected a file")
        for suffix in _UNFINISHED:
            if (control := path.with_name(path.name + suffix)).exists():
                raise UserError(f"{path} is not complete: {control.name} lies beside it")
        with path.open("rb") as stream:
            start = stream.read(64).lstrip().lower()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from None
    for begin, what in _OTHER_CONTENT[: 1 if is_text else None]:
        if start.startswith(begin):
            raise UserError(f"{path} {what}")


def other_formats(directory: Path) -> list[str]:
    """Names of weight files of other formats, as a checkpoint without safetensors may have."""
    return sorted({path.name for kind in _OTHER_FORMATS for path in directory.glob(kind)})
