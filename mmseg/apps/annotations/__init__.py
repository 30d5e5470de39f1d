"""Annotations of labelling tools as a data set in VSPW's layout.

A reader of a format (:data:`READERS`) gives pictures with their annotations; :mod:`~mmseg.apps.annotations.write` draws
them as label maps and writes the set.
"""

from mmseg.apps.annotations.read_coco import read_coco, read_roboflow
from mmseg.apps.annotations.read_cvat import read_cvat
from mmseg.apps.annotations.read_label_studio import read_label_studio
from mmseg.apps.annotations.read_labelme import read_labelme
from mmseg.apps.annotations.read_masks import read_voc
from mmseg.apps.annotations.records import Reader
from mmseg.apps.annotations.write import import_annotations, import_video

READERS: dict[str, Reader] = {
    'coco': read_coco, 'labelme': read_labelme, 'cvat': read_cvat, 'labelstudio': read_label_studio, 'voc': read_voc,
    'roboflow': read_roboflow,
}
"""What reads each format."""

__all__ = ['READERS', 'import_annotations', 'import_video']
