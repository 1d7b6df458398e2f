"A real OpenAI-compatible server as the judge: vLLM on the CPU, serving a micro checkpoint that reads bytes"

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
from byte_model import checkpoint

from stars.cli.main import main
from stars.habits.summaries import read_results
from stars.llm.ledger import Ledger

pytest.importorskip("vllm", reason="needs vLLM (make dev)")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "Address of a running server, and a function that stops it"
    folder = tmp_path_factory.mktemp("vllm")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS="1",
    )
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(checkpoint(folder / "micro")),
        "--served-model-name",
        "micro",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "8192",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)

    def stop():
        process.terminate()
        process.wait(60)

    for _ in range(240):
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            break
        except OSError:
            time.sleep(1)
    yield f"http://127.0.0.1:{port}/v1", stop
    stop()


def test_a_vllm_server_judges(server, tmp_path, monkeypatch, capsys):
    url, stop = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    texts = (
        pd.read_parquet(Path(__file__).parents[2] / "nbs/data/completions.parquet")
        .groupby("condition")
        .head(2)
        .reset_index(drop=True)
    )
    texts.to_parquet("completions.parquet")
    judge = [
        "judge",
        "completions.parquet",
        "--judge",
        "openai:micro",
        "--base-url",
        url,
        "--max-tokens",
        "40",
        "--ledger",
        "ledger.db",
    ]
    main([*judge, "--format", "json", "--out", "json"])
    main([*judge, "--format", "tags", "--out", "tags"])
    held, free = (pd.read_parquet(f"{f}/ratings.parquet") for f in ("json", "tags"))
    assert len(held) == len(free) == 4 * len(texts)
    counts = held["count"].dropna()
    assert (
        len(counts) > len(held) / 4 and (counts >= 0).all()
    )  # the grammar makes it answer, sense or no sense
    assert (
        free["count"].isna().all() and (free.tries == 2).all()
    )  # left free it babbles: asked twice, then missing, never 0
    results = read_results("tags/results.csv")
    assert (
        results.avg_verifications.isna().all()
        and (results.missing_verifications == 1).all()
        and results.accuracy.notna().all()
    )
    first = capsys.readouterr().out
    assert "kappa" in first.lower() or "κ" in first
    stop()  # nobody is there any more
    main([*judge, "--format", "json", "--out", "again"])
    assert pd.read_parquet("again/ratings.parquet").equals(held)  # the ledger answers
    main(["ledger", "ledger.db", "--to", "study.parquet"])
    main(
        [
            "judge",
            "completions.parquet",
            "--judge",
            "openai:micro",
            "--max-tokens",
            "40",
            "--format",
            "json",
            "--out",
            "replayed",
            "--ledger",
            "study.parquet",
        ]
    )
    assert pd.read_parquet("replayed/ratings.parquet").equals(held)
    with Ledger("ledger.db") as book:
        assert [t[:2] for t in book.totals()] == [("openai:micro", "concurrent")]
