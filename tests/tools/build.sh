#!/usr/bin/env bash
# Builds the collection archive from a staged copy (so that no cache ships) into DIR.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$(realpath "${1:?usage: build.sh DIR}")
tree=$(tests/tools/stage.sh build/galaxy)
rm -rf "$tree/.git"
.venv/bin/ansible-galaxy collection build --force --output-path "$target" "$tree"
