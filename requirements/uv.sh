#!/bin/sh
# uv as the machine is set up: found on PATH, or installed into .tools/ by pip. It then uses
# the package index and the certificates that pip is configured with, unless uv has its own.
set -eu
cd "$(dirname "$0")/.."

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=${PYTHON:-}
for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if [ -z "$python" ] && usable "$name"; then python=$name; fi
done
[ -n "$python" ] || { echo "Python 3.11 or newer is needed: name one with make PYTHON=/path/to/python3" >&2; exit 2; }
if [ "${1:-}" = --python ]; then "$python" -c 'import sys; print(sys.executable)'; exit; fi

# What pip is configured with, in a file or in the environment.
settings=$("$python" -m pip config list 2>/dev/null || true)
pip_setting() {
    echo "$settings" | sed -n "s/^[a-z:]*\.$1=['\"]\(.*\)['\"]\$/\1/p" | sed 's/\\n/ /g; s/^ *//; s/ *$//' | head -n 1
}

# uv looks at the system's certificates; pip of Python 3.11 does not.
certificates=$(pip_setting cert)
for bundle in "${SSL_CERT_FILE:-}" "${REQUESTS_CA_BUNDLE:-}" /etc/ssl/certs/ca-certificates.crt \
    /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem; do
    if [ -z "$certificates" ] && [ -f "$bundle" ]; then certificates=$bundle; fi
done
if [ -n "$certificates" ]; then export PIP_CERT="$certificates" SSL_CERT_FILE="${SSL_CERT_FILE:-$certificates}"; fi

uv=$(command -v uv || true)
if ! "$uv" --version >/dev/null 2>&1; then
    uv=.tools/bin/uv
    if ! "$uv" --version >/dev/null 2>&1; then
        echo "installing uv into .tools/" >&2
        "$python" -m venv --clear .tools >&2 || { echo "this needs uv, or Python's venv module" >&2; exit 2; }
        .tools/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9' >&2
    fi
fi

if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}${UV_INDEX:-}${UV_EXTRA_INDEX_URL:-}" ] \
    && [ ! -f "${XDG_CONFIG_HOME:-$HOME/.config}/uv/uv.toml" ] && [ ! -f /etc/uv/uv.toml ]; then
    index=$(pip_setting index-url)
    extra=$(pip_setting extra-index-url)
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
    # As pip does: the best version wins, wherever it is. The pins carry hashes, so that no other file gets in.
    if [ -n "$extra" ]; then export UV_INDEX="$extra" UV_INDEX_STRATEGY=unsafe-best-match; fi
fi
export UV_SYSTEM_CERTS=1 UV_PYTHON_DOWNLOADS=never
exec "$uv" "$@"
