#!/usr/bin/env bash
# Write RESULTS.md and its pictures: benchmarks/results.sh DATA [PYTHON [kept]]
# DATA holds models/{stories260K,reference-7m} and text/. What benchmarks/measured/ holds already, a
# section's output or the rows of a frontier, is not measured again; without it, expect a night on two
# cores. With "kept", methods and seeds that a frontier's rows lack are left out.
set -euo pipefail
data=$1
python=${2:-python}
only=${3:+--kept}
here=$(cd "$(dirname "$0")" && pwd)
kept=$here/measured
stories=("$data/models/stories260K" "$data/text/tinystories.calibration.txt" "$data/text/tinystories.held.txt")
reference=("$data/models/reference-7m" "$data/models/reference-7m/calibration.txt" "$data/models/reference-7m/held.txt")

shown() { # a benchmark's command line, with DATA for the folder
  local line="$*"
  line=${line//$data/DATA}
  printf '\n    python benchmarks/%s\n\n' "${line//$here/benchmarks}"
}

drawn() { # a benchmark that keeps its rows
  shown "$@"
  "$python" "$here/$1" "${@:2}" ${only:+"$only"} 2>/dev/null
}

section() { # name, then the command line of a benchmark, whose output is kept under the name
  local file=$kept/$1.md
  shift
  shown "$@"
  if [ ! -f "$file" ]; then
    "$python" "$here/$1" "${@:2}" > "$file.partial" 2>/dev/null
    mv "$file.partial" "$file"
  fi
  cat "$file"
}

{
  cat "$here/preface.md"
  printf '\n## Frontier\n'
  drawn frontier.py "${stories[@]}" "$data/text/tinyshakespeare.txt" --multiple-of 4 \
    --rows "$kept/frontier-stories260K.jsonl" --plot "$here/frontier-stories260K.png"
  printf '![stories260K](frontier-stories260K.png)\n'
  drawn frontier.py "${reference[@]}" "$data/text/c4.jsonl" \
    --rows "$kept/frontier-reference-7m.jsonl" --plot "$here/frontier-reference-7m.png"
  printf '![reference-7m](frontier-reference-7m.png)\n'
  printf '\n## Forms\n'
  drawn forms.py "${stories[@]}" --group 43,64 --block 4 \
    --rows "$kept/forms-stories260K.jsonl" --plot "$here/forms-stories260K.png"
  printf '![stories260K](forms-stories260K.png)\n'
  drawn forms.py "${reference[@]}" --light \
    --rows "$kept/forms-reference-7m.jsonl" --plot "$here/forms-reference-7m.png"
  printf '![reference-7m](forms-reference-7m.png)\n'
  section form-speed form_speed.py
  section sparsity-reference-7m essential_sparsity.py "${reference[0]}" "${reference[2]}" \
    --plot "$here/sparsity-reference-7m.png"
  printf '![sparsity](sparsity-reference-7m.png)\n'
  printf '\n## Speed\n'
  section speed speed.py
  printf '\n## Scale\n'
  cpu=(--threads 1 --clock cpu --rows "$kept/scale.jsonl")
  drawn scale.py --method modegpt "${cpu[@]}"
  drawn scale.py --method auto --blocks 2 --widths 4096 --samples 128 "${cpu[@]}"
  passing=$(mktemp -d)
  section large large.py "$passing" --samples 4 | sed "s|$passing|FOLDER|"
  wide=(--hidden 1024 --mlp 4096 --heads 16 --vocabulary 8000)
  section large-blocks large.py "$passing" --blocks 4,8,16 "${wide[@]}" --samples 8 |
    sed "s|$passing|FOLDER|"
  rmdir "$passing" 2>/dev/null || true
  printf '\n## Ingredients\n'
  section ablation-stories260K ablation.py "${stories[@]}" --multiple-of 4
  section ablation-reference-7m ablation.py "${reference[@]}"
  printf '\n## Prediction\n'
  section prediction prediction.py "${stories[@]}" --multiple-of 4
  printf '\n## Calibration\n'
  texts=("$data/text/tinyshakespeare.txt" "$data/text/c4.jsonl")
  rows=(--multiple-of 4 --rows "$kept/calibration-stories260K.jsonl")
  only= drawn calibration.py "${stories[@]}" "${texts[@]}" "${rows[@]}"
  only= drawn calibration.py "${stories[@]}" "${texts[@]}" "${rows[@]}" --method modegpt
  only= drawn calibration.py "${stories[@]}" "${texts[@]}" "${rows[@]}" --method auto --selects none
  printf '\n## Encoders\n'
  section encoders encoders.py "${stories[@]:1}"
  printf '\n## Cost\n'
  section cost-auto cost.py "${reference[@]:0:2}"
  section cost-modegpt cost.py "${reference[@]:0:2}" --method modegpt
} > "$here/RESULTS.md.partial"
mv "$here/RESULTS.md.partial" "$here/RESULTS.md"
