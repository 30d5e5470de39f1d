"""Checkpoints of other projects, in their names, into ours and back.

=============  ===========================================================  ==========================================
format         whose names                                                  what is taken
=============  ===========================================================  ==========================================
themask        this project; the 2023 reference, with its dead tensors      everything but the dead tensors
mit            SegFormer's ``mit_b*.pth`` and its whole segmentors          backbone
hf-mit         SegFormer in Hugging Face's transformers                     backbone
mask2former    Mask2Former in detectron2 (images and video)                 pixel decoder and mask decoder
=============  ===========================================================  ==========================================

Every tensor of the source ends in exactly one list of the :class:`ConversionReport`; a name that no rule knows stops
the conversion.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmseg.utils.checkpoint import (
    LATEST,
    checkpoint_files,
    open_checkpoint,
    open_for_reading,
    save_checkpoint,
    unwrapped_names,
    without_wrappers,
)
from mmseg.utils.errors import CheckpointError
from mmseg.utils.files import write_atomically
from mmseg.utils.numpy_pickles import CONSTRUCTORS

TARGETS = ('themask', 'reference', 'mit', 'hf-mit')
_MAX_BLOCKS = 64  # of one stage; MiT-B5 has 40


@dataclass(frozen=True)
class _Format:
    """The names of a format.

    Attributes:
        sign: how a name begins that tells the format.
        names: pattern -> our name; the first that fits counts.
        dropped: pattern of names that are left out -> why.
    """

    sign: str
    names: Mapping[str, str]
    dropped: Mapping[str, str]


_SEGFORMER_HEADS = {
    r'(head|classifier)\.(weight|bias)': 'the ImageNet classifier',
    r'decode_head\..*': "SegFormer's decode head",
    r'auxiliary_head\..*': "SegFormer's auxiliary head",
}
_TEMPORAL = 'decode_head.predictor.deformabel_transformer_cross_attention_layers.'
_FORMATS = {
    'themask': _Format(
        r'decode_head\.pixel_decoder\.',
        {r'((backbone|decode_head)\..*)': r'\1'},
        {
            r'decode_head\.conv_seg\.(weight|bias)': 'dead in the reference: its head never calls it',
            rf'{re.escape(_TEMPORAL)}reference_points\.(weight|bias)':
                'dead in the reference: its decoder never calls it',
        }),
    'mit': _Format(
        r'(backbone\.)?patch_embed1\.',
        {r'(?:backbone\.)?((patch_embed|block|norm)[1-4]\..*)': r'backbone.\1'},
        _SEGFORMER_HEADS),
    'hf-mit': _Format(r'(segformer\.)?encoder\.patch_embeddings\.', {}, _SEGFORMER_HEADS),
    'mask2former': _Format(
        r'sem_seg_head\.',
        {
            r'sem_seg_head\.predictor\.static_query\.(.*)': r'decode_head.predictor.query_feat.\1',  # decoder version 1
            r'sem_seg_head\.((pixel_decoder|predictor)\..*)': r'decode_head.\1',
            r'sem_seg_head\.((input_proj|transformer|mask_features|adapter_1|layer_1)\..*)':  # head version 1
                r'decode_head.pixel_decoder.\1',
        },
        {
            r'backbone\..*': 'a backbone of another kind (ResNet or Swin)',
            r'criterion\.empty_weight': 'a constant of the loss; the config gives it',
            r'pixel_(mean|std)': 'image statistics; the data pipeline gives them',
        }),
}
SOURCES = tuple(_FORMATS)
_HUGGING_FACE = {  # our module -> those of transformers' SegformerModel whose tensors it concatenates
    'patch_embed{}.proj': ['encoder.patch_embeddings.{}.proj'],
    'patch_embed{}.norm': ['encoder.patch_embeddings.{}.layer_norm'],
    'norm{}': ['encoder.layer_norm.{}'],
    'block{}.{}.norm1': ['encoder.block.{}.{}.layer_norm_1'],
    'block{}.{}.attn.q': ['encoder.block.{}.{}.attention.self.query'],
    'block{}.{}.attn.kv': ['encoder.block.{}.{}.attention.self.key', 'encoder.block.{}.{}.attention.self.value'],
    'block{}.{}.attn.sr': ['encoder.block.{}.{}.attention.self.sr'],
    'block{}.{}.attn.norm': ['encoder.block.{}.{}.attention.self.layer_norm'],
    'block{}.{}.attn.proj': ['encoder.block.{}.{}.attention.output.dense'],
    'block{}.{}.norm2': ['encoder.block.{}.{}.layer_norm_2'],
    'block{}.{}.mlp.fc1': ['encoder.block.{}.{}.mlp.dense1'],
    'block{}.{}.mlp.dwconv.dwconv': ['encoder.block.{}.{}.mlp.dwconv.dwconv'],
    'block{}.{}.mlp.fc2': ['encoder.block.{}.{}.mlp.dense2'],
}


@dataclass
class ConversionReport:
    """Where every tensor went.

    Attributes:
        source: format of the given names.
        target: format of the written names.
        mapped: (name in the source, name in the target); joined names (``a + b``) were concatenated, and one name that
            occurs twice was split.
        dropped: name in the source -> why it was left out.
        added: name in the target -> why it was made up.
        mismatched: name in the target -> (shape in the source, shape the model expects); left out.
        missing: names that the model expects and the source does not give.
        unknown: names in the source that no rule explains; with any of these nothing is written.
        checked: whether the names and shapes of a model were known, else ``mismatched`` and ``missing`` say nothing.
    """

    source: str
    target: str
    mapped: list[tuple[str, str]] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, tuple[Sequence[int], Sequence[int]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    checked: bool = False

    def __str__(self) -> str:
        renamed = [(_pattern(old), _pattern(new)) for old, new in self.mapped]
        lines = [f'{self.source} -> {self.target}']
        lines += _counted('mapped', (old if new == old else f'{old} -> {new}' for old, new in renamed))
        lines += _counted('dropped', (f'{_pattern(name)}: {why}' for name, why in self.dropped.items()))
        lines += _counted('added', (f'{_pattern(name)}: {why}' for name, why in self.added.items()))
        if self.checked:
            lines.append(f'shape mismatch (left out): {len(self.mismatched)}')
            lines += [f'  {k}: got {list(got)}, expected {list(want)}' for k, (got, want) in self.mismatched.items()]
            lines += _counted('missing', map(_pattern, self.missing))
        else:
            lines.append('missing and shape mismatch: not checked (no config was given)')
        return '\n'.join([*lines, f'unexplained: {len(self.unknown)}', *(f'  {name}' for name in self.unknown)])


def _counted(title: str, entries: Iterable[str]) -> list[str]:
    """The number of all entries, and each different one with its number."""
    counts = Counter(entries)
    return [f'{title}: {counts.total()}', *(f'  {count:4d} x {entry}' for entry, count in counts.items())]


def _pattern(name: str) -> str:
    """``name`` with every number between dots replaced by ``*``, to show many names as one."""
    return re.sub(r'(?<=\.)\d+(?=\.)', '*', name)


def convert_state_dict(
    state: Mapping[str, Tensor],
    source: str = 'auto',
    target: str = 'themask',
    expected: Mapping[str, Sequence[int]] | None = None,
    drop: Iterable[str] = (),
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Renames (and where needed concatenates or splits) the tensors of a checkpoint.

    Args:
        state: name -> tensor.
        source: one of :data:`SOURCES`, or ``auto``.
        target: one of :data:`TARGETS`; ``reference`` is ``themask`` with the dead tensors it wants.
        expected: name -> shape of the state dict of our model, to find missing names and wrong shapes.
        drop: wildcard patterns (``*``, ``?``) of names in the source to leave out.

    Returns:
        The tensors under their new names (empty when something is unexplained), and the report.

    Raises:
        CheckpointError: the format is not recognised or cannot be written from this source.
    """
    source = detect_format(state) if source == 'auto' else source
    for what, value, known in (('source', source, SOURCES), ('target', target, TARGETS)):
        if value not in known:
            raise CheckpointError(f"unknown {what} format '{value}' (known: {', '.join(known)})")
    report = ConversionReport(source, target, checked=expected is not None)
    ours, origin = _to_ours(state, report, tuple(drop))
    if expected is not None:
        _compare(ours, origin, expected, report)
    converted = _from_ours(ours, origin, report)
    return ({} if report.unknown else converted), report


def detect_format(names: Iterable[str]) -> str:
    """The format whose typical names occur in ``names``.

    Raises:
        CheckpointError: none is recognised; the message shows some of the names.
    """
    names = list(unwrapped_names(names).values())
    for source, kind in _FORMATS.items():
        if any(re.match(kind.sign, name) for name in names):
            return source
    shown = ', '.join(names[:5]) or 'no tensor at all'
    raise CheckpointError(f'the checkpoint is of no known format ({", ".join(SOURCES)}); it begins with: {shown}')


def _to_ours(
    state: Mapping[str, Tensor], report: ConversionReport, drop: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under our names, and for each of these names where it came from."""
    waiting: dict[str, str] = {}  # name without the wrappers' prefixes -> name in the file
    for name, own in unwrapped_names(state).items():
        if any(fnmatchcase(name, pattern) for pattern in drop):
            report.dropped[name] = 'as asked'
        else:
            waiting[own] = name
    for pattern, why in _FORMATS[report.source].dropped.items():
        for name in [name for name in waiting if re.fullmatch(pattern, name)]:
            report.dropped[waiting.pop(name)] = why
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for new, theirs in _renamed(waiting, report.source).items():
        if waiting.keys() >= set(theirs):
            names = [waiting.pop(name) for name in theirs]
            ours[new] = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
            origin[new] = ' + '.join(names)
    report.unknown = sorted(waiting.values())
    return ours, origin


def _renamed(names: Iterable[str], source: str) -> dict[str, tuple[str, ...]]:
    """Our name -> the names in a format whose tensors it concatenates."""
    if source == 'hf-mit':
        prefix = 'segformer.' if any(name.startswith('segformer.') for name in names) else ''
        return {f'backbone.{new}': tuple(prefix + name for name in old) for new, old in _hugging_face_names().items()}
    found = ((re.fullmatch(pattern, name), new) for name in names for pattern, new in _FORMATS[source].names.items())
    return {match.expand(new): (match[0],) for match, new in found if match}


def _compare(
    ours: dict[str, Tensor], origin: dict[str, str], expected: Mapping[str, Sequence[int]], report: ConversionReport
) -> None:
    """Takes out of ``ours`` what the model does not expect, and reports what it does not get."""
    for name in list(ours):
        if name not in expected:
            report.dropped[origin[name]] = 'not in the model of the config'
            del ours[name]
        elif tuple(ours[name].shape) != tuple(expected[name]):
            report.mismatched[name] = (list(ours[name].shape), list(expected[name]))
            del ours[name]
    report.missing = [name for name in expected if name not in ours and name not in report.mismatched]


def _from_ours(ours: Mapping[str, Tensor], origin: Mapping[str, str], report: ConversionReport) -> dict[str, Tensor]:
    """Tensors under the names of ``report.target``; fills in ``mapped`` and ``added``."""
    converted: dict[str, Tensor] = {}
    hugging_face = _hugging_face_names() if report.target == 'hf-mit' else {}
    for name, tensor in ours.items():
        local = name.removeprefix('backbone.')
        if report.target in ('themask', 'reference'):
            theirs = [name]
        elif local == name:
            report.dropped[origin[name]] = f'{report.target} holds a backbone only'
            continue
        else:
            theirs = [f'segformer.{their}' for their in hugging_face[local]] if hugging_face else [local]
        parts = [part.clone() for part in tensor.chunk(len(theirs))] if len(theirs) > 1 else [tensor]
        converted |= zip(theirs, parts)
        report.mapped += [(origin[name], their) for their in theirs]
    if report.target == 'reference':
        dead = _dead_tensors(ours)
        converted |= dead
        report.added = dict.fromkeys(dead, 'dead in the reference, but its strict loading wants it')
    return converted


def _dead_tensors(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in the place of what the reference saves and never uses.

    Raises:
        CheckpointError: the checkpoint has no decode head to take the sizes from.
    """
    key = 'decode_head.predictor.class_embed.weight'
    if key not in ours:
        raise CheckpointError(f'the reference format needs a whole model, and {key} is not there')
    num_classes, channels = ours[key].shape[0] - 1, ours[key].shape[1]
    shapes = {'decode_head.conv_seg.weight': (num_classes, channels, 1, 1), 'decode_head.conv_seg.bias': (num_classes,)}
    if any(name.startswith(_TEMPORAL) for name in ours):
        shapes |= {f'{_TEMPORAL}reference_points.weight': (2, channels), f'{_TEMPORAL}reference_points.bias': (2,)}
    return {name: ours[key].new_zeros(shape) for name, shape in shapes.items()}


def _hugging_face_names() -> dict[str, tuple[str, ...]]:
    """Our name in a backbone -> the names in transformers' ``SegformerModel`` whose tensors it concatenates."""
    return {
        f'{ours.format(stage + 1, block)}.{kind}': tuple(f'{their.format(stage, block)}.{kind}' for their in theirs)
        for stage in range(4) for block in range(_MAX_BLOCKS) for ours, theirs in _HUGGING_FACE.items()
        for kind in ('weight', 'bias')
    }


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta data of a checkpoint file, without running any code that the file may hold.

    Args:
        path: ``.safetensors``, a ``.pkl`` of numpy arrays as detectron2 publishes them, a file of ``torch.save``, or a
            work dir (then its newest whole checkpoint).

    Returns:
        name -> tensor on the CPU, and the ``meta`` dict (empty where there is none).

    Raises:
        CheckpointError: the file is missing, damaged, holds other objects than tensors and plain data, or needs the
            package ``safetensors`` and it is not installed.
    """
    path = Path(path).expanduser()
    meta: Any = {}
    if path.suffix == '.safetensors':
        safetensors = _safetensors()
        try:
            with open_for_reading(path), safetensors.safe_open(str(path), framework='pt') as file:
                state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                meta = dict(json.loads((file.metadata() or {}).get('meta', '{}')))
        except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"'{path}' is no whole safetensors file: {error}") from error
    else:
        checkpoint = {'state_dict': _read_arrays(path)} if path.suffix == '.pkl' else open_checkpoint(path)[1]
        state, meta = checkpoint['state_dict'], checkpoint.get('meta', {})
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"'{path}' is no checkpoint of weights: {name!r} is a {type(value).__name__}")
    return without_wrappers(state, path), dict(meta)


def files_of(source: str | Path) -> dict[str, Path]:
    """The checkpoints in a work dir, or a single one, by names for an error message."""
    source = Path(source).expanduser()
    files = [*checkpoint_files(source), source / LATEST] if source.is_dir() else [source]
    return {f"checkpoint '{file}'": file for file in files}


def write_weights(path: str | Path, state: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Writes weights so that the file is whole or not there; equal weights give equal bytes.

    Args:
        path: ``.safetensors`` for that format, else ``torch.save`` of ``{'meta', 'state_dict'}``, as mmcv does.
        state: name -> tensor.
        meta: plain data to keep beside the weights.
    """
    path, meta = Path(path).expanduser(), dict(meta or {})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if path.suffix == '.safetensors':
        unshared = {name: tensor.clone() for name, tensor in tensors.items()}
        # one entry: the library writes several in random order
        text = json.dumps(meta, default=lambda value: value.tolist() if hasattr(value, 'tolist') else str(value))
        write_atomically(path, _safetensors().torch.save(unshared, {'meta': text} if meta else {'format': 'pt'}))
    else:
        save_checkpoint({'meta': meta, 'state_dict': tensors}, path)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError('.safetensors files need the package safetensors: pip install safetensors') from error
    return safetensors


class _ArrayUnpickler(pickle._Unpickler):
    """Builds numpy arrays and plain data; any other class in the file is refused, so no code of the file can run.

    In Python, as the one in C takes gigabytes for a large number in the file.
    """

    _ALLOWED = {
        **CONSTRUCTORS,
        'collections.OrderedDict': dict,
        '_codecs.encode': lambda text, encoding: str(text).encode('latin1'),  # bytes in pickles of protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        """The allowed class or function of that name."""
        try:
            return self._ALLOWED[f'{module}.{name}']
        except KeyError:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}') from None


def _read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a pickle, or those under its key ``model``, as tensors."""
    with open_for_reading(path) as file:
        try:
            loaded = _ArrayUnpickler(file, encoding='latin1').load()
            weights = loaded['model'] if isinstance(loaded.get('model'), Mapping) else loaded
            return {
                name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
                for name, value in weights.items()
            }
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"'{path}' is not a pickle of numpy arrays only, and others may run code: {reason}") from error
