"""The command `python -m mpipar.launch`."""

from __future__ import annotations

import sys

from mpipar.launch.requests import Requests


def main(requests: Requests) -> int:
    from mpipar.errors import MpiparError
    from mpipar.launch.options import parse
    from mpipar.launch.processes import adopt_orphans
    from mpipar.launch.supervisor import Supervisor, say

    try:
        options, command = parse(sys.argv[1:])
        adopt_orphans()
        with Supervisor(options, command, requests) as supervisor:
            return supervisor.run()
    except MpiparError as error:
        say(f"error: {error}")
        return error.exit_code


if __name__ == "__main__":
    requests = Requests()  # first of all: a signal that comes during the imports is to find somebody
    sys.exit(main(requests))
