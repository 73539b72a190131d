"""Train the network on worlds that are rendered on the fly."""

from ttt3r.training.curriculum import CURRICULUM, Stage
from ttt3r.training.loop import train
from ttt3r.training.settings import REFINE, TrainSettings

__all__ = ["CURRICULUM", "REFINE", "Stage", "TrainSettings", "train"]
