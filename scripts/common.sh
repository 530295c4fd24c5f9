# Sourced by the other scripts: the repository's root, and a virtual environment with everything in it.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${JEBM_VENV:-$ROOT/.venv}"

say() { printf '\n== %s\n' "$*"; }

# newest_python: the newest Python from 3.11 on that can make a virtual environment; 3.11 to 3.13 are tried by name.
newest_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "error: no Python from 3.11 on that can make a virtual environment; install one" \
    "(Debian: apt-get install python3 python3-venv)" >&2
  return 2
}

# install EXTRAS: make the environment where it is missing or older than what it is made from.
install() {
  local extras="$1" stamp="$VENV/.installed-$1" python
  if [ -f "$stamp" ] && [ "$stamp" -nt "$ROOT/setup.cfg" ] && [ "$stamp" -nt "$ROOT/requirements/local.txt" ]; then
    return
  fi
  # Without pip in it, as after Ctrl-C, an environment is half made: make it anew.
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(newest_python)" || exit
    "$python" -m venv --clear "$VENV"
  fi
  say "installing into ${VENV#"$ROOT"/}, $("$VENV/bin/python" --version) (minutes the first time)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
    --constraint "$ROOT/requirements/local.txt" --editable "$ROOT[$extras]"
  case "$extras" in
  *dev*) # Without torchvision, which it asks for, nothing here needs, and PyPI has built for another torch.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps 'torch-fidelity==0.4.0' ;;
  esac
  "$VENV/bin/python" -c 'import jebm, ray, torch'
  touch "$stamp"
}
