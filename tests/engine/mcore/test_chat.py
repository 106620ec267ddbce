"""A dialogue with a scripted model: what is asked, shown, kept, and handed back to the person."""

from types import SimpleNamespace

import pytest

from megatron_k2.chat.control import IM_END
from megatron_k2.chat.template import Renderer
from megatron_k2.cli.main import main
from megatron_k2.data.hf_tokenizer import train_byte_bpe
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.engine.mcore.chat import ChatJob, Talk, chat_job, shown
from megatron_k2.engine.mcore.options import chat_parser
from megatron_k2.errors import UserError
from megatron_k2.parallel.layout import Layout
from megatron_k2.records.messages import Message, ToolCall, ToolSpec

TOOL = ToolSpec('{"type": "function", "function": {"name": "add", "parameters": {}}}')
CALL = ToolCall("functions.add:0", "add", '{"a": 1, "b": 2}')


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_byte_bpe(["The sum of 1 and 2 is 3. def add(a, b): return a + b\n"] * 50, 400, directory)
    return directory


@pytest.fixture
def tokenizer(directory):
    return load_tokenizer(directory)


class Scripted:
    """A model that says what it is told, and notes what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = iter(answers), []

    def __call__(self, prompt, params):
        self.asked.append(list(prompt))
        for token in list(next(self.answers))[: params.max_tokens]:
            yield token
            if token in params.stop_token_ids:
                return


def answer_ids(tokenizer, message):
    """What a model that answers ``message`` samples, its end included."""
    rendered = Renderer(tokenizer).render([Message("user", "?"), message])
    first = next(i for i, is_target in enumerate(rendered.loss_mask) if is_target)
    return rendered.ids[first:]


def talk_of(tokenizer, model, messages=(), seen=None):
    saved = SimpleNamespace(max_position_embeddings=4096)
    job = ChatJob(None, saved, Layout(1), tokenizer, (TOOL,), tuple(messages))
    args = SimpleNamespace(max_new_tokens=200, temperature=0, top_p=1.0, seed=0)
    show = (lambda event: seen.append(shown(event))) if seen is not None else lambda _event: None
    return Talk(model, job, args, show)


def test_an_answer_is_streamed_parsed_and_kept_by_its_own_ids(tokenizer):
    asked = Message("user", "What is 1 + 2? <|im_end|>")
    answer = Message("assistant", "The sum is é 3.")
    model, seen = Scripted([answer_ids(tokenizer, answer)]), []
    talk = talk_of(tokenizer, model, [asked], seen)
    completion = talk.answer()
    assert completion.to_message() == answer
    assert completion.is_finished
    assert "".join(seen) == "The sum is é 3.\n"
    assert len(seen) > 4, "piece by piece"
    renderer = Renderer(tokenizer)
    prompt = renderer.render([asked], [TOOL], add_generation_prompt=True).ids
    assert model.asked == [prompt]
    assert list(talk.dialogue.ids) == renderer.render([asked, answer], [TOOL]).ids


def test_calls_are_shown_and_their_results_asked_for_until_the_model_is_done(tokenizer):
    turns = [
        Message("user", "Add 1 and 2."),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "3", tool_call_id=CALL.id),
        Message("assistant", "It is 3."),
    ]
    answers = [answer_ids(tokenizer, turns[1]), answer_ids(tokenizer, turns[3])]
    model, seen, prompts = Scripted(answers), [], []
    lines = iter(["Add 1 and 2.", "3", None])

    def ask(prompt):
        prompts.append(prompt)
        return next(lines)

    talk = talk_of(tokenizer, model, seen=seen)
    talk.converse(ask)
    assert prompts == ["> ", "result of functions.add:0> ", "> "]
    assert "".join(seen) == f"\n[{CALL.id}] {CALL.arguments}\n\nIt is 3.\n"
    assert list(talk.dialogue.ids) == Renderer(tokenizer).render(turns, [TOOL]).ids
    assert model.asked[1][: len(model.asked[0])] == model.asked[0], "later prompts extend earlier"


def test_an_answer_cut_off_says_so_and_the_dialogue_goes_on_whole(tokenizer):
    model = Scripted([tokenizer.encode("and so on " * 100)])
    talk = talk_of(tokenizer, model, [Message("user", "Go on.")])
    completion = talk.answer()
    assert not completion.is_finished
    assert [finding.kind for finding in completion.findings] == ["unfinished"]
    assert talk.dialogue.ids[-1] == tokenizer.special_ids[IM_END]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "-1"], "--temperature -1"),
        (["--nproc", "2"], "have no terminal"),
        (["--json"], "--json is one answer"),
        (["--prompt", "x"], "no such directory"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(words, said, capsys, tmp_path):
    load = str(tmp_path / "none")
    with pytest.raises(UserError, match=said):
        chat_job(chat_parser().parse_args(["--load", load, *words]), 1)


def test_the_commands_own_refusals_end_with_2(capsys):
    assert main(["chat", "--load", "/nowhere", "--json"]) == 2
    assert "--json is one answer" in capsys.readouterr().err
