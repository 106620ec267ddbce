"""Releases as downloads leave them: cache folders, shards in folders below, files beside."""

import json
import shutil

import pytest

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.checkpoint.hf.reader import INDEX, HfSource, is_hf_directory
from megatron_k2.checkpoint.hf.release_files import release_files
from megatron_k2.checkpoint.stream.jobs import FINISHED
from megatron_k2.checkpoint.verify.compare import compare, open_weights
from megatron_k2.errors import UserError
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import random_weights, write_directory


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "hf"
    return write_directory(path, TINY, random_weights(TINY))


def cached(release, hub, *, commit="0123abcd", has_reference=True):
    """As the hub's cache keeps it: blobs, a snapshot of links, refs/main."""
    repository = hub / "models--org--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / commit
    blobs.mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for path in release.iterdir():
        shutil.copy(path, blobs / f"{commit}-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/{commit}-{path.name}")
    if has_reference:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(f"{commit}\n")
    return repository


def assert_same_weights(path, release):
    assert is_hf_directory(path)
    found = compare(open_weights(path), open_weights(release))
    assert found.is_equal
    assert found.num_equal == len(random_weights(TINY))


@pytest.mark.parametrize("has_reference", [True, False])
def test_a_cache_folder_is_its_snapshot(release, tmp_path, has_reference):
    repository = cached(release, tmp_path, has_reference=has_reference)
    assert_same_weights(repository, release)
    import_hf(repository, tmp_path / "out", ImportOptions())
    kept = tmp_path / "out" / "hf_source"
    assert {path.name for path in kept.iterdir()} >= {"config.json", "LICENSE"}
    assert not any(path.is_symlink() for path in kept.rglob("*"))


def test_the_reference_decides_between_snapshots(release, tmp_path):
    other = shutil.copytree(release, tmp_path / "other")
    (other / "model-1-of-3.safetensors").unlink()
    cached(other, tmp_path / "hub", commit="old")
    repository = cached(release, tmp_path / "hub")
    assert_same_weights(repository, release)
    (repository / "refs" / "main").write_text("gone")
    with pytest.raises(UserError, match=r"names snapshot 'gone', .* there are: 0123abcd, old"):
        HfSource(repository)
    (repository / "refs" / "main").unlink()
    with pytest.raises(UserError, match="no refs/main; name one of its snapshots: 0123abcd, old"):
        HfSource(repository)


def test_the_cache_itself_is_refused_with_what_is_in_it(release, tmp_path):
    cached(release, tmp_path / "hub")
    with pytest.raises(UserError, match=r"is a cache of the hub; .*: models--org--tiny"):
        HfSource(tmp_path / "hub")


def test_a_blob_that_is_gone_is_named(release, tmp_path):
    repository = cached(release, tmp_path)
    (repository / "blobs" / "0123abcd-model-2-of-3.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2-of-3.safetensors is a link to .* gone"):
        import_hf(repository, tmp_path / "out", ImportOptions())


def nested(release, target, folder="weights"):
    shutil.copytree(release, target)
    (target / folder).mkdir()
    index = json.loads((target / INDEX).read_text())
    for file in sorted(set(index["weight_map"].values())):
        (target / file).rename(target / folder / file)
    placed = {name: f"{folder}/{file}" for name, file in index["weight_map"].items()}
    (target / INDEX).write_text(json.dumps({"weight_map": placed}))
    return target


def test_shards_may_lie_in_folders_below_as_the_index_says(release, tmp_path):
    below = nested(release, tmp_path / "below")
    assert_same_weights(below, release)
    import_hf(below, tmp_path / "out", ImportOptions())
    assert compare(open_weights(tmp_path / "out"), open_weights(release)).is_equal


@pytest.mark.parametrize("file", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x"])
def test_shards_may_not_lie_outside(release, tmp_path, file):
    copy = shutil.copytree(release, tmp_path / "copy")
    (copy / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(UserError, match=f"'{file}', outside"):
        HfSource(copy)


ALONG = (
    "LICENSE LICENSE-CODE LICENSE-MODEL.md License.txt NOTICE NOTICE.txt THIRD_PARTY_NOTICES.md "
    "additional_chat_templates/tool_use.jinja chat_template.jinja chat_template_mm.jinja "
    "chat_template.json generation_config.json modeling_deepseek.py preprocessor_config.json "
    "processor_config.json special_tokens_map.json tokenization_kimi.py tokenizer_config.json "
    "tool_declaration_ts.py"
).split()
NOT_ALONG = ("README.md", "guides/deploy.txt", "notes.txt", "training_args.bin", ".gitattributes")


def test_files_beside_the_weights_travel_both_ways(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "copy")
    for name in (*ALONG, *NOT_ALONG):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(f"<|{name}|>")
    import_hf(copy, tmp_path / "out", ImportOptions())
    export(tmp_path / "out", tmp_path / "back", ExportOptions())
    found = {
        path.relative_to(tmp_path / "back").as_posix()
        for path in (tmp_path / "back").rglob("*")
        if path.is_file() and ".safetensors" not in path.name
    }
    # the card and the record are the export's own
    assert found == {*ALONG, "README.md", "config.json", FINISHED}
    for name in ALONG:
        assert (tmp_path / "back" / name).read_text() == f"<|{name}|>"


def test_a_tokenizers_files_come_from_where_they_are_named(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "copy")
    tokenizer = tmp_path / "tokenizer"
    for folder, text in ((copy, "source"), (tokenizer, "given")):
        (folder / "additional_chat_templates").mkdir(parents=True)
        for name in ("additional_chat_templates/a.jinja", "chat_template.jinja", "NOTICE"):
            (folder / name).write_text(text)
    import_hf(copy, tmp_path / "out", ImportOptions())
    export(tmp_path / "out", tmp_path / "back", ExportOptions(tokenizer=tokenizer))
    assert (tmp_path / "back" / "additional_chat_templates/a.jinja").read_text() == "given"
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "given"
    assert (tmp_path / "back" / "NOTICE").read_text() == "source"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is a link to gone"), ("version https://git-lfs.github.com/spec/v1\n", "of Git LFS")],
)
def test_a_file_beside_that_is_not_there_is_named(release, tmp_path, content, message):
    copy = shutil.copytree(release, tmp_path / "copy")
    if content is None:
        (copy / "tokenizer.json").symlink_to("gone")
    else:
        (copy / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        release_files(copy)
    with pytest.raises(UserError, match=message):
        import_hf(copy, tmp_path / "out", ImportOptions())
