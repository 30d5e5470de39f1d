"""Where predicted label maps go during a test: result files, palette PNGs, pictures, a window.

A sink gets every predicted clip once and keeps no more than one clip in memory.  What it has written of a finished
video is whole on disk, whatever happens later.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmseg.datasets.pipelines.loading import read_frame
from mmseg.datasets.video_dataset import VideoDataset
from mmseg.utils.errors import ConfigError, DataError
from mmseg.utils.files import atomic_file, named_errors, write_atomically
from mmseg.utils.images import as_label_map
from mmseg.utils.names import natural_key
from mmseg.utils.visual import compare, write_label_png, write_picture


class Sink:
    """Takes the predictions of :func:`mmseg.apis.test.stream_test`, video by video."""

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Takes a clip: the test item (see :class:`~mmseg.datasets.VideoDataset`), and uint8 [T, H, W]."""
        raise NotImplementedError

    def finish_video(self, video: str) -> None:
        """No further clip of ``video`` will come."""

    def close(self) -> None:
        """The test is over, or has failed."""


class PalettePNG(Sink):
    """``--format-only``: one palette PNG per frame, ``<folder>/<video>/<frame>.png``, with training labels."""

    def __init__(self, folder: str | Path, dataset: VideoDataset) -> None:
        self.folder = Path(folder)
        self.palette = dataset.PALETTE

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Writes the clip's files."""
        for frame, label in zip(item['frames'], labels):
            write_label_png(self.folder / item['video'] / f'{frame}.png', label, self.palette)


class Pictures(Sink):
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
        if self.window is not None:
            try:
                cv2.namedWindow(self.window, cv2.WINDOW_NORMAL)
            except cv2.error:
                raise ConfigError(
                    '--show: this OpenCV cannot open windows (opencv-python-headless, or no display); install '
                    'opencv-python on a machine with a screen, or write pictures with --show-dir') from None

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Draws the clip's pictures."""
        truths = item['label'] if item['label'] is not None else labels
        truths = [truth if known else None for truth, known in zip(truths, item['labelled'])]
        for frame, label, truth in zip(item['frames'], labels, truths):
            image = read_frame(self.dataset.frame_path(item['video'], frame))
            picture = compare(image, label, truth, self.dataset.CLASSES, self.dataset.PALETTE, self.opacity)
            if self.folder is not None:
                write_picture(self.folder / item['video'] / f'{frame}.jpg', picture)
            if self.window is not None:
                cv2.imshow(self.window, picture)
                if cv2.waitKey(0) == 27:
                    self.close()

    def close(self) -> None:
        """Closes the window."""
        if self.window is not None:
            cv2.destroyWindow(self.window)
            self.window = None


class VideoFiles(Sink):
    """``--out FOLDER``: one ``<video>.npz`` per video, with a uint8 [H, W] array per frame under the frame's name.

    A file appears when its video is finished.  Frames are compressed as they come.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = contextlib.ExitStack()  # of the video whose clips are coming
        self._archive: zipfile.ZipFile | None = None

    def write(self, item: dict[str, Any], labels: np.ndarray) -> None:
        """Appends the clip to the file of its video."""
        path = self.folder / f'{item["video"]}.npz'
        if self._archive is None:
            self._archive = self._file.enter_context(_new_archive(path))
        with named_errors(path):
            for frame, label in zip(item['frames'], labels):
                _add_array(self._archive, frame, label)

    def finish_video(self, video: str) -> None:
        """Gives the file of ``video`` its name."""
        self._archive = None
        self._file.close()

    def close(self) -> None:
        """Drops the file of an unfinished video."""
        self._archive = None
        with contextlib.suppress(OSError), self._file:
            raise OSError  # a file that ends in an error gets no name


@contextlib.contextmanager
def _new_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with atomic_file(path) as file, zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        yield archive


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
    if out.suffix.lower() in ('.npz', '.pkl', '.pickle'):
        return out.with_name(out.name + '.parts')
    if out.suffix and not out.is_dir():
        raise ConfigError(f"--out: expected a folder, or a file that ends in .npz or .pkl, got '{out}'")
    return out


def remove_parts(out: str | Path) -> None:
    """Removes the video files from which the file ``out`` is made, and their folder; nothing where ``out`` is one."""
    folder = parts_folder(out)
    if folder == Path(out):
        return
    for file in [*folder.rglob('*.npz'), *folder.rglob('.*.npz*.part')]:
        file.unlink()
    for inside in sorted((path for path in folder.rglob('*') if path.is_dir()), reverse=True):
        inside.rmdir()
    if folder.is_dir():
        folder.rmdir()


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
    if out.suffix.lower() == '.npz':
        with _new_archive(out) as archive:
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
        write_atomically(out.with_suffix('.json'), json.dumps(names))
    remove_parts(out)


def result_files(folder: Path) -> dict[str, Path]:
    """Video (``v``, ``city/v``) -> its ``.npz`` file in ``folder``, without hidden ones, which other programs add."""
    files = {path.relative_to(folder).with_suffix(''): path for path in folder.rglob('*.npz')}
    visible = {name.as_posix(): path for name, path in files.items() if not any(p.startswith('.') for p in name.parts)}
    return {name: visible[name] for name in sorted(visible, key=natural_key)}


def load_results(path: str | Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Reads what ``tools/test.py --out`` wrote, one frame at a time.

    Args:
        path: the folder or the ``.npz`` file.

    Yields:
        video, frame, labels uint8 [H, W]; videos and frames in natural order of their names.

    Raises:
        DataError: ``path`` is not such a file or folder.
    """
    path = Path(path)
    if path.is_dir():
        for video, file in result_files(path).items():
            for frame, labels in _read_archive(file):
                yield video, frame, labels
    elif path.suffix.lower() == '.npz' and path.is_file():
        for name, labels in _read_archive(path):
            video, _, frame = name.rpartition('/')
            yield video, frame, labels
    else:
        raise DataError(f'{path}: expected a folder or .npz file written by tools/test.py --out')


def _read_archive(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and label maps in natural order, video by video."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix('.npy') for name in archive.namelist()]
            for name in sorted(names, key=lambda name: [natural_key(part) for part in name.rpartition('/')]):
                with archive.open(f'{name}.npy') as member:
                    labels = as_label_map(np.lib.format.read_array(member, allow_pickle=False), name)
                yield name, labels
    except Exception as error:  # zipfile, zlib and NumPy have many for a damaged file
        raise DataError(f'{path} cannot be read: {error}') from error
