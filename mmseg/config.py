"""Config files: read, override, check.

The schema is that of mmcv 1.x and mmsegmentation 0.x: Python files with ``_base_``, sections such as ``data``,
``model``, ``optimizer``, and components that are named by ``type``.  A wrong key must not pass in silence
(``runner.max_iter=5`` would train for 160,000 iterations), so every key of a section, every argument of a component and
every override is checked before anything is built.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import Registry

from mmseg.config_variables import fill_in_variables
from mmseg.registry import (
    BACKBONES,
    DATASETS,
    HEADS,
    HOOKS,
    PIPELINES,
    PIXEL_DECODERS,
    SEGMENTORS,
    TRANSFORMER_DECODERS,
    check_component,
    registered,
    unknown_argument,
)
from mmseg.utils.arguments import Count, Index, Range, Share, Weight, check_value, fits
from mmseg.utils.errors import ConfigError, nearest

_Positive = Annotated[float, Range(0, math.inf, above=True)]
Port = Annotated[int, Range(1, 65535)]
_Level = Literal['DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL']
_DELETE = '_delete_'
ANY = object()
"""Marks a place whose keys are the user's or are checked by the component that reads them."""

SECTIONS: dict[str, Any] = {
    'data': {
        'samples_per_gpu': Count,
        'workers_per_gpu': Annotated[int, Range(0, 1024)],
        'persistent_workers': bool,
        'pin_memory': bool,
        'stall_seconds': _Positive,
        'train': DATASETS,
        'val': DATASETS,
        'test': DATASETS,
    },
    'model': SEGMENTORS,
    'train_cfg': Mapping[str, Any] | None,
    'test_cfg': Mapping[str, Any] | None,
    'optimizer': Mapping[str, Any],
    'optimizer_config': {
        'grad_clip': {'max_norm': _Positive, 'norm_type': _Positive},
        'cumulative_iters': Count,
        'type': str,
        'loss_scale': ANY,
    },
    'lr_config': {
        'policy': str,
        'power': Weight,
        'min_lr': Weight,
        'by_epoch': bool,
        'warmup': str | None,
        'warmup_iters': Index,
        'warmup_ratio': Share,
        'warmup_by_epoch': bool,
    },
    'runner': {'type': str, 'max_iters': Count},
    'checkpoint_config': {
        'by_epoch': bool,
        'interval': int,
        'max_keep_ckpts': int,
        'save_last': bool,
        'save_optimizer': bool,
        'meta': Mapping[str, Any] | None,
        'out_dir': str | None,
        'type': str,
        'create_symlink': bool,
        'sync_buffer': bool,
    },
    'evaluation': {
        'interval': int,
        'metric': str | Sequence[str],
        'save_best': str | bool | None,
        'rule': str | None,
        'by_epoch': bool,
        'start': int | None,
        'pre_eval': bool,
        'efficient_test': bool,
        'broadcast_bn_buffer': bool,
        'gpu_collect': bool,
        'tmpdir': str | None,
    },
    'log_config': {'interval': int, 'hooks': [HOOKS]},
    'custom_hooks': [HOOKS],
    'dist_params': {'backend': str, 'port': Port},
    'fp16': {'dtype': str, 'loss_scale': ANY},
    'finetune': {
        'train': str | Sequence[str],
        'fresh': str | Sequence[str],
        'copy': Mapping[str, str | Sequence[str]] | None,
        'frozen_eval': bool,
    },
    'cudnn_benchmark': bool,
    'float32_matmul_precision': str | None,
    'find_unused_parameters': bool,
    'workflow': Sequence[tuple[str, int]],
    'log_level': _Level,
    'load_from': str | None,
    'resume_from': str | None,
    'finetune_from': str | None,
    'work_dir': str | None,
    'seed': int | None,
    'deterministic': bool,
    'gpu_ids': int | Sequence[int] | None,
    'nan_loss': Literal['stop', 'skip'],
}
"""What each section may hold: an annotation, a dict of keys, a registry (of the component that stands there), a list of
one registry, or ``ANY``."""

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
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            raise ConfigError(f"config file '{path}' is a folder; name the .py file in it")
        if not path.exists():
            raise ConfigError(f"config file '{path}' does not exist (looked from {Path.cwd()})")
        cfg = Config.fromfile(str(path), lazy_import=False)  # a file with imports is run, as by mmcv
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file '{path}' is no text in UTF-8 ({error}); save it as such") from error
    except (Exception, SystemExit) as error:  # a config is code: anything may come out of it
        raise ConfigError(f"config file '{path}' cannot be read: {type(error).__name__}: {error}") from error
    override(cfg, options or {})
    _drop_none(cfg, SECTIONS)
    for key, value in cfg.items():
        cfg[key] = _at_home(value)
    check_config(cfg)
    return cfg


def _drop_none(section: Any, schema: Mapping[str, Any]) -> None:
    """None in place of a section or a component means that there is none."""
    for key in list(section.keys() & schema.keys()):
        if section[key] is None and isinstance(schema[key], (dict, list, Registry)):
            section.pop(key)
        elif isinstance(section[key], Mapping) and isinstance(schema[key], dict):
            _drop_none(section[key], schema[key])


def required(cfg: Config, dotted: str) -> Any:
    """The section ``dotted`` (``data.test``) of a config that is good for another purpose without it.

    Raises:
        ConfigError: it is missing.
    """
    section: Any = cfg
    for part in dotted.split('.'):
        section = section.get(part)
        if section is None:
            raise ConfigError(f'{dotted}: missing in the config')
    return section


def clip_length(cfg: Config) -> int:
    """Frames of a test clip.

    Raises:
        ConfigError: there is no test set, or a list of them.
    """
    section = required(cfg, 'data.test')
    if not isinstance(section, Mapping):
        raise ConfigError(f'data.test: expected one test set, got {len(section)}')
    return section.get('test_size') or 1


def as_text(cfg: Config) -> str:
    """The config as a Python file that can be loaded again.

    Raises:
        ConfigError: a value has no Python text, such as an array.
    """
    try:
        return cfg.pretty_text
    except SyntaxError:  # of the formatter, which shows the whole text and not the place
        for key, value in cfg.items():
            try:
                Config({key: value}).pretty_text  # noqa: B018
            except SyntaxError:
                raise ConfigError(
                    f'{key}: the final config cannot be written down with {value!r} ({type(value).__name__}); use '
                    'plain numbers, texts, lists and dicts') from None
        raise


def _at_home(value: Any) -> Any:
    """``value`` with the user's home folder in place of ``~`` in each text that is a path below it."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith('~') and '/' in value else value
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _at_home(item)
        return value
    return type(value)(map(_at_home, value)) if type(value) in (list, tuple) else value


def config_files(path: str | Path) -> list[Path]:
    """A config file and all its bases; those that cannot be found are left out."""
    files, waiting = [], [Path(path)]
    while waiting:
        file = waiting.pop()
        if file in files or not file.is_file():
            continue
        files.append(file)
        with contextlib.suppress(Exception):  # reading the config names what is wrong with it
            waiting += [file.parent / base for base in Config._get_base_files(str(file))]
    return files


def config_inputs(path: str | Path | None) -> dict[str, Path]:
    """What :func:`~mmseg.utils.files.refuse_overwriting` must know of a config file: it and its bases."""
    files = [] if path is None else config_files(path)
    return {'config' if i == 0 else f'base of the config, {file}': file for i, file in enumerate(files)}


def override(cfg: Config, options: Mapping[str, Any]) -> None:
    """Changes ``cfg`` in place, and fills in its variables.

    Args:
        cfg: a config.
        options: dotted keys to values, as in :func:`load_config`.  A number stands for an entry of a list; a dict is
            merged into one that is there, unless it holds ``_delete_=True``.

    Raises:
        ConfigError: a key that is neither there nor known at its place, or stands inside a plain value.
    """
    variables = {key: value for key, value in options.items() if key.split('.')[0] not in SECTIONS}
    for part in (variables, {key: value for key, value in options.items() if key not in variables}):
        for key in part:
            _check_override(cfg, key)
        for key, value in part.items():
            first, *rest = key.split('.')
            cfg[first] = _changed(cfg.get(first, {}), rest, value, first)
        fill_in_variables(cfg)  # before the second part, which may reach into what a variable gives


def _changed(place: Any, parts: Sequence[str], value: Any, where: str) -> Any:
    """``place`` with ``value`` under the dotted ``parts``; nothing that other places may share is written to."""
    if not parts:
        if not isinstance(value, Mapping):
            return value
        kept = place if isinstance(place, Mapping) and not value.get(_DELETE) else {}
        added = {k: _changed(kept.get(k), (), v, f'{where}.{k}') for k, v in value.items() if k != _DELETE}
        return ConfigDict({**kept, **added})
    part, *rest = parts
    inner = f'{where}.{part}'
    if isinstance(place, (list, tuple)):
        entries = list(place)
        entries[int(part)] = _changed(entries[int(part)], rest, value, inner)
        return type(place)(entries)
    if not isinstance(place, Mapping):
        raise ConfigError(f"--options {where}.{'.'.join(parts)}: {where} is {place!r} and has no key '{part}'")
    return ConfigDict({**place, part: _changed(place.get(part, {}), rest, value, inner)})


def check_config(cfg: Config) -> None:
    """Checks sections, components and their arguments; warns of top-level names that look like slips.

    Raises:
        ConfigError: naming the key, the nearest known one, and where it stands.
    """
    for key in cfg:
        if key in SECTIONS:
            _check_value(cfg[key], SECTIONS[key], key)
            continue
        slip = difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.8)
        if slip:
            logger.warning("config: top-level '%s' is nobody's key; did you mean '%s'?", key, slip[0])


def _check_value(value: Any, schema: Any, where: str) -> None:
    if schema is ANY:
        return
    if isinstance(schema, Registry):
        if value is not None:
            _check_component(value, schema, where)
    elif isinstance(schema, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f'{where}: expected a list of dicts, got {value!r}')
        for i, item in enumerate(value):
            _check_component(item, schema[0], f'{where}[{i}]')
    elif isinstance(schema, dict):
        if value is None:
            return
        if not isinstance(value, Mapping):
            raise ConfigError(f'{where}: expected a dict with keys {", ".join(schema)}, got {value!r}')
        for key, inner in value.items():
            if key not in schema:
                raise ConfigError(f"{where}.{key}: unknown key '{key}' in {where}{nearest(key, schema)}")
            _check_value(inner, schema[key], f'{where}.{key}')
    else:
        check_value(value, schema, where)


def _check_component(cfg: Any, registry: Registry, where: str) -> None:
    """Type and arguments of a component, and of the data sets, steps and parts inside it."""
    if isinstance(cfg, (list, tuple)) and registry is DATASETS:  # mmseg 0.x: a list of data sets is their concatenation
        for i, item in enumerate(cfg):
            _check_component(item, registry, f'{where}[{i}]')
        return
    if registry is HOOKS and isinstance(cfg, Mapping):
        cfg = {key: value for key, value in cfg.items() if key != 'priority'}
    check_component(registry, cfg, where)
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
        near = None if part in known else nearest(part, known)
    elif isinstance(place, Mapping) and 'type' in place:
        component = find_anywhere(place['type'])
        near = None if component is None or part == 'type' else unknown_argument(component, part)
    elif schema is ANY or isinstance(schema, Registry) or fits({}, schema):
        return ANY
    else:
        raise ConfigError(f"--options {dotted}: '{walked}' is a plain value and has no key '{part}'")
    if near is not None:
        stands = f'in {walked}' if walked else 'at the top level'
        raise ConfigError(f"--options {dotted}: unknown key '{part}' {stands}{near}")
    return schema.get(part, ANY) if isinstance(schema, dict) else ANY


def find_anywhere(name: Any) -> Any:
    """The component of that name in any registry, or None; its section's own check names an unknown type."""
    from mmseg import registry as registries

    for registry in vars(registries).values():
        if isinstance(registry, Registry) and (component := registered(registry, name)) is not None:
            return component
    return None
