"""The choice between the digits and a folder of images."""

from __future__ import annotations

import torch

from fastlars.trainer.config.settings import Config
from fastlars.trainer.data.dataset import Data
from fastlars.trainer.process import packages


def load_data(config: Config, device: torch.device) -> Data:
    """The images that --data names, listed but not yet read; TrainerError if they are unusable.

    Each kind is imported only when it is used: the digits need scikit-learn, a folder does not.
    """
    if config.data == "digits":
        packages.load("sklearn.datasets")
        from fastlars.trainer.data.digits import Digits

        return Digits(config.seed, device)
    from fastlars.trainer.data.image_folder import Folder

    return Folder(config, device)
