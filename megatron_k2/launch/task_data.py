"""What reinforcement learning reads: task sets and the chat's tokenizer, as frozen data."""

from dataclasses import dataclass

from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class TaskData:
    """A file of task sets (``rl/task_sets.py``), and the tokenizer the model was tuned with."""

    root: str
    """Directory that all are relative to."""
    tasks: str
    tokenizer: str
    model: str = ""
    """Directory of the release whose configuration engines take; "": the preset's."""
    is_synthetic: bool = False
    """Small ones are made where they are absent (``rl/synthetic.py``)."""

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """None: task sets have weights of their own, in their file."""
        return ()

    def flags(self, _preset: ModelPreset) -> list[str]:
        """Ours; ids are ready-made for Megatron, which loads no tokenizer."""
        flags = ["--tasks", f"{self.root}/{self.tasks}"]
        flags += ["--chat-tokenizer", f"{self.root}/{self.tokenizer}"]
        return [*flags, *(["--synthetic-data"] if self.is_synthetic else [])]

    def described(self) -> str:
        """Both in one line of the launch table."""
        made = " (made there)" if self.is_synthetic else ""
        return f"tasks {self.tasks}, tokenizer {self.tokenizer}; {self.root}{made}"
