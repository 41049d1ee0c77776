"""What a machine offers for training, and what will bite: `python -m mpipar.doctor`, alone or under mpirun.

facts       what each rank knows of its process, its host and the working directory
findings    what that means, and what to do: pure, so that a test can make up any machine
"""
