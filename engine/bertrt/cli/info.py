"""``bertrt info``: what an engine folder holds."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from bertrt.architecture import BertArchitecture
from bertrt.builtin import resolve
from bertrt.cli.command import EXIT_OK, Command
from bertrt.cli.console import emit, human_bytes, printable, table
from bertrt.folder import EngineFolder
from bertrt.manifest import Heads, Manifest
from bertrt.plans import Plan

_HEAD_NAMES: Final = {"mlm": "masked LM", "nsp": "next sentence", "pooler": "pooler"}
_SHOWN_OF_HASH: Final = 16


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", metavar="ENGINE", help="an engine folder, or 'demo' for the built-in one")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every file's SHA-256 with the manifest (without it, presence and sizes only)",
    )


def _run(args: argparse.Namespace) -> int:
    folder = EngineFolder.open(resolve(args.engine, verify=args.verify), verify=args.verify)
    parameters = count_parameters(folder.manifest.architecture, folder.manifest.heads)
    if args.json:
        value: dict[str, Any] = json.loads(folder.manifest.to_json())
        value["path"] = str(folder.path)
        value["parameters"] = parameters
        value["total_bytes"] = folder.size()
        value["backend_bytes"] = {name: backend_bytes(folder.manifest, name) for name in value["backends"]}
        value["verified"] = bool(args.verify)
        emit(value, as_json=True)
    else:
        emit("\n".join(_summary(folder, parameters, verified=args.verify)), as_json=False)
    return EXIT_OK


def count_parameters(architecture: BertArchitecture, heads: Heads) -> int:
    """Trainable numbers of a model.

    The masked-LM decoder is counted as the word embeddings that it shares; one with weights of its own adds
    ``vocab_size * hidden_size``.
    """
    hidden, vocabulary = architecture.hidden_size, architecture.vocab_size
    dense, norm = hidden * hidden + hidden, 2 * hidden
    tables = vocabulary + architecture.max_position_embeddings + architecture.type_vocab_size
    feed_forward = 2 * hidden * architecture.intermediate_size + architecture.intermediate_size + hidden
    count = tables * hidden + norm + architecture.num_hidden_layers * (4 * dense + 2 * norm + feed_forward)
    if heads.pooler:
        count += dense
    if heads.mlm:
        count += dense + norm + vocabulary
    if heads.nsp:
        count += 2 * hidden + 2
    return count


def backend_bytes(manifest: Manifest, backend: str) -> int:
    """Bytes of the files that a backend reads; two backends may share some."""
    return sum(manifest.files[name].size for name in set(manifest.backends[backend].values()))


def _summary(folder: EngineFolder, parameters: int, *, verified: bool) -> Iterator[str]:
    manifest = folder.manifest
    architecture = manifest.architecture
    heads = [name for field, name in _HEAD_NAMES.items() if getattr(manifest.heads, field)]
    yield str(folder.path)
    yield table(
        [
            ("source", _source(manifest)),
            (
                "architecture",
                f"{architecture.num_hidden_layers} layers, {architecture.hidden_size} wide, "
                f"{architecture.num_attention_heads} heads, feed-forward {architecture.intermediate_size} "
                f"({architecture.hidden_act})",
            ),
            (
                "input",
                f"{architecture.vocab_size:,} WordPieces, {architecture.max_position_embeddings} positions",
            ),
            ("parameters", f"{parameters:,}"),
            ("target", manifest.target),
            ("precision", manifest.precision + (f", dialect {manifest.dialect}" if manifest.dialect else "")),
            ("heads", ", ".join(heads) or "none: features only"),
            ("backends", ", ".join(manifest.backends) or "none"),
            *((name, _flat(value)) for name, value in manifest.graph.items()),
            ("built with", _flat(manifest.versions)),
        ]
    )
    if manifest.calibration is not None:
        yield "calibration"
        # A scale for each product is for machines: --json.
        facts = {name: value for name, value in manifest.calibration.items() if name != "scales"}
        yield table([(name, _flat(value)) for name, value in facts.items()])
    if manifest.plan is not None:
        yield "plan"
        yield table(_plan(manifest.plan))
    elif manifest.target == "tensorrt":
        yield f"plan\n  not built; run: bertrt build {shlex.quote(str(folder.path))}"
    yield "files"
    records = [
        (human_bytes(record.size), name, record.sha256[:_SHOWN_OF_HASH])
        for name, record in sorted(manifest.files.items())
    ]
    total = (human_bytes(folder.size()), "in all", "hashes verified" if verified else "sizes checked")
    yield table([*records, total], align=">")
    if manifest.backends:
        yield "read by"
        yield table(
            [
                (human_bytes(backend_bytes(manifest, name)), name, ", ".join(sorted(set(roles.values()))))
                for name, roles in manifest.backends.items()
                if roles
            ],
            align=">",
        )
    if manifest.drift is None:
        yield f"drift\n  not measured; run: bertrt drift {folder.path}"
    else:
        yield "drift"
        yield table([(name, _flat(value)) for name, value in manifest.drift.items()])


def _plan(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("library", f"{plan.library} {plan.version}"),
        ("compute capability", ", ".join(plan.compute_capabilities)),
        *([("built on", plan.device)] if plan.device else []),
        ("profiles", ", ".join(map(str, plan.profiles))),
        ("masked-LM rows", str(plan.mlm_rows)),
        *((part, _flat(_built(facts))) for part, facts in plan.report.items()),
    ]


def _built(facts: object) -> object:
    """What was built of a part, in short: its matrix products are counted by the type of their operands."""
    if not isinstance(facts, Mapping):
        return facts
    products = facts.get("products")
    listed = products if isinstance(products, list) else []
    operands = Counter(str(product.get("operands")) for product in listed if isinstance(product, Mapping))
    return {
        **{name.replace("_", " "): facts[name] for name in ("layers", "fused_attention") if name in facts},
        **{f"products in {name}": count for name, count in operands.items()},
    }


def _source(manifest: Manifest) -> str:
    source = manifest.source
    text = f"{source.name} ({source.kind})"
    if source.revision:
        text += f", revision {source.revision}"
    if source.weights_sha256:
        text += f", weights {source.weights_sha256[:_SHOWN_OF_HASH]}"
    if manifest.latency_only:
        text += f", seed {source.seed}: random weights, for latency only, its answers mean nothing"
    return text


def _flat(value: object) -> str:
    """A JSON value in words: ``name value, name value``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))


COMMAND = Command(
    name="info",
    help="show what an engine folder holds",
    example="""
bertrt info demo
bertrt info my-engine --verify
bertrt info my-engine --json
""",
    add_arguments=_add_arguments,
    run=_run,
)
