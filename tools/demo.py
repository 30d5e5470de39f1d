"""The main job from end to end on two CPU cores: data, one-frame training, clip training, tests, pictures, a table.

It runs the documented commands and nothing else, so what it prints can be typed by hand.  An interrupted demo goes on
where it stopped.  ``--control`` adds the one-frame control of the README's table.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmseg.utils.cli import ArgumentParser
from mmseg.utils.console import table, table_console

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = 'local_configs/themask'
DATA = 'data/mini_vspw'
EXAMPLES = """examples:
  make demo                                                            # in a virtual environment of its own
  python tools/demo.py --control                                       # with the environment that is there
  python tools/demo.py --work-dir work_dirs/demo2 --processes 2
"""


def run(*command: str | Path) -> None:
    """Prints and runs one command in the repository's root; its failure ends the demo with its exit status."""
    words = [str(word) for word in command]
    print(f'\n$ {shlex.join(words)}', flush=True)
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'}
    status = subprocess.run(words, cwd=ROOT, env=env).returncode
    if status:
        sys.exit(status)


def train(config: str, work_dir: Path, processes: int, *more: str | Path) -> None:
    """Trains ``config`` into ``work_dir``, or goes on with the newest checkpoint there."""
    if (ROOT / work_dir / 'latest.pth').exists():
        more = ('--resume-from', work_dir, *more)
    run('./tools/dist_train.sh', f'{CONFIGS}/{config}.py', str(processes), '--work-dir', work_dir, *more)


def test(config: str, work_dir: Path, processes: int, *more: str) -> dict[str, float]:
    """Tests the newest checkpoint of ``work_dir`` and returns its metrics as fractions."""
    out = work_dir / 'test'
    run('./tools/dist_test.sh', f'{CONFIGS}/{config}.py', work_dir / 'latest.pth', str(processes),
        '--work-dir', out, *more)  # fmt: skip
    return json.loads((ROOT / out / 'metrics.json').read_text())


def show(rows: dict[str, dict[str, float]], out: Path) -> None:
    """Prints the table and writes it as Markdown beside the pictures."""
    names = ('mIoU', 'mIoU_vspw', 'VC8', 'VC16')
    cells = [[model, *(f'{metrics[name]:.3f}' for name in names)] for model, metrics in rows.items()]
    table_console().print(table(('model', *names), cells, 'Mini VSPW, validation videos'))
    lines = [('model', *names), ['---'] * (len(names) + 1), *cells]
    (out / 'results.md').write_text(''.join(f'| {" | ".join(line)} |\n' for line in lines), encoding='utf-8')


def main() -> None:
    """Runs the demo."""
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='where results go')
    parser.add_argument('--processes', type=int, default=1, help='CPU processes (or GPUs) for training and testing')
    parser.add_argument('--control', action='store_true', help='also train one-frame on for the time of stage 2')
    args = parser.parse_args()
    start = time.perf_counter()
    work_dir: Path = args.work_dir
    one_frame, clips, control = (work_dir / name for name in ('1f', 'video', '1f_control'))

    if not (ROOT / DATA / 'train.txt').exists():  # is written last
        run(sys.executable, 'tools/make_mini_vspw.py', DATA)
    train('mini_1f', one_frame, args.processes)
    train('mini_video', clips, args.processes, '--finetune-from', one_frame)
    rows = {
        'one frame': test(
            'mini_1f', one_frame, args.processes, '--show-dir', str(work_dir / 'pictures_1f'),
            '--report', str(work_dir / 'report_1f')),
        'clips of 2': test(
            'mini_video', clips, args.processes, '--show-dir', str(work_dir / 'pictures_video'),
            '--report', str(work_dir / 'report_video')),
    }
    if args.control:
        train('mini_1f_control', control, args.processes, '--finetune-from', one_frame)
        rows['one frame, trained on'] = test('mini_1f_control', control, args.processes)
    show(rows, ROOT / work_dir)
    run(sys.executable, 'tools/report.py', work_dir / 'report_1f', work_dir / 'report_video',
        '--names', *list(rows)[:2], '--out', work_dir / 'report')  # fmt: skip
    video = (ROOT / DATA / 'val.txt').read_text(encoding='utf-8').split()[0]
    run(sys.executable, 'tools/video_demo.py', f'{CONFIGS}/mini_video.py', clips / 'latest.pth',
        f'{DATA}/data/{video}/origin', '--out', work_dir / 'overlay.mp4', '--view', 'side-by-side',
        '--legend')  # fmt: skip
    print(f'Pictures: {work_dir}/pictures_1f and {work_dir}/pictures_video (frame, prediction, ground truth).')
    print(f'Report of both: {work_dir}/report/index.html; a labelled video: {work_dir}/overlay.mp4.')
    print(f'The demo took {(time.perf_counter() - start) / 60:.1f} minutes.')


if __name__ == '__main__':
    main()
