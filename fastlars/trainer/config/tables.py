"""The papers' tables for ResNet-50 on ImageNet, by batch size: data alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of a table: what was used at `batch`, and where that stands.

    `epochs` is the length of the schedule, warm-up included; `bn_batch` the images over which
    batch norm took its statistics, 0 where the source does not say.
    """

    batch: int
    lr: float
    warmup_epochs: float
    epochs: int
    momentum: float
    weight_decay: float
    bn_batch: int
    source: str


# The published rates of the paper's own table 4 belong to another trust coefficient; these are for
# 0.001, and reproduce its accuracies.
LARS = tuple(
    Row(batch, lr, 5.0, 90, 0.9, 1e-4, 0, "torchlars' reproduction of You et al. 2017, table 4")
    for batch, lr in ((8192, 12.8), (16384, 25.0), (32768, 29.0))
)

_POINT = "MLPerf's reference convergence point"

# mlcommons/logging, rcps_resnet.json: release 4.0.0, and 1.0.0 for the point at 2,048. Its
# decay_steps is the whole schedule in some rows and what follows the warm-up in others (1,632,
# 2,048, 8,192, 65,536, 67,840): `epochs` is the reading that leaves time for the epochs to
# convergence given beside it. Its 2e-3 for the weight decay at 2,048 is 2e-4 in the README of the
# same submission.
MLPERF = (
    Row(1632, 7.4, 2.0, 37, 0.9, 5e-5, 204, f"{_POINT} by NVIDIA"),
    Row(2048, 8.5, 5.0, 41, 0.9, 2e-4, 64, f"{_POINT} by Google"),
    Row(3264, 10.5, 2.0, 37, 0.9, 5e-5, 204, f"{_POINT} by NVIDIA"),
    Row(4096, 10.0, 5.0, 42, 0.9, 2e-4, 64, f"{_POINT} by Google"),
    Row(8192, 17.0, 5.0, 44, 0.9, 2e-4, 64, f"{_POINT} by Google"),
    Row(13056, 12.8, 9.0, 48, 0.9, 2.5e-5, 204, f"{_POINT} by NVIDIA"),
    Row(32768, 21.2, 16.0, 58, 0.94, 2.5e-5, 128, f"{_POINT} by Google"),
    Row(49152, 19.405, 24.0, 71, 0.951807, 1e-4, 256, f"{_POINT} by NVIDIA"),
    Row(58880, 23.246, 29.0, 82, 0.951807, 1e-4, 230, f"{_POINT} by NVIDIA"),
    Row(65536, 24.699, 31.0, 89, 0.951807, 1e-4, 128, f"{_POINT} by Google"),
    Row(67840, 24.699, 31.0, 91, 0.951807, 1e-4, 424, f"{_POINT} by NVIDIA"),
)

# Beside the points above, which are what rates in between are interpolated from: a default of the
# reference code, of a longer schedule, for which no convergence was recorded.
MLPERF_DEFAULT = Row(16384, 25.0, 5.0, 90, 0.9, 2e-4, 0, "default of MLPerf's reference code")
