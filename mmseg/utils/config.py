"""Config files: read, override, check.

The schema is that of mmcv 1.x and mmsegmentation 0.x: Python files with ``_base_``, sections such as ``data``,
``model``, ``optimizer``, and components that are named by ``type``.  A wrong key must not pass in silence
(``runner.max_iter=5`` would train for 160,000 iterations), so every key of a section, every argument of a component and
every override is checked before anything is built.
"""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import Registry

from mmseg.registry import (
    BACKBONES,
    DATASETS,
    HEADS,
    HOOKS,
    PIPELINES,
    PIXEL_DECODERS,
    SEGMENTORS,
    TRANSFORMER_DECODERS,
    arguments_of,
    find,
    nearest,
)
from mmseg.registry import check_arguments as _check_arguments
from mmseg.utils.config_variables import fill_in_variables
from mmseg.utils.errors import ConfigError

_NUMBER = (int, float)
_OPTIONAL_TEXT = (str, type(None))
ANY = object()
"""Marks a place whose keys are the user's or are checked by the component that reads them."""

SECTIONS: dict[str, Any] = {
    'data': {
        'samples_per_gpu': int,
        'workers_per_gpu': int,
        'persistent_workers': bool,
        'pin_memory': bool,
        'stall_seconds': _NUMBER,
        'train': DATASETS,
        'val': DATASETS,
        'test': DATASETS,
    },
    'model': SEGMENTORS,
    'optimizer': ANY,
    'optimizer_config': {
        'grad_clip': {'max_norm': _NUMBER, 'norm_type': _NUMBER},
        'cumulative_iters': int,
        'type': str,
        'loss_scale': ANY,
    },
    'lr_config': {
        'policy': str,
        'power': _NUMBER,
        'min_lr': _NUMBER,
        'by_epoch': bool,
        'warmup': _OPTIONAL_TEXT,
        'warmup_iters': int,
        'warmup_ratio': _NUMBER,
        'warmup_by_epoch': bool,
    },
    'runner': {'type': str, 'max_iters': int},
    'checkpoint_config': {
        'by_epoch': bool,
        'interval': int,
        'max_keep_ckpts': int,
        'save_last': bool,
        'save_optimizer': bool,
        'meta': ANY,
        'out_dir': _OPTIONAL_TEXT,
        'type': str,
        'create_symlink': bool,
        'sync_buffer': bool,
    },
    'evaluation': {
        'interval': int,
        'metric': (str, list, tuple),
        'save_best': (*_OPTIONAL_TEXT, bool),
        'rule': _OPTIONAL_TEXT,
        'by_epoch': bool,
        'start': (int, type(None)),
        'pre_eval': bool,
        'efficient_test': bool,
        'broadcast_bn_buffer': bool,
        'gpu_collect': bool,
        'tmpdir': _OPTIONAL_TEXT,
    },
    'log_config': {'interval': int, 'hooks': [HOOKS]},
    'custom_hooks': [HOOKS],
    'dist_params': {'backend': str, 'port': ANY},
    'fp16': {'dtype': str, 'loss_scale': ANY},
    'finetune': {
        'train': (list, tuple, str),
        'fresh': (list, tuple, str),
        'copy': ANY,
        'frozen_eval': bool,
    },
    'cudnn_benchmark': bool,
    'float32_matmul_precision': _OPTIONAL_TEXT,
    'find_unused_parameters': bool,
    'workflow': (list, tuple),
    'log_level': str,
    'load_from': _OPTIONAL_TEXT,
    'resume_from': _OPTIONAL_TEXT,
    'finetune_from': _OPTIONAL_TEXT,
    'work_dir': _OPTIONAL_TEXT,
    'seed': (int, type(None)),
    'deterministic': bool,
    'gpu_ids': ANY,
    'nan_loss': str,
}
"""What each section of a config may hold: a type, a dict of keys, a registry (a component stands there), or ``ANY``."""

_COMPONENT_KEYS = {
    'backbone': BACKBONES,
    'decode_head': HEADS,
    'pixel_decoder_cfg': PIXEL_DECODERS,
    'transformer_decoder_cfg': TRANSFORMER_DECODERS,
    'dataset': DATASETS,
}
_PIPELINE_KEYS = ('pipeline', 'transforms')

logger = logging.getLogger('mmseg')


class OptionsAction(DictAction):
    """``--options K=V ...``: numbers, booleans, ``None`` and lists are read as such, all else is text (as in mmcv)."""

    names = ('--options', '--cfg-options')  # of mmsegmentation 0.x, and of later ones

    @classmethod
    def add_to(
        cls, parser: argparse._ActionsContainer, help: str = 'change the config, as in data.test.test_size=4'
    ) -> None:
        """Gives a command line, or a group of it, the option; ``options`` is a dict, empty where it is not used."""
        parser.add_argument(*cls.names, nargs='+', action=cls, default={}, metavar='K=V', help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Adds the pairs to those of earlier ``--options``; a word that is none ends the command."""
        for word in values:
            if not word.partition('=')[0] or '=' not in word:
                parser.error(f"argument {option_string}: expected KEY=VALUE, got '{word}'")
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # brackets that do not close
            parser.error(f'argument {option_string}: {error}')


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Reads a config file, applies overrides, and checks every key.

    Args:
        path: a Python config file, with or without ``_base_``.
        options: dotted keys to values, as ``--options`` gives them: ``{'runner.max_iters': 5}``.

    Raises:
        ConfigError: the file is missing or broken; a key, argument, type name or override is unknown; a value of a
            section has a wrong type.
    """
    if not Path(path).is_file():
        raise ConfigError(f"config file '{path}' does not exist (looked from {Path.cwd()})")
    try:
        cfg = Config.fromfile(str(path), lazy_import=False)  # a file with imports is run, as by mmcv
    except Exception as error:  # a config is code: anything may come out of it
        raise ConfigError(f"config file '{path}' cannot be read: {type(error).__name__}: {error}") from error
    override(cfg, options or {})
    check_config(cfg)
    return cfg


def override(cfg: Config, options: Mapping[str, Any]) -> None:
    """Changes ``cfg`` in place, and fills in its variables.

    Args:
        cfg: a config.
        options: dotted keys to values, as in :func:`load_config`.

    Raises:
        ConfigError: a key that is neither there nor known at its place, or stands inside a plain value.
    """
    for key in options:
        _check_override(cfg, key)
    try:
        cfg.merge_from_dict(dict(options))
    except (KeyError, TypeError) as error:
        raise ConfigError(f'--options: {error}') from None
    fill_in_variables(cfg)


def check_config(cfg: Config) -> None:
    """Checks sections, components and their arguments; warns of top-level names that look like slips.

    Raises:
        ConfigError: naming the key, the nearest known one, and where it stands.
    """
    for key in cfg:
        if key in SECTIONS:
            if cfg[key] is not None:
                _check_value(cfg[key], SECTIONS[key], key)
            continue
        slip = difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.8)
        if slip:
            logger.warning("config: top-level '%s' is nobody's key; did you mean '%s'?", key, slip[0])


def _check_value(value: Any, schema: Any, where: str) -> None:
    if schema is ANY or value is None:
        return
    if isinstance(schema, Registry):
        _check_component(value, schema, where)
    elif isinstance(schema, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f'{where}: expected a list of dicts, got {value!r}')
        for i, item in enumerate(value):
            _check_component(item, schema[0], f'{where}[{i}]')
    elif isinstance(schema, dict):
        if not isinstance(value, Mapping):
            raise ConfigError(f'{where}: expected a dict with keys {", ".join(schema)}, got {value!r}')
        for key, inner in value.items():
            if key not in schema:
                raise ConfigError(f"{where}.{key}: unknown key '{key}' in {where}{nearest(key, schema)}")
            _check_value(inner, schema[key], f'{where}.{key}')
    else:
        types = schema if isinstance(schema, tuple) else (schema,)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = ' or '.join(t.__name__ for t in types if t is not type(None))
            raise ConfigError(f'{where}: expected {wanted}, got {value!r} ({type(value).__name__})')


def _check_component(cfg: Any, registry: Registry, where: str) -> None:
    """Type and arguments of a component, and of the data sets, steps and parts inside it."""
    if isinstance(cfg, (list, tuple)) and registry is DATASETS:  # mmseg 0.x: a list of data sets is their concatenation
        for i, item in enumerate(cfg):
            _check_component(item, registry, f'{where}[{i}]')
        return
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ConfigError(f"{where}: expected a dict with a 'type' key for a {registry.name}, got {cfg!r}")
    component = find(registry, cfg['type'], where)
    beside = ('type', 'priority') if registry is HOOKS else ('type',)
    _check_arguments(component, {k: v for k, v in cfg.items() if k not in beside}, where)
    for key, value in cfg.items():
        if key in _COMPONENT_KEYS and isinstance(value, Mapping):
            _check_component(value, _COMPONENT_KEYS[key], f'{where}.{key}')
        elif key == 'datasets':
            _check_component(value, DATASETS, f'{where}.{key}')
        elif key in _PIPELINE_KEYS and isinstance(value, (list, tuple)):
            for i, step in enumerate(value):
                _check_component(step, PIPELINES, f'{where}.{key}[{i}]')


def _check_override(cfg: Config, dotted: str) -> None:
    """An override must meet an existing key, or one that its place knows."""
    place: Any = dict(cfg.items())
    schema: Any = SECTIONS
    walked = ''
    for part in dotted.split('.'):
        if isinstance(place, (list, tuple)):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(f"--options {dotted}: '{part}' is no index of the list {walked} of {len(place)}")
            place, schema = place[int(part)], ANY
        elif isinstance(place, Mapping) and part in place:
            schema = schema.get(part, ANY) if isinstance(schema, dict) else ANY
            place = place[part]
        else:
            schema = _known_key(place, schema, part, dotted, walked)
            place = None
        walked = f'{walked}.{part}' if walked else part


def _known_key(place: Any, schema: Any, part: str, dotted: str, walked: str) -> Any:
    """Schema of the new key ``part`` at ``place``; a ConfigError where the place does not know it."""
    if isinstance(schema, dict):
        known = set(schema) | (set(place) if isinstance(place, Mapping) else set())
    elif isinstance(place, Mapping) and 'type' in place:
        component = _find_anywhere(place['type'])
        if component is None:
            return ANY
        known = arguments_of(component) | {'type'}
    elif schema is ANY or isinstance(schema, Registry):
        return ANY
    else:
        raise ConfigError(f"--options {dotted}: '{walked}' is a plain value and has no key '{part}'")
    if part not in known:
        stands = f'in {walked}' if walked else 'at the top level'
        raise ConfigError(f"--options {dotted}: unknown key '{part}' {stands}{nearest(part, known)}")
    return schema.get(part, ANY) if isinstance(schema, dict) else ANY


def _find_anywhere(name: Any) -> Any:
    """The component of that name in any registry, or None; its section's own check names an unknown type."""
    from mmseg import registry as registries

    for registry in vars(registries).values():
        if isinstance(registry, Registry) and isinstance(name, str) and (component := registry.get(name)) is not None:
            return component
    return None
