#!/usr/bin/env bash
# Step of the images: what it takes to build the wheel and the environment.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev python3-pip python3-venv
rm -rf /var/lib/apt/lists/*
