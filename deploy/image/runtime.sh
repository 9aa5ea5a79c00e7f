#!/usr/bin/env bash
# Step of the images: what runs beside /opt/foveate, and the user that it runs as.
#
#   runtime.sh cpu|cuda
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
packages=(ca-certificates python3)
if [[ $1 == cuda ]]; then packages+=(g++ python3-dev); fi # triton and flashinfer compile when they first run
apt-get update
apt-get install -y --no-install-recommends "${packages[@]}"
rm -rf /var/lib/apt/lists/*
# A fixed number: a volume keeps its owner from one image to the next. Nobody logs in as it.
groupadd --gid 10001 foveate
useradd --uid 10001 --gid 10001 --home-dir /var/lib/foveate --no-create-home --shell /usr/sbin/nologin foveate
install -d -o foveate -g foveate -m 0750 /var/lib/foveate
