"""vLLM's side of ``rollout_vllm.py``, run by the Python of its own environment.

    python rollout_vllm_peer.py HF_DIR BATCH LENGTH

Reads a JSON object a line, ``{"prompts", "new"}``, answers each with its tokens, log-probabilities,
and this process's wall and CPU seconds.
"""

import json
import os
import sys
import time


def main(directory: str, batch: int, length: int) -> None:
    """Serve until stdin ends; what vLLM prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=directory,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=length,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        compilation_config={"custom_ops": ["none"]},  # its CPU rotary op is silently wrong
    )
    print("ready", file=answers)
    for line in sys.stdin:
        work = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
        params = SamplingParams(
            temperature=0, max_tokens=work["new"], ignore_eos=True, logprobs=0, detokenize=False
        )
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = [time.perf_counter() - wall, time.process_time() - cpu]
        found = [each.outputs[0] for each in outputs]
        ids = [list(each.token_ids) for each in found]
        scores = [
            [place[token].logprob for place, token in zip(each.logprobs, each.token_ids)]  # noqa: B905
            for each in found
        ]
        print(
            json.dumps({"ids": ids, "scores": scores, "seconds": seconds}), file=answers, flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
