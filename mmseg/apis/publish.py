"""Publishing a trained model: weights alone, the hash in the file name, and a model card."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmseg.apis.convert import read_weights, write_weights
from mmseg.utils.config import load_config
from mmseg.utils.errors import CheckpointError
from mmseg.utils.files import write_atomically
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
    checkpoint: str | Path,
    out: str | Path,
    config: str | Path | None = None,
    metrics: Mapping[str, Any] | None = None,
    data: str | None = None,
) -> PublishedModel:
    """Writes the weights of a checkpoint, without optimizer and other training state, and a model card beside them.

    The same weights give the same file and hence the same name.

    Args:
        checkpoint: file of training.
        out: ``folder/name.pth`` or ``.safetensors``; becomes ``folder/name-<hash>.pth``.
        config: the config file of the model; goes into the card as a whole, overrides and bases resolved.
        metrics: what ``tools/test.py`` writes as JSON: scores as fractions.
        data: the data set and split of the metrics, for the card.

    Raises:
        CheckpointError: the checkpoint cannot be read or holds no model.
        ConfigError: the config cannot be read.
    """
    state, meta = read_weights(checkpoint)
    if not state:
        raise CheckpointError(f"'{checkpoint}' holds no weights")
    cfg_text = load_config(config).pretty_text if config else None
    out = Path(out)
    unnamed = out.with_name(f'.{out.stem}.unnamed{out.suffix}')
    write_weights(unnamed, state, {key: meta[key] for key in _KEPT_META if key in meta})
    digest = hashlib.sha256(unnamed.read_bytes()).hexdigest()
    weights = out.with_name(f'{out.stem}-{digest[:_HASH_DIGITS]}{out.suffix}')
    unnamed.replace(weights)
    card = weights.with_suffix('.md')
    write_atomically(card, _card(weights, out.stem, digest, state, meta, cfg_text, config, metrics, data))
    return PublishedModel(weights, card, digest)


def _card(
    weights: Path,
    name: str,
    digest: str,
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    cfg_text: str | None,
    config: str | Path | None,
    metrics: Mapping[str, Any] | None,
    data: str | None,
) -> str:
    """The model card; says only what the files say."""
    sizes = Counter(dict.fromkeys(_PARTS, 0))
    for key, tensor in state.items():
        sizes[next((part for part in _PARTS if key.startswith(f'{part}.')), 'other')] += tensor.numel()
    facts = {
        'File': f'`{weights.name}` ({weights.stat().st_size / 2**20:.1f} MiB)',
        'SHA-256': f'`{digest}`',
        'Parameters': f'{sum(sizes.values()) / 1e6:.2f} M ('
        + ', '.join(f'{part.rsplit(".", 1)[-1]} {size / 1e6:.2f} M' for part, size in sizes.items() if size) + ')',
        'Number type': ', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in state.values()})),
        'Made with': f'THE-Mask {__version__}',
    }
    if 'iter' in meta:
        facts['Iterations'] = f'{meta["iter"]:,}'
    config_name = config or 'CONFIG.py'
    sections = [
        f'---\ntags: [video-semantic-segmentation, the-mask]\nlibrary_name: themask\nmodel_name: {name}\n---',
        f'# {name}',
        'THE-Mask (BMVC 2023, arXiv 2309.08020): video semantic segmentation by mask classification.',
        '\n'.join(['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in facts.items())]),
        f'## Use\n\n```python\nfrom mmseg.apis import init_segmentor, segment_video\n\n'
        f"model = init_segmentor('{config_name}', '{weights.name}')\n"
        f"for frame, label in segment_video(model, 'video.mp4'):\n    ...\n```\n\n"
        f'```\npython tools/video_demo.py {config_name} {weights.name} video.mp4 --out out.mp4\n```',
    ]
    if metrics is not None:
        rows = [f'| {key} | {100 * metrics[key]:.2f} |' for key in _SUMMARY if metrics.get(key) is not None]
        measured = f' on {data}' if data else ''
        sections.append('\n'.join([f'## Results{measured}\n', '| metric | per cent |', '|---|---|', *rows]))
    else:
        sections.append('## Results\n\nNo metrics were given when this card was written.')
    sections.append(
        '## Limits\n\nThe model gives one of its classes to every pixel, also where none fits. '
        'It has not been judged for uses in which a wrong label can harm someone.')
    if meta.get('CLASSES'):
        sections.append(f'## Classes\n\n{len(meta["CLASSES"])}: {", ".join(map(str, meta["CLASSES"]))}')
    text = cfg_text or meta.get('config')
    if text:
        sections.append(f'## Config\n\n```python\n{str(text).strip()}\n```')
    return '\n\n'.join(sections) + '\n'
