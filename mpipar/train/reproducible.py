"""What has to hold so that the number of ranks does not enter the bits of a run.

Covered: how many ranks there are, on how many hosts, on GPUs of their own or sharing one, which of them computes which
microbatch, where the run stops and goes on, which ranks die. Not covered: another version of torch, another type of
processor or GPU, another number of threads a rank; and, once there is tensor parallelism, another degree of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from mpipar.comm import Communicator, agreement
from mpipar.errors import ConfigError
from mpipar.processor import processor_name
from mpipar.train.config import Config
from mpipar.train.device import Gpu, Placement

# Settings of a reproducible run that another start of it may not change: beside those of any run.
MUST_MATCH = tuple(("train", name) for name in ("reproducible", "microbatch", "device", "precision", "threads"))

# With other workspaces cuBLAS may choose another algorithm from call to call (its documentation, "Results
# reproducibility").
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")


def prepare(config: Config, world: Communicator, placement: Placement) -> None:
    """Makes torch take deterministic kernels, and refuses what would break the promise. Collective.

    On GPUs: before this process first uses its own.

    Raises:
        ConfigError: A setting, or the machine, cannot keep it.
    """
    if placement.on_gpus:
        os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    gpu = placement.gpus[world.rank] if placement.on_gpus else None
    machines = world.all_gather_object(_machine(gpu))
    with agreement(world):
        broken = list(what_breaks_it(config, placement, os.environ.get(_WORKSPACE, "")))
        if broken:
            raise ConfigError(" ".join(broken))
        for rank, machine in enumerate(machines):
            if machine != machines[0]:
                raise ConfigError(
                    f"--train.reproducible true: rank 0 has {machines[0]}, rank {rank} has {machine}. Kernels "
                    "differ in their bits between processors and versions: take hosts of one kind"
                )
    torch.use_deterministic_algorithms(True)
    if placement.on_gpus:
        # Of attention's backward, flash's and the memory-efficient one have a deterministic form, which torch then
        # takes; cuDNN's has none.
        torch.backends.cuda.enable_cudnn_sdp(False)


def what_breaks_it(config: Config, placement: Placement, workspace: str) -> Iterator[str]:
    """The reasons why the bits would not be the same, and what to do about each.

    Args:
        config: The settings.
        placement: Where the ranks compute.
        workspace: Of cuBLAS, as its variable has it.
    """
    if config.train.compile:
        yield (
            "--train.compile true with --train.reproducible true: what the compiler makes of a model may add in "
            "another order in the next process. Take one of both."
        )
    if placement.on_gpus and workspace not in _WORKSPACES:
        yield (
            f"{_WORKSPACE}={workspace} with --train.reproducible true: matrix products are reproducible with "
            f"{' or '.join(_WORKSPACES)} only. Unset it."
        )


def _machine(gpu: Gpu | None) -> str:
    """What decides which kernels torch takes."""
    if gpu is None:
        return f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}) on {processor_name()}"
    capability = ".".join(map(str, gpu.capability))
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # of CUDA, as 12080
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {os.environ[_WORKSPACE]}"
    return f"torch {torch.__version__} ({libraries}) on {gpu.name} (capability {capability}, driver {driver})"
