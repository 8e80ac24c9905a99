#!/bin/bash
# A Slurm cluster of this machine alone, to try the wrappers on. Needs root and the packages slurm-wlm and munge.
# Usage: slurm/local_cluster.sh start FOLDER; export SLURM_CONF=FOLDER/slurm.conf; …; slurm/local_cluster.sh stop FOLDER
set -euo pipefail
action="${1:?start or stop}" folder="$(realpath "${2:?a folder}")"
if [ "$action" = stop ]; then
    for daemon in slurmd slurmctld munged; do
        [ -s "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" 2> /dev/null || true
    done
    exit 0
fi
mkdir -p "$folder/state" "$folder/spool"
name=$(hostname -s) cores=$(nproc) memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
cat > "$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$name(127.0.0.1)
SlurmctldPort=${PORT:-16817}
SlurmdPort=$((${PORT:-16817} + 1))
AuthInfo=socket=$folder/munge.socket
SlurmUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName=$name NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
[ -s "$folder/munge.key" ] || head -c 128 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
    --log-file "$folder/munged.log" --seed-file "$folder/munged.seed"
export SLURM_CONF="$folder/slurm.conf"
slurmctld
slurmd
for _ in $(seq 100); do
    sinfo --noheader --format %T 2> /dev/null | grep -q idle && exit 0
    sleep 0.2
done
echo "the node is not idle after 20 s; logs are in $folder" >&2
exit 1
