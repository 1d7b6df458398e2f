"Which numbers, how many threads, and what a user is told about both"

import pytest
import torch

from stars.lab.configs import preset
from stars.models.arithmetic import (
    MICRO_WEIGHTS,
    autocast,
    share_cores,
    suited_to,
    threads_for,
    warn_of_slow_half,
)
from stars.models.micro import micro_model, micro_tokenizer
from stars.rl.loops import Runtime
from stars.rl.sft import SFTConfig, sft
from stars.util.workers import cores


def old_cpu():
    "A CPU without units for 16-bit numbers"
    return 12.0


def new_cpu():
    "A CPU that has them"
    return 0.5


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_no_stage_computes_in_16_bits(name):
    cfg = preset(name)
    assert not any((cfg.base.bf16, cfg.sft.bf16, cfg.ppo.bf16))
    with autocast("cpu", cfg.sft.bf16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert torch.backends.mkldnn.matmul.fp32_precision in (
        "none",
        "ieee",
    )  # products are not rounded behind our back


@pytest.mark.parametrize(
    "where, asked, slowdown, said",
    [
        (
            "cpu",
            {"sft.bf16": True, "ppo.bf16": False},
            old_cpu,
            "sft.bf16: this CPU has no units for 16-bit numbers",
        ),
        ("cpu", {"sft.bf16": True, "ppo.bf16": True}, old_cpu, "sft.bf16 and ppo.bf16: this CPU"),
        ("cpu", {"sft.bf16": True}, new_cpu, ""),
        ("cpu", {"sft.bf16": False}, old_cpu, ""),
        ("cuda", {"sft.bf16": True}, old_cpu, ""),
    ],
)
def test_what_is_slow_is_said_in_one_line(capsys, where, asked, slowdown, said):
    warn_of_slow_half(where, asked, slowdown)
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == bool(said) and ("12 times" in err) == bool(said)


def test_a_micro_model_trains_on_one_thread_and_leaves_the_others_as_they_were(tmp_path, monkeypatch):
    tok, seen, before = micro_tokenizer(), [], torch.get_num_threads()
    model = micro_model(tok, hidden=32, layers=1, heads=2, ffn=32)
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    sft(
        model,
        tok,
        [dict(query="using 1, 2 make 3:", completion=" 1 + 2")],
        tmp_path,
        SFTConfig(epochs=1),
        runtime=Runtime(progress=False),
    )
    assert set(seen) == {1} and torch.get_num_threads() == 2
    with threads_for(MICRO_WEIGHTS):
        assert torch.get_num_threads() == 2  # a larger one uses what there is
    share_cores(cores())
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "cuda,weights,inside", [(True, 5_000_000, "high"), (True, 10**8, "highest"), (False, 10, "highest")]
)
def test_small_models_multiply_in_tf32_on_a_card(monkeypatch, cuda, weights, inside):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    with suited_to(weights):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"
