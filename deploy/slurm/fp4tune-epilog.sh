#!/bin/sh
# Epilog of slurm.conf: forget what fp4tune-prolog.sh noted.
[ -n "${SLURM_JOB_ID:-}" ] || exit 0
rm -f "${FP4TUNE_RUN:-/run/fp4tune}/job-$SLURM_JOB_ID"
