"""Training: `fit(ZooModule("gla-tiny"), TextData("my.txt"), "runs/gla", max_steps=1000)`, or `lm-zoo train`."""

from lm_zoo.train.checkpoints import Checkpoints, Interrupted
from lm_zoo.train.data import TextData
from lm_zoo.train.module import ZooModule
from lm_zoo.train.parallel import Parallel
from lm_zoo.train.run import fit

__all__ = ["Checkpoints", "Interrupted", "Parallel", "TextData", "ZooModule", "fit"]
