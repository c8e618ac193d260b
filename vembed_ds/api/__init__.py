"""Training from Python: what ``from vembed_ds import Trainer, TrainConfig, Predictor`` gives."""
