"""The supervisor: starts a job under mpirun, and starts it again when it is lost. It never imports MPI.

supervisor   start, watch, judge, and again
verdict      what follows from how a job ended
watch        a job to its end, which is brought about where it would not come
job          one start: mpirun, and all processes that stem from it
mpirun       which MPI it is, and the flags that it needs
hosts        where ranks may run, and which of those hosts are still there
folders      what a supervisor keeps, and what dead ones have left
processes    whatever descends from this process, ended and reaped
requests     signals, as requests to stop
options      the command line
"""
