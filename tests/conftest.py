"""The test suite's environment, set before any library is imported that reads it: offline, one thread, own caches."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="hfkit-tests-")

os.environ["HFKIT_CACHE"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(_CACHE.name, "huggingface")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Bit-exact comparisons between processes need the same number of threads in each.
os.environ["OMP_NUM_THREADS"] = "1"
for _name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
    del os.environ[_name]  # what a launcher left behind is not what a test is about
