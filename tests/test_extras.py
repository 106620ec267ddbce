"""Every extra of setup.py has commands in `.ci/extras.py`; they run in `make test-extras`."""

import ast
import sys

from tests.support.paths import REPOSITORY


def test_every_extra_is_checked(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / ".ci")
    monkeypatch.delitem(sys.modules, "extras", raising=False)
    from extras import EXTRAS

    assigned = {
        node.targets[0].id: node.value
        for node in ast.parse((REPOSITORY / "setup.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    offered = {key.value for key in assigned["EXTRAS"].keys}
    assert set(EXTRAS) == offered | {"base"}
    assert all(extra.smokes for extra in EXTRAS.values())
