"""Train the network on worlds that are rendered on the fly."""

from ttt3r.training.curriculum import CURRICULUM, Stage
from ttt3r.training.loop import TrainSettings, train

__all__ = ["CURRICULUM", "Stage", "TrainSettings", "train"]
