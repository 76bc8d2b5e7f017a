#!/usr/bin/env bash
# The Python interpreters found on this machine that the collection supports, one full path a line, one for each version.
set -uo pipefail
for version in 3.8 3.9 3.10 3.11 3.12 3.13; do
    for candidate in "/usr/bin/python$version" "/usr/local/bin/python$version" "${PYENV_ROOT:-/root/.pyenv}"/versions/"$version".*/bin/python"$version"; do
        if [ -x "$candidate" ] && "$candidate" -c 'import ensurepip' 2>/dev/null; then
            echo "$candidate"
            break
        fi
    done
done
