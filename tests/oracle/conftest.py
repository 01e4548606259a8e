"""The oracles run offline and quietly; they use the helpers of the suite one folder up."""

import os
import sys
from pathlib import Path

# Read by the libraries when they are imported, so before any test file is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1]))
