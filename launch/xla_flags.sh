#!/usr/bin/env bash
# Compiler flags by accelerator generation: the only place that holds any. launch/run.sh exports them.
#
# They change when things happen, not what is computed: collectives that run beside arithmetic, scheduling around them,
# and how much on-chip memory an operation may take. Measure before adding one; an unknown flag stops the program.
# TPU flags go to LIBTPU_INIT_ARGS, GPU flags to XLA_FLAGS.
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: launch/xla_flags.sh [--dry-run] GENERATION
  GENERATION   v4, v5e, v5p, v6e, tpu7x or gpu
Prints NAME=VALUE: the environment variable that the generation's compiler reads and its flags. --dry-run is the same.
USAGE
}

# Gradient all-reduces between slices, pipelined over the data-centre network.
between_slices=(
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
# All-gathers of sharded parameters fused with the matrix products around them; libtpu refuses it elsewhere.
v5e_overlapped=(
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
)

generation=
for argument in "$@"; do
  case $argument in
    --help | -h) usage && exit 0 ;;
    --dry-run) ;;
    v4 | v5e | v5p | v6e | tpu7x | gpu) generation=$argument ;;
    *)
      echo "error: unknown argument '$argument': legal are v4, v5e, v5p, v6e, tpu7x, gpu, --dry-run, --help" >&2
      exit 2
      ;;
  esac
done

case $generation in
  v4 | v5p | tpu7x) flags=("${between_slices[@]}") ;;
  v5e) flags=("${v5e_overlapped[@]}" "${between_slices[@]}") ;;
  # Its matrix units want larger blocks than the default share of vector memory holds.
  v6e) flags=("${between_slices[@]}" --xla_tpu_scoped_vmem_limit_kib=98304) ;;
  gpu)
    flags=(
      --xla_gpu_enable_latency_hiding_scheduler=true
      --xla_gpu_enable_pipelined_all_gather=true
      --xla_gpu_enable_pipelined_all_reduce=true
      --xla_gpu_enable_pipelined_reduce_scatter=true
    )
    ;;
  *)
    echo "error: GENERATION is required: v4, v5e, v5p, v6e, tpu7x or gpu" >&2
    exit 2
    ;;
esac

if [[ $generation == gpu ]]; then
  echo "XLA_FLAGS=${flags[*]}"
else
  echo "LIBTPU_INIT_ARGS=${flags[*]}"
fi
