#!/usr/bin/env bash
# Write RESULTS.md from scratch: benchmarks/results.sh DATA [PYTHON]
# DATA holds models/{stories260K,reference-7m} and text/. Takes a quarter of an hour on two cores.
set -euo pipefail
data=$1
python=${2:-python}
here=$(dirname "$0")
stories=("$data/models/stories260K" "$data/text/tinystories.calibration.txt" "$data/text/tinystories.held.txt")
reference=("$data/models/reference-7m" "$data/models/reference-7m/calibration.txt" "$data/models/reference-7m/held.txt")

section() { # command line of a benchmark, shown with DATA for the folder, then its output
  printf '\n    python benchmarks/%s\n\n' "${*//$data/DATA}"
  "$python" "$here/$1" "${@:2}" 2>/dev/null
}

{
  cat "$here/preface.md"
  section frontier.py "${stories[@]}" "$data/text/tinyshakespeare.txt" \
    --temperatures 0.02 0.03 0.05 0.1 0.2 1e6 --multiple-of 4
  section frontier.py "${stories[@]}" --keeps 0.911 0.804 0.704 0.605 0.497 \
    --temperatures 0.02 0.03 0.04 0.05 0.06 --multiple-of 4
  section frontier.py "${stories[@]}" --keeps 0.911 0.804 0.704 0.605 0.497 \
    --temperatures 0.02 0.03 0.04 0.05 0.06
  section frontier.py "${reference[@]}" "$data/text/c4.jsonl" \
    --temperatures 0.02 0.05 0.1 0.2 1e6
  printf '\n## Cost\n'
  section cost.py "${reference[@]:0:2}"
} > "$here/RESULTS.md.partial"
mv "$here/RESULTS.md.partial" "$here/RESULTS.md"
