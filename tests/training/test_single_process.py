"""A process that is started by hand, beside others that take ports."""

import os
import subprocess
import sys

from tests.support.paths import REPOSITORY

PROGRAM = """
import os
import torch.distributed as dist
from megatron_k2.training.pretrain import single_process_environment
single_process_environment()
print(os.environ["MASTER_PORT"])
dist.init_process_group("gloo")
dist.barrier(dist.new_group([0]))
print(dist.get_world_size())
"""


def test_its_store_is_at_a_port_that_the_system_chooses_as_it_is_bound():
    """One chosen before, and taken meanwhile, ended a run, once in twenty kills and restarts."""
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=REPOSITORY,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["0", "1"], done.stderr
