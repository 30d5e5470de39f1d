"""Config files: read, override, check.

The schema is that of mmcv 1.x and mmsegmentation 0.x: Python files with ``_base_``, sections such as ``data``,
``model``, ``optimizer``, and components that are named by ``type``.  A section holds the arguments of the class or the
function that reads it (:data:`SECTIONS`).  A wrong key must not pass in silence (``runner.max_iter=5`` would train for
160,000 iterations), so every key, every argument of a component and every override is checked before anything is built.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import logging
import os
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from mmengine.config import Config, ConfigDict, DictAction

from mmseg.models.backbones.normalisation import IMAGENET
from mmseg.registry import (
    BACKBONES,
    DATASETS,
    HOOKS,
    OPTIMIZERS,
    SEGMENTORS,
    Reader,
    build,
    check,
    check_arguments,
    keys_of,
    retired,
)
from mmseg.utils.arguments import Count, Positive, Range
from mmseg.utils.errors import ConfigError, nearest

_REFERENCE = re.compile(r'\$\{([A-Za-z_]\w*)\}')
_BRACED = re.compile(r'[\[(\s]*\{')
_DELETE = '_delete_'


def hook_keys(priority: str | int | None = None) -> None:
    """What a hook's dict may hold beside its arguments.

    Args:
        priority: hooks are called in this order: 0 (first) to 100, or a name such as ``NORMAL``; None: the hook's own.
    """


DataSet = Annotated[Mapping[str, Any], DATASETS]
HookConfig = Annotated[Mapping[str, Any], hook_keys, HOOKS]


@retired(workflow=([('train', 1)], [['train', 1]]))
@dataclass
class TopLevel:
    """The keys at the top level that are no section; other names there are the user's own.

    Attributes:
        custom_imports: modules of your own, which register components: ``dict(imports=['my_dataset'])``.
        train_cfg: accepted empty, as in mmsegmentation.
        test_cfg: another place for ``model.test_cfg``.
        custom_hooks: hooks of the training loop, each with ``type``, its arguments and maybe ``priority``.
        nan_loss: at a NaN or infinite loss, ``stop`` with an error, or ``skip`` the update with a warning.
        seed: of Python, numpy, torch and the order of the data; None draws one.
        deterministic: reproducible algorithms on a GPU, slower.
        cudnn_benchmark: cuDNN tries the convolutions of each size; not with ``deterministic``.
        float32_matmul_precision: ``high`` lets float32 products run in TF32 on a GPU, faster and with ten bits of
            mantissa; None leaves torch's own (``highest``).
        find_unused_parameters: of torch's ``DistributedDataParallel``; no parameter of our models needs it.
        work_dir: folder for logs and checkpoints.
        resume_from: checkpoint or work dir to go on from; ``auto``: the work dir itself where it holds a checkpoint.
        finetune_from: checkpoint or work dir to start from, as the section ``finetune`` says.
        load_from: checkpoint or work dir whose weights the training starts from; all must fit.
        load_from_fresh: parts of parameter names, as they stand in checkpoints; those that ``load_from`` may leave at
            their start values, such as ``['class_embed']`` for other classes.
        freeze: parts of parameter names, as they stand in checkpoints; those that hold one of them are not trained,
            whatever the start.
        log_level: what the log shows at least.
        gpu_ids: as ``tools/train.py --gpu-ids``, which goes before it.
    """

    custom_imports: Mapping[str, Any] | None = None
    train_cfg: Mapping[str, Any] | None = None
    test_cfg: Mapping[str, Any] | None = None
    custom_hooks: Sequence[HookConfig] | None = None
    nan_loss: Literal['stop', 'skip'] = 'stop'
    seed: Annotated[int, Range(0, 2**31 - 1)] | None = None  # numpy takes the seed plus the rank in 32 bits
    deterministic: bool = False
    cudnn_benchmark: bool = False
    float32_matmul_precision: Literal['highest', 'high', 'medium'] | None = None
    find_unused_parameters: bool = False
    work_dir: str | None = None
    resume_from: str | None = None
    finetune_from: str | None = None
    load_from: str | None = None
    load_from_fresh: Sequence[str] = ()
    freeze: Sequence[str] = ()
    log_level: Literal['DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL'] = 'INFO'
    gpu_ids: int | Sequence[int] | None = None


@retired(persistent_workers=())
@dataclass
class DataConfig:
    """Data sets and how they are loaded.

    Attributes:
        train: the training set; a list of data sets is their concatenation.
        samples_per_gpu: clips in the batch of each process.
        workers_per_gpu: processes that load data, for each process of the training or the test; 0: none.
        val: the data set of the evaluations during training.
        test: the data set of ``tools/test.py``.
        pin_memory: prepare batches in page-locked memory; None: where there is a GPU.
        stall_seconds: after so long a wait for data the log says which files are being read.
    """

    train: DataSet | Sequence[DataSet]
    samples_per_gpu: Count
    workers_per_gpu: Annotated[int, Range(0, 1024)] = 0
    val: DataSet | Sequence[DataSet] | None = None
    test: DataSet | Sequence[DataSet] | None = None
    pin_memory: bool | None = None
    stall_seconds: Positive = 600.0


@retired(type=('IterBasedRunner',))
@dataclass
class RunnerConfig:
    """The length of a training.

    Attributes:
        max_iters: iterations of the whole training.
    """

    max_iters: Count


@dataclass
class LogConfig:
    """Where the numbers of a training go.

    Attributes:
        interval: iterations between two records of each logger.
        hooks: the loggers, each with ``type`` and its arguments; there is always one of JSON lines.
    """

    interval: Count = 50
    hooks: Sequence[HookConfig] | None = None


@retired(by_epoch=(False,), pre_eval=(), efficient_test=(), broadcast_bn_buffer=())
@dataclass
class MetricsConfig:
    """What an evaluation during training counts.

    Attributes:
        metric: ``mIoU``, ``mDice``, ``VC8`` and others, as of ``tools/test.py --eval``.
        tmpdir: folder through which processes exchange their results.
        gpu_collect: they exchange them through the GPUs.
    """

    metric: str | Sequence[str] = ()
    tmpdir: str | None = None
    gpu_collect: bool = False


SECTIONS: dict[str, Any] = {
    'model': SEGMENTORS,
    'data': DataConfig,
    'optimizer': ('mmseg.core.optimizer:GroupsConfig', OPTIMIZERS),
    'optimizer_config': 'mmseg.core.runner:UpdateConfig',
    'lr_config': 'mmseg.core.lr_schedule:LrSchedule',
    'runner': RunnerConfig,
    'fp16': 'mmseg.core.precision:Precision',
    'finetune': 'mmseg.core.finetune:FinetuneConfig',
    'checkpoint_config': 'mmseg.core.hooks:CheckpointHook',
    'evaluation': ('mmseg.core.hooks:EvalHook', MetricsConfig),
    'log_config': LogConfig,
    'dist_params': 'mmseg.utils.dist:init_dist',
}
"""What reads each section: a registry, or classes and functions, or their addresses."""

logger = logging.getLogger('mmseg')


class OptionsAction(DictAction):
    """``--options K=V ...``: numbers, booleans, ``None`` and lists are read as such, all else is text (as in mmcv).

    A value with braces is JSON or a Python literal: ``custom_hooks=[{"type": "EMAHook"}]``.
    """

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
        braced = {key: value for key, _, value in (word.partition('=') for word in values) if _BRACED.match(value)}
        try:
            plain = [word for word in values if word.partition('=')[0] not in braced]
            super().__call__(parser, namespace, plain, option_string)
        except AssertionError as error:  # brackets that do not close
            parser.error(f'argument {option_string}: {error}')
        for key, text in braced.items():
            try:
                getattr(namespace, self.dest)[key] = _literal(text)
            except (ValueError, SyntaxError) as error:
                parser.error(f"argument {option_string}: {key}: '{text}' is neither JSON nor a Python literal: {error}")


def _literal(text: str) -> Any:
    """JSON or a Python literal.

    Raises:
        ValueError, SyntaxError: it is neither.
    """
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


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
    check_config(cfg)
    return cfg


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

    A value ``'${crop_size}'`` stands for the key ``crop_size`` at the top level: a base config that uses one follows
    the file that inherits it, and ``--options crop_size=(320,320)``.

    Args:
        cfg: a config.
        options: dotted keys to values, as in :func:`load_config`.  A number stands for an entry of a list; a dict is
            merged into one that is there, unless it holds ``_delete_=True``.

    Raises:
        ConfigError: a key that is neither there nor known at its place, or stands inside a plain value; a variable that
            is not there.
    """
    ours = SECTIONS.keys() | keys_of(TopLevel)
    known = cfg.keys() | ours
    touched = {key: key.split('.')[0] for key in options}
    for variables in (True, False):  # the others may reach into what a variable gives
        for key, first in touched.items():
            if first not in known:
                raise ConfigError(f"--options {key}: unknown key '{first}' at the top level{nearest(first, known)}")
            if (first not in ours) == variables:
                cfg[first] = _changed(cfg.get(first, {}), key.split('.')[1:], options[key], first)
        for key in list(cfg):
            cfg[key] = _filled(cfg[key], cfg, key)
    for section, keys in ((cfg, SECTIONS), (cfg.get('data'), ('train', 'val', 'test'))):
        for key in keys if isinstance(section, (Config, dict)) else ():
            if section.get(key, key) is None:  # None in place of a section or a data set means that there is none
                section.pop(key)
    for first in dict.fromkeys(touched.values()):
        if first in cfg:
            _check_key(first, cfg[first])
    fill_normalisation(cfg)


def fill_normalisation(cfg: Config) -> None:
    """Gives every step ``Normalize`` the values of the backbone, which alone knows what its weights expect.

    A backbone says so by ``normalisation`` (of the class), or by the class method ``normalisation_of`` of its
    arguments; where it says nothing the config does, and without values those of ImageNet hold.

    Raises:
        ConfigError: the config has other values than the backbone.
    """
    model = cfg.get('model')
    section = model.get('backbone') if isinstance(model, Mapping) else None
    expected = None
    if isinstance(section, Mapping) and section.get('type') in BACKBONES:
        arguments = {key: value for key, value in section.items() if key != 'type'}
        component: Any = BACKBONES.get(section['type'])
        ask = getattr(component, 'normalisation_of', lambda _: getattr(component, 'normalisation', None))
        expected = ask(arguments)
    for step, where in _steps(cfg, 'Normalize'):
        for key, value in (expected or IMAGENET)._asdict().items():
            value = list(value) if isinstance(value, tuple) else value
            if key not in step:
                step[key] = value
            elif expected is not None and not np.allclose(step[key], value, rtol=1e-5):
                raise ConfigError(
                    f'{where}.{key}: {step[key]}, but the weights of the backbone expect {value}; leave mean, std '
                    "and to_rgb out of Normalize, and the backbone's are taken")


def _steps(place: Any, kind: str, where: str = '') -> Iterator[tuple[Any, str]]:
    """All dicts of a config whose type is ``kind``, and where they stand."""
    if isinstance(place, (Config, Mapping)):
        if place.get('type') == kind:
            yield place, where
        for key, value in place.items():
            yield from _steps(value, kind, f'{where}.{key}'.removeprefix('.'))
    elif isinstance(place, (list, tuple)):
        for i, value in enumerate(place):
            yield from _steps(value, kind, f'{where}[{i}]')


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
        if not part.isdigit() or int(part) >= len(place):
            raise ConfigError(f"--options {inner}: '{part}' is no index of the list {where} of {len(place)}")
        entries = list(place)
        entries[int(part)] = _changed(entries[int(part)], rest, value, inner)
        return type(place)(entries)
    if not isinstance(place, Mapping):
        raise ConfigError(f"--options {where}.{'.'.join(parts)}: '{where}' is {place!r} and has no key '{part}'")
    return ConfigDict({**place, part: _changed(place.get(part, {}), rest, value, inner)})


def _filled(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    """``value`` with its variables replaced, and the user's home folder in place of ``~`` in paths below it."""
    if isinstance(value, dict):
        return type(value)({key: _filled(inner, variables, f'{where}.{key}') for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(inner, variables, f'{where}[{i}]') for i, inner in enumerate(value))
    if not isinstance(value, str):
        return value
    reference = _REFERENCE.fullmatch(value)
    if reference is None:
        return os.path.expanduser(value) if value.startswith('~') and '/' in value else value
    name = reference[1]
    if name not in variables:
        raise ConfigError(f"{where}: '{value}' stands for the key '{name}' at the top level of the config, which has "
                          f"none{nearest(name, variables)}")
    found = variables[name]
    if _REFERENCE.search(repr(found)):
        raise ConfigError(f"{where}: '{value}' stands for the key '{name}', which holds references itself: {found!r}")
    return _filled(found, {}, where)


def readers_of(section: str) -> list[Reader]:
    """The registry, or the classes and functions, that read a section."""
    readers = SECTIONS[section]
    readers = readers if isinstance(readers, tuple) else (readers,)
    return [pkgutil.resolve_name(reader) if isinstance(reader, str) else reader for reader in readers]


def top_level(cfg: Config) -> TopLevel:
    """The keys of ``cfg`` that are no section, with their defaults."""
    return build(TopLevel, {key: cfg[key] for key in keys_of(TopLevel) & cfg.keys()}, '')


def check_config(cfg: Config) -> None:
    """Checks sections, components and their arguments; warns of top-level names that look like slips.

    Raises:
        ConfigError: naming the key, the nearest known one, and where it stands.
    """
    known = SECTIONS.keys() | keys_of(TopLevel)
    for key, value in cfg.items():
        _check_key(key, value)
        slip = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if slip and key not in known:
            logger.warning("config: top-level '%s' is nobody's key; did you mean '%s'?", key, slip[0])


def _check_key(key: str, value: Any) -> None:
    if key in keys_of(TopLevel):
        check_arguments(TopLevel, {key: value}, '')
    elif key in SECTIONS:
        check(value, key, *readers_of(key))
