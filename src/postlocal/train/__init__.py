"""A trainer for language models over bytes, behind `postlocal train`."""

from postlocal.train.config import TrainConfig, make_config
from postlocal.train.run import Interrupted, train

__all__ = ["Interrupted", "TrainConfig", "make_config", "train"]
