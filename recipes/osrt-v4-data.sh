#!/usr/bin/env bash
# The tokenizer and the eight datasets of `looplm train pretrain-osrt-v4`, streamed from the Hugging Face hub: hundreds of
# gigabytes, and days, in full. If it was stopped, the same command continues. With the argument `tokenizer` or `data` it
# does that part alone.
set -euo pipefail
case "${1:-}" in "" | tokenizer | data) ;; *) echo "error: no part named '$1'; parts: tokenizer, data" >&2; exit 2 ;; esac
TOKENIZER=${TOKENIZER:-prepared/tokenizer}

declare -A SOURCES=(
  [tinystories]="hub:roneneldan/TinyStories"
  [codeparrot]="hub:codeparrot/codeparrot-clean"
  [fineweb-edu]="hub:HuggingFaceFW/fineweb-edu,sample-100BT"
  [pes2o]="hub:allenai/peS2o,v2"
  [wikipedia]="hub:wikimedia/wikipedia,20231101.en"
  [smoltalk]="hub:HuggingFaceTB/smoltalk,all"
  [evol-instruct]="hub:nickrosh/Evol-Instruct-Code-80k-v1"
  [openhermes]="hub:teknium/OpenHermes-2.5"
)

mkdir -p prepared
if [ "${1:-tokenizer}" = tokenizer ] && [ ! -e "$TOKENIZER/tokenizer.json" ]; then
  looplm tokenizer train --vocab 65536 --out "$TOKENIZER" \
    "${SOURCES[fineweb-edu]}" "${SOURCES[codeparrot]}" "${SOURCES[wikipedia]}"
fi
if [ "${1:-data}" = data ]; then
  for name in "${!SOURCES[@]}"; do
    looplm data prepare "${SOURCES[$name]}" --tokenizer "$TOKENIZER" --out "prepared/$name"
  done
fi
