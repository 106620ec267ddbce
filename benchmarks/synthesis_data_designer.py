"""NeMo Data Designer on the same endpoint, for ``synthesis.py``: one text column, a request a row.

Run by an interpreter that has data-designer; prints items per CPU second, its imports left out and
its statistics of the column among it.

    python benchmarks/synthesis_data_designer.py URL NUMBER CONCURRENCY FOLDER
"""

import sys
import time
from pathlib import Path

import data_designer.config as config
import pandas
from data_designer.interface import DataDesigner


def main() -> None:
    url, number, concurrency, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    provider = config.ModelProvider(
        name="endpoint", endpoint=f"{url}/v1", provider_type="openai", api_key="none"
    )
    model = config.ModelConfig(
        alias="teacher",
        model="m",
        provider="endpoint",
        skip_health_check=True,
        inference_parameters=config.ChatCompletionInferenceParams(
            max_parallel_requests=concurrency, max_tokens=16, temperature=0
        ),
    )
    texts = pandas.DataFrame({"source": [f"the text of item {each}" for each in range(number)]})
    builder = config.DataDesignerConfigBuilder(model_configs=[model])
    builder.with_seed_dataset(config.DataFrameSeedSource(df=texts))
    builder.add_column(
        config.LLMTextColumnConfig(name="said", prompt="{{ source }}", model_alias="teacher")
    )
    designer = DataDesigner(artifact_path=Path(folder), model_providers=[provider])
    designer.set_run_config(config.RunConfig(otel_metrics_port=None))
    cpu = time.process_time()
    made = designer.create(builder, num_records=number).load_dataset()
    used = time.process_time() - cpu
    assert len(made) == number, f"{len(made)} of {number} rows"
    print(number / used)


if __name__ == "__main__":
    main()
