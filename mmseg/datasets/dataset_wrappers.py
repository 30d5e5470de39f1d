"""Repeated and joined data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch.utils.data
from torch.utils.data import Dataset

from mmseg.registry import DATASETS, build
from mmseg.utils.arguments import Count, Weight
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
    """Training sets with the same classes, one after the other, or mixed by weight.

    With weights, each sample first draws a data set and then one of its items, both at random: batches mix all of them,
    whatever their sizes.  The draw depends on the seed of the training and the number of the sample alone.

    Args:
        datasets: data sets or their configs.
        weights: how often each is drawn, relative to the others; None: an epoch holds every item once.
    """

    def __init__(
            self, datasets: Sequence[Annotated[Mapping[str, Any], DATASETS] | Dataset],
            weights: Sequence[Weight] | None = None):
        built = [_built(dataset, f'datasets[{index}]') for index, dataset in enumerate(datasets)]
        if not built:
            raise ConfigError('ConcatDataset: needs at least one data set')
        first = built[0]
        for other in built:
            if other.CLASSES != first.CLASSES:
                raise ConfigError('ConcatDataset: the data sets have different classes')
            if not other.is_training:
                raise ConfigError('ConcatDataset: joins training sets; test one test set at a time')
        if weights is not None and (len(weights) != len(built) or not sum(weights)):
            raise ConfigError(f'ConcatDataset: weights should be {len(built)} numbers, one a data set, and not all 0, '
                              f'got {list(weights)}')
        super().__init__(built)
        self.shares = None if weights is None else np.array(weights, float) / sum(weights)
        self.CLASSES = first.CLASSES
        self.PALETTE = first.PALETTE
        self.ignore_index = first.ignore_index
        self.is_training = True

    def __getitem__(self, index: int) -> Any:
        """Item ``index``; with weights any item, drawn by NumPy's generator."""
        if self.shares is None:
            return super().__getitem__(index)
        part: Any = self.datasets[np.random.choice(len(self.datasets), p=self.shares)]
        return part[np.random.randint(len(part))]


def video_datasets(dataset: Any) -> Iterator[VideoDataset]:
    """The data sets under repetitions and concatenations."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from video_datasets(part)
    elif hasattr(dataset, 'dataset'):
        yield from video_datasets(dataset.dataset)
    else:
        yield dataset
