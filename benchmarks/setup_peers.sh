#!/usr/bin/env bash
# Install what train_speed.py compares with, each into an environment of its own below .peers/: TRL, torchtune and litgpt, and the
# torch that tunelib is measured with.
#
#     benchmarks/setup_peers.sh [trl] [torchtune] [litgpt]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
[ $# -gt 0 ] || set -- trl torchtune litgpt
for peer in "$@"; do
    case $peer in
        trl) packages="trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0" ;;
        torchtune) packages="torchtune==0.6.1 torchao==0.10.0" ;;
        litgpt) packages="litgpt==0.5.13" ;;
        *) echo "no peer is called $peer; there are trl, torchtune, litgpt" >&2 && exit 2 ;;
    esac
    python3 -m venv --clear ".peers/$peer"
    # torch first and alone: with its exact version known, pip looks at no other of its large builds
    ".peers/$peer/bin/python" -m pip install --disable-pip-version-check -q "$torch"
    # shellcheck disable=SC2086  (words)
    ".peers/$peer/bin/python" -m pip install --disable-pip-version-check -q "$torch" $packages
done
