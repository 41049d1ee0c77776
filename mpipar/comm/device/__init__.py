"""Arrays on a GPU: how they get from rank to rank.

devices       which array is on which GPU, and which transport carries it
  collectives    in memory of the GPUs of one host that its ranks open in each other: kernels, nothing sent
  arena          that memory, and the events at which the ranks' streams wait for one another
  staging        through pinned memory of the host, in pieces: for all else
  views          pointers to the device, for an MPI that takes them
transport     what the user asks for: MPIPAR_CUDA
runtime       the calls of CUDA that are used, as a protocol
cuda          the same, of a GPU: the only file that imports CuPy
kernels       what runs on the GPU

CuPy is imported when the first array on a GPU appears, not before.
"""
