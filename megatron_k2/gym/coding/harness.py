"""Programs that call a candidate, and programs that test one they do not share a process with.

Three roles, each in a box of its own. *Candidate*: defines the function and calls it on arguments;
prints a nonce and the plain values. It holds no expected value, so that nothing it does, to its
process, to equality, to the tests' modules, can make a wrong value right. *Probe*: the tests, on a
stand-in that notes its arguments, whatever they assert. *Referee*: the tests, on a table of the
candidate's values; prints the nonce after the last of them. Both draw the same random numbers.
"""

import json
from pathlib import Path
from typing import Any

from megatron_k2.gym.coding import plain

_PLAIN = Path(plain.__file__).read_text("utf-8")

_CALL = """
import json as _json, os as _os, sys as _sys
_work = _json.loads(_sys.stdin.buffer.readline())
_write, _dumps, _encode, _decode = _os.write, _json.dumps, encode, decode
_out = _os.dup(1)
_os.dup2(_os.open("/dev/null", _os.O_WRONLY), 1)
_space = {"__name__": "candidate"}
def _say(content):
    content = (_work["nonce"] + content + "\\n").encode()
    while content:
        content = content[_write(_out, content):]
_say(_dumps({"ready": True}))
try:
    exec(compile(_work["code"], "candidate.py", "exec"), _space)
    _function = _space[_work["entry"]]
except BaseException as _error:
    _say(_dumps({"failed": type(_error).__name__ + ": " + str(_error)[:300]}))
    _os._exit(0)
for _arguments in _work["calls"]:
    try:
        _value = _function(*_decode(_arguments))
        _said = {"value": _encode(_value)}
    except BaseException as _error:
        _said = {"raised": type(_error).__name__ + ": " + str(_error)[:300]}
    _say(_dumps(_said))
"""

_PROBE = """
import ast as _ast, json as _json, random as _random, sys as _sys
_work = _json.loads(_sys.stdin.buffer.readline())
_random.seed(0)
_calls = []
class _Anything:
    def _same(self, *_, **__): return self
    def __eq__(self, other): return True
    def __hash__(self): return 0
    def __bool__(self): return True
    def __len__(self): return 1
    def __iter__(self): return iter(())
    def __contains__(self, item): return True
    def __float__(self): return 0.0
    def __int__(self): return 0
    def __index__(self): return 0
    def __lt__(self, other): return True
    __ne__ = __le__ = __gt__ = __ge__ = __lt__
    __call__ = __getattr__ = __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = _same
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __abs__ = __neg__ = __round__ = _same
class _Unasserted(_ast.NodeTransformer):
    def visit_Assert(self, node):
        return _ast.copy_location(_ast.Expr(node.test), node)
def _note(*arguments):
    try:
        _calls.append(encode(list(arguments)))
    except TypeError:
        pass
    return _Anything()
_space = {"__name__": "tests"}
try:
    exec(compile(_work["setup"], "setup.py", "exec"), _space)
    _space[_work["entry"]] = _space["candidate"] = _note
    _tree = _Unasserted().visit(_ast.parse(_work["tests"]))
    exec(compile(_ast.fix_missing_locations(_tree), "tests.py", "exec"), _space)
    if "check" in _space:
        _space["check"](_note)
except BaseException:
    pass
print(_json.dumps(_calls))
"""

_REFEREE = """
import json as _json, random as _random, sys as _sys
_work = _json.loads(_sys.stdin.buffer.readline())
_random.seed(0)
_known = {_json.dumps(key): said for key, said in _work["table"]}
_missing = []
class _Missing(BaseException):
    pass
def _look(*arguments):
    key = encode(list(arguments))
    said = _known.get(_json.dumps(key))
    if said is None:
        _missing.append(key)
        raise _Missing()
    if "raised" in said:
        raise RuntimeError("the candidate raised " + said["raised"])
    return decode(said["value"])
_space = {"__name__": "tests"}
_error = None
try:
    exec(compile(_work["setup"], "setup.py", "exec"), _space)
    _space[_work["entry"]] = _space["candidate"] = _look
    exec(compile(_work["tests"], "tests.py", "exec"), _space)
    if "check" in _space:
        _space["check"](_look)
except _Missing:
    pass
except BaseException as _found:
    import traceback
    _line = traceback.extract_tb(_found.__traceback__)[-1].lineno
    _error = "line %s of the tests: %s: %s" % (_line, type(_found).__name__, str(_found)[:300])
print(_work["nonce"] + _json.dumps({"error": _error, "missing": _missing}))
"""

CANDIDATE = _PLAIN + _CALL
PROBE = _PLAIN + _PROBE
REFEREE = _PLAIN + _REFEREE


def as_line(**work: Any) -> bytes:
    """A harness's work: one line of JSON, before whatever else its input holds."""
    return json.dumps(work).encode() + b"\n"


def said_after(nonce: str, output: bytes) -> list[Any]:
    """What a harness said: the lines that begin with its nonce, parsed; others are passed over."""
    found = []
    for line in output.decode("utf-8", "replace").split("\n"):
        if line.startswith(nonce):
            try:
                found.append(json.loads(line[len(nonce) :]))
            except ValueError:
                found.append({"failed": "it wrote into its harness's lines"})
    return found
