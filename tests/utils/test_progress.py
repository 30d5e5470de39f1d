"""The progress of a loop, on a terminal and in a file."""

import io

import pytest
from rich.console import Console

from mmseg.utils import progress
from mmseg.utils.progress import Progress


@pytest.mark.parametrize('terminal', [True, False])
def test_progress_is_a_bar_or_lines(terminal, monkeypatch):
    screen, lines = io.StringIO(), []
    monkeypatch.setattr(progress, 'table_console', lambda stderr: Console(file=screen, force_terminal=terminal))
    monkeypatch.setattr(progress.time, 'monotonic', iter(range(100)).__next__)
    with Progress('clip', 4, lines.append, interval=4) as shown:
        for _ in range(4):
            shown.advance(3)
    assert (shown.steps, shown.frames) == (4, 12)
    if terminal:
        assert '4/4' in screen.getvalue() and 'frames/s' in screen.getvalue() and not lines
    else:
        assert not screen.getvalue() and 1 < len(lines) < 5
        assert lines[0].startswith('clip ') and 'ETA 0:00:' in lines[0] and lines[-1].startswith('clip 4/4, ')
    with Progress('frame', None, None) as silent:
        silent.advance()
    assert len(lines) < 5
