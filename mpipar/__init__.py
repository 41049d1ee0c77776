"""mpipar trains language models on MPI machines: `mpirun -n 8 python -m mpipar.train`.

The packages, top floor first; imports go strictly down.

    train                   the loop, its configuration, metrics and run folder
    parallel                how work is divided over ranks
    model  data  checkpoint what is trained, on what, and how it is kept
    comm  storage           messages between ranks, bytes in files
    errors
"""

__version__ = "0.1.0"
