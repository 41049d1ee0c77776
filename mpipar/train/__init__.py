"""Training: `mpirun -n 8 python -m mpipar.train`.

config        the settings
config_text   read from the command line and TOML files, and written
resolve       what they leave to the machine
device        which GPU each rank takes
loop          a run from its settings to a trained model
step          one step: microbatches to gradients, gradients to weights
source        which microbatches this rank reads
readings      what a step computes, read once
loss_scale    of gradients in float16
peak          how fast a GPU could be
out_of_memory a GPU that is full: what to shrink
optimizer     AdamW, the learning rate
memory        what a step frees is kept for the next
elastic       going on without ranks that die
dealing       who computes which microbatch
verify        replicas that should be equal, and are not
stragglers    ranks that are slow
reproducible  what has to hold so that the number of ranks does not enter
resume        going on from a checkpoint, writing one
stop          being asked to stop
run_folder    what is kept of a run
metrics       what is measured
metrics_file  metrics.jsonl, which can be rewound
record        where that is kept and shown
terminal      lines and a progress line
report        the header, the last words
plot          loss.png
"""
