"""The file of engines of a fleet whose engine is vLLM on the CPU."""

from tests.vllm.test_vllm import RIGHT, SETTINGS, START_SECONDS


def one_engine(python, model, length):
    """A dense model of ``k2-tiny`` with other fields, in fp32."""
    return {
        "backend": "vllm",
        "replicas": 1,
        "model": {"preset": "k2-tiny", **model},
        "options": {
            "python": python,
            "dtype": "float32",
            "max_model_len": length,
            "flags": ["--enforce-eager", *RIGHT],
            "environment": SETTINGS,
        },
        "patience": {"start": START_SECONDS, "silent": 20},
    }
