"""``RephraseTask``: one rephrasing of one document, from its text to a record with its lineage."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron_k2.fidelity.check import Verdict
from megatron_k2.files import sha256_of_json
from megatron_k2.rewards.asker import EndpointAsker
from megatron_k2.synthesis.llm.model import Model
from megatron_k2.synthesis.rephrase.gate import Gate, Judged, lineage_part
from megatron_k2.synthesis.rephrase.language import language_of
from megatron_k2.synthesis.rephrase.mathematics import MathematicsChecker
from megatron_k2.synthesis.rephrase.pieces import Piece, counter_of, excerpts
from megatron_k2.synthesis.rephrase.prompts import Prompt, chosen
from megatron_k2.synthesis.rephrase.rewrite import PieceError, rewritten, whole
from megatron_k2.synthesis.rephrase.settings import Settings, settings_from
from megatron_k2.synthesis.store import Item, Store
from megatron_k2.synthesis.work.job import Outcome

if TYPE_CHECKING:
    from megatron_k2.engine.remote.client import Client

TASK = "megatron_k2.synthesis.rephrase.task:RephraseTask"
SCHEMA_VERSION = 1
_ATTEMPTS, _DEADLINE_SECONDS = 40, 3600.0
"""Of one request: an endpoint that is away or overloaded for minutes is waited for."""


class RephraseTask:
    """See ``work/job.py``'s ``Task``.

    Args:
        settings: of ``Settings.to_object``.
        options: ``endpoint``, ``api_key_env``, and the same with ``check_`` where the model that
            checks is elsewhere.
    """

    def __init__(self, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.settings: Settings = settings_from(settings)
        self._options = options
        self._count = counter_of(self.settings.tokenizer)
        self._prompts: list[Prompt] = []
        self._models: list[Model] = []
        self._gate = Gate(None, self.settings.check_settings())

    def sources(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each document as many times as it is rephrased."""
        for document in self.settings.documents():
            for number in range(self.settings.rephrasings):
                name = document.id.encode("utf-8", "backslashreplace").decode()
                yield name, {"text": document.text, "number": number}

    async def open(self, store: Store, concurrency: int) -> None:
        """Make the models' clients.

        Raises:
            UserError: a key's variable is not set, or an extra is not installed.
        """
        settings, options = self.settings, self._options
        self._prompts = settings.prompts()
        url, key = options["endpoint"], options.get("api_key_env")
        check_url = options.get("check_endpoint") or url
        is_one = settings.check_model is None or check_url == url
        teacher = _client(url, key, concurrency if is_one else max(concurrency // 2, 1))
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
        self._models = [Model(teacher, settings.model, store, sampling)]
        asker = None
        if settings.check_model is not None:
            key = options.get("check_api_key_env") or key
            client = teacher if is_one else _client(check_url, key, max(concurrency // 2, 1))
            judge = Model(client, settings.check_model, store)
            self._models.append(judge)
            asker = EndpointAsker(judge, settings.check_model)
        is_knowledge = settings.kind == "knowledge"
        self._gate = Gate(
            asker,
            settings.check_settings(),
            None if is_knowledge else MathematicsChecker(),
        )

    async def work(self, item: Item) -> Outcome:
        """Rewrite and judge.

        Raises:
            Exception: what models raise that do not answer, or while the work stops.
        """
        text, number = str(item.payload["text"]), int(item.payload["number"])
        content = hashlib.sha256(text.encode()).hexdigest()
        prompt = chosen(self._prompts, self.settings.seed, content, number)
        record = self._lineage(item, content, number, prompt)
        language = "en" if self.settings.kind == "knowledge" else language_of(text)
        record["language"] = language
        cut = excerpts(text, self._count, self.settings.cut)
        problem = (
            self._language_problem(language)
            or self._size_problem(cut)
            or await self._gate.source_problem(text, cut)
        )
        if problem is not None:
            return _rejected(record, *problem, "")
        is_translated = self.settings.kind == "translation"
        try:
            pairs = await rewritten(
                self._models[0], prompt, cut, int(record["seed"]), is_translated=is_translated
            )
        except PieceError as error:
            return _rejected(record, error.stage, error.reason, error.written)
        rewrite = whole(pairs)
        if is_translated and language_of(rewrite) not in ("en", None):
            return _rejected(record, "translation", "the rewrite is not in English", rewrite)
        judged = await self._gate.judge(text, rewrite, pairs, language)
        return self._judged(record, text, rewrite, judged)

    def _language_problem(self, language: str | None) -> tuple[str, str] | None:
        if self.settings.kind == "translation" and language in ("en", None):
            said = "English already" if language else "in a language that is not recognised"
            return "translation", f"the source is {said}"
        return None

    def _size_problem(self, cut: list[list[Piece]]) -> tuple[str, str] | None:
        pieces = [piece for part in cut for piece in part]
        if all(piece.is_copied for piece in pieces):
            return "size", "the source is code alone, which is not rewritten"
        longest = max(piece.num_tokens for piece in pieces)
        if longest > self.settings.excerpt_tokens:
            return "size", f"a sentence or block has {longest} tokens, more than an excerpt"
        return None

    def _judged(self, record: dict[str, Any], text: str, rewrite: str, judged: Judged) -> Outcome:
        record |= lineage_part(judged)
        record["text"] = rewrite
        record["num_tokens"] = self._count(rewrite)
        record["source_tokens"] = self._count(text)
        return Outcome(judged.verdict is not Verdict.UNFAITHFUL, record)

    def _lineage(self, item: Item, content: str, number: int, prompt: Prompt) -> dict[str, Any]:
        """What a record says of where it is from."""
        settings = self.settings
        return {
            "schema_version": SCHEMA_VERSION,
            "id": item.hash.hex(),
            "source_id": item.source,
            "source_sha256": content,
            "number": number,
            "kind": settings.kind,
            "prompt": prompt.name,
            "prompt_sha256": prompt.sha256,
            "model": settings.model,
            "check_model": settings.check_model,
            "seed": int(sha256_of_json([settings.seed, content, number])[:7], 16),
            "sampling": {"temperature": settings.temperature, "top_p": settings.top_p},
            "source_licence": settings.source_licence,
            "teacher_licence": settings.teacher_licence,
        }

    def stop(self) -> None:
        """Ask nothing new."""
        for model in self._models:
            model.is_stopping = True

    async def close(self) -> None:
        """Close clients and end the checker's processes."""
        await self._gate.close()
        for model in self._models:
            await model.close()


def _client(url: str, key_env: str | None, concurrency: int) -> "Client":
    from megatron_k2.engine.remote.client import Client
    from megatron_k2.engine.remote.endpoints import Endpoint, Policy

    policy = Policy(concurrency, attempts=_ATTEMPTS, deadline_seconds=_DEADLINE_SECONDS)
    return Client([Endpoint(url, key_env=key_env)], policy)


def _rejected(record: dict[str, Any], stage: str, reason: str, written: str) -> Outcome:
    record |= {"verdict": str(Verdict.UNFAITHFUL), "stage": stage, "reason": reason}
    return Outcome(False, {**record, "text": written})
