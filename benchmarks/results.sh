#!/usr/bin/env bash
# Write RESULTS.md and its pictures from scratch: benchmarks/results.sh DATA [PYTHON]
# DATA holds models/{stories260K,reference-7m} and text/. Takes two hours on two cores; rows of the
# frontier that are in benchmarks/frontier-*.jsonl already are not measured again.
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
  printf '\n## Frontier\n'
  section frontier.py "${stories[@]}" "$data/text/tinyshakespeare.txt" --multiple-of 4 \
    --rows "$here/frontier-stories260K.jsonl" --plot "$here/frontier-stories260K.png"
  printf '![stories260K](frontier-stories260K.png)\n'
  section frontier.py "${reference[@]}" "$data/text/c4.jsonl" \
    --rows "$here/frontier-reference-7m.jsonl" --plot "$here/frontier-reference-7m.png"
  printf '![reference-7m](frontier-reference-7m.png)\n'
  printf '\n## Ingredients\n'
  section ablation.py "${stories[@]}" --multiple-of 4
  section ablation.py "${reference[@]}"
  printf '\n## Prediction\n'
  section prediction.py "${stories[@]}" --multiple-of 4
  printf '\n## Cost\n'
  section cost.py "${reference[@]:0:2}"
  section cost.py "${reference[@]:0:2}" --method modegpt
} > "$here/RESULTS.md.partial"
mv "$here/RESULTS.md.partial" "$here/RESULTS.md"
