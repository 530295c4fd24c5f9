# Sourced by the other scripts: the repository's root, and a virtual environment with everything in it.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${JEBM_VENV:-$ROOT/.venv}"

say() { printf '\n== %s\n' "$*"; }

# install EXTRAS: make the environment where it is missing or older than what it is made from.
install() {
  local extras="$1" stamp="$VENV/.installed-$1" python
  python="$(command -v python3.11 || true)"
  if [ -z "$python" ]; then
    echo "error: python3.11 not found; install it (Debian: apt-get install python3.11 python3.11-venv)" >&2
    exit 2
  fi
  if [ -f "$stamp" ] && [ "$stamp" -nt "$ROOT/setup.cfg" ] && [ "$stamp" -nt "$ROOT/requirements/local.txt" ]; then
    return
  fi
  say "installing into ${VENV#"$ROOT"/} (minutes the first time)"
  # Without python3.11-venv, or after Ctrl-C, a half-made environment is left: make it anew.
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && ! "$python" -m venv --clear "$VENV"; then
    echo "error: python3.11 cannot make a virtual environment (Debian: apt-get install python3.11-venv)" >&2
    exit 2
  fi
  "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
    --constraint "$ROOT/requirements/local.txt" --editable "$ROOT[$extras]"
  case "$extras" in
  *dev*) # Without torchvision, which it asks for, nothing here needs, and PyPI has built for another torch.
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps 'torch-fidelity==0.4.0' ;;
  esac
  "$VENV/bin/python" -c 'import jebm, ray, torch'
  touch "$stamp"
}
