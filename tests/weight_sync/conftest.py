from tests.checkpoint.conftest import checkpoints

__all__ = ["checkpoints"]
