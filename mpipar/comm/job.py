"""How a command runs as a job: it starts, its ranks agree when they cannot go on, it ends.

A failing rank ends the job; it never leaves the others waiting. There are two ways:

- Together. Inside `with agreement(world):` ranks do what may fail on some of them (open files, read a checkpoint).
  Where the block ends they exchange verdicts, and if one failed, all leave; the lowest failing rank says why.
- Alone. Any other error ends all ranks at once, from the rank on which it happened.

Either way one message is printed, without a traceback for an error of the input, and the exit code is not zero. A
supervisor, if there is one, is told of every end that another start would not change.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NoReturn, TypeVar

from mpipar.comm.communicator import Communicator
from mpipar.comm.environment import can_survive, launcher_mismatch, read_launch
from mpipar.comm.failure import part
from mpipar.comm.mpi import MPI, mpi_version
from mpipar.comm.select import VARIABLE
from mpipar.comm.wishes import wish
from mpipar.errors import ConfigError, LaunchError, MpiparError, PeerError
from mpipar.supervised import write_outcome

Result = TypeVar("Result")

EXIT_ERROR = 1


def run_job(main: Callable[[Communicator], int | Literal["stopped"] | None], *, singletons: bool = False) -> NoReturn:
    """Runs `main(world)` as this process's whole life, and exits with what it returns.

    Works under mpirun, and without it as a job of one rank.

    Args:
        main: What the command does. It returns its exit code; None is 0, and so is "stopped", of a command that was
            asked to stop before its end and would go on from there.
        singletons: Run it also where a launcher of another MPI has made n jobs of one rank out of one of n.
    """
    world = _begin()
    if not singletons:
        _require_one_job(world)
    if terminal_device() is None:
        os.environ["TERM"] = "dumb"  # the libraries that print for us then leave out colours
    try:
        code = _conclude(world, main(world))
    except SystemExit as leaving:  # of all ranks, as for --help
        if isinstance(leaving.code, str):
            _say(world, leaving.code)
        code = _conclude(world, leaving.code if isinstance(leaving.code, int) else EXIT_ERROR if leaving.code else 0)
    except PeerError as error:
        code = error.exit_code
    except KeyboardInterrupt:
        _leave(world, "interrupted", code=130)
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has enough
        world.abort(EXIT_ERROR) if world.size > 1 else os._exit(EXIT_ERROR)
    except MpiparError as error:
        if not error.passing:
            write_outcome("failed", str(error))
        if not getattr(error, "agreed", False):
            _leave(world, f"error: {error}", code=error.exit_code)
        _say(world, f"error: {error}")
        code = error.exit_code
    except Exception:
        _leave(world, f"failed\n{traceback.format_exc().rstrip()}", code=EXIT_ERROR)
    _end(world, code)


@contextmanager
def agreement(world: Communicator) -> Iterator[None]:
    """Collective: if the block raises a MpiparError on some ranks, it raises on all of them.

    The lowest of the failing ranks keeps its error, the others get a PeerError, which nobody prints. The block itself
    must not communicate: a rank that fails in it would leave the others waiting there.
    """
    mine: MpiparError | None = None
    try:
        yield
    except MpiparError as error:
        mine = error
    codes = world.all_gather_object(mine.exit_code if mine else 0)
    first = next((rank for rank, code in enumerate(codes) if code), None)
    if first is None:
        return
    if mine is None or world.rank != first:
        raise PeerError(f"rank {first} failed", rank=first, exit_code=codes[first]) from mine
    mine.agreed = True  # type: ignore[attr-defined]
    raise mine


def decide_on_root(world: Communicator, decide: Callable[[], Result]) -> Result:
    """What `decide()` returns on rank 0, on all ranks. An error there, or the exit of --help, is everybody's.

    For what reads the outside world (the command line, a folder), so that ranks cannot differ in what they saw.
    """
    result: Result | None = None
    exit_code: int | str | None = None
    exits = False
    with agreement(world):
        if world.rank == 0:
            try:
                result = decide()
            except SystemExit as error:
                exits, exit_code = True, error.code
    result, exits, exit_code = world.broadcast_object((result, exits, exit_code))
    if exits:
        raise SystemExit(exit_code)
    return result


def terminal_device() -> str | None:
    """The terminal on which this process's output appears, where somebody may be looking; None if it goes to a log.

    An MPI launcher gives its ranks a pseudo-terminal even if its own output goes to a file, and passes on whole lines
    only. So it is the launcher's output that counts, the parent's on the host where both are, and a progress line has
    to be written to that device itself.
    """
    if not sys.stdout.isatty():
        return None
    launched = "PMIX_RANK" in os.environ or "PMI_RANK" in os.environ
    try:
        device = os.readlink(f"/proc/{os.getppid()}/fd/1") if launched else os.ttyname(sys.stdout.fileno())
    except OSError:  # the parent is somebody else's, or the terminal is outside this container
        return None
    return device if device.startswith(("/dev/pts/", "/dev/tty")) and os.access(device, os.W_OK) else None


def _begin() -> Communicator:
    """The world, if the environment lets it be."""
    try:
        world = Communicator.world()
    except ConfigError as error:  # on all ranks
        if MPI.COMM_WORLD.rank == 0:
            write_outcome("failed", str(error))
            print(f"mpipar: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    if wish(VARIABLE) != "auto" and world.rank == 0:
        print(f"mpipar: {VARIABLE}={wish(VARIABLE)}: taken wherever it can be used", file=sys.stderr, flush=True)
    return world


def _require_one_job(world: Communicator) -> None:
    """Leaves if n processes were meant to be one job, and each is a job of its own that would do all the work."""
    mismatch = launcher_mismatch(os.environ, world.size, mpi_version())
    if mismatch is None:
        return
    launch = read_launch(os.environ)
    if launch is None or launch.rank == 0:  # the others would say the same
        write_outcome("failed", ": ".join(mismatch))
        _say(world, f"error: {LaunchError(': '.join(mismatch))}")
    sys.exit(EXIT_ERROR)


def _conclude(world: Communicator, result: int | Literal["stopped"] | None) -> int:
    """Tells the supervisor how a command ended that has come to its end on all ranks. Returns the exit code."""
    code = 0 if result is None or result == "stopped" else result
    # Of a world that has lost ranks nobody knows who is first: all say the same.
    if world.rank == 0 or (can_survive() and world.mpi.Is_revoked()):
        if code:
            write_outcome("failed", f"exit code {code}")
        else:
            write_outcome("stopped" if result == "stopped" else "done")
    return code


def _end(world: Communicator, code: int) -> NoReturn:
    """Collective: leaves with the others."""
    sys.stdout.flush()
    try:
        part(world)
    except MpiparError as error:
        _leave(world, f"error: {error}", code=error.exit_code)
    except Exception:  # of a GPU, in what it was still to do
        _leave(world, f"failed\n{traceback.format_exc().rstrip()}", code=EXIT_ERROR)
    if can_survive():
        os._exit(code)  # MPI_Finalize may wait for the dead
    # All are here, so what it waits for is near. If it does not come, this says in which call: mpi4py lets no other
    # thread of Python run in MPI_Finalize.
    faulthandler.dump_traceback_later(world.progress.timeout_s, exit=True)
    MPI.Finalize()
    faulthandler.cancel_dump_traceback_later()
    sys.exit(code)


def _say(world: Communicator, text: str) -> None:
    where = f" rank {world.rank}:" if world.size > 1 and world.rank > 0 else ""
    sys.stdout.flush()
    print(f"mpipar:{where} {text}", file=sys.stderr, flush=True)


def _leave(world: Communicator, text: str, code: int) -> NoReturn:
    """Ends the job from here: the others may be waiting for a message that will never be sent."""
    _say(world, text)
    if world.size > 1:
        world.abort(code)
    os._exit(code)
