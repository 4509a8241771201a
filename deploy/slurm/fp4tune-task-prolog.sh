#!/bin/sh
# TaskProlog of slurm.conf: every task of a job pins the generation that fp4tune-prolog.sh noted.
note=${FP4TUNE_RUN:-/run/fp4tune}/job-${SLURM_JOB_ID:-}
[ -r "$note" ] || exit 0
read -r generation state < "$note" || exit 0
# Numbers are those of one state directory.
[ "${FP4TUNE_STATE:-$state}" = "$state" ] || exit 0
[ -n "${FP4TUNE_GENERATION:-}" ] || echo "export FP4TUNE_GENERATION=$generation"
echo "export FP4TUNE_STATE=$state"
