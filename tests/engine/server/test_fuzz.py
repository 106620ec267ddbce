"""The described routes under schemathesis: whatever is sent, no answer is a server's error."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
schemathesis = pytest.importorskip("schemathesis", reason="needs the schemathesis package")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

from megatron_k2.engine.scripted import ScriptedEngine  # noqa: E402
from tests.engine.server.served import served, tokenizer_in  # noqa: E402

EXAMPLES = 60


def test_no_body_makes_a_500(tmp_path):
    with served(lambda: ScriptedEngine(400), tokenizer_in(tmp_path), has_admin=True) as (url, _):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        seen = 0
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path == "/pause":
                continue  # the others would wait

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def check(case):
                answer = case.call(timeout=30)
                assert answer.status_code < 500, (case.path, answer.status_code, answer.text[:300])

            check()
            seen += 1
        assert seen >= 10
