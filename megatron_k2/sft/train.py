"""``torchrun -m megatron_k2.sft.train <flags>``: fine-tuning on packed documents.

Megatron's own loop, as for pretraining (``training/pretrain.py``); data, forward step and flags are
this room's.
"""

from pathlib import Path
from typing import Any

from megatron_k2.run.flags import RunFlags
from megatron_k2.sft.checks import check_sft, notes
from megatron_k2.sft.flags import expand
from megatron_k2.sft.sets import weighted_directories
from megatron_k2.sft.synthetic import write_echo_set
from megatron_k2.training.pretrain import Program, main


def _providers() -> tuple[Any, Any]:
    from megatron_k2.host.repairs import roll_packed_documents
    from megatron_k2.model.packed import next_in_document
    from megatron_k2.sft.providers import datasets_provider, forward_step

    roll_packed_documents(next_in_document)
    return datasets_provider, forward_step


def _prepare(flags: RunFlags) -> list[str]:
    if "--synthetic-data" in flags and flags.vocab_size is not None:
        for _, directory in weighted_directories(flags.sft_data):
            write_echo_set(Path(directory), flags.vocab_size, flags.null_tokenizer_eod_id or 0)
    return notes(flags)


SFT = Program("sft", expand, check_sft, _providers, _prepare)

if __name__ == "__main__":
    main(SFT)
