"""What fine-tuning on packed documents refuses before anything expensive, and what it says."""

from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import check_vocabulary
from megatron_k2.run.flags import RunFlags
from megatron_k2.run.record import read_run_record
from megatron_k2.sft.sets import tokenizer_of, weighted_directories
from megatron_k2.training.preflight import check_run


def check_sft(flags: RunFlags, world_size: int) -> None:
    """Refuse what cannot run.

    Args:
        flags: of the run, expanded.
        world_size: ranks that will be started.

    Raises:
        UserError: naming the value, what was expected, and the way out.
    """
    check_run(flags, world_size)
    if "--sft" in flags:
        raise UserError(
            "--sft is Megatron's, which packs nothing and masks no turn; drop it, this is "
            "megatron-k2's own fine-tuning"
        )
    if flags.micro_batch_size != 1:
        raise UserError(
            f"--micro-batch-size {flags.micro_batch_size}: a pack fills its row; take 1, and a "
            "longer --seq-length for more tokens at once"
        )
    _check_sets(flags)
    _check_balance(flags)
    _check_multi_token_prediction(flags)


def _check_sets(flags: RunFlags) -> None:
    """Each is there, and holds the model's ids."""
    if not flags.sft_data:
        raise UserError("no --data: a directory of 'megatron-k2 data chat' is expected")
    for _, directory in weighted_directories(flags.sft_data):
        tokenizer = tokenizer_of(directory)
        if tokenizer is not None:
            check_vocabulary(tokenizer, flags.vocab_size or 0, flags.preset)
        elif "--synthetic-data" not in flags:
            raise UserError(
                f"{directory} is no set of 'megatron-k2 data chat', nor of 'data prepare'"
            )


def _check_balance(flags: RunFlags) -> None:
    """Megatron's balance losses are means over a row, whatever documents share it."""
    kinds = [kind for kind in flags.moe_router_load_balancing_type if kind != "none"]
    if kinds and any(flags.moe_aux_loss_coeff):
        raise UserError(
            f"--moe-router-load-balancing-type {' '.join(kinds)} with packed documents is a mean "
            "over whoever shares a row; take none (the router's bias goes on balancing)"
        )


def _check_multi_token_prediction(flags: RunFlags) -> None:
    if not flags.mtp_num_layers:
        return
    if flags.sft_loss == "sample":
        raise UserError(
            "--sft-loss sample with --mtp-num-layers: Megatron weighs that loss by tokens; take "
            "--sft-loss token"
        )
    if "--overlap-moe-expert-parallel-comm" in flags:
        raise UserError(
            "--overlap-moe-expert-parallel-comm with --mtp-num-layers and packed documents: "
            "Megatron's overlapped schedule has none of that; drop one of the two"
        )


def notes(flags: RunFlags) -> list[str]:
    """A warning where MuonClip goes on from weights that AdamW trained.

    Muon on such weights degrades them the more, the larger its updates (arXiv:2605.10468).
    """
    given = flags.pretrained_checkpoint or flags.load
    if given is None or given == flags.save or "--muonclip" not in flags:
        return []
    words = read_run_record(Path(given)).get("flags", [])
    if not words or "--muonclip" in words or "muon" in words:
        return []
    return [
        f"warning: {given} was trained with AdamW, and Muon on such weights degrades them "
        "(arXiv:2605.10468); --optimizer adam goes on as they were trained"
    ]
