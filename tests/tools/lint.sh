#!/usr/bin/env bash
# All static checks but ansible-test's: each prints its name; the first that fails ends it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
export ANSIBLE_COLLECTIONS_PATH=$PWD/build/lint ANSIBLE_LOCAL_TEMP=$PWD/build/lint/tmp
check() {
    printf 'lint: %s\n' "$1"
    shift
    "$@"
}
tree=$(tests/tools/stage.sh build/lint)
mapfile -t scripts < <(git ls-files --cached --others --exclude-standard | xargs grep -lE '^#!.*\b(ba)?sh\b')

check "ruff check" ruff check -q --output-format concise .
check "ruff format" ruff format -q --check .
check "shellcheck" shellcheck "${scripts[@]}"
check "yamllint" yamllint --strict .
check "mypy" env MYPYPATH="$PWD/build/lint" mypy --config-file "$PWD/pyproject.toml" "$tree/plugins"
check "changelog" bash -c "cd '$tree' && antsibull-changelog lint"
check "documentation" antsibull-docs lint-collection-docs --plugin-docs --validate-collection-refs=self "$tree"
check "ansible-lint, production profile" bash -c "cd '$tree' && ansible-lint --offline --profile production --strict -q"

# As on a host that has none of the libraries: of the environment it sees Ansible alone.
mkdir -p build/lint/ansible
ln -sfn "$(python -c 'import ansible; print(ansible.__path__[0])')" build/lint/ansible/ansible
while read -r python; do
    check "imports on ${python##*/}" "$python" -I tests/tools/import_all.py build/lint "$tree"
done < <(tests/tools/pythons.sh)

check "builds and installs" bash -c '
    set -e
    rm -rf build/lint/archive && mkdir -p build/lint/archive
    tests/tools/build.sh build/lint/archive >/dev/null
    ansible-galaxy collection install --offline -p build/lint/archive build/lint/archive/openvadp-backup-*.tar.gz >/dev/null
    if tar -tzf build/lint/archive/openvadp-backup-*.tar.gz | grep -E "^(\.venv|build|tests/output)/"; then
        echo "the archive ships caches"
        exit 1
    fi'
echo "lint: passed"
