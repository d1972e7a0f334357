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


WITHOUT_TRANSFORMERS = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
from lm_zoo.kernels import linear_attention
assert "transformers" not in sys.modules
try:
    from lm_zoo import ZooConfig
except ImportError as error:
    print(error)
"""


def test_the_ops_need_no_transformers():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "lm_zoo.ZooConfig needs transformers: pip install transformers"
