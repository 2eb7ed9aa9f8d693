#!/usr/bin/env bash
# Everything that needs a GPU, in eight minutes; gpu.py says what, and which options there are.
#
#   loadtests/gpu.sh                              # then: loadtests/gpu.sh --table build/gpu/gpu.json
#   PYTHON=python3.12 loadtests/gpu.sh --cpu      # the same steps on processors, to try the script
#
# The environment comes first and does not count: build/gpu/.venv, about 6 GB, with the versions of constraints.txt.
# Where no package index can be reached: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER, a folder of wheels; else the steps run on
# PYTHON as it is, and those that lack a package say which.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=build/gpu/.venv

if [ ! -e "$venv/installed" ]; then
  mkdir -p build/gpu
  if "$python" -m venv "$venv" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 \
      --constraint constraints.txt --editable '.[gpu,training]' 'onnxruntime-gpu[cuda,cudnn]' \
      captum httpx locust pillow-heif; then
    touch "$venv/installed"
  else
    echo "There is no $venv: the packages could not be installed (above). Going on with $("$python" -c 'import sys; print(sys.executable)') as it is." >&2
  fi
fi
if [ -e "$venv/installed" ]; then
  python=$venv/bin/python
fi
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" loadtests/gpu.py "$@"
