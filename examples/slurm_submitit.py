"""Pretrain on several nodes of a Slurm cluster, in as many jobs as it takes.

    pip install 'sparsecnx[train]' submitit
    python slurm_submitit.py --nodes 8 --gpus 8 --hours 24 --partition gpu -- \
        --data /shared/images --output /shared/runs/base --model base --batch-size 4096 --dtype bfloat16

What follows `--` goes to `sparsecnx pretrain`. Each node runs torchrun, and that a process for each of its GPUs. Five
minutes before the time limit, and when the job is preempted, Slurm sends a signal: the run saves a checkpoint, the job
is queued again, and `--resume auto` goes on. The data and the output lie where all nodes see them.
"""

import argparse
import os
import signal
import subprocess
import sys

import submitit

# Seconds, of Slurm's 300, after which torchrun kills, instead of 30; and a new meeting place for every restart.
TORCHRUN = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "270", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Pretraining:
    """Run one node of a job.

    Args:
        gpus: processes on each node.
        arguments: those of `sparsecnx pretrain`.
    """

    def __init__(self, gpus: int, arguments: list[str]) -> None:
        self.gpus, self.arguments = gpus, arguments

    def command(self, hosts: list[str], job: int) -> list[str]:
        """Return the command of every node; the processes meet on the first one."""
        meeting = [f"--rdzv-endpoint={hosts[0]}:{29500 + job % 1000}", "--rdzv-backend=c10d", f"--rdzv-id={job}"]
        nodes = [f"--nnodes={len(hosts)}", f"--nproc-per-node={self.gpus}", "--max-restarts=3"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, *meeting]
        return [*torchrun, "-m", "sparsecnx", "pretrain", "--resume", "auto", *self.arguments]

    def __call__(self) -> None:
        job = submitit.JobEnvironment()
        # A session of its own, since the signal may go to all processes of this one.
        command = self.command(list(job.hostnames), int(job.raw_job_id))
        self.process = subprocess.Popen(command, start_new_session=True, env={**os.environ, **TORCHRUN})
        if code := self.process.wait():
            raise RuntimeError(f"torchrun ended with exit code {code}; the log of the job says why")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the run on the first node and return what the queued job does. submitit calls this at the signal."""
        self.process.send_signal(signal.SIGTERM)  # torchrun hands it on: every process saves and ends
        # Not `self.process.wait()`, which the signal has interrupted and which holds a lock.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Pretraining(self.gpus, self.arguments))


def submit(options: argparse.Namespace) -> submitit.Job[None]:
    """Queue the job and return it."""
    executor = submitit.AutoExecutor(folder=options.logs, cluster=options.cluster, slurm_max_num_timeout=1000)
    shape = {"nodes": options.nodes, "tasks_per_node": 1, "gpus_per_node": options.gpus, "slurm_exclusive": True}
    until = {"timeout_min": 60 * options.hours, "slurm_signal_delay_s": 300}
    executor.update_parameters(name="sparsecnx", slurm_partition=options.partition, **shape, **until)
    return executor.submit(Pretraining(options.gpus, options.arguments))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, number in (("nodes", 1), ("gpus", 8), ("hours", 24)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--partition")
    parser.add_argument("--logs", default="slurm", help="folder of the jobs' logs, which all nodes see")
    parser.add_argument(
        "--cluster", choices=("slurm", "local", "debug"), default="slurm", help="for a test without Slurm"
    )
    parser.add_argument("arguments", nargs="+", help="after --, those of `sparsecnx pretrain`")
    print(f"job {submit(parser.parse_args()).job_id}")
