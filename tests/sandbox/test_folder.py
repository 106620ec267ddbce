"""What programs may leave in a folder, and that nothing of it leads outside or holds us."""

import os

import pytest

from megatron_k2.errors import UserError
from megatron_k2.sandbox.folder import BYTES_AN_ENTRY, Folder


@pytest.fixture
def folder():
    made = Folder()
    yield made
    made.remove()
    assert not made.path.exists()


def test_a_file_comes_back_from_folders_made_on_its_way(folder):
    folder.write("a/b/c.txt", b"content")
    assert folder.read("a/b/c.txt", 100) == b"content"
    assert folder.read("a/b/c.txt", 3) == b"con"


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", ".", "a\0b"])
def test_a_name_that_leaves_is_refused(folder, name):
    for access in (lambda: folder.read(name, 9), lambda: folder.write(name, b"x")):
        with pytest.raises(UserError, match="expected a path inside the box"):
            access()


def test_links_are_followed_neither_to_read_nor_to_write(folder, tmp_path):
    outside = tmp_path / "secret"
    outside.write_bytes(b"sesame")
    (folder.path / "link").symlink_to(outside)
    (folder.path / "way").symlink_to(tmp_path)
    for name in ("link", "way/secret", "way/new"):
        with pytest.raises(UserError, match="links are not followed"):
            folder.write(name, b"pwned")
        with pytest.raises(UserError, match="links are not followed"):
            folder.read(name, 9)
    assert outside.read_bytes() == b"sesame"
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]


def test_a_pipe_is_no_file_and_does_not_hold_us(folder):
    os.mkfifo(folder.path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        folder.read("pipe", 9)
    with pytest.raises(UserError):
        folder.write("pipe", b"x")


def test_bytes_are_counted_and_small_files_are_not_free(folder):
    folder.write("one", b"x" * 100_000)
    assert 100_000 <= folder.num_bytes(1 << 30) < 200_000
    for number in range(50):
        folder.write(f"empty{number}", b"")
    assert folder.num_bytes(1 << 30) >= 100_000 + 50 * BYTES_AN_ENTRY
    assert folder.num_bytes(1000) > 1000


def test_what_is_too_deep_to_count_is_over_any_limit_and_goes_away(folder):
    place = os.open(folder.path, os.O_RDONLY)
    for _ in range(2100):  # deeper than a path is long, and than Python recurses
        os.mkdir("d", dir_fd=place)
        inner = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    assert folder.num_bytes(1 << 40) > 1 << 40
