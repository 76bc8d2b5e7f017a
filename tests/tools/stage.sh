#!/usr/bin/env bash
# A clean copy of the collection at DIR/ansible_collections/openvadp/backup: what git tracks or would track, nothing else.
# ansible-test and ansible-galaxy want it so; a symlink fails there.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${1:?usage: stage.sh DIR}/ansible_collections/openvadp/backup
mkdir -p "$target"
find "$target" -mindepth 1 -delete
git ls-files -z --cached --others --exclude-standard --deduplicate |
    while IFS= read -r -d '' file; do [ -e "$file" ] && printf '%s\0' "$file"; done |
    tar --null --no-recursion -T - -cf - | tar -xf - -C "$target"
git -C "$target" init -q
git -C "$target" add -A
echo "$target"
