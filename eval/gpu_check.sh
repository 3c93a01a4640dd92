#!/usr/bin/env bash
# What needs a GPU, in one command of at most 8 minutes, into one JSON:
#
#     bash eval/gpu_check.sh [eval/results/gpu_check.json]
#
# - tests/test_gpu.py: a run on the GPU grows and answers as on the CPU; four bits, bfloat16, gradient checkpointing
# - two tasks of the pocket sequence learned and answered there, then restored and located again on the CPU
# - speed of LLaVA-1.5 7B's shape with random weights: LoRA beside 8 and 64 experts, learning and reading
#
# Needs this repository, no network, and a Python that has torch, transformers (5 or newer), peft, accelerate, datasets,
# deepspeed, bitsandbytes, safetensors, pydantic, typer, rich, pyyaml, pillow, numpy, matplotlib, tensorboard, pytest and
# hypothesis; PYTHON names it. DEVICE=cpu MODEL=pocket tries the script itself where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-llava-1.5-7b}
OUT=$(realpath -m "${1:-eval/results/gpu_check.json}")
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

part() { # NAME SECONDS COMMAND...: runs it, and notes its status and seconds; a part that fails stops no other
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$WORK/$name.log" 2>&1
    echo "$name $? $((SECONDS - began))" >>"$WORK/parts"
    tail -n 3 "$WORK/$name.log"
}

part tests 180 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py

part data 60 "$PYTHON" -m llava_cmoe.cli data make-pocket "$WORK/data" --train-rows 128 --test-rows 40
hidden=()
[ "$DEVICE" = cpu ] && hidden=(CUDA_VISIBLE_DEVICES=)
part learn 120 env "${hidden[@]}" "$PYTHON" -m llava_cmoe.cli train train/recipes/pocket_cmoe.yaml \
    "data.root=$WORK/data" "data.tasks=[scienceqa, textvqa]" data.train_rows=128 training.epochs=1 \
    "evaluation.routes=[located]" "run=$WORK/run"
cp -r "$WORK/run" "$WORK/again" && rm -rf "$WORK/again/answers" "$WORK/again/results.json"
part restore 120 env CUDA_VISIBLE_DEVICES= "$PYTHON" -m llava_cmoe.cli eval "$WORK/again"

part speed_steps 150 "$PYTHON" eval/speed.py steps --device "$DEVICE" --model "$MODEL" --checkpointing \
    --variants lora_16,lora_64,cmoe_8,cmoe_64 --batch-size 4 --turns 5 --out "$WORK/speed_steps.json"
part speed_tasks 90 "$PYTHON" eval/speed.py tasks --device "$DEVICE" --model "$MODEL" --turns 5 \
    --out "$WORK/speed_tasks.json"

"$PYTHON" - "$WORK" "$OUT" "$DEVICE" "$MODEL" <<'PYTHON_END'
import json, sys
from pathlib import Path

import torch

from llava_cmoe.evaluation.log import read_answers
from llava_cmoe.provenance.versions import versions

work, out, device, model = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
parts = {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in
         (line.split() for line in (work / "parts").read_text().splitlines())}
for name, part in parts.items():
    part["last_line"] = ((work / f"{name}.log").read_text().strip().splitlines() or [""])[-1]
found = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "model": model, "parts": parts,
         "versions": versions()}
there, here = ({(path.relative_to(work / run), answer.id): answer for path in sorted((work / run).rglob("*.jsonl"))
                if path.parent.parent.name == "answers" for answer in read_answers(path)} for run in ("run", "again"))
if there and there.keys() == here.keys():
    found["routes"] = {"asked": len(there), "located_alike": sum(there[key].located == here[key].located for key in there),
                       "answered_alike": sum(there[key].text == here[key].text for key in there)}
found["speed"] = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("speed_*.json"))}
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(json.dumps(found, indent=1) + "\n")
print(f"{out}: written; parts that failed: {[name for name, part in parts.items() if part['status']] or 'none'}")
PYTHON_END
