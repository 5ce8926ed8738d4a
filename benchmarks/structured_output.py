"""How many outputs that were asked for with a JSON schema parse and validate: all of them, or the exit code is 1.

Several schemas in turn, temperature 1, a seed of its own for each request, streamed.

    python -m benchmarks.structured_output --base-url http://127.0.0.1:8000/v1    a cluster, by OpenAI's client
    python -m benchmarks.structured_output --model DIR --num-drafts 2             an engine in this process

One line of JSON says what came out. The schemas bound every string and list, so that outputs end by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import jsonschema

Schema = dict[str, Any]


def _object(properties: dict[str, Schema], **more: object) -> Schema:
    closed = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {**closed, **more}


def _text(length: int) -> Schema:
    return {"type": "string", "maxLength": length}


SCHEMAS: dict[str, Schema] = {
    "person": _object(
        {"name": _text(20), "age": {"type": "integer", "minimum": 0, "maximum": 120}, "is_student": {"type": "boolean"}}
    ),
    "order": _object(
        {
            "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            "status": {"enum": ["open", "paid", "sent"]},
            "items": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": _object({"title": _text(16), "count": {"type": "integer", "minimum": 1, "maximum": 99}}),
            },
        }
    ),
    "tree": {
        "$defs": {
            "leaf": _object({"name": _text(8)}),
            "node": _object(
                {"name": _text(8), "children": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/leaf"}}}
            ),
        },
        **_object({"root": {"$ref": "#/$defs/node"}}),
    },
    "shape": {
        "anyOf": [
            _object({"kind": {"const": "circle"}, "radius": {"type": "integer", "minimum": 0, "maximum": 1000}}),
            _object({"kind": {"const": "square"}, "side": {"type": "integer", "minimum": 0, "maximum": 1000}}),
        ]
    },
    "event": _object(
        {
            "title": _text(24),
            "date": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"},
            "note": {"type": ["string", "null"], "maxLength": 24},
        }
    ),
}


@dataclass(slots=True)
class Tally:
    """What came out."""

    num_requests: int = 0
    num_parsed: int = 0
    num_valid: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """The first few outputs that do not validate."""

    def add(self, name: str, text: str, finish_reason: str) -> None:
        """An output of the schema with this name."""
        self.num_requests += 1
        self.finish_reasons[finish_reason] = self.finish_reasons.get(finish_reason, 0) + 1
        try:
            value = json.loads(text)
            self.num_parsed += 1
            jsonschema.validate(value, SCHEMAS[name])
            self.num_valid += 1
        except (json.JSONDecodeError, jsonschema.ValidationError) as exc:
            if len(self.wrong) < 5:
                self.wrong.append(f"{name}: {text!r}: {str(exc).splitlines()[0]}")


def name_of(number: int) -> str:
    """The schema of a request."""
    return list(SCHEMAS)[number % len(SCHEMAS)]


def question(number: int) -> str:
    """What a request asks."""
    return f"Give me one {name_of(number)}, number {number}, as JSON."


async def ask_cluster(base_url: str, *, num_requests: int, concurrency: int, max_tokens: int) -> Tally:
    """Chat completions, streamed, by OpenAI's own client, with the key in OPENAI_API_KEY if there is one."""
    import openai

    api_key = os.environ.get("OPENAI_API_KEY", "none")
    tally, gate, started_s = Tally(), asyncio.Semaphore(concurrency), time.perf_counter()
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=300) as client:
        model = (await client.models.list()).data[0].id

        async def ask(number: int) -> None:
            name, pieces, reason = name_of(number), [], "none"
            schema = {"name": name, "schema": SCHEMAS[name], "strict": True}
            async with gate:
                stream = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": question(number)}],
                    response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[arg-type]
                    temperature=1.0,
                    seed=number,
                    max_tokens=max_tokens,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for chunk in stream:
                    tally.num_tokens += chunk.usage.completion_tokens if chunk.usage else 0
                    for choice in chunk.choices:
                        pieces.append(choice.delta.content or "")
                        reason = choice.finish_reason or reason
            tally.add(name, "".join(pieces), reason)

        await asyncio.gather(*(ask(number) for number in range(num_requests)))
    tally.seconds = time.perf_counter() - started_s
    return tally


def ask_engine(model: str, *, num_requests: int, num_drafts: int, concurrency: int, max_tokens: int) -> Tally:
    """The same requests, to an engine in this process."""
    from atom_cluster import LLMEngine, SamplingParams
    from atom_cluster.config.speculative import SpeculativeConfig
    from atom_cluster.messages.requests import GrammarSpec

    tally, started_s = Tally(), time.perf_counter()
    speculative = SpeculativeConfig(method="mtp", num_tokens=num_drafts) if num_drafts else None
    with LLMEngine(model, speculative=speculative, max_num_requests=concurrency) as engine:
        samplings = [
            SamplingParams(
                temperature=1.0,
                seed=number,
                max_tokens=max_tokens,
                grammar=GrammarSpec(kind="json_schema", text=json.dumps(SCHEMAS[name_of(number)])),
            )
            for number in range(num_requests)
        ]
        outputs = engine.generate([question(number) for number in range(num_requests)], samplings)
        if num_drafts:
            engine.print_mtp_statistics()
    for number, output in enumerate(outputs):
        tally.add(name_of(number), output["text"], output["finish_reason"])
        tally.num_tokens += len(output["token_ids"])
    tally.seconds = time.perf_counter() - started_s
    return tally


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 when every output is valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--base-url", help="of a running cluster, with /v1")
    where.add_argument("--model", help="directory of a model for an engine in this process")
    parser.add_argument("--num-drafts", type=int, default=0, help="with --model: tokens drafted by its MTP layers")
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=300)
    options = parser.parse_args(arguments)
    common = {
        "num_requests": options.num_requests,
        "concurrency": options.concurrency,
        "max_tokens": options.max_tokens,
    }
    if options.base_url:
        tally = asyncio.run(ask_cluster(options.base_url, **common))
    else:
        tally = ask_engine(options.model, num_drafts=options.num_drafts, **common)
    print(json.dumps({**asdict(tally), "seconds": round(tally.seconds, 1)}))
    return 0 if tally.num_valid == options.num_requests else 1


if __name__ == "__main__":
    sys.exit(main())
