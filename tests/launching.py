"""Real processes of one launch: torchrun, and what the cases of `distributed/worker.py` found."""

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("distributed") / "worker.py"


def quiet(**more):
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def torchrun(*words, processes=2, timeout=600, **more):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.run([*launch, *map(str, words)], capture_output=True, text=True, timeout=timeout, env=quiet(**more))


def launched(folder, *cases, worker=WORKER, **more):
    """What two processes found in these cases, and where they wrote."""
    done = torchrun(worker, folder / "found", *cases, **more)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.0").read_text()), folder
