"""What fits an annotation, and what an error says of what does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest
from mmengine.config import ConfigDict

from mmseg.registry import HOOKS, build, check_arguments, keys_of
from mmseg.utils.arguments import Count, Range, Share, annotations_of, check_value, fits
from mmseg.utils.errors import ConfigError

if TYPE_CHECKING:
    from somewhere import Unknown


@pytest.mark.parametrize('annotation, good, bad', [
    (int, [0, -3, np.int64(3)], [True, 1.0, '1', None, [1]]),
    (float, [0.5, 1, math.nan, np.float32(1)], [False, '1', None, 1j, []]),
    (bool, [True, np.True_], [0, 1, 'True', None]),
    (str, ['', 'x'], [b'x', 1, None, ['x'], Path('x')]),
    (Path, ['x', Path('x')], [1, None, ['x']]),
    (int | None, [None, 1], ['None', 0.5]),
    (Literal['a', 1], ['a', 1], ['b', True, 1.0, None, ['a']]),
    (Sequence[int], [[], (1, 2), range(3), np.arange(3)], ['12', 1, [1, 'x'], {'x': 1}, [None], None]),
    (list[str], [['x'], ('x',)], ['x', [1], [['x']]]),
    (tuple[int, float], [(1, 2.5), [1, 2]], [(1,), (1, 2, 3), [2.5, 1], 'ab', 1]),
    (tuple[int, ...], [(), [1, 2]], [['x'], 'x']),
    (Mapping[str, int], [{}, {'x': 1}, ConfigDict(x=1)], [{'x': 'y'}, {1: 1}, [1], 'x', None]),
    (Mapping[str, Any], [{'x': None}], [[('x', 1)]]),
    (dict, [{1: 2}], [3]),
    (Callable[[int], int], [abs, lambda x: x], [1, 'abs', None]),
    (Annotated[float, Range(0, 1)], [0, 1, 0.5], [-0.1, 1.1, math.nan, math.inf, True, '0.5']),
    (Annotated[float, Range(0, math.inf, above=True)], [1e-9, math.inf], [0, 0.0, -1, math.nan]),
    (Sequence[Count] | None, [None, [1, 2]], [[0], [1, -1], [1.5]]),
    (np.ndarray | Mapping[str, int] | None, [None, {'x': 1}, np.zeros(1), object()], [3, 'x', [1]]),
    (np.dtype, ['float32', 3, None], []),  # what the class makes of it is not known here
    (Any, [None, 1, 'x', [1]], []),
])
def test_what_fits(annotation, good, bad):
    assert all(fits(value, annotation) for value in good)
    assert not any(fits(value, annotation) for value in bad)


@pytest.mark.parametrize('annotation, value, said', [
    (Count, 0, 'x: expected int, at least 1, got 0 (int)'),
    (Share, math.nan, 'x: expected float, at least 0, at most 1, got nan (float)'),
    (Sequence[int] | None, [1, 'y'], "x[1]: expected int, got 'y' (str)"),
    (Mapping[str, Mapping[str, float]], {'a': {'b': [1]}}, 'x.a.b: expected float, got [1] (list)'),
    (tuple[int, int], (1, 2, 3), 'x: expected list of 2 (int each), got (1, 2, 3) (tuple)'),
    (str | Sequence[str], 3, 'x: expected str or list of str, got 3 (int)'),
    (Literal['a', 'b'] | None, 'c', "x: expected 'a' or 'b' or None, got 'c' (str)"),
])
def test_the_error_names_place_and_what_was_expected(annotation, value, said):
    with pytest.raises(ConfigError) as error:
        check_value(value, annotation, 'x')
    assert str(error.value) == said


class Open:
    def __init__(self, size: int, **options: int) -> None:
        self.size, self.options = size, options


class Inherits(Open):
    def __init__(self, *args, more: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)


class Strict(Inherits):
    def __init__(self, **kwargs) -> None:
        Checked(**kwargs)


class Checked:
    def __init__(self, width: int = 3) -> None:
        if width > 9:
            raise ValueError(f'{width} is too wide')


class Broken:
    def __init__(self, width: int = 3) -> None:
        raise TypeError('a bug')


class ForTheTypeChecker:
    def __init__(self, other: Unknown = None, width: int = 3) -> None:
        pass


def test_a_constructor_with_kwargs_takes_any_name():
    assert build(HOOKS, {'type': Open, 'size': 1, 'colour': 2}, 'hook').options == {'colour': 2}
    assert build(HOOKS, {'type': Inherits, 'size': 1, 'args': 2}, 'hook', num_classes=3).options == {
        'args': 2, 'num_classes': 3}
    assert keys_of(Checked) == {'width'} and check_arguments(Inherits, {'anything': 1}, 'hook') == {'anything': 1}
    with pytest.raises(ConfigError, match=r"hook\.size: expected int, got 'x'"):
        build(HOOKS, {'type': Open, 'size': 'x'}, 'hook')
    with pytest.raises(ConfigError, match=r"hook: Strict: .*unexpected keyword argument 'colour'"):
        build(HOOKS, {'type': Strict, 'colour': 2}, 'hook')


def test_what_a_constructor_refuses_is_an_error_of_the_config_and_a_bug_is_none():
    with pytest.raises(ConfigError, match='hook: Checked: 10 is too wide'):
        build(HOOKS, {'type': Checked, 'width': 10}, 'hook')
    with pytest.raises(TypeError, match='a bug'):
        build(HOOKS, {'type': Broken}, 'hook')


def test_annotations_that_only_a_type_checker_knows_are_not_checked():
    assert annotations_of(ForTheTypeChecker) == {}
    assert check_arguments(ForTheTypeChecker, {'width': 'x'}, 'hook') == {'width': 'x'}
