"""Training: `mpirun -n 8 python -m mpipar.train`.

config        the settings
loop          a run from its settings to a trained model
step          one step: microbatches to gradients, gradients to weights
source        which microbatches this rank reads
optimizer     AdamW, the learning rate
resume        going on from a checkpoint, writing one
run_folder    what is kept of a run
metrics       what is measured
terminal report plot     what is shown
"""
