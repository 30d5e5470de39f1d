"""Prints ``docs/configs.md``, from the signatures and docstrings of what reads a config."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from mmengine.registry import Registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg import registry as registries
from mmseg.config import SECTIONS, TopLevel, readers_of
from mmseg.utils.arguments import alternatives, annotations_of, entries, expected, named_parameters

INTRODUCTION = """# Every key of a config

<!-- python docs/make_configs.py > docs/configs.md -->

A config is a Python file. `_base_ = ['a.py', 'b.py']` takes over other files, whose dicts it changes key by key
(`_delete_=True` in a dict replaces it as a whole). A text `'${crop_size}'` stands for the key `crop_size` at the top
level, here or in a file that inherits this one. `--options a.b.0.c=VALUE` changes any key on the command line.
`python tools/print_config.py CONFIG` shows the result, `--diff OTHER` what differs between two.

Words that the keys use:

* **Stage 1** trains on single frames (`1f_*.py`: `THEMask1fHead`, no temporal part). **Stage 2** trains on clips
  (`video_*.py`: `THEMaskHead`) and usually starts from the weights of stage 1 (`--finetune-from`), most of which stay
  frozen.
* A training clip is a frame and earlier ones of its video. **`dilation`** says which: `[-9, -6, -3]` are the frames 9,
  6 and 3 before it, so that the clip has four; `[0]` is the single frame. `num_frames` of the mask decoder is the
  number of frames in a clip.
* A test clip has **`test_size`** frames of a video, three apart. Every frame is predicted once, whatever the number; 1
  predicts single frames.
* An **iteration** is one batch of every process; an **update** changes the weights, after `cumulative_iters`
  iterations.

A key that does not exist, or a value that does not fit, is an error which names the key. A key without a default must
be given, but for those that a part gets from the part around it (`input_shape` from the backbone, `num_classes` of the
mask decoder and the criterion from the head). "Without effect" are keys of mmcv 1.x and mmsegmentation 0.x that old
configs hold; other values than those in brackets are an error.
"""
_ITEM = re.compile(r'^    (\w+): (.*)$')


def plain(text: str) -> str:
    """A docstring's markup as Markdown."""
    text = re.sub(r':\w+:`~?([\w.]*\.)?(\w+)`', r'`\2`', ' '.join(text.split()))
    return text.replace('``', '`')


def meanings(reader: Callable[..., Any]) -> dict[str, str]:
    """What the docstrings of a function, or of a class and its bases, say of each argument."""
    owners = reversed(reader.__mro__) if inspect.isclass(reader) else [reader]
    found: dict[str, str] = {}
    for owner in owners:
        name = None
        for line in inspect.cleandoc(owner.__doc__ or '').splitlines():
            item = _ITEM.match(line)
            if item:
                name, found[item[1]] = item[1], item[2]
            elif name and line.startswith('     '):
                found[name] += f' {line}'
            else:
                name = None
    return {key: plain(text) for key, text in found.items()}


def readers_in(annotation: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Path and reader of each dict that an annotation allows."""
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
        yield from ((place, mark) for mark in marks if inspect.isroutine(mark) or inspect.isclass(mark))
    for alternative in alternatives(annotation):
        if alternative is not annotation:
            yield from readers_in(alternative, place)
            continue
        stands_for = {'KEY': None} if expected(annotation).startswith('dict') else [None]
        for inner, _, deeper in entries(stands_for, annotation):
            yield from readers_in(deeper, place + inner.replace('[0]', '[i]'))


def table(reader: Callable[..., Any], place: str, title: str) -> Iterator[str]:
    """Markdown of one reader, and of what it reads inside; ``place`` is the path of its dict."""
    summary = plain(inspect.cleandoc(reader.__doc__ or '').partition('\n\n')[0])
    yield f'\n{title}\n\n{summary}\n' if title else f'\n{summary}\n'
    parameters, said, hints = inspect.signature(reader).parameters, meanings(reader), annotations_of(reader)
    keys = [key for key in parameters if key in named_parameters(reader)]
    if keys:
        yield '| key | value | default | meaning |\n|---|---|---|---|'
    for key in keys:
        default = parameters[key].default
        shown = '' if default is inspect.Parameter.empty else f'`{default!r}`'
        yield f'| `{key}` | {expected(hints.get(key, Any))} | {shown} | {said.get(key, "")} |'
    retired = getattr(reader, 'retired_arguments', {})
    if retired:
        values = {key: ' or '.join(f'`{value!r}`' for value in accepted) for key, accepted in retired.items()}
        listed = ', '.join(f'`{key}`' + (f' ({value})' if value else '') for key, value in values.items())
        yield f'\nWithout effect: {listed}.'
    for key in keys:
        for path, inner in readers_in(hints.get(key, Any), f'{place}.{key}'):
            if inner.__module__.startswith('mmseg'):
                yield from table(inner, path, f'#### `{path.lstrip(".")}`')


def owner_of_arguments(component: Any) -> Any:
    """The base class whose ``__init__`` this is; a function, or a class that takes no argument, itself."""
    if not inspect.isclass(component):
        return component
    return next((base for base in component.__mro__[:-1] if '__init__' in vars(base)), component)


def components(registry: Registry) -> Iterator[str]:
    """Markdown of everything registered; names that take the same arguments share a table."""
    registry.import_from_location()
    groups: dict[Any, list[str]] = {}
    for name, component in sorted(registry.module_dict.items()):
        base = inspect.unwrap(component)
        if base.__module__.startswith('mmseg.'):
            groups.setdefault(owner_of_arguments(base), []).append(name)
    if groups:
        yield f'\n## Types: {registry.name}'
    for owner, names in groups.items():
        yield from table(owner, '', f'### {", ".join(f"`{name}`" for name in names)}')
        usual = inspect.signature(owner).parameters
        for name in names:
            own = inspect.signature(registry.module_dict[name]).parameters
            row = [f'`{k}={p.default!r}`' for k, p in own.items() if k in usual and p.default != usual[k].default]
            if row:
                yield f'\n`{name}`: {", ".join(row)}.'


def page() -> str:
    """The whole file."""
    lines = [INTRODUCTION.rstrip(), *table(TopLevel, '', '## Top level')]
    for section in SECTIONS:
        lines.append(f'\n## `{section}`')
        for reader in readers_of(section):
            if not isinstance(reader, Registry):
                lines += table(reader, section, '')
        if section == 'model':
            lines.append('\n`type` names the segmentor; the other keys are its arguments.')
        elif section == 'optimizer':
            lines.append('\n`type` names a class of `torch.optim`; the other keys are its arguments.')
    for registry in vars(registries).values():
        if isinstance(registry, Registry) and registry.name != 'optimizer':
            lines += components(registry)
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    sys.stdout.write(page())
