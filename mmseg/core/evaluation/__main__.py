"""``python -m mmseg.core.evaluation``: the address of the command line in :mod:`mmseg.apps.evaluate`."""

import sys

from mmseg.apps.evaluate import main

if __name__ == '__main__':
    sys.exit(main())
