"""Repeated and joined data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch.utils.data
from torch.utils.data import Dataset

from mmseg.registry import DATASETS, build
from mmseg.utils.arguments import Count
from mmseg.utils.errors import ConfigError

from .video_dataset import VideoDataset


def _built(dataset: Any, where: str) -> Any:
    return dataset if hasattr(dataset, 'CLASSES') else build(DATASETS, dataset, where)


@DATASETS.register_module()
class RepeatDataset(Dataset):
    """A data set counted ``times`` times over, so that an epoch is longer; items are drawn anew each time.

    Args:
        dataset: a data set or its config.
        times: number of repetitions.
    """

    def __init__(self, dataset: Annotated[Mapping[str, Any], DATASETS] | Dataset, times: Count):
        self.dataset = _built(dataset, 'dataset')
        self.times = times
        self.CLASSES = self.dataset.CLASSES
        self.PALETTE = self.dataset.PALETTE
        self.ignore_index = self.dataset.ignore_index
        self.is_training = self.dataset.is_training

    def __len__(self) -> int:
        return self.times * len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]


@DATASETS.register_module()
class ConcatDataset(torch.utils.data.ConcatDataset):
    """Training sets with the same classes, one after the other.

    Args:
        datasets: data sets or their configs.
    """

    def __init__(self, datasets: Sequence[Annotated[Mapping[str, Any], DATASETS] | Dataset]):
        built = [_built(dataset, f'datasets[{index}]') for index, dataset in enumerate(datasets)]
        if not built:
            raise ConfigError('ConcatDataset: needs at least one data set')
        first = built[0]
        for other in built:
            if other.CLASSES != first.CLASSES:
                raise ConfigError('ConcatDataset: the data sets have different classes')
            if not other.is_training:
                raise ConfigError('ConcatDataset: joins training sets; test one test set at a time')
        super().__init__(built)
        self.CLASSES = first.CLASSES
        self.PALETTE = first.PALETTE
        self.ignore_index = first.ignore_index
        self.is_training = True


def video_datasets(dataset: Any) -> Iterator[VideoDataset]:
    """The data sets under repetitions and concatenations."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from video_datasets(part)
    elif hasattr(dataset, 'dataset'):
        yield from video_datasets(dataset.dataset)
    else:
        yield dataset
