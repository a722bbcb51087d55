"""The root on the import path, and a small real corpus that tests share."""

import importlib.util
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables that point a run at 60,000 training and 5,001 validation tokens of the sample corpus."""
    spec = importlib.util.spec_from_file_location("sample", ROOT / "data" / "sample.py")
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    root = tmp_path_factory.mktemp("data")
    sample.build(root, Path(sysconfig.get_path("stdlib")), 1024)
    folder = root / "datasets" / "sample_sp1024"
    for split, count in (("train", 60_000), ("val", 5_001)):
        path = folder / f"fineweb_{split}_000000.bin"
        header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", count, offset=1024)
        header[2] = count
        path.write_bytes(header.tobytes() + tokens.tobytes())
    return dict(
        DATA_PATH=str(folder), TOKENIZER_PATH=str(root / "tokenizers" / "sample_1024_bpe.model")
    )
