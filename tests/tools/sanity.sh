#!/usr/bin/env bash
# ansible-test sanity on a staged copy, as the newest ansible-core has it (where there is no Python for that: as .venv's).
# All tests on the controller's Python, compile on every Python found, import on the controller's and the oldest two (it takes half
# a minute each; lint.sh imports on all of them, in its own quick way).
# It sees what is published. "all" adds the programs that test it, which are more than half of all lines (lint.sh checks
# them each time), imports on the newest Python, and does the same as .venv's ansible-core has it.
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
mapfile -t pythons < <("$root/tests/tools/pythons.sh")

# $1: the folder of a controller's programs; then the Pythons on which everything is imported besides its own.
sanity() {
    local bin=$1 found folders
    shift
    found=$(IFS=: && echo "${pythons[*]%/*}")
    folders=$(IFS=: && echo "${*%/*}")
    echo "sanity: $("$bin/ansible" --version | sed -n 1p)"
    PATH=$bin:$PATH${found:+:$found}
    ansible-test sanity --local --color no --python "$("$bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
        --skip-test pslint --skip-test import --skip-test compile
    ansible-test sanity --local --color no --test compile --python default
    # It takes all that it finds.
    PATH=$bin${folders:+:$folders}:/usr/bin:/bin \
        ansible-test sanity --local --color no --test import --python default
}

cd "$tree"
newest=$root/build/controllers/newest/bin
[ -x "$newest/ansible-test" ] || newest=$root/.venv/bin
# ansible-core leaves out the oldest one that the collection supports when it no longer does.
imported=("${pythons[@]:0:2}")
if [ "${1:-}" = all ]; then
    imported+=("${pythons[@]: -1}")
    [ "$newest" = "$root/.venv/bin" ] || (sanity "$root/.venv/bin" "${imported[@]}")
fi
sanity "$newest" "${imported[@]}"
