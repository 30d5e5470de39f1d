"""Makes the pictures of README.md from what `make demo` left, with the commands that stand beside them there.

The report is photographed in a headless Chromium (Debian: chromium chromium-driver).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.browser import CHROMIUM, DRIVER, chromium

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
DEMO = ROOT / 'work_dirs' / 'demo'

COMMANDS = (
    'python tools/browse_dataset.py local_configs/themask/mini_video.py --number 1 --seed 1 --height 130'
    ' --out work_dirs/demo/sheets',
    "python tools/analyze_logs.py work_dirs/demo/1f work_dirs/demo/video --keys loss 'matched_*' 'acc_*' lr"
    ' --out work_dirs/demo/curves.png',
    'python tools/video_demo.py local_configs/themask/mini_video.py work_dirs/demo/video/latest.pth'
    ' data/mini_vspw/data/val_000/origin --view side-by-side --legend --out work_dirs/demo/frames',
)
"""README.md shows these; tests/test_readme.py compares."""

REPORT_OPENS_AT = 'val_000/3'


def photograph(page: Path, picture: Path) -> None:
    """The upper part of a report, down to its time lines, as JPEG."""
    with chromium(1280, 1600) as browser:
        browser.open(page, REPORT_OPENS_AT)
        browser.wait(f"document.querySelector('#position').textContent.includes('{REPORT_OPENS_AT.split('/')[1]} of')")
        bottom = browser.run("return document.querySelector('.two').getBoundingClientRect().bottom")
        browser.screenshot(picture.with_suffix('.png'))
        errors = browser.log()
    if errors:
        sys.exit(f'the console of {page} is not empty: {errors}')
    pixels = cv2.imread(str(picture.with_suffix('.png')))[: round(bottom) + 10]
    cv2.imwrite(str(picture), pixels, [cv2.IMWRITE_JPEG_QUALITY, 72])
    picture.with_suffix('.png').unlink()


def main() -> None:
    """Runs the commands and copies what they made."""
    if not (DEMO / 'report' / 'index.html').is_file():
        sys.exit('run `make demo` first')
    if not (CHROMIUM and DRIVER):
        sys.exit('no chromium and chromedriver found (Debian: chromium chromium-driver)')
    for command in COMMANDS:
        print(f'$ {command}', flush=True)
        subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, check=True)
    shutil.copy(DEMO / 'pictures_video' / 'val_000' / '00000334.jpg', DOCS / 'demo.jpg')
    shutil.copy(next(iter(sorted((DEMO / 'sheets').glob('*.jpg')))), DOCS / 'browse_dataset.jpg')
    shutil.copy(DEMO / 'curves.png', DOCS / 'analyze_logs.png')
    shutil.copy(sorted((DEMO / 'frames').glob('*.jpg'))[2], DOCS / 'video_demo.jpg')
    photograph(DEMO / 'report' / 'index.html', DOCS / 'report.jpg')


if __name__ == '__main__':
    main()
