"""Writes contact sheets of clips: the files with their labels, and what the pipeline makes of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from mmseg.config import OptionsAction, config_inputs, load_config
from mmseg.datasets import VideoDataset, build_dataset
from mmseg.datasets.dataset_wrappers import video_datasets
from mmseg.datasets.loader import seeded
from mmseg.datasets.pipelines.loading import load_labels
from mmseg.utils.cli import ArgumentParser, run_tool
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import refuse_overwriting
from mmseg.utils.images import read_frame
from mmseg.utils.visual import legend, overlay, panels, write_picture

EPILOG = """Rows of a sheet: the frames as they stand on disk; their labels; then for every view the frames after the
pipeline and, in training, their labels.  Columns are the frames of the clip, in the order in which the model gets them.

examples:
  python tools/browse_dataset.py local_configs/themask/mini_video.py --out sheets
  python tools/browse_dataset.py CONFIG --part test --number 3 --options data.test.test_size=4
  python tools/browse_dataset.py CONFIG --videos 123_abc --seed 5
"""


def denormalise(frame: torch.Tensor, norm: dict[str, Any]) -> np.ndarray:
    """A frame of the model's input (float [3, H, W]) as uint8 [H, W, 3] BGR."""
    image = frame.permute(1, 2, 0).numpy() * norm['std'] + norm['mean']
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image[..., ::-1] if norm['to_rgb'] else image)


def fit(picture: np.ndarray, height: int) -> np.ndarray:
    """``picture`` at the height of a row."""
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    shrinks = height < picture.shape[0]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST)


def widened(picture: np.ndarray, width: int) -> np.ndarray:
    """``picture`` with white at its right, up to ``width``."""
    return cv2.copyMakeBorder(picture, 0, 0, 0, width - picture.shape[1], cv2.BORDER_CONSTANT, value=(255, 255, 255))


def sheet(item: dict[str, Any], source: VideoDataset, height: int, opacity: float) -> np.ndarray:
    """The contact sheet of one item of a data set, uint8 BGR."""
    views = item['img'] if isinstance(item['img'], list) else [item['img']]
    metas = item['img_metas'] if isinstance(item['img_metas'], list) else [item['img_metas']]
    video, paths = metas[0]['video'], metas[0]['all_names']
    names = [source.frame_name(path) for path in paths]
    frames = [read_frame(path) for path in paths]
    rows = [[(f'{video}/{name}  {frame.shape[1]}x{frame.shape[0]}', frame) for name, frame in zip(names, frames)]]
    shown: set[int] = set()
    if source.has_masks:
        masks = [source.mask_of(video, name) for name in names]
        labels, _ = load_labels(masks, source.labels, frames[0].shape[:2], video)
        shown.update(*(np.unique(label).tolist() for label in labels))
        rows.append([('labels', overlay(f, label, source.PALETTE, opacity)) for f, label in zip(frames, labels)])
    for i, (view, meta) in enumerate(zip(views, metas)):
        images = [denormalise(frame, meta['img_norm_cfg']) for frame in view]
        title = f'view {i}' if len(views) > 1 else 'input'
        title += f'  {view.shape[3]}x{view.shape[2]}' + (f'  {meta["flip_direction"]} flip' if meta['flip'] else '')
        rows.append([(title, image) for image in images])
        if 'gt_semantic_seg' in item:
            after = item['gt_semantic_seg'][:, 0].numpy().astype(np.uint8)
            rows.append([('input labels', overlay(image, label, source.PALETTE, opacity))
                         for image, label in zip(images, after)])
    rows = [[(title, fit(picture, height)) for title, picture in row] for row in rows]
    widths = [max(picture.shape[1] for _, picture in column) for column in zip(*rows)]
    bands = [panels([(title, widened(picture, width)) for (title, picture), width in zip(row, widths)]) for row in rows]
    classes = sorted(label for label in shown if label < source.num_classes)
    return np.vstack([*bands, legend(classes, source.CLASSES, source.PALETTE, bands[0].shape[1])])


def choose(dataset: Any, videos: list[str] | None, number: int, seed: int) -> list[int]:
    """Indices of the items to draw, spread over the data set.

    Raises:
        DataError: the data set has no such video.
    """
    candidates = list(range(len(dataset)))
    if videos:
        parts = list(video_datasets(dataset))
        known = [video.name for part in parts for video in part.videos]
        for name in videos:
            if name not in known:
                raise DataError(f"--videos: the split has no video '{name}'")
        names = known
        if len(parts) == 1 and parts[0].clips is not None:
            names = [parts[0].videos[clip.video].name for clip in parts[0].clips]
        candidates = [i for i, name in enumerate(names) if name in videos]
    order = np.random.default_rng(seed).permutation(len(candidates))[:number]
    return sorted(candidates[i] for i in order)


def browse(args: argparse.Namespace) -> None:
    """Writes the sheets that the arguments ask for, and prints their names."""
    data = load_config(args.config, args.options).get('data') or {}
    if args.part not in data:
        raise ConfigError(f'{args.config}: has no data.{args.part}; it has {", ".join(data) or "no data at all"}')
    dataset = build_dataset(data[args.part], where=f'data.{args.part}')
    for part in video_datasets(dataset):  # sheets among the frames would be taken for frames
        refuse_overwriting(
            {'--out': args.out}, {**config_inputs(args.config), 'data set': part.data_root, **part.files.inputs()})
    for index in choose(dataset, args.videos, args.number, args.seed):
        with seeded(args.seed, index):
            item = dataset[index]
        for error in item['skipped']:
            print(f'left out: {error}', file=sys.stderr)
        if item['img'] is None:
            continue
        meta = item['img_metas'][0] if isinstance(item['img_metas'], list) else item['img_metas']
        source = next(part for part in video_datasets(dataset) if meta['filename'] == part.frame_path(
            meta['video'], part.frame_name(meta['filename'])))
        name = f'{meta["video"].replace("/", "_")}_{source.frame_name(meta["filename"])}'
        path = args.out / f'{args.part}_{index:05d}_{name}.jpg'
        write_picture(path, sheet(item, source, args.height, args.opacity))
        print(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = ArgumentParser(description=__doc__, epilog=EPILOG)
    parser.add_argument('config')
    parser.add_argument('--part', choices=('train', 'val', 'test'), default='train', help='of the config\'s data')
    parser.add_argument('--number', type=int, default=6, help='clips (default %(default)s)')
    parser.add_argument('--videos', nargs='+', metavar='NAME', help='only clips of these videos')
    parser.add_argument('--out', type=Path, default=Path('contact_sheets'), help='folder (default %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the choice of clips and the pipeline')
    parser.add_argument('--height', type=int, default=200, help='of a row, in pixels')
    parser.add_argument('--opacity', type=float, default=0.6, help='of the labels, 0..1')
    OptionsAction.add_to(parser)
    args = parser.parse_args(arguments)
    return run_tool(lambda: browse(args))


if __name__ == '__main__':
    sys.exit(main())
