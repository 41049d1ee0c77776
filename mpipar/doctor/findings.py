"""What the facts mean, and what to do. Pure: from facts to findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mpipar.amounts import plural
from mpipar.comm.environment import NO_DEVICE, GpuTransfer, MpiFacts
from mpipar.doctor.facts import FolderFacts, RankFacts
from mpipar.train.device import place

MIB = 1 << 20
GIB = 1 << 30

# What MPI libraries take of /dev/shm, generously.
SHM_BYTES_PER_RANK = 32 * MIB


@dataclass(frozen=True)
class Finding:
    """One thing about the machine.

    Args:
        mark: Good; worth knowing; training will not work, or not as one job.
        text: What it is.
        remedy: What can be done about it.
    """

    mark: Literal["ok", "note", "bad"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{f'[{self.mark}]':<7}{self.text}"
        return f"{line}\n       -> {self.remedy}" if self.remedy else line


def judge(ranks: Sequence[RankFacts], folder: FolderFacts, gpu: GpuTransfer) -> Iterator[Finding]:
    """All findings about a job.

    Args:
        ranks: The facts of its ranks, by rank.
        folder: Those of rank 0's working directory.
        gpu: What came of sending an array between GPUs.
    """
    yield from judge_software(ranks)
    yield from judge_mpi([rank.mpi for rank in ranks])
    yield from judge_cores(ranks)
    yield judge_bf16(ranks)
    yield judge_compiled(ranks)
    yield judge_sums_on_a_host(ranks)
    yield from judge_devices(ranks)
    yield judge_gpu(gpu)
    yield from judge_folder(folder, [rank.host for rank in ranks if not rank.sees_folder])
    yield from judge_shared_memory(ranks)


def judge_software(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """The same versions everywhere?"""
    mine = ranks[0].software
    yield Finding("ok", ", ".join(f"{name} {version}" for name, version in mine.items()))
    for name, version in mine.items():
        others = [(number, rank) for number, rank in enumerate(ranks) if rank.software[name] != version]
        if others:
            number, rank = others[0]
            there = f"{rank.software[name]} on rank {number} (host {rank.host})"
            yield Finding("bad", f"{name} is {version} on rank 0, {there}", "give all hosts the same environment")


def judge_mpi(mpis: Sequence[MpiFacts]) -> Iterator[Finding]:
    """The library, its threads, its tags, its fault tolerance."""
    mpi = mpis[0]
    standard = ".".join(map(str, mpi.standard))
    about = f"thread level {mpi.thread_level}, largest tag {mpi.largest_tag}"
    yield Finding("ok", f"MPI: {mpi.library}, standard {standard}, {about}")
    libraries = sorted({mpi.library for mpi in mpis})
    if len(libraries) > 1:
        yield Finding("bad", f"ranks have different MPI libraries: {', '.join(libraries)}", "use one on all hosts")
    if mpi.thread_level in ("single", "funneled"):
        yield Finding(
            "bad",
            f"MPI may be called from the main thread only (thread level {mpi.thread_level})",
            "use an MPI with thread support: mpipar makes progress from the thread that runs backward",
        )
    if mpi.fault_tolerance == "on":
        yield Finding("ok", "fault tolerance (ULFM) is on")
    elif mpi.fault_tolerance == "off":
        yield Finding("ok", "fault tolerance (ULFM) is available and off", "mpirun --with-ft ulfm turns it on")
    else:
        yield Finding("note", "this MPI has no fault tolerance (ULFM)", "Open MPI 5 has; mpirun --with-ft ulfm")


def judge_cores(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Ranks and threads against cores, host by host."""
    hosts = Counter(rank.host for rank in ranks)
    alone = "mpirun -n 8 python -m mpipar.doctor looks at a whole job" if len(ranks) == 1 else ""
    yield Finding("ok", f"{plural(len(ranks), 'rank')} on {plural(len(hosts), 'host')}", alone)
    for host, count in hosts.items():
        here = [rank for rank in ranks if rank.host == host]
        cores = len(frozenset().union(*(rank.cores for rank in here)))
        ours = f"{host}: {plural(count, 'rank')} on {plural(cores, 'core')}"
        default, training = here[0].threads, here[0].cores_per_rank
        if count > cores:
            yield Finding(
                "note",
                f"{ours}: they take turns. Ranks that wait give way, so this works, but it is not faster",
                f"for speed: mpirun -n {cores}",
            )
        elif default * count > cores:
            yield Finding(
                "note",
                f"{ours}: torch's default of {plural(default, 'thread')} a rank is too many",
                f"mpipar.train sets 1; in programs of your own: OMP_NUM_THREADS={training}",
            )
        else:
            yield Finding("ok", ours)
        if training > 1:
            yield Finding(
                "note",
                f"{host}: there are {training} cores a rank, of which mpipar.train uses 1",
                f"start more ranks, or give --train.threads {training}, which has other bits than 1",
            )


def judge_bf16(ranks: Sequence[RankFacts]) -> Finding:
    """bfloat16 on the processor."""
    return _everywhere(
        (rank.host for rank in ranks if not rank.fast_bf16),
        "the processor multiplies bf16 in hardware: --train.precision auto takes it",
        "no bf16 instructions on {}: --train.precision auto takes fp32",
    )


def judge_compiled(ranks: Sequence[RankFacts]) -> Finding:
    """How arrays are added up, and exact sums rounded."""
    return _everywhere(
        (rank.host for rank in ranks if not rank.compiled_library),
        "sums in shared memory are made, and exact ones rounded, in one pass (comm/adding.c, rounding.c)",
        "arrays are added up by numpy and rounded by torch on {}: comm/adding.c and rounding.c were not built",
        "install a C compiler and run make setup again: adding takes half to four fifths of the time, "
        "rounding a quarter, to the same bits",
    )


def judge_sums_on_a_host(ranks: Sequence[RankFacts]) -> Finding:
    """How the ranks of a host sum."""
    return _everywhere(
        (rank.host for rank in ranks if not rank.compiled_sums),
        "sums on a host are one call (comm/meeting.c)",
        "sums on a host go step by step, and of large ordinary arrays in messages, on {}: comm/meeting.c was not built",
        "install a C compiler and Python's headers (python3-dev or python3-devel), and run make setup again: "
        "a sum of few numbers takes a quarter of the time, one of large arrays in ordinary memory half to four fifths",
    )


def _everywhere(lacking: Iterable[str], ok: str, text: str, remedy: str = "") -> Finding:
    """That something is so, or a note on which hosts it is not."""
    hosts = sorted(set(lacking))
    return Finding("note", text.format(some(hosts)), remedy) if hosts else Finding("ok", ok)


def judge_devices(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Which GPUs a run would take. Nothing where no rank sees any."""
    hosts = list(dict.fromkeys(rank.host for rank in ranks))
    placement = place("auto", [rank.devices for rank in ranks], [hosts.index(rank.host) for rank in ranks])
    if placement.note:
        remedy = "start ranks only where there are GPUs, or look for the driver with nvidia-smi -L"
        yield Finding("note", f"--train.device auto: {placement.note}", remedy)
    elif placement.on_gpus:
        count = len(placement.gpus_of(range(len(ranks))))
        shared = count < len(ranks)
        remedy = f"ranks that share a GPU take turns; for speed: mpirun -n {count}" if shared else ""
        yield Finding("note" if shared else "ok", f"--train.device auto takes {placement.said()}", remedy)


def judge_gpu(gpu: GpuTransfer) -> Finding:
    """Whether MPI takes arrays in the memory of a GPU."""
    if gpu.result == "works":
        return Finding("ok", f"GPU: MPI sends and receives in its memory ({gpu.detail}); MPIPAR_CUDA=mpi uses that")
    if gpu.result == "fails":
        remedy = "nothing: arrays on GPUs go through memory that the ranks share, or that of the host"
        return Finding("note", f"GPU: MPI cannot use its memory ({gpu.detail})", remedy)
    return Finding("ok" if gpu.detail == NO_DEVICE else "note", f"GPU: {gpu.detail}")


def judge_folder(folder: FolderFacts, blind_hosts: Sequence[str]) -> Iterator[Finding]:
    """The place where data, runs and checkpoints go by default."""
    where = f"{folder.path} ({folder.file_system})"
    if folder.write_error:
        yield Finding("bad", f"{where}: nothing can be written: {folder.write_error}", "start from a folder of yours")
        return
    if blind_hosts:
        yield Finding(
            "bad",
            f"{where} is another folder on {some(sorted(set(blind_hosts)))}",
            "start from a file system that all hosts share, or give folders on one as --data.dir and --run.dir",
        )
    room = f"{where}: {folder.free_bytes / GIB:.1f} GiB free"
    if folder.free_bytes < GIB:
        yield Finding("note", room, "a checkpoint takes 12 bytes a parameter, and the last few are kept")
    else:
        yield Finding("ok", room)
    if folder.lock_error:
        yield Finding(
            "note",
            f"HDF5 {folder.hdf5} cannot lock files here: {folder.lock_error}",
            "mpipar does not need it; other tools: HDF5_USE_FILE_LOCKING=FALSE",
        )
    else:
        yield Finding("ok", f"HDF5 {folder.hdf5} can lock files here")


def judge_shared_memory(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """/dev/shm, where MPI libraries keep what the ranks of a host share. Containers often have 64 MiB of it."""
    for host, count in Counter(rank.host for rank in ranks).items():
        shm = next(rank.shm_bytes for rank in ranks if rank.host == host)
        if shm is None:
            yield Finding("note", f"{host}: there is no /dev/shm", "MPI libraries need it, or files in TMPDIR instead")
            continue
        free, size = shm
        text = f"{host}: {free // MIB} of {size // MIB} MiB free in /dev/shm"
        if free < count * SHM_BYTES_PER_RANK:
            yield Finding("note", text, "killed jobs leave files there (ls -l /dev/shm); docker run --shm-size=1g")
        else:
            yield Finding("ok", text)


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first names of a list that may have a thousand."""
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
