import pytest

from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.data.tokenizer import load_tokenizer
from tests.support.dialogues import WORDS
from tests.support.paths import SHARED

K2 = SHARED / "data" / "kimi-k2"


@pytest.fixture(scope="session")
def toy_directory(tmp_path_factory):
    """A byte-level BPE of 400 with K2's control tokens."""
    directory = tmp_path_factory.mktemp("toy")
    train_byte_bpe(
        [" ".join(WORDS) * 3, "system user assistant tool_declare functions"], 400, directory
    )
    return directory


@pytest.fixture(scope="session")
def toy(toy_directory):
    return load_tokenizer(toy_directory)


@pytest.fixture(scope="session")
def k2():
    """Kimi K2's own tokenizer."""
    if not (K2 / "tiktoken.model").is_file():
        pytest.skip(f"Kimi K2's tokenizer files are not at {K2}")
    return load_tokenizer(K2)


@pytest.fixture(scope="session", params=["toy", "k2"])
def tokenizer(request):
    """Either."""
    return request.getfixturevalue(request.param)
