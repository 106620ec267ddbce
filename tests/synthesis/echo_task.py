"""The least task: one request an item, its answer the record. Of the engine's tests alone."""

from megatron_k2.engine.remote.client import Client
from megatron_k2.engine.remote.endpoints import Endpoint, Policy
from megatron_k2.synthesis.llm.model import Model
from megatron_k2.synthesis.work.job import Outcome

NAME = "tests.synthesis.echo_task:EchoTask"


class EchoTask:
    def __init__(self, settings, options):
        self.settings, self.options = settings, options

    def sources(self):
        for number in range(self.settings["number"]):
            yield f"item {number}", {"text": f"the text of item {number}"}

    async def open(self, store, concurrency):
        policy = Policy(concurrency, attempts=40, **self.options.get("policy", {}))
        client = Client([Endpoint(self.options["endpoint"])], policy)
        self.model = Model(client, "m", store, {"temperature": 0})

    async def work(self, item):
        message = {"role": "user", "content": item.payload["text"]}
        said = await self.model.say([message], max_tokens=16, seed=0)
        record = {"id": item.hash.hex(), "source_id": item.source, "text": said.text}
        return Outcome(not said.text.endswith("0"), {**record, "stage": "", "reason": "its end"})

    def stop(self):
        self.model.is_stopping = True

    async def close(self):
        await self.model.close()
