"""A few prompts, answered and printed with how long it took.

    python -m atom_cluster.tools.simple_inference --model Qwen/Qwen3-0.6B --temperature 0 --max-tokens 64

Takes ATOM's engine options; see `tools/engine_arguments.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.errors import AtomClusterError
from atom_cluster.llm_engine import GenerationOutput
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.tools.engine_arguments import add_engine_arguments, engine_arguments, kebab

_PROMPTS = (
    "Introduce yourself.",
    "List all prime numbers below 100.",
    "1 + 2 + 3 = ?",
    "What is the capital of France?",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate and print. Returns the exit status; 1 for an error it printed."""
    parser = argparse.ArgumentParser(
        prog="simple_inference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(parser)
    parser.add_argument("--prompt", action="append", help="instead of the samples; may be given several times")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args(kebab(sys.argv[1:] if arguments is None else arguments))
    try:
        _generate(options)
    except AtomClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _generate(options: argparse.Namespace) -> None:
    engine_options = engine_arguments(options)
    for note in engine_options.notes:
        print(f"note: {note}")
    prompts = options.prompt or list(_PROMPTS)
    sampling = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
    with engine_options.open() as engine:
        inputs = _as_chats(resolve_model_path(engine_options.model), prompts)
        if engine_options.profile.directory is not None:
            engine.start_profile()
        began_s = time.perf_counter()
        outputs = engine.generate(inputs, sampling)
        seconds = time.perf_counter() - began_s
        traces = engine.stop_profile() if engine_options.profile.directory is not None else []
        for prompt, output in zip(prompts, outputs):
            print(f"\nprompt: {prompt!r}\nanswer: {output['text']!r}\n{_statistics(output)}")
        num_tokens = sum(output["num_tokens_output"] for output in outputs)
        print(f"\n{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s")
        if engine_options.speculative is not None:
            engine.print_mtp_statistics()
    for trace in traces:
        print(f"trace: {trace}")


def _as_chats(model_dir: Path, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompts: in the words of the model's chat template, if it has one."""
    tokenizer = Tokenizer.from_directory(model_dir)
    template = ChatTemplate.from_directory(model_dir, special_tokens=tokenizer.special_tokens)
    if template is None:
        return [tokenizer.encode(prompt) for prompt in prompts]
    texts = [template.render([{"role": "user", "content": prompt}]) for prompt in prompts]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _statistics(output: GenerationOutput) -> str:
    return (
        f"{output['num_tokens_input']} tokens in, {output['num_tokens_output']} out ({output['finish_reason']}), "
        f"{output['latency']:.2f} s, first token after {output['ttft'] * 1000:.0f} ms, "
        f"{output['tpot'] * 1000:.2f} ms per token"
    )


if __name__ == "__main__":
    sys.exit(main())
