"""Faults put into a function of a real package: its body taken out, or one place of it changed."""

import ast
import random
from collections.abc import Callable, Iterator

from megatron_k2.gym.swe.edits import function_text, with_function

type Fault = Callable[[str, str, random.Random], str]
"""Source, function, what draws: the source with a fault."""

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.BitAnd: ast.BitOr,
    ast.RShift: ast.LShift,
}


def removed(source: str, name: str, order: random.Random) -> str:
    """The function without its body: the state before it was written."""
    (node,) = ast.parse(function_text(source, name)).body
    assert isinstance(node, ast.FunctionDef)
    says = [node.body[0]] if ast.get_docstring(node) is not None else []
    node.body = [*says, *ast.parse("raise NotImplementedError").body]
    return with_function(source, name, ast.unparse(node))


def _places(node: ast.AST) -> Iterator[Callable[[], None]]:
    """Changes that may be made below a node; one of them is taken."""

    def swap(owner: ast.BinOp | ast.AugAssign, new: type[ast.AST]) -> Callable[[], None]:
        return lambda: setattr(owner, "op", new())

    def swap_first(owner: ast.Compare, new: type[ast.AST]) -> Callable[[], None]:
        return lambda: owner.ops.__setitem__(0, new())  # type: ignore[call-overload]

    def one_more(owner: ast.Constant) -> Callable[[], None]:
        return lambda: setattr(owner, "value", int(owner.value) + 1)  # type: ignore[arg-type]

    for each in ast.walk(node):
        if isinstance(each, ast.BinOp | ast.AugAssign) and type(each.op) in SWAPPED:
            yield swap(each, SWAPPED[type(each.op)])
        elif isinstance(each, ast.Compare) and type(each.ops[0]) in SWAPPED:
            yield swap_first(each, SWAPPED[type(each.ops[0])])
        elif isinstance(each, ast.Constant) and type(each.value) is int:
            yield one_more(each)


def changed(source: str, name: str, order: random.Random) -> str:
    """The function with one operator, comparison or number changed, where it has any."""
    (node,) = ast.parse(function_text(source, name)).body
    if places := list(_places(node)):
        order.choice(places)()
    return with_function(source, name, ast.unparse(node))
