"""The benchmark harness: `mpirun -n 2 python -m benchmarks QUESTION`.

    allreduce    the ring against MPI_Allreduce and gloo, over sizes
    step         a data-parallel training step against torch DDP over gloo

Every comparison is made in one run: the contestants take turns, a measurement of one ends before that of the next
begins, and what is reported are medians of the slowest rank, and ratios of times that were taken side by side.
"""
