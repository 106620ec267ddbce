"""``megatron-k2 engine check``: an engine's log-probabilities against a reference's."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from megatron_k2.engine.check import Scored

_LENGTH = 4096


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-k2 engine", description=__doc__.partition(": ")[2]
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="check")
    check = verbs.add_parser("check", help="does an engine compute what its weights say?")
    add = check.add_argument
    add("--engine", required=True, metavar="URL|DIR", help="a server, or what to load")
    add("--reference", type=Path, required=True, metavar="RUN|HF_DIR")
    add("--tolerance", type=float, default=1e-3, help="of a log-probability (default: %(default)s)")
    add("--text", type=Path, metavar="FILE", help="probe; without it, ids drawn by --seed")
    add("--tokenizer", type=Path, metavar="PATH", help="of --text (default: the reference's)")
    add("--weight-version", metavar="V", help="that the engine's tokens must be tagged with")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the server's key")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="to load DIR in")
    add("--seed", type=int, default=0)
    return parser


def main(argv: list[str]) -> int:
    """Score, compare; 2 where they differ."""
    arguments = _parser().parse_args(argv)
    return _check(arguments)


def _check(arguments: argparse.Namespace) -> int:
    import asyncio

    from megatron_k2.engine import check
    from megatron_k2.engine.mcore.compare_logits import vocabulary_of
    from megatron_k2.engine.protocol import EngineError

    if not arguments.tolerance > 0:
        raise UserError(f"--tolerance {arguments.tolerance:g}: expected more than 0")
    if not arguments.reference.is_dir():
        raise UserError(f"--reference {arguments.reference}: no such directory")
    vocab_size = vocabulary_of(arguments.reference)
    prompts = _text_probes(arguments) or check.drawn_probes(vocab_size, arguments.seed)
    try:
        scored = asyncio.run(_scored(arguments, vocab_size, prompts))
    except EngineError as error:
        raise UserError(f"--engine {arguments.engine}: {error}") from None
    if arguments.weight_version is not None:
        check.require_version(scored, arguments.weight_version)
    reference = check.reference_logprobs(arguments.reference, [one.ids for one in scored])
    places = check.compared(scored, reference)
    check.require_agreement(places, arguments.tolerance)
    print(
        f"{len(places)} log-probabilities agree within {arguments.tolerance:g}; the largest "
        f"difference is {places[0].difference:.3g}, at {places[0]}"
    )
    return 0


def _text_probes(arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    """Equal pieces of the text's first tokens; none where no text was given."""
    from megatron_k2.checkpoint.hf.reader import is_hf_directory
    from megatron_k2.data.tokenizer import load_tokenizer
    from megatron_k2.engine import check
    from megatron_k2.engine.mcore.saved_args import plain_saved_args, tokenizer_path

    if arguments.text is None:
        return []
    if not arguments.text.is_file():
        raise UserError(f"--text {arguments.text}: no such file")
    path = arguments.tokenizer or arguments.reference
    if not is_hf_directory(arguments.reference):
        saved = plain_saved_args(arguments.reference, None)[1]
        path = tokenizer_path(saved, arguments.tokenizer)
    text = arguments.text.read_text(encoding="utf-8", errors="replace")
    ids = load_tokenizer(path).encode(text[: 1 << 16])
    length = min(check.PROMPT_TOKENS, len(ids) // check.NUM_PROBES)
    if length < 2:
        raise UserError(f"--text {arguments.text}: {len(ids)} tokens; expected 8 or more")
    return [tuple(ids[i * length : (i + 1) * length]) for i in range(check.NUM_PROBES)]


async def _scored(
    arguments: argparse.Namespace, vocab_size: int, prompts: list[tuple[int, ...]]
) -> "list[Scored]":
    from megatron_k2.engine import check
    from megatron_k2.engine.protocol import Engine

    engine: Engine
    if arguments.engine.startswith(("http://", "https://")):
        from megatron_k2.engine.remote.endpoints import Endpoint
        from megatron_k2.engine.remote.engine import RemoteEngine

        endpoint = Endpoint(arguments.engine, key_env=arguments.api_key_env)
        engine = await RemoteEngine.connect([endpoint], vocab_size=vocab_size)
    else:
        import torch

        from megatron_k2.checkpoint.stored_model import open_model
        from megatron_k2.engine.local.engine import LocalEngine
        from megatron_k2.engine.local.opened import core_of

        folder = Path(arguments.engine)
        if not folder.is_dir():
            raise UserError(f"--engine {folder}: expected http://host:port, or a directory")
        longest = open_model(folder).preset.max_position_embeddings
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        core = core_of(
            folder,
            num_slots=len(prompts),
            max_length=min(longest, _LENGTH),
            dtype=dtypes[arguments.dtype],
        )
        engine = LocalEngine(core)
    try:
        return await check.scored_by(engine, prompts)
    finally:
        await engine.close()
