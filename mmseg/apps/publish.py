"""Publishing a trained model: weights alone, the hash in the file name, and a model card."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmseg.apps.convert import files_of, read_weights, write_weights
from mmseg.config import config_inputs, load_config
from mmseg.utils.errors import CheckpointError, ConfigError
from mmseg.utils.files import named_errors, refuse_overwriting, write_atomically
from mmseg.version import __version__

_HASH_DIGITS = 8
_SUMMARY = ('mIoU', 'mIoU_vspw', 'fwIoU', 'aAcc', 'mAcc', 'mDice', 'VC8', 'VC16')
_KEPT_META = ('CLASSES', 'PALETTE', 'config', 'iter')
_PARTS = ('backbone', 'decode_head.pixel_decoder', 'decode_head.predictor')


@dataclass(frozen=True)
class PublishedModel:
    """Where a model was published.

    Attributes:
        weights: the file; its name holds the first eight hexadecimal digits of ``sha256``.
        card: the model card, Markdown.
        sha256: of the file.
    """

    weights: Path
    card: Path
    sha256: str


def publish_model(
    checkpoint: str | Path, out: str | Path, config: str | Path | None = None,
    metrics: Mapping[str, Any] | str | Path | None = None, data: str | None = None,
) -> PublishedModel:
    """Writes the weights of a checkpoint, without optimizer and other training state, and a model card beside them.

    The same weights give the same file and hence the same name.

    Args:
        checkpoint: file of training.
        out: ``folder/name.pth`` or ``.safetensors``; becomes ``folder/name-<hash>.pth``.
        config: the config file of the model; goes into the card as a whole, overrides and bases resolved.
        metrics: what ``tools/test.py`` writes as JSON, or that file: scores as fractions.
        data: the data set and split of the metrics, for the card.

    Raises:
        CheckpointError: the checkpoint cannot be read or holds no model.
        ConfigError: the config or the metrics cannot be read, or a file to be written is one of the files read.
    """
    state, meta = read_weights(checkpoint)
    if not state:
        raise CheckpointError(f"'{checkpoint}' holds no weights")
    described = {**meta, 'config': load_config(config).pretty_text} if config else meta
    inputs: dict[str, str | Path] = {**config_inputs(config), **files_of(checkpoint)}
    if isinstance(metrics, (str, Path)):
        inputs['file of metrics'] = metrics
        metrics = _read_metrics(Path(metrics).expanduser())
    out = Path(out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(out, instead=True), tempfile.TemporaryDirectory(prefix=f'.{out.stem}.', dir=out.parent) as folder:
        unnamed = Path(folder) / f'weights{out.suffix}'
        write_weights(unnamed, state, {key: meta[key] for key in _KEPT_META if key in meta})
        digest, size = hashlib.sha256(unnamed.read_bytes()).hexdigest(), unnamed.stat().st_size
        weights = out.with_name(f'{out.stem}-{digest[:_HASH_DIGITS]}{out.suffix}')
        card = weights.with_suffix('.md')
        refuse_overwriting({'weights': weights, 'card': card}, inputs)
        text = Path(folder) / 'card.md'
        facts = {'File': f'`{weights.name}` ({size / 2**20:.1f} MiB)', 'SHA-256': f'`{digest}`', **_facts(state, meta)}
        write_atomically(
            text, _card(out.stem, weights.name, facts, config or 'CONFIG.py', _results(metrics, data), described))
        os.replace(unnamed, weights)
        os.replace(text, card)
    return PublishedModel(weights, card, digest)


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ConfigError(f"'{path}' is no JSON file of metrics: {error}") from error
    if not isinstance(metrics, dict):
        raise ConfigError(f"'{path}' holds a {type(metrics).__name__}, expected the metrics that tools/test.py writes")
    for key in _SUMMARY:
        if not isinstance(metrics.get(key), float | int | None):
            raise ConfigError(f"'{path}': {key} is {metrics[key]!r}, expected a fraction or null")
    return metrics


def _facts(state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, str]:
    """What the weights say about themselves."""
    counts = Counter(dict.fromkeys(_PARTS, 0))
    for key, tensor in state.items():
        counts[next((part for part in _PARTS if key.startswith(f'{part}.')), 'other')] += tensor.numel()
    parts = ', '.join(f'{part.rsplit(".", 1)[-1]} {count / 1e6:.2f} M' for part, count in counts.items() if count)
    facts = {
        'Parameters': f'{counts.total() / 1e6:.2f} M ({parts})',
        'Number type': ', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in state.values()})),
        'Made with': f'THE-Mask {__version__}',
    }
    return {**facts, 'Iterations': f'{meta["iter"]:,}'} if isinstance(meta.get('iter'), int) else facts


def _results(metrics: Mapping[str, Any] | None, data: str | None) -> str:
    if metrics is None:
        return '## Results\n\nNo metrics were given when this card was written.'
    rows = {key: f'{100 * metrics[key]:.2f}' for key in _SUMMARY if metrics.get(key) is not None}
    return f'## Results{f" on {data}" if data else ""}\n\n{_table("| metric | per cent |", rows)}'


def _table(head: str, rows: Mapping[str, str]) -> str:
    return '\n'.join([head, '|---|---|', *(f'| {key} | {value} |' for key, value in rows.items())])


def _card(
    name: str, weights: str, facts: Mapping[str, str], config: str | Path, results: str, meta: Mapping[str, Any]
) -> str:
    """The model card; says only what the files say."""
    sections = [
        f'---\ntags: [video-semantic-segmentation, the-mask]\nlibrary_name: themask\nmodel_name: {name}\n---',
        f'# {name}',
        'THE-Mask (BMVC 2023, arXiv 2309.08020): video semantic segmentation by mask classification.',
        _table('| | |', facts),
        f'## Use\n\n```python\nfrom mmseg.apis import init_segmentor, segment_video\n\n'
        f"model = init_segmentor('{config}', '{weights}')\n"
        f"for frame, label in segment_video(model, 'video.mp4'):\n    ...\n```\n\n"
        f'```\npython tools/video_demo.py {config} {weights} video.mp4 --out out.mp4\n```',
        results,
        '## Limits\n\nThe model gives one of its classes to every pixel, also where none fits. '
        'It has not been judged for uses in which a wrong label can harm someone.',
    ]
    if meta.get('CLASSES'):
        sections.append(f'## Classes\n\n{len(meta["CLASSES"])}: {", ".join(map(str, meta["CLASSES"]))}')
    if meta.get('config'):
        sections.append(f'## Config\n\n```python\n{str(meta["config"]).strip()}\n```')
    return '\n\n'.join(sections) + '\n'
