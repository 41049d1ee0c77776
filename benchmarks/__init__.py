"""The benchmark harness: `mpirun -n 4 python -m benchmarks QUESTION`.

    allreduce, reduce_scatter, all_gather, all_to_all    a collective beside MPI's and gloo's, over sizes
    p2p          messages between neighbours
    overlap      how much of an all-reduce hides behind computation
    step         a data-parallel training step against torch DDP over gloo
    checkpoint   writing and reading a state, and how long it holds up a run
    exact        what should hold a sum of gradients that no order of addition shows in
    data         reading tokens at random, starting with a thousand shards, memory

Every comparison is made in one run: the contestants take turns, a measurement of one ends before that of the next
begins, and what is reported are medians of the slowest rank, and ratios of times that were taken side by side. What is
timed is checked first. `python -m benchmarks.launches` asks one question under several MPIs.

Each file answers one question or does one thing:

    sweep        what the questions over sizes share: options, checks, turns, output
    case         one size of one question: memory, contestants
    halves       reduce_scatter and all_gather
    limits       what the machine could do at best
    patterns     numbers whose sums are exact
    measure      taking turns, ratios
    formats      tables of nccl-tests and of the OSU benchmarks, JSON
    plot         the picture of a table
    gradients, representations    of exact: real gradients, and ways to hold their sums
    machine      on what it was measured
    mpi_peer, gloo, litdata_peer    the peers
    command      what those below share, each of which is a command of its own: python -m benchmarks.launches
    launches     one question under several MPIs, in turn
    curves       the losses of several runs, on one line or not
    recovery     how long jobs stand still when a process of theirs is killed; watched, ddp_worker: what it starts
    gpu_check    all that needs a GPU (make gpu-check); gpu_training, gpu_reproducible: two questions of it
    random_tokens  what they train on
    hosts        a job over several hosts on one machine; namespaces, delay_switch: how they are made
"""
