"""Values as JSON and back, of plain types alone; the text of this file also runs in sandboxes.

A value of any other type, a subclass included, is not encoded: an object that equals everything
would pass any comparison made in its own process.
"""
# mypy: disable-error-code="no-untyped-def"
# Any's import would be a good part of an interpreter's start, in every box.

NAMES = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value, depth=0):  # noqa: ANN001, ANN201, D103
    kind = type(value)
    if depth > 100:
        raise TypeError("nested too deeply")
    if kind in (int, str, bool, type(None)):
        return value
    if kind is float:
        return {"float": repr(value)}
    if kind is complex:
        return {"complex": repr(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is list:
        return [encode(item, depth + 1) for item in value]
    if kind is dict:
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    for name, known in NAMES.items():
        if kind is known:
            items = value if known is tuple else sorted(value, key=repr)
            return {name: [encode(item, depth + 1) for item in items]}
    raise TypeError("a value of type " + kind.__name__ + ", which is not a plain one")


def decode(value):  # noqa: ANN001, ANN201, D103
    if type(value) is list:
        return [decode(item) for item in value]
    if type(value) is not dict:
        return value
    ((name, content),) = value.items()
    if name == "float":
        return float(content)
    if name == "complex":
        return complex(content)
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "dict":
        return {decode(k): decode(v) for k, v in content}
    return NAMES[name](decode(item) for item in content)
