#!/usr/bin/env bash
# Debian's Slurm, for tests/slurm: daemons are installed, not started. Needs root and apt.
set -euo pipefail
if command -v slurmctld slurmd slurmdbd munged mariadbd >/dev/null 2>&1; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "Slurm is not installed and needs root and apt-get; the tests skip with the reason" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# A policy that forbids starting services, where the image has none of its own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
  slurm-wlm slurmctld slurmd slurm-client slurmdbd munge mariadb-server >/dev/null
