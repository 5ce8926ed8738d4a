"""Results as one page that needs nothing else: plots are inside, no script, no network.

    python -m benchmarks.html_report results/*.json --output report.html

One result gives its plots over time and its distributions; several, or the file of a sweep, give how they differ, then
each of them. Files of ATOM's client can be among them; they have no plots over time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.report import METRICS
from benchmarks.result_file import OWN, read_runs

_CSS = """
:root{color-scheme:light}
body{margin:0;background:#f6f7f9;color:#111827;font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:18px;margin:34px 0 10px}
p.about{color:#4b5563;margin:0 0 18px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:12px}
.tile,.plot,table{background:#fff;border:1px solid #e5e7eb;border-radius:8px}
.tile{padding:10px 14px}.tile b{display:block;font-size:22px;font-weight:600}.tile span{color:#6b7280;font-size:13px}
.tile.bad b{color:#cc2936}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:14px}
.plot{margin:0;padding:10px 12px}.plot figcaption{font-weight:600;font-size:14px}.plot svg{width:100%;height:auto}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:14px}
th,td{padding:6px 12px;text-align:right;border-bottom:1px solid #eef0f3;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr:last-child td{border-bottom:0}th{color:#6b7280;font-weight:600}
td.text,th.text{white-space:normal;overflow-wrap:anywhere;text-align:left}
.warning{background:#fff4e5;border:1px solid #f3c98b;border-radius:8px;padding:8px 14px;margin:14px 0}
.wide{overflow-x:auto}details summary{cursor:pointer;font-size:18px;font-weight:600;margin:26px 0 8px}
svg text{font-family:system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif!important}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--title")
    args = parser.parse_args(arguments)
    try:
        results = [run for path in args.results for run in read_runs(path)]
        print(write_page(results, args.output, title=args.title))
    except ValueError as exc:
        print(f"benchmarks.html_report: {exc}", file=sys.stderr)
        return 2
    return 0


def write_page(results: Sequence[Mapping[str, Any]], path: Path, *, title: str | None = None) -> Path:
    """Write the page, and the folders it is in. Raises ValueError without matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results, title=title), encoding="utf-8")
    return path


def page(results: Sequence[Mapping[str, Any]], *, title: str | None = None) -> str:
    """The page's text. Raises ValueError without results or without matplotlib."""
    if not results:
        raise ValueError("there is no result to show")
    title = title or f"Serving benchmark: {results[0].get('model_id', '')}"
    if len(results) == 1:
        body = f"<h1>{escape(title)}</h1>{_run(results[0])}"
    else:
        axis = swept(results)
        ordered = sorted(results, key=lambda result: _value(result, axis))
        runs = "".join(
            f"<details><summary>{escape(_label(result, axis))}</summary>{_run(result)}</details>" for result in ordered
        )
        body = f"<h1>{escape(title)}</h1>{_sweep(ordered, axis)}<h2>Each run</h2>{runs}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def swept(results: Sequence[Mapping[str, Any]]) -> str:
    """The field in which the runs differ: concurrency, unless that is the same everywhere."""
    return "request_rate" if len({result.get("max_concurrency") for result in results}) == 1 else "max_concurrency"


def _value(result: Mapping[str, Any], axis: str) -> float:
    value = result.get(axis)
    return float("inf") if value in (None, "inf") else float(value)


def _label(result: Mapping[str, Any], axis: str) -> str:
    value = result.get(axis)
    return f"{value} requests per second" if axis == "request_rate" else f"concurrency {value}"


def _sweep(results: Sequence[Mapping[str, Any]], axis: str) -> str:
    plots = _plots()
    points = [{**result, "x": _value(result, axis)} for result in results if _value(result, axis) != float("inf")]
    label = "requests per second" if axis == "request_rate" else "concurrency"
    rows = [
        [
            _label(result, axis),
            _number(result["request_throughput"]),
            _number(result["output_throughput"]),
            _number(result["total_token_throughput"]),
            _number(result.get("request_goodput:")),
            *(_number(result.get(f"{kind}_{name}_ms")) for name in ("ttft", "tpot") for kind in ("mean", "p99")),
            str(result.get(OWN, {}).get("num_failed", "")),
        ]
        for result in results
    ]
    heads = ["", "requests/s", "output tok/s", "total tok/s", "goodput/s"]
    heads += ["TTFT mean", "TTFT p99", "TPOT mean", "TPOT p99", "failed"]
    figures = _figures(plots.over_points(points, label)) if len(points) > 1 else ""
    return f"{_about(results[0])}{figures}<h2>Runs</h2>{_table(heads, rows)}"


def _run(result: Mapping[str, Any]) -> str:
    own = result.get(OWN, {})
    parts = [_about(result), _tiles(result, own), _warnings(own)]
    if "timeline" in own:
        plots = _plots()
        parts.append(_figures([*plots.over_time(own["timeline"]), *plots.distributions(own["quantiles_ms"])]))
    parts.append(f"<h2>Latency, milliseconds</h2>{_latencies(result)}")
    if own.get("goodput"):
        parts.append(f"<h2>Promises</h2>{_goodput(own['goodput'], result)}")
    if own.get("errors"):
        rows = [[str(number), kind, own["error_samples"].get(kind, "")] for kind, number in own["errors"].items()]
        parts.append(f"<h2>Errors</h2>{_table(['requests', 'kind', 'one of them'], rows, text_from=1)}")
    if own.get("server_metrics"):
        parts.append(f"<h2>The server's own figures, mean milliseconds</h2>{_agreements(own['server_metrics'])}")
    parts.append(f"<h2>How it was run</h2>{_provenance(result, own)}")
    return "".join(parts)


def _about(result: Mapping[str, Any]) -> str:
    own = result.get(OWN, {})
    words = [str(result.get("date", "")), str(result.get("backend", "")), own.get("command", "")]
    return f'<p class="about">{escape(" · ".join(word for word in words if word))}</p>'


def _tiles(result: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    failed = own.get("num_failed", result.get("num_prompts", 0) - result.get("completed", 0))
    tiles = [
        ("", f"{result['completed']:,}", f"requests in {result['duration']:.1f} s"),
        ("bad" if failed else "", f"{failed:,}", "failed"),
        ("", _number(result["request_throughput"]), "requests per second"),
        ("", _number(result["output_throughput"]), "output tokens per second"),
        ("", _number(result["total_token_throughput"]), "tokens per second in all"),
        ("", _number(result.get("median_ttft_ms")), "TTFT median, ms"),
        ("", _number(result.get("median_tpot_ms")), "TPOT median, ms"),
    ]
    if result.get("request_goodput:") is not None:
        tiles.append(("", _number(result["request_goodput:"]), "good requests per second"))
    cells = [
        f'<div class="tile {kind}"><b>{escape(value)}</b><span>{label}</span></div>' for kind, value, label in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _warnings(own: Mapping[str, Any]) -> str:
    client = own.get("client", {})
    if not client.get("is_bottleneck"):
        return ""
    return (
        '<p class="warning">The client did not keep up while it measured (timers '
        f"{client['event_loop_lag_ms_p99']:.1f} ms late at p99, CPU {client['cpu_share']:.0%} of a core): latencies "
        "are partly its own.</p>"
    )


def _latencies(result: Mapping[str, Any]) -> str:
    names = [name for name in METRICS if f"mean_{name}_ms" in result]
    found = {key for name in names for key in result if key.startswith("p") and key.endswith(f"_{name}_ms")}
    percents = sorted({float(key[1:].split("_")[0]) for key in found})
    rows = []
    for name in names:
        keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", *(f"p{percent:g}" for percent in percents))]
        rows.append([name.upper(), *(_number(result.get(key)) for key in keys)])
    return _table(["", "mean", "median", "std", *(f"p{percent:g}" for percent in percents)], rows)


def _goodput(goodput: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    total = max(1, result["num_prompts"])
    rows = [
        ["as promised", str(goodput["num_good"]), f"{goodput['num_good'] / total:.1%}"],
        ["as promised, no stall, no loss", str(goodput["num_smooth"]), f"{goodput['num_smooth'] / total:.1%}"],
        [f"with a stall above {goodput['stall_ms']:.0f} ms", str(goodput["num_stalled"]), ""],
        ["incomplete", str(goodput["num_incomplete"]), f"{goodput['num_incomplete'] / total:.1%}"],
    ]
    return _table(["", "requests", "share"], rows)


def _agreements(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            one["metric"],
            f"{one['client_ms']:.3f}",
            f"{one['front_ms']:.3f}",
            f"{one['server_ms']:.3f}",
            f"{one['difference_ms']:.3f}",
            "agree" if one["is_close"] else "differ",
        ]
        for one in found
    ]
    return _table(["", "client", "way there and back", "server", "difference", ""], rows)


def _provenance(result: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    client = own.get("client", {})
    rows = [
        ("model", result.get("model_id")),
        ("request rate, burstiness", f"{result.get('request_rate')}, {result.get('burstiness')}"),
        ("max concurrency", result.get("max_concurrency")),
        ("tokens in, out, cached", _tokens(result, own)),
        ("tokens per event", own.get("tokens_per_event") and f"{own['tokens_per_event']:.3f}"),
        (
            "client",
            client and f"timers {client['event_loop_lag_ms_p99']:.2f} ms late at p99, {client['cpu_share']:.0%}",
        ),
        ("hardware", ", ".join(f"{key} {value}" for key, value in own.get("hardware", {}).items())),
        ("software", ", ".join(f"{key} {value}" for key, value in own.get("software", {}).items())),
        ("commit", own.get("commit")),
    ]
    shown = [[name, str(value)] for name, value in rows if value not in (None, "", {})]
    return _table(["", ""], shown, text_from=1)


def _tokens(result: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    cached = own.get("total_cached_tokens", "?")
    return f"{result.get('total_input_tokens')}, {result.get('total_output_tokens')}, {cached}"


def _figures(plots: Sequence[tuple[str, str]]) -> str:
    figures = [
        f'<figure class="plot"><figcaption>{escape(caption)}</figcaption>{svg}</figure>' for caption, svg in plots
    ]
    return f'<h2>Plots</h2><div class="plots">{"".join(figures)}</div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text_from: int | None = None) -> str:
    """text_from: the first column of words rather than numbers, apart from the very first."""

    def cell(kind: str, index: int, value: str) -> str:
        is_text = text_from is not None and index >= text_from
        style = ' class="text"' if is_text else ""
        return f"<{kind}{style}>{escape(value)}</{kind}>"

    head = "".join(cell("th", i, value) for i, value in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, value) for i, value in enumerate(row)) + "</tr>" for row in rows)
    has_head = any(heads)
    return f'<div class="wide"><table>{f"<tr>{head}</tr>" if has_head else ""}{body}</table></div>'


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def _plots() -> Any:
    try:
        from benchmarks import plots  # matplotlib is wanted by nothing else of a run
    except ImportError as exc:
        raise ValueError("plots need matplotlib: pip install 'atom-cluster[tools]'") from exc
    return plots


if __name__ == "__main__":
    sys.exit(main())
