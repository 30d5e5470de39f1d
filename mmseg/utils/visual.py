"""Pictures of label maps: colours, overlays, and panels with a legend of class names."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mmseg.utils.errors import ConfigError
from mmseg.utils.files import user_path, write_atomically

Palette = Sequence[Sequence[int]]

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
_LINE = 18  # height of a line of text, in pixels
_PANEL_HEIGHT = 240  # smaller frames are enlarged to about this height


def colour_table(palette: Palette) -> np.ndarray:
    """Colours of all 256 labels, uint8 [256, 3] RGB; labels without a class are black.

    Args:
        palette: [R, G, B] a class.
    """
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return table


def colourise(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """``labels`` (uint8 [H, W]) in colour, uint8 [H, W, 3] BGR; void is black."""
    return np.ascontiguousarray(colour_table(palette)[:, ::-1])[labels]


def overlay(frame: np.ndarray, labels: np.ndarray, palette: Palette, opacity: float = 0.5) -> np.ndarray:
    """Blends the colours of ``labels`` over ``frame``; void pixels keep the frame.

    Args:
        frame: uint8 [H, W, 3] BGR.
        labels: uint8 [H, W].
        palette: [R, G, B] a class.
        opacity: share of the colour, 0..1.

    Returns:
        uint8 [H, W, 3] BGR.
    """
    if frame.shape[:2] != labels.shape:
        raise ValueError(f'the frame is {frame.shape[:2]}, the label map {labels.shape}')
    if not 0 <= opacity <= 1:
        raise ValueError(f'opacity: expected 0..1, got {opacity}')
    blended = cv2.addWeighted(frame, 1 - opacity, colourise(labels, palette), opacity, 0)
    return np.where((labels < len(palette))[..., None], blended, frame)


def legend(classes: Sequence[int], names: Sequence[str], palette: Palette, width: int, more: int = 0) -> np.ndarray:
    """Colour and name of each of ``classes`` in as many columns as fit, uint8 [h, width, 3] BGR.

    Args:
        classes: labels, in the order in which they are to be shown.
        names: class names.
        palette: [R, G, B] a class.
        width: of the picture, in pixels; longer names are cut off.
        more: number of classes that are left out; a last entry says so.
    """
    texts = [names[c] for c in classes] + ([f'+{more} more'] if more else [])
    sizes = [cv2.getTextSize(text, _FONT, 0.42, 1)[0][0] for text in texts]
    cell = min(width, _LINE + 14 + max(sizes, default=0))
    columns = max(1, width // cell)
    rows = -(-len(texts) // columns)
    picture = np.full((rows * _LINE + 6, width, 3), _PAPER, np.uint8)
    for i, text in enumerate(texts):
        x, y = (i // rows) * cell + 4, (i % rows) * _LINE + 4
        indent = 0
        if i < len(classes):
            colour = [int(v) for v in palette[classes[i]][::-1]]
            cv2.rectangle(picture, (x, y), (x + _LINE - 6, y + _LINE - 6), colour, cv2.FILLED)
            cv2.rectangle(picture, (x, y), (x + _LINE - 6, y + _LINE - 6), _INK)
            indent = _LINE
        cv2.putText(picture, text, (x + indent, y + _LINE - 7), _FONT, 0.42, _INK, 1, cv2.LINE_AA)
    return picture


def panels(pictures: Sequence[tuple[str, np.ndarray]], gap: int = 4) -> np.ndarray:
    """Titled pictures of one size side by side.

    Args:
        pictures: (title, uint8 [H, W, 3] BGR).
        gap: white pixels between them.

    Returns:
        uint8 [H + title, W', 3] BGR.
    """
    columns = []
    for title, picture in pictures:
        head = np.full((_LINE, picture.shape[1], 3), _PAPER, np.uint8)
        cv2.putText(head, title, (2, _LINE - 5), _FONT, 0.45, _INK, 1, cv2.LINE_AA)
        columns += [np.vstack([head, picture]), np.full((picture.shape[0] + _LINE, gap, 3), _PAPER, np.uint8)]
    return np.hstack(columns[:-1])


def compare(frame: np.ndarray, pred: np.ndarray, gt: np.ndarray | None, names: Sequence[str], palette: Palette,
            opacity: float = 0.6) -> np.ndarray:
    """Frame, prediction and, where there is one, ground truth side by side, over a legend of the classes that occur.

    Args:
        frame: uint8 [H, W, 3] BGR.
        pred: uint8 [H, W].
        gt: uint8 [H, W] or None; void is shown as the frame itself.
        names: class names.
        palette: [R, G, B] a class.
        opacity: share of the colours over the frame.

    Returns:
        uint8 [H', W', 3] BGR; small frames are enlarged so that the text can be read.
    """
    scale = max(1, round(_PANEL_HEIGHT / frame.shape[0]))

    def enlarged(picture: np.ndarray) -> np.ndarray:
        return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)

    pictures = [('frame', enlarged(frame)), ('prediction', enlarged(overlay(frame, pred, palette, opacity)))]
    labels = [pred]
    if gt is not None:
        pictures.append(('ground truth', enlarged(overlay(frame, gt, palette, opacity))))
        labels.append(gt)
    body = panels(pictures)
    counts = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=256)[:len(names)]
    shown = [int(c) for c in np.argsort(-counts, kind='stable') if counts[c]]
    return np.vstack([body, legend(shown, names, palette, body.shape[1])])


def write_picture(path: str | Path, picture: np.ndarray) -> None:
    """Writes uint8 BGR as the type that the suffix names; folders are made, the file is whole.

    Raises:
        ConfigError: OpenCV does not write this type, or not a picture of this size.
    """
    path = user_path(path)
    if not cv2.haveImageWriter(str(path)):
        raise ConfigError(f"{path}: pictures cannot be written as '{path.suffix}'; take .png, .jpg, .webp or .bmp")
    done, data = cv2.imencode(path.suffix, picture)
    if not done:
        raise ConfigError(f'{path}: a picture of {picture.shape[1]}x{picture.shape[0]} does not fit into {path.suffix}')
    write_atomically(path, data.tobytes(), sync=False)


def write_label_png(path: str | Path, labels: np.ndarray, palette: Palette) -> None:
    """Writes a label map (uint8 [H, W]) as a palette PNG: pixel values are the labels, viewers show the colours."""
    image = Image.fromarray(labels)
    image.putpalette(colour_table(palette).ravel().tolist())
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    write_atomically(user_path(path), buffer.getvalue(), sync=False)
