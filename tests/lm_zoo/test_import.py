"""`import lm_zoo` registers the Auto classes, and leaves alone what only training, evaluation and GPUs need."""

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # an import of it fails (torch copes; on other systems it is not installed)
import lm_zoo
from transformers import AutoConfig
assert type(AutoConfig.for_model("lm_zoo")) is lm_zoo.ZooConfig
print(*sorted({name for name in sys.modules if name.split(".")[0] in
    ("lightning", "pytorch_lightning", "datasets", "matplotlib", "pandas", "tensorboard", "jsonargparse", "rich")
    or name.startswith(("lm_zoo.train", "lm_zoo.eval", "lm_zoo.cli"))}))
"""


def test_import_takes_nothing_heavy_along():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
