#!/usr/bin/env bash
# The inside of the emulated cluster (see cluster.py). Every host is a set of namespaces with its own process table,
# network address, host name, /tmp and /dev/shm.
#   hosts.sh cluster DIR NODES [SHARED…]    process 1 of the cluster: a bridge, munge, the controller, then the nodes
#   hosts.sh node DIR NUMBER [SHARED…]      process 1 of a node: slurmd
#   hosts.sh power_on DIR NUMBER [SHARED…]  start a node; runs inside the cluster
# SHARED: folders in /tmp that all hosts see, like a network file system.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
role=$1 dir=$2 number=$3
shift 3
export SLURM_CONF=$dir/slurm.conf

forever() { while :; do wait || true; sleep 1; done; }  # reaps processes whose parent has ended

own_network() {  # succeeds once process $1 has its own network
  [ -e "/proc/$1/ns/net" ] && [ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ]
}

cluster() {
  hostname login
  ip link set lo up
  mount --bind "$dir/hosts" /etc/hosts
  mount --bind "$dir/nsswitch.conf" /etc/nsswitch.conf  # without it, address look-ups wait for a name server
  for gpu in "$dir"/gpus/*; do mount --bind /dev/null "$gpu"; done  # gres.conf needs device files
  ip link add br0 type bridge
  ip addr add 10.77.0.254/24 dev br0
  ip link set br0 up
  munged --key-file="$dir/munge.key" --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed"
  slurmctld -D -c >"$dir/log/slurmctld.out" 2>&1 &
  for node in $(seq "$number"); do bash "$self" power_on "$dir" "$node" "$@"; done
  forever
}

power_on() {
  setsid unshare -u -i -n -p -m -f --kill-child --mount-proc bash "$self" node "$dir" "$number" "$@" \
    >"$dir/log/node$number.out" 2>&1 </dev/null &
  echo $! >"$dir/run/node$number.outer"
  until own_network $!; do sleep 0.02; done
  ip link del "veth$number" 2>/dev/null || true  # left from the node's last start
  ip link add "veth$number" type veth peer name eth0 netns $!
  ip link set "veth$number" master br0 up
}

node() {
  hostname "node$number"
  ip link set lo up
  mount -t tmpfs shm /dev/shm
  mount --rbind /tmp /mnt
  mount -t tmpfs tmp /tmp
  chmod 1777 /tmp
  for folder in "$@"; do mkdir -p "$folder" && mount --rbind "/mnt/${folder#/tmp/}" "$folder"; done
  umount -l /mnt
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  ip addr add "10.77.0.$number/24" dev eth0
  ip link set eth0 up
  slurmd -D >"$dir/log/slurmd$number.out" 2>&1 &
  forever
}

"$role" "$@"
