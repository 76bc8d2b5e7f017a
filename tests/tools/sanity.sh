#!/usr/bin/env bash
# ansible-test sanity on a staged copy: all tests on the controller's Python, compile on every Python found, import on the
# controller's and the oldest (it takes half a minute each; lint.sh imports on all of them, in its own quick way).
# It sees what is published. "all" adds the programs that test it, which are more than half of all lines (lint.sh checks
# them each time), and imports on the newest Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
tree=$(tests/tools/stage.sh build/ansible-test)
if [ "${1:-}" != all ]; then
    sed -n 's|^  - \(tests/.*\)|\1|p' galaxy.yml | xargs git -C "$tree" rm -rfq --ignore-unmatch
fi
export HOME=$root/build/ansible-test/home
mkdir -p "$HOME/.ansible/test/cache"
for version in 24_2 25_2; do
    ln -sf "$root/tests/tools/get_pip.py" "$HOME/.ansible/test/cache/get_pip_$version.py"
done
mapfile -t folders < <("$root/tests/tools/pythons.sh" | sed 's|/[^/]*$||')
pythons=$(IFS=: && echo "${folders[*]}")
export PATH="$root/.venv/bin:$PATH${pythons:+:$pythons}"
cd "$tree"
ansible-test sanity --local --color no --python "$("$root/.venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
    --skip-test pslint --skip-test import --skip-test compile
ansible-test sanity --local --color no --test compile --python default
# It takes all that it finds.
imported=$root/.venv/bin${pythons:+:${folders[0]}}
if [ "${1:-}" = all ]; then
    imported=$imported${pythons:+:${folders[-1]}}
fi
PATH=$imported:/usr/bin:/bin \
    ansible-test sanity --local --color no --test import --python default
