"""A process of its own: loads what test_new_process wrote and prints, as JSON, what differs. python child.py FOLDER"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from support import Net

import lorafactory

torch.set_num_threads(1)
bad = {}
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    about, saved = json.loads((folder / "about.json").read_text()), load_file(folder / "expected.safetensors")
    x = saved["x"].clone()  # a file's tensors may lie unaligned, and then products round otherwise
    base = Net(about["transposed"])
    base.load_state_dict(load_file(folder / "base.safetensors"))
    try:
        adapted = lorafactory.load(base, folder / "adapter").eval()
        same = torch.equal(adapted(x), saved["y"])
        adapted.begin()
        same &= torch.equal(adapted(x), saved["y"])
        trains = sorted(n for n, p in adapted.adapter.named_parameters() if p.requires_grad) == about["trained"]
        named = adapted.variant == about["variant"]
        if not (same and trains and named):
            bad[folder.name] = f"same output {same}, trains {trains}, variant {adapted.variant}"
    except Exception as e:
        bad[folder.name] = f"{type(e).__name__}: {e}"
print(json.dumps(bad))
