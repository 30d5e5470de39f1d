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
from dataclasses import asdict, dataclass, field
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

SOURCES = ('themask', 'mit', 'hf-mit', 'mask2former')
TARGETS = ('themask', 'reference', 'mit', 'hf-mit')
_MAX_BLOCKS = 64  # of one stage; MiT-B5 has 40

_Drop = tuple[str, str]  # pattern of names, why
_DEAD: tuple[_Drop, ...] = (
    (r'decode_head\.conv_seg\.(weight|bias)', 'dead in the reference: its head never calls it'),
    (
        r'decode_head\.predictor\.deformabel_transformer_cross_attention_layers\.reference_points\.(weight|bias)',
        'dead in the reference: its decoder never calls it',
    ),
)
_MIT_DROPS: tuple[_Drop, ...] = (
    (r'head\.(weight|bias)', 'the ImageNet classifier'),
    (r'decode_head\..*', "SegFormer's decode head"),
    (r'auxiliary_head\..*', "SegFormer's auxiliary head"),
)
_HF_DROPS: tuple[_Drop, ...] = (
    (r'classifier\.(weight|bias)', 'the ImageNet classifier'),
    (r'decode_head\..*', "SegFormer's decode head"),
)
_MASK2FORMER_DROPS: tuple[_Drop, ...] = (
    (r'backbone\..*', 'a backbone of another kind (ResNet or Swin)'),
    (r'criterion\.empty_weight', 'a constant of the loss; the config gives it'),
    (r'pixel_(mean|std)', 'image statistics; the data pipeline gives them'),
)
_MASK2FORMER_NAMES: tuple[tuple[str, str], ...] = (
    (r'sem_seg_head\.predictor\.static_query\.(.*)', r'decode_head.predictor.query_feat.\1'),  # decoder version 1
    (r'sem_seg_head\.(pixel_decoder|predictor)\.(.*)', r'decode_head.\1.\2'),
    (
        r'sem_seg_head\.(input_proj|transformer|mask_features|adapter_1|layer_1)\.(.*)',  # head version 1
        r'decode_head.pixel_decoder.\1.\2',
    ),
)


@dataclass
class ConversionReport:
    """Where every tensor went.

    Attributes:
        source: format of the given names.
        target: format of the written names.
        mapped: (name in the source, name in the target); joined names (``a + b``) were concatenated, and one name that
            stands twice was split.
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

    def as_dict(self) -> dict[str, Any]:
        """All lists, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        renamed = Counter((_pattern(old), _pattern(new)) for old, new in self.mapped)
        lines = [f'{self.source} -> {self.target}', f'mapped: {len(self.mapped)}']
        for (old, new), count in renamed.items():
            lines.append(f'  {count:4d} x {old}' + (f' -> {new}' if new != old else ''))
        for title, reasons in (('dropped', self.dropped), ('added', self.added)):
            lines.append(f'{title}: {len(reasons)}')
            grouped = Counter((_pattern(name), why) for name, why in reasons.items())
            lines += [f'  {count:4d} x {name}: {why}' for (name, why), count in grouped.items()]
        if self.checked:
            lines.append(f'shape mismatch (left out): {len(self.mismatched)}')
            lines += [f'  {k}: got {list(got)}, expected {list(want)}' for k, (got, want) in self.mismatched.items()]
            lines.append(f'missing: {len(self.missing)}')
            lines += [f'  {count:4d} x {name}' for name, count in Counter(map(_pattern, self.missing)).items()]
        else:
            lines.append('missing and shape mismatch: not checked (no config was given)')
        lines.append(f'unexplained: {len(self.unknown)}')
        return '\n'.join(lines + [f'  {name}' for name in self.unknown])


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
    signs = {
        'mask2former': r'sem_seg_head\.',
        'hf-mit': r'(segformer\.)?encoder\.patch_embeddings\.',
        'themask': r'decode_head\.pixel_decoder\.',
        'mit': r'(backbone\.)?patch_embed1\.',
    }
    for source, sign in signs.items():
        if any(re.match(sign, name) for name in names):
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
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}

    def take(new: str, *old: str) -> None:
        names = [waiting.pop(name) for name in old]
        ours[new] = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        origin[new] = ' + '.join(names)

    def drop_known(rules: Iterable[_Drop]) -> None:
        for pattern, why in rules:
            for name in [name for name in waiting if re.fullmatch(pattern, name)]:
                report.dropped[waiting.pop(name)] = why

    if report.source == 'themask':
        drop_known(_DEAD)
        for name in list(waiting):
            if name.startswith(('backbone.', 'decode_head.')):
                take(name, name)
    elif report.source == 'mit':
        drop_known(_MIT_DROPS)
        for name in list(waiting):
            if re.match(r'(backbone\.)?(patch_embed|block|norm)[1-4]\.', name):
                take('backbone.' + name.removeprefix('backbone.'), name)
    elif report.source == 'hf-mit':
        drop_known(_HF_DROPS)
        prefix = 'segformer.' if any(name.startswith('segformer.') for name in waiting) else ''
        for new, old in _hugging_face_names().items():
            theirs = tuple(prefix + name for name in old)
            if all(name in waiting for name in theirs):
                take('backbone.' + new, *theirs)
    else:
        drop_known(_MASK2FORMER_DROPS)
        for name in list(waiting):
            for pattern, replacement in _MASK2FORMER_NAMES:
                if re.fullmatch(pattern, name):
                    take(re.sub(pattern, replacement, name), name)
                    break
    report.unknown = sorted(waiting.values())
    return ours, origin


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
    if report.target in ('themask', 'reference'):
        converted = dict(ours)
        report.mapped = [(origin[name], name) for name in ours]
        if report.target == 'reference':
            dead = _dead_tensors(ours)
            converted.update(dead)
            report.added = dict.fromkeys(dead, 'dead in the reference, but its strict loading wants it')
        return converted
    converted = {}
    names = _hugging_face_names() if report.target == 'hf-mit' else {}
    for name, tensor in ours.items():
        local = name.removeprefix('backbone.')
        if local == name:
            report.dropped[origin[name]] = f'{report.target} holds a backbone only'
            continue
        if report.target == 'mit':
            theirs: tuple[str, ...] = (local,)
        else:
            theirs = tuple(f'segformer.{their}' for their in names[local])
        for their, part in zip(theirs, tensor.chunk(len(theirs))):
            converted[their] = part.clone() if len(theirs) > 1 else part
            report.mapped.append((origin[name], their))
    return converted


def _dead_tensors(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in the place of what the reference saves and never uses.

    Raises:
        CheckpointError: the checkpoint has no decode head to take the sizes from.
    """
    head = 'decode_head.predictor.'
    classes = ours.get(f'{head}class_embed.weight')
    if classes is None:
        raise CheckpointError(f'the reference format needs a whole model, and {head}class_embed.weight is not there')
    num_classes, channels = classes.shape[0] - 1, classes.shape[1]
    dead = {
        'decode_head.conv_seg.weight': classes.new_zeros(num_classes, channels, 1, 1),
        'decode_head.conv_seg.bias': classes.new_zeros(num_classes),
    }
    temporal = f'{head}deformabel_transformer_cross_attention_layers.'
    if any(name.startswith(temporal) for name in ours):
        dead[f'{temporal}reference_points.weight'] = classes.new_zeros(2, channels)
        dead[f'{temporal}reference_points.bias'] = classes.new_zeros(2)
    return dead


def _hugging_face_names() -> dict[str, tuple[str, ...]]:
    """Our name in a backbone -> the names in transformers' ``SegformerModel`` whose tensors it concatenates."""
    modules: dict[str, tuple[str, ...]] = {}
    for stage in range(4):
        modules[f'patch_embed{stage + 1}.proj'] = (f'encoder.patch_embeddings.{stage}.proj',)
        modules[f'patch_embed{stage + 1}.norm'] = (f'encoder.patch_embeddings.{stage}.layer_norm',)
        modules[f'norm{stage + 1}'] = (f'encoder.layer_norm.{stage}',)
        for i in range(_MAX_BLOCKS):
            block = f'encoder.block.{stage}.{i}'
            ours = f'block{stage + 1}.{i}'
            modules[f'{ours}.norm1'] = (f'{block}.layer_norm_1',)
            modules[f'{ours}.attn.q'] = (f'{block}.attention.self.query',)
            modules[f'{ours}.attn.kv'] = (f'{block}.attention.self.key', f'{block}.attention.self.value')
            modules[f'{ours}.attn.sr'] = (f'{block}.attention.self.sr',)
            modules[f'{ours}.attn.norm'] = (f'{block}.attention.self.layer_norm',)
            modules[f'{ours}.attn.proj'] = (f'{block}.attention.output.dense',)
            modules[f'{ours}.norm2'] = (f'{block}.layer_norm_2',)
            modules[f'{ours}.mlp.fc1'] = (f'{block}.mlp.dense1',)
            modules[f'{ours}.mlp.dwconv.dwconv'] = (f'{block}.mlp.dwconv.dwconv',)
            modules[f'{ours}.mlp.fc2'] = (f'{block}.mlp.dense2',)
    return {f'{new}.{kind}': tuple(f'{o}.{kind}' for o in old) for new, old in modules.items()
            for kind in ('weight', 'bias')}  # fmt: skip


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
    """The checkpoints that a file or a work dir stands for, by names for an error message."""
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
        _safetensors()
        from safetensors.torch import save

        unshared = {name: tensor.clone() for name, tensor in tensors.items()}
        # one entry: the library writes several in random order
        text = json.dumps(meta, default=lambda value: value.tolist() if hasattr(value, 'tolist') else str(value))
        write_atomically(path, save(unshared, {'meta': text} if meta else {'format': 'pt'}))
    else:
        save_checkpoint({'meta': meta, 'state_dict': tensors}, path)


def _safetensors() -> Any:
    try:
        import safetensors
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
