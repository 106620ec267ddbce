"""A domain for a service's tests: it counts what it is told, hangs, fails and says ``Again``."""

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

from megatron_k2.gym.episode import Again
from megatron_k2.gym.protocol import Step, right, wrong
from megatron_k2.records.messages import Message

NAME = "tests.rl.cluster.gym_domain:Counting"


@dataclass
class Talk:
    """Over after so many turns; right where it was told each once."""

    log: Path | None
    said: list = field(default_factory=list)
    num_again: int = 0

    async def reset(self, task):
        self.task = task
        return Step((Message("user", task.prompt),))

    async def step(self, action):
        if action.content == "again" and not self.num_again:
            self.num_again += 1
            raise Again("a moment")
        if action.content == "fail":
            raise OSError("the disk is full")
        if action.content == "die":
            os._exit(9)
        self.said.append(action.content)
        await asyncio.sleep(self.task.reference.get("seconds", 0))
        if len(self.said) >= self.task.reference["turns"]:
            return Step(is_over=True)
        return Step((Message("user", f"heard {len(self.said)}"),))

    async def verify(self):
        is_right = self.said == [str(i) for i in range(self.task.reference["turns"])]
        return (right if is_right else wrong)(" ".join(self.said), heard=len(self.said))

    async def close(self):
        if self.log:
            with self.log.open("a") as file:
                file.write("closed\n")


class Counting:
    """Where it writes that an environment was closed stands in the environment."""

    name = NAME

    def environment(self):
        path = os.environ.get("GYM_DOMAIN_LOG")
        return Talk(Path(path) if path else None)

    async def judge(self, task, answer):
        return (right if answer == task.reference["answer"] else wrong)(answer)

    async def close(self):
        pass
