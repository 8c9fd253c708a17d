#!/usr/bin/env bash
# Installs the package in fresh environments, with and without a compiler, and prints what each has become of. Takes
# minutes, and is no part of CI. Further environments take the wheel that was built in the first; name a Python and a
# torch for each:
#
#     bash tests/install_matrix.sh python3.12:torch==2.14.1 python3.13:torch
#
# Ends with status 1 if anything is not as it should be.
set -uo pipefail
exec < /dev/null

torch="torch==2.13.0"
source="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH PYTHONHOME CC CXX LDSHARED BLOBLOSS_FAST_NATIVE
failed=0

# The sources, without what is built in place or ignored.
copy_sources() {
  mkdir -p "$1"
  tar -C "$source" --exclude=.git --exclude=build --exclude=dist --exclude='*.egg-info' --exclude='*.so' \
    --exclude='.*_cache' --exclude=__pycache__ --exclude=shared -cf - . | tar -C "$1" -xf -
}

cat > "$scratch/report.py" << 'END'
import importlib.metadata, platform, torch
from blobloss_fast import BlobLoss, backends
wheel = importlib.metadata.distribution("blobloss_fast").read_text("WHEEL")
tag = next(line.partition(": ")[2] for line in wheel.splitlines() if line.startswith("Tag: "))
mask = torch.zeros(1, 1, 4, 4)
mask[..., 1, 1] = 1
logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
loss = BlobLoss()(logits, mask)
loss.backward()
slope = logits.grad[0, 0, 1, 1].item()
right = abs(loss.item() - 2 * (1 - 1 / 9)) < 1e-5 and abs(slope + 2 * (17 / 81) / 4) < 1e-5
value = f"{loss.item():.4f} {slope:.4f} {'right' if right else 'WRONG'}"
print(f"{platform.python_version()}, torch {torch.__version__} | {tag} | {backends()['cpu']} | {value}")
END

# environment NAME PYTHON TORCH: a fresh one, in $venv
environment() {
  venv="$scratch/venv"
  rm -rf "$venv"
  "$2" -m venv "$venv" && "$venv/bin/pip" install --quiet "$3" > "$scratch/log" 2>&1 && return 0
  say "$1" "could not be made: $(tail -n 1 "$scratch/log")" WRONG
  return 1
}

# say NAME LINE [WRONG]
say() {
  printf '%s | %s\n' "$1" "$2"
  if [ -n "${3:-}" ]; then failed=1; fi
}

# report NAME TAG BACKEND: the line of an environment, which must match two patterns
report() {
  local line
  line="$(cd "$scratch" && "$venv/bin/python" -W error report.py 2>&1 | tail -n 1)"
  if [[ "$line" == *"| "$2" | $3"*"right" ]]; then say "$1" "$line"; else say "$1" "$line" WRONG; fi
}

without_compiler() { PATH="$venv/bin" "$@"; }

name="with a compiler"
if environment "$name" python3 "$torch"; then
  copy_sources "$scratch/a"
  "$venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$scratch/wheels" "$scratch/a" > "$scratch/log" 2>&1
  wheel="$(echo "$scratch"/wheels/blobloss_fast-*.whl)"
  "$venv/bin/pip" install --quiet "$wheel" > "$scratch/log" 2>&1
  report "$name" "py3-none-[lm]*" "native ("
fi

name="no compiler"
if environment "$name" python3 "$torch"; then
  copy_sources "$scratch/b"
  without_compiler "$venv/bin/pip" install --quiet "$scratch/b" > "$scratch/log" 2>&1
  report "$name" py3-none-any "reference (pure PyTorch): the native library was not built"

  name="no compiler, BLOBLOSS_FAST_NATIVE=1"
  "$venv/bin/pip" uninstall --quiet --yes blobloss_fast
  if BLOBLOSS_FAST_NATIVE=1 without_compiler "$venv/bin/pip" install "$scratch/b" > "$scratch/log" 2>&1; then
    say "$name" "was installed" WRONG
  else
    line="$(grep -m 1 -o 'error: the native library needs.*' "$scratch/log")"
    if [ -n "$line" ]; then say "$name" "fails: $line"; else say "$name" "fails without a clear line" WRONG; fi
  fi
fi

name="BLOBLOSS_FAST_NATIVE=0"
if environment "$name" python3 "$torch"; then
  copy_sources "$scratch/d"
  BLOBLOSS_FAST_NATIVE=0 "$venv/bin/pip" install --quiet "$scratch/d" > "$scratch/log" 2>&1
  report "$name" py3-none-any "reference (pure PyTorch): the native library was not built"
fi

name="editable"
if environment "$name" python3 "$torch"; then
  copy_sources "$scratch/e"
  "$venv/bin/pip" install --quiet --editable "$scratch/e" > "$scratch/log" 2>&1
  report "$name" "py3-none-[lm]*" "native ("
fi

for other in "$@"; do
  name="the first wheel"
  if environment "$name, $other" "${other%%:*}" "${other#*:}"; then
    "$venv/bin/pip" install --quiet "$wheel" > "$scratch/log" 2>&1
    report "$name" "py3-none-[lm]*" "native ("
  fi
done

[ "$failed" -eq 0 ] && echo "INSTALL MATRIX PASSED" || echo "INSTALL MATRIX FAILED"
exit "$failed"
