#!/bin/bash
# slurm_up.sh FOLDER NODES CPUS: starts a Slurm of several nodes on this host, for tests. All it writes is in FOLDER.
# Needs root, but neither munge nor systemd. It is up when this returns; its commands need SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
folder=$1 nodes=$2 cpus=$3
host=$(hostname -s)
port=${SLURM_TEST_PORT:-$((20000 + $$ % 10000))}

mkdir -p "$folder"/{state,log,run,spool,tmp}
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
KillWait=5
MinJobAge=3600
InactiveLimit=0
Waittime=0
JobRequeue=1
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
TmpFS=$folder/tmp
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
NodeName=DEFAULT CPUs=$cpus RealMemory=1000
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))]
PartitionName=main Nodes=ALL Default=YES MaxTime=1:00:00 State=UP
CONF

export SLURM_CONF=$folder/slurm.conf
slurmctld -c
for i in $(seq "$nodes"); do
    mkdir -p "$folder/spool/n$i"
    slurmd -c -N "n$i"
done
for _ in $(seq 100); do
    [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" != "$nodes" ] || exit 0
    sleep 0.1
done
sinfo >&2
exit 1
