"""Says what was found, built and chosen, and checks and times the op; the exit status is 1 if a check fails."""

import sys

from mmseg.kernels.__main__ import main

if __name__ == '__main__':
    sys.exit(main())
