import subprocess
import sys

import numpy as np

from megatron_k2.engine.mcore.evaluate import num_windows, window_batch


def test_windows_predict_every_token_but_the_first_once():
    tokens = np.arange(100, 123)
    for seq_length in (1, 4, 11, 22, 30):
        count = num_windows(len(tokens), seq_length)
        batch = window_batch(tokens, range(count), seq_length)
        is_predicted = batch["loss_mask"].bool()
        assert batch["labels"][is_predicted].tolist() == list(range(101, 123))
        assert batch["tokens"][is_predicted].tolist() == list(range(100, 122))


def test_windows_past_the_end_are_masked():
    batch = window_batch(np.arange(5), range(1, 4), 4)
    assert batch["loss_mask"].sum() == 0
    assert batch["tokens"].shape == (3, 4)


def test_help_needs_neither_torch_nor_megatron():
    code = (
        "import sys; from megatron_k2.cli.main import main\n"
        "for verb in ('evaluate', 'generate'):\n"
        "    try: main([verb, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
