"""datatrove's inference runner over the same endpoint, for ``synthesis.py``: one request an item.

Run by an interpreter that has datatrove; prints items per CPU second, its imports left out.

    python benchmarks/synthesis_peer.py URL NUMBER CONCURRENCY FOLDER
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers import JsonlWriter


async def one_request(document: Document, generate: Any) -> str:
    message = {"role": "user", "content": document.text}
    found = await generate({"messages": [message], "max_tokens": 16, "temperature": 0})
    return found.text


def main() -> None:
    url, number, concurrency, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

    def documents(data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for each in range(number):
            yield Document(text=f"the text of item {each}", id=str(each))

    config = InferenceConfig(
        server_type="endpoint",
        model_name_or_path="m",
        endpoint_url=url,
        max_concurrent_generations=concurrency,
        metric_interval=600,
    )
    writer = JsonlWriter(
        f"{folder}/out", output_filename="${rank}_chunk_${chunk_index}.jsonl", compression=None
    )
    runner = InferenceRunner(
        rollout_fn=one_request,
        config=config,
        records_per_chunk=500,
        checkpoints_local_dir=f"{folder}/checkpoints",
        output_writer=writer,
    )
    cpu = time.process_time()
    LocalPipelineExecutor(pipeline=[documents, runner], logging_dir=f"{folder}/logs", tasks=1).run()
    print(number / (time.process_time() - cpu))


if __name__ == "__main__":
    main()
