#!/bin/bash
# slurm_down.sh FOLDER: ends what slurm_up.sh started there, its jobs first.
folder=$1
export SLURM_CONF=$folder/slurm.conf
scancel --full --user=root
for _ in $(seq 100); do
    [ -n "$(squeue -h)" ] || break
    sleep 0.1
done
for file in "$folder"/run/*.pid; do
    kill "$(cat "$file")"
done
for _ in $(seq 100); do
    compgen -G "$folder/run/*.pid" >/dev/null || exit 0
    sleep 0.1
done
exit 1
