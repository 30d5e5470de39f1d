"""Sets that hold whole label maps: Pascal VOC's folders, and Roboflow's masks.

VOC's layout is that of its development kit; ``labelmap.txt`` (``label:r,g,b:parts:actions``) is what CVAT writes beside
it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from mmseg.apps.annotations.records import IMAGES, Faults, ImageFolder, Picture, Read
from mmseg.datasets.labels import LabelRule, describe_labels
from mmseg.utils.errors import DataError
from mmseg.utils.files import read_lines
from mmseg.utils.images import VOID
from mmseg.utils.names import natural_key

_VOC = (
    'background', 'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable',
    'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor')
_CSV = '_classes.csv'
_MASK = '_mask.png'


def read_voc(source: Path, images: Path | None, faults: Faults) -> Read:
    """Reads ``JPEGImages``, ``SegmentationClass``, and splits by the lists in ``ImageSets/Segmentation``."""
    masks, lists = source / 'SegmentationClass', source / 'ImageSets' / 'Segmentation'
    for folder in (masks, lists):
        if not folder.is_dir():
            raise DataError(f'{folder}: no such folder; expected JPEGImages, SegmentationClass and '
                            'ImageSets/Segmentation')
    classes, rule = _voc_classes(source / 'labelmap.txt')
    splits: dict[str, str] = {}
    for file in sorted(lists.glob('*.txt'), key=lambda file: (file.stem == 'trainval', file.stem)):
        for name in read_lines(file):
            splits.setdefault(name, file.stem)
    found = ImageFolder(images or source / 'JPEGImages')

    def pictures() -> Iterator[Picture]:
        for name, split in splits.items():
            where = f'{lists / split}.txt, {name}'
            candidates = [found.folder / f'{name}{suffix}' for suffix in IMAGES]
            file = next((path for path in candidates if path.is_file()), None)
            if file is None:
                faults.add(f"{where}: no image '{name}' in {found.folder}")
            else:
                yield _labelled(file, masks / f'{name}.png', rule, split)

    return Read(classes, pictures(), len(splits), [masks, lists])


def _voc_classes(file: Path) -> tuple[list[str], LabelRule]:
    if not file.is_file():
        return list(_VOC), LabelRule.plain(len(_VOC))
    colours: dict[tuple[int, ...], str] = {}
    for line in read_lines(file):
        if not line.startswith('#'):
            label, _, rest = line.partition(':')
            try:
                red, green, blue = (int(value) for value in rest.split(':')[0].split(','))
            except ValueError:
                raise DataError(f"{file}: expected 'label:r,g,b:parts:actions', got '{line}'") from None
            colours[red, green, blue] = label
    classes = list(dict.fromkeys(colours.values()))
    component = SimpleNamespace(
        CLASSES=(), PALETTE=(), reduce_zero_label=False, label_map=None, colours=True, decoder=None)
    return classes, describe_labels(component, str(file), classes, colour_map=colours)[2]


def read_roboflow_masks(folders: list[tuple[Path, str]], faults: Faults) -> Read:
    """Reads ``NAME.jpg`` beside ``NAME_mask.png``, whose values ``_classes.csv`` names."""
    classes: list[str] = []
    read = []
    for folder, split in folders:
        table = folder / _CSV
        if not table.is_file():
            raise DataError(f"{table}: no such file; expected Roboflow's export as COCO segmentation or as masks")
        with open(table, newline='', encoding='utf-8-sig') as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row][1:]
        try:
            values = {int(row[0]): row[1] for row in rows}
        except (ValueError, IndexError):
            raise DataError(f"{table}: expected lines 'Pixel Value, Class'") from None
        classes += [name for name in values.values() if name not in classes]
        images = sorted((path for path in folder.iterdir() if path.suffix.lower() in IMAGES
                         and not path.name.endswith(_MASK)), key=lambda path: natural_key(path.name))
        read.append((images, split, values))

    def pictures() -> Iterator[Picture]:
        for images, split, values in read:
            labels = {value: classes.index(name) for value, name in values.items()}
            rule = LabelRule(len(classes), {VOID: VOID, **labels})
            for image in images:
                yield _labelled(image, image.with_name(f'{image.stem}{_MASK}'), rule, split)

    return Read(classes, pictures(), sum(len(images) for images, *_ in read), [folder for folder, _ in folders])


def _labelled(image: Path, mask: Path, rule: LabelRule, split: str) -> Picture:
    return Picture(image.name, image, split=split, labels=lambda: rule.read(str(mask))[0])
