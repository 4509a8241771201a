#!/bin/sh
# HealthCheckProgram of slurm.conf. Drains this node where a layer was measured and nothing is safe,
# and resumes it when that is over. What could not be assessed (nothing published yet, stale) is
# said and changes nothing. It touches no node that somebody else drained, and drains none where
# FP4TUNE_MOST_DRAINED nodes (default 4) are drained by it already: then it is no node's fault.
defaults=${FP4TUNE_DEFAULTS:-/etc/default/fp4tune}
# shellcheck source=/dev/null
[ ! -r "$defaults" ] || . "$defaults"
export FP4TUNE_STATE="${FP4TUNE_STATE:-/var/lib/fp4tune}"
node=${SLURMD_NODENAME:-$(hostname -s)}

cd / || exit 0
# shellcheck disable=SC2086  # FP4TUNE_CHECK is several words: options of `fp4tune facts`
said=$("${FP4TUNE_PYTHON:-/opt/fp4tune/bin/python}" -m fp4tune.cache.facts --check ${FP4TUNE_CHECK:-} 2>&1)
code=$?
reason=$(sinfo --noheader --Node --nodes="$node" --format=%E | head -n 1)
case $code:$reason in
    0:fp4tune:*)
        scontrol update NodeName="$node" State=RESUME
        ;;
    1:none | 1:)
        drained=$(sinfo --noheader --Node --format='%N|%E' | sort -u | grep -c '|fp4tune:')
        if [ "$drained" -lt "${FP4TUNE_MOST_DRAINED:-4}" ]; then
            scontrol update NodeName="$node" State=DRAIN Reason="fp4tune: $said"
        else
            echo "fp4tune: $said; not drained, since $drained nodes are already" >&2
        fi
        ;;
    0:*) ;;
    *) echo "fp4tune: $said" >&2 ;;
esac
exit 0
