"""torchrun for the tools beside it: the same arguments, the status of the tool as exit status, no traceback of its own.

Plain torchrun ends with status 1 whatever happened, and prints a traceback of itself below the tool's message.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

_NOISY = ('torch.distributed.elastic.multiprocessing.api', 'torch.distributed.elastic.agent.server.api')


def main() -> int:
    """Runs the processes; returns the status of the first that failed, or 128 + the signal that ended them."""
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        if os.environ.get('LOCAL_RANK', '0') == '0':
            print('error: this is one of several processes that torchrun has started already; start the tool by itself '
                  'with --gpus, or leave --gpus out', file=sys.stderr)
        return 1
    # after a signal an iteration is finished and saved, which may take longer than torchrun's 30 seconds
    os.environ.setdefault('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', '300')
    if 'LOGLEVEL' not in os.environ:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        args = parse_args(sys.argv[1:])
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: torchrun would end its processes all the same
            args.signals_to_handle = os.environ['TORCHELASTIC_SIGNALS_TO_HANDLE'] = 'SIGTERM,SIGINT,SIGQUIT'
        run(args)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status < 0:
            hint = ' (out of memory?)' if -status == signal.SIGKILL else ''
            print(f'error: rank {rank} was killed by {signal.Signals(-status).name}{hint}', file=sys.stderr)
            return 128 - status
        return status  # it has said itself what is wrong
    return 0


if __name__ == '__main__':
    sys.exit(main())
