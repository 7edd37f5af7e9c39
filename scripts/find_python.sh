#!/bin/sh
# Print the path of a Python that can run sparsejax (3.13 preferred, then 3.12, then newer), or explain how to get one.
# Candidates are run, not only looked up: a version manager's shim can exist and still fail. PYTHON=... overrides.
# OLDEST=3.11 widens the search (used for the comparison environment) and WANT="3.11 3.12" sets the order.
set -u
oldest=${OLDEST:-3.12}
want=${WANT:-"3.13 3.12 3.14 3.15"}
unusable=""

# Prints the interpreter's real path when it runs, has the wanted version ($2, may be empty) and can make environments.
probe() {
    "$1" - "$2" "$oldest" 2>/dev/null <<'PY'
import sys
want, oldest = sys.argv[1], tuple(int(x) for x in sys.argv[2].split("."))
if sys.version_info[:2] < oldest or (want and "%d.%d" % sys.version_info[:2] != want):
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(3)
print(sys.executable)
PY
}

try() {
    found=$(probe "$1" "$2"); status=$?
    if [ $status -eq 0 ] && [ -n "$found" ]; then echo "$found"; exit 0; fi
    if [ $status -eq 3 ]; then unusable="$1"; fi
}

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON" ""
    echo "PYTHON=$PYTHON is not a working Python >= $oldest with the venv module." >&2
    exit 1
fi
pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
for version in $want; do
    for candidate in "python$version" python3 "$pyenv_root"/versions/"$version"*/bin/"python$version" \
        "$HOME"/.local/share/uv/python/cpython-"$version"*/bin/"python$version" \
        "$HOME"/.local/bin/"python$version" /opt/homebrew/bin/"python$version" /usr/local/bin/"python$version"; do
        try "$candidate" "$version"
    done
done

{
    echo "No working Python >= $oldest was found."
    if [ -n "$unusable" ]; then
        echo "$unusable is recent enough but lacks the venv module; on Debian or Ubuntu:  sudo apt install python3-venv"
    fi
    echo "Get one with any of these, then run make again:"
    echo "  Debian, Ubuntu   sudo apt install python3.12 python3.12-venv"
    echo "  Fedora           sudo dnf install python3.12"
    echo "  macOS            brew install python@3.13"
    echo "  pyenv            pyenv install 3.13"
    echo "  uv               uv python install 3.13"
    echo "or point make at it:  make PYTHON=/path/to/python3.13 demo"
} >&2
exit 1
