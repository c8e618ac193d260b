"""vembed-factory's other name of :mod:`vembed_ds.training.trainer`."""

from vembed_ds.training.trainer import Trainer

__all__ = ["Trainer"]
