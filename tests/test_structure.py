"""The house: who may import whom."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmseg'
_METHOD = ('mmseg.models', 'mmseg.datasets', 'mmseg.core')
_TOP = ('mmseg.apis', 'mmseg.apps', 'mmseg.config')
FORBIDDEN = {
    'mmseg.utils': (*_TOP, *_METHOD, 'mmseg.kernels', 'mmseg.registry'),
    'mmseg.kernels': (*_TOP, *_METHOD, 'mmseg.registry'),
    'mmseg.datasets': (*_TOP, 'mmseg.models', 'mmseg.core', 'mmseg.kernels'),
    'mmseg.models': (*_TOP, 'mmseg.datasets', 'mmseg.core'),
    'mmseg.models.losses': ('mmseg.models.decode_heads', 'mmseg.models.segmentors'),
    'mmseg.core': (*_TOP, 'mmseg.models', 'mmseg.datasets'),
    'mmseg.apis': ('mmseg.apps',),
}
LAZY = {
    ('mmseg.apis', 'mmseg.apps.video'),  # a public name that keeps its address
    ('mmseg.core.evaluation.__main__', 'mmseg.apps.evaluate'),  # likewise; nobody imports the former
}


def module_name(path: Path) -> str:
    """``mmseg.utils`` for ``mmseg/utils/__init__.py``."""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {module_name(path): path for path in PACKAGE.rglob('*.py')}


def imports_of(path: Path, everywhere: bool = True) -> set[str]:
    """Modules of the project that ``path`` imports; those inside functions count where ``everywhere`` is set."""
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = '.'.join(package[: len(package) - node.level + 1]) if node.level else ''
            module = '.'.join(part for part in (start, node.module) if part)
            inside = {f'{module}.{alias.name}' for alias in node.names} & MODULES.keys()
            found |= inside or {module}
    return found & MODULES.keys()


@pytest.mark.parametrize('package', FORBIDDEN)
def test_imports_go_one_way(package):
    folder = ROOT / package.replace('.', '/')
    files = [path for path in folder.rglob('*.py') if '__pycache__' not in path.parts]
    assert files
    for path in files:
        for name in imports_of(path):
            allowed = (module_name(path), name) in LAZY or not name.startswith(FORBIDDEN[package])
            assert allowed, f'{path.relative_to(ROOT)} imports {name}'


def test_models_ask_for_no_processor():
    words = ('device.type', 'is_compiling', 'ctypes', 'avx', 'get_cpu_capability', 'mkldnn')
    for path in (PACKAGE / 'models').rglob('*.py'):
        found = [word for word in words if word in path.read_text()]
        assert not found, f'{path.relative_to(ROOT)} holds {found}: that belongs into mmseg/kernels'


def test_no_circular_import():
    graph = {name: imports_of(path, everywhere=False) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 100
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_setup_does_not_import_torch():
    assert 'torch' not in {alias.name for node in ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
                           if isinstance(node, ast.Import) for alias in node.names}


def test_an_installed_package_has_the_files_that_are_not_python():
    calls = [node for node in ast.walk(ast.parse((ROOT / 'setup.py').read_text())) if isinstance(node, ast.Call)]
    (data,) = (word.value for call in calls for word in call.keywords if word.arg == 'package_data')
    packed = {path for pattern in ast.literal_eval(data)['mmseg'] for path in PACKAGE.glob(pattern)}
    made = {'.py', '.pyc', '.so', '.lock'}
    there = {path for path in PACKAGE.rglob('*') if path.is_file() and path.suffix not in made}
    assert len(there) > 5 and there <= packed, there - packed


def test_consoles_come_from_the_one_place_that_takes_no_markup_from_data():
    for path in [*PACKAGE.rglob('*.py'), *(ROOT / 'tools').glob('*.py'), *(ROOT / 'benchmarks').glob('*.py')]:
        if path == PACKAGE / 'utils' / 'console.py':
            continue
        made = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert 'Console' not in made, f'{path.relative_to(ROOT)}: take mmseg.utils.console.table_console()'
