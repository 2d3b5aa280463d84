#!/usr/bin/env bash
# Install Slurm, munge, and what plants faults (firewall, false clock, ssh) for the tests of clusters, if they are missing.
# Needs root and apt-get (Debian, Ubuntu); else it says what to do. It starts no service: the tests start their own, with their own configuration.
set -euo pipefail
PACKAGES=(slurmctld slurmd slurm-client munge iproute2 nftables faketime openssh-server openssh-client)

missing() {
    local name
    for name in slurmctld slurmd sbatch srun squeue scontrol munged munge ip nsenter nft faketime sshd ssh; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "$name" > /dev/null || echo "$name"
    done
}

if [ -z "$(missing)" ]; then
    echo "setup: the tests of clusters use Slurm $(PATH="$PATH:/usr/sbin" slurmctld -V | cut -d' ' -f2)"
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "setup: missing: $(missing | tr '\n' ' '); only root on Debian can install it here: install ${PACKAGES[*]}" >&2
    exit 1
fi
echo "setup: installing Slurm with apt-get for the tests of clusters (about half a minute)"
export DEBIAN_FRONTEND=noninteractive
# Debian's packages start their services when they are installed; a policy of 101 forbids that.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" > /dev/null
if [ -n "$(missing)" ]; then
    echo "setup: still missing after the installation: $(missing | tr '\n' ' ')" >&2
    exit 1
fi
echo "setup: the tests of clusters use Slurm $(slurmctld -V | cut -d' ' -f2)"
