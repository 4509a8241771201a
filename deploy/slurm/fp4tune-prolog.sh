#!/bin/sh
# Prolog of slurm.conf: what is proven here, read before a job that has GPUs, in milliseconds.
# It notes the generation for fp4tune-task-prolog.sh, so that all tasks of the job pin the same.
# By itself it never stops a job. With FP4TUNE_STRICT=1 in /etc/default/fp4tune it fails where a
# layer was measured and nothing is safe; slurmd then drains the node and requeues the job.
[ -n "${SLURM_JOB_GPUS:-}" ] || exit 0
defaults=${FP4TUNE_DEFAULTS:-/etc/default/fp4tune}
# shellcheck source=/dev/null
[ ! -r "$defaults" ] || . "$defaults"
export FP4TUNE_STATE="${FP4TUNE_STATE:-/var/lib/fp4tune}"
run=${FP4TUNE_RUN:-/run/fp4tune}

cd / || exit 0
# shellcheck disable=SC2086  # FP4TUNE_CHECK is several words: options of `fp4tune facts`
said=$("${FP4TUNE_PYTHON:-/opt/fp4tune/bin/python}" -m fp4tune.cache.facts --check ${FP4TUNE_CHECK:-} 2>&1)
code=$?
generation=$(printf '%s\n' "$said" | sed -n 's/^[a-z]*: generation \([0-9][0-9]*\): .*/\1/p')
if [ -n "$generation" ] && mkdir -p "$run"; then
    note=$run/job-${SLURM_JOB_ID:?}
    printf '%s %s\n' "$generation" "$FP4TUNE_STATE" > "$note.new" && mv "$note.new" "$note"
fi
[ "$code" -eq 0 ] || echo "fp4tune: $said" >&2
[ "$code" -ne 1 ] || [ "${FP4TUNE_STRICT:-0}" != 1 ] || exit 1
exit 0
