#!/bin/sh
# Installs what the CUDA backend is built with into a folder, by pip: nvcc, headers and cuBLAS. For a build image without a
# toolkit, as that of wheels (.github/workflows/wheels.yml).
#
#   tools/install_cuda.sh /opt/cuda
set -eu
[ $# = 1 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2; }

python3 -m pip install -q --target "$1" 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
    'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*' 'nvidia-cublas==13.0.*'

cd "$1/nvidia/cu13/lib"
for name in cudart cublas cublasLt; do # the names that a linker looks for
    ln -sf "lib$name.so.13" "lib$name.so"
done
ln -sfn lib ../lib64 # where nvcc looks
