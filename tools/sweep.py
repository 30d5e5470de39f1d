"""Runs a config with lists or grids of overrides and with several seeds, and compares what comes out.

Each run is a training and a test; finished runs are not repeated, and those that were broken off go on.  The folder
gets summary.md, .csv, .json and .png: mean and standard deviation over seeds, and differences to the first arm with a
paired bootstrap over videos (where there are ten videos or more).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.live import Live

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.apps.sweep import Run, Sweep, markdown, read_sweep, runs_of, summarise, write_summary
from mmseg.utils.cli import INTERRUPTED, ArgumentParser, run_tool
from mmseg.utils.console import table, table_console
from mmseg.utils.errors import ConfigError
from mmseg.utils.signals import Interruption

EXAMPLES = """a sweep file:
  config = 'local_configs/themask/mini_1f.py'        # as seen from this file
  grid = {'optimizer.lr': [1e-3, 5e-4], 'model.decode_head.loss_cfg.warmup_iters': [100, 300]}
  seeds = [0, 1, 2]

examples:
  python tools/sweep.py sweep.py --work-dir work_dirs/sweep
  python tools/sweep.py sweep.py --work-dir work_dirs/sweep --jobs 4 --gpus 0 1 2 3
  sbatch --array 0-11 --wrap 'python tools/sweep.py sweep.py --work-dir work_dirs/sweep --index $SLURM_ARRAY_TASK_ID'
  python tools/sweep.py sweep.py --work-dir work_dirs/sweep --summary-only
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument('sweep', type=Path, help='the sweep file')
    parser.add_argument('--work-dir', type=Path, required=True, help='folder of all runs')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time (default %(default)s)')
    parser.add_argument('--gpus', nargs='+', default=[], metavar='ID', help='GPU of each job, in turn')
    parser.add_argument('--index', type=int, metavar='N', help='only run number N, counted from 0, as for a job array')
    parser.add_argument('--summary-only', action='store_true', help='run nothing')
    args = parser.parse_args(arguments)
    with Interruption('stopping; started again, the sweep goes on') as interruption:
        status = run_tool(lambda: _run(args, interruption))
    return interruption.status if status == INTERRUPTED else status


def _run(args: argparse.Namespace, interruption: Interruption) -> int:
    sweep = read_sweep(args.sweep)
    if args.jobs < 1:
        raise ConfigError(f'--jobs: expected at least 1, got {args.jobs}')
    runs = runs_of(sweep, args.work_dir)
    chosen = runs
    if args.index is not None:
        if not 0 <= args.index < len(runs):
            raise ConfigError(f'--index: there are {len(runs)} runs, 0 to {len(runs) - 1}; got {args.index}')
        chosen = [runs[args.index]]
    if not args.summary_only:
        work = Sweep(sweep, chosen, args.jobs, args.gpus)
        try:
            with interruption.raising():
                _watch(work, chosen)
        finally:
            work.stop()
    failed = [run for run in chosen if run.state == 'failed']
    for run in failed:
        tail = run.log.read_text(errors='replace').strip().splitlines()[-1:] if run.log.exists() else []
        print(f'failed: {run.folder}: {"".join(tail)}', file=sys.stderr)
    if args.index is None and any(run.state == 'done' for run in runs):
        summary = summarise(sweep, runs)
        write_summary(summary, sweep.metrics, args.work_dir)
        print('\n'.join(markdown(summary, sweep.metrics)))
        print(f'written to {args.work_dir}/summary.md, .csv, .json and .png')
    return int(bool(failed))


def _watch(work: Sweep, runs: Sequence[Run]) -> None:
    """Runs to the end, with a live table on a terminal and a line for each change elsewhere."""
    console = table_console(stderr=True)
    shown: dict[int, str] = {}
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while work.step():
            if console.is_terminal:
                rows = [(run.arm, str(run.seed), run.state, run.progress() if run.state == 'training' else '')
                        for run in runs]
                live.update(table(('arm', 'seed', 'state', 'iteration'), rows, texts=3), refresh=True)
            else:
                _say_changes(runs, shown)
            time.sleep(0.2)
    _say_changes(runs, shown)


def _say_changes(runs: Sequence[Run], shown: dict[int, str]) -> None:
    counts = Counter(run.state for run in runs)
    for i, run in enumerate(runs):
        if run.state not in ('waiting', shown.get(i)):
            shown[i] = run.state
            print(f'{run.arm}, seed {run.seed}: {run.state} ({counts["done"]} of {len(runs)} done)', file=sys.stderr)


if __name__ == '__main__':
    if 'OMP_NUM_THREADS' not in os.environ and '--jobs' in sys.argv:
        os.environ['OMP_NUM_THREADS'] = '1'  # jobs share the cores
    sys.exit(main())
