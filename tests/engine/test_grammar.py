"""Grammars of answers, sampled with uniform logits: whatever is drawn must be what was asked for.

The oracles are ``chat/``'s strict parser and a validator of JSON schema written here by hand. Wrong
variant: the same draws without the mask.
"""

import json
import random

import pytest
import torch

from megatron_k2.chat.completion import FormatError, parse_completion
from megatron_k2.chat.control import CHAT_TOKENS, IM_END
from megatron_k2.chat.lexer import IdLexer
from megatron_k2.data.tokenizer import load_tokenizer
from megatron_k2.engine import constrained
from megatron_k2.engine.constrained import Grammars
from megatron_k2.engine.grammar import calls_grammar, is_recursive, values_grammar
from megatron_k2.errors import UserError
from megatron_k2.records.read import tools_from
from tests.engine.server.served import tokenizer_in

SPARE = 12
"""Rows of the model's head that the tokenizer does not use."""
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["C", "F", 0, None]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city"],
    "additionalProperties": False,
}
NESTED = {
    "properties": {
        "who": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 4}, "ok": {"type": "boolean"}},
            "required": ["name", "ok"],
            "additionalProperties": False,
        },
        "tags": {
            "type": "array",
            "items": {"enum": ["a", "b\"\n", "<|im_end|>"]},
            "minItems": 2,
            "maxItems": 3,
        },
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["who", "tags", "place"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9},
                        "minItems": 2, "maxItems": 2}},
}  # fmt: skip
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "tell": NESTED, "stop.it": NOTHING, "bare": None}
TOOLS = tools_from(
    [
        {"type": "function", "function": {"name": n, "parameters": s} if s else {"name": n}}
        for n, s in SCHEMAS.items()
    ]
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    return Grammars(lambda: tokenizer, tokenizer.vocab_size + SPARE)


def is_valid(value, schema, root=None):
    """The keywords of the schemas above, by hand."""
    root = root or schema
    if "$ref" in schema:
        return is_valid(value, root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "enum" in schema:
        return value in schema["enum"] and type(value) in map(type, schema["enum"])
    match schema.get("type", "object"):
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "array":
            is_length = schema["minItems"] <= len(value) <= schema["maxItems"]
            return is_length and all(is_valid(item, schema["items"], root) for item in value)
    known = schema["properties"]
    has_all = isinstance(value, dict) and set(schema.get("required", ())) <= value.keys()
    return has_all and all(k in known and is_valid(v, known[k], root) for k, v in value.items())


def drawn(constraint, end, seed, most=4000):
    """Uniform draws among what is allowed, its end left out."""
    order, found = random.Random(seed), []
    for _ in range(most):
        token = order.choice(constraint.allowed().nonzero()[:, 0].tolist())
        assert not constraint.fault
        constraint.accept(token)
        found.append(token)
        if token == end:
            return found
    raise AssertionError("no end came")


def calls_of(tokenizer, ids, first):
    completion = parse_completion(IdLexer(tokenizer), ids, degree="strict")
    for place, call in enumerate(completion.tool_calls):
        assert call.id == f"functions.{call.name}:{first + place}"
    return completion


@pytest.mark.parametrize("seed", range(20))
def test_forced_calls_parse_and_obey_their_schemas(grammars, tokenizer, seed):
    end = tokenizer.special_ids[IM_END]
    grammar = calls_grammar(TOOLS[:3], tokenizer.special_ids, first=seed)
    completion = calls_of(tokenizer, drawn(grammars.compiled(grammar), end, seed), seed)
    assert completion.tool_calls
    assert not completion.content
    for call in completion.tool_calls:
        assert is_valid(json.loads(call.arguments), SCHEMAS[call.name])


def test_one_call_where_only_one_is_allowed(grammars, tokenizer):
    end = tokenizer.special_ids[IM_END]
    grammar = calls_grammar(TOOLS[:1], tokenizer.special_ids, 0, is_parallel=False)
    constraint = grammars.compiled(grammar)
    for seed in range(10):
        ids = drawn(constraint.fresh(), end, seed)
        assert len(calls_of(tokenizer, ids, 0).tool_calls) == 1


def test_free_text_may_come_first_and_is_letters(grammars, tokenizer):
    controls = {tokenizer.special_ids[name] for name in CHAT_TOKENS}
    grammar = calls_grammar(TOOLS[:1], tokenizer.special_ids, 0, may_talk=True)
    constraint = grammars.compiled(grammar)
    at_first = set(constraint.allowed().nonzero()[:, 0].tolist())
    begin, end = (
        tokenizer.special_ids["<|tool_calls_section_begin|>"],
        tokenizer.special_ids[IM_END],
    )
    assert at_first & controls == {begin, end}
    for token in [*tokenizer.encode("Well, <|im_end|> "), begin]:
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert constraint.allowed().sum() == 1


def test_no_control_token_inside_a_string(grammars, tokenizer):
    grammar = calls_grammar(TOOLS[3:], tokenizer.special_ids, 0)
    constraint = grammars.compiled(grammar)
    special = sorted(tokenizer.special_ids.values())
    text = "functions.bare:0"
    ids = [
        tokenizer.special_ids[f"<|{n}|>"] for n in ("tool_calls_section_begin", "tool_call_begin")
    ]
    ids += [*tokenizer.encode(text), tokenizer.special_ids["<|tool_call_argument_begin|>"]]
    ids += tokenizer.encode('{"a":"x')
    for token in ids:
        constraint.accept(token)
    assert not constraint.fault
    allowed = constraint.allowed()
    assert allowed.sum() > 100
    assert not allowed[special].any()
    assert not allowed[tokenizer.vocab_size :].any()


@pytest.mark.parametrize(
    "schema", [WEATHER, NESTED | {"type": "object"}, {"enum": [[1, "x"], {"a": None}]}]
)
def test_values_obey_their_schema(grammars, tokenizer, schema):
    end = tokenizer.special_ids[IM_END]
    constraint = grammars.compiled(values_grammar(schema))
    for seed in range(10):
        ids = drawn(constraint.fresh(), end, seed)
        assert is_valid(json.loads(tokenizer.decode(ids[:-1])), schema)


def test_without_the_mask_draws_are_no_calls(tokenizer):
    order, end = random.Random(0), tokenizer.special_ids[IM_END]
    ids = [order.randrange(tokenizer.vocab_size) for _ in range(40)] + [end]
    with pytest.raises(FormatError):
        calls_of(tokenizer, ids, 0)


def nested(levels):
    schema = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"k": schema}}
    return schema


HOSTILE = {
    "too deep": (nested(400), "nested too deeply"),
    "deep": (nested(150), "cannot be enforced"),
    "itself": ({"$ref": "#"}, "refers to itself"),
    "a tree": ({"properties": {"k": {"$ref": "#/$defs/t"}},
                "$defs": {"t": {"properties": {"k": {"$ref": "#/$defs/t"}}}}}, "refers to itself"),
    "elsewhere": ({"$ref": "https://example.com/schema"}, "cannot be enforced"),
    "no type": ({"type": "objekt"}, "cannot be enforced"),
    "a keyword not enforced": ({"not": {"type": "string"}}, "Unimplemented keys"),
    "never": ({"type": "integer", "minimum": 5, "maximum": 3}, "cannot be enforced"),
    "a broken pattern": ({"type": "string", "pattern": "(("}, "cannot be enforced"),
    "huge": ({"enum": [f"value {i}" for i in range(9000)]}, "letters as a grammar"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_by_a_sentence(grammars, name):
    schema, said = HOSTILE[name]
    with pytest.raises(UserError, match=said):
        grammars.compiled(values_grammar(schema))


def test_references_that_branch_are_followed_once():
    chain = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 4} for i in range(100)}
    assert not is_recursive({"$ref": "#/$defs/d0", "$defs": chain | {"d100": {"type": "null"}}})
    assert is_recursive({"$ref": "#/$defs/d0", "$defs": chain | {"d100": {"$ref": "#/$defs/d9"}}})


def test_arguments_are_an_object(tokenizer):
    tools = tools_from([{"function": {"name": "f", "parameters": {"type": "string"}}}])
    with pytest.raises(UserError, match="parameters of tool 'f'"):
        calls_grammar(tools, tokenizer.special_ids, 0)


def test_a_grammar_given_up_ends_the_answer(tokenizer):
    class Broken:
        def compute_logit_bias(self):
            return bytes(5)

        def is_error(self):
            return True

        def get_error(self):
            return "too complex\nand more"

    constraint = constrained.GrammarConstraint(Broken(), 5, 3)
    assert constraint.allowed().tolist() == [False, False, False, True, False]
    constraint.accept(3)
    assert constraint.fault == "too complex"


def test_without_llguidance_it_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setattr(constrained.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'megatron-k2\[grammar\]'"):
        Grammars(lambda: tokenizer, 400).compiled('start: "a"\n')


def test_bytes_of_tokens_are_what_they_encode(tokenizer, tmp_path):
    held = tokenizer.token_bytes()
    text = "The sum — of ½ and \x00\x7f\xad is 3 🙂 Paris"
    assert b"".join(held[i] for i in tokenizer.encode(text)) == text.encode()
    assert len(held) == tokenizer.vocab_size
    whole = json.loads(_saved(tokenizer, tmp_path))
    whole["model"]["vocab"]["▁x"] = max(whole["model"]["vocab"].values()) + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="not of a byte-level vocabulary"):
        load_tokenizer(tmp_path).token_bytes()


def _saved(tokenizer, folder):
    tokenizer.save(folder)
    return (folder / "tokenizer.json").read_text()


def test_a_mask_leaves_other_rows_alone():
    from megatron_k2.engine.local.sampling import Row, choose
    from megatron_k2.engine.protocol import SamplingParams

    logits = torch.tensor([[1.0, 9.0, 3.0], [1.0, 9.0, 3.0]])
    greedy, hot = SamplingParams(temperature=0), SamplingParams(temperature=2.0)
    allowed = torch.tensor([True, False, True])
    assert choose(logits, [Row(greedy, 0.0, (), allowed), Row(greedy, 0.0)]).tolist() == [2, 1]
    assert all(choose(logits[:1], [Row(hot, u / 9, (), allowed)])[0] != 1 for u in range(9))


def test_a_tools_name_is_letters_of_the_grammar(grammars, tokenizer):
    end = tokenizer.special_ids[IM_END]
    name = 'x" | <[3]> | "\n%json {} <|im_end|>'
    tools = tools_from([{"function": {"name": name, "parameters": NOTHING}}])
    grammar = calls_grammar(tools, tokenizer.special_ids, 0, is_parallel=False)
    ids = drawn(grammars.compiled(grammar), end, 0)
    completion = parse_completion(IdLexer(tokenizer), ids, degree="exact")
    assert [call.name for call in completion.tool_calls] == [name]
