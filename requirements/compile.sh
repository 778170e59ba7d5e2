#!/bin/sh
# Write the pins. Existing ones are kept where they still fit; --check only compares; --upgrade renews them all.
set -eu
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND="make pins"
out=requirements
upgrade=
case "${1:-}" in
    --check) out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; cp requirements/*.txt "$out" ;;
    --upgrade) upgrade=--upgrade ;;
esac

extras() { sed -n '/^\[project.optional-dependencies\]/,/^\[project.scripts\]/s/^\([a-z]*\) = \[.*/\1/p' pyproject.toml; }

pin() {
    file=$out/$1.txt
    shift
    requirements/uv.sh pip compile pyproject.toml "$@" $upgrade --quiet --output-file "$file" \
        --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
}

# One set of versions: the narrower files are held to the widest.
all=
for extra in $(extras); do
    if [ "$extra" != local ]; then all="$all --extra $extra"; fi
done
# shellcheck disable=SC2086  # options, one word each
pin dev $all --group dev
runtime=$(echo "$all" | sed 's/ --extra embedded//; s/ --extra tokens//')
# shellcheck disable=SC2086
pin runtime $runtime --constraint "$out/dev.txt"
pin local --extra local --constraint "$out/dev.txt"

if [ "$out" != requirements ]; then
    diff -ru requirements "$out" --exclude='*.sh' || { echo "the pins do not fit pyproject.toml: run make pins" >&2; exit 1; }
fi
