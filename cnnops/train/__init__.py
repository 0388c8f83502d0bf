"""Training: a configuration, a loop that can stop and go on anywhere, checkpoints that are verified."""

from cnnops.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from cnnops.train.config import TrainConfig
from cnnops.train.progress import Reporter
from cnnops.train.trainer import EpochRecord, Stopped, Trainer, TrainingError

__all__ = [
    "CheckpointError",
    "EpochRecord",
    "Reporter",
    "Stopped",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "load_checkpoint",
    "save_checkpoint",
]
