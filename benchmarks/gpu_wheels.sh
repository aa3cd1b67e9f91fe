#!/usr/bin/env bash
# Collect what gpu_day.py needs besides PyTorch and Triton, for a GPU machine without a network.
#
#     benchmarks/gpu_wheels.sh collect DIR [PYTHON_VERSION]   # with a network: DIR/*.whl for Python 3.12 by default
#     benchmarks/gpu_wheels.sh install DIR SITE               # on the GPU machine; then PYTHONPATH=SITE:benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."

collect() {
    local folder=$1 version=${2:-3.12}
    mkdir -p "$folder"
    # deepspeed has no wheel. It is pure Python as long as no operator is compiled ahead, so any Python can build it.
    DS_BUILD_OPS=0 python3 -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" \
        "$(grep '^deepspeed==' constraints.txt)"
    local pinned=() name
    for name in megatron-core transformers tokenizers safetensors huggingface_hub sentencepiece pydantic pydantic_core \
        annotated-types typing-inspection hjson py-cpuinfo msgpack einops ninja zstandard ruamel.yaml typer rich \
        markdown-it-py mdurl shellingham plotly narwhals psutil pytest iniconfig pluggy hypothesis \
        sortedcontainers regex; do
        pinned+=("$(grep -i "^${name//_/[-_]}==" constraints.txt || echo "$name")")
    done
    python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux_2_17_x86_64 --dest "$folder" "${pinned[@]}" cut-cross-entropy liger-kernel
    du -sh "$folder"
}

install() {
    local folder=$1 site=$2
    python3 -m pip install --quiet --no-index --no-deps --target "$site" "$folder"/*.whl
    python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$site" .
}

case ${1:-} in
    collect | install) "$@" ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
