"""Several processes of one command on this machine: torchrun's own launcher, without its traceback.

`doratune train --processes N …` is `torchrun --standalone --nproc-per-node N -m doratune train …` and ends with the status of the
process that failed first.
"""

from __future__ import annotations

import logging
import os
import uuid


def launch(count: int, words: list[str]) -> int:
    """Run `doratune WORDS` in so many processes; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes say what is wrong themselves
    alone = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", uuid.uuid4().hex]  # what --standalone means
    config, command, arguments = config_from_args(parse_args([*alone, "--nproc-per-node", str(count), "-m", "doratune", *words]))
    try:
        elastic_launch(config, entrypoint=command)(*arguments)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status >= 0 else 128 - status
    except SignalException as error:
        return 128 + error.sigval
    return 0
