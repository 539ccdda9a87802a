#!/usr/bin/env bash
# Which reading of the paper to trust: three runs on held-out speakers (docs/running.md, "Which run to start").
#
#     ./sweep.sh out                                                # the real model; a folder for each reading in out/
#     ./sweep.sh out/tiny --model tiny/model --data tiny/corpus     # what follows the folder goes to train.py
#     RUN="torchrun --nproc-per-node 4" ./sweep.sh out              # on four GPUs
#
# It ends at the first failure, or when train.py is asked to stop; the same line goes on from there.
set -euo pipefail
cd "$(dirname "$0")"
folder=${1:?"give a folder for the runs, such as ./sweep.sh out"}

reader= before=
for flag; do  # evaluate.py runs a reader only where it is named again
    case "$before $flag" in
        "--data-reader "* | *" --data-reader="*) reader=${flag#--data-reader=} ;;
    esac
    before=$flag
done

try() {  # name of the reading, flags of train.py
    out=$folder/$1
    if [ ! -e "$out/curves.png" ]; then  # which train.py draws last
        ${RUN:-python} train.py --output "$out" --resume --validation 0.1 "${@:2}"
        [ -e "$out/curves.png" ]  # asked to stop, it has saved and ended without an error
    fi
    [ -e "$out/metrics.json" ] || ${RUN:-python} evaluate.py --adapter "$out" --epochs best --resume \
        ${reader:+--data-reader "$reader"}
}
try default "${@:2}"
try faster --learning-rate 2e-4 "${@:2}"
try continue --speech-adapter continue "${@:2}"

ranked=$(cd "$folder" && grep -H '"validation_loss": [0-9]' {default,faster,continue}/epoch-*/settings.json | LC_ALL=C sort -k3g)
best=${ranked%%/*}
for name in default faster continue; do
    [ "$name" = "$best" ] || python -m analysis.compare "$folder/$best" --against "$folder/$name"
done
echo "Loss on held-out speakers, the lowest first. Trust $best, and read its numbers above:"
echo "$ranked"
