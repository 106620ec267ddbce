"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``).

It makes ``--weight-transfer-config '{"backend": "megatron_k2"}'`` known, and imports nothing else.
"""

BACKEND = "megatron_k2"
DIRECTORY = "MEGATRON_K2_WEIGHTS_DIR"
"""Variable of the server's environment: the one directory that new weights are read from."""


def register() -> None:
    """Once a process: vLLM calls it again in some of them."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_k2.engine.transfer.vllm_receiver", "FileReceiver"
        )
