"""Which commit of this package a run is of, for the records beside it."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
"""Where this package lies in its repository."""


def git_commit(checkout: Path = CHECKOUT) -> str | None:
    """Commit that ``checkout``, by default this package's, is at; read without starting git."""
    git = checkout / ".git"
    if git.is_file():  # a work tree beside the repository
        git = checkout / git.read_text().removeprefix("gitdir: ").strip()
    head = git / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text().strip()
    if not text.startswith("ref: "):
        return text
    name = text.removeprefix("ref: ")
    shared = git / "commondir"
    common = git / shared.read_text().strip() if shared.is_file() else git
    if (common / name).is_file():
        return (common / name).read_text().strip()
    packed = common / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)
