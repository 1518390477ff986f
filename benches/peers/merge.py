"""mergekit on a merge: `merge.py CONFIG.yml OUT THREADS`"""

import shutil
import sys
from importlib.metadata import version

from turns import missing, take_turns

try:
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
except ImportError as error:
    missing(error)

path, out, threads = sys.argv[1:4]
torch.set_num_threads(int(threads))
with open(path, encoding="utf-8") as file:
    source = file.read()
config = MergeConfiguration.model_validate(yaml.safe_load(source))
# As the command line has it, without its progress bar and model card.
options = MergeOptions(quiet=True, write_model_card=False)


def clear():
    shutil.rmtree(out, ignore_errors=True)


def work():
    run_merge(config, out, options, config_source=source)


take_turns(f"mergekit {version('mergekit')}", work, clear, warm_ups=1)
