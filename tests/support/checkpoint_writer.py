"""Megatron's checkpoint writer without a second interpreter a rank."""


def fork_result_queue() -> None:
    """Let the writer leave its results in a process forked from this one.

    By default Megatron spawns an interpreter for it, which imports torch and this process's main
    module: four seconds of CPU for every rank that saves. To be called before this process has
    threads; Megatron keeps the queue for all later saves.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )

    get_write_results_queue("fork")
