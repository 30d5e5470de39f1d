"""Where predicted label maps go during a test: result files, palette PNGs, pictures, a window.

A sink gets every predicted clip once.  It keeps no more than one clip in memory, and what it has written of a finished
video is whole on disk, whatever happens later.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from mmseg.datasets.pipelines.loading import read_frame
from mmseg.datasets.video_dataset import VideoDataset
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import atomic_file
from mmseg.utils.visual import compare, write_label_png, write_picture


class Sink(Protocol):
    """What :func:`mmseg.apis.test.run_test` asks of a sink; the calls come video by video."""

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Takes a clip: the test item (see :class:`~mmseg.datasets.VideoDataset`), and uint8 [T, H, W]."""

    def finish_video(self, video: str) -> None:
        """No further clip of ``video`` will come."""

    def close(self) -> None:
        """The test is over, or has failed."""


class PalettePNG:
    """``--format-only``: one palette PNG per frame, ``<folder>/<video>/<frame>.png``, with training labels."""

    def __init__(self, folder: str | Path, dataset: VideoDataset) -> None:
        self.folder = Path(folder)
        self.palette = dataset.PALETTE

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Writes the clip's files."""
        for frame, label in zip(item['frames'], labels):
            write_label_png(self.folder / item['video'] / f'{frame}.png', label, self.palette)

    def finish_video(self, video: str) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing is left to do."""


class Pictures:
    """``--show-dir`` and ``--show``: frame, prediction and ground truth side by side, with a legend.

    Args:
        dataset: where the frames, class names and colours come from.
        folder: pictures go to ``<folder>/<video>/<frame>.jpg``; None writes none.
        window: show them on the screen too; any key goes on, Escape closes the window for good.
        opacity: share of the colours over the frame.

    Raises:
        ConfigError: ``window`` is asked for where OpenCV or the machine has none.
    """

    def __init__(self, dataset: VideoDataset, folder: str | Path | None = None, window: bool = False,
                 opacity: float = 0.6) -> None:
        if not 0 < opacity <= 1:
            raise ConfigError(f'--opacity: expected a number in (0, 1], got {opacity}')
        self.dataset = dataset
        self.folder = None if folder is None else Path(folder)
        self.window = 'prediction' if window else None
        self.opacity = opacity
        if window:
            _open_window('prediction')

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Draws the clip's pictures."""
        truths: Sequence[np.ndarray | None] = item['label'] if item['label'] is not None else [None] * len(labels)
        for frame, label, truth in zip(item['frames'], labels, truths):
            image = read_frame(self.dataset.frame_path(item['video'], frame))
            picture = compare(image, label, truth, self.dataset.CLASSES, self.dataset.PALETTE, self.opacity)
            if self.folder is not None:
                write_picture(self.folder / item['video'] / f'{frame}.jpg', picture)
            if self.window is not None:
                cv2.imshow(self.window, picture)
                if cv2.waitKey(0) == 27:
                    self.close()

    def finish_video(self, video: str) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Closes the window."""
        if self.window is not None:
            cv2.destroyWindow(self.window)
            self.window = None


def _open_window(name: str) -> None:
    try:
        cv2.namedWindow(name, cv2.WINDOW_NORMAL)
    except cv2.error:
        raise ConfigError(
            '--show: this OpenCV cannot open windows (opencv-python-headless, or no display); install opencv-python '
            'on a machine with a screen, or write pictures with --show-dir') from None


class VideoFiles:
    """``--out FOLDER``: one ``<video>.npz`` per video, with a uint8 [H, W] array per frame under the frame's name.

    A file appears when its video is finished.  Frames are compressed as they come.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._video: str | None = None
        self._archive: zipfile.ZipFile | None = None

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Appends the clip to the file of its video."""
        if self._archive is None:
            self._video = item['video']
            self._archive = zipfile.ZipFile(self._unfinished, 'w', zipfile.ZIP_DEFLATED, compresslevel=1)
        for frame, label in zip(item['frames'], labels):
            _add_array(self._archive, frame, label)

    def finish_video(self, video: str) -> None:
        """Gives the file of ``video`` its name."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None
            os.replace(self._unfinished, self.folder / f'{self._video}.npz')

    def close(self) -> None:
        """Drops the file of an unfinished video."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None
            self._unfinished.unlink()

    @property
    def _unfinished(self) -> Path:
        return self.folder / f'.{self._video}.npz.part'


def _add_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    archive.writestr(f'{name}.npy', buffer.getvalue())


OUT_FORMS = '''\
  FOLDER       one FOLDER/<video>.npz per video; np.load(file)['<frame>'] is a uint8 [H, W] label map
  FILE.npz     all videos in one file; np.load(FILE)['<video>/<frame>']
  FILE.pkl     the list of label maps of mmsegmentation 0.x, videos in the order of the split, frames in order;
               FILE.json beside it names them'''


def parts_folder(out: str | Path) -> Path:
    """The folder of video files from which ``--out`` is made: ``out`` itself if it is a folder.

    Raises:
        ConfigError: ``out`` is of a form that is not known.
    """
    out = Path(out)
    if out.suffix in ('.npz', '.pkl', '.pickle'):
        return out.with_name(out.name + '.parts')
    if out.suffix and not out.is_dir():
        raise ConfigError(f"--out: expected a folder, or a file that ends in .npz or .pkl, got '{out}'")
    return out


def join_parts(out: str | Path, videos: Sequence[str]) -> None:
    """Makes the one file ``out`` from its folder of video files and removes the folder; a folder stays as it is.

    Args:
        out: as given to ``--out``.
        videos: names of all videos in order; those that have no file are left out.
    """
    out, folder = Path(out), parts_folder(out)
    if out == folder:
        return
    maps = ((video, frame, labels) for video in videos if (folder / f'{video}.npz').exists()
            for frame, labels in _read_archive(folder / f'{video}.npz'))
    if out.suffix == '.npz':
        with atomic_file(out) as file, zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for video, frame, labels in maps:
                _add_array(archive, f'{video}/{frame}', labels)
    else:
        names: list[str] = []
        with atomic_file(out) as file:
            file.write(pickle.PROTO + b'\x02' + pickle.EMPTY_LIST)
            for video, frame, labels in maps:
                # a pickle of one map without its frame (protocol mark, full stop), then "append to the list"
                file.write(pickle.dumps(labels, protocol=2)[2:-1] + pickle.APPEND)
                names.append(f'{video}/{frame}')
            file.write(pickle.STOP)
        with atomic_file(out.with_suffix('.json')) as file:
            file.write(json.dumps(names).encode())
    shutil.rmtree(folder)


def result_files(folder: Path) -> list[Path]:
    """The ``.npz`` files of a folder by name, without hidden ones (such as those that some systems add to copies)."""
    return sorted(file for file in folder.glob('*.npz') if not file.name.startswith('.'))


def load_results(path: str | Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Reads what ``tools/test.py --out`` wrote, one frame at a time.

    Args:
        path: the folder or the ``.npz`` file.

    Yields:
        video, frame, labels uint8 [H, W]; videos and frames in ascending order of their names.

    Raises:
        DataError: ``path`` is not such a file or folder.
    """
    path = Path(path)
    if path.is_dir():
        for file in result_files(path):
            for frame, labels in _read_archive(file):
                yield file.stem, frame, labels
    elif path.suffix == '.npz' and path.is_file():
        for name, labels in _read_archive(path):
            video, _, frame = name.rpartition('/')
            yield video, frame, labels
    else:
        raise DataError(f'{path}: expected a folder or .npz file written by tools/test.py --out')


def _read_archive(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in sorted(archive.files):
                yield name, archive[name]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f'{path} cannot be read: {error}') from error
