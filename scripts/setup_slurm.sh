#!/usr/bin/env bash
# Installs SLURM and munge from Debian's packages where they are missing: tests/slurm starts a small
# cluster of its own from them. Nothing is configured and no service is started.
source "$(dirname "${BASH_SOURCE[0]}")/setup_lib.sh"

packages=(slurmd slurmctld slurm-client munge)
missing=()
for program in slurmd slurmctld sbatch srun scontrol munged; do
    # Debian keeps daemons in /usr/sbin, which the PATH of other users than root need not hold.
    PATH=$PATH:/usr/sbin command -v $program >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} = 0 ]; then
    say "SLURM is ready: $(PATH=$PATH:/usr/sbin slurmctld -V)"
    exit 0
fi

by_hand="install SLURM with its controller, its daemon and munge (Debian: apt-get install ${packages[*]})"
command -v apt-get >/dev/null ||
    stop "no ${missing[*]}, and no apt-get here: $by_hand"
[ "$(id -u)" = 0 ] ||
    stop "no ${missing[*]}, and only root may install packages: $by_hand"
say "installing ${packages[*]} (no ${missing[*]})"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q >/dev/null
apt-get install -q -y --no-install-recommends "${packages[@]}" >/dev/null
say "SLURM is ready: $(PATH=$PATH:/usr/sbin slurmctld -V)"
