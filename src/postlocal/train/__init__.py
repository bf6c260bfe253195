"""A trainer for language models on bytes: the code of `postlocal train`."""

from postlocal.train.config import TrainConfig, make_config
from postlocal.train.run import Interrupted, train

__all__ = ["Interrupted", "TrainConfig", "make_config", "train"]
