#!/usr/bin/env bash
# Install what tests/slurm needs: Slurm, its authentication (munge), PMIx for srun's --mpi=pmix, and ip. Needs root and
# apt-get. Starts nothing.
set -euo pipefail
packages=(slurm-wlm munge libpmix-dev iproute2)
if dpkg --status "${packages[@]}" >/dev/null 2>&1; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "Slurm is not installed, and installing it needs root and apt-get" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
